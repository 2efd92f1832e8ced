"""What each key of a configuration may be: choices, ranges and pairs that contradict each other.

Owns the checks that need neither data nor world.
"""

from __future__ import annotations

import math

from hbp_titan.job_config import DataSource, JobConfig, to_dict
from hbp_titan.packing.level import AC_POLICIES

_CHOICES = {
    "model.attention_backend": ("auto", "fa3", "fa4", "fa2", "torch", "cpu", "reference"),
    "packing.levels": ("", "auto"),
    "packing.mix": ("alternate", "interleave"),
    "training.normalizer": ("ave_token", "token_mean", "sample_mean", "sum"),
    "training.dtype": ("float32", "bfloat16"),
    "training.mixed_precision_param": ("auto", "float32", "bfloat16"),
    "training.mixed_precision_reduce": ("float32", "bfloat16"),
    "training.on_nonfinite": ("stop", "skip"),
    "lora.base_dtype": ("auto", "float32", "bfloat16"),
    "optimizer.name": ("AdamW",),
    "parallelism.cp_collectives": ("fused", "dtensor"),
    "lr_scheduler.decay": ("cosine", "linear", "constant"),
    "activation_checkpoint.policy": AC_POLICIES,
    "checkpoint.async_mode": ("async", "disabled"),
    "checkpoint.export_dtype": ("float32", "bfloat16"),
    "data.embedded": ("", "stdlib"),
    "data.train_on": ("assistant", "last", "all"),
    "data.overlong": ("error", "skip", "truncate", "split"),
    "data.malformed": ("error", "skip"),
    "data.duplicates": ("keep", "skip"),
}


def check_values(config: JobConfig) -> None:
    """Raise ValueError for the first key whose value is out of its range or contradicts another key."""
    for key, choices in _CHOICES.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if value not in choices:
            raise ValueError(f"{key} = {value!r} is none of {', '.join(repr(c) for c in choices)}")
    if config.packing.levels == "auto" and config.levels:
        raise ValueError('packing.levels = "auto" chooses the levels: leave [[levels]] and --levels out')
    for section, values in to_dict(config).items():
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"{section}.{name} = {value} must not be negative")
    for key in ("sources", "validation_sources"):
        for number, source in enumerate(getattr(config.data, key), start=1):
            _check_source(f"data.{key}[{number}]", source)
    for key, value in (
        ("data.max_errors_shown", config.data.max_errors_shown),
        ("data.max_row_bytes", config.data.max_row_bytes),
        ("parallelism.dp_replicate", config.parallelism.dp_replicate),
        ("parallelism.expert_parallel_degree", config.parallelism.expert_parallel_degree),
        ("checkpoint.interval", config.checkpoint.interval),
        ("training.loss_chunk_tokens", config.training.loss_chunk_tokens),
        ("metrics.log_interval", config.metrics.log_interval),
        ("data.prefetch_factor", config.data.prefetch_factor),
        ("validation.interval", config.validation.interval),
    ):
        if value < 1:
            raise ValueError(f"{key} = {value} must be at least 1")
    _check_lora(config)
    _check_validation(config)
    profiling = config.profiling
    if profiling.enable_profiling and not 1 <= profiling.first_step <= profiling.last_step:
        raise ValueError(
            f"profiling.first_step = {profiling.first_step} and profiling.last_step = {profiling.last_step} name no "
            "optimizer step: they count from 1, and the last is not before the first"
        )
    if (config.data.overlong, config.data.train_on) == ("split", "last"):
        raise ValueError(
            'data.overlong = "split" with data.train_on = "last" would train the last turn of every piece, not of the '
            "conversation: change one of them"
        )
    if config.compile.enable and config.parallelism.cp_collectives != "fused":
        raise ValueError(
            f"compile.enable with parallelism.cp_collectives = {config.parallelism.cp_collectives!r}: DTensor's "
            "redistribution would break the graph of a block; set one of the two back"
        )


def _check_validation(config: JobConfig) -> None:
    share, data = config.validation.share, config.data
    if not share < 1:
        raise ValueError(f"validation.share = {share} must be below 1: it is a share of the training rows")
    if share and (data.validation_files or data.validation_sources):
        raise ValueError(
            f"validation.share = {share} and data.validation_files or _sources: what is held out comes from one of the "
            "two; set validation.share = 0, or name no sources"
        )
    if config.validation.enable and not (share or data.validation_files or data.validation_sources):
        raise ValueError(
            "validation.enable = true but nothing is held out: name data.validation_files, or set validation.share"
        )


def _check_lora(config: JobConfig) -> None:
    lora = config.lora
    if lora.rank and not (math.isfinite(lora.alpha) and lora.alpha > 0):
        raise ValueError(f"lora.alpha = {lora.alpha} must be above 0: adapters count alpha / rank")
    if lora.rank and not lora.target_modules:
        raise ValueError(f"lora.rank = {lora.rank} with an empty lora.target_modules trains nothing: name matrices")
    if "all-linear" in lora.target_modules and len(lora.target_modules) > 1:
        raise ValueError(f"lora.target_modules = {lora.target_modules}: all-linear stands alone")


def _check_source(name: str, source: DataSource) -> None:
    for key, least in (("limit", 0), ("repeat", 0), ("weight", 0)):
        value = getattr(source, key)
        if not (math.isfinite(value) and value >= least):
            raise ValueError(f"{name}.{key} = {value} must be a number of at least {least}")
    if source.repeat == 0:
        raise ValueError(f"{name}.repeat = 0 trains nothing: leave the block out")
