"""Which decoders of `transformers` can be trained on packs: their dimensions, or the reason why not.

Owns the check of an architecture before model.backend = "transformers" trains it. A forward on the meta device runs the
library's own code with a recording attention function: each block must attend once, causally or in a window, through
transformers' AttentionInterface, and queries must depend on the given positions. Only then does a pack with a document
mask give what its documents give on their own.

Shape suffixes: T tokens, H hidden width, V vocabulary.
"""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from hbp_titan.models.configs import TRANSFORMERS, ModelArgs
from hbp_titan.models.hf_config import read_json
from hbp_titan.models.hf_files import require_folder
from hbp_titan.models.transformers_backend import Mask, block_list, causal_lm, model_inputs, register

if TYPE_CHECKING:
    from hbp_titan.config import JobConfig

_RECORDING = "hbp_titan_recording"
_TOKENS = 8
# Keys of config.json that hold other models, and what such a model is.
_NESTED = ("text_config", "vision_config", "audio_config", "encoder", "decoder", "thinker_config", "backbone_config")
# Scalings whose frequencies depend on the longest position of the batch, which a pack does not share with a document.
_DYNAMIC_ROPE = ("dynamic", "longrope")
# Arguments of an attention function that change what it computes, unless they are None.
_UNSUPPORTED = {
    "s_aux": "attention sinks",
    "softcap": "a soft cap of attention scores",
    "position_bias": "a bias by position",
    "indices": "sparse attention",
}
_OWN_MASKS = "makes masks or biases of attention of its own"
_NATIVE = 'use an architecture that model.backend = "native" builds, or another model'


class Unsupported(ValueError):
    """An architecture that cannot be trained on packs; the message continues "model_type x: "."""


class _Positions(Tensor):
    """Position ids; every tensor that torch computes from them has this class."""


class _Attended(NamedTuple):
    """One call of the attention function. heads: of queries and of keys; widths: of keys and of values."""

    module: nn.Module
    heads: tuple[int, int]
    widths: tuple[int, int]
    window: int | None
    positional: bool


