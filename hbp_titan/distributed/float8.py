"""FP8 training: linear layers of the blocks multiply in float8, by torchao's Float8Linear, where the level asks for it.

Owns which layers are converted, the switch of a level, float8 all-gathers of FSDP2, and what hardware and shapes allow.
Everything else stays in the compute dtype: embeddings, head, norms, router, attention, and routed experts: torchao's
grouped float8 products are a prototype (0.18) that takes groups of a multiple of 16 rows and cannot be emulated.

Scales are dynamic: of the whole tensor on this rank ("tensorwise"), or of each row ("rowwise": a token's result does
not depend on other tokens, so packing, context parallelism and chunks change nothing; "rowwise_with_gw_hp": the same
with the weights' gradient in the compute dtype). Float8Linear keeps the same tensors for backward as a plain layer.

torchao is imported where a model is converted, so that planning for GPUs needs no torchao.

Shape suffixes: T tokens of a rank's shard, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hbp_titan.config import JobConfig
from hbp_titan.distributed.chunks import chunk_slices
from hbp_titan.job_config import Compile, Float8
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.registry import linear_params
from hbp_titan.packing import Level
from hbp_titan.packing.level import level_name
from hbp_titan.utils import first_n

ALIGNMENT = 16
"""Divisor of every dimension of a float8 product (torch._scaled_mm); the weights' gradient sums over the tokens."""
CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0), "rowwise_with_gw_hp": (9, 0)}
"""Least CUDA compute capability of each recipe: Ada and Hopper."""
SMALL = "auto_filter_small_kn"
"""Entry of float8.filter_fqns for layers at which float8 gains nothing (torchtitan's name)."""
TORCHAO = ("0.17", "0.18")
"""Minor versions of torchao that work with torch 2.11 to 2.13."""


