"""The first configuration as a TOML file with comments, and as the report of `hbp-titan init`.

Owns the words: each value has its reason above it, with the figures of the user's data and the estimates. Nothing is
decided here (init_config.py).
"""

from __future__ import annotations

import dataclasses
import shlex
import textwrap
from pathlib import Path

import numpy as np

from hbp_titan.config import toml_value
from hbp_titan.job_config import JobConfig
from hbp_titan.packing import Level
from hbp_titan.packing.level import level_name
from hbp_titan.packing.ragged import IntArray
from hbp_titan.tuning.auto import levels_block
from hbp_titan.tuning.dry_run import DEFAULT_GPU
from hbp_titan.tuning.init_config import FirstConfig, Request
from hbp_titan.tuning.memory_plans import usable_bytes, usable_host_bytes
from hbp_titan.tuning.oom_advice import value_of
from hbp_titan.tuning.simulate import replay
from hbp_titan.tuning.time_model import time_model
from hbp_titan.utils import atomic_write, human_bytes, human_count, human_seconds

WIDTH = 118
PERCENTILES = (50, 90, 99)
FLOAT8_GAIN = 1.03
"""FP8 products are mentioned from this gain on."""
FEW_STEPS = 50
CHECKOUT = Path(__file__).resolve().parents[2]
"""The repository, if run_train.sh is there."""


def toml_text(first: FirstConfig) -> str:
    """Return the file: what it is for, then each section with the reasons of its values."""
    config, reasons = first.draft.config, first.draft.reasons
    parts = [_comment(*header(first))]
    for section in dataclasses.fields(JobConfig):
        if section.name == "levels":
            parts += _levels(first)
            continue
        keys = [key for key in reasons if key.startswith(f"{section.name}.")]
        if not keys:
            continue
        lines = [f"[{section.name}]"]
        if section.name == "data":
            lines += _comment(*lengths_text(first)).splitlines()
        for key in keys:
            lines += _comment(reasons[key]).splitlines() if reasons[key] else []
            lines.append(f"{key.partition('.')[2]} = {toml_value(value_of(config, key))}")
        parts.append("\n".join(lines))
    if hint := float8_hint(first):
        parts.append(hint)
    return "\n\n".join(parts) + "\n"


def header(first: FirstConfig) -> list[str]:
    """Return the paragraphs at the top of the file."""
    request, found = first.request, first.found
    what = f"LoRA adapters of rank {first.draft.config.lora.rank}" if first.draft.config.lora.rank else "all parameters"
    machines = f"{request.gpus} CPU ranks" if first.on_cpu else f"{request.gpus} x {found.hardware.name}"
    names = ", ".join(Path(path).name for path in request.data[:3]) + (" ..." if len(request.data) > 3 else "")
    return [
        f"{first.args.name} ({params_text(found.num_params)} parameters), {what}, on {names}, for {machines}. Written "
        "by hbp-titan init. Each comment is the reason of the value below it. Every key: hbp-titan train --help",
        "Estimated, not measured: " + estimate_text(first),
        *(f"{label}  {command}" for label, command in commands(request, first.on_cpu)),
    ]


def params_text(count: int) -> str:
    """Return a number of parameters as model cards write it: 8.03B."""
    return human_count(count).replace("G", "B")


def estimate_text(first: FirstConfig) -> str:
    """Return steps, time, GPU hours and peak memory in a line."""
    found, epochs = first.found, first.draft.config.training.epochs
    steps = f"{found.total_steps:,} steps" + ("" if first.draft.config.training.steps else f" in {epochs} epochs")
    if first.on_cpu:
        return f"{steps}; time is not estimated for a CPU."
    hours = first.seconds * first.request.gpus / 3600
    text = f"{steps}, {human_seconds(first.seconds)}, {hours:,.{1 if hours < 10 else 0}f} GPU hours; "
    text += f"peak {human_bytes(first.peak_bytes)} of {human_bytes(usable_bytes(found.hardware))} per GPU"
    if host := max(found.host_bytes(memory.configured) for memory in found.levels):
        usable = usable_host_bytes(found.hardware, found.world_size)
        text += f", and {human_bytes(host)} of {human_bytes(usable)} of host memory"
    return f"{text}."


