"""From a TOML file and the command line to a checked JobConfig, and back to TOML.

Owns parsing, overrides, --help, and the checks that need neither data nor a world of ranks. Precedence: command line
(`--section.key value`) > TOML file (`--job.config_file X.toml`) > default. An unknown key is an error that names the
nearest known one.
"""

from __future__ import annotations

import ast
import dataclasses
import datetime
import inspect
import json
import math
import re
import sys
import textwrap
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hbp_titan.job_config import Data, DataSource, JobConfig, Optimizer, to_dict
from hbp_titan.packing.build import check_side_by_side
from hbp_titan.packing.level import Level, check_levels, check_reshard, parse_levels
from hbp_titan.packing.schedule import LEVEL_ORDERS
from hbp_titan.utils import did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHOICES = {
    "model.backend": ("native", "transformers"),
    "model.attention_backend": ("auto", "fa3", "fa4", "fa2", "torch", "cpu", "reference"),
    "packing.level_order": LEVEL_ORDERS,
    "training.loss_normalization": ("ave_token", "token_mean", "sample_mean", "sum"),
    "training.dtype": ("float32", "bfloat16"),
    "training.mixed_precision_param": ("auto", "float32", "bfloat16"),
    "training.mixed_precision_reduce": ("float32", "bfloat16"),
    "training.gradient_dtype": ("auto", "bfloat16"),
    "training.on_nonfinite": ("stop", "skip"),
    "lora.base_dtype": ("auto", "float32", "bfloat16"),
    "parallelism.cp_backend": ("fused", "dtensor"),
    "float8.recipe": ("", "tensorwise", "rowwise", "rowwise_with_gw_hp"),
    "optimizer.name": ("adamw", "adamw8bit", "muon"),
    "optimizer.state_dtype": ("auto", "bfloat16"),
    "lr_scheduler.decay": ("cosine", "linear", "constant"),
    "checkpoint.async_mode": ("async", "disabled"),
    "checkpoint.allow_changed": ("initial_weights", "model.hf_path", "optimizer.lr", "training.max_norm"),
    "checkpoint.export_dtype": ("", "float32", "bfloat16", "float16"),
    "data.embedded": ("", "stdlib"),
    "data.train_on": ("assistant", "last", "all"),
    "data.max_length_policy": ("error", "skip", "truncate", "split"),
    "data.reasoning": ("error", "split", "drop"),
    "data.empty_answers": ("skip", "train"),
    "data.malformed": ("error", "skip"),
    "data.duplicates": ("keep", "skip"),
}
# Zero turns other keys off; for these it has no meaning.
AT_LEAST_ONE = (
    "data.max_errors_shown",
    "data.max_row_bytes",
    "data.prefetch_factor",
    "training.epochs",
    "training.loss_chunk_tokens",
    "parallelism.dp_replicate",
    "parallelism.expert_parallel_degree",
    "parallelism.init_timeout_seconds",
    "parallelism.train_timeout_seconds",
    "checkpoint.interval",
    "validation.interval",
    "metrics.log_interval",
)


def load_config(argv: Sequence[str]) -> JobConfig:
    """Return the configuration of the command line `argv` (without the program's name).

    Raises ValueError for an unknown key, a value of the wrong type or keys that contradict each other, OSError for a
    config file that cannot be read.
    """
    overrides = parse_overrides(argv)
    values: dict[str, Any] = {}
    config_file = overrides.get("job.config_file")
    if config_file is not None:
        values = _read_toml(Path(config_file))
    config = _from_toml(values, config_file or "")
    # After the file: the command line wins.
    for key, text in overrides.items():
        _override(config, key, text)
    check_values(config)
    return config


