"""JSON of unknown origin -> values, with every fault a ValueError of one short line.

Owns what is refused: bytes that are not UTF-8, the same key twice in an object (which value was meant is unknown), and,
where text is used, half surrogates, values that JSON has not, and nesting of more than MAX_DEPTH levels.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

# Far above any tool's schema, far below Python's recursion limit, which templates share.
MAX_DEPTH = 64


class _DuplicateKey(ValueError):
    pass


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; bytes must be UTF-8. NaN and Infinity are floats, as Python writes them."""
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: byte {error.start + 1} is 0x{text[error.start]:02x}") from None
    try:
        return json.loads(text, object_pairs_hook=_object)
    except _DuplicateKey:
        raise
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}") from None
    except ValueError as error:  # an integer of too many digits
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _DuplicateKey(f"an object has the key {shown(twice)} twice")
    return values


def check_json(value: Any, where: str, depth: int = 0) -> None:
    """Raise ValueError, which begins with `where`, for what cannot be written as JSON in UTF-8."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} holds half a surrogate pair, \\u{ord(value[error.start]):04x}") from None
    elif isinstance(value, (dict, list)):
        if depth == MAX_DEPTH:
            raise ValueError(f"{where} is nested too deeply: more than {MAX_DEPTH} levels")
        for item in value:
            check_json(item, where, depth + 1)
        if isinstance(value, dict):
            for item in value.values():
                check_json(item, where, depth + 1)
    elif isinstance(value, ValueError):
        raise ValueError(f"{where}: {value}")
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise ValueError(f"{where} holds {shown(value)}, which is not text, a number, a list or an object")


def shown(value: Any, limit: int = 40) -> str:
    """A value as a message shows it: short, on one line, ASCII."""
    if isinstance(value, ValueError):
        return str(value)
    try:
        text = json.dumps(value[: 2 * limit] if isinstance(value, (str, list)) else value)
    except (TypeError, ValueError, RecursionError):
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "..."
