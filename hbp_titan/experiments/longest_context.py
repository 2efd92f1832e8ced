"""The longest document that fits, by the memory estimate: models and machines of longest_context.md.

    python -m hbp_titan.experiments.longest_context [--only h100-80gb] [--ranks 1,8,32,64]

One document over all ranks (cp_degree = world size). Of the plans below the one that holds the longest document counts;
lengths are found by bisection to an eighth of a power of two per rank. Nothing is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from hbp_titan.config import JobConfig
from hbp_titan.distributed.context_parallel import check_heads
from hbp_titan.errors import exit_on_user_error
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level
from hbp_titan.packing.level import format_tokens
from hbp_titan.tuning.hardware import Hardware, get_hardware
from hbp_titan.tuning.memory import MemoryEstimate, estimate_memory
from hbp_titan.tuning.memory_plans import CHUNK_TOKENS, fits_hardware

MODELS = ("llama3_1_8b", "llama3_1_70b")
MACHINES = ("h100-80gb", "h200-141gb", "a100-80gb", "rtx4090-24gb")
RANKS = (1, 8, 32, 64)
LORA_MACHINES = ("rtx4090-24gb",)
"""Full training does not fit there in a useful length: adapters of rank 16 on all matrices."""
HEAD_GROUPS = (1, 4, 8)
STEPS = 8
"""Lengths between two powers of two."""
MIN_SHARD, MAX_SHARD = 1 << 11, 1 << 24


@dataclass(frozen=True)
class Longest:
    """The longest document of a model on a machine, and its plan; None if none fits."""

    level: Level | None
    cpu_offload: bool = False
    estimate: MemoryEstimate | None = None

    @property
    def tokens(self) -> int:
        """Its length; 0 if none fits."""
        return 0 if self.level is None else self.level.max_tokens

    def __str__(self) -> str:
        if self.level is None or self.estimate is None:
            return "-"
        words = ["cpu_offload"] if self.cpu_offload else []
        words += [f"{self.level.attention_head_groups} groups"] if self.level.attention_head_groups > 1 else []
        peak, host = self.estimate.peak_bytes / 2**30, self.estimate.host_bytes / 2**30
        return f"{format_tokens(self.tokens)} ({', '.join([*words, f'{peak:.0f} + {host:.0f} GiB'])})"


def longest(args: ModelArgs, hardware: Hardware, world_size: int, lora_rank: int = 0) -> Longest:
    """Return the longest document, the plan with less in host memory first among equal lengths."""
    found = [_longest(args, hardware, world_size, config, form) for config, form in _plans(args, world_size, lora_rank)]
    return max(found, key=lambda candidate: candidate.tokens)


def _plans(args: ModelArgs, world_size: int, lora_rank: int) -> Iterator[tuple[JobConfig, Level]]:
    """Yield configurations and levels whose length is still open."""
    for cpu_offload in (False, True):
        config = JobConfig()
        config.parallelism.cpu_offload = cpu_offload
        config.lora.rank, config.lora.target_modules = lora_rank, ["all-linear"]
        for groups in HEAD_GROUPS:
            for style in ("ulysses", "hybrid"):
                form = Level(
                    world_size,
                    world_size,
                    style,
                    "offload",
                    mlp_chunk_tokens=CHUNK_TOKENS,
                    attention_head_groups=groups,
                )
                try:
                    check_heads([form], args.num_heads, args.num_kv_heads)
                except ValueError:
                    continue
                yield config, form
                # The first style that fits the heads.
                break


def _longest(args: ModelArgs, hardware: Hardware, world_size: int, config: JobConfig, form: Level) -> Longest:
    def at(shard: int) -> Longest:
        level = dataclasses.replace(form, max_tokens=shard * world_size)
        estimate = estimate_memory(args, level, config, world_size, device_type="cuda")
        return Longest(
            level if fits_hardware(estimate, hardware, world_size) else None, config.parallelism.cpu_offload, estimate
        )

    shard, best = MIN_SHARD, at(MIN_SHARD)
    while best.level is not None and shard < MAX_SHARD and (larger := at(2 * shard)).level is not None:
        shard, best = 2 * shard, larger
    if best.level is None:
        return best
    low, high = 0, STEPS
    while high - low > 1:
        middle = (low + high) // 2
        tried = at(shard + shard * middle // STEPS)
        if tried.level is None:
            high = middle
        else:
            low, best = middle, tried
    return best


def main(argv: list[str]) -> None:
    """Print the table as Markdown, row by row."""
    parser = argparse.ArgumentParser(
        prog="python -m hbp_titan.experiments.longest_context",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", help=f"one of {', '.join(MACHINES)} [all]")
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)), help="comma-separated [%(default)s]")
    options = parser.parse_args(argv)
    ranks = [int(word) for word in options.ranks.split(",")]
    print("| model | GPU | " + " | ".join(str(world_size) for world_size in ranks) + " |")
    print("|---|---|" + "---|" * len(ranks))
    for name in MODELS:
        for machine in [options.only] if options.only else MACHINES:
            hardware, lora_rank = get_hardware(machine), 16 if machine in LORA_MACHINES else 0
            cells = [str(longest(get_flavor(name), hardware, world_size, lora_rank)) for world_size in ranks]
            print(f"| {name}{', LoRA' if lora_rank else ''} | {machine} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    exit_on_user_error(lambda: main(sys.argv[1:]))
