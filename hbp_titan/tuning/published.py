"""Published measurements that the hardware table's efficiencies come from, and their derivation.

Owns the figures of other projects (flash-attention, FlashAttention-3's paper, torchtitan, llm-foundry, NCCL), each
with its source, the fits that turn them into the efficiencies of hardware.py, and the range of each figure that stays
assumed. Nothing here was measured by this project; `scripts/simulate.py --efficiencies` prints all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hbp_titan.packing import Level
from hbp_titan.tuning.hardware import HARDWARE, Hardware, get_hardware
from hbp_titan.tuning.time_model import ModelDims, TimeModel, get_dims

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
"""Tokens of a document in the curves below, with 16K tokens in a batch."""
BACKWARD = 2.5
"""Products of a flash kernel's backward over its forward's: five matrices and two. The time model counts 2."""
README = "flash-attention README, H100 and A100 figures (forward and backward, causal)"
FA3_PAPER = "arXiv 2407.08608, figures 5 and 6 (forward causal, backward without mask)"


@dataclass(frozen=True)
class AttentionCurve:
    """Published TFLOP/s of an attention kernel by document length (LENGTHS), as the source counts them.

    kind: "forward", "backward", or "both", whose products are 1 + BACKWARD times those of the forward.
    """

    gpu: str
    kernel: str
    head_dim: int
    kind: str
    tflops: tuple[int, ...]
    source: str


CURVES = (
    AttentionCurve("a100", "fa2", 64, "both", (88, 119, 140, 156, 165, 171), README),
    AttentionCurve("a100", "fa2", 128, "both", (99, 133, 155, 173, 182, 189), README),
    AttentionCurve("h100", "fa2", 64, "both", (141, 192, 232, 257, 273, 284), README),
    AttentionCurve("h100", "fa2", 128, "both", (163, 221, 265, 294, 308, 328), README),
    AttentionCurve("h100", "fa2", 256, "forward", (208, 251, 278, 293, 297, 298), FA3_PAPER),
    AttentionCurve("h100", "fa2", 128, "forward", (191, 260, 298, 319, 333, 335), FA3_PAPER),
    AttentionCurve("h100", "fa3", 64, "forward", (197, 265, 371, 420, 460, 473), FA3_PAPER),
    AttentionCurve("h100", "fa3", 128, "forward", (292, 423, 521, 579, 602, 616), FA3_PAPER),
    AttentionCurve("h100", "fa3", 256, "forward", (286, 427, 537, 612, 628, 642), FA3_PAPER),
    AttentionCurve("h100", "fa3", 64, "backward", (272, 363, 422, 453, 472, 474), FA3_PAPER),
    AttentionCurve("h100", "fa3", 128, "backward", (316, 424, 501, 542, 559, 561), FA3_PAPER),
)


@dataclass(frozen=True)
class AttentionPoint:
    """Published TFLOP/s of causal attention, forward and backward, with documents of 8,192 tokens."""

    gpu: str
    kernel: str
    head_dim: int
    forward: float
    backward: float
    source: str


POINTS = (
    AttentionPoint("h100", "fa2", 128, 306, 330, "flash-attention PR #1893"),
    AttentionPoint("h100", "fa3", 128, 660, 575, "flash-attention PR #1893"),
    AttentionPoint("b200", "fa4", 128, 1418.1, 1208.6, "flash-attention PR #2280 (two CTAs per tile)"),
    AttentionPoint("b200", "fa4", 192, 1494.1, 971.1, "flash-attention PR #2270 (keys 192, values 128: MLA)"),
)
POINT_TOKENS = 8192


def combined_tflops(forward: float, backward: float) -> float:
    """Return the TFLOP/s of forward and backward together, in the time model's count (backward twice the forward)."""
    return 3 / (1 / forward + BACKWARD / backward)


def fit_length(tflops: Sequence[float]) -> tuple[float, float]:
    """Return (TFLOP/s of long documents, block tokens) of a curve over LENGTHS, by least squares of the relative error.

    The time model's form: a document of L tokens takes the time of L^2 + 2 B L + 3/4 B^2 squares.
    """
    rates = np.asarray(tflops, float)
    best = (np.inf, 0.0, 0.0)
    for block in range(0, 513):
        waste = block_waste(np.array(LENGTHS), block)
        # The best rate for this block: least squares of rates / (rate / waste) - 1.
        inverse = 1 / (rates * waste)
        rate = float(inverse.sum() / (inverse**2).sum())
        error = float((((rate * inverse) - 1) ** 2).sum())
        best = min(best, (error, rate, float(block)))
    return best[1], best[2]


