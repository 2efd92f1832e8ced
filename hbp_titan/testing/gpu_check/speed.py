"""Steps of the GPU check that measure: attention calls, tokens/s with MFU and memory, estimates, transformers.

Owns the rows, their order of importance, and the budget of time by which rows are skipped.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hbp_titan.components.step_stats import peak_flops
from hbp_titan.data.batch import IGNORE_INDEX, PackedBatch
from hbp_titan.distributed.world import World
from hbp_titan.engine import Engine
from hbp_titan.experiments.bench_train import Bench, Measurement, random_batches
from hbp_titan.experiments.bench_train import Documents as DocumentLengths
from hbp_titan.experiments.bench_train import Settings as BenchSettings
from hbp_titan.models.attention import set_backend, varlen_attention
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.documents import Documents, launched_blocks, pack_documents
from hbp_titan.models.hf_config import args_to_hf_config
from hbp_titan.models.registry import get_flavor, num_params
from hbp_titan.packing import Level
from hbp_titan.preflight import cost_model
from hbp_titan.testing.gpu_check.blocks import base_config, one_rank, usable_backends
from hbp_titan.testing.gpu_check.runner import Found, Settings, Table
from hbp_titan.tuning.hardware import HARDWARE, hardware_of
from hbp_titan.tuning.measured_engine import MeasuredEngine
from hbp_titan.tuning.memory import estimate_memory
from hbp_titan.tuning.memory_plans import usable_bytes
from hbp_titan.tuning.time_model import time_model

SHORT = DocumentLengths(600)
"""Documents of a pack: lognormal lengths around 600 tokens."""
ONE = DocumentLengths(0)
"""One document that fills the pack."""


# Attention calls


def varlen(settings: Settings) -> Found:
    """Time the attention of one pack called with its capacity as max_seqlen, with real lengths, and in groups."""
    device = torch.device(settings.device_type)
    tokens, heads, kv_heads, width, slots = (512, 4, 2, 16, 32) if settings.tiny else (16384, 32, 8, 128, 144)
    repeats = 2 if settings.tiny else 10
    lengths = np.sort(DocumentLengths(60 if settings.tiny else 600).lengths(tokens, seed=0))[::-1]
    calls = argument_forms(lengths, tokens, slots, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((tokens, heads, width), (tokens, kv_heads, width), (tokens, kv_heads, width))
    qkv = [torch.randn(s, dtype=dtype, device=device, generator=generator).requires_grad_() for s in shapes]
    rows, problems, details = [], [], {}
    usable, _ = usable_backends(device, width)
    for backend in usable:
        # Whole score matrices would not fit in memory, and its time means nothing.
        if backend == "reference":
            continue
        set_backend(backend)
        outputs: dict[str, Tensor] = {}
        seconds: dict[str, float] = {}
        for name, documents in calls.items():
            # Also the warm-up of the timed calls.
            outputs[name] = _attend(qkv, documents)
            seconds[name] = median(timed(partial(_attend, qkv, documents), device) for _ in range(repeats))
        for name, documents in calls.items():
            difference = float((outputs[name] - outputs["real lengths"]).abs().max())
            blocks = launched_blocks(documents.groups)
            ratio = seconds["capacity"] / seconds[name]
            rows.append([backend, name, str(len(documents.groups)), str(blocks), f"{1e3 * seconds[name]:.2f}"])
            rows[-1] += [f"{ratio:.2f}", f"{difference:.1e}"]
            problems += (
                [f"{backend}: {name} differs by {difference:.1e}"] if difference > _allowed_difference(dtype) else []
            )
        details[backend] = seconds
        if device.type == "cuda" and min(seconds["real lengths"], seconds["grouped"]) > 1.05 * seconds["capacity"]:
            problems.append(f"{backend}: real lengths are not faster than the capacity")
    set_backend("auto")
    best = max((row for row in rows if row[1] == "grouped"), key=lambda row: float(row[5]))
    columns = ["kernel", "arguments", "calls", "blocks a head", "ms, forward and backward", "speed-up", "difference"]
    title = f"{tokens} tokens, {len(lengths)} documents, {heads} heads of {width}"
    summary = f"{title}: grouped is {best[5]} times as fast as capacity-sized arguments ({best[0]})"
    return Found(summary, [Table(title, columns, rows)], details, problems)


def argument_forms(lengths: np.ndarray, tokens: int, slots: int, device: torch.device) -> dict[str, Documents]:
    """Return the same documents padded to `slots` with max_seqlen `tokens`, as one group, and in several groups."""
    grouped = pack_documents(lengths, device=device)
    whole = grouped.whole
    ends = F.pad(whole.cu_seqlens_q, (0, max(slots + 1 - len(whole.cu_seqlens_q), 0)), value=tokens)
    padded = whole._replace(cu_seqlens_q=ends, cu_seqlens_k=ends.clone(), max_seqlen_q=tokens, max_seqlen_k=tokens)
    return {
        "capacity": Documents((padded,), padded),
        "real lengths": Documents((whole,), whole),
        "grouped": grouped,
    }


def _attend(qkv: Sequence[Tensor], documents: Documents) -> Tensor:
    """Run forward and backward; return output and gradients as one tensor."""
    q_TND, k_TKD, v_TKD = qkv
    output = varlen_attention(q_TND, k_TKD, v_TKD, documents)
    grads = torch.autograd.grad(output, qkv, torch.ones_like(output))
    return torch.cat([x.detach().flatten().float() for x in (output, *grads)])


def _allowed_difference(dtype: torch.dtype) -> float:
    # Thousands of terms of size 1, summed in different orders.
    return 0.1 if dtype == torch.bfloat16 else 1e-3


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of `work()`, including the device's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


# Tokens/s, MFU and memory


@dataclasses.dataclass(frozen=True)
class Row:
    """One level of one model to measure. target: the required MFU, 0 for none."""

    flavor: str
    compiled: bool
    max_tokens: int
    policy: str
    documents: DocumentLengths
    target: float = 0.0


def throughput_rows(tiny: bool) -> list[Row]:
    """Return the rows, the most important first."""
    if tiny:
        return [Row("debug", c, t, p, DocumentLengths(40)) for c, t, p in _TINY_ROWS]
    large, small = "llama3_1_8b", "llama3_2_1b"
    rows = [
        Row(large, True, 16384, "keep_attention", SHORT, 0.50),
        Row(large, True, 16384, "none", SHORT, 0.50),
        Row(large, True, 131072, "keep_attention", ONE, 0.45),
        Row(small, True, 16384, "none", SHORT),
        Row(small, True, 16384, "keep_attention", SHORT),
        Row(large, False, 16384, "keep_attention", SHORT),
        Row(small, False, 16384, "none", SHORT),
        Row(small, True, 131072, "keep_attention", ONE),
        Row(large, True, 16384, "full", SHORT),
        Row(small, True, 16384, "full", SHORT),
    ]
    for flavor in (large, small):
        for length in (65536, 32768):
            rows += [Row(flavor, True, length, policy, SHORT) for policy in ("keep_attention", "full", "none")]
        rows.append(Row(flavor, True, 131072, "full", ONE))
        rows += [Row(flavor, False, length, "keep_attention", SHORT) for length in (32768, 65536, 131072)]
    return rows


_TINY_ROWS = ((True, 256, "none"), (True, 256, "keep_attention"), (False, 256, "full"), (False, 512, "full"))
COMPILE_SECONDS = 25.0
"""Assumed compile time of a new length, for the time budget."""
START_SECONDS = 15.0
"""Assumed start-up time of a new model."""
REPEATS = 2
LONG_SECONDS = 3.0
"""A micro-batch that is predicted to take longer is timed once."""
GROUP_WINDOW = 10
"""Among this many rows at the top of the list, those of one engine are measured together."""


def throughput(settings: Settings) -> Found:
    """Measure rows by importance until the step's time is used up; rows of one engine are grouped."""
    deadline = time.monotonic() + settings.seconds - 10
    found: list[tuple[Row, Measurement]] = []
    skipped: list[str] = []
    with one_rank(settings) as world:
        layers = {row.flavor: fitting_layers(row.flavor, settings, world) for row in throughput_rows(settings.tiny)}
        rows = throughput_rows(settings.tiny)
        while rows:
            engine = (rows[0].flavor, rows[0].compiled)
            # A new engine costs START_SECONDS and its compilation, so its rows are measured together.
            group = [row for row in rows[:GROUP_WINDOW] if (row.flavor, row.compiled) == engine]
            rows = [row for row in rows if row not in group]
            measured, no_time = _measure_group(group, layers[engine[0]], settings, world, deadline)
            found += measured
            skipped += no_time
    peak = peak_flops(world.device)
    table = Table("measured", _COLUMNS, [_cells(row, measurement, peak) for row, measurement in found])
    tables = [table, *([Table("skipped, out of time", ["row"], [[text] for text in skipped])] if skipped else [])]
    fits = [measurement for _, measurement in found if measurement.fits]
    problems = [] if fits else ["no row could be measured"]
    details = {"measurements": [dataclasses.asdict(measurement) for _, measurement in found]}
    summary = f"{len(fits)} rows measured, {len(skipped)} skipped; {_targets(found, peak)}"
    return Found(summary, tables, details, problems)


