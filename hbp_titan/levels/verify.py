"""Proof that packing and parallel forms leave loss and gradients right, on the user's own model and data.

Owns the cases, the reference and the verdicts. The reference is one process, each sample by itself, fp32, no packing,
no recomputation, plain cross entropy over whole logits. Each case runs the same samples through the engine that trains;
gradients of a plan of several optimizer steps are joined by the tokens of each. Negative controls break one thing on
purpose: a comparison that cannot see them proves nothing.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hbp_titan.components.normalizer import NORMALIZERS
from hbp_titan.config import JobConfig
from hbp_titan.data.batch import IGNORE_INDEX, PackedBatch
from hbp_titan.data.loader import BatchShapes, PlanDataset
from hbp_titan.data.sequence_shard import HeadTailShard
from hbp_titan.data.store.token_store import TokenStore
from hbp_titan.distributed.local_ranks import run_distributed
from hbp_titan.distributed.world import World, all_reduce_values
from hbp_titan.levels.engine import Engine
from hbp_titan.models.args import MLAArgs, ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.documents import Documents, pack_documents
from hbp_titan.packing import Level, build_plan
from hbp_titan.packing.level import CP_STYLES

LOSS_TOLERANCE = 1e-5
GRAD_TOLERANCE = 1e-4
CAUGHT_ABOVE = 1e-3


@dataclass(frozen=True)
class Case:
    """One row: how the samples are run. broken: the name of a negative control in BREAKAGES, or ""."""

    name: str
    world_size: int
    levels: tuple[Level, ...]
    mix: str = "interleave"
    global_batch_tokens: int = 1 << 40
    normalizer: str = "ave_token"
    compile: bool = False
    broken: str = ""
    expert_parallel: int = 1
    dp_replicate: int = 1


@dataclass(frozen=True)
class Result:
    """Relative differences from the reference: of the mean loss, and the largest of any parameter's gradient."""

    case: Case
    loss_difference: float
    grad_difference: float
    worst: str

    @property
    def passed(self) -> bool:
        """A sound case must agree; a broken one, or another normalizer, must be seen."""
        if self.case.broken or self.case.normalizer != "ave_token":
            return self.grad_difference > CAUGHT_ABOVE
        return self.loss_difference <= LOSS_TOLERANCE and self.grad_difference <= GRAD_TOLERANCE