def validate(config: JobConfig, world_size: int) -> None:
    """Raise ValueError if the configuration cannot run on `world_size` ranks."""
    side_by_side = config.packing.level_order == "parallel"
    if not config.measures_levels:
        check_levels(config.levels, world_size, side_by_side)
    if side_by_side:
        _check_side_by_side(config)
    if world_size % config.parallelism.dp_replicate:
        raise ValueError(
            f"parallelism.dp_replicate = {config.parallelism.dp_replicate} does not divide the world size "
            f"{world_size}; change one of them"
        )
    # Resharding happens among the ranks that hold one copy of the parameters.
    shards = world_size // config.parallelism.dp_replicate
    check_reshard("parallelism.reshard_after_forward", config.parallelism.reshard_after_forward, shards)
    for level in config.levels:
        name = f"level of max_tokens={level.max_tokens}: reshard_after_forward"
        check_reshard(name, level.reshard_setting(True), shards)
    if not (config.data.train_files or config.data.sources):
        raise ValueError("data.train_files is empty; set at least one file, or add a [[data.sources]] block")


def _check_side_by_side(config: JobConfig) -> None:
    """Raise ValueError for what would make ranks of different levels run different collectives."""
    if config.measures_levels:
        raise ValueError(
            'packing.level_order = "parallel" with packing.auto_levels: list the levels, '
            'as "scripts/select_levels.py --method parallel" proposes them, or change level_order'
        )
    check_side_by_side(config.packing.method, config.packing.level_order, config.packing.curriculum_steps)
    keys = ["reshard_after_forward"]
    if config.parallelism.expert_parallel_degree > 1:
        # Recomputation and chunks repeat the exchange of experts.
        keys += ["ac_policy", "ac_layers", "mlp_chunk_tokens"]
    for key in keys:
        values = list(dict.fromkeys(getattr(level, key) for level in config.levels))
        if len(values) > 1 or (key == "mlp_chunk_tokens" and values != [0]):
            raise ValueError(
                f'packing.level_order = "parallel" with levels.{key} = {", ".join(map(str, values))}: levels side by '
                f"side share their collectives; {'set it to 0' if len(values) == 1 else 'give all levels one value'}"
            )


def to_toml(config: JobConfig) -> str:
    """Return the resolved configuration as TOML text that `load_config` reads back to the same values."""

    def tables(header: str, values: Any) -> list[str]:
        if isinstance(values, list):
            return [block for item in values for block in tables(f"[{header}]", item)]
        # Tables of a section come after its keys, or TOML would read the keys as theirs.
        inner = {key: item for key, item in values.items() if _is_tables(item)}
        lines = [f"{key} = {toml_value(item)}" for key, item in values.items() if key not in ("config_file", *inner)]
        name = header.strip("[]")
        return ["\n".join([header, *lines, ""])] + [
            block for key, item in inner.items() for block in tables(f"[{name}.{key}]", item)
        ]

    return "\n".join(block for section, values in to_dict(config).items() for block in tables(f"[{section}]", values))


def toml_value(item: Any) -> str:
    """Return a value in TOML."""
    if isinstance(item, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_value(entry)}" for key, entry in item.items()) + "}"
    if isinstance(item, list):
        return "[" + ", ".join(map(toml_value, item)) + "]"
    # JSON's strings, numbers and booleans are TOML's.
    return json.dumps(item)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def help_text() -> str:
    """Return every key with its type, default and meaning."""
    lines = ["options (command line > TOML file > default):", "  --job.config_file X.toml"]
    lines.append("  --levels 1024:1,8192:2    max_tokens:cp_degree:cp_style:ac_policy:ac_layers:reshard_after_forward:")
    lines.append(
        "                            offload_layers:mlp_chunk_tokens:attention_head_groups:float8; empty: default;"
    )
    lines.append("                            only max_tokens is required; in TOML, [[levels]] blocks")
    for section in dataclasses.fields(JobConfig):
        if section.name == "levels":
            continue
        section_type = get_type_hints(JobConfig)[section.name]
        docs = _field_docs(section_type)
        for item in dataclasses.fields(section_type):
            default = getattr(section_type(), item.name)
            if item.type == "list[DataSource]":
                lines.append(f"  [[{section.name}.{item.name}]] blocks, in TOML only")
            else:
                lines.append(f"  --{section.name}.{item.name} {item.type}  [{json.dumps(default)}]")
            lines.append(f"        {docs[item.name]}")
    lines.append("keys of a [[data.sources]] or [[data.validation_sources]] block:")
    docs = _field_docs(DataSource)
    for item in dataclasses.fields(DataSource):
        lines.append(f"  {item.name} {item.type}  [{json.dumps(getattr(DataSource(), item.name))}]")
        lines.append(f"        {docs[item.name]}")
    return "\n".join(lines)


