"""HF folders against transformers in both directions, byte-identical round trips, and rejected folders."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from hbp_titan.components.weights import check_load_path, describe_weights
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.flavors import FLAVORS
from hbp_titan.models.hf import HFTensors, hf_names, to_hf_name
from hbp_titan.models.hf_config import args_from_hf, args_to_hf_config, token_ids_from_hf
from hbp_titan.models.hf_export import exported_config, save_hf_folder
from tests.models import families
from tests.models.deepseek_tiny import hf_model, make_pack, random_model
from tests.models.deepseek_tiny import tiny_args as deepseek_args
from tests.models.test_decoder import LLAMA3_SCALING
from tests.models.test_decoder import tiny_args as dense_args


def tiny_args(hf_model_type: str = "llama", *, tied: bool = False, **changes: Any) -> ModelArgs:
    return dense_args(hf_model_type, 4, 2, tied=tied, **changes)


def logits(model: Decoder) -> Tensor:
    return model(**make_pack(model.args, (11,), 0))


def check_logits(ours: Decoder, theirs: Any) -> None:
    expected = theirs(make_pack(ours.args, (11,), 0)["input_ids_T"][None]).logits[0]
    assert (logits(ours) - expected).norm() <= 1e-5 * expected.norm()


def write_folder(folder: Path, args: ModelArgs, **options: Any) -> Decoder:
    model = random_model(args, 0)
    save_hf_folder(args, model.named_parameters(), folder, **{"dtype": torch.float32, **options})
    return model


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


SLIDING = ("full_attention", "sliding_attention", "sliding_attention")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LAYOUTS = {
    **{family: tiny_args(family) for family in ("llama", "qwen2", "qwen3")},
    **{f"{family} tied": tiny_args(family, tied=True) for family in ("llama", "qwen2", "qwen3")},
    **families.TINY,
    "mixtral, balanced": families.dense(
        "mixtral", intermediate_size=16, moe=dataclasses.replace(families.EXPERTS, aux_loss_alpha=0.01)
    ),
    "deepseek": deepseek_args(),
    "qwen2, window after one layer": tiny_args("qwen2", layer_types=SLIDING, sliding_window=5),
    "qwen3, windows": tiny_args("qwen3", layer_types=(SLIDING[1], SLIDING[0], SLIDING[1]), sliding_window=5),
    "deepseek tied": deepseek_args(mla={"q_lora_rank": None}, tie_embeddings=True, rope_scaling=None),
}
layouts = pytest.mark.parametrize("args", LAYOUTS.values(), ids=LAYOUTS.keys())


@layouts
def test_transformers_loads_our_folder_with_equal_logits(tmp_path: Path, args: ModelArgs) -> None:
    model = write_folder(tmp_path / "out", args, max_shard_bytes=40000)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {key: list(value) for key, value in report.items() if value} == {}
    assert theirs.dtype == torch.float32
    check_logits(model, theirs)


@layouts
def test_we_load_a_folder_of_transformers_and_write_back_its_bytes(tmp_path: Path, args: ModelArgs) -> None:
    theirs = hf_model(random_model(args, 1))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")  # type: ignore[operator]
    # seq_aux and similar keys are unknown to transformers but kept.
    assert args_from_hf(tmp_path / "theirs") == dataclasses.replace(args, name="theirs")
    tensors = HFTensors(tmp_path / "theirs")
    model = Decoder(args)
    assert set(tensors) == {fqn for fqn, _ in model.named_parameters()}
    model.load_state_dict(dict(tensors), strict=not args.tie_embeddings)
    check_logits(model, theirs)
    save_hf_folder(args, tensors.items(), tmp_path / "ours", dtype=torch.float32, max_shard_bytes=30000)
    before, after = (
        {name: tensor for path in (tmp_path / who).glob("*.safetensors") for name, tensor in load_file(path).items()}
        for who in ("theirs", "ours")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


@pytest.mark.parametrize("args", [LAYOUTS["qwen2"], LAYOUTS["deepseek"]], ids=["qwen2", "deepseek"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [5e9, 20000])
def test_round_trips_are_byte_identical(
    tmp_path: Path, args: ModelArgs, dtype: torch.dtype, max_shard_bytes: float
) -> None:
    options: dict[str, Any] = {"dtype": dtype, "max_shard_bytes": max_shard_bytes}
    model = write_folder(tmp_path / "first", args, **options)
    tensors = HFTensors(tmp_path / "first")
    for fqn, parameter in model.named_parameters():
        assert tensors[fqn].dtype == dtype
        assert torch.equal(tensors[fqn], parameter.to(dtype))
    save_hf_folder(args_from_hf(tmp_path / "first"), tensors.items(), tmp_path / "second", **options)
    assert bytes_of(tmp_path / "first") == bytes_of(tmp_path / "second")


def test_shards_respect_the_size_limit_and_the_index_lists_them(tmp_path: Path) -> None:
    args = tiny_args()
    write_folder(tmp_path / "out", args, max_shard_bytes=20000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    total = 0
    for shard in shards:
        held = load_file(tmp_path / "out" / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == set(held)
        size = sum(tensor.nbytes for tensor in held.values())
        assert size <= 20000
        total += size
    assert index["metadata"]["total_size"] == total == 4 * sum(p.numel() for p in Decoder(args).parameters())
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_folder_has_token_ids_tokenizer_files_and_pt_metadata(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "notes.txt").write_text("not copied")
    (source / "additional_chat_templates").mkdir()
    others = ["added_tokens.json", "additional_chat_templates/tool_use.jinja", "chat_template.json", "merges.txt"]
    others += ["special_tokens_map.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"]
    for name in others:
        (source / name).write_text(name)
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 7, "pad_token_id": 5}
    (source / "generation_config.json").write_text(json.dumps(sampling))
    token_ids = {"bos_token_id": 0, "eos_token_id": [1, 2]}
    write_folder(tmp_path / "out", tiny_args(), tokenizer_path=source, token_ids=token_ids, dtype=torch.bfloat16)
    files = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    own = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(map(str, files)) == sorted([*own, *others])
    assert (tmp_path / "out" / others[1]).read_text() == "additional_chat_templates/tool_use.jinja"
    assert token_ids_from_hf(tmp_path / "out") == {**token_ids, "pad_token_id": 5}
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, [1, 2], None)
    assert config.dtype == torch.bfloat16
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == [1, 2]
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.6, 0.9)
    header = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert b'"__metadata__":{"format":"pt"}' in header[:4096]
    (source / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}", "eos_token": "\u4e2d"}')
    write_folder(tmp_path / "replaced", tiny_args(), tokenizer_path=source, chat_template="{{ 'own' }}")
    assert json.loads((tmp_path / "replaced" / "tokenizer_config.json").read_text()) == {"eos_token": "\u4e2d"}
    templates = [path for path in (tmp_path / "replaced").rglob("*") if "template" in path.name]
    assert [path.read_text() for path in templates] == ["{{ 'own' }}"]
    with pytest.raises(ValueError, match="unk_token_id"):
        write_folder(tmp_path / "more", tiny_args(), token_ids={"unk_token_id": 1})


@pytest.mark.parametrize("name", FLAVORS)
def test_every_flavor_round_trips_through_its_config(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(args_to_hf_config(FLAVORS[name])))
    assert args_from_hf(tmp_path) == dataclasses.replace(FLAVORS[name], name=tmp_path.name)
    # transformers reads the same rope from it.
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    expected = {"rope_theta": FLAVORS[name].rope_theta, **(FLAVORS[name].rope_scaling or {"rope_type": "default"})}
    # Gemma 3 has one for each kind of layer, Phi-3 a partial factor of 1.
    found = config.rope_parameters.get("full_attention", config.rope_parameters)
    assert {key: value for key, value in found.items() if key != "partial_rotary_factor"} == expected


def test_rope_is_read_in_the_forms_of_transformers_4_and_5_and_both(tmp_path: Path) -> None:
    doubled = args_to_hf_config(tiny_args())
    old = {key: value for key, value in doubled.items() if key != "rope_parameters"}
    new = {key: value for key, value in doubled.items() if key not in ("rope_theta", "rope_scaling")}
    oldest = old | {"rope_scaling": {"type": "llama3", **{k: v for k, v in LLAMA3_SCALING.items() if k != "rope_type"}}}
    for values in (doubled, old, new, oldest):
        (tmp_path / "config.json").write_text(json.dumps(values))
        args = args_from_hf(tmp_path)
        assert (args.rope_theta, args.rope_scaling) == (10000.0, LLAMA3_SCALING)
    for key in ("rope_parameters", "rope_theta", "rope_scaling"):
        del doubled[key]
    (tmp_path / "config.json").write_text(json.dumps(doubled))
    assert (args_from_hf(tmp_path).rope_theta, args_from_hf(tmp_path).rope_scaling) == (10000.0, None)


def test_yarn_as_in_qwens_model_cards_extends_the_context(tmp_path: Path) -> None:
    # The card adds rope_scaling and leaves max_position_embeddings.
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    plain = args_to_hf_config(tiny_args("qwen2"))
    old = {key: value for key, value in plain.items() if key != "rope_parameters"}
    old["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    new = {**plain, "rope_scaling": None, "rope_parameters": {**scaling, "rope_theta": 10000.0}}
    for values in (old, new):
        (tmp_path / "config.json").write_text(json.dumps(values))
        args = args_from_hf(tmp_path)
        assert (args.rope_scaling, args.max_position_embeddings) == (scaling, 16384)
        assert transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_type"] == "yarn"
        (tmp_path / "config.json").write_text(json.dumps(args_to_hf_config(args)))
        assert args_from_hf(tmp_path) == args


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"sliding_window": 8},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8},
        {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": None},
        {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8, "layer_types": [*SLIDING]},
        {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 8},
        {"use_sliding_window": False, "max_window_layers": 1, "sliding_window": 8},
    ],
)
def test_windows_are_read_as_transformers_reads_them(tmp_path: Path, family: str, keys: dict[str, Any]) -> None:
    values = args_to_hf_config(tiny_args(family))
    values = {key: value for key, value in values.items() if "sliding_window" not in key} | keys
    (tmp_path / "config.json").write_text(json.dumps(values))
    args, theirs = args_from_hf(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    found = [args.window(layer) for layer in range(args.num_layers)]
    assert found == [theirs.sliding_window if kind == SLIDING[1] else None for kind in theirs.layer_types]
    assert args.layer_types == () or SLIDING[1] in args.layer_types


@pytest.mark.parametrize("layers", [1, 3, 5])
@pytest.mark.parametrize("name", ["qwen2, window after one layer", "smollm3"])
def test_fewer_or_more_layers_keep_their_kind_through_config_json(tmp_path: Path, name: str, layers: int) -> None:
    args = LAYOUTS[name].with_layers(layers)
    (tmp_path / "config.json").write_text(json.dumps(args_to_hf_config(args)))
    found = args_from_hf(tmp_path)
    period = LAYOUTS[name].num_layers
    for layer in range(layers):
        assert found.window(layer) == LAYOUTS[name].window(layer % period)
        assert (layer in found.nope_layers) == (layer % period in LAYOUTS[name].nope_layers)


def test_a_family_without_windows_cannot_be_written_with_them() -> None:
    with pytest.raises(ValueError, match="layer_types"):
        args_to_hf_config(tiny_args(layer_types=SLIDING, sliding_window=8))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"model_type": "gpt2"}, "gpt2"),
        ("llama", {"model_type": "mistral", "sliding_window": 8, "layer_types": SLIDING}, "layer_types"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"use_sliding_window": True}, "use_sliding_window"),
        ("llama", {"layer_types": SLIDING}, "sliding_attention"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("qwen3", {"layer_types": SLIDING}, "set use_sliding_window"),
        ("qwen3", {"layer_types": SLIDING[:2], "use_sliding_window": True, "sliding_window": 8}, "layer_types"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("qwen2", {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_parameters": None}, "dynamic"),
        ("qwen2", {"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        ("llama", {"rope_scaling": LLAMA3_SCALING | {"factor": 32.0}}, "disagree"),
        ("qwen2", {"rope_theta": 1.0}, "rope_theta = 1.0"),
        ("llama", {"hidden_size": None}, "hidden_size"),
        ("llama", {"hidden_size": True}, "hidden_size"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ("llama", {"rope_theta": math.nan}, "rope_theta"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ("llama", {"layer_types": "full_attention"}, "layer_types"),
        ("llama", {"model_type": ["llama"] * 9999}, "model_type"),
        ("qwen2", {"rope_scaling": ["yarn"] * 9999, "rope_parameters": None}, "must be an object"),
        ("qwen2", {"rope_scaling": YARN | {"factor": "4.0"}, "rope_parameters": None}, "factor = '4.0'"),
        ("qwen2", {"rope_scaling": YARN | {"factor": None}, "rope_parameters": None}, "no factor"),
        ("qwen2", {"rope_scaling": YARN | {"truncate": 1}, "rope_parameters": None}, "truncate"),
        ("qwen2", {"rope_parameters": {"sliding_attention": YARN}}, "full_attention"),
        ("llama", {"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 1.0}, "rope_parameters": None}, "high_freq"),
        ("deepseek", {"routed_scaling_factor": "16"}, "routed_scaling_factor"),
        ("deepseek", {"norm_topk_prob": 0}, "norm_topk_prob"),
        ("llama", {"num_key_value_heads": 3}, "num_kv_heads=3"),
        ("llama", {"num_key_value_heads": "2"}, "num_key_value_heads"),
        ("deepseek", {"scoring_func": "sigmoid"}, "scoring_func"),
        ("deepseek", {"topk_method": "noaux_tc"}, "noaux_tc"),
        ("deepseek", {"kv_lora_rank": None}, "kv_lora_rank"),
        ("deepseek", {"n_shared_experts": 0}, "n_shared_experts"),
        ("deepseek", {"q_lora_rank": "28"}, "q_lora_rank"),
        ("deepseek", {"num_key_value_heads": 1}, "num_kv_heads=1"),
        ("deepseek", {"aux_loss_alpha": 0.001, "seq_aux": False}, "seq_aux"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers"),
        ("qwen3_moe", {"mlp_only_layers": [*range(99)]}, "mlp_only_layers"),
        ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok"),
        ("gemma3_text", {"rope_parameters": {"full_attention": {}, "sliding_attention": [1]}}, "must be an object"),
    ],
)
def test_unsupported_configs_raise(tmp_path: Path, family: str, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(args_to_hf_config(LAYOUTS[family]) | changes))
    with pytest.raises(ValueError, match=message) as caught:
        args_from_hf(tmp_path)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("changes", "theta", "scaling", "longest", "noted"),
    [
        # By layer type, as transformers 5 writes it.
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}}, 1e6, None, 4096, ""),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2}}, "rope_theta": 5e5}, 5e5,
         {"rope_type": "linear", "factor": 2}, 4096, ""),
        # The original length is then max_position_embeddings, or a key of the whole config.
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, 1e4, YARN | {"factor": 4}, 16384, ""),
        ({"rope_scaling": YARN | {"factor": 4}, "original_max_position_embeddings": 2048}, 1e4,
         YARN | {"factor": 4, "original_max_position_embeddings": 2048}, 8192, ""),
        ({"rope_scaling": YARN | {"attention_factor": None}}, 1e4, YARN, 16384, ""),
        ({"rope_scaling": YARN | {"truncate": None}}, 1e4, YARN | {"truncate": None}, 16384, ""),
        ({"rope_scaling": YARN | {"finetuned": True}}, 1e4, YARN, 16384, ""),
        ({"rope_scaling": YARN | {"extrapolation_factor": 1.0}}, 1e4, YARN, 16384, "extrapolation_factor"),
        ({"rope_scaling": YARN | {"attn_factor": 0.5}}, 1e4, YARN, 16384, "0.5693 in vLLM"),
        # Both programs read the same: vLLM 1.1386 * 0.87825 = 1.
        ({"rope_scaling": YARN | {"attn_factor": 0.87825, "attention_factor": 1.0}}, 1e4,
         YARN | {"attention_factor": 1.0}, 16384, ""),
        ({"rms_norm_eps": None, "tie_word_embeddings": None, "rope_theta": None}, 1e4, None, 4096, ""),
    ],
)  # fmt: skip
def test_rope_and_nulls_are_read_as_transformers_reads_them(
    tmp_path: Path, changes: dict[str, Any], theta: float, scaling: Any, longest: int, noted: str
) -> None:
    values = args_to_hf_config(tiny_args("qwen2", rope_scaling=None, max_position_embeddings=4096))
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        del values[key]
    (tmp_path / "config.json").write_text(json.dumps(values | changes))
    notes: list[str] = []
    args = args_from_hf(tmp_path, notes=notes)
    assert (args.rope_theta, args.rope_scaling, args.max_position_embeddings) == (theta, scaling, longest)
    assert args.norm_eps == (1e-6 if "rms_norm_eps" in changes else 1e-5)
    assert [noted in note for note in notes] == [True] * bool(noted)


@pytest.mark.parametrize(
    ("value", "ids"),
    [(2, 2), ([2, 3], [2, 3]), (None, None), (-1, None), ([], None), ("2", ""), (2.0, ""), (True, ""), ([2, "3"], "")],
)
def test_token_ids_are_whole_numbers(tmp_path: Path, value: Any, ids: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    if ids == "":
        with pytest.raises(ValueError, match="eos_token_id"):
            token_ids_from_hf(tmp_path)
    else:
        assert token_ids_from_hf(tmp_path) == ({} if ids is None else {"eos_token_id": ids})


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_is_not_a_json_object_raises(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="JSON"):
        args_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (tiny_args("llama", qkv_bias=True), "qkv_bias"),
        (tiny_args("gpt2"), "gpt2"),
        (deepseek_args(hf_model_type="llama"), "mla=False"),
        (dataclasses.replace(deepseek_args(), moe=None), "moe=True"),
    ],
)
def test_architectures_that_the_family_cannot_express_raise(args: ModelArgs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        args_to_hf_config(args)


def test_the_published_config_of_deepseek_v2_lite_is_read(tmp_path: Path) -> None:
    # DeepSeek-V2-Lite's config.json: rope_scaling of transformers 4.x, null for the query latent.
    values: dict[str, Any] = {
        "model_type": "deepseek_v2", "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "moe_layer_freq": 1,
        "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                         "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
        "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128,
        "vocab_size": 102400,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert args_from_hf(tmp_path) == dataclasses.replace(FLAVORS["deepseek_v2_lite_16b"], name=tmp_path.name)


def test_the_architecture_in_a_checkpoint_round_trips() -> None:
    args = deepseek_args(moe={"aux_loss_alpha": 0.01}, sliding_window=8)
    args = dataclasses.replace(args, layer_types=("full_attention", "sliding_attention", "full_attention"))
    assert ModelArgs.from_dict(json.loads(json.dumps(dataclasses.asdict(args)))) == args


def test_names_are_those_of_the_family_and_unknown_names_raise() -> None:
    for args in (tiny_args("qwen2"), tiny_args("qwen3"), deepseek_args()):
        for fqn, parameter in Decoder(args).named_parameters():
            assert len(hf_names(fqn, parameter.shape)) == (parameter.shape[0] if ".experts." in fqn else 1)
    assert to_hf_name("layers.1.self_attn.q_proj.bias") == "model.layers.1.self_attn.q_proj.bias"
    names = [f"model.layers.1.mlp.experts.{i}.up_proj.weight" for i in range(2)]
    assert hf_names("layers.1.mlp.experts.up_proj", (2, 16, 48)) == names
    with pytest.raises(ValueError, match="not a parameter"):
        to_hf_name("model.layers.0.mlp")
    assert to_hf_name("layers.1.mlp.gate.weight", "mixtral") == "model.layers.1.block_sparse_moe.gate.weight"
    assert hf_names("layers.1.mlp.experts.up_proj", (2, 16, 48), "mixtral")[1] == (
        "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    )
    assert to_hf_name("layers.0.attention_output_norm.weight", "olmo2") == (
        "model.layers.0.post_attention_layernorm.weight"
    )
    assert hf_names("layers.0.self_attn.k_proj.weight", (4, 8), "phi3") == ["model.layers.0.self_attn.qkv_proj.weight"]


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["llama", "deepseek"])
def test_one_error_lists_all_tensors_that_do_not_match(tmp_path: Path, layout: str) -> None:
    write_folder(tmp_path / "out", LAYOUTS[layout])
    inside = "model.layers.2.mlp." + ("experts.7." if layout == "deepseek" else "")

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{inside}up_proj.weight"]
        del tensors["lm_head.weight"]
        tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(80, 48)
        tensors["model.norm.weight"] = torch.zeros(47)
        tensors[f"{inside}down_proj.weight"] = tensors[f"{inside}down_proj.weight"].to(torch.int8)

    edit_weights(tmp_path / "out", spoil)
    with pytest.raises(ValueError, match="do not match") as caught:
        HFTensors(tmp_path / "out")
    found = dict(part.split(": ") for part in str(caught.value).split("folder; ")[1].split("; "))
    assert set(found["missing"].split(", ")) == {"lm_head.weight", f"{inside}up_proj.weight"}
    assert found["unknown"] == "model.layers.3.mlp.up_proj.weight"
    assert found["misshapen"].startswith("model.norm.weight [47]")
    assert found["not floating point"].startswith(f"{inside}down_proj.weight")


def test_a_tied_folder_may_contain_the_output_matrix_if_it_equals_the_embedding(tmp_path: Path) -> None:
    model = write_folder(tmp_path / "out", tiny_args(tied=True))
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    embedding = model.tok_embeddings.weight.detach()
    edit_weights(tmp_path / "out", lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert torch.equal(HFTensors(tmp_path / "out")["tok_embeddings.weight"], embedding)
    check_load_path(str(tmp_path / "out"), model.args)
    edit_weights(tmp_path / "out", lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    tensors = HFTensors(tmp_path / "out")
    with pytest.raises(ValueError, match="differ"):
        tensors["tok_embeddings.weight"]
    # And before any rank starts.
    with pytest.raises(ValueError, match="differ"):
        check_load_path(str(tmp_path / "out"), model.args)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/weights.safetensors", "sub\\w.safetensors", "w.bin"])
def test_an_index_cannot_reach_outside_its_folder(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "out", tiny_args(), max_shard_bytes=20000)
    path = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not the name"):
        HFTensors(tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_git_lfs_pointer_in_place_of_a_file_is_named(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, tiny_args(), max_shard_bytes=20000 if "index" in name else 1e9, overwrite=True)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=f"/{name} is a Git LFS pointer"):
        HFTensors(tmp_path)


def test_a_git_lfs_pointer_is_not_exported(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n")
    with pytest.raises(ValueError, match=r"tokenizer.model is a Git LFS pointer"):
        write_folder(tmp_path / "out", tiny_args(), tokenizer_path=tmp_path)
    assert not (tmp_path / "out").exists()


def test_corrupt_folders_raise_with_the_file_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_folder(out, tiny_args(), max_shard_bytes=20000)
    shards = sorted(out.glob("model-*.safetensors"))
    kept = shards[0].read_bytes()
    shards[0].write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ValueError, match=rf"{shards[0].name}: truncated or corrupt"):
        HFTensors(out)
    shards[0].unlink()
    with pytest.raises(ValueError, match=f"{shards[0].name} is missing"):
        HFTensors(out)
    shards[0].write_bytes(shards[1].read_bytes())
    with pytest.raises(ValueError, match="another file"):
        HFTensors(out)
    (out / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="neither"):
        HFTensors(out)


def test_a_failed_write_leaves_nothing_and_an_existing_folder_is_kept(tmp_path: Path) -> None:
    args = tiny_args()
    parameters = list(random_model(args, 0).named_parameters())
    problems = {
        "missing tensors head.output.weight": parameters[:-1],
        "repeated": [*parameters, parameters[-1]],
        r"shape \[3\]": [
            *parameters[:-1],
            (parameters[-1][0], torch.ones(3)),
        ],
    }
    for message, tensors in problems.items():
        with pytest.raises(ValueError, match=message):
            save_hf_folder(args, tensors, tmp_path / "out", dtype=torch.float32)
        assert os.listdir(tmp_path) == []
    write_folder(tmp_path / "out", args)
    (tmp_path / "out" / "notes.txt").write_text("from before")
    with pytest.raises(ValueError, match="not empty"):
        write_folder(tmp_path / "out", args)
    assert (tmp_path / "out" / "notes.txt").exists()
    write_folder(tmp_path / "out", args, overwrite=True)
    assert not (tmp_path / "out" / "notes.txt").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_a_part_equals_a_slice_and_reads_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = deepseek_args(moe={"n_routed_experts": 4, "n_group": 2})
    write_folder(tmp_path / "out", args)
    tensors = HFTensors(tmp_path / "out", args)
    read: list[tuple[str, Sequence[slice]]] = []
    whole = HFTensors._read

    def spied(self: HFTensors, name: str, dims: Sequence[slice]) -> torch.Tensor:
        read.append((name, dims))
        return whole(self, name, dims)

    monkeypatch.setattr(HFTensors, "_read", spied)
    experts, dims = "layers.1.mlp.experts.up_proj", (slice(2, 4), slice(0, 8), slice(16, 48))
    assert torch.equal(tensors.part(experts, dims), tensors[experts][dims])
    named = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (2, 3)]
    assert read[:2] == [(name, dims[1:]) for name in named]
    rows = (slice(30, 60), slice(0, 48))
    assert torch.equal(tensors.part("tok_embeddings.weight", rows), tensors["tok_embeddings.weight"][rows])
    assert tensors.dtypes == ["F32"]


class _Harm:
    """Its pickle creates an empty file `harm` in the folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mknod, (str(self.folder / "harm"),)