class Samples:
    """A choice of a store's samples, renumbered from 0."""

    def __init__(self, store: TokenStore, ids: Sequence[int]) -> None:
        self.rows = [tuple(np.array(part) for part in store.sample(i)) for i in ids]
        self.lengths = np.array([len(tokens) for tokens, _ in self.rows])
        self.loss_tokens = np.array([int(mask[1:].sum()) for _, mask in self.rows])

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and loss mask of one sample."""
        tokens, mask = self.rows[index]
        return tokens, mask


def choose_samples(store: TokenStore, count: int, max_tokens: int, seed: int = 0) -> Samples:
    """`count` random samples of at most `max_tokens` tokens and the longest of those."""
    fitting = np.flatnonzero(store.lengths <= max_tokens)
    if not len(fitting):
        raise ValueError(f"no sample has at most {max_tokens} tokens: raise --max_tokens")
    longest = int(fitting[store.lengths[fitting].argmax()])
    drawn = np.random.default_rng(seed).permutation(fitting[fitting != longest])[: count - 1]
    return Samples(store, [longest, *drawn.tolist()])


def scaled_levels(levels: Sequence[Level], max_tokens: int) -> tuple[Level, ...]:
    """The levels with the largest at `max_tokens`, the others in proportion; 0 leaves them as they are."""
    if not max_tokens or levels[-1].max_tokens <= max_tokens:
        return tuple(levels)
    ratio = max_tokens / levels[-1].max_tokens
    # A multiple of every cp degree that a case may give it.
    return tuple(dataclasses.replace(k, max_tokens=max(8, round(k.max_tokens * ratio) // 8 * 8)) for k in levels)


def build_cases(levels: Sequence[Level], world_sizes: Sequence[int], args: ModelArgs) -> list[Case]:
    """The rows: packed, each cp degree, each policy, the configured levels, accumulation, compile, controls."""
    largest = levels[-1].max_tokens
    cases = []
    for world in world_sizes:
        fitted = tuple(dataclasses.replace(k, cp_degree=_fitting_cp(k, world, args)) for k in levels)
        cases.append(Case(f"one level, {world} ranks", world, (Level(largest),)))
        shared = [Level(largest, cp, style) for style in CP_STYLES for cp in (2, 4, 8)]
        cases += [
            Case(f"one level, {world} ranks, {level.cp_style} cp {level.cp_degree}", world, (level,))
            for level in shared
            if level.cp_degree == _fitting_cp(level, world, args)
        ]
        cases.append(Case(f"configured levels, {world} ranks", world, fitted))
        cases += [
            Case(f"configured levels, {world} ranks, experts over {ep}", world, fitted, expert_parallel=ep)
            for ep in (2, 4, 8)
            if args.moe is not None and world % ep == 0 and args.moe.n_routed_experts % ep == 0
        ]
        if world % 2 == 0:
            cases.append(Case(f"configured levels, {world} ranks, 2 copies", world, fitted, dp_replicate=2))
    world = world_sizes[-1]
    for policy in ("full", "keep_attention"):
        for layers in (None, 1):
            recomputed = tuple(dataclasses.replace(k, ac_policy=policy, ac_layers=layers) for k in fitted)
            cases.append(Case(f"{policy} on {'all' if layers is None else layers} layers", world, recomputed))
    tokens = 2 * largest
    cases.append(Case("several steps, levels alternate", world, fitted, "alternate", tokens))
    cases.append(Case("several steps, levels mixed", world, fitted, "interleave", tokens))
    cases.append(Case("compiled", world, fitted, compile=True))
    cases += [Case(f"CONTROL {name}", world, fitted, broken=name) for name in BREAKAGES]
    cases.append(Case("CONTROL mean per rank", world, fitted, normalizer="token_mean"))
    return cases


def _fitting_cp(level: Level, world_size: int, args: ModelArgs) -> int:
    """The largest divisor of the level's cp degree that the world and, for "ulysses", the heads allow."""
    for cp in range(level.cp_degree, 0, -1):
        kv_heads_fit = args.num_kv_heads % cp == 0 or cp % args.num_kv_heads == 0
        heads_fit = level.cp_style != "ulysses" or (args.num_heads % cp == 0 and kv_heads_fit)
        if level.cp_degree % cp == 0 and world_size % cp == 0 and heads_fit:
            return cp
    raise AssertionError("1 always fits")


def _merge_documents(batch: PackedBatch) -> PackedBatch:
    def merged(documents: Documents) -> Documents:
        return pack_documents([documents.whole.num_queries], [documents.whole.num_keys])

    if isinstance(batch.documents, HeadTailShard):
        parts = (part._replace(documents=merged(part.documents)) for part in batch.documents)
        return dataclasses.replace(batch, documents=HeadTailShard(*parts))
    return dataclasses.replace(batch, documents=merged(batch.documents))


def _run_positions_on(batch: PackedBatch) -> PackedBatch:
    return dataclasses.replace(batch, position_ids=torch.arange(len(batch.position_ids)) * 3)


def _unshift_labels(batch: PackedBatch) -> PackedBatch:
    trained = batch.labels != IGNORE_INDEX
    return dataclasses.replace(batch, labels=torch.where(trained, batch.input_ids, batch.labels))


BREAKAGES: dict[str, Callable[[PackedBatch], PackedBatch]] = {
    "documents see each other": _merge_documents,
    "positions not reset": _run_positions_on,
    "labels not shifted": _unshift_labels,
}


def reference(args: ModelArgs, seed: int, samples: Samples) -> tuple[float, dict[str, Tensor]]:
    """Mean loss per trained token and its gradients: one process, one sample at a time, fp32."""
    model = Decoder(args)
    model.init_weights(seed)
    total = int(samples.loss_tokens.sum())
    loss_sum = 0.0
    for tokens, mask in samples.rows:
        ids = torch.from_numpy(tokens.astype(np.int64))
        model.balance.use(torch.zeros_like(ids), torch.tensor([int(mask[1:].sum()) / total]))
        logits = model(ids, torch.arange(len(ids)), pack_documents([len(ids)]))
        kept = torch.from_numpy(mask[1:].astype(bool))
        loss = F.cross_entropy(logits[:-1][kept], ids[1:][kept], reduction="sum")
        (loss / total).backward()
        loss_sum += loss.item()
    return loss_sum / total, {name: _grad(p) for name, p in model.named_parameters()}


