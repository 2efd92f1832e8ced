"""JobConfig: every TOML section as a dataclass, and how a TOML file and the command line fill it.

Owns the keys, their defaults and their meaning; parsing and overriding; checks that need no data. Precedence:
command line (`--section.key value`) > TOML file (`--job.config_file X.toml`) > default. An unknown key is an
error that names the nearest known one. Design after torchtitan v0.2.2 config/job_config.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hbp_titan.packing.level import AC_POLICIES, Level, check_levels, parse_levels

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass
class Job:
    config_file: str = ""
    """The TOML file. Command line only."""
    dump_folder: str = ""
    """Run folder; empty means outputs/<name of the config file>."""
    description: str = "hbp_titan training"
    """One line for the log."""


@dataclass
class Model:
    flavor: str = "debug"
    """A named architecture of models/registry.py; ignored when hf_path is set."""
    hf_path: str = ""
    """Folder with an HF config.json: the architecture comes from it."""
    tokenizer_path: str = ""
    """Folder with tokenizer.json and tokenizer_config.json; empty means hf_path."""


@dataclass
class Data:
    train_files: list[str] = field(default_factory=list)
    """JSONL files, each line an object with a `messages` list of {role, content}."""
    validation_files: list[str] = field(default_factory=list)
    """Held-out JSONL files; never trained on."""
    embedded: str = ""
    """"stdlib" builds the embedded corpus and its tokenizer in `embedded_folder` when they are not there."""
    embedded_folder: str = ".data/stdlib"
    """Where the embedded corpus lives: train.jsonl, validation.jsonl, tokenizer/."""
    embedded_max_tokens: int = 0
    """Embedded corpus only: keep samples up to this many tokens; 0 keeps all. The rest are listed as excluded."""
    cache_folder: str = ".data/cache"
    """Where token stores are kept, one folder per fingerprint."""
    max_samples: int = 0
    """Take a seeded random share of so many samples; 0 takes all."""
    num_proc: int = 0
    """Processes for tokenization; 0 means one per core."""
    num_workers: int = 1
    """Loader worker processes per rank; 0 loads in the training process."""
    prefetch_factor: int = 4
    """Batches that each loader worker prepares ahead."""


@dataclass
class Packing:
    method: str = "hbp"
    """Planner: hbp, isf, flat_sorted, ... (packing/plan.py lists them)."""
    seed: int = 0
    """Seed of shuffles in the plan; each epoch derives its own."""
    mix: str = "alternate"
    """Order of iterations after the curriculum: "alternate" or "interleave"."""
    curriculum_steps: float = 0
    """Optimizer steps of the lowest level first; a value below 1 is a share of the first epoch's steps."""
    print_comparison: bool = True
    """Print the table of methods at the start of a run."""


@dataclass
class Training:
    steps: int = 0
    """Optimizer steps in all; 0 means `epochs` whole epochs."""
    epochs: int = 1
    """Epochs to train when steps is 0."""
    global_batch_tokens: int = 0
    """Tokens of one optimizer step; 0 means one iteration a step. Reached by gradient accumulation."""
    max_norm: float = 1.0
    """Gradient clipping norm over the world; 0 turns it off."""
    normalizer: str = "ave_token"
    """Loss normalizer: ave_token (paper section 3.3)."""
    dtype: str = "float32"
    """Dtype of the stored parameters and of the optimizer state."""
    mixed_precision_param: str = "auto"
    """Compute dtype under FSDP: bfloat16, float32 or auto (bfloat16 on CUDA, float32 on CPU)."""
    mixed_precision_reduce: str = "float32"
    """Gradient reduction dtype under FSDP."""
    seed: int = 42
    """Seed of weight initialization and of every RNG."""
    deterministic: bool = False
    """Refuse nondeterministic kernels."""
    loss_chunk_tokens: int = 1024
    """Loss tokens whose logits are held at one time."""


@dataclass
class Optimizer:
    name: str = "AdamW"
    """AdamW."""
    lr: float = 1e-5
    """Peak learning rate."""
    beta1: float = 0.9
    """AdamW beta1."""
    beta2: float = 0.95
    """AdamW beta2."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on every matrix; norms and biases have none."""


@dataclass
class LRScheduler:
    warmup_steps: float = 0.03
    """Linear warm-up in steps; a value below 1 is a share of all steps."""
    decay: str = "cosine"
    """cosine, linear or constant."""
    min_lr_factor: float = 0.1
    """Final learning rate as a share of the peak."""


@dataclass
class Parallelism:
    reshard_after_forward: bool = True
    """FSDP2: free the gathered parameters of a block after its forward (ZeRO-3); False keeps them (ZeRO-2)."""
    init_timeout_seconds: int = 600
    """Timeout of collectives until the first optimizer step is done."""
    train_timeout_seconds: int = 300
    """Timeout of collectives afterwards."""


@dataclass
class ActivationCheckpoint:
    policy: str = "none"
    """Policy of levels that name none themselves: none, full or keep_attention."""


