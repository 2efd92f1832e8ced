"""Who answers the suite's prompts: the model of a folder on this machine, or one behind an OpenAI-compatible server.

Owns both forms of needle_suite.Answerer. A server (vLLM, SGLang) gets the prompts as token ids, so it answers the very
same prompts; the standard library's HTTP is enough for that.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from hbp_titan.evaluation.generator import DEFAULT_CACHE_TOKENS, Generator, load_model
from hbp_titan.evaluation.prompt import Prompter

PARALLEL_REQUESTS = 16
TIMEOUT_SECONDS = 3600.0
_SHOWN_CHARACTERS = 300


class LocalAnswerer:
    """Greedy answers of the model in `folder`."""

    def __init__(
        self, folder: Path, prompter: Prompter, device: torch.device, cache_tokens: int = DEFAULT_CACHE_TOKENS
    ) -> None:
        self.prompter = prompter
        self.generator = Generator(load_model(folder, device), prompter.stop_ids, cache_tokens)

    def __call__(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[str]:
        """See needle_suite.Answerer."""
        return [self.prompter.text(answer) for answer in self.generator.answers(prompts, limits)]


class ServerAnswerer:
    """Greedy answers of the model that `url` serves, as http://localhost:8000 or http://localhost:8000/v1.

    model: its name there; the first that the server lists unless given. Its tokenizer must be that of the prompts.
    Raises ValueError, naming the address, where the server does not answer or refuses.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--server {url}: an address begins with http:// or https://")
        self.base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.model = model or self._first_model()

    def __call__(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[str]:
        """See needle_suite.Answerer."""
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            return list(pool.map(self._answer, prompts, limits))

    def _answer(self, prompt: Sequence[int], limit: int) -> str:
        path = "completions"
        reply = self._ask(path, {"model": self.model, "prompt": list(prompt), "max_tokens": limit, "temperature": 0.0})
        return str(_found(reply, f"{self.base}/{path}", "choices", 0, "text"))

    def _first_model(self) -> str:
        return str(_found(self._ask("models"), f"{self.base}/models", "data", 0, "id"))

    def _ask(self, path: str, values: dict[str, Any] | None = None) -> Any:
        address = f"{self.base}/{path}"
        body = None if values is None else json.dumps(values).encode()
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:_SHOWN_CHARACTERS]
            raise ValueError(f"{address}: the server refuses with status {error.code}: {said}") from None
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"{address}: no answer from the server: {getattr(error, 'reason', error)}") from None
        except ValueError:
            raise ValueError(f"{address}: the server's answer is not JSON: is it an OpenAI-compatible one?") from None


def _found(reply: Any, address: str, *path: str | int) -> Any:
    found = reply
    for key in path:
        try:
            found = found[key]
        except (KeyError, IndexError, TypeError):
            where = ".".join(map(str, path))
            raise ValueError(
                f"{address}: the server's answer lacks {where}: {str(reply)[:_SHOWN_CHARACTERS]}"
            ) from None
    return found
