"""Greedy generation: our own decoder with a key/value cache, or a model behind an OpenAI-compatible server.

Owns loading an HF folder for inference, the batches by length, the loop over tokens and the cache. The cache replaces
each block's `inner_attention`: a block projects and rotates as in training, the prompts pass as one packed sequence
through the model's own attention, and after that every pass is one token per prompt. Latent attention (DeepSeek-V2) is
cached expanded, with a key and a value per head. Plain greedy: no sampling and no penalty; of generation_config.json
only the ids that end an answer count.

Shape suffixes: T tokens of the pack, B prompts, V vocabulary, C cache slots per prompt, S slots in use, N query heads,
K key/value heads, G = N / K, D head width, L tokens of one prompt.
"""

from __future__ import annotations

import argparse
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hbp_titan.config import load_config
from hbp_titan.evaluation.needles import PromptFormatter
from hbp_titan.job_config import Data
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.documents import Documents, pack_documents
from hbp_titan.models.hf import HFTensors
from hbp_titan.models.hf_config import args_from_hf

DEFAULT_CACHE_TOKENS = 131072
"""Cache slots of one batch: 17 GB for Llama-3.1-8B in bfloat16."""
# The server batches concurrent requests itself.
PARALLEL_REQUESTS = 16
# Long prompts wait in the server's queue behind each other.
TIMEOUT_SECONDS = 3600.0
MAX_SHOWN_CHARACTERS = 300