def _field_docs(section_type: type) -> dict[str, str]:
    """Return the string below each field of a section, read from the source (as torchtitan does)."""
    # Python keeps no docstring of a field at run time.
    tree = ast.parse(textwrap.dedent(inspect.getsource(section_type)))
    class_def = tree.body[0]
    assert isinstance(class_def, ast.ClassDef)
    docs = {}
    # The text of a field is the bare string after its annotation.
    for statement, following in zip(class_def.body, class_def.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            docs[statement.target.id] = " ".join(ast.literal_eval(following.value).split())
    return docs


def parse_overrides(argv: Sequence[str]) -> dict[str, str]:
    """Return the text of each key that the command line `argv` sets."""
    overrides: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}; overrides look like --section.key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise ValueError(f"--{key} has no value")
            value = words.pop(0)
        overrides[key] = value
    return overrides


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        # With errno and path, as open() raises it: such errors are printed in one form.
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
            raise ValueError(f"{where}: unknown section [{section}]{did_you_mean(section, section_types)}")
        if section == "levels":
            continue
        if not isinstance(content, dict):
            raise ValueError(f"{where}: {section} must be a table, not {content!r}")
        for key, value in content.items():
            _set(config, f"{section}.{key}", value, where)
    # The default dump folder is named after it.
    config.job.config_file = where
    if "levels" in values:
        config.levels = _levels_from_toml(values["levels"], where)
    return config


def _levels_from_toml(blocks: Any, where: str) -> list[Level]:
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise ValueError(f"{where}: levels must be [[levels]] blocks")
    types_of = get_type_hints(Level)
    levels = []
    for block in blocks:
        _check_block("levels", block, types_of, "max_tokens", where)
        levels.append(Level(**block))
    return levels


def _sources_from_toml(key: str, blocks: Any, where: str) -> list[DataSource]:
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise ValueError(f"{where}: {key} must be [[{key}]] blocks")
    types_of = get_type_hints(DataSource)
    for number, block in enumerate(blocks, start=1):
        _check_block(f"{key}[{number}]", block, types_of, "path", where)
    return [DataSource(**block) for block in blocks]


def _check_block(name: str, block: dict[str, Any], types_of: dict[str, Any], needed: str, where: str) -> None:
    for key, value in block.items():
        if key not in types_of:
            raise ValueError(f"{where}: unknown key {name}.{key}{did_you_mean(key, types_of)}")
        _check_type(f"{name}.{key}", value, types_of[key], where)
    if needed not in block:
        raise ValueError(f"{where}: {name} has no {needed}")


def _override(config: JobConfig, key: str, text: str) -> None:
    if key == "job.config_file":
        return
    if key == "levels":
        config.levels = list(parse_levels(text))
        return
    expected = _type_of(key, "command line")
    value: Any = text
    if expected is not str:
        # JSON's literals are TOML's; True and False are what Python users type.
        try:
            value = json.loads(text.lower() if expected is bool else text)
        except json.JSONDecodeError:
            # Lists of paths need no quotes on the command line.
            value = text.split(",") if get_origin(expected) is list else text
    _set(config, key, value, "command line")