class Dims(NamedTuple):
    """What a forward showed: heads, the widest head, and each layer's window."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]


def args_from_transformers(folder: str | Path, key: str = "model.hf_path", notes: list[str] | None = None) -> ModelArgs:
    """Return the architecture of the decoder in `folder` as transformers builds it.

    key: what `folder` is the value of. notes: gets a line for settings that training does not apply.
    Raises ValueError with the file, the model type and the reason for one that cannot be trained on packs.
    """
    require_folder(Path(folder), key)
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{key}: {folder} has no config.json")
    values = read_json(path)
    try:
        import transformers
    except ImportError:
        raise ValueError(
            'model.backend = "transformers" needs the transformers package: install hbp_titan[hf]'
        ) from None
    del transformers
    try:
        args = args_from_config(json.dumps(values), Path(folder).resolve().name)
    except Unsupported as error:
        raise ValueError(f"{path}: model_type {values.get('model_type')!r} {error}; {_NATIVE}") from None
    if notes is not None:
        notes += [f"{path}: {key} = {rate} is not applied: training has no dropout" for key, rate in _dropouts(values)]
    return args


def advice(values: dict[str, Any]) -> str:
    """Return whether model.backend = "transformers" takes a model with this config.json."""
    try:
        args_from_config(json.dumps(values), "")
    except ImportError:
        return '; model.backend = "transformers" may take it (install hbp_titan[hf])'
    except Unsupported as error:
        return f'; model.backend = "transformers" does not take it either: it {error}'
    return '; set model.backend = "transformers"'


def check_config(config: JobConfig) -> None:
    """Raise ValueError for settings that act on the parts of our own blocks."""
    found = []
    for level in config.levels:
        if level.ac_policy not in ("none", "full"):
            found.append((f"levels.ac_policy = {level.ac_policy!r}", "use none or full"))
        if level.mlp_chunk_tokens or level.attention_head_groups > 1:
            found.append(("levels.mlp_chunk_tokens or levels.attention_head_groups", "remove it"))
    if config.parallelism.expert_parallel_degree > 1:
        found.append(("parallelism.expert_parallel_degree", "set it to 1"))
    if config.measures_levels:
        found.append(("packing.auto_levels = true", "write [[levels]] blocks"))
    if not config.weights_path:
        found.append((f"checkpoint.initial_load_path = {config.checkpoint.initial_load_path!r}", "start from weights"))
    for setting, fix in found:
        raise ValueError(f'{setting} does not act on the blocks of model.backend = "transformers"; {fix}')


def args_from_config(hf_config: str, name: str) -> ModelArgs:
    """Return the architecture of the text of a config.json; raise Unsupported."""
    config, dims, tied = checked(hf_config)
    windows = {window for window in dims.windows if window is not None}
    widths = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    return ModelArgs(
        name=name,
        hf_model_type=TRANSFORMERS,
        hidden_size=config.hidden_size,
        intermediate_size=_first(config, *widths) or 4 * config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=dims.num_heads,
        num_kv_heads=dims.num_kv_heads,
        head_dim=dims.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=_first(config, "max_position_embeddings") or 1 << 20,
        rope_theta=10000.0,
        tie_embeddings=tied,
        layer_types=tuple("full_attention" if window is None else "sliding_attention" for window in dims.windows),
        sliding_window=max(windows, default=None),
        hf_config=hf_config,
    )


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _dropouts(values: dict[str, Any]) -> list[tuple[str, float]]:
    return [
        (name, rate)
        for name, rate in values.items()
        if isinstance(rate, float) and rate > 0 and ("dropout" in name or name.endswith("_pdrop"))
    ]


@lru_cache(maxsize=16)
def checked(hf_config: str) -> tuple[Any, Dims, bool]:
    """Return transformers' config, the dimensions, and whether the output matrix is tied; raise Unsupported.

    hf_config: text of a config.json.
    """
    values = json.loads(hf_config)
    _check_config(values)
    # transformers warns of everything that it corrects in a config; the checks below decide.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    recorded: list[_Attended] = []
    register(_RECORDING, _recorder(recorded))
    try:
        # The one that runs without data: others read how many tokens each expert has.
        hf = causal_lm(hf_config, _RECORDING, experts="batched_mm")
    except KeyError as error:
        # A class for each attention function that its file knows.
        what = "does not attend through transformers' AttentionInterface" if _RECORDING in error.args else ""
        raise Unsupported(what or f"is not built by transformers: {_line(error)}") from None
    except Exception as error:
        raise Unsupported(f"is not built by transformers: {_line(error)}") from None
    try:
        tied = _check_parts(hf)
        logit_scale(hf)
        return hf.config, _attention_dims(hf, recorded), tied
    except AttributeError as error:
        raise Unsupported(f"has other parts than a decoder: {_line(error)}") from None


def _check_config(values: dict[str, Any]) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise Unsupported("is unknown to the installed transformers (code in the folder is never run)")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise Unsupported("has no causal language model in transformers")
    if nested := [name for name in _NESTED if isinstance(values.get(name), dict)]:
        raise Unsupported(f"is more than a decoder of text (it has {', '.join(nested)})")
    if values.get("is_encoder_decoder"):
        raise Unsupported("is an encoder with a decoder")
    if values.get("quantization_config"):
        raise Unsupported("is quantized (quantization_config): save it in bfloat16")


def _check_parts(hf: Any) -> bool:
    """Return whether the output matrix is tied; raise Unsupported for parts that sharding or packing cannot handle."""
    if hf.base_model is hf:
        raise Unsupported("has no base model apart from its output matrix")
    if others := [name for name, _ in hf.named_parameters(recurse=False)]:
        raise Unsupported(f"has parameters outside of its modules: {', '.join(others)}")
    stored, parameters = hf.state_dict().keys(), dict(hf.named_parameters(remove_duplicate=False))
    if buffers := [name for name in stored if name not in parameters]:
        raise Unsupported(f"keeps weights in buffers: {', '.join(buffers[:3])}")
    head, embeddings = hf.get_output_embeddings(), hf.get_input_embeddings()
    if not isinstance(head, nn.Linear) or embeddings is None:
        raise Unsupported("has no input embeddings or no linear output matrix")
    tied = head.weight is embeddings.weight
    if len(parameters) - len(dict(hf.named_parameters())) != tied:
        raise Unsupported("ties other parameters than the output matrix")
    convolutions = "torch.nn.modules.conv"
    if mixing := [name for name, module in hf.named_modules() if type(module).__module__ == convolutions]:
        raise Unsupported(f"mixes neighboring tokens by a convolution ({mixing[0]})")
    for name, module in hf.named_modules():
        if getattr(module, "rope_type", None) in _DYNAMIC_ROPE:
            raise Unsupported(f"has {module.rope_type} RoPE ({name}), which depends on the longest position of a batch")
    try:
        block_list(hf.base_model, hf.config.num_hidden_layers)
    except ValueError as error:
        raise Unsupported(str(error)) from None
    return tied


def logit_scale(hf: Any) -> float:
    """Return the factor between head(base(ids)) and the model's logits; raise Unsupported for any other function.

    The model's own forward runs between a base and a head that return known numbers.
    """
    hidden = torch.linspace(-3, 3, hf.config.hidden_size, device="cpu")
    logits = torch.linspace(-50, 50, hf.config.vocab_size, device="cpu")
    base, head = _KnownBase(hidden), _KnownHead(logits)
    prefix = hf.base_model_prefix
    own_base, own_head = getattr(hf, prefix), hf.get_output_embeddings()
    name = next(name for name, module in hf.named_modules() if module is own_head)
    setattr(hf, prefix, base)
    hf.set_submodule(name, head)
    try:
        found = hf(input_ids=torch.zeros(1, 1, dtype=torch.int64, device="cpu"), use_cache=False).logits
        seen = head.seen
    except Exception as error:
        raise Unsupported(f"computes logits in a way that is not known: {_line(error)}") from None
    finally:
        setattr(hf, prefix, own_base)
        hf.set_submodule(name, own_head)
    factors = [_factor(seen, hidden), _factor(found, logits)]
    scale = 1.0
    for factor in factors:
        if factor is None:
            raise Unsupported("changes hidden states or logits next to the output matrix (a soft cap?)")
        scale *= factor
    return scale


class _KnownBase(nn.Module):
    """Stands in for the base model and returns known hidden states."""

    def __init__(self, hidden_H: Tensor) -> None:
        super().__init__()
        self.hidden_H = hidden_H

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        output = MoeModelOutputWithPast(last_hidden_state=self.hidden_H[None, None])
        output.cross_attentions = None
        return output


class _KnownHead(nn.Module):
    """Stands in for the output matrix: returns known logits and keeps what it gets."""

    def __init__(self, logits_V: Tensor) -> None:
        super().__init__()
        self.weight = self.logits_V = logits_V
        self.seen: Any = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = hidden
        return self.logits_V[None, None]


def _factor(found: Any, values: Tensor) -> float | None:
    """Return found / values if that is one number."""
    if not isinstance(found, Tensor) or found.numel() != values.numel():
        return None
    found = found.flatten().float()
    factor = (found @ values / (values @ values)).item()
    return factor if torch.allclose(found, factor * values, rtol=1e-5, atol=1e-6) else None


def _recorder(recorded: list[_Attended]) -> Any:
    """Return an attention function that appends each call to `recorded`; it raises Unsupported."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *masks: Any, **options: Any) -> Any:
        mask = masks[0] if masks else options.pop("attention_mask", None)
        window = _window(mask)
        for name, what in _UNSUPPORTED.items():
            if options.get(name) is not None:
                raise Unsupported(f"has {what}, which no attention kernel here has")
        given = options.get("is_causal")
        if not (getattr(module, "is_causal", True) if given is None else given):
            raise Unsupported("attends to later tokens")
        if options.get("sliding_window") is not None and options["sliding_window"] != window:
            raise Unsupported(f"has a window of {options['sliding_window']} in attention but of {window} in its mask")
        shapes = [tuple(x.shape) for x in (query, key, value)]
        if any(len(shape) != 4 or shape[0] != 1 or shape[2] != _TOKENS for shape in shapes):
            raise Unsupported(f"attends to other tokens than its input (shapes {shapes})")
        recorded.append(
            _Attended(
                module,
                (shapes[0][1], shapes[1][1]),
                (shapes[1][3], shapes[2][3]),
                window,
                isinstance(query, _Positions) and isinstance(key, _Positions),
            )
        )
        return query.new_empty(1, _TOKENS, shapes[0][1], shapes[2][3]), None

    return attend