def lengths_text(first: FirstConfig) -> list[str]:
    """Return what was read of the data, and the percentiles of its lengths."""
    data, lengths = first.data, first.samples.lengths
    if data.complete:
        read = f"{data.rows:,} rows, all tokenized."
    else:
        share = (data.random_rows + data.largest_rows) / data.rows
        read = (
            f"{data.rows:,} rows, of which {data.random_rows:,} random ones and the {data.largest_rows} largest were "
            f"tokenized ({share:.1%}); figures below are extrapolated from them."
        )
    if data.excluded:
        read += f" Rows not trained: {', '.join(f'{count:,} {reason}' for reason, count in data.excluded.items())}."
    # Without the largest rows, which would count as if they were random ones.
    random = data.lengths[: data.num_random or None]
    points = ", ".join(f"{p}% of the samples have at most {v:,}" for p, v in percentiles(random).items())
    return [
        f"{read} Tokens: {points}; mean {random.mean():,.0f}, longest {data.lengths.max():,}. "
        f"{first.samples.loss_tokens.sum() / lengths.sum():.0%} of the tokens are trained (answers)."
    ]


def percentiles(lengths: IntArray) -> dict[int, int]:
    """Return the smallest length that each of PERCENTILES percent of the samples do not exceed."""
    return {p: int(np.percentile(lengths, p, method="inverted_cdf")) for p in PERCENTILES}


def _levels(first: FirstConfig) -> list[str]:
    config, blocks = first.draft.config, []
    below = 0
    for index, level in enumerate(config.levels):
        text = "Given on the command line." if "levels" in first.draft.given else level_text(first, index, below)
        blocks.append(f"{_comment(text)}\n{levels_block([level]).rstrip()}")
        below = level.max_tokens
    return blocks


def level_text(first: FirstConfig, index: int, below: int) -> str:
    """Return why a level is as it is. below: max_tokens of the level below it."""
    found, level, lengths = first.found, first.draft.config.levels[index], first.samples.lengths
    own = lengths[(lengths > below) & (lengths <= level.max_tokens)]
    range_text = f"Samples of {below + 1:,} to {level.max_tokens:,} tokens" if below else "All samples"
    if below or len(own) < len(lengths):
        range_text = f"Samples of {below + 1:,} to {level.max_tokens:,} tokens: {len(own) / len(lengths):.2%} of them, "
        range_text += f"{own.sum() / lengths.sum():.0%} of the tokens"
    words = [
        f"{range_text}.",
        _ranks_text(level),
        _recomputation_text(level, first.args.num_layers),
    ]
    peak = human_bytes(found.peak_bytes(found.levels[index].configured))
    row = found.replay.per_level[index]
    if row is not None and not first.on_cpu:
        words.append(
            f"Estimated: peak {peak}, {human_seconds(row.seconds / row.micro_batches)} per micro-batch, "
            f"{row.seconds / found.replay.seconds:.0%} of the time."
        )
    return " ".join(words)


def _ranks_text(level: Level) -> str:
    if level.cp_degree == 1:
        return "One rank per pack, so attention needs no communication."
    return (
        f"{level.cp_degree} ranks share a pack ({level.cp_style}): {level.max_tokens // level.cp_degree:,} tokens each."
    )


def _recomputation_text(level: Level, num_layers: int) -> str:
    layers = num_layers if level.ac_layers is None else level.ac_layers
    kept = {
        "none": "Nothing is recomputed: all activations fit.",
        "full": f"{layers} of {num_layers} layers are recomputed in backward, the fewest that fit.",
        "keep_attention": f"{layers} of {num_layers} layers are recomputed in backward, except attention.",
        "offload": f"{layers} of {num_layers} layers are recomputed, and their inputs wait in host memory.",
        "offload_attention": f"{layers} of {num_layers} layers are recomputed except attention, which waits in host "
        "memory.",
    }[level.ac_policy]
    chunks = " The feed-forward runs in chunks, to hold one at a time." if level.mlp_chunk_tokens else ""
    return kept + chunks