def _set(config: JobConfig, key: str, value: Any, where: str) -> None:
    expected = _type_of(key, where)
    # TOML has dates without quotes.
    if expected is str and isinstance(value, datetime.date):
        value = value.isoformat()
    if expected == list[DataSource]:
        if where == "command line" and value != []:
            raise ValueError(
                f"command line: {key} takes [[{key}]] blocks, which only a TOML file can have; use "
                "data.train_files for paths, or [] to remove the blocks"
            )
        value = _sources_from_toml(key, value, where)
    else:
        _check_type(key, value, expected, where)
    section, _, name = key.partition(".")
    # TOML's 1 is an int; the config.toml that is written must not depend on how a number was typed.
    setattr(getattr(config, section), name, float(value) if expected is float else value)


def _type_of(key: str, where: str) -> Any:
    section, _, name = key.partition(".")
    sections = get_type_hints(JobConfig)
    if section not in sections or section == "levels":
        known = [f"{s}.{f.name}" for s, t in sections.items() if s != "levels" for f in dataclasses.fields(t)]
        raise ValueError(f"{where}: unknown key {key}{did_you_mean(key, known)}")
    hints = get_type_hints(sections[section])
    if name not in hints:
        raise ValueError(f"{where}: unknown key {key}{did_you_mean(name, hints, section + '.')}")
    return hints[name]


def _check_type(key: str, value: Any, expected: Any, where: str) -> None:
    origin = get_origin(expected)
    if origin is list:
        (item,) = get_args(expected)
        fits = isinstance(value, list) and all(isinstance(entry, item) for entry in value)
    elif origin is dict:
        _, item = get_args(expected)
        fits = isinstance(value, dict) and (item is Any or all(isinstance(entry, item) for entry in value.values()))
    elif origin in (typing.Union, types.UnionType):
        # bool is a subclass of int, so it counts only where the key allows it.
        fits = isinstance(value, get_args(expected)) and (bool in get_args(expected) or not isinstance(value, bool))
    elif expected is float:
        # A bool is an int in Python, but not a number in a configuration.
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        fits = isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
    if not fits:
        name = expected.__name__ if isinstance(expected, type) else str(expected)
        raise ValueError(f"{where}: {key} = {value!r} must be of type {name}")


def check_values(config: JobConfig) -> None:
    """Raise ValueError for the first key whose value is out of range or contradicts another key."""
    for key, choices in CHOICES.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        for entry in value if isinstance(value, list) else [value]:
            if entry not in choices:
                raise ValueError(f"{key} = {entry!r}: must be one of {', '.join(repr(c) for c in choices)}")
    if config.packing.auto_levels and config.levels:
        raise ValueError("packing.auto_levels = true chooses the levels; remove [[levels]] and --levels")
    # No key has a meaning for negative numbers, so one rule covers those that are added later.
    for section, values in to_dict(config).items():
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise ValueError(f"{section}.{name} = {value} must not be negative, infinite or NaN")
    for key in ("sources", "validation_sources"):
        for number, source in enumerate(getattr(config.data, key), start=1):
            _check_source(f"data.{key}[{number}]", source)
    for key in AT_LEAST_ONE:
        section, _, name = key.partition(".")
        if (number := getattr(getattr(config, section), name)) < 1:
            raise ValueError(f"{key} = {number} must be at least 1")
    _check_optimizer(config)
    _check_lora(config)
    _check_validation(config)
    profiling = config.profiling
    if profiling.enable_profiling and not 1 <= profiling.first_step <= profiling.last_step:
        raise ValueError(
            f"profiling.first_step = {profiling.first_step} and profiling.last_step = {profiling.last_step} are not a "
            "range of optimizer steps; steps count from 1"
        )
    _check_template(config.data)
    if (config.data.max_length_policy, config.data.train_on) == ("split", "last"):
        raise ValueError(
            'data.max_length_policy = "split" with data.train_on = "last" would train the last turn of every piece, '
            "not of the conversation; change one of them"
        )
    if config.model.backend == "transformers" and not config.model.hf_path:
        raise ValueError('model.backend = "transformers" needs model.hf_path, a folder with config.json and weights')
    if config.compile.enable and config.parallelism.cp_backend != "fused":
        raise ValueError(
            f"compile.enable with parallelism.cp_backend = {config.parallelism.cp_backend!r}: DTensor's "
            "redistribution breaks the graph of a block; reset one of the two"
        )


