"""A checked conversation: what the row formats give and the chat template takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conversation:
    """messages: checked, each with a role of system, user, assistant or tool, and a text `content` (or, with
        `tool_calls`, none); `train: False` is present on assistant messages that are not to be trained.
    tools: JSON schemas of the functions the assistant may call, or None.
    source: the row's own `source` column, or None.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    source: str | None
