"""Level: one packing length with the parallelism and recomputation that fit it (paper section 3.1).

Owns the Level type, its text forms, and the check of a sequence of levels against a world size.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

CP_STYLES = ("ulysses", "allgather", "hybrid")
"""How attention is distributed over cp ranks: heads are scattered (ulysses), keys and values are gathered (allgather),
or groups of ranks scatter heads and gather keys and values from each other (hybrid)."""
AC_POLICIES = ("none", "full", "keep_attention", "offload", "offload_attention")
"""Activation checkpointing of a block: keep all activations; keep its input and recompute it in backward (full); keep
also the inputs and the output of its attention and recompute the rest (keep_attention); as these two, but what is kept
lies in host memory (offload, offload_attention)."""


@dataclass(frozen=True)
class Level:
    """A packing group: packs of at most `max_tokens` tokens, each trained by `cp_degree` ranks.

    max_tokens: capacity of a pack in tokens, which is also the static length T of its batch.
    cp_degree: context-parallel degree; dp = world / cp_degree packs are trained at the same time.
    cp_style: how attention is distributed over the cp ranks (see CP_STYLES).
    ac_policy: activation checkpointing, see AC_POLICIES.
    ac_layers: number of layers, from the first, that are checkpointed; None means all.
    offload_layers: with an offload policy, number of layers, from the first, whose kept activations are in host memory;
        the other checkpointed layers keep theirs on the device. None means all.
    mlp_chunk_tokens: tokens of a chunk of the rank's shard; the feed-forward, the norms and the projections around
        attention run chunk by chunk and are recomputed per chunk in backward. 0 means the whole shard at once.
    attention_head_groups: number of groups of heads whose attention runs one after another.
    reshard_after_forward: what FSDP2 does with a block's gathered parameters between forward and backward: free them
        (True), keep them (False), or keep them sharded over this number of adjacent ranks (an integer above 1); None
        uses parallelism.reshard_after_forward. It trades memory for traffic and changes neither numbers nor the plan.
    float8: whether linear layers multiply in float8; None means the run's float8.recipe. It does not change the plan.

    Raises ValueError for values outside these domains and for a max_tokens that cp_degree does not divide.
    """

    max_tokens: int
    cp_degree: int = 1
    cp_style: str = "ulysses"
    ac_policy: str = "none"
    ac_layers: int | None = None
    reshard_after_forward: bool | int | None = None
    offload_layers: int | None = None
    mlp_chunk_tokens: int = 0
    attention_head_groups: int = 1
    float8: bool | None = None

    def __post_init__(self) -> None:
        name = f"level of max_tokens={self.max_tokens}"
        if self.max_tokens < 1 or self.cp_degree < 1:
            raise ValueError(f"{name}, cp_degree={self.cp_degree}: both must be at least 1")
        if self.max_tokens % self.cp_degree:
            raise ValueError(f"{name}: not divisible by cp_degree={self.cp_degree}; change levels.max_tokens")
        if self.cp_style not in CP_STYLES:
            raise ValueError(f"{name}: cp_style={self.cp_style!r} must be one of {', '.join(CP_STYLES)}")
        if self.ac_policy not in AC_POLICIES:
            raise ValueError(f"{name}: ac_policy={self.ac_policy!r} must be one of {', '.join(AC_POLICIES)}")
        for key in ("ac_layers", "offload_layers", "mlp_chunk_tokens"):
            if (getattr(self, key) or 0) < 0:
                raise ValueError(f"{name}: {key}={getattr(self, key)} must not be negative")
        if self.attention_head_groups < 1:
            raise ValueError(f"{name}: attention_head_groups={self.attention_head_groups} must be at least 1")
        if self.offload_layers is not None and not self.offloads:
            raise ValueError(
                f"{name}: offload_layers={self.offload_layers} has no effect with ac_policy={self.ac_policy!r}; "
                'set ac_policy to "offload" or "offload_attention"'
            )
        if self.reshard_after_forward is not None:
            check_reshard(f"{name}: reshard_after_forward", self.reshard_after_forward)

    @property
    def offloads(self) -> bool:
        """Whether activations are kept in host memory."""
        return self.ac_policy.startswith("offload")

    @property
    def recomputes_attention(self) -> bool:
        """Whether the attention of checkpointed layers runs again in backward."""
        return self.ac_policy in ("full", "offload")

    def dp_degree(self, world_size: int) -> int:
        """Return the number of packs that one iteration of this level trains."""
        return world_size // self.cp_degree

    def reshard_setting(self, default: bool | int) -> bool | int:
        """Return reshard_after_forward, or `default`, the run's setting, if the level has none."""
        return default if self.reshard_after_forward is None else self.reshard_after_forward

    def cp_shape(self, num_kv_heads: int) -> tuple[int, int]:
        """Return (gather_degree, ulysses_degree), whose product is cp_degree.

        Keys and values are all-gathered between gather_degree groups of ulysses_degree ranks, each of which scatters
        heads. For "hybrid" ulysses_degree is the largest that divides cp_degree and the model's kv heads.
        """
        shared = math.gcd(self.cp_degree, num_kv_heads)
        ulysses_degree = {"ulysses": self.cp_degree, "allgather": 1, "hybrid": shared}[self.cp_style]
        return self.cp_degree // ulysses_degree, ulysses_degree