def _check_template(data: Data) -> None:
    if not _is_date(data.template_date):
        raise ValueError(f"data.template_date = {data.template_date!r} must be a day, such as 2024-07-26")
    try:
        json.dumps(data.chat_template_kwargs, allow_nan=False)
    except (TypeError, ValueError):
        # TOML also has dates, infinity and NaN.
        raise ValueError(
            f"data.chat_template_kwargs = {data.chat_template_kwargs!r} must have JSON values; write dates as text"
        ) from None


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    # Python 3.11 reads more forms than 3.10.
    return re.fullmatch(r"[1-9]\d{3}-\d{2}-\d{2}", text) is not None


def _check_validation(config: JobConfig) -> None:
    share, data = config.validation.share, config.data
    if not share < 1:
        raise ValueError(f"validation.share = {share} must be below 1; it is a share of the training rows")
    if share and (data.validation_files or data.validation_sources):
        raise ValueError(
            f"validation.share = {share} and data.validation_files or _sources both hold out samples; set "
            "validation.share = 0, or remove the files and sources"
        )
    if config.validation.enable and not (share or data.validation_files or data.validation_sources):
        raise ValueError(
            "validation.enable = true but nothing is held out; set data.validation_files or validation.share"
        )


def _check_optimizer(config: JobConfig) -> None:
    optimizer = config.optimizer
    if config.training.gradient_dtype != "auto" and config.training.global_batch_tokens:
        raise ValueError(
            f"training.gradient_dtype = {config.training.gradient_dtype!r} would round the sum of a step's "
            "micro-batches; set training.global_batch_tokens = 0 (one per step)"
        )
    for name in ("beta1", "beta2", "momentum"):
        if (value := getattr(optimizer, name)) >= 1:
            raise ValueError(f"optimizer.{name} = {value} must be below 1; it is the decay of a running mean")
    if optimizer.name != "muon" and optimizer.momentum != Optimizer.momentum:
        raise ValueError(
            f'optimizer.momentum = {optimizer.momentum} is Muon\'s; set optimizer.name = "muon" or remove it'
        )
    if not optimizer.eps:
        raise ValueError("optimizer.eps = 0 must be above 0; a parameter without gradient would become NaN")
    if (optimizer.name, optimizer.state_dtype) == ("adamw8bit", "bfloat16"):
        raise ValueError(
            'optimizer.state_dtype = "bfloat16" with optimizer.name = "adamw8bit", whose moments have 8 bits; remove '
            "one of them"
        )
    if optimizer.name == "adamw8bit" and config.parallelism.cpu_offload:
        raise ValueError(
            'optimizer.name = "adamw8bit" with parallelism.cpu_offload: a CPU takes minutes per step for 8-bit codes; '
            'use "adamw" with optimizer.state_dtype = "bfloat16"'
        )


def _check_lora(config: JobConfig) -> None:
    lora = config.lora
    if lora.rank and not (math.isfinite(lora.alpha) and lora.alpha > 0):
        raise ValueError(f"lora.alpha = {lora.alpha} must be above 0; adapters are scaled by alpha / rank")
    if lora.rank and not lora.target_modules:
        raise ValueError(f"lora.rank = {lora.rank} with an empty lora.target_modules trains nothing; list modules")
    if "all-linear" in lora.target_modules and len(lora.target_modules) > 1:
        raise ValueError(
            f'lora.target_modules = {lora.target_modules}: "all-linear" cannot be combined with other modules'
        )


def _check_source(name: str, source: DataSource) -> None:
    for key, least in (("limit", 0), ("repeat", 0), ("weight", 0)):
        value = getattr(source, key)
        if not (math.isfinite(value) and value >= least):
            raise ValueError(f"{name}.{key} = {value} must be a number of at least {least}")
    if source.repeat == 0:
        raise ValueError(f"{name}.repeat = 0 trains nothing; remove the block")