@dataclass
class Float8State:
    """Whether the active level multiplies in float8; a level switch sets it, and all converted layers read it.

    description: which layers are converted, for the user. fsdp_all_gather: whether FSDP2 gathers their weights in
        float8. multiply, gradients: of layers outside of compiled regions.
    """

    description: str
    fsdp_all_gather: bool
    multiply: Callable[..., Tensor]
    gradients: Callable[..., tuple[Tensor, Tensor]]
    active: bool = True

    def track(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Compute the scales of all weights after each step, with one all-reduce, if they are gathered in float8."""
        if self.fsdp_all_gather:
            from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

            optimizer.register_step_post_hook(lambda *_: precompute_float8_dynamic_scale_for_fsdp(model))


def apply_float8(model: Decoder, config: Float8, compile: Compile | None = None) -> Float8State:
    """Convert the selected layers of `model` (usually on the meta device) in place; return their switch.

    compile: how products outside of compiled regions are compiled, if it is enabled. Parameters keep their names.
    Raises ValueError without a torchao that fits, and as `selected_names`.
    """
    float8 = torchao_float8()
    recipe = dataclasses.replace(
        float8.Float8LinearConfig.from_recipe_name(config.recipe),
        enable_fsdp_float8_all_gather=config.fsdp_all_gather,
        emulate=config.emulate,
    )
    names, description = set(selected_names(model, config)), describe_float8(model, config)
    float8.convert_to_float8_training(model, config=recipe, module_filter_fn=lambda _, name: name in names)
    state, switched = Float8State(description, config.fsdp_all_gather, *_product_steps()), _switched_linear()
    if not config.emulate and not (compile and compile.enable):
        state.description += "\nwarning: set compile.enable = true; eager casts take longer than float8 products gain"
    if compile and compile.enable:
        compiled = partial(torch.compile, backend=compile.backend, fullgraph=True, dynamic=False)
        state.multiply, state.gradients = compiled(state.multiply), compiled(state.gradients)
    for linear in float8_linears(model):
        # torchao has no factory for a subclass; its own conversion also fixes the compiler for float8.
        linear.__class__ = switched
        linear.float8_state = state
    return state


@cache
def _switched_linear() -> type[nn.Linear]:
    from torchao.float8.float8_linear import Float8Linear

    class SwitchedFloat8Linear(Float8Linear):
        """Float8Linear that multiplies in the compute dtype while its state is not active."""

        float8_state: Float8State

        def forward(self, input: Tensor) -> Tensor:
            if not self.float8_state.active:
                return F.linear(input, self.weight, self.bias)
            if torch.compiler.is_compiling():
                return Float8Linear.forward(self, input)
            output = _product_apart(self, input)
            return output if self.bias is None else output + self.bias.to(output.dtype)

    return SwitchedFloat8Linear


# A block's last product runs outside of the compiled regions, so that a recomputation can stop before it: all that
# backward reads of it is its input. Float8Linear's function saves after it has multiplied; here, `_Kept` saves and
# `_Product` multiplies. Both are compiled by themselves, because eager casts write copies in float32.


def _product_apart(linear: Any, x_TI: Tensor) -> Tensor:
    """Return the float8 product of a layer, [T, O], by torchao's forward and backward."""
    weight_IO = linear.weight.t()
    kept_TO = _Kept.apply(x_TI, weight_IO, linear)
    return _Product.apply(kept_TO, x_TI.detach(), weight_IO.detach(), linear)


class _Kept(torch.autograd.Function):
    """Save what backward needs; the result has the output's shape and no elements of its own."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_IO: Tensor, linear: Any) -> Tensor:
        ctx.save_for_backward(x_TI, weight_IO)
        ctx.linear = linear
        return x_TI.new_empty(()).expand(*x_TI.shape[:-1], weight_IO.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.linear.float8_state.gradients(ctx.linear, grad_TO, *ctx.saved_tensors), None


class _Product(torch.autograd.Function):
    """Multiply; the gradient goes to `_Kept` as it is."""

    @staticmethod
    def forward(ctx: Any, kept_TO: Tensor, x_TI: Tensor, weight_IO: Tensor, linear: Any) -> Tensor:
        return linear.float8_state.multiply(linear, x_TI, weight_IO)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        return grad_TO, None, None, None


class _Context:
    """Stands for the context of torchao's function."""

    def __init__(self, *saved_tensors: Tensor, **settings: Any) -> None:
        self.saved_tensors = saved_tensors
        self.__dict__ |= settings

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Ignore them: they are saved already."""


@cache
def _product_steps() -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    """Return the functions (layer, x_TI, weight_IO) -> product and (layer, grad_TO, x_TI, weight_IO) -> gradients."""
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    # As plain functions: the compiler refuses to call a function's backward.
    forward, backward = (vars(matmul_with_hp_or_float8_args)[name].__func__ for name in ("forward", "backward"))

    def multiply(linear: Any, x_TI: Tensor, weight_IO: Tensor) -> Tensor:
        return forward(_Context(), x_TI, weight_IO, linear.linear_mm_config, linear.config)

    def gradients(linear: Any, grad_TO: Tensor, x_TI: Tensor, weight_IO: Tensor) -> tuple[Tensor, Tensor]:
        context = _Context(x_TI, weight_IO, linear_mm_config=linear.linear_mm_config, config=linear.config)
        return backward(context, grad_TO)[:2]

    return multiply, gradients


def torchao_float8() -> Any:
    """Return the module torchao.float8; raise ValueError if it is missing or of another version."""
    found = torchao_version()
    if not found or ".".join(found.split(".")[:2]) not in TORCHAO:
        raise ValueError(
            f"float8.recipe needs torchao {' or '.join(TORCHAO)} (with torch 2.11 to 2.13); found {found or 'none'}: "
            f"pip install --no-deps 'torchao=={TORCHAO[-1]}.*'"
        )
    # It logs each library for other kernels that this machine cannot load.
    with _silent("torchao", "torch.utils._pytree"):
        from torchao import float8

    return float8


def torchao_version() -> str:
    """Return the version of the installed torchao, "" without one."""
    try:
        return metadata.version("torchao")
    except metadata.PackageNotFoundError:
        return ""


@contextmanager
def _silent(*names: str) -> Iterator[None]:
    loggers = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    for logger, _ in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in loggers:
            logger.setLevel(level)


def float8_linears(model: nn.Module) -> list[Any]:
    """Return the converted layers of a model."""
    return [
        module for module in model.modules() if isinstance(module, nn.Linear) and hasattr(module, "scaling_type_input")
    ]


def block_linears(model: Decoder) -> dict[str, nn.Linear]:
    """Return the linear layers of the blocks by name. A router is not one: it multiplies in float32."""
    named = model.layers.named_modules(prefix=model.layers_name)
    return {name: module for name, module in named if type(module) is nn.Linear}


def selected_names(model: Decoder, config: Float8) -> list[str]:
    """Return the names of the layers to convert.

    Raises ValueError for a selected layer that _scaled_mm cannot multiply, and if none is selected.
    """
    linears = block_linears(model)
    names = [name for name in linears if not any(part in name for part in config.filter_fqns)]
    if SMALL in config.filter_fqns:
        names = [name for name in names if not _is_small(linears[name], config.recipe)]
    unfit = {name.rpartition(".")[2] for name in names for n in linears[name].weight.shape if n % ALIGNMENT}
    if unfit:
        raise ValueError(
            f"float8.recipe: {', '.join(sorted(unfit))} of the model {model.args.name} have a dimension that "
            f"{ALIGNMENT} does not divide; add them to float8.filter_fqns"
        )
    if not names:
        raise ValueError(
            f"float8.recipe = {config.recipe!r} converts no layer of the model {model.args.name}: all are in "
            f"float8.filter_fqns or small; unset it, or remove {SMALL} from float8.filter_fqns"
        )
    return names


def _is_small(linear: nn.Linear, recipe: str) -> bool:
    """Return whether float8 gains nothing at this size, by torchao's measurements on an H100 (auto_filter_small_kn)."""
    outputs, inputs = linear.weight.shape
    if recipe == "tensorwise":
        return inputs <= 4096 and outputs <= 1024
    return outputs <= 2048 or inputs <= 1024 or (outputs <= 4096 and inputs <= 2048)


def check_float8(config: JobConfig, world_size: int, device: torch.device, args: ModelArgs) -> None:
    """Raise ValueError for what float8 products cannot do on such devices, or next to other settings."""
    float8 = config.float8
    if not float8.recipe:
        raise ValueError("[float8] and levels.float8 have no effect without float8.recipe; set it, or remove them")
    if config.lora.rank:
        raise ValueError(
            "float8.recipe with lora.rank: Float8Linear would compute the gradients of the frozen weights, a third of "
            "its work, which nothing reads; remove one of them"
        )
    if args.hf_config is not None:
        raise ValueError('float8.recipe with model.backend = "transformers" is not supported; remove one of them')
    with torch.device("meta"):
        model = Decoder(args)
    names = selected_names(model, float8)
    if device.type == "cuda" and torch.cuda.is_available() and not float8.emulate:
        check_capability(torch.cuda.get_device_capability(device), float8.recipe)
    elif device.type != "cuda" and not float8.emulate:
        raise ValueError(f"float8.recipe = {float8.recipe!r} needs a GPU; set float8.emulate = true on a CPU")
    for level in config.levels:
        if level.float8 is not False and not fits_tokens(level):
            chunks = f" in chunks of mlp_chunk_tokens={level.mlp_chunk_tokens}" * (level.mlp_chunk_tokens > 0)
            raise ValueError(
                f"level {level_name(level)}: {level.max_tokens // level.cp_degree} tokens per rank{chunks} are not "
                f"divisible by {ALIGNMENT}, as float8 products need; change it, or set levels.float8 = false"
            )
    if float8.fsdp_all_gather:
        _check_all_gather(config, world_size, {name: block_linears(model)[name].out_features for name in names})
    torchao_float8()


def check_capability(capability: tuple[int, int], recipe: str) -> None:
    least = CAPABILITY[recipe]
    if capability < least:
        other = ' or "tensorwise"' if capability >= CAPABILITY["tensorwise"] else ""
        raise ValueError(
            f"float8.recipe = {recipe!r} needs compute capability {least[0]}.{least[1]}, this GPU has "
            f'{capability[0]}.{capability[1]}; set it to ""{other}, or for a slow check float8.emulate = true'
        )


def fits_tokens(level: Level) -> bool:
    """Return whether _scaled_mm can multiply this level's shards, or all of their chunks."""
    tokens = level.max_tokens // level.cp_degree
    parts = chunk_slices(tokens, level.mlp_chunk_tokens) if level.mlp_chunk_tokens else [slice(0, tokens)]
    return all((min(part.stop, tokens) - part.start) % ALIGNMENT == 0 for part in parts)


def _check_all_gather(config: JobConfig, world_size: int, outputs: Mapping[str, int]) -> None:
    """Raise ValueError for what a float8 all-gather cannot do. outputs: of each converted layer."""
    parallelism, levels = config.parallelism, config.levels
    shards = world_size // parallelism.dp_replicate
    reshards = [level.reshard_setting(parallelism.reshard_after_forward) for level in levels]
    uneven = [name for name, rows in outputs.items() if rows % shards]
    conflicts = {
        f"float8.recipe = {config.float8.recipe!r}: it gathers one scale per weight; use tensorwise": (
            config.float8.recipe != "tensorwise"
        ),
        "parallelism.cpu_offload: shards in host memory would lose their scales; turn one of them off": (
            parallelism.cpu_offload
        ),
        "levels.float8 = false: the level would multiply with weights rounded to float8; remove one of them": any(
            level.float8 is False for level in levels
        ),
        "reshard_after_forward = a number of ranks: FSDP2 cannot reshard float8 weights; use true or false": not all(
            isinstance(value, bool) for value in reshards
        ),
        f"parameters over {shards} ranks, which do not divide the rows of {first_n(uneven, 3)}; change "
        "parallelism.dp_replicate, or add the layers to float8.filter_fqns": bool(uneven),
    }
    for text, present in conflicts.items():
        if present:
            raise ValueError(f"float8.fsdp_all_gather with {text}")


@dataclass(frozen=True)
class Float8Params:
    """Parameters of converted layers, summed over all layers of the model.

    body: all of them. first: of the projections to queries, keys and values. last: of MLPs' down projections.
    inputs, outputs: widths of the layers, summed. gathered: `body` if FSDP2 gathers them in float8, else 0.
    """

    body: int = 0
    first: int = 0
    last: int = 0
    inputs: int = 0
    outputs: int = 0
    gathered: int = 0


def float8_params(args: ModelArgs, config: Float8) -> Float8Params:
    """Count the parameters of the layers that `apply_float8` converts; none without a recipe."""
    key = (config.recipe, config.fsdp_all_gather, tuple(config.filter_fqns))
    return _float8_params(dataclasses.replace(args, rope_scaling=None), *key) if config.recipe else Float8Params()


@lru_cache(maxsize=64)
def _float8_params(args: ModelArgs, recipe: str, gathers: bool, filter_fqns: tuple[str, ...]) -> Float8Params:
    config = Float8(recipe, gathers, list(filter_fqns))
    with torch.device("meta"):
        model = Decoder(args)
    linears, names = block_linears(model), selected_names(model, config)

    def count(which: Iterable[str]) -> int:
        return sum(linears[name].weight.numel() for name in which)

    first = [name for name in names if ".self_attn." in name and not name.endswith(".o_proj")]
    last = [name for name in names if name.endswith(".mlp.down_proj")]
    widths = (sum(linears[name].in_features for name in names), sum(linears[name].out_features for name in names))
    return Float8Params(
        count(names), count(first), count(last), *widths, gathered=count(names) if config.fsdp_all_gather else 0
    )


def describe_float8(model: Decoder, config: Float8) -> str:
    """Return which products of the blocks are float8, and their share of the FLOPs of all. model: not yet converted."""
    linears, names = block_linears(model), selected_names(model, config)
    others = dict.fromkeys(name.rpartition(".")[2] for name in linears if name not in set(names))
    share = sum(linears[name].weight.numel() for name in names) / (
        linear_params(model.args) - model.args.vocab_size * model.args.hidden_size
    )
    experts = ["routed experts"] if model.args.moe else []
    kept = f"; in the compute dtype: {', '.join([*others, *experts])}" if others or experts else ""
    gathers = ", gathered in float8" if config.fsdp_all_gather else ""
    return (
        f"float8: {config.recipe}{' (emulated)' if config.emulate else ''}, {len(names)} of {len(linears)} linear "
        f"layers of the blocks{gathers}, {share:.1%} of the FLOPs of the blocks' matrix products{kept}"
    )
