"""What reached the model: a hook on its forward that keeps every token, its label and its document.

Owns the recorder, how documents are read from a model's arguments, and the probe of attention across documents.
Imports torch and numpy only, because it runs in the peer's environment.

Shape suffixes: B rows of a micro-batch, T tokens of a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PADDING = -1
"""Document of a padding token."""
FIELDS = ("micro_batch", "row", "document", "position", "token", "label")
NOT_FOR_LOGITS = ("labels", "num_items_in_batch", "fused_lm_head", "logits_to_keep", "compute_loss_func")
"""Arguments that make a model return a loss instead of logits."""


def documents_of(arguments: Mapping[str, Any]) -> Tensor:
    """Return the document of each token as the arguments declare it to the model, int64 [B, T]; padding is PADDING.

    Reads, in this order: cu_seq_lens_q; a 4D mask (additive or boolean), where a document starts at the first key
    that a query sees; a 2D mask with document numbers from 1; positions that restart; otherwise a row is one document.
    """
    ids_BT = arguments["input_ids"]
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    ends = arguments.get("cu_seq_lens_q")
    tokens_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    if ends is not None:
        return torch.bucketize(tokens_T, ends[1:].to(tokens_T), right=True).expand(ids_BT.shape)
    if isinstance(mask, Tensor) and mask.ndim == 4:
        seen_BTT = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
        starts_BT = seen_BTT.byte().argmax(-1)
        new_BT = starts_BT.diff(prepend=starts_BT[:, :1], dim=-1) != 0
        return new_BT.cumsum(-1).masked_fill(~seen_BTT.diagonal(dim1=1, dim2=2), PADDING)
    if isinstance(mask, Tensor) and int(mask.max()) > 1:
        return mask.long() - 1
    documents_BT = torch.zeros_like(ids_BT)
    if positions is not None:
        positions = positions.expand(ids_BT.shape)
        # As transformers reads them: a document starts where a position is not its predecessor plus 1.
        starts_BT = positions.diff(prepend=positions[:, :1] - 1, dim=-1) != 1
        documents_BT = starts_BT.long().cumsum(-1)
    if isinstance(mask, Tensor):
        documents_BT = documents_BT.masked_fill(mask == 0, PADDING)
    return documents_BT


def whole_labels(labels: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Return the labels [B, T] of rows of which the model computes only some logits (logits_to_keep).

    The loss compares the logits of the kept position j with label j + 1, so that label is the token after j.
    """
    ids_BT = arguments["input_ids"]
    if labels.shape == ids_BT.shape:
        return labels
    kept = arguments.get("logits_to_keep", labels.shape[1])
    if isinstance(kept, Tensor) and kept.ndim:
        places = kept.nonzero().flatten() if kept.dtype == torch.bool else kept
    else:
        places = torch.arange(ids_BT.shape[1] - labels.shape[1], ids_BT.shape[1], device=ids_BT.device)
    labels_BT = torch.full_like(ids_BT, -100)
    labels_BT[:, places[:-1] + 1] = labels[:, 1:]
    return labels_BT


