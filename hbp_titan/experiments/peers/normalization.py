"""How a peer weights the tokens of an optimizer step, from the gradient norm that it reports.

Owns the reference: the norm of the gradient of the first step, computed again on the tokens that reached the peer's
model, each document alone, with the initial weights. The mean over all trained tokens gives one norm, the mean of the
micro-batches' means another. A norm that equals none of them means another gradient: another mask, attention between
documents, or other weights.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from hbp_titan.data.batch import make_batch
from hbp_titan.evaluation.generate import load_model
from hbp_titan.experiments.peers.audit import Piece, Recording
from hbp_titan.models.decoder import Decoder
from hbp_titan.packing import Level

TOLERANCE = {"float32": 5e-4, "bfloat16": 2e-2}
"""Relative difference up to which two norms are equal."""


@dataclass(frozen=True)
class Weighed:
    """A document of the first step, and where it was trained."""

    piece: Piece
    rank: int
    micro_batch: int

    @property
    def trained(self) -> int:
        """Number of its labels."""
        return int(self.piece.trained.sum())


def _mean_of(key: Callable[[Weighed], object], documents: Sequence[Weighed]) -> NDArray[np.float64]:
    """Return the weight of a token of each document if the loss is the mean of the groups' token means."""
    tokens: Counter[object] = Counter()
    for document in documents:
        tokens[key(document)] += document.trained
    groups = sum(1 for count in tokens.values() if count)
    return np.array([1 / (groups * tokens[key(d)]) if d.trained else 0.0 for d in documents])


def _mean_of_micro_batches(documents: Sequence[Weighed]) -> NDArray[np.float64]:
    """Return the weights of the mean over ranks of the mean over a rank's micro-batches."""
    weights = _mean_of(lambda d: (d.rank, d.micro_batch), documents)
    counts: dict[int, set[int]] = defaultdict(set)
    for document in documents:
        counts[document.rank].add(document.micro_batch)
    total = sum(len(numbers) for numbers in counts.values())
    shares = np.array([total / (len(counts) * len(counts[d.rank])) for d in documents])
    return weights * shares


WEIGHTS: dict[str, Callable[[Sequence[Weighed]], NDArray[np.float64]]] = {
    "tokens": lambda documents: _mean_of(lambda d: 0, documents),
    "micro-batch means": _mean_of_micro_batches,
    "rank means": lambda documents: _mean_of(lambda d: d.rank, documents),
    "sample means": lambda documents: _mean_of(id, documents),
}
"""Weight of a trained token of each document, by what the loss is the mean of."""


class _Source:
    """Documents as a SampleSource."""

    def __init__(self, documents: Sequence[Weighed]) -> None:
        self.documents = documents

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return tokens and loss mask."""
        piece = self.documents[index].piece
        return piece.tokens, piece.trained


def first_step(recording: Recording) -> list[Weighed]:
    """Return the documents of the first optimizer step."""
    rows = [row for row in recording.rows if recording.step_of(row) == 0]
    return [Weighed(piece, row.rank, row.micro_batch) for row in rows for piece in row.pieces if len(piece.tokens) > 1]


def gradient_norm(model: Decoder, documents: Sequence[Weighed], weights: NDArray[np.float64]) -> float:
    """Return the norm of the gradient of the weighted sum of token losses, each document alone."""
    device = next(model.parameters()).device
    model.zero_grad()
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, document in enumerate(documents):
        groups[document.rank, document.micro_batch].append(number)
    for numbers in groups.values():
        level = Level(sum(len(documents[n].piece.tokens) for n in numbers))
        batch = make_batch(_Source(documents), numbers, level, 0, len(numbers), weights[numbers]).to(device)
        labels_L, weights_L, index = (
            batch.labels[batch.loss_index],
            batch.loss_weights[batch.loss_index],
            batch.loss_index,
        )

        def head(hidden_TH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
            losses_L = F.cross_entropy((hidden_TH[index] @ weight_VH.T).float(), labels_L, reduction="none")  # noqa: B023
            return (losses_L * weights_L).sum()  # noqa: B023

        loss = model(batch.input_ids, batch.position_ids, batch.documents, head_fn=head)
        loss.backward()
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


@dataclass(frozen=True)
class Normalization:
    """errors: relative difference of the reported norm from each reference. name: the one that it equals, or ""."""

    name: str
    errors: dict[str, float]

    @property
    def verdict(self) -> str:
        """A word for the table."""
        if self.name:
            return f"mean over {self.name}"
        nearest = min(self.errors, key=lambda name: abs(self.errors[name]))
        return f"none ({self.errors[nearest]:+.1%} of {nearest})"


def classify(reported: float, reference: Callable[[str], float], tolerance: float) -> Normalization:
    """Return which reference a reported norm equals.

    reference: gradient norm by a name of WEIGHTS. The mean over tokens comes first: with equal token counts several
    references are the same norm, and most peers need no further one.
    """
    errors: dict[str, float] = {}
    for name in WEIGHTS:
        errors[name] = reported / reference(name) - 1
        if abs(errors[name]) <= tolerance:
            return Normalization(name, errors)
    return Normalization("", errors)


def check(recording: Recording, reported: float, model: Path, device: torch.device, dtype: str) -> Normalization:
    """Return the normalization of a run. reported: gradient norm of its first step. model: the initial weights."""
    decoder = load_model(model, torch.device("cpu")).to(device).train()
    documents = first_step(recording)
    return classify(
        reported, lambda name: gradient_norm(decoder, documents, WEIGHTS[name](documents)), TOLERANCE[dtype]
    )
