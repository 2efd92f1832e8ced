"""Preflight: what can be known to be wrong with a run before GPU time is spent.

`check` needs the configuration, the model's dimensions and the device; `check_vocabulary` the prepared data.
scripts/prepare_data.py runs both in one process before ranks are started, and each trainer runs them once more, because
torchrun can be called without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hbp_titan.components.metrics import check_wandb
from hbp_titan.components.weights import check_load_path
from hbp_titan.config import JobConfig, validate
from hbp_titan.distributed.context_parallel import check_heads
from hbp_titan.distributed.parallelize import compute_dtype
from hbp_titan.distributed.world import log_rank
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import build_decoder
from hbp_titan.models.hf_config import args_from_hf
from hbp_titan.models.registry import get_flavor, last_params, linear_params
from hbp_titan.packing import CostModel, Level

if TYPE_CHECKING:
    from hbp_titan.data.epoch import SampleLengths


def model_args(config: JobConfig, notes: list[str] | None = None) -> ModelArgs:
    """Return the architecture: of model.hf_path's config.json, else of model.flavor. notes: as of args_from_hf."""
    if config.model.backend == "transformers":
        from hbp_titan.models.transformers_probe import args_from_transformers

        return args_from_transformers(config.model.hf_path, "model.hf_path", notes)
    if config.model.weights_package and not Path(config.model.hf_path).is_dir():
        raise ValueError("model.hf_path: not there yet; scripts/prepare_data.py makes it from model.weights_package")
    if config.model.hf_path:
        return args_from_hf(config.model.hf_path, "model.hf_path", notes)
    return get_flavor(config.model.flavor)


def cost_model(args: ModelArgs, frozen: bool = False, level: Level | None = None) -> CostModel:
    """Return the FLOPs of forward and backward by which the planner weighs packs.

    frozen: the matrices have no gradients of their own (LoRA, whose adapters are neglected); attention has. level:
    counts what it recomputes; without it nothing, as the packs of one level differ little in that.
    """
    head_params = args.vocab_size * args.hidden_size
    return CostModel.from_dims(
        num_layers=args.num_layers,
        layer_params=(linear_params(args) - head_params) // args.num_layers,
        head_params=head_params,
        num_heads=args.num_heads,
        # Latent attention has narrower values, which the kernel sees padded to the width of keys.
        head_dim=args.head_dim,
        window=args.sliding_window,
        window_share=args.window_share,
        # Two of three products remain. The model has one FLOP count, so a frozen matrix counts as a faster one.
        linear_efficiency=1.5 if frozen else 1.0,
        ac_policy=level.ac_policy if level else "none",
        ac_layers=level.ac_layers if level else None,
        last_params=last_params(args) // args.num_layers,
        chunked=level is not None and level.mlp_chunk_tokens > 0,
    )


def planner_costs(
    config: JobConfig, args: ModelArgs, world_size: int, samples: SampleLengths, device: torch.device
) -> CostModel | tuple[CostModel, ...]:
    """Return the cost by which the planner weighs packs: one for all levels, or one each if they run side by side."""
    if config.packing.level_order != "parallel":
        return cost_model(args, frozen=config.lora.rank > 0)
    # Not at the top: packs of one level at a time need no time model.
    from hbp_titan.tuning.hardware import hardware_of
    from hbp_titan.tuning.parallel_levels import costs_on

    return costs_on(hardware_of(device), config, args, world_size, samples)


def max_sample_tokens(config: JobConfig, args: ModelArgs) -> int:
    """Return the most tokens of a sample: packing.max_sample_tokens, at most the largest level's.

    While levels are still to be chosen, at most what the model's positions allow.
    """
    largest = config.levels[-1].max_tokens if config.levels else args.max_position_embeddings
    return min(config.packing.max_sample_tokens or largest, largest)


