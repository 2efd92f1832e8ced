"""Which decoders of the installed `transformers` train on packs: `python -m hbp_titan.testing.transformers_sweep`.

Owns tiny models of every architecture that transformers' AutoModelForCausalLM builds, and the comparison of a pack of
documents through model.backend = "transformers" with transformers' own forward and backward of each document: logits
and the gradient of every parameter, in fp32. Prints the table of docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hbp_titan.components.loss import linear_cross_entropy
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.documents import pack_documents
from hbp_titan.models.transformers_backend import TransformersDecoder
from hbp_titan.models.transformers_probe import Unsupported, args_from_config

VOCAB = 96
LENGTHS = (23, 17, 9, 1)
"""Tokens of the pack's documents."""
# The names of one size in different configs; a config gets those that it has.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "moe_intermediate_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "head_dim": 8,
}  # fmt: skip
# What an architecture needs in addition.
_OWN: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "ctrl": {"dff": 96},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "hunyuan_v1_dense": {"head_dim": 16},
    "minicpm3": _LATENT,
    "youtu": _LATENT,
}


def tiny_config(model_type: str, **own: Any) -> Any:
    """Return transformers' config of a model of two small layers, with the caller's values for its keys."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    known, aliases = kind().to_dict(), getattr(kind, "attribute_map", {})
    sizes = {key: value for key, value in _SIZES.items() if key in known or key in aliases}
    if known.get("sliding_window") is None:
        sizes.pop("sliding_window", None)
    for alias, name in aliases.items():
        if alias in sizes and name in sizes:
            del sizes[alias]
    if known.get("layer_types"):
        # Of the default's layers the first of each kind.
        kinds = list(dict.fromkeys(known["layer_types"]))
        sizes["layer_types"] = (kinds * 2)[:2]
    return kind(**{**sizes, **_OWN.get(model_type, {}), **own})


def config_text(config: Any) -> str:
    """Return the text of the config's config.json."""
    return json.dumps({**json.loads(config.to_json_string(use_diff=False)), "dtype": "float32"})


def tiny_model(model_type: str, seed: int = 0, **own: Any) -> tuple[ModelArgs, Any]:
    """Return its description and transformers' own model with random weights, norms and biases included.

    Raises Unsupported.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, **own)
    # Before it takes memory: not every size of a refused model is known.
    args = args_from_config(config_text(config), model_type)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms start at 1 or 0, and biases at 0, where a mistake could hide.
            parameter.add_(0.05 * torch.randn_like(parameter))
    return args, model


def documents_of(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    """Return random documents, int64 [length] each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


def reference(model: Any, documents: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return transformers' logits of each document on its own, and the gradients of the sum of their losses."""
    logits, total = [], torch.tensor(0.0)
    for ids in documents:
        found = model(input_ids=ids[None], use_cache=False).logits[0]
        logits.append(found.detach())
        total = total + F.cross_entropy(found[:-1], ids[1:], reduction="sum")
    model.zero_grad()
    total.backward()
    return torch.cat(logits), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def packed(args: ModelArgs, state: dict[str, Tensor], documents: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the same of one pack through our interface, with the chunked loss."""
    with torch.device("meta"):
        model = TransformersDecoder(args)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])
    lengths = [len(ids) for ids in documents]
    ids, positions = torch.cat(list(documents)), torch.cat([torch.arange(length) for length in lengths])
    index = torch.from_numpy(np.setdiff1d(np.arange(sum(lengths)), np.cumsum(lengths) - 1))
    labels, weights = ids[index + 1], torch.ones(len(index))
    pack = pack_documents(lengths)
    with torch.no_grad():
        logits = model(ids, positions, pack)

    def head(hidden: Tensor, weight: Tensor) -> Any:
        return linear_cross_entropy(hidden[index], weight, labels, weights, chunk_tokens=7)

    model(ids, positions, pack, head)[0].backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Return the largest difference as a multiple of the largest expected value, or of `floor` if that is larger."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=max(floor, 1e-12))).item()


def largest_difference(model_type: str) -> float:
    """Return the largest relative difference of logits and gradients; raise Unsupported."""
    args, model = tiny_model(model_type)
    documents = documents_of()
    logits, grads = reference(model, documents)
    own_logits, own_grads = packed(args, model.state_dict(), documents)
    assert grads.keys() == own_grads.keys(), sorted(grads.keys() ^ own_grads.keys())
    # A gradient that is zero, as of the biases of keys, has only rounding errors.
    floor = 1e-3 * max(grad.abs().max().item() for grad in grads.values())
    return max(relative(own_logits, logits), *(relative(own_grads[name], grads[name], floor) for name in grads))


def try_each(model_types: Sequence[str] = ()) -> Iterator[tuple[str, float | str]]:
    """Yield architectures, by default all, with the difference or the reason why it is refused."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for model_type in model_types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            yield model_type, largest_difference(model_type)
        except Unsupported as error:
            yield model_type, str(error)
        except Exception as error:
            yield model_type, f"no tiny model: {type(error).__name__}: {' '.join(str(error).split())[:150]}"


def main(argv: list[str]) -> None:
    """Print one line per architecture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", help="architectures to try [all]")
    options = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    for name, result in try_each(options.model_types):
        print(f"{name:26s} {result if isinstance(result, str) else f'{result:.1e}'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
