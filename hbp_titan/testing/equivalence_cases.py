"""What the equivalence check runs: samples, the shrunk model, the cases, and the negative controls.

Owns the choice of cases for a configuration's levels (testing/equivalence.py runs and judges them), and how a control
breaks a batch on purpose.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hbp_titan.data.batch import IGNORE_INDEX, PackedBatch, SampleSource
from hbp_titan.data.token_store import TokenStore
from hbp_titan.distributed.context_parallel import head_groups_fit
from hbp_titan.models.configs import MLAArgs, ModelArgs
from hbp_titan.models.documents import Documents, HeadTailShard, pack_documents
from hbp_titan.packing import Level
from hbp_titan.packing.level import CP_STYLES


@dataclass(frozen=True)
class Case:
    """How the samples are run. broken: the name of a negative control in BREAKAGES, or ""."""

    name: str
    world_size: int
    levels: tuple[Level, ...]
    level_order: str = "interleave"
    global_batch_tokens: int = 1 << 40
    loss_normalization: str = "ave_token"
    compile: bool = False
    broken: str = ""
    expert_parallel: int = 1
    dp_replicate: int = 1
    cpu_offload: bool = False


PLAIN_PRODUCTS = "CONTROL products in the compute dtype"
"""Name of the control of a run with FP8 products."""


class Samples:
    """Some of a store's samples, renumbered from 0."""

    def __init__(self, store: SampleSource, ids: Sequence[int]) -> None:
        self.rows = [tuple(np.array(part) for part in store.sample(i)) for i in ids]
        self.lengths = np.array([len(tokens) for tokens, _ in self.rows])
        self.loss_tokens = np.array([int(mask[1:].sum()) for _, mask in self.rows])

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens and the loss mask of one sample."""
        tokens, mask = self.rows[index]
        return tokens, mask


def choose_samples(store: TokenStore, count: int, max_tokens: int, seed: int = 0) -> Samples:
    """Return `count` random samples of at most `max_tokens` tokens, including the longest of these."""
    fitting = np.flatnonzero(store.lengths <= max_tokens)
    if not len(fitting):
        raise ValueError(f"no sample has at most {max_tokens} tokens; increase --max_tokens")
    longest = int(fitting[store.lengths[fitting].argmax()])
    # The longest is always among them: it needs the largest level.
    drawn = np.random.default_rng(seed).permutation(fitting[fitting != longest])[: count - 1]
    return Samples(store, [longest, *drawn.tolist()])


def scaled_levels(levels: Sequence[Level], max_tokens: int) -> tuple[Level, ...]:
    """Return the levels scaled so that the largest has `max_tokens`; 0 leaves them unchanged."""
    if not max_tokens or levels[-1].max_tokens <= max_tokens:
        return tuple(levels)
    ratio = max_tokens / levels[-1].max_tokens
    units = [math.lcm(8, level.cp_degree) for level in levels]
    return tuple(
        dataclasses.replace(level, max_tokens=max(unit, round(level.max_tokens * ratio) // unit * unit))
        for level, unit in zip(levels, units, strict=True)
    )


def build_cases(
    levels: Sequence[Level], world_sizes: Sequence[int], args: ModelArgs, float8: bool = False
) -> list[Case]:
    """Return the cases: one level, each cp degree, the configured levels, each policy, steps, compile, controls.

    float8: whether the run has FP8 products; a control then has none.
    """
    largest = levels[-1].max_tokens
    cases = []
    for world in world_sizes:
        # The configured cp degrees may need more ranks than this machine has.
        fitted = tuple(dataclasses.replace(k, cp_degree=_fitting_cp(k, world, args)) for k in levels)
        cases.append(Case(f"one level, {world} ranks", world, (Level(largest),)))
        divisors = [degree for degree in range(2, world + 1) if world % degree == 0]
        # Rounded up to a multiple: every sample fits a pack of every degree.
        shared = [Level(-(-largest // cp) * cp, cp, style) for style in CP_STYLES for cp in divisors]
        cases += [
            Case(f"one level, {world} ranks, {level.cp_style} cp {level.cp_degree}", world, (level,))
            for level in shared
            # Other degrees would repeat the case of the degree that fits.
            if level.cp_degree == _fitting_cp(level, world, args)
        ]
        cases.append(Case(f"configured levels, {world} ranks", world, fitted))
        cases += [
            Case(f"configured levels, {world} ranks, experts over {ep}", world, fitted, expert_parallel=ep)
            for ep in _expert_degrees(args, world)
        ]
        if world % 2 == 0:
            cases.append(Case(f"configured levels, {world} ranks, 2 copies", world, fitted, dp_replicate=2))
        if world > 1:
            beside = _side_by_side(levels, world, args)
            cases.append(Case(f"side by side, {world} ranks", world, beside, "parallel"))
    # What follows does not depend on the number of ranks, so it is checked at the largest only.
    world = world_sizes[-1]
    if world > 1:
        cases += _side_by_side_cases(beside, world, args)
    cases += [Case(name, world, _with_plan(fitted, plan, args)) for name, plan in _MEMORY_PLANS.items()]
    tokens = 2 * largest
    if not float8:
        # A step's loss is divided by its own tokens, and float8 rounds gradients of another size otherwise.
        cases.append(Case("several steps, levels alternate", world, fitted, "alternate", tokens))
        cases.append(Case("several steps, levels mixed", world, fitted, "interleave", tokens))
    cases.append(Case("compiled", world, fitted, compile=True))
    most, plan = list(_MEMORY_PLANS.items())[-1]
    all_plans = _with_plan(fitted, plan, args)
    cases.append(Case(f"compiled, {most}", world, all_plans, compile=True))
    for ep in _expert_degrees(args, world)[-1:]:
        cases.append(Case(f"experts over {ep}, {most}", world, all_plans, expert_parallel=ep))
    cases.append(Case("parameters in host memory", world, fitted, cpu_offload=True))
    cases.append(Case(f"parameters in host memory, {most}", world, all_plans, cpu_offload=True))
    cases += [Case(f"CONTROL {name}", world, fitted, broken=name) for name in BREAKAGES]
    if float8:
        plain = tuple(dataclasses.replace(level, float8=False) for level in fitted)
        cases.append(Case(PLAIN_PRODUCTS, world, plain))
    cases.append(Case("CONTROL mean per rank", world, fitted, loss_normalization="token_mean"))
    if args.hf_config is None:
        return cases
    # Of the memory plans, transformers' blocks have recomputation only.
    return [case for case in cases if all(map(_whole_blocks, case.levels))]


def _side_by_side(levels: Sequence[Level], world_size: int, args: ModelArgs) -> tuple[Level, ...]:
    """Return levels for level_order "parallel": half the largest on one rank, and the largest on every other degree."""
    largest = levels[-1].max_tokens
    found = [Level(-(-largest // 2))]
    for number, degree in enumerate(2**k for k in range(1, world_size.bit_length()) if world_size % 2**k == 0):
        # Every style, on neighboring ranks at the same time.
        for style in (CP_STYLES * 2)[number : number + len(CP_STYLES)]:
            level = Level(-(-largest // degree) * degree, degree, style)
            if _fitting_cp(level, world_size, args) == degree:
                found.append(level)
                break
    return tuple(sorted(found, key=lambda level: (level.max_tokens, level.cp_degree)))


def _side_by_side_cases(beside: tuple[Level, ...], world: int, args: ModelArgs) -> list[Case]:
    """Return the cases and controls of levels side by side that do not depend on the number of ranks."""
    plans = [_MEMORY_PLANS[name] for name in ("full on all layers", "keep_attention on 1 layer", "in chunks")]
    mixed = tuple(_with_plan([level], plans[k % 3], args)[0] for k, level in enumerate(beside))
    name = "side by side"
    cases = [
        Case(f"{name}, a memory plan each", world, mixed, "parallel"),
        Case(f"{name}, compiled", world, beside, "parallel", compile=True),
        Case(f"CONTROL {name}, mean per rank", world, beside, "parallel", loss_normalization="token_mean"),
    ]
    broken = next(iter(BREAKAGES))
    return [*cases, Case(f"CONTROL {name}, {broken}", world, beside, "parallel", broken=broken)]


def _whole_blocks(level: Level) -> bool:
    return level.ac_policy in ("none", "full") and not level.mlp_chunk_tokens and level.attention_head_groups == 1


_MEMORY_PLANS: dict[str, dict[str, Any]] = {
    "full on all layers": {"ac_policy": "full"},
    "full on 1 layer": {"ac_policy": "full", "ac_layers": 1},
    "keep_attention on all layers": {"ac_policy": "keep_attention"},
    "keep_attention on 1 layer": {"ac_policy": "keep_attention", "ac_layers": 1},
    "offload on all layers": {"ac_policy": "offload"},
    "offload of 1 of all checkpointed layers": {"ac_policy": "offload", "offload_layers": 1},
    "offload_attention on all layers": {"ac_policy": "offload_attention"},
    "in chunks": {"mlp_chunk_tokens": 1},
    "in head groups": {"attention_head_groups": 2},
    "full, in chunks": {"ac_policy": "full", "mlp_chunk_tokens": 1},
    "offload_attention, in chunks and head groups": {
        "ac_policy": "offload_attention",
        "mlp_chunk_tokens": 1,
        "attention_head_groups": 2,
    },
    "offload, in chunks and head groups": {"ac_policy": "offload", "mlp_chunk_tokens": 1, "attention_head_groups": 2},
}
"""Level's fields for the memory of activations by the name of a case, whose other ones have their defaults.

