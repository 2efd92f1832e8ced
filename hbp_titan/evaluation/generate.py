"""Greedy answers of a decoder, many prompts at a time.

Owns loading a model from an HF folder for inference, the batches by length, and the loop over tokens. Plain greedy: of
generation_config.json only the ids that end an answer count, no penalty and no sampling.

Shape suffixes: T tokens of the pack, B prompts, V vocabulary.

Keys and values of past tokens, so that a decoder's next token costs one token's work.

Owns the cache and its attention. It acts through the seam `inner_attention`: a block projects and rotates as in
training, and what stands in place of its attention stores keys and values beside computing with them. The prompts pass
as one packed sequence through the model's own attention; after that every pass is one token of each prompt.
Latent attention (DeepSeek-V2) is cached expanded, a key and a value for each head.

Shape suffixes: T tokens of the pack, B prompts, C cells of the cache for each, S cells in use, N query heads,
K key/value heads, G = N / K, D head width.

Who answers the suite's prompts: the model of a folder on this machine, or one behind an OpenAI-compatible server.

Owns both forms of needle_suite.Answerer. A server (vLLM, SGLang) gets the prompts as token ids, so it answers the very
same prompts; the standard library's HTTP is enough for that.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hbp_titan.evaluation.needles import Prompter
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.documents import Documents, pack_documents
from hbp_titan.models.hf import load_hf_tensors
from hbp_titan.models.hf_config import args_from_hf
from hbp_titan.models.registry import build_model


class CacheState:
    """What all layers' caches share: how far each prompt has come.

    lengths: tokens of each prompt. capacity: cells for each, at least the longest prompt with its answer.
    decoding: whether the next pass brings one token of each prompt; the first brings the whole prompts.
    """

    def __init__(self, lengths: Sequence[int], capacity: int, device: torch.device) -> None:
        assert max(lengths) <= capacity
        self.lengths, self.capacity = list(lengths), capacity
        self.rows_B = torch.arange(len(self.lengths), device=device)
        self.positions_B = torch.tensor(self.lengths, device=device) - 1
        self.in_use = max(self.lengths)
        self.decoding = False

    def advance(self) -> None:
        """Make room for one more token of each prompt; its position is then `positions_B`, int64."""
        self.decoding = True
        self.positions_B = self.positions_B + 1
        self.in_use += 1
        assert self.in_use <= self.capacity


class CachedAttention(nn.Module):
    """In place of a block's `inner_attention`, which it calls for the prompts.

    scale: factor of the logits, as in attention.varlen_attention.
    """

    def __init__(self, inner: nn.Module, state: CacheState, scale: float) -> None:
        super().__init__()
        self.inner, self.state, self.scale = inner, state, scale
        self.keys_BKCD = self.values_BKCD = torch.empty(0)

    def forward(self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, documents: Documents) -> Tensor:
        """What `inner_attention` returns, o_TND; while decoding T is B, and `documents` is not read."""
        if self.state.decoding:
            return self._next_token(q_TND, k_TKD, v_TKD)
        self.keys_BKCD, self.values_BKCD = self._stored(k_TKD), self._stored(v_TKD)
        return self.inner(q_TND, k_TKD, v_TKD, documents)

    def _stored(self, x_TKD: Tensor) -> Tensor:
        state = self.state
        # Zeros: cells beyond a prompt are multiplied with a weight of 0, which NaN would survive.
        num_heads, width = x_TKD.shape[1:]
        cache_BKCD = x_TKD.new_zeros(len(state.lengths), num_heads, state.capacity, width)
        for row, x_LKD in enumerate(x_TKD.split(state.lengths)):
            cache_BKCD[row, :, : len(x_LKD)] = x_LKD.transpose(0, 1)
        return cache_BKCD

    def _next_token(self, q_BND: Tensor, k_BKD: Tensor, v_BKD: Tensor) -> Tensor:
        state = self.state
        self.keys_BKCD[state.rows_B, :, state.positions_B] = k_BKD
        self.values_BKCD[state.rows_B, :, state.positions_B] = v_BKD
        keys_BKSD, values_BKSD = self.keys_BKCD[:, :, : state.in_use], self.values_BKCD[:, :, : state.in_use]
        q_BKGD = q_BND.unflatten(1, (keys_BKSD.shape[1], -1))
        scores_BKGS = (q_BKGD @ keys_BKSD.transpose(-1, -2)).float() * self.scale
        unused_BS = torch.arange(state.in_use, device=q_BND.device) > state.positions_B[:, None]
        weights_BKGS = scores_BKGS.masked_fill(unused_BS[:, None, None], -torch.inf).softmax(dim=-1)
        return (weights_BKGS.to(values_BKSD.dtype) @ values_BKSD).flatten(1, 2)


@contextmanager
def cached(model: Decoder, state: CacheState) -> Iterator[None]:
    """Inside, `model` caches keys and values as `state` says; afterwards it is as before and the cache is gone."""
    originals = [block.inner_attention for block in model.blocks()]
    for block, inner in zip(model.blocks(), originals, strict=True):
        block.inner_attention = CachedAttention(inner, state, model.args.softmax_scale)
    try:
        yield
    finally:
        for block, inner in zip(model.blocks(), originals, strict=True):
            block.inner_attention = inner


DEFAULT_CACHE_TOKENS = 131072
"""Cells of the cache in one batch: 17 GB for Llama-3.1-8B in bfloat16."""


def load_model(folder: Path, device: torch.device) -> Decoder:
    """The model of an HF folder on `device`: bfloat16 on a GPU, float32 on the CPU.

    Raises ValueError where the weights do not fit config.json, or either is not supported.
    """
    args = args_from_hf(folder)
    tensors = load_hf_tensors(folder, args)
    with torch.device("meta"):
        model = build_model(args)
    model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    return model.eval()


class Generator:
    """Greedy answers of `model`.

    stop_ids: an answer ends before the first of these. cache_tokens: the batches' size, in tokens that are cached at a
    time; a longer prompt is a batch by itself.
    """

    def __init__(self, model: Decoder, stop_ids: Collection[int], cache_tokens: int = DEFAULT_CACHE_TOKENS) -> None:
        self.model, self.stop_ids, self.cache_tokens = model, frozenset(stop_ids), cache_tokens
        self.device = next(model.parameters()).device

    def answers(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
        """The tokens that follow each prompt, at most so many as its limit, without the one that ends them.

        Raises ValueError for an empty prompt.
        """
        for number, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {number + 1} has no token: there is nothing to continue")
        answers: list[list[int]] = [[] for _ in prompts]
        sizes = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
        for batch in batches_by_length(sizes, self.cache_tokens):
            found = self._batch([prompts[i] for i in batch], [limits[i] for i in batch])
            for i, answer in zip(batch, found, strict=True):
                answers[i] = answer
        return answers

    @torch.no_grad()
    def _batch(self, prompts: list[Sequence[int]], limits: list[int]) -> list[list[int]]:
        lengths = [len(prompt) for prompt in prompts]
        state = CacheState(lengths, max(lengths) + max(limits), self.device)
        answers: list[list[int]] = [[] for _ in prompts]
        open_rows = {row for row, limit in enumerate(limits) if limit}
        with cached(self.model, state):
            logits_BV = self._prompts(prompts, lengths)
            while True:
                next_B = logits_BV.argmax(dim=-1)
                for row, token in enumerate(next_B.tolist()):
                    if row not in open_rows:
                        continue
                    if token not in self.stop_ids:
                        answers[row].append(token)
                    if token in self.stop_ids or len(answers[row]) == limits[row]:
                        open_rows.remove(row)
                if not open_rows:
                    return answers
                state.advance()
                logits_BV = self._forward(next_B, state.positions_B, [1] * len(prompts))

    def _prompts(self, prompts: list[Sequence[int]], lengths: list[int]) -> Tensor:
        """logits_BV behind each prompt's last token."""
        input_ids_T = torch.cat([torch.tensor(prompt, dtype=torch.int64) for prompt in prompts])
        position_ids_T = torch.cat([torch.arange(length) for length in lengths])
        return self._forward(input_ids_T.to(self.device), position_ids_T.to(self.device), lengths)

    def _forward(self, input_ids_T: Tensor, position_ids_T: Tensor, lengths: list[int]) -> Tensor:
        ends_B = torch.tensor(lengths, device=self.device).cumsum(0)
        return self.model(
            input_ids_T,
            position_ids_T,
            pack_documents(lengths, device=self.device),
            head_fn=lambda normed_TH, weight_VH: F.linear(normed_TH[ends_B - 1], weight_VH),
        )


def batches_by_length(sizes: Sequence[int], max_sample_tokens: int) -> list[list[int]]:
    """Indices of `sizes` in batches of like size, the largest first so that too little memory shows at once.

    A batch's largest size times its number of members is at most `max_sample_tokens`, unless it has one member.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if batches and sizes[batches[-1][0]] * (len(batches[-1]) + 1) <= max_sample_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


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