def test_code_and_pickles_of_a_folder_are_never_executed(tmp_path: Path) -> None:
    args = tiny_args()
    write_folder(tmp_path / "out", args)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own_code.Config", "AutoModelForCausalLM": "own_code.Model"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    (tmp_path / "out" / "own_code.py").write_text(f"import os\nos.mknod({str(tmp_path / 'harm')!r})\n")
    (tmp_path / "out" / "pytorch_model.bin").write_bytes(pickle.dumps(_Harm(tmp_path)))
    found = args_from_hf(tmp_path / "out")
    assert dataclasses.replace(found, name=args.name) == args
    assert len(dict(HFTensors(tmp_path / "out"))) == len(dict(Decoder(args).named_parameters()))
    (tmp_path / "out" / "model.safetensors").write_bytes(pickle.dumps(_Harm(tmp_path)))
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or corrupt"):
        HFTensors(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither"):
        HFTensors(tmp_path / "out")
    assert not (tmp_path / "harm").exists()
    # Negative control: loading the pickle does create the file.
    pickle.loads(pickle.dumps(_Harm(tmp_path)))
    assert (tmp_path / "harm").exists()


def test_layers_of_deepseek_v3_that_predict_further_tokens_are_dropped_with_a_line(tmp_path: Path) -> None:
    args = families.TINY["deepseek_v3"]
    write_folder(tmp_path, args)
    tensors = load_file(tmp_path / "model.safetensors")
    # The published folder has them as one more layer.
    further = {"model.layers.3.eh_proj.weight": torch.zeros(4, 4), "model.layers.3.mlp.gate.weight": torch.zeros(8, 48)}
    save_file(tensors | further, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    found = HFTensors(tmp_path)
    assert sorted(found.dropped) == sorted(further)
    assert "1 layer(s) that predict" in describe_weights(str(tmp_path), args, "float32")
    assert exported_config(args, tmp_path, {}, torch.float32)["num_nextn_predict_layers"] == 0
    with pytest.raises(ValueError, match="eh_proj"):
        HFTensors(tmp_path, dataclasses.replace(args, hf_model_type="deepseek_v2"))


def test_weights_in_fp8_are_refused_with_the_conversion(tmp_path: Path) -> None:
    values = args_to_hf_config(families.TINY["deepseek_v3"]) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="fp8_cast_bf16"):
        args_from_hf(tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_transformers_balance_loss_over_batches_is_noted_and_not_applied(tmp_path: Path, family: str) -> None:
    values = args_to_hf_config(families.TINY[family]) | {"output_router_logits": True, "router_aux_loss_coef": 0.02}
    (tmp_path / "config.json").write_text(json.dumps(values))
    notes: list[str] = []
    moe = args_from_hf(tmp_path, notes=notes).moe
    assert moe is not None
    assert not moe.balances
    assert ["router_aux_loss_coef" in note for note in notes] == [True]
    assert exported_config(families.TINY[family], tmp_path, {}, torch.float32)["output_router_logits"] is True