def fitting_layers(flavor: str, settings: Settings, world: World) -> int:
    """Return the most layers, of a few choices, with which the ten most important rows fit by the estimate."""
    args = get_flavor(flavor)
    hardware = hardware_of(world.device)
    if settings.tiny or hardware is None:
        return 2 if settings.tiny else min(args.num_layers, 6)
    rows = [row for row in throughput_rows(False)[:10] if row.flavor == flavor]
    choices = [layers for layers in (32, 16, 12, 8, 6, 4, 2) if layers <= args.num_layers]
    for layers in choices:
        shape = args.with_layers(layers)
        peaks = [estimated_peak(shape, Level(row.max_tokens, ac_policy=row.policy), settings) for row in rows]
        # The estimate does not include fragmentation.
        if max(peaks) <= 0.9 * usable_bytes(hardware):
            return layers
    return choices[-1]


def estimated_peak(args: ModelArgs, level: Level, settings: Settings, compiled: bool = True) -> int:
    """Return the bytes of a micro-batch without AdamW's state, which these measurements do not hold."""
    config = base_config(settings, compiled=compiled)
    peak = estimate_memory(args, level, config, 1, device_type=settings.device_type).peak_bytes
    # Two float32 moments per parameter.
    return peak - 2 * 4 * num_params(args)