mlp_chunk_tokens and attention_head_groups mean that there are chunks and groups.
"""


def _with_plan(levels: Sequence[Level], plan: dict[str, Any], args: ModelArgs) -> tuple[Level, ...]:
    """Return `levels` with a plan of _MEMORY_PLANS: chunks of a third of a shard, and the fewest groups that fit."""
    changed = []
    for level in levels:
        fields = {"ac_policy": "none", "ac_layers": None, "offload_layers": None, **plan}
        if "mlp_chunk_tokens" in plan:
            fields["mlp_chunk_tokens"] = level.max_tokens // level.cp_degree // 3 + 1
        if "attention_head_groups" in plan:
            shape = (args.num_heads, args.num_kv_heads, level.cp_shape(args.num_kv_heads)[1])
            fields["attention_head_groups"] = next((g for g in range(2, 129) if head_groups_fit(g, *shape)), 1)
        changed.append(dataclasses.replace(level, **fields))
    return tuple(changed)


def _expert_degrees(args: ModelArgs, world_size: int) -> list[int]:
    """Return the degrees above 1 over which the experts, if any, can be sharded."""
    experts = 1 if args.moe is None else args.moe.n_routed_experts
    return [degree for degree in range(2, world_size + 1) if experts % degree == world_size % degree == 0]


def _fitting_cp(level: Level, world_size: int, args: ModelArgs) -> int:
    """Return the largest divisor of the level's cp degree that the world and, for "ulysses", the heads allow."""
    for cp in range(level.cp_degree, 0, -1):
        kv_heads_fit = args.num_kv_heads % cp == 0 or cp % args.num_kv_heads == 0
        heads_fit = level.cp_style != "ulysses" or (args.num_heads % cp == 0 and kv_heads_fit)
        if level.cp_degree % cp == 0 and world_size % cp == 0 and heads_fit:
            return cp
    raise AssertionError("1 always fits")


