"""DeepSeek-V2 in HF folders: per-expert tensors on disk, fused here, in and out unchanged; what is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.hf import HFTensors, from_hf_name, hf_names, save_hf_folder
from hbp_titan.models.hf_config import args_from_hf, args_to_hf_config
from tests.models.deepseek_tiny import hf_model, make_pack, random_model, tiny_args

LAYOUTS = [tiny_args(), tiny_args(mla={"q_lora_rank": None}, tie_embeddings=True, rope_scaling=None)]


def logits(model: Decoder) -> Tensor:
    return model(**make_pack(model.args, (11,), 0))


def ids(args: ModelArgs) -> Tensor:
    return make_pack(args, (11,), 0)["input_ids_T"][None]


def read_all(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("args", LAYOUTS)
def test_transformers_loads_our_folder_and_gives_the_same_logits(tmp_path: Path, args: ModelArgs) -> None:
    model = random_model(args, 0)
    save_hf_folder(args, model.named_parameters(), tmp_path / "out", dtype=torch.float32, max_shard_bytes=40000)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {key: list(value) for key, value in report.items() if value} == {}
    expected = theirs(ids(args)).logits[0]
    assert (logits(model) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("args", LAYOUTS)
def test_we_load_a_folder_of_transformers_and_write_back_its_bytes(tmp_path: Path, args: ModelArgs) -> None:
    theirs = hf_model(random_model(args, 1))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")  # type: ignore[operator]
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    # seq_aux and the like are unknown there but kept.
    assert args_from_hf(tmp_path / "theirs") == dataclasses.replace(args, name="theirs")
    tensors = HFTensors(tmp_path / "theirs")
    model = Decoder(args)
    model.load_state_dict(dict(tensors), strict=not args.tie_embeddings)
    expected = theirs(ids(args)).logits[0]
    assert (logits(model) - expected).norm() <= 1e-5 * expected.norm()
    save_hf_folder(args, tensors.items(), tmp_path / "ours", dtype=torch.float32, max_shard_bytes=30000)
    before, after = read_all(tmp_path / "theirs"), read_all(tmp_path / "ours")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [5e9, 20000])
def test_weights_come_back_byte_for_byte(tmp_path: Path, dtype: torch.dtype, max_shard_bytes: float) -> None:
    args = tiny_args()
    model = random_model(args, 2)
    options: dict[str, Any] = {"dtype": dtype, "max_shard_bytes": max_shard_bytes}
    save_hf_folder(args, model.named_parameters(), tmp_path / "first", **options)
    tensors = HFTensors(tmp_path / "first")
    for fqn, parameter in model.named_parameters():
        assert tensors[fqn].dtype == dtype
        assert torch.equal(tensors[fqn], parameter.to(dtype))
    save_hf_folder(args_from_hf(tmp_path / "first"), tensors.items(), tmp_path / "second", **options)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_experts_are_a_tensor_each_on_disk() -> None:
    fused = "layers.1.mlp.experts.up_proj"
    names = hf_names(fused, (2, 16, 48))
    assert names == [f"model.layers.1.mlp.experts.{i}.up_proj.weight" for i in range(2)]
    assert [from_hf_name(name) for name in names] == [fused, fused]
    shared = "layers.1.mlp.shared_experts.up_proj.weight"
    assert hf_names(shared, (32, 48)) == [f"model.{shared}"]
    assert from_hf_name(f"model.{shared}") == shared


def test_a_missing_and_a_misshapen_expert_are_named(tmp_path: Path) -> None:
    args = tiny_args()
    save_hf_folder(args, random_model(args, 0).named_parameters(), tmp_path / "out", dtype=torch.float32)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.7.down_proj.weight"]
    tensors["model.layers.1.mlp.experts.3.gate_proj.weight"] = torch.zeros(15, 48)
    tensors["model.layers.0.mlp.experts.0.gate_proj.weight"] = torch.zeros(16, 48)
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not match deepseek_v2") as caught:
        HFTensors(tmp_path / "out")
    assert str(caught.value).partition("folder; ")[2] == (
        "missing: model.layers.2.mlp.experts.7.down_proj.weight; "
        "unknown: model.layers.0.mlp.experts.0.gate_proj.weight; "
        "misshapen: model.layers.1.mlp.experts.3.gate_proj.weight [15, 48] instead of [16, 48]"
    )


def test_the_published_form_of_config_json_is_read(tmp_path: Path) -> None:
    # DeepSeek-V2-Lite's config.json: rope_scaling of transformers 4.x, null for the query latent.
    from hbp_titan.models.registry import get_flavor

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
    assert args_from_hf(tmp_path) == dataclasses.replace(get_flavor("deepseek_v2_lite_16b"), name=tmp_path.name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"topk_method": "noaux_tc"}, "noaux_tc"),
        ({"kv_lora_rank": None}, "kv_lora_rank"),
        ({"n_shared_experts": 0}, "n_shared_experts"),
        ({"q_lora_rank": "28"}, "q_lora_rank"),
        ({"num_key_value_heads": 1}, "num_kv_heads=1"),
        ({"attention_bias": True}, "attention_bias"),
        ({"aux_loss_alpha": 0.001, "seq_aux": False}, "seq_aux"),
    ],
)
def test_configs_that_would_change_the_model_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(args_to_hf_config(tiny_args()) | changes))
    with pytest.raises(ValueError, match=message):
        args_from_hf(tmp_path)


def test_architectures_that_the_family_cannot_express_are_not_written() -> None:
    with pytest.raises(ValueError, match="no mla and moe"):
        args_to_hf_config(tiny_args(hf_model_type="llama"))
    with pytest.raises(ValueError, match="requires mla and moe"):
        args_to_hf_config(dataclasses.replace(tiny_args(), moe=None))


def test_a_checkpoints_record_of_the_architecture_comes_back() -> None:
    args = tiny_args(moe={"aux_loss_alpha": 0.01})
    assert ModelArgs.from_dict(json.loads(json.dumps(dataclasses.asdict(args)))) == args
