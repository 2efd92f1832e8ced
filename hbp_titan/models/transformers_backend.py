"""A decoder of `transformers` with the interface of our Decoder (model.backend = "transformers").

Owns the model's construction on the meta device, attention and the head. Everything but these two is transformers' own
code: embeddings, blocks, norms and whatever an architecture multiplies by. Its attention function is replaced through
transformers' AttentionInterface by `block.inner_attention`, so that packs, context parallelism and levels apply; masks
are not built. transformers_probe.py checks that an architecture allows it. Parameter names are transformers' own.

Shape suffixes: T tokens of the pack, H hidden width, N query heads, K key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hbp_titan.models.attention import VarlenAttention
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder, HeadFn
from hbp_titan.models.moe import BalanceState

ATTENTION = "hbp_titan"
"""Name of our attention function in transformers' registries."""
# Columns by which a head with biases is widened: matrix products of another width than a multiple of 8 are slow.
_BIAS_COLUMNS = 8


class Mask(NamedTuple):
    """What transformers would make a mask of: stands in for it.

    window: keys that a query attends to, itself included; None for all before it. function: (batch, head, query, key)
    indices -> whether the query attends to the key.
    """

    window: int | None
    function: Callable[..., Any]


def register(name: str, attention: Callable[..., tuple[Tensor, None]]) -> None:
    """Register an attention function whose masks are `Mask`s."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def mask(*_: Any, mask_function: Callable[..., Any], local_size: int | None = None, **__: Any) -> Mask:
        return Mask(local_size, mask_function)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


@torch.compiler.disable
def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | None = None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return [1, T, N, D] for query [1, N, T, D], key and value [1, K, T, D]: an AttentionInterface."""
    # The probe has checked the other arguments.
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = attention_mask.window if attention_mask is not None else None
    q_TND, k_TKD, v_TKD = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    run: BlockForward = module.__dict__["block_forward"]
    return run.attend(q_TND, k_TKD, v_TKD, scale, window).unsqueeze(0), None


def causal_lm(hf_config: str, attention: str, experts: str | None = None) -> Any:
    """Return transformers' model for the text of a config.json: fp32 parameters on meta, buffers on the CPU.

    attention: name of a registered attention function. experts: of transformers' implementations of experts, default
    the fastest. Code of the model folder is never run. Raises what transformers raises.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = json.loads(hf_config)
    # A caller's meta device would make buffers without data.
    with torch.device("cpu"), _parameters_on_meta():
        config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
        # use_cache off: nothing is kept from one pack to the next.
        config.use_cache = False
        model = AutoModelForCausalLM.from_config(
            config,
            attn_implementation=attention,
            dtype=torch.float32,
            trust_remote_code=False,
            **({"experts_implementation": experts} if experts else {}),
        )
    # No dropout and no jitter: recomputation and cp ranks would draw other masks than a single process.
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put parameters of modules built inside on the meta device; buffers, which code computes, have their data."""
    register_parameter = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register_parameter(module, name, parameter if parameter is None else _to_meta(parameter))

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]


def _to_meta(parameter: nn.Parameter) -> nn.Parameter:
    return parameter if parameter.is_meta else nn.Parameter(parameter.to("meta"), parameter.requires_grad)


def block_list(base: nn.Module, num_layers: int) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the model's blocks. Raises ValueError if there is none."""
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name, module
    raise ValueError(f"has no list of {num_layers} blocks")