def check_device(config: JobConfig, device: torch.device) -> None:
    """Raise ValueError for what the device or this torch cannot compute."""
    if device.type == "cuda" and compute_dtype(config, device) == torch.float32:
        raise ValueError(
            'training.mixed_precision_param = "float32" has no attention kernel for packed documents on a GPU; set '
            "it to bfloat16"
        )
    if config.compile.enable:
        backends = torch.compiler.list_backends(exclude_tags=None)
        if config.compile.backend not in backends:
            raise ValueError(f"compile.backend = {config.compile.backend!r}: must be one of {', '.join(backends)}")


def check(config: JobConfig, world_size: int, device: torch.device, args: ModelArgs) -> None:
    """Raise ValueError for what cannot be trained on `world_size` ranks with such a device each.

    Too long samples are refused when the data are prepared.
    """
    validate(config, world_size)
    log_rank(world_size)
    if config.metrics.enable_wandb:
        check_wandb()
    check_device(config, device)
    check_heads(config.levels, args.num_heads, args.num_kv_heads)
    check_layers(config.levels, args.num_layers)
    if args.hf_config is not None:
        from hbp_titan.models.transformers_probe import check_config

        check_config(config)
    if config.parallelism.expert_parallel_degree > 1:
        from hbp_titan.distributed.expert_parallel import check_experts

        shards = world_size // config.parallelism.dp_replicate
        check_experts(args, config.parallelism.expert_parallel_degree, shards)
    if config.float8 != type(config.float8)() or any(level.float8 is not None for level in config.levels):
        from hbp_titan.distributed.float8 import check_float8

        check_float8(config, world_size, device, args)
    if config.optimizer.router_bias_rate and (config.lora.rank or not (args.moe and args.moe.has_router_bias)):
        reason = "lora.rank freezes them" if config.lora.rank else f"the model {args.name} has none"
        raise ValueError(f"optimizer.router_bias_rate moves router biases, but {reason}; remove it")
    longest = max_sample_tokens(config, args)
    if longest > args.max_position_embeddings:
        raise ValueError(
            f"levels.max_tokens={longest} exceeds the model's max_position_embeddings={args.max_position_embeddings}; "
            "lower levels.max_tokens, or limit samples by packing.max_sample_tokens (a pack may hold several)"
        )
    own = config.checkpoint.initial_load_path
    if config.lora.rank:
        from hbp_titan.models.lora import lora_targets

        with torch.device("meta"):
            lora_targets(build_decoder(args), config.lora.target_modules)
    check_load_path(config.weights_path, args, "checkpoint.initial_load_path" if own else "model.hf_path")


def check_layers(levels: Sequence[Level], num_layers: int) -> None:
    """Raise ValueError if a level is to checkpoint, or to keep in host memory, more layers than there are."""
    for level in levels:
        covered = num_layers if level.ac_layers is None else level.ac_layers
        for key, most, of in (("ac_layers", num_layers, "the model"), ("offload_layers", covered, "ac_policy")):
            if (value := getattr(level, key) or 0) > most:
                name = f"level of max_tokens={level.max_tokens}: {key}={value}"
                raise ValueError(f"{name} exceeds the {most} layers of {of}; lower it, or omit it for all of them")


def check_vocabulary(config: JobConfig, args: ModelArgs, tokenizer_size: int) -> None:
    """Raise ValueError if the model's embedding has no row for a token. tokenizer_size: largest token id + 1."""
    if tokenizer_size > args.vocab_size:
        # Not at the top: a run with finished stores needs no tokenizer.
        from hbp_titan.data.tokenizer import read_tokenizer_folder

        last = tokenizer_size - 1
        token = read_tokenizer_folder(config.tokenizer_path).load().id_to_token(last)
        raise ValueError(
            f"the tokenizer {config.tokenizer_path} has token ids up to {last} ({token!r}), but the model "
            f"{args.name} has {args.vocab_size} embeddings; set model.tokenizer_path to the model's own "
            "tokenizer, or remove tokens that the model does not know"
        )