def _merge_documents(batch: PackedBatch) -> PackedBatch:
    def merged(documents: Documents) -> Documents:
        # One document with all queries and keys: causal, but across the documents of the pack.
        return pack_documents([documents.whole.num_queries], [documents.whole.num_keys])

    if isinstance(batch.documents, HeadTailShard):
        parts = batch.documents.passes(None)
        heads, tails = (part._replace(documents=merged(part.documents)) for part in parts)
        return dataclasses.replace(batch, documents=HeadTailShard(heads, tails))
    return dataclasses.replace(batch, documents=merged(batch.documents))


def _continue_positions(batch: PackedBatch) -> PackedBatch:
    # Rotary attention sees distances alone: positions that only went on counting would change nothing inside a
    # document.
    return dataclasses.replace(batch, position_ids=torch.arange(len(batch.position_ids)) * 3)


def _unshift_labels(batch: PackedBatch) -> PackedBatch:
    trained = batch.labels != IGNORE_INDEX
    return dataclasses.replace(batch, labels=torch.where(trained, batch.input_ids, batch.labels))


BREAKAGES: dict[str, Callable[[PackedBatch], PackedBatch]] = {
    "attention across documents": _merge_documents,
    "positions not reset": _continue_positions,
    "labels not shifted": _unshift_labels,
}


def shrunk(args: ModelArgs, vocab_size: int) -> ModelArgs:
    """Return the architecture with 2 layers, heads of width 16 and `vocab_size`, and the same heads and experts."""
    if args.hf_config is not None:
        raise ValueError('--shrink: not for model.backend = "transformers"; write a smaller config.json and weights')
    # The numbers of heads and experts stay: cp styles and expert parallelism depend on them.
    hidden = 16 * args.num_heads
    mla, moe = args.mla, args.moe
    if mla is not None:
        q_rank = None if mla.q_lora_rank is None else 24
        mla = MLAArgs(q_lora_rank=q_rank, kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    if moe is not None:
        moe = dataclasses.replace(
            moe, moe_intermediate_size=16, first_k_dense_replace=min(moe.first_k_dense_replace, 1), moe_layer_freq=1
        )
    # Both kinds of layers, where the architecture has two.
    kinds = sorted(set(args.layer_types), reverse=True)
    return dataclasses.replace(
        args,
        name=f"{args.name}, shrunk",
        num_layers=2,
        head_dim=16,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        vocab_size=vocab_size,
        query_scalar=args.query_scalar and 24,
        nope_layers=(1,) if args.nope_layers else (),
        layer_types=tuple((kinds * 2)[:2]),
        sliding_window=args.sliding_window and min(args.sliding_window, 24),
        mla=mla,
        moe=moe,
    )
