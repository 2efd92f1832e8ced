"""HF folders: what transformers loads from us, what we load from transformers, and what we refuse by name."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.documents import pack_documents
from hbp_titan.models.hf import HFTensors, from_hf_name, save_hf_folder, to_hf_name
from hbp_titan.models.hf_config import args_from_hf, args_to_hf_config, token_ids_from_hf
from hbp_titan.models.registry import FLAVORS
from tests.models.deepseek_tiny import tiny_args as deepseek_args

IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def tiny_args(hf_model_type: str = "llama", *, tied: bool = False, **changes: Any) -> ModelArgs:
    args = ModelArgs(
        name="tiny",
        hf_model_type=hf_model_type,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16 if hf_model_type == "qwen3" else 8,
        vocab_size=61,
        max_position_embeddings=512,
        rope_theta=50000.0,
        rope_scaling=LLAMA3_SCALING if hf_model_type == "llama" else None,
        norm_eps=1e-5,
        qkv_bias=hf_model_type == "qwen2",
        qk_norm=hf_model_type == "qwen3",
        tie_embeddings=tied,
    )
    return dataclasses.replace(args, **changes)


def random_model(args: ModelArgs) -> Decoder:
    model = Decoder(args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def logits(model: Decoder) -> Tensor:
    return model(IDS, torch.arange(len(IDS)), pack_documents([len(IDS)]))


def write_folder(folder: Path, args: ModelArgs, **options: Any) -> Decoder:
    model = random_model(args)
    save_hf_folder(args, model.named_parameters(), folder, **{"dtype": torch.float32, **options})
    return model


FAMILIES = pytest.mark.parametrize(
    "args", [tiny_args(f, tied=t) for f in ("llama", "qwen2", "qwen3") for t in (False, True)]
)


@FAMILIES
def test_transformers_loads_our_folder_and_gives_the_same_logits(tmp_path: Path, args: ModelArgs) -> None:
    model = write_folder(tmp_path / "out", args)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {key: list(value) for key, value in report.items() if value} == {}
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(logits(model), theirs(IDS[None]).logits[0], rtol=1e-5, atol=1e-5)


@FAMILIES
def test_we_load_a_folder_of_transformers_and_give_the_same_logits(tmp_path: Path, args: ModelArgs) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**args_to_hf_config(args))
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path)
    assert args_from_hf(tmp_path) == dataclasses.replace(args, name=tmp_path.name)
    model = Decoder(args_from_hf(tmp_path))
    tensors = HFTensors(tmp_path)
    assert set(tensors) == {fqn for fqn, _ in model.named_parameters()}
    model.load_state_dict(dict(tensors), strict=not args.tie_embeddings)
    torch.testing.assert_close(logits(model), theirs(IDS[None]).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [5e9, 6000])
def test_weights_come_back_byte_for_byte(tmp_path: Path, dtype: torch.dtype, max_shard_bytes: float) -> None:
    args = tiny_args("qwen2")
    model = write_folder(tmp_path / "first", args, dtype=dtype, max_shard_bytes=max_shard_bytes)
    tensors = HFTensors(tmp_path / "first")
    for fqn, parameter in model.named_parameters():
        assert tensors[fqn].dtype == dtype
        assert torch.equal(tensors[fqn], parameter.to(dtype))
    again = {"dtype": dtype, "max_shard_bytes": max_shard_bytes}
    save_hf_folder(args_from_hf(tmp_path / "first"), tensors.items(), tmp_path / "second", **again)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_shards_keep_to_the_limit_and_the_index_names_them_all(tmp_path: Path) -> None:
    args = tiny_args()
    write_folder(tmp_path / "out", args, max_shard_bytes=9000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    total = 0
    for shard in shards:
        held = load_file(tmp_path / "out" / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == set(held)
        size = sum(tensor.nbytes for tensor in held.values())
        assert size <= 9000
        total += size
    assert index["metadata"]["total_size"] == total == 4 * sum(p.numel() for p in Decoder(args).parameters())
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_folder_has_token_ids_tokenizer_files_and_pt_metadata(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "notes.txt").write_text("not copied")
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 7, "pad_token_id": 5}
    (source / "generation_config.json").write_text(json.dumps(sampling))
    token_ids = {"bos_token_id": 0, "eos_token_id": [1, 2]}
    write_folder(tmp_path / "out", tiny_args(), tokenizer_path=source, token_ids=token_ids, dtype=torch.bfloat16)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert token_ids_from_hf(tmp_path / "out") == {**token_ids, "pad_token_id": 5}
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, [1, 2], None)
    assert config.dtype == torch.bfloat16
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == [1, 2]
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.6, 0.9)
    header = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert b'"__metadata__":{"format":"pt"}' in header[:4096]
    with pytest.raises(ValueError, match="unk_token_id"):
        write_folder(tmp_path / "more", tiny_args(), token_ids={"unk_token_id": 1})


@pytest.mark.parametrize("name", FLAVORS)
def test_every_flavor_survives_its_config(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(args_to_hf_config(FLAVORS[name])))
    assert args_from_hf(tmp_path) == dataclasses.replace(FLAVORS[name], name=tmp_path.name)
    # and transformers reads the same rope from it
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    expected = {"rope_theta": FLAVORS[name].rope_theta, **(FLAVORS[name].rope_scaling or {"rope_type": "default"})}
    assert config.rope_parameters == expected


def test_rope_is_read_in_the_old_the_new_and_the_doubled_form(tmp_path: Path) -> None:
    doubled = args_to_hf_config(tiny_args())
    old = {key: value for key, value in doubled.items() if key != "rope_parameters"}
    new = {key: value for key, value in doubled.items() if key not in ("rope_theta", "rope_scaling")}
    oldest = old | {"rope_scaling": {"type": "llama3", **{k: v for k, v in LLAMA3_SCALING.items() if k != "rope_type"}}}
    for values in (doubled, old, new, oldest):
        (tmp_path / "config.json").write_text(json.dumps(values))
        args = args_from_hf(tmp_path)
        assert (args.rope_theta, args.rope_scaling) == (50000.0, LLAMA3_SCALING)
    for key in ("rope_parameters", "rope_theta", "rope_scaling"):
        del doubled[key]
    (tmp_path / "config.json").write_text(json.dumps(doubled))
    assert (args_from_hf(tmp_path).rope_theta, args_from_hf(tmp_path).rope_scaling) == (10000.0, None)


def test_yarn_as_qwens_model_cards_write_it_reaches_four_times_as_far(tmp_path: Path) -> None:
    # The card adds rope_scaling and leaves max_position_embeddings.
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    plain = args_to_hf_config(tiny_args("qwen2"))
    old = {key: value for key, value in plain.items() if key != "rope_parameters"}
    old["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    new = {**plain, "rope_scaling": None, "rope_parameters": {**scaling, "rope_theta": 50000.0}}
    for values in (old, new):
        (tmp_path / "config.json").write_text(json.dumps(values))
        args = args_from_hf(tmp_path)
        assert (args.rope_scaling, args.max_position_embeddings) == (scaling, 2048)
        assert transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_type"] == "yarn"
        (tmp_path / "config.json").write_text(json.dumps(args_to_hf_config(args)))
        assert args_from_hf(tmp_path) == args


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"model_type": "gpt2"}, "gpt2"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("qwen2", {"rope_parameters": {"rope_theta": 50000.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_parameters": None}, "rope_type 'dynamic'"),
        ("qwen2", {"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        (
            "qwen2",
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None},
            "original_max_position_embeddings",
        ),
        ("qwen2", {"model_type": "deepseek_v3"}, "deepseek_v3"),
        ("llama", {"rope_scaling": LLAMA3_SCALING | {"factor": 32.0}}, "rope_parameters and rope_scaling disagree"),
        ("qwen2", {"rope_theta": 1.0}, r"rope_theta = 1.0 but rope_parameters.rope_theta = 50000.0"),
        ("llama", {"hidden_size": None}, "hidden_size"),
        ("llama", {"num_key_value_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ("llama", {"num_key_value_heads": "2"}, "num_key_value_heads"),
    ],
)
def test_configs_that_would_change_the_model_are_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(args_to_hf_config(tiny_args(family)) | changes))
    with pytest.raises(ValueError, match=message):
        args_from_hf(tmp_path)


def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path) -> None:
    for text, message in (("{", "not valid JSON"), ("[]", "not a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            args_from_hf(tmp_path)


def test_architectures_that_the_family_cannot_express_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="qkv_bias=False"):
        write_folder(tmp_path / "out", tiny_args("llama", qkv_bias=True))
    with pytest.raises(ValueError, match="gpt2"):
        write_folder(tmp_path / "out", tiny_args("gpt2"))


def test_names_map_both_ways_and_strangers_are_refused() -> None:
    for args in (tiny_args("qwen2"), tiny_args("qwen3")):
        for fqn, _ in Decoder(args).named_parameters():
            assert from_hf_name(to_hf_name(fqn)) == fqn
    assert to_hf_name("layers.1.self_attn.q_proj.bias") == "model.layers.1.self_attn.q_proj.bias"
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp"):
        to_hf_name("model.layers.0.mlp")
    with pytest.raises(ValueError, match="transformer"):
        from_hf_name("transformer.wte.weight")


def edit_weights(folder: Path, edit: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_all_tensors_that_do_not_fit_are_named_in_one_error(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", tiny_args())

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 32)
        tensors["lm_head.weight"] = torch.zeros(60, 32)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.int8)

    edit_weights(tmp_path / "out", spoil)
    with pytest.raises(ValueError, match="do not match llama") as caught:
        HFTensors(tmp_path / "out")
    assert str(caught.value).partition("folder; ")[2] == (
        "missing: model.layers.0.mlp.up_proj.weight, model.norm.weight; "
        "unknown: model.layers.2.mlp.up_proj.weight; "
        "misshapen: lm_head.weight [60, 32] instead of [61, 32]; "
        "not floating point: model.layers.1.mlp.up_proj.weight of type I8"
    )


def test_a_tied_folder_may_hold_the_output_matrix_if_it_is_the_embedding(tmp_path: Path) -> None:
    model = write_folder(tmp_path / "out", tiny_args(tied=True))
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    embedding = model.tok_embeddings.weight.detach()
    edit_weights(tmp_path / "out", lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert torch.equal(HFTensors(tmp_path / "out")["tok_embeddings.weight"], embedding)
    edit_weights(tmp_path / "out", lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    tensors = HFTensors(tmp_path / "out")
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight and lm_head.weight differ"):
        tensors["tok_embeddings.weight"]


def test_an_untied_folder_without_an_output_matrix_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", tiny_args())
    edit_weights(tmp_path / "out", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"missing: lm_head.weight$"):
        HFTensors(tmp_path / "out")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/weights.safetensors", "sub\\w.safetensors", "w.bin"])
def test_an_index_cannot_reach_outside_its_folder(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "out", tiny_args(), max_shard_bytes=20000)
    path = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not the name"):
        HFTensors(tmp_path / "out")


def test_damaged_folders_are_refused_by_file_name(tmp_path: Path) -> None:
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


def test_a_failed_write_leaves_nothing_and_a_full_folder_is_kept(tmp_path: Path) -> None:
    args = tiny_args()
    parameters = list(random_model(args).named_parameters())
    faults = {
        "missing tensors head.output.weight": parameters[:-1],
        "repeated": [*parameters, parameters[-1]],
        r"shape \[3\]": [
            *parameters[:-1],
            (parameters[-1][0], torch.ones(3)),
        ],
    }
    for message, tensors in faults.items():
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


def test_a_part_is_that_slice_of_the_whole_and_reads_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    """What a pickle makes when it is read: an empty file `harm` in the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mknod, (str(self.folder / "harm"),)


def test_code_and_pickles_of_a_folder_are_left_alone(tmp_path: Path) -> None:
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
    # The pickle does harm where it is read.
    pickle.loads(pickle.dumps(_Harm(tmp_path)))
    assert (tmp_path / "harm").exists()