class Recorder:
    """Tokens of every training micro-batch of this rank, marks of the optimizer steps, and the document probe.

    `attach` hooks the model; `end_step` closes an optimizer step; `save` writes rank-N.npz:

        micro_batch, row, document, position, token, label: int32, one value per token that reached the model.
        steps: int64 [steps], micro-batches up to the end of each step.
        marks, cpu_marks: float64 [steps + 1], seconds and CPU seconds of this process at the start of training and at
            the end of each step.
        probe_*: document, position, token, label and row of the probed micro-batch; probe_delta: float32, largest
            change of a logit of each token after the first tokens of row 0 are replaced.
    """

    def __init__(self, labels_shifted: bool = False, spans_ranks: bool = False) -> None:
        """labels_shifted: whether the label of a token is the one that it predicts, not its own.
        spans_ranks: whether rows of the same number and micro-batch on several ranks are shards of one row.
        """
        self.labels_shifted, self.spans_ranks = labels_shifted, spans_ranks
        self.parts: list[dict[str, Tensor]] = []
        self.arrays: dict[str, list[np.ndarray]] = {name: [] for name in FIELDS}
        self.num_micro_batches = 0
        self.steps: list[int] = []
        self.marks: list[float] = []
        self.cpu_marks: list[float] = []
        self.enabled = True
        self.probed: dict[str, Any] | None = None
        self.probed_documents = 0
        self._probe: dict[str, np.ndarray] = {}

    def attach(self, model: nn.Module) -> None:
        """Record what every later forward with gradients gets. model: a causal LM of transformers."""
        model.register_forward_pre_hook(self._hook, with_kwargs=True)

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (self.enabled and torch.is_grad_enabled()):
            return
        arguments = dict(kwargs)
        if args:
            arguments["input_ids"] = args[0]
        if arguments.get("labels") is None:
            raise ValueError(
                "the model's forward got no labels; the peer's runner must pass them to Recorder.add itself"
            )
        labels = whole_labels(arguments["labels"], arguments)
        documents_BT = documents_of(arguments)
        positions = arguments.get("position_ids")
        if positions is None:
            positions = torch.arange(labels.shape[1], device=labels.device).expand(labels.shape)
        self.add(arguments["input_ids"], labels, documents_BT, positions.expand(labels.shape))
        if not self.steps and int((documents_BT.amax(-1) + 1).sum()) > self.probed_documents:
            # The micro-batch with the most documents of the first step is the one that the probe runs on.
            self.probed_documents = int((documents_BT.amax(-1) + 1).sum())
            self.probed = {name: value for name, value in arguments.items() if name not in NOT_FOR_LOGITS}
            self._probe = _flat(documents_BT, positions, arguments["input_ids"], labels)

    def add(
        self, ids_BT: Tensor, labels_BT: Tensor, documents_BT: Tensor, positions_BT: Tensor, row: int | None = None
    ) -> None:
        """Keep one micro-batch; copies stay on the device until the end of the step, so that nothing waits.

        row: number of a pack whose tokens lie on several ranks; None numbers the rows of the micro-batch.
        """
        values = {"document": documents_BT, "position": positions_BT, "token": ids_BT, "label": labels_BT}
        part = {name: tensor.detach().to(torch.int32).reshape(-1) for name, tensor in values.items()}
        rows_BT = _rows(documents_BT) if row is None else torch.full_like(documents_BT, row)
        part["row"] = rows_BT.to(torch.int32).reshape(-1)
        part["micro_batch"] = torch.full_like(part["row"], self.num_micro_batches)
        self.parts.append({name: tensor.clone() for name, tensor in part.items()})
        self.num_micro_batches += 1

    def start(self) -> None:
        """Mark the start of the first step."""
        self._mark()

    def end_step(self) -> None:
        """Mark the end of an optimizer step and move its tokens to the host."""
        self._mark()
        self.steps.append(self.num_micro_batches)
        for part in self.parts:
            for name in FIELDS:
                self.arrays[name].append(part[name].cpu().numpy())
        self.parts.clear()

    def _mark(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())
        self.cpu_marks.append(time.process_time())

    @torch.no_grad()
    def probe(self, logits: Callable[[dict[str, Any]], Tensor], probe_tokens: int, vocab_size: int) -> None:
        """Replace the first tokens of row 0 of a recorded micro-batch and record the change of every logit.

        logits: runs the model with these arguments; float [B, T, V]. Attention across documents shows as a change in
        another document than the first.
        """
        if self.probed is None:
            return
        changed = dict(self.probed)
        changed["input_ids"] = replaced(changed["input_ids"], probe_tokens, vocab_size)
        before, after = (logits(dict(arguments)).float() for arguments in (self.probed, changed))
        delta_BT = (after - before).abs().amax(-1)
        self._probe["delta"] = delta_BT.cpu().numpy().reshape(-1)
        self.probed = None

    def set_probe(self, delta_BT: Tensor, documents_BT: Tensor, positions_BT: Tensor, ids_BT: Tensor) -> None:
        """Record a probe that the caller ran itself."""
        self._probe = _flat(documents_BT, positions_BT, ids_BT, torch.full_like(ids_BT, -100))
        self._probe["delta"] = delta_BT.float().cpu().numpy().reshape(-1)

    def save(self, folder: Path, rank: int) -> None:
        """Write rank-N.npz."""
        arrays = {
            name: np.concatenate(parts) if parts else np.zeros(0, np.int32) for name, parts in self.arrays.items()
        }
        probe = {f"probe_{name}": values for name, values in self._probe.items() if "delta" in self._probe}
        values: dict[str, Any] = {
            **arrays,
            **probe,
            "steps": np.array(self.steps, dtype=np.int64),
            "marks": np.array(self.marks, dtype=np.float64),
            "cpu_marks": np.array(self.cpu_marks, dtype=np.float64),
            "labels_shifted": np.array(self.labels_shifted),
            "spans_ranks": np.array(self.spans_ranks),
        }
        np.savez_compressed(folder / f"rank-{rank}.npz", **values)


def replaced(ids_BT: Tensor, count: int, vocab_size: int) -> Tensor:
    """Return the ids with the first `count` of row 0 replaced by others."""
    changed_BT = ids_BT.clone()
    changed_BT[0, :count] = (changed_BT[0, :count] + vocab_size // 2) % vocab_size
    return changed_BT


def _rows(like_BT: Tensor) -> Tensor:
    return torch.arange(like_BT.shape[0], device=like_BT.device)[:, None].expand(like_BT.shape)


def _flat(documents_BT: Tensor, positions_BT: Tensor, ids_BT: Tensor, labels_BT: Tensor) -> dict[str, np.ndarray]:
    values = {
        "document": documents_BT,
        "position": positions_BT.expand(documents_BT.shape),
        "token": ids_BT,
        "label": labels_BT,
        "row": _rows(documents_BT),
    }
    return {name: tensor.detach().to(torch.int32).cpu().numpy().reshape(-1) for name, tensor in values.items()}
