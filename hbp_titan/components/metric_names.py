"""The names under which TensorBoard and Weights & Biases show a step's figures.

Owns the names: torchtitan's (v0.2.2 components/metrics.py) where they mean the same, docs/metrics.md lists all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hbp_titan.components.run_totals import RunTotals

_NAMES = {
    "loss": "loss_metrics/global_avg_loss",
    "grad_norm": "grad_norm",
    "lr": "lr",
    "level": "level",
    "mfu": "mfu(%)",
    "padding": "padding(%)",
    "abr": "balance/abr",
    "time_imbalance": "balance/time_imbalance",
    "idle_share": "balance/idle_share",
    "data_wait_seconds": "time_metrics/data_loading(s)",
    "step_seconds": "time_metrics/end_to_end(s)",
    "checkpoint_blocked_seconds": "time_metrics/checkpoint_blocked(s)",
    "checkpoint_write_seconds": "time_metrics/checkpoint_write(s)",
    "peak_memory_gib": "memory/max_active(GiB)",
}


def scalars(record: Mapping[str, Any], totals: RunTotals, world_size: int) -> dict[str, float]:
    """Name -> value for the record of a step; what was not measured, or is not finite, is left out.

    totals: of the run up to this step.
    """
    return {name: value for name, value in _named(record, totals, world_size) if value is not None}


def _named(record: Mapping[str, Any], totals: RunTotals, world_size: int) -> Iterator[tuple[str, float | None]]:
    for key, name in _NAMES.items():
        yield name, record.get(key)
    yield "throughput(tps)", record["tokens_per_second"] / world_size  # of one device, as in torchtitan
    yield "n_tokens_seen", totals.tokens
    yield "time_metrics/data_loading(%)", 100 * record["data_wait_seconds"] / record["step_seconds"]
    for name, loss in record["loss_by_level"].items():
        yield f"loss_metrics/level/{name}", loss
    for border, mean in record["loss_by_length"].items():
        yield f"loss_metrics/length/{border}", mean["loss"]
    for name, memory in record["memory_by_level"].items():
        yield f"memory/level/{name}(GiB)", memory
    for name, counts in record["sources"].items():
        yield f"source/{name}/loss", counts["loss"]
        yield f"source/{name}/tokens", totals.sources[name]["tokens"]
    for name, figure in record.get("expert_load", {}).items():
        yield f"expert_load/{name}", figure
    if "validation" in record:
        yield from _of_validation(record["validation"])


def _of_validation(means: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    yield "validation_metrics/loss", means["loss"]
    for kind in ("level", "length", "source"):
        for name, mean in means[f"by_{kind}"].items():
            yield f"validation_metrics/{kind}/{name}", mean["loss"]