def block_waste(tokens: np.ndarray, block: float) -> np.ndarray:
    """Return the squares of whole tiles over a document's own squares (TimeModel counts the same), [n]."""
    return 1 + 2 * block / tokens + 0.75 * (block / tokens) ** 2


def curve(gpu: str, kernel: str, head_dim: int, kind: str) -> AttentionCurve:
    """Return the published curve; raise ValueError if there is none."""
    for found in CURVES:
        if (found.gpu, found.kernel, found.head_dim, found.kind) == (gpu, kernel, head_dim, kind):
            return found
    raise ValueError(f"no published curve of {kernel} on {gpu} with heads of {head_dim}, {kind}; see CURVES")


def attention_estimates(gpu: str, kernel: str, head_dim: int) -> list[tuple[float, str]]:
    """Return each published estimate of the share of peak_flops that long causal documents reach, with its source."""
    peak = _peak(gpu)
    found = []
    kinds = {c.kind: c for c in CURVES if (c.gpu, c.kernel, c.head_dim) == (gpu, kernel, head_dim)}
    if "both" in kinds:
        rate, _ = fit_length(kinds["both"].tflops)
        found.append((rate * 3 / (1 + BACKWARD) / peak, kinds["both"].source))
    if "forward" in kinds and "backward" in kinds:
        rates = [combined_tflops(f, b) for f, b in zip(kinds["forward"].tflops, kinds["backward"].tflops, strict=True)]
        found.append((fit_length(rates)[0] / peak, kinds["forward"].source))
    block = get_hardware(_entry(gpu)).with_attention(kernel).attention_block
    for p in POINTS:
        if (p.gpu, p.kernel, p.head_dim) == (gpu, kernel, head_dim):
            waste = float(block_waste(np.array([POINT_TOKENS]), block)[0])
            found.append((combined_tflops(p.forward, p.backward) * waste / peak, p.source))
    return found


def _entry(gpu: str) -> str:
    return next(name for name in HARDWARE if name.startswith(gpu))


def _peak(gpu: str) -> float:
    """Return the dense bf16 TFLOP/s of a GPU."""
    return get_hardware(_entry(gpu)).peak_flops / 1e12


@dataclass(frozen=True)
class TrainingRun:
    """A published training throughput. tokens_per_second: per GPU. recomputed: share of the matrix products run again.

    tokens, documents: of a rank's micro-batch, all documents of equal length. compiled: by torch.compile.
    """

    source: str
    gpu: str
    dims: ModelDims
    gpus: int
    documents: int
    tokens: int
    tokens_per_second: float
    recomputed: float
    compiled: bool


def _mpt(name: str, layers: int, width: int) -> ModelDims:
    """Return llm-foundry's MPT: heads of 128, MLP of 4 widths without gate, vocabulary of 50,368, tied."""
    square = layers * width**2
    return ModelDims(
        name, layers, width, 12 * square, 12 * square, 4 * square, 50_368 * width, 0, width // 128, width // 128,
        128, 128, first_params=3 * square,
    )  # fmt: skip