def _window(mask: Any) -> int | None:
    """Return the window of a mask, None if there is none; raise Unsupported for another than a causal one."""
    if mask is None:
        return None
    if not isinstance(mask, Mask):
        raise Unsupported(_OWN_MASKS)
    window = mask.window
    edges = [0, 1, 2, 5] if window is None else [0, 1, window - 1, window, window + 1, 2 * window, 3 * window + 1]
    query, key = torch.tensor(edges)[:, None], torch.tensor(edges)[None]
    zero = torch.tensor(0)
    expected = key <= query
    if window is not None:
        expected = expected & (key > query - window)
    try:
        found = torch.as_tensor(mask.function(zero, zero, query, key))
    except Exception as error:
        raise Unsupported(f"has a mask of another kind: {_line(error)}") from None
    if not torch.equal(found.broadcast_to(expected.shape), expected):
        raise Unsupported("has a mask that is neither causal nor a window")
    return window


def _attention_dims(hf: Any, recorded: list[_Attended]) -> Dims:
    ids = torch.zeros(_TOKENS, dtype=torch.int64, device="meta")
    positions = torch.arange(_TOKENS, device="meta").as_subclass(_Positions)
    meta = hf.base_model.to("meta")
    try:
        with torch.no_grad():
            meta(**model_inputs(ids, positions))
    except Unsupported:
        raise
    except Exception as error:
        if "Mask" in str(error):
            raise Unsupported(_OWN_MASKS) from None
        raise Unsupported(f"cannot run without data: {_line(error)}") from None
    if not recorded:
        raise Unsupported("does not attend through transformers' AttentionInterface")
    _, blocks = block_list(hf.base_model, hf.config.num_hidden_layers)
    owners = {module: index for index, block in enumerate(blocks) for module in block.modules()}
    order = [owners.get(call.module) for call in recorded]
    if order != list(range(len(blocks))):
        raise Unsupported(f"does not attend once in each block: {len(recorded)} times in {len(blocks)} blocks")
    heads = {call.heads for call in recorded}
    if len(heads) > 1:
        raise Unsupported(f"has layers of different heads: {sorted(heads)}")
    if not any(call.positional for call in recorded):
        raise Unsupported("does not use the positions that it gets")
    width = max(max(call.widths) for call in recorded)
    return Dims(*heads.pop(), width, tuple(call.window for call in recorded))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