@dataclass
class Compile:
    enable: bool = False
    """torch.compile each block."""
    backend: str = "inductor"
    """Compiler backend."""


@dataclass
class Checkpoint:
    enable: bool = True
    """Write checkpoints and resume from the newest one in the run folder."""
    interval: int = 100
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_latest_k: int = 2
    """Older checkpoints are deleted; 0 keeps all."""
    initial_load_path: str = ""
    """HF folder whose weights start the run when there is nothing to resume."""
    export_hf: bool = True
    """Write hf/ into the run folder at the end."""
    export_dtype: str = "float32"
    """Dtype of the exported weights: float32 or bfloat16."""


@dataclass
class Validation:
    enable: bool = False
    """Evaluate data.validation_files during training."""
    interval: int = 100
    """Optimizer steps between evaluations; also at the end."""
    max_samples: int = 0
    """Evaluate a seeded share of so many samples; 0 evaluates all."""


@dataclass
class Metrics:
    log_interval: int = 1
    """Optimizer steps between console lines; metrics.jsonl has every step."""
    enable_tensorboard: bool = True
    """Write tensorboard/ into the run folder."""
    progress_bar: bool = True
    """Progress bar with time to finish, on a terminal."""


@dataclass
class Profiling:
    enable_profiling: bool = False
    """Write a torch profiler trace into the run folder."""
    profile_step: int = 10
    """The optimizer step that is traced."""


@dataclass
class JobConfig:
    """The whole configuration; one field a TOML section, `levels` an array of tables."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    packing: Packing = field(default_factory=Packing)
    levels: list[Level] = field(default_factory=list)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    parallelism: Parallelism = field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
    metrics: Metrics = field(default_factory=Metrics)
    profiling: Profiling = field(default_factory=Profiling)

    @property
    def dump_folder(self) -> Path:
        """The run folder."""
        return Path(self.job.dump_folder or f"outputs/{Path(self.job.config_file or 'default').stem}")

    @property
    def tokenizer_path(self) -> Path:
        """The folder with the tokenizer's files."""
        path = self.model.tokenizer_path or self.model.hf_path
        if not path:
            raise ValueError("model.tokenizer_path is empty: name a folder with tokenizer.json")
        return Path(path)


def load_config(argv: Sequence[str]) -> JobConfig:
    """The configuration that the command line `argv` (without the program's name) describes.

    Raises ValueError for an unknown key, a value of the wrong type or an impossible combination, OSError for a
    config file that cannot be read.
    """
    overrides = _parse_overrides(argv)
    values: dict[str, Any] = {}
    config_file = overrides.get("job.config_file")
    if config_file is not None:
        values = _read_toml(Path(config_file))
    config = _from_toml(values, config_file or "")
    for key, text in overrides.items():
        _override(config, key, text)
    _check_values(config)
    return config


def validate(config: JobConfig, world_size: int) -> None:
    """Raise ValueError where the configuration cannot run on `world_size` ranks."""
    check_levels(config.levels, world_size)
    if not config.data.train_files:
        raise ValueError("data.train_files is empty: name at least one JSONL file")