def check_levels(levels: Sequence[Level], world_size: int, side_by_side: bool = False) -> None:
    """Raise ValueError unless `levels` ascend in max_tokens and each cp_degree divides `world_size`.

    side_by_side: for levels that run at once. These may share a max_tokens if their cp_degree differs, the smaller of
    two degrees must divide the larger, and the lowest level must have the smallest.
    """
    if world_size < 1:
        raise ValueError(f"world size {world_size} must be at least 1")
    if not levels:
        raise ValueError("levels: none given; add at least one [[levels]] block")
    # Strictly: a sample belongs to the first level that holds it.
    for low, high in itertools.pairwise(levels):
        rank = [(level.max_tokens, level.cp_degree if side_by_side else 0) for level in (low, high)]
        if rank[0] >= rank[1]:
            raise ValueError(
                f"levels must ascend: max_tokens={high.max_tokens} follows max_tokens={low.max_tokens}; "
                "order the [[levels]] blocks by max_tokens"
            )
    degrees = sorted({level.cp_degree for level in levels})
    unaligned = [pair for pair in itertools.pairwise(degrees) if pair[1] % pair[0]]
    if side_by_side and (unaligned or levels[0].cp_degree > degrees[0]):
        smaller, larger = unaligned[0] if unaligned else (degrees[0], levels[0].cp_degree)
        raise ValueError(
            f"levels side by side with cp_degree={smaller} and {larger}: each degree must divide the next "
            "larger one, and the lowest level must have the smallest; change levels.cp_degree"
        )
    for level in levels:
        if world_size % level.cp_degree:
            fitting = [str(degree) for degree in range(1, world_size + 1) if world_size % degree == 0]
            raise ValueError(
                f"cp_degree={level.cp_degree} of the level with max_tokens={level.max_tokens} does not divide "
                f"the world size {world_size}; use {', '.join(fitting)}, or another number of ranks"
            )


def one_at_a_time(levels: Sequence[Level]) -> list[int]:
    """Return the indices of levels that ascend strictly: of those with equal max_tokens the one with fewest ranks."""
    return [k for k, level in enumerate(levels) if k == 0 or level.max_tokens > levels[k - 1].max_tokens]


def check_reshard(name: str, value: bool | int, shards: int | None = None) -> None:
    """Raise ValueError unless `value` is a bool or a number of ranks above 1 that divides `shards`, if given.

    name: the key, for the message. shards: ranks that share one copy of the parameters.
    """
    # bool first: True is an int too, and would fail the test for values below 2.
    if isinstance(value, bool):
        return
    if value < 2:
        raise ValueError(f"{name}={value} must be true, false or a number of ranks above 1")
    if shards is not None and shards % value:
        raise ValueError(
            f"{name}={value} does not divide the {shards} ranks that share one copy of the parameters; use true, false "
            "or a divisor, such as the GPUs of a node"
        )


def parse_levels(text: str) -> tuple[Level, ...]:
    """Parse the short form "16384:1,131072:8:ulysses:full:28:false", which lists Level's fields in order.

    Missing and empty fields get Level's defaults. Raises ValueError for any other text.
    """
    fields: dict[str, Callable[[str], Any]] = {
        "max_tokens": _number,
        "cp_degree": _number,
        "cp_style": str,
        "ac_policy": str,
        "ac_layers": _number,
        "reshard_after_forward": _bool_or_number,
        "offload_layers": _number,
        "mlp_chunk_tokens": _number,
        "attention_head_groups": _number,
        "float8": lambda word: bool(("false", "true").index(word)),
    }
    levels = []
    for part in text.split(","):
        words = [word.strip() for word in part.split(":")]
        try:
            if len(words) > len(fields) or not words[0]:
                raise ValueError
            values = {key: fields[key](word) for key, word in zip(fields, words, strict=False) if word}
        except ValueError:
            raise ValueError(
                f"levels {text!r}: {part!r} does not have the form {':'.join(fields)} (only max_tokens is required)"
            ) from None
        levels.append(Level(**values))
    return tuple(levels)


def format_level(level: Level) -> str:
    """Return the short form that parse_levels reads, without trailing defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(level)}
    # The first four are always written: a reader knows them by their place.
    words = [
        "" if i > 3 and value == defaults[key] and value is not True else str(value).lower()
        for i, (key, value) in enumerate(dataclasses.asdict(level).items())
    ]
    return ":".join(words).rstrip(":")


def _number(word: str) -> int:
    # int() alone would also accept signs and underscores, such as "16_384".
    if not word.isdecimal():
        raise ValueError
    return int(word)


def _bool_or_number(word: str) -> bool | int:
    return {"true": True, "false": False}[word] if word in ("true", "false") else _number(word)


def describe_memory(level: Level) -> str:
    """Return what a level keeps from forward to backward, and the sizes in which it computes, in words."""
    words = [level.ac_policy]
    if level.ac_policy != "none":
        words[0] += f" on {'all' if level.ac_layers is None else level.ac_layers} layers"
    if level.offload_layers is not None:
        words.append(f"{level.offload_layers} of them in host memory")
    if level.mlp_chunk_tokens:
        words.append(f"chunks of {level.mlp_chunk_tokens} tokens")
    if level.attention_head_groups > 1:
        words.append(f"{level.attention_head_groups} groups of heads")
    return ", ".join(words)


def level_name(level: Level) -> str:
    """Return a level in one word, such as 8K/cp2."""
    return f"{format_tokens(level.max_tokens)}/cp{level.cp_degree}"


def format_tokens(tokens: int) -> str:
    """Return a number of tokens in one word: 8K for 8192, 8000 for 8000."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