def _measure_group(
    rows: Sequence[Row], layers: int, settings: Settings, world: World, deadline: float
) -> tuple[list[tuple[Row, Measurement]], list[str]]:
    """Measure rows of one engine; return the measurements, and the names of rows without remaining time."""
    args = get_flavor(rows[0].flavor).with_layers(layers)
    lengths = tuple(Level(tokens) for tokens in sorted({row.max_tokens for row in rows}))
    policies = tuple(dict.fromkeys((row.policy, None, 0) for row in rows))
    config = base_config(settings, compiled=rows[0].compiled)
    bench = Bench(config, args, world, BenchSettings(lengths, policies, (SHORT,), layers, REPEATS))
    found: list[tuple[Row, Measurement]] = []
    skipped: list[str] = []
    seen: set[int] = set()
    cost = START_SECONDS
    for row in rows:
        index = [level.max_tokens for level in lengths].index(row.max_tokens) * len(policies)
        index += policies.index((row.policy, None, 0))
        seconds = predicted_seconds(args, bench.levels[index], row.documents, settings, world)
        repeats = REPEATS if seconds < LONG_SECONDS else 1
        cost += (2 + repeats) * seconds
        cost += COMPILE_SECONDS if row.compiled and row.max_tokens not in seen else 0
        if not settings.tiny and time.monotonic() + cost > deadline:
            skipped.append(_name(row))
            # The next row does not pay for this one; the start of the engine is paid by the first that is measured.
            cost = 0.0 if seen else START_SECONDS
            continue
        found.append((row, bench.measure(index, row.documents, repeats)))
        seen.add(row.max_tokens)
        cost = 0.0
        print(*_cells(*found[-1], peak_flops(world.device)), flush=True)
    # The next engine needs the memory.
    bench.measured.clear()
    return found, skipped


def predicted_seconds(
    args: ModelArgs, level: Level, documents: DocumentLengths, settings: Settings, world: World
) -> float:
    """Return the time of a micro-batch by the time model, on this hardware or, if unknown, on an H100."""
    # Only the time budget depends on it then.
    hardware = hardware_of(world.device) or HARDWARE["h100-80gb"]
    lengths = documents.lengths(level.max_tokens, seed=0)
    squares = cost_model(args).squares(lengths)
    loads = np.array([[1.0, float((lengths - 1).sum()), float(squares.sum()), float(len(lengths))]])
    model = time_model(args, base_config(settings, compiled=True), hardware, 1)
    return float(model.level_time(level).seconds(loads)[0])


_COLUMNS = ["model", "layers", "compile", "length", "documents", "policy", "tokens/s", "TFLOP/s", "MFU", "peak GiB"]


def _name(row: Row) -> str:
    compiled = "compiled" if row.compiled else "eager"
    return f"{row.flavor}, {compiled}, {row.max_tokens} tokens, {row.documents}, {row.policy}"


