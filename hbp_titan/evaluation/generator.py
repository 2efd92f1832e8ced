"""Greedy answers of a decoder, many prompts at a time.

Owns loading a model from an HF folder for inference, the batches by length, and the loop over tokens. Plain greedy: of
generation_config.json only the ids that end an answer count, no penalty and no sampling.

Shape suffixes: T tokens of the pack, B prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from hbp_titan.evaluation.kv_cache import CacheState, cached
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.documents import pack_documents
from hbp_titan.models.hf import load_hf_tensors
from hbp_titan.models.hf_config import args_from_hf
from hbp_titan.models.registry import build_model

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


def batches_by_length(sizes: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Indices of `sizes` in batches of like size, the largest first so that too little memory shows at once.

    A batch's largest size times its number of members is at most `most_tokens`, unless it has one member.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if batches and sizes[batches[-1][0]] * (len(batches[-1]) + 1) <= most_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