class BlockForward:
    """Replacement of a block's forward: gives its attention the documents, and recomputes it where asked to."""

    def __init__(self, block: nn.Module, index: int) -> None:
        self.block = block
        self.index = index
        self.inner: Callable[..., Any] = block.forward
        self.documents: Any = None
        self.recomputes: Callable[[int], bool] = lambda index: False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.recomputes(self.index):
            return checkpoint(self.inner, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return self.inner(*args, **kwargs)

    def attend(self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float, window: int | None) -> Tensor:
        """Return o_TND of the block's attention; heads of values may have another width than those of keys."""
        attention: Any = self.block.inner_attention
        kernel = getattr(attention, "inner", attention)
        kernel.scale, kernel.window = scale, window
        value_dim, width = v_TKD.shape[-1], max(v_TKD.shape[-1], k_TKD.shape[-1])
        q_TND, k_TKD, v_TKD = (F.pad(x, (0, width - x.shape[-1])) for x in (q_TND, k_TKD, v_TKD))
        o_TND: Tensor = attention(q_TND, k_TKD, v_TKD, self.documents)
        return o_TND[..., :value_dim]


class HeadForward:
    """Replacement of the output matrix' forward, which takes a head function.

    scale: factor of the logits. FSDP gathers the weight only inside this forward.
    """

    def __init__(self, linear: nn.Linear, scale: float) -> None:
        self.linear = linear
        self.scale = scale

    def __call__(self, hidden_TH: Tensor, head_fn: HeadFn | None = None) -> Any:
        weight_VH, bias_V = self.linear.weight, self.linear.bias
        hidden_TH = hidden_TH if self.scale == 1.0 else hidden_TH * self.scale
        if bias_V is not None:
            # A head function takes one matrix: W h + b = [W, b] [h, 1].
            one = F.pad(hidden_TH.new_full((len(hidden_TH), 1), self.scale), (0, _BIAS_COLUMNS - 1))
            weight_VH = torch.cat((weight_VH, F.pad(bias_V[:, None], (0, _BIAS_COLUMNS - 1))), dim=1)
            hidden_TH = torch.cat((hidden_TH, one), dim=1)
        return (head_fn or F.linear)(hidden_TH, weight_VH)


class TransformersDecoder(Decoder):
    """A `transformers` model in the place of a Decoder; `args.hf_config` describes it."""

    base: Any
    head: Any
    experts_per_token: int
    computed: list[tuple[nn.Module, str, Tensor]]

    def __init__(self, args: ModelArgs) -> None:
        from hbp_titan.models.transformers_probe import logit_scale

        nn.Module.__init__(self)
        assert args.hf_config is not None
        register(ATTENTION, _attention)
        hf = causal_lm(args.hf_config, ATTENTION)
        for name, child in hf.named_children():
            self.add_module(name, child)
        base = hf.base_model
        within, layers = block_list(base, args.num_layers)
        head, embeddings = hf.get_output_embeddings(), hf.get_input_embeddings()
        # It drops a token's gradient. Packs have no padding inside documents, and many models pad with the token that
        # ends a turn, which is trained.
        embeddings.padding_idx = None
        # Not registered a second time: parameters keep transformers' names.
        self.__dict__.update(
            args=args,
            balance=BalanceState(),
            base=base,
            layers=layers,
            layers_name=f"{hf.base_model_prefix}.{within}",
            tok_embeddings=embeddings,
            head=head,
            experts_per_token=getattr(hf.config, "num_experts_per_tok", None) or 1,
            # As parts of transformers' models may be in bf16 by then, buffers keep the values that they have now.
            computed=[(m, name, value) for m in hf.modules() for name, value in m.named_buffers(recurse=False)],
        )
        head.__dict__["output"] = head
        head.forward = HeadForward(head, logit_scale(hf))
        self.runs = []
        for index, block in enumerate(layers):
            self.runs.append(BlockForward(block, index))
            for module in block.modules():
                module.__dict__["block_forward"] = self.runs[-1]
            block.forward = self.runs[-1]
            block.__dict__["has_experts"] = False
            # Context parallelism gathers fewer keys for layers with a window.
            block.inner_attention = VarlenAttention(window=args.window(index))

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        documents: Any,
        head_fn: HeadFn | None = None,
    ) -> Any:
        """Return logits_TV, or head_fn's value, as Decoder's forward."""
        for run in self.runs:
            run.documents = documents
        self._place_buffers(input_ids_T.device)
        output = self.base(**model_inputs(input_ids_T, position_ids_T))
        return self.head(output[0].squeeze(0), head_fn)

    def blocks(self) -> Iterator[Any]:
        """Yield the blocks."""
        yield from self.layers

    def tokens_per_expert(self) -> dict[int, Tensor]:
        """Return nothing: transformers' experts are not counted."""
        return {}

    def multiplied_params(self) -> int:
        """Return the parameters that multiply a token: all matrices, of the experts those that it is sent to."""
        tables = {module.weight for module in self.modules() if isinstance(module, nn.Embedding)}
        total = self.head.weight.numel() if self.head.weight in tables else 0
        for parameter in self.parameters():
            if parameter.ndim == 3:
                total += parameter.numel() * self.experts_per_token // len(parameter)
            elif parameter.ndim == 2 and parameter not in tables:
                total += parameter.numel()
        return total

    def recompute_blocks(self, recomputes: Callable[[int], bool]) -> None:
        """Recompute a block in backward whenever `recomputes`(index) is true at its forward."""
        for run in self.runs:
            run.recomputes = recomputes

    def compile_blocks(self, backend: str) -> None:
        """Compile every block in place, with static shapes; attention runs between two graphs."""
        for run in self.runs:
            run.inner = torch.compile(run.inner, backend=backend, dynamic=False)

    def _place_buffers(self, device: torch.device) -> None:
        # to_empty leaves buffers without data and .to(bfloat16) rounds inverse frequencies; cpu_offload keeps them on
        # the CPU.
        for position, (module, name, value) in enumerate(self.computed):
            if value.device != device:
                self.computed[position] = (module, name, value := value.to(device))
            module._buffers[name] = value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        nn.Module._apply(self, fn, recurse)
        # to_empty makes a new Parameter for each module that holds a shared one, so they are tied again.
        if self.args.tie_embeddings:
            self.head.weight = self.tok_embeddings.weight
        return self

    def init_weights(self, seed: int) -> None:
        """Raise ValueError: new weights are drawn for our own decoder only."""
        raise ValueError('model.backend = "transformers" draws no new weights; set model.hf_path to a folder with some')


def model_inputs(input_ids_T: Tensor, position_ids_T: Tensor) -> dict[str, Any]:
    """Return the arguments of transformers' base model for one pack."""
    input_ids_1T = input_ids_T.unsqueeze(0)
    return {
        "input_ids": input_ids_1T,
        "position_ids": position_ids_T.unsqueeze(0),
        # Without it transformers would look for documents in the positions, and wait for the device.
        "attention_mask": torch.ones_like(input_ids_1T),
        "use_cache": False,
    }