def _cells(row: Row, found: Measurement, peak: float | None) -> list[str]:
    cells = [row.flavor, str(found.layers), "on" if row.compiled else "off", str(row.max_tokens), str(row.documents)]
    cells.append(row.policy)
    if not found.fits or found.peak_bytes is None:
        return [*cells, "out of memory", "", "", ""]
    seconds = median(found.seconds)
    mfu = f"{found.flops / seconds / peak:.1%}" if peak else "-"
    speed = [f"{found.tokens / seconds:,.0f}", f"{found.flops / seconds / 1e12:.3g}", mfu]
    return [*cells, *speed, f"{found.peak_bytes / 2**30:.3g}"]


def _targets(found: Sequence[tuple[Row, Measurement]], peak: float | None) -> str:
    """Return how the rows with a target compare with it."""
    parts = []
    for row, measurement in found:
        if row.target and peak and measurement.fits:
            mfu = measurement.flops / median(measurement.seconds) / peak
            met = "met" if mfu >= row.target else "MISSED"
            parts.append(f"MFU {mfu:.1%} at {row.max_tokens} ({row.policy}; target {row.target:.0%} {met})")
    return ", ".join(parts) or "no row with a target for MFU"


# Estimates

MAX_MEMORY_RATIO = 1.05
"""Above this ratio of measured to estimated memory, a level that fits by the estimate could run out of memory."""


def estimates(settings: Settings) -> Found:
    """Compare every row that `throughput` measured with the memory estimate and the time model."""
    path = settings.folder / "throughput.json"
    measurements = _measurements(path)
    if not measurements:
        return Found(skipped="no measurement by the step throughput")
    device = torch.device(settings.device_type)
    known = hardware_of(device) is not None
    world, rows, problems, ratios = World(0, 1, device), [], [], []
    for found in measurements:
        args = get_flavor(found.model).with_layers(found.layers)
        level = Level(found.max_tokens, ac_policy=found.ac_policy)
        documents = DocumentLengths(int(found.documents.removeprefix("median ")) if found.documents != "one" else 0)
        bytes_ = estimated_peak(args, level, settings, found.compile)
        seconds = predicted_seconds(args, level, documents, settings, world)
        assert found.peak_bytes is not None
        memory, taken = found.peak_bytes / bytes_, median(found.seconds)
        ratios.append(memory)
        name = f"{found.model}, {found.layers} layers, {found.max_tokens}, {found.documents}, {found.ac_policy}"
        name += ", compiled" if found.compile else ""
        rows.append([name, f"{found.peak_bytes / 2**30:.3g}", f"{bytes_ / 2**30:.3g}", f"{memory:.2f}"])
        rows[-1] += [f"{taken:.3g}", f"{seconds:.3g}" if known else "-", f"{taken / seconds:.2f}" if known else "-"]
        if memory > MAX_MEMORY_RATIO and device.type == "cuda":
            problems.append(f"{name}: {memory:.2f} times the estimated memory")
    columns = ["level", "GiB", "estimate", "ratio", "seconds", "time model", "ratio"]
    summary = f"{len(rows)} rows, memory {min(ratios):.2f} to {max(ratios):.2f} of the estimate"
    return Found(summary, [Table("measured / estimated", columns, rows)], problems=problems)


def _measurements(path: Path) -> list[Measurement]:
    """Return the measurements of the step throughput, if it has ended."""
    if not path.exists():
        return []
    values = json.loads(path.read_text(encoding="utf-8"))["details"].get("measurements", [])
    return [found for value in values if (found := Measurement(**value)).fits]


# Transformers


def side_by_side(settings: Settings) -> Found:
    """Time the same weights and packs with transformers, in its fastest form here, and with our engine."""
    try:
        import transformers
    except ImportError as error:
        return Found(skipped=f"transformers cannot be imported ({error})")
    flavor, layers, tokens = ("debug", 2, 256) if settings.tiny else ("llama3_2_1b", 8, 16384)
    args = get_flavor(flavor).with_layers(layers)
    documents = DocumentLengths(40) if settings.tiny else SHORT
    lengths = documents.lengths(tokens, seed=0)
    folder = settings.folder / "same_weights"
    rows: list[tuple[str, float, float]] = []
    with one_rank(settings) as world:
        (batch,) = random_batches([lengths], args, Level(tokens), 0, 0)
        dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        rows += _transformers_rows(transformers, args, batch.to(world.device), dtype, folder)
        for compiled in (False, True):
            rows.append(_own_row(args, batch, compiled, settings, world, folder))
    best = min((row for row in rows if row[0].startswith("transformers")), key=lambda row: row[1])
    own = min((row for row in rows if not row[0].startswith("transformers")), key=lambda row: row[1])
    cells = [[name, f"{tokens / s:,.0f}", f"{s:.4g}", f"{best[1] / s:.2f}", f"{loss:.5f}"] for name, s, loss in rows]
    columns = ["what", "tokens/s", "seconds", "times the best of transformers", "loss"]
    # Two implementations round differently; a wrong mask or position changes the loss by far more.
    allowed = 2e-2 if dtype == torch.bfloat16 else 1e-4
    problems = [
        f"{name}: loss {loss:.5f} instead of {best[2]:.5f}"
        for name, _, loss in rows
        if abs(loss / best[2] - 1) > allowed
    ]
    title = f"{flavor}, {layers} layers, {tokens} tokens, {len(lengths)} documents, no recomputation"
    summary = f"{own[0]} is {best[1] / own[1]:.2f} times as fast as {best[0]}"
    return Found(summary, [Table(title, columns, cells)], problems=problems)