class LocalBackend:
    """Greedy answers of the model in `folder`; a needles.Backend."""

    def __init__(
        self,
        folder: Path,
        formatter: PromptFormatter,
        device: torch.device,
        cache_tokens: int = DEFAULT_CACHE_TOKENS,
    ) -> None:
        self.formatter = formatter
        self.generator = Generator(load_model(folder, device), formatter.stop_ids, cache_tokens)

    def __call__(self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> list[str]:
        return [self.formatter.text(answer) for answer in self.generator.answers(prompts, max_new_tokens)]


class _BadRequest(ValueError):
    """The server does not accept the form or the values of a request."""


class ServerBackend:
    """Greedy answers of the model that `url` serves, http://localhost:8000 or http://localhost:8000/v1.

    The server gets token ids, so it answers exactly the same prompts as a LocalBackend; its tokenizer must be that of
    the prompts. A server that refuses ids (`transformers serve`) gets text. model: the name on the server [the first
    that it lists]. prompt_text: token ids -> a text that the tokenizer encodes to them.
    Raises ValueError, with the address, if the server does not answer or refuses.
    """

    def __init__(
        self, url: str, model: str | None = None, prompt_text: Callable[[Sequence[int]], str] | None = None
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--server {url}: must begin with http:// or https://")
        self.base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.prompt_text = prompt_text
        self.sends_text = False
        self.model = model or str(self._request("models", None, "data", 0, "id"))

    def __call__(self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> list[str]:
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            return list(pool.map(self._answer, prompts, max_new_tokens))

    def _answer(self, prompt: Sequence[int], max_new_tokens: int) -> str:
        # Not the chat endpoint, which would apply the server's own template once more.
        body = {"model": self.model, "max_tokens": max_new_tokens, "temperature": 0.0}
        if not self.sends_text:
            try:
                return str(self._request("completions", {**body, "prompt": list(prompt)}, "choices", 0, "text"))
            except _BadRequest as error:
                if self.prompt_text is None:
                    raise
                refused = error
        assert self.prompt_text is not None
        text = self.prompt_text(prompt)
        try:
            answer = str(self._request("completions", {**body, "prompt": text}, "choices", 0, "text"))
        except _BadRequest:
            # Not because of the ids, so the first reason is the one to show.
            if self.sends_text:
                raise
            raise refused from None
        self.sends_text = True
        return answer

    def _request(self, path: str, body: dict[str, Any] | None, *keys: str | int) -> Any:
        """Return the value at `keys` of the server's JSON reply."""
        address = f"{self.base}/{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as stream:
                reply = json.loads(stream.read())
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:MAX_SHOWN_CHARACTERS]
            kind = _BadRequest if error.code in (400, 422) else ValueError
            raise kind(f"{address}: the server refused with status {error.code}: {text}") from None
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"{address}: no answer from the server: {getattr(error, 'reason', error)}") from None
        # Of json.loads: an error page of a proxy, for example.
        except ValueError:
            raise ValueError(f"{address}: the server's answer is not JSON; is it OpenAI-compatible?") from None
        found = reply
        for key in keys:
            try:
                found = found[key]
            except (KeyError, IndexError, TypeError):
                missing, text = ".".join(map(str, keys)), str(reply)[:MAX_SHOWN_CHARACTERS]
                raise ValueError(f"{address}: the server's answer lacks {missing}: {text}") from None
        return found


def load_model(folder: Path, device: torch.device) -> Decoder:
    """Return the model of an HF folder on `device`, in bfloat16 on a GPU and float32 on the CPU.

    Raises ValueError if the weights do not fit config.json, or either is not supported.
    """
    args = args_from_hf(folder)
    tensors = HFTensors(folder, args)
    # On meta first: random initial weights would be computed and thrown away.
    with torch.device("meta"):
        model = Decoder(args)
    model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    return model.eval()


class Generator:
    """Greedy generation with `model`.

    Args:
        stop_ids: an answer ends before the first of these.
        cache_tokens: tokens that one batch caches; a longer prompt is a batch by itself.
    """

    def __init__(self, model: Decoder, stop_ids: Collection[int], cache_tokens: int = DEFAULT_CACHE_TOKENS) -> None:
        self.model, self.stop_ids, self.cache_tokens = model, frozenset(stop_ids), cache_tokens
        self.device = next(model.parameters()).device

    def answers(self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> list[list[int]]:
        """Return the tokens that follow each prompt, without the stop id that ends them.

        Raises ValueError for an empty prompt, and for a token that the model does not know.
        """
        for number, prompt in enumerate(prompts, start=1):
            if not len(prompt):
                raise ValueError(f"prompt {number} has no token, so there is nothing to continue")
            if max(prompt) >= (rows := self.model.args.vocab_size):
                raise ValueError(
                    f"prompt {number} has the token id {max(prompt)}, but the model has {rows} embeddings; use the "
                    "model's own tokenizer"
                )
        answers: list[list[int]] = [[] for _ in prompts]
        sizes = [len(prompt) + limit for prompt, limit in zip(prompts, max_new_tokens, strict=True)]
        for batch in batches_by_length(sizes, self.cache_tokens):
            new = self._batch([prompts[i] for i in batch], [max_new_tokens[i] for i in batch])
            for i, answer in zip(batch, new, strict=True):
                answers[i] = answer
        return answers

    @torch.no_grad()
    def _batch(self, prompts: list[Sequence[int]], limits: list[int]) -> list[list[int]]:
        lengths = [len(prompt) for prompt in prompts]
        state = CacheState(lengths, max(lengths) + max(limits), self.device)
        answers: list[list[int]] = [[] for _ in prompts]
        # Rows that still generate; the batch continues until the last one is done.
        open_rows = {row for row, limit in enumerate(limits) if limit}
        with cached(self.model, state):
            input_ids_T = torch.cat([torch.tensor(prompt, dtype=torch.int64) for prompt in prompts])
            position_ids_T = torch.cat([torch.arange(length) for length in lengths])
            logits_BV = self._forward(input_ids_T.to(self.device), position_ids_T.to(self.device), lengths)
            while True:
                next_B = logits_BV.argmax(dim=-1)
                for row, token in enumerate(next_B.tolist()):
                    # A finished row still passes through the model; its tokens are dropped.
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

    def _forward(self, input_ids_T: Tensor, position_ids_T: Tensor, lengths: list[int]) -> Tensor:
        """Return logits_BV after the last token of each prompt."""
        ends_B = torch.tensor(lengths, device=self.device).cumsum(0)
        # Logits of the last tokens only: those of every prompt token would take more memory than the cache.
        return self.model(
            input_ids_T,
            position_ids_T,
            pack_documents(lengths, device=self.device),
            head_fn=lambda normed_TH, weight_VH: F.linear(normed_TH[ends_B - 1], weight_VH),
        )


def batches_by_length(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return the indices of `sizes` in batches of similar size, the largest first.

    The largest size of a batch times its number of members is at most `max_tokens`, unless it has one member.
    """
    # Largest first, so that out of memory shows at once.
    batches: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if batches and sizes[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


class CacheState:
    """The position of each prompt, shared by the caches of all layers.

    Args:
        lengths: tokens of each prompt.
        capacity: cache slots per prompt, at least the longest prompt with its answer.

    decoding: whether the next pass has one token per prompt; the first pass has the whole prompts.
    """

    def __init__(self, lengths: Sequence[int], capacity: int, device: torch.device) -> None:
        assert max(lengths) <= capacity
        self.lengths, self.capacity = list(lengths), capacity
        self.rows_B = torch.arange(len(self.lengths), device=device)
        # Of the last prompt token; `advance` moves to the first new one.
        self.positions_B = torch.tensor(self.lengths, device=device) - 1
        self.in_use = max(self.lengths)
        self.decoding = False

    def advance(self) -> None:
        """Reserve a slot for the next token of each prompt; its position is then `positions_B`, int64."""
        self.decoding = True
        self.positions_B = self.positions_B + 1
        self.in_use += 1
        assert self.in_use <= self.capacity


class CachedAttention(nn.Module):
    """Replacement of a block's `inner_attention`, which it calls for the prompts.

    scale, window: as in attention.varlen_attention.
    """

    def __init__(self, inner: nn.Module, state: CacheState, scale: float, window: int | None) -> None:
        super().__init__()
        self.inner, self.state, self.scale, self.window = inner, state, scale, window
        self.keys_BKCD = self.values_BKCD = torch.empty(0)

    def forward(self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, documents: Documents) -> Tensor:
        """Return o_TND, as `inner_attention` does; while decoding T is B, and `documents` is not read."""
        if self.state.decoding:
            return self._next_token(q_TND, k_TKD, v_TKD)
        self.keys_BKCD, self.values_BKCD = self._stored(k_TKD), self._stored(v_TKD)
        return self.inner(q_TND, k_TKD, v_TKD, documents)

    def _stored(self, x_TKD: Tensor) -> Tensor:
        state = self.state
        # Zeros, not empty: slots after a prompt get weight 0, and 0 * NaN would be NaN.
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
        # Softmax in fp32, as in the training kernels; both products are in the model's dtype.
        scores_BKGS = (q_BKGD @ keys_BKSD.transpose(-1, -2)).float() * self.scale
        slots_S, positions_B1 = torch.arange(state.in_use, device=q_BND.device), state.positions_B[:, None]
        hidden_BS = slots_S > positions_B1
        if self.window is not None:
            hidden_BS |= slots_S <= positions_B1 - self.window
        weights_BKGS = scores_BKGS.masked_fill(hidden_BS[:, None, None], -torch.inf).softmax(dim=-1)
        return (weights_BKGS.to(values_BKSD.dtype) @ values_BKSD).flatten(1, 2)


@contextmanager
def cached(model: Decoder, state: CacheState) -> Iterator[None]:
    """Let `model` cache keys and values in the body; restore its attention and drop the cache afterwards."""
    originals = [block.inner_attention for block in model.blocks()]
    for layer, (block, inner) in enumerate(zip(model.blocks(), originals, strict=True)):
        block.inner_attention = CachedAttention(inner, state, model.args.softmax_scale, model.args.window(layer))
    try:
        yield
    finally:
        for block, inner in zip(model.blocks(), originals, strict=True):
            block.inner_attention = inner


def add_template_options(parser: argparse.ArgumentParser) -> None:
    """Add the settings of a run's chat template, which prompts must share, to a command line."""
    group = parser.add_argument_group("chat template, as data.* of the run")
    group.add_argument("--chat_template", default="", metavar="NAME|PATH", help="[that of the folder]")
    group.add_argument("--chat_template_kwargs", default="{}", metavar="JSON", help="its variables [%(default)s]")
    group.add_argument("--template_date", default=Data.template_date, metavar="DAY", help="[%(default)s]")


def template_settings(options: argparse.Namespace) -> Data:
    """Return the parsed options of `add_template_options`; raises ValueError as for the keys of a configuration."""
    keys = ("chat_template", "chat_template_kwargs", "template_date")
    return load_config([f"--data.{key}={getattr(options, key)}" for key in keys]).data