def float8_hint(first: FirstConfig) -> str:
    """Return the section of FP8 products as a comment, with what it gains by the estimate; "" if it does not."""
    config, found = first.draft.config, first.found
    if first.on_cpu or config.lora.rank or config.float8.recipe or not found.hardware.fp8_peak_flops:
        return ""
    float8 = dataclasses.replace(config, float8=dataclasses.replace(config.float8, recipe="tensorwise"))
    try:
        faster = replay(found.plan, time_model(first.args, float8, found.hardware, found.world_size))
    except ValueError:
        # A model without layers that are large enough.
        return ""
    gain = found.replay.seconds / faster.seconds
    if gain < FLOAT8_GAIN:
        return ""
    return (
        _comment(
            f"FP8 products: {gain:.2f}x by the estimate. Off, because they change the numbers and need "
            "pip install 'hbp-titan[float8]'."
        )
        + '\n# [float8]\n# recipe = "tensorwise"'
    )


def commands(request: Request, on_cpu: bool) -> list[tuple[str, str]]:
    """Return (label, command) of the dry run and the start, in a checkout or with the installed package."""
    per_node = min(request.gpus, request.gpus_per_node)
    nodes = request.gpus // per_node
    script = CHECKOUT / "run_train.sh"
    if script.is_file():
        here = Path.cwd() == CHECKOUT
        file = request.output if here else request.output.absolute()
        run = f"CONFIG_FILE={shlex.quote(str(file))} {'./run_train.sh' if here else shlex.quote(str(script))}"
        gpu = f"GPU={request.gpu} " if request.gpu != DEFAULT_GPU else ""
        several = f"NNODES={nodes} NGPU={per_node} "
        ranks = several + "RDZV_ENDPOINT=node0:29500 " if nodes > 1 else f"NGPU={per_node} "
        start = ("CUDA_VISIBLE_DEVICES= " if on_cpu else "") + ranks + run
        check = f"COMM_MODE=fake {several if nodes > 1 else ranks}{gpu}{run}"
    else:
        output = shlex.quote(str(request.output))
        several = f"--nnodes {nodes} --rdzv_backend c10d --rdzv_endpoint node0:29500 " if nodes > 1 else ""
        launch = f"python -m hbp_titan.launch {several}--nproc_per_node {per_node} -m hbp_titan train"
        start = f"{launch} --job.config_file {output}"
        check = f"hbp-titan dry_run --world_size {request.gpus} --gpu {request.gpu} --job.config_file {output}"
    each = " (the same on each node)" if nodes > 1 else ""
    return ([] if on_cpu else [("check:", check)]) + [(f"start{each}:", start)]


def report(first: FirstConfig) -> str:
    """Return what the command prints: the dry run's verdict, the estimate, and how to start."""
    found = first.found
    levels = ", ".join(level_name(level) for level in found.config.levels)
    verdict = "memory is enough for" if first.on_cpu else "dry run: fits; levels"
    lines = [f"wrote {first.request.output}", f"{verdict} {levels}", f"estimate: {estimate_text(first)}"]
    lines += [f"warning: {warning}" for warning in [*found.warnings, *_few_steps(first)]]
    return "\n".join([*lines, *(f"{label:<8}{command}" for label, command in commands(first.request, first.on_cpu))])


def _few_steps(first: FirstConfig) -> list[str]:
    steps = first.found.total_steps
    if steps >= FEW_STEPS:
        return []
    return [
        f"only {steps} optimizer steps: the data are few for {first.request.gpus} ranks; use fewer of them, or "
        "add --training.epochs"
    ]


def write(first: FirstConfig) -> None:
    """Write the file of the request."""
    first.request.output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(first.request.output, toml_text(first))


def _comment(*paragraphs: str) -> str:
    """Return paragraphs as comment lines; commands are not broken."""
    lines: list[str] = []
    for text in paragraphs:
        broken = textwrap.wrap(text, WIDTH - 2, break_long_words=False, break_on_hyphens=False)
        lines += [text] if "run_train.sh" in text or "--job.config_file" in text else broken
    return "\n".join(f"# {line}".rstrip() for line in lines)