def run_case(world: World, config: JobConfig, args: ModelArgs, case: Case, samples: Samples) -> tuple[float, dict]:
    """Mean loss and gradients of one case, on one of its ranks."""
    config = copy.deepcopy(config)
    config.levels = list(case.levels)
    config.compile.enable = case.compile
    config.checkpoint.initial_load_path = ""
    config.parallelism.expert_parallel_degree = case.expert_parallel
    config.parallelism.dp_replicate = case.dp_replicate
    # Every gradient is compared, also those that LoRA leaves out.
    config.lora.rank = 0
    config.training.dtype = config.training.mixed_precision_param = "float32"
    engine = Engine(config, args, world)
    plan = build_plan(
        samples.lengths,
        case.levels,
        world.size,
        loss_tokens=samples.loss_tokens,
        global_batch_tokens=case.global_batch_tokens,
        mix=case.mix,
    )
    shapes = BatchShapes.of(plan, args.num_kv_heads)
    batches = PlanDataset(plan, samples, world.rank, shapes, NORMALIZERS[case.normalizer])
    breakage = BREAKAGES.get(case.broken, lambda batch: batch)
    joined = {name: torch.zeros(p.shape) for name, p in engine.model.named_parameters()}
    loss_sum = 0.0
    for step in range(plan.num_steps):
        end = int(plan.step_offsets[step + 1])
        for iteration in range(int(plan.step_offsets[step]), end):
            losses_S = engine.forward_backward(breakage(batches[iteration]), last=iteration + 1 == end)
            loss_sum += losses_S.sum().item()
        share = int(plan.step_loss_tokens[step]) / int(samples.loss_tokens.sum())
        for name, parameter in engine.model.named_parameters():
            joined[name] += share * _grad(parameter)
        engine.model.zero_grad()
    (loss_sum,) = all_reduce_values([loss_sum], "sum", world.device)
    return loss_sum / int(samples.loss_tokens.sum()), joined


def _grad(parameter: Tensor) -> Tensor:
    grad = parameter.grad
    assert grad is not None
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()


def compare(case: Case, expected: tuple[float, dict[str, Tensor]], found: tuple[float, dict[str, Tensor]]) -> Result:
    """Relative differences of one case."""
    loss, grads = expected
    differences = {
        name: float((found[1][name] - grad).norm() / grad.norm().clamp(min=1e-30)) for name, grad in grads.items()
    }
    worst = max(differences, key=lambda name: differences[name])
    return Result(case, abs(found[0] - loss) / abs(loss), differences[worst], worst)


def verify(config: JobConfig, args: ModelArgs, cases: Sequence[Case], samples: Samples) -> Iterator[Result]:
    """Run every case on ranks of this machine, one after another, and compare it with the reference."""
    expected = reference(args, config.training.seed, samples)
    for case in cases:
        found = run_distributed(run_case, case.world_size, config, args, case, samples)[0]
        yield compare(case, expected, found)


HEADER = f"{'case':<44}{'loss':>9}{'gradient':>10}  verdict"


def row(result: Result) -> str:
    """One line of the table under HEADER."""
    control = result.case.broken or result.case.normalizer != "ave_token"
    verdict = ("caught" if result.passed else "NOT CAUGHT") if control else ("equal" if result.passed else "DIFFERS")
    where = "" if result.passed else f" ({result.worst})"
    return f"{result.case.name:<44}{result.loss_difference:>9.1e}{result.grad_difference:>10.1e}  {verdict}{where}"


def shrunk(args: ModelArgs) -> ModelArgs:
    """The architecture with two layers and heads of width 16; the numbers of heads, experts and the vocabulary stay."""
    hidden = 16 * args.num_heads
    mla, moe = args.mla, args.moe
    if mla is not None:
        q_rank = None if mla.q_lora_rank is None else 24
        mla = MLAArgs(q_lora_rank=q_rank, kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    if moe is not None:
        moe = dataclasses.replace(
            moe, moe_intermediate_size=16, first_k_dense_replace=min(moe.first_k_dense_replace, 1), moe_layer_freq=1
        )
    return dataclasses.replace(
        args,
        name=f"{args.name}, shrunk",
        num_layers=2,
        head_dim=16,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        mla=mla,
        moe=moe,
    )