_TITAN = "torchtitan benchmarks/llama3_h100_202412 (500 W, HBM2e)"
_FOUNDRY = "llm-foundry scripts/train/benchmarking"
_8B = get_dims("llama3_1_8b")
_MPT = {"7b": _mpt("mpt-7b", 32, 4096), "13b": _mpt("mpt-13b", 40, 5120), "30b": _mpt("mpt-30b", 48, 7168)}
_MPT["70b"] = _mpt("mpt-70b", 80, 8192)
# Only documents of 2,048 tokens or fewer from llm-foundry: its attention kernel is not flash-attention's.
RUNS = (
    TrainingRun(_TITAN, "h100", _8B, 8, 2, 2 * 8192, 5762, 0.5, False),
    TrainingRun(_TITAN, "h100", _8B, 8, 2, 2 * 8192, 6667, 0.5, True),
    TrainingRun(_TITAN, "h100", _8B, 128, 2, 2 * 8192, 6514, 0.5, True),
    TrainingRun(_FOUNDRY, "h100", _MPT["7b"], 8, 6, 6 * 2048, 10643, 0.0, False),
    TrainingRun(_FOUNDRY, "h100", _MPT["7b"], 8, 64, 64 * 1024, 10203, 1.0, False),
    TrainingRun(_FOUNDRY, "h100", _MPT["13b"], 128, 16, 16 * 2048, 5080, 1.0, False),
    TrainingRun(_FOUNDRY, "h100", _MPT["30b"], 128, 8, 8 * 2048, 2199, 1.0, False),
    TrainingRun(_FOUNDRY, "h100", _MPT["70b"], 128, 8, 8 * 2048, 1058, 1.0, False),
    TrainingRun(_FOUNDRY, "h100", _MPT["70b"], 512, 8, 8 * 2048, 1007, 1.0, False),
    TrainingRun(_FOUNDRY, "a100", _MPT["7b"], 8, 6, 6 * 2048, 4641, 0.0, False),
    TrainingRun(_FOUNDRY, "a100", _MPT["7b"], 8, 64, 64 * 1024, 4357, 1.0, False),
    TrainingRun(_FOUNDRY, "a100", _MPT["13b"], 8, 2, 2 * 2048, 2262, 0.0, False),
    TrainingRun(_FOUNDRY, "a100", _MPT["30b"], 8, 3, 3 * 2048, 916, 1.0, False),
    TrainingRun(_FOUNDRY, "a100", _MPT["70b"], 64, 8, 8 * 2048, 410, 1.0, False),
)


def run_seconds(run: TrainingRun, linear_efficiency: float) -> float:
    """Return the time model's seconds of the run's micro-batch, FA2, at this share of the peak in matrix products."""
    machine = dataclasses.replace(
        get_hardware(_entry(run.gpu)).with_attention("fa2"), linear_efficiency=linear_efficiency
    )
    model = TimeModel(run.dims, machine, run.gpus)
    length = run.tokens // run.documents
    loads = np.array([[1.0, run.tokens, run.documents * length**2, run.documents]])
    plain = model.parts(Level(run.tokens), loads)
    # Full checkpointing runs attention again; torchtitan's selective one keeps it and runs every second product again.
    again = model.parts(Level(run.tokens, ac_policy="full" if run.recomputed == 1 else "keep_attention"), loads)
    return float(sum(plain.values())[0] + run.recomputed * again["recompute"][0])  # type: ignore[index]


def linear_efficiency(run: TrainingRun) -> float:
    """Return the share of the peak in matrix products at which the time model reproduces the run, by bisection."""
    low, high, target = 0.05, 1.0, run.tokens / run.tokens_per_second
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if run_seconds(run, middle) > target else (low, middle)
    return (low + high) / 2


NCCL_ALL_TO_ALL = 335 / 450
"""Share of NVLink that NCCL's all-to-all reaches: 335 GB/s on 4 H100 (NVIDIA/nccl issue #2169, up to 512 MB)."""
NCCL_ALL_GATHER = 360 / 450
"""The same of all-gather and all-reduce: 360 GB/s on 8 H100, which NVIDIA calls expected (nccl-tests issue #326)."""
COPY_EFFICIENCY = 0.9
"""Assumed share of memory_bandwidth in the copies that reorder heads and tokens around an exchange."""


def exchange_efficiency(hardware: Hardware) -> float:
    """Return the share of NVLink of an exchange with its copies: one before and one after, each a read and a write."""
    copies = 4 * hardware.intra_node_bandwidth / (COPY_EFFICIENCY * hardware.memory_bandwidth)
    return 1 / (1 / NCCL_ALL_TO_ALL + copies)


@dataclass(frozen=True)
class Range:
    """A figure of the H100's entry and the range that it could have. assumed: no measurement of it is published."""

    field: str
    low: float
    high: float
    assumed: bool
    basis: str