def to_dict(config: JobConfig) -> dict[str, Any]:
    """The resolved configuration as plain values, None left out (TOML has no null)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if item is not None}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value

    return plain(dataclasses.asdict(config))


def to_toml(config: JobConfig) -> str:
    """The resolved configuration as TOML text that `load_config` reads back to the same values."""

    def table(header: str, values: dict[str, Any]) -> str:
        # JSON's strings, numbers, booleans and flat arrays are TOML's.
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if key != "config_file"]
        return "\n".join([header, *lines, ""])

    blocks = []
    for section, values in to_dict(config).items():
        if isinstance(values, list):
            blocks += [table(f"[[{section}]]", item) for item in values]
        else:
            blocks.append(table(f"[{section}]", values))
    return "\n".join(blocks)


def help_text() -> str:
    """Every key with its default and meaning."""
    lines = ["options (command line > TOML file > default):", "  --job.config_file X.toml"]
    lines.append("  --levels 1024:1,8192:2    levels as max_tokens:cp_degree; in TOML, [[levels]] blocks")
    for section in dataclasses.fields(JobConfig):
        if section.name == "levels":
            continue
        section_type = get_type_hints(JobConfig)[section.name]
        docs = _field_docs(section_type)
        for item in dataclasses.fields(section_type):
            default = getattr(section_type(), item.name)
            lines.append(f"  --{section.name}.{item.name} {item.type}  [{json.dumps(default)}]")
            lines.append(f"        {docs[item.name]}")
    return "\n".join(lines)


def _field_docs(section_type: type) -> dict[str, str]:
    """The string below each field of a section, read from the source (as torchtitan's are)."""
    import ast
    import inspect
    import textwrap

    tree = ast.parse(textwrap.dedent(inspect.getsource(section_type)))
    class_def = tree.body[0]
    assert isinstance(class_def, ast.ClassDef)
    docs = {}
    for statement, following in zip(class_def.body, class_def.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            docs[statement.target.id] = " ".join(ast.literal_eval(following.value).split())
    return docs


def _parse_overrides(argv: Sequence[str]) -> dict[str, str]:
    overrides: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}: overrides look like --section.key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise ValueError(f"--{key} has no value")
            value = words.pop(0)
        overrides[key] = value
    return overrides


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(2, "no such config file", str(path))
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None


def _from_toml(values: dict[str, Any], where: str) -> JobConfig:
    config = JobConfig()
    section_types = get_type_hints(JobConfig)
    for section, content in values.items():
        if section not in section_types:
            raise ValueError(f"{where}: unknown section [{section}]{_nearest(section, section_types)}")
        if section == "levels":
            continue
        if not isinstance(content, dict):
            raise ValueError(f"{where}: {section} must be a table, not {content!r}")
        for key, value in content.items():
            _set(config, f"{section}.{key}", value, where)
    config.job.config_file = where
    if "levels" in values:
        config.levels = _levels_from_toml(values["levels"], config.activation_checkpoint.policy, where)
    return config


def _levels_from_toml(blocks: Any, default_policy: str, where: str) -> list[Level]:
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise ValueError(f"{where}: levels must be [[levels]] blocks")
    types_of = get_type_hints(Level)
    levels = []
    for block in blocks:
        for key, value in block.items():
            if key not in types_of:
                raise ValueError(f"{where}: unknown key levels.{key}{_nearest(key, types_of)}")
            _check_type(f"levels.{key}", value, types_of[key], where)
        if "max_tokens" not in block:
            raise ValueError(f"{where}: a [[levels]] block lacks max_tokens")
        levels.append(Level(**{"ac_policy": default_policy, **block}))
    return levels


def _override(config: JobConfig, key: str, text: str) -> None:
    if key == "job.config_file":
        return
    if key == "levels":
        config.levels = list(parse_levels(text))
        return
    expected = _type_of(key, "command line")
    value: Any = text
    if expected is not str:
        try:
            value = json.loads(text.lower() if expected is bool else text)
        except json.JSONDecodeError:
            value = text.split(",") if get_origin(expected) is list else text
    _set(config, key, value, "command line")


def _set(config: JobConfig, key: str, value: Any, where: str) -> None:
    expected = _type_of(key, where)
    _check_type(key, value, expected, where)
    section, _, name = key.partition(".")
    setattr(getattr(config, section), name, float(value) if expected is float else value)


def _type_of(key: str, where: str) -> Any:
    section, _, name = key.partition(".")
    sections = get_type_hints(JobConfig)
    if section not in sections or section == "levels":
        known = [f"{s}.{f.name}" for s, t in sections.items() if s != "levels" for f in dataclasses.fields(t)]
        raise ValueError(f"{where}: unknown key {key}{_nearest(key, known)}")
    hints = get_type_hints(sections[section])
    if name not in hints:
        raise ValueError(f"{where}: unknown key {key}{_nearest(name, hints, section + '.')}")
    return hints[name]


def _check_type(key: str, value: Any, expected: Any, where: str) -> None:
    origin = get_origin(expected)
    if origin is list:
        (item,) = get_args(expected)
        fits = isinstance(value, list) and all(isinstance(entry, item) for entry in value)
    elif origin in (typing.Union, types.UnionType):
        fits = isinstance(value, get_args(expected)) and not isinstance(value, bool)
    elif expected is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        fits = isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
    if not fits:
        name = expected.__name__ if isinstance(expected, type) else str(expected)
        raise ValueError(f"{where}: {key} = {value!r} must be of type {name}")


def _nearest(name: str, known: typing.Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


_CHOICES = {
    "packing.mix": ("alternate", "interleave"),
    "training.normalizer": ("ave_token",),
    "training.dtype": ("float32", "bfloat16"),
    "training.mixed_precision_param": ("auto", "float32", "bfloat16"),
    "training.mixed_precision_reduce": ("float32", "bfloat16"),
    "optimizer.name": ("AdamW",),
    "lr_scheduler.decay": ("cosine", "linear", "constant"),
    "activation_checkpoint.policy": AC_POLICIES,
    "checkpoint.export_dtype": ("float32", "bfloat16"),
    "data.embedded": ("", "stdlib"),
}


def _check_values(config: JobConfig) -> None:
    for key, choices in _CHOICES.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if value not in choices:
            raise ValueError(f"{key} = {value!r} is none of {', '.join(repr(c) for c in choices)}")
    for section in dataclasses.fields(JobConfig):
        if section.name == "levels":
            continue
        values = getattr(config, section.name)
        for item in dataclasses.fields(values):
            value = getattr(values, item.name)
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"{section.name}.{item.name} = {value} must not be negative")
    for key, value in (
        ("checkpoint.interval", config.checkpoint.interval),
        ("training.loss_chunk_tokens", config.training.loss_chunk_tokens),
        ("metrics.log_interval", config.metrics.log_interval),
        ("data.prefetch_factor", config.data.prefetch_factor),
        ("validation.interval", config.validation.interval),
    ):
        if value < 1:
            raise ValueError(f"{key} = {value} must be at least 1")
