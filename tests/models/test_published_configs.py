"""Published config.json files (field values as published, some shortened), read and written back, against transformers.

tests/fixtures/published_configs.json has one model per line.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.hf_config import args_from_hf
from hbp_titan.models.hf_export import exported_config
from hbp_titan.models.layers import attention_factor, inverse_frequencies

PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "published_configs.json").read_text(encoding="utf-8")
)
published = pytest.mark.parametrize("name", PUBLISHED)
# Named in the export by both names; and what the export sets.
OURS = {"dtype", "torch_dtype", "rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings"}


def _folder(path: Path, values: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(values))
    return path


def _theirs(folder: Path) -> Any:
    """Return the configuration that transformers reads."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def _head_dim(config: Any) -> int:
    # Qwen2's has none.
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _full_rope(config: Any) -> dict[str, Any]:
    # Gemma 3 has one for each kind of layer.
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def _rope(config: Any) -> tuple[torch.Tensor, float]:
    """Return transformers' inverse frequencies and factor of cosines and sines."""
    kind = _full_rope(config)["rope_type"]
    if kind == "default":
        dim = _head_dim(config)
        return _full_rope(config)["rope_theta"] ** -(torch.arange(0, dim, 2) / dim), 1.0
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


def _facts(config: Any) -> tuple[Any, ...]:
    """Return the architecture as transformers reads it, in the order of `_own_facts`."""
    dims = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads)
    heads = (config.num_key_value_heads, _head_dim(config))
    rest = (config.rms_norm_eps, config.tie_word_embeddings, config.vocab_size, config.initializer_range)
    return (*dims, *heads, *rest, float(_full_rope(config)["rope_theta"]))


def _own_facts(args: ModelArgs) -> tuple[Any, ...]:
    dims = (args.hidden_size, args.intermediate_size, args.num_layers, args.num_heads)
    heads = (args.num_kv_heads, args.rope_dim)
    rest = (args.norm_eps, args.tie_embeddings, args.vocab_size, args.initializer_range)
    return (*dims, *heads, *rest, args.rope_theta)


@published
def test_published_config_is_read_as_transformers_reads_it(tmp_path: Path, name: str) -> None:
    args = args_from_hf(_folder(tmp_path, PUBLISHED[name]))
    theirs = _theirs(tmp_path)
    assert _own_facts(args) == _facts(theirs)
    frequencies, factor = _rope(theirs)
    found = inverse_frequencies(args.rope_dim, args.rope_theta, args.rope_scaling)
    torch.testing.assert_close(found, frequencies, rtol=1e-6, atol=0)
    assert attention_factor(args.rope_scaling) == pytest.approx(factor)
    assert args.max_position_embeddings >= theirs.max_position_embeddings


@published
def test_exported_config_is_the_published_one_in_every_program(tmp_path: Path, name: str) -> None:
    values = PUBLISHED[name]
    args = args_from_hf(_folder(tmp_path, values))
    base, theirs = tmp_path, _theirs(tmp_path)
    ids = {key: values.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    exported = exported_config(args, base, ids, torch.bfloat16)
    assert {key: exported[key] for key in values if key not in OURS} == {
        key: value for key, value in values.items() if key not in OURS
    }
    (tmp_path / "out").mkdir()
    again = _theirs(_folder(tmp_path / "out", exported))
    assert _facts(again) == _facts(theirs)
    assert (again.eos_token_id, again.bos_token_id) == (theirs.eos_token_id, theirs.bos_token_id)
    (frequencies, factor), (before, factor_before) = _rope(again), _rope(theirs)
    assert torch.equal(frequencies, before)
    assert factor == pytest.approx(factor_before)
    read = args_from_hf(tmp_path / "out")
    assert dataclasses.replace(read, name=args.name) == args
    # transformers 4.x, older vLLM and DeepSeek's own code read rope_scaling, by "type" where it has that.
    for key, value in (values.get("rope_scaling") or {}).items():
        assert key == "attn_factor" or exported["rope_scaling"][key] == value


def test_what_programs_read_otherwise_is_noted(tmp_path: Path) -> None:
    noted = {}
    for name, values in PUBLISHED.items():
        notes: list[str] = []
        args_from_hf(_folder(tmp_path, values), notes=notes)
        if notes:
            noted[name] = notes
    assert list(noted) == ["deepseek-ai/DeepSeek-R1-0528-Qwen3-8B"]
    (line,) = noted["deepseek-ai/DeepSeek-R1-0528-Qwen3-8B"]
    # 0.1 ln 4 + 1 = 1.1386; times 0.87825 it is 1.
    assert "attn_factor" in line
    assert "by 1.139, by 1 in vLLM" in line
