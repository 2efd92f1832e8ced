"""The paper's speed-ups of HBP over ISF on larger models, and what the fit to the 8B model predicts of them.

Owns these figures and what had to be assumed: the paper's levels, SP degrees and recomputation of these runs, and but
for DeepSeek-V2 the number of GPUs, are not known to us. So a residual here is one of the assumptions too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hbp_titan.packing import Level
from hbp_titan.packing.arrays import IntArray
from hbp_titan.simulation.model_dims import get_dims
from hbp_titan.simulation.replay_methods import replay_methods
from hbp_titan.simulation.time_parts import Sharding, TimeModel


def assumed_level(max_tokens: int, cp_degree: int) -> Level:
    return Level(max_tokens, cp_degree, ac_policy="full")


LIKE_8B = (assumed_level(16384, 1), assumed_level(131072, 8))


@dataclass(frozen=True)
class PaperModel:
    """speed_up: the paper's. levels, world_size: assumed, but for DeepSeek-V2's longest length and GPUs."""

    flavor: str
    speed_up: float
    world_size: int
    levels: tuple[Level, ...]
    expert_parallel: int = 1


PAPER_MODELS = (
    PaperModel("qwen2_5_32b", 1.33, 32, LIKE_8B),
    PaperModel("llama3_1_70b", 1.42, 32, LIKE_8B),
    PaperModel("qwen2_5_72b", 1.40, 32, LIKE_8B),
    PaperModel("deepseek_v2_236b", 2.4, 256, (assumed_level(8192, 1), assumed_level(32768, 8)), expert_parallel=8),
)


def predict_models(lengths: IntArray, fitted: TimeModel, seed: int = 0) -> Iterator[tuple[PaperModel, float]]:
    """Simulated speed-up of HBP as printed over ISF, of each of PAPER_MODELS on the samples that its levels hold."""
    for row in PAPER_MODELS:
        mine = lengths[lengths <= row.levels[-1].max_tokens]
        sharding = Sharding(expert_parallel=row.expert_parallel)
        model = TimeModel(
            get_dims(row.flavor), fitted.hardware, row.world_size, sharding, fixed_seconds=fitted.fixed_seconds
        )
        replays = replay_methods(mine, row.levels, model, ("isf", "hbp_paper"), seed)
        yield row, replays["isf"].seconds / replays["hbp_paper"].seconds


def models_table(predictions: Iterator[tuple[PaperModel, float]]) -> str:
    """Every row beside the paper's, Markdown."""
    lines = ["| model | assumed | speed-up: paper | simulated | residual |", "|---|---|---|---|---|"]
    for row, simulated in predictions:
        levels = ", ".join(f"{level.max_tokens // 1024}K SP{level.cp_degree}" for level in row.levels)
        lines.append(
            f"| {row.flavor} | {levels}; {row.world_size} GPUs | {row.speed_up:.2f}x | {simulated:.2f}x | "
            f"{simulated / row.speed_up - 1:+.0%} |"
        )
    return "\n".join(lines)