RANGES = (
    Range("linear_efficiency", 0.40, 0.60, False, "0.40: torchtitan at 500 W; 0.46 to 0.53: llm-foundry, not compiled"),
    Range("attention_efficiency", 0.47, 0.55, False, "FA3's paper and PR #1893, less 10% for packed documents"),
    Range("attention_block", 128, 390, False, "one tile of a thread block; FA4's forward (PR #2605)"),
    Range("exchange_efficiency", 0.3, 0.74, False, "NCCL issue #2169 above 512 MB; no copies"),
    Range("gather_efficiency", 0.5, 0.9, False, "NCCL issue #1218: 200 of 400 GB/s on 256 GPUs"),
    Range("inter_node_bandwidth", 25e9, 50e9, False, "nodes with half the network"),
    Range("pcie_efficiency", 0.6, 0.9, True, "share of PCIe in copies of pinned memory"),
    Range("launch_seconds", 3e-6, 12e-6, True, "CPU time per kernel"),
    Range("hop_seconds", 4e-6, 20e-6, True, "latency of a collective per doubling of ranks"),
)
ASSUMED = (
    ("heads of 192 and 256 with FA3, 192 with FA2", "0.9 and 0.88 of the rate at 128", "0.75 to 1.05"),
    ("heads of 256 with FA4", "0.75 of the rate at 128", "0.6 to 0.9"),
    ("linear_efficiency of h200 and b200", "0.52, the H100's", "0.40 to 0.60"),
    ("rtx4090: all efficiencies", "0.6 linear, 0.55 attention", "0.45 to 0.75"),
    ("tensor parallelism of the dynamic CP baseline", "half of its collectives hidden", "none to all"),
    ("exchanges across nodes", "exchange_efficiency of NVLink", "0.5 to 0.95 (nccl-tests issue #267: 48 of 50 GB/s)"),
)
"""Figures that no published measurement supports: name, value, and the range that they could have."""


def efficiency_tables() -> str:
    """Return every published figure with its derivation, and the assumed ones with their ranges, in Markdown."""
    lines = ["| attention: GPU, kernel, heads | in the table | derived | source |", "|---|---|---|---|"]
    for gpu, kernel, head_dim in dict.fromkeys((c.gpu, c.kernel, c.head_dim) for c in (*CURVES, *POINTS)):
        machine = get_hardware(_entry(gpu)).with_attention(kernel)
        value = machine.attention_rate(head_dim) / machine.peak_flops
        for share, source in attention_estimates(gpu, kernel, head_dim):
            lines.append(f"| {gpu} {kernel} {head_dim} | {value:.3f} | {share:.3f} | {source} |")
    lines += ["", "| attention_block: curve | in the table | fitted |", "|---|---|---|"]
    for c in CURVES:
        block = get_hardware(_entry(c.gpu)).with_attention(c.kernel).attention_block
        lines.append(f"| {c.gpu} {c.kernel} {c.head_dim}, {c.kind} | {block} | {fit_length(c.tflops)[1]:.0f} |")
    lines += ["", "| linear_efficiency: run | GPUs | tokens/s/GPU | in the table | derived |", "|---|---|---|---|---|"]
    for run in RUNS:
        value = get_hardware(_entry(run.gpu)).linear_efficiency
        name = f"{run.source}: {run.dims.name}, {run.documents} x {run.tokens // run.documents}"
        notes = f"{run.recomputed:.0%} recomputed{', compiled' if run.compiled else ''}"
        lines.append(
            f"| {name}, {notes} | {run.gpus} {run.gpu} | {run.tokens_per_second:,.0f} | {value:.2f} | "
            f"{linear_efficiency(run):.3f} |"
        )
    lines += ["", "| exchange_efficiency | in the table | derived |", "|---|---|---|"]
    lines += [
        f"| {name} | {h.exchange_efficiency:.2f} | {exchange_efficiency(h):.3f} |"
        for name, h in HARDWARE.items()
        if not name.startswith("rtx")
    ]
    lines += ["", "| h100-80gb | value | range | status | basis |", "|---|---|---|---|---|"]
    for r in RANGES:
        value = getattr(get_hardware("h100-80gb"), r.field)
        status = "assumed" if r.assumed else "published"
        lines.append(f"| {r.field} | {value:g} | {r.low:g} to {r.high:g} | {status} | {r.basis} |")
    lines += [f"| {name} | {value} | {span} | assumed | |" for name, value, span in ASSUMED]
    return "\n".join(lines)
