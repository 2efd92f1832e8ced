"""Loss and perplexity of the trained tokens of a data set, by document length, by position and by source.

Owns the token losses and their exact means: every trained token has the same weight, whatever it is packed with.
Documents are read, tokenized, masked and packed as in training.

Shape suffixes: T tokens, L trained tokens, H hidden width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hbp_titan.components.loss import linear_cross_entropy_losses
from hbp_titan.data.batch import PackedBatch, make_batch
from hbp_titan.data.prepare import open_stores
from hbp_titan.data.token_store import TokenStore
from hbp_titan.job_config import Data, JobConfig
from hbp_titan.models.decoder import Decoder
from hbp_titan.packing import Level, build_plan
from hbp_titan.packing.metrics import bucket_name, length_bucket

CHUNK_TOKENS = 1024
"""Rows of logits that are in memory at a time."""
DEFAULT_PACK_TOKENS = 16384

Means = dict[str, dict[int | str, tuple[float, int]]]
"""For "all", "length", "position" and "source": group -> (sum of token losses, number of tokens). Groups of length and
position are the upper bounds of length bands (packing.metrics.length_bucket), powers of two."""


def open_data(
    data: Path,
    folder: Path,
    max_sample_tokens: int,
    cache: Path,
    max_samples: int,
    overlong: str,
    settings: Data | None = None,
) -> TokenStore:
    """Return the samples of `data`, a prepared set or a data source, which is prepared with the tokenizer of `folder`.

    Args:
        max_sample_tokens, overlong: limit of a sample, and data.max_length_policy for longer ones.
        max_samples: size of a random subset [0: all].
        settings: the template, its variables and its day, as in training [those of the folder].

    Raises ValueError as scripts/prepare_data.py does.
    """
    # The file of a prepared set; anything else is a source.
    if (data / "meta.json").is_file():
        return TokenStore.open(data)
    config = JobConfig(data=dataclasses.replace(settings or Data()))
    config.model.tokenizer_path = str(folder)
    config.data.train_files = [str(data)]
    config.data.cache_folder = str(cache)
    config.data.max_samples, config.data.max_length_policy = max_samples, overlong
    return open_stores(config, max_sample_tokens)[0]


def evaluate(
    model: Decoder,
    store: TokenStore,
    pack_tokens: int = DEFAULT_PACK_TOKENS,
    report: Callable[[str], None] = lambda line: None,
) -> Means:
    """Return the sums of the losses of all trained tokens of `store`, in float64, and their counts.

    pack_tokens: tokens of one forward pass; a longer sample is a pass by itself.
    Raises ValueError if the store's vocabulary is larger than the model's, or no token is trained.
    """
    if store.meta["vocab_size"] > model.args.vocab_size:
        raise ValueError(
            f"{store.folder}: prepared with a tokenizer of ids up to {store.meta['vocab_size'] - 1}, but the model has "
            f"{model.args.vocab_size} embeddings; prepare the data with the model's own tokenizer"
        )
    device = next(model.parameters()).device
    # Not more than all tokens: a small data set should not be padded to the full pack.
    level = Level(max_tokens=min(max(pack_tokens, int(store.lengths.max())), int(store.lengths.sum())))
    plan = build_plan(store.lengths, [level], 1, method="flat_sorted", loss_tokens=store.loss_tokens)
    means: Means = {kind: defaultdict(lambda: (0.0, 0)) for kind in ("all", "length", "position", "source")}
    for micro_batch in range(plan.num_iterations):
        ids = plan.pack(micro_batch, 0)
        batch = make_batch(store, ids, level, 0, len(ids))
        ids = batch.sample_ids  # make_batch sorts the documents
        # Summed in float64, so that the mean does not depend on the packs.
        losses = token_losses(model, batch.to(device)).double().cpu().numpy()
        documents = batch.document_ids[batch.loss_index].numpy()
        _add(means["all"], np.full(len(losses), "all"), losses)
        _add(means["length"], length_bucket(store.lengths[ids][documents]), losses)
        # Position of the label's token, counted from 1: one after the input's, which is counted from 0.
        _add(means["position"], length_bucket(batch.position_ids[batch.loss_index].numpy() + 2), losses)
        _add(means["source"], np.array(store.source_names)[store.sources[ids][documents]], losses)
        report(f"pack {micro_batch + 1} of {plan.num_iterations}: {batch.num_loss_tokens} trained tokens")
    if not means["all"]:
        raise ValueError(f"{store.folder}: no token is trained, so there is no loss; check the loss mask of the data")
    return {kind: dict(groups) for kind, groups in means.items()}


@torch.no_grad()
def token_losses(model: Decoder, batch: PackedBatch) -> Tensor:
    """Return the cross entropy of each trained token of a pack, float32 [L], in the order of `loss_index`."""
    labels_L = batch.labels[batch.loss_index]

    def head(normed_TH: Tensor, weight_VH: Tensor) -> Tensor:
        return linear_cross_entropy_losses(normed_TH[batch.loss_index], weight_VH, labels_L, CHUNK_TOKENS)

    return model(batch.input_ids, batch.position_ids, batch.documents, head_fn=head)


def _add(groups: dict[int | str, tuple[float, int]], keys: NDArray[Any], losses: NDArray[np.float64]) -> None:
    names, inverse = np.unique(keys, return_inverse=True)
    sums, counts = np.bincount(inverse, losses), np.bincount(inverse)
    for name, loss, count in zip(names.tolist(), sums.tolist(), counts.tolist(), strict=True):
        groups[name] = (groups[name][0] + loss, groups[name][1] + count)


def perplexity_table(means: Means) -> str:
    """Return tokens, loss and perplexity of all tokens and of each group; of sources only if there are several."""
    lines = [f"{'':<28}{'trained tokens':>15}{'loss':>10}{'perplexity':>12}"]
    titles = {"all": "all", "length": "document of", "position": "token", "source": "source"}
    for kind, groups in means.items():
        if kind == "source" and len(groups) == 1:
            continue
        for name, (total, count) in sorted(groups.items()):
            group = bucket_name(name) if isinstance(name, int) else name
            label = titles[kind] if kind == "all" else f"{titles[kind]} {group}"
            lines.append(f"{label:<28}{count:>15,}{total / count:>10.4f}{perplexity(total, count):>12.3f}")
    return "\n".join(lines)


def as_json(means: Means) -> dict[str, Any]:
    """Return the numbers of the table, unrounded."""
    return {
        kind: [
            {"group": name, "trained_tokens": count, "loss": total / count, "perplexity": perplexity(total, count)}
            for name, (total, count) in sorted(groups.items())
        ]
        for kind, groups in means.items()
    }


def perplexity(total: float, count: int) -> float:
    """Return exp of the mean loss, infinity on overflow."""
    mean = total / count
    # exp overflows a float above 709.
    return math.exp(mean) if mean < 700 else math.inf