def _transformers_rows(
    transformers: Any, args: ModelArgs, batch: PackedBatch, dtype: torch.dtype, folder: Path
) -> list[tuple[str, float, float]]:
    """Return (name, seconds, loss) of each form that runs here; leave the weights in `folder`."""
    config = args_to_hf_config(args)
    with torch.device(batch.input_ids.device):
        torch.manual_seed(0)
        hf_config = transformers.AutoConfig.for_model(**config)
        model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=dtype).train()
    # Our engine loads the same weights.
    model.save_pretrained(folder)
    forms = [("sdpa", "one document at a time"), ("sdpa", "packed by position_ids")]
    if transformers.utils.is_flash_attn_2_available() and batch.input_ids.is_cuda:
        forms.append(("flash_attention_2", "packed by position_ids"))
    rows = []
    for attention, form in forms:
        model.set_attn_implementation(attention)
        run = partial(_packed if "packed" in form else _by_document, model, batch)
        try:
            loss = float(run())
            seconds = median(timed(run, batch.input_ids.device) for _ in range(REPEATS))
        except torch.OutOfMemoryError:
            print(f"transformers, {attention}, {form}: out of memory", flush=True)
            continue
        rows.append((f"transformers, {attention}, {form}", seconds, loss))
    # `run` holds the model too, and our engine needs the memory.
    del model, run
    gc.collect()
    if batch.input_ids.is_cuda:
        torch.cuda.empty_cache()
    return rows


def _packed(model: Any, batch: PackedBatch) -> Tensor:
    """Run forward and backward on the whole pack in one call; return the mean loss."""
    model.zero_grad()
    logits = model(
        input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False, attention_mask=None
    ).logits[0]
    loss = F.cross_entropy(logits.float(), batch.labels, ignore_index=IGNORE_INDEX)
    loss.backward()
    return loss.detach()


def _by_document(model: Any, batch: PackedBatch) -> Tensor:
    """Run forward and backward with one call per document; return the mean loss."""
    model.zero_grad()
    total = torch.zeros((), device=batch.input_ids.device)
    lengths = batch.lengths.tolist()
    ids, labels = batch.input_ids.split(lengths), batch.labels.split(lengths)
    for ids_T, labels_T in zip(ids, labels, strict=True):
        logits = model(input_ids=ids_T[None], use_cache=False).logits[0]
        loss = F.cross_entropy(logits.float(), labels_T, ignore_index=IGNORE_INDEX, reduction="sum")
        loss = loss / batch.num_loss_tokens
        loss.backward()
        total += loss.detach()
    return total


def _own_row(
    args: ModelArgs, batch: PackedBatch, compiled: bool, settings: Settings, world: World, folder: Path
) -> tuple[str, float, float]:
    """Return (name, seconds, loss) of our engine on the weights in `folder`."""
    config = base_config(settings, compiled=compiled)
    config.checkpoint.initial_load_path = str(folder)
    measured = MeasuredEngine(config, args, world, [Level(len(batch.input_ids))], load_weights=True)

    def first(engine: Engine) -> float:
        loss = float(engine.forward_backward(batch).sum()) / batch.num_loss_tokens
        engine.model.zero_grad()
        return loss

    loss = measured.attempt(first)
    # The first one compiles.
    taken = [measured.seconds([batch]) for _ in range(REPEATS + 1)][1:]
    measured.clear()
    name = f"hbp_titan, {'compiled' if compiled else 'eager'}"
    if loss is None or None in taken:
        return f"{name} (out of memory)", float("inf"), float("nan")
    return name, median(s for s in taken if s is not None), loss
