"""Decoders of transformers on packs: equal to transformers on each document, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from hbp_titan.components.weights import initialize
from hbp_titan.config import load_config
from hbp_titan.models.configs import TRANSFORMERS, ModelArgs
from hbp_titan.models.decoder import build_decoder
from hbp_titan.models.documents import pack_documents
from hbp_titan.models.hf import HFTensors
from hbp_titan.models.hf_config import args_from_hf
from hbp_titan.models.hf_export import save_hf_folder
from hbp_titan.models.lora import lora_targets
from hbp_titan.models.registry import linear_params, num_params
from hbp_titan.models.transformers_backend import TransformersDecoder
from hbp_titan.models.transformers_probe import args_from_transformers
from hbp_titan.preflight import check
from hbp_titan.testing import transformers_sweep as sweep

# Each has something that the others do not.
EQUAL = (
    "arcee", "biogpt", "bitnet", "codegen", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma3_text",
    "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "jais2",
    "minicpm3", "nemotron", "olmo", "olmo3", "persimmon", "phi", "phimoe", "qwen2_moe", "seed_oss", "stablelm",
    "starcoder2", "youtu",
)  # fmt: skip


@pytest.mark.parametrize("model_type", EQUAL)
def test_packed_documents_have_the_logits_and_gradients_of_transformers(model_type: str) -> None:
    assert sweep.largest_difference(model_type) < 1e-5


@pytest.mark.parametrize(
    ("model_type", "own", "message"),
    [
        ("bloom", {}, "masks"),
        ("falcon", {}, "AttentionInterface"),
        ("gemma2", {}, "soft cap"),
        ("gemma2", {"final_logit_softcapping": None}, "soft cap of attention"),
        ("gemma3", {}, "more than a decoder"),
        ("granite_swa", {}, "sinks"),
        ("lfm3", {}, "convolution"),
        ("blt", {}, "other parts"),
        ("llama4_text", {}, "base model"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic RoPE"),
        ("mamba", {}, "convolution"),
        ("opt", {}, "logits"),
        ("t5", {}, "causal language model"),
        ("whisper", {}, "encoder"),
        ("no_such_type", {}, "unknown"),
    ],
)
def test_architectures_that_cannot_train_on_packs_are_refused_with_the_reason(
    tmp_path: Path, model_type: str, own: dict[str, Any], message: str
) -> None:
    values = {"model_type": model_type}
    if model_type != "no_such_type":
        values = json.loads(sweep.config_text(sweep.tiny_config(model_type, **own)))
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"config.json: model_type '{model_type}' .*{message}.*; use"):
        args_from_transformers(tmp_path)


def _saved(folder: Path, model_type: str, **own: Any) -> tuple[ModelArgs, Any]:
    _, model = sweep.tiny_model(model_type, **own)
    model.save_pretrained(folder)
    return args_from_transformers(folder), model


def test_weights_of_a_folder_fill_the_model_and_its_buffers_stay_in_float32(tmp_path: Path) -> None:
    args, expected = _saved(tmp_path, "gemma3_text")
    buffers = {name: value.clone() for name, value in expected.named_buffers()}
    with torch.device("meta"):
        model = build_decoder(args).to(torch.bfloat16)
    initialize(model, args, torch.device("cpu"), 0, str(tmp_path))
    assert {name: p.dtype for name, p in model.named_parameters()}.keys() == dict(expected.named_parameters()).keys()
    ids = torch.arange(3, 60)
    with torch.no_grad():
        logits = model(ids, torch.arange(len(ids)), pack_documents([len(ids)]))
        assert sweep.relative(logits, expected.to(torch.bfloat16)(input_ids=ids[None]).logits[0].float()) < 0.02
    assert buffers
    for name, value in model.named_buffers():
        assert value.dtype == torch.float32
        assert value.equal(buffers[name]), name


@pytest.mark.parametrize("model_type", ["exaone", "gpt_neox", "granitemoe", "phimoe", "qwen2_moe"])
def test_folders_that_transformers_converts_are_read_in_parts_and_written_equal(
    tmp_path: Path, model_type: str
) -> None:
    args, expected = _saved(tmp_path, model_type)
    published, found = load_file(tmp_path / "model.safetensors"), HFTensors(tmp_path, args)
    parameters = dict(expected.named_parameters())
    assert published.keys() != parameters.keys()
    assert found.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert found[name].equal(parameter), name
        # As FSDP shards it: along any dim, at any place.
        for dims in [(slice(1, 3),), (slice(0, 2), slice(20, 150)), (slice(0, 2), slice(0, 96), slice(5, 9))]:
            if parameter.ndim >= len(dims):
                assert found.part(name, dims).equal(parameter[dims]), (name, dims)
    save_hf_folder(args, found.items(), tmp_path / "out", dtype=torch.float32)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == published.keys()
    assert all(value.equal(published[name]) for name, value in written.items())
    assert linear_params(args) < num_params(args)


def test_a_folder_with_missing_and_unknown_tensors_raises_with_their_names(tmp_path: Path) -> None:
    args, _ = _saved(tmp_path, "qwen2_moe")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["other"] = tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: model.layers.1.mlp.experts.3.up_proj.weight; unknown: other"):
        HFTensors(tmp_path, args)


def test_blocks_hold_the_matrices_that_lora_adapts(tmp_path: Path) -> None:
    args, _ = _saved(tmp_path, "gpt_neox")
    model = build_decoder(args)
    assert lora_targets(model, ["all-linear"])[0] == "gpt_neox.layers.0.attention.query_key_value"
    assert lora_targets(model, ["dense"]) == [f"gpt_neox.layers.{layer}.attention.dense" for layer in range(2)]
    assert isinstance(model, TransformersDecoder)
    assert isinstance(model.get_submodule("gpt_neox.layers.0.attention.dense"), nn.Linear)


def test_native_error_of_an_unknown_type_names_the_backend(tmp_path: Path) -> None:
    args, _ = _saved(tmp_path, "glm4")
    assert (args.hf_model_type, args.num_kv_heads, args.head_dim) == (TRANSFORMERS, 2, 16)
    with pytest.raises(ValueError, match=r"glm4.*model.backend = .transformers."):
        args_from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match="not take it either"):
        args_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--levels=64:1:ulysses:keep_attention"], "ac_policy"),
        (["--parallelism.expert_parallel_degree=2"], "expert_parallel"),
        (["--checkpoint.initial_load_path=none"], "initial_load_path"),
    ],
)
def test_settings_of_native_blocks_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    args, _ = _saved(tmp_path, "glm4")
    own = ["--data.train_files=a.jsonl", "--model.backend=transformers", f"--model.hf_path={tmp_path}", "--levels=64"]
    config = load_config([*own, *words])
    with pytest.raises(ValueError, match=message):
        check(config, 2, torch.device("cpu"), args)


def test_dropout_is_reported_and_not_applied(tmp_path: Path) -> None:
    notes: list[str] = []
    _saved(tmp_path, "gpt2")
    config = json.loads((tmp_path / "config.json").read_text()) | {"resid_pdrop": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = build_decoder(args_from_transformers(tmp_path, notes=notes))
    assert [note for note in notes if "resid_pdrop = 0.1" in note]
    assert not any(module.training for module in model.modules() if isinstance(module, nn.Dropout))


def test_a_pad_token_inside_a_document_is_trained_like_any_other(tmp_path: Path) -> None:
    args, _ = _saved(tmp_path, "llama", pad_token_id=7)
    model, native = build_decoder(args), build_decoder(args_from_hf(tmp_path))
    ids = torch.tensor([5, 7, 6, 7, 9])
    for decoder in (model, native):
        decoder.to_empty(device="cpu")
        initialize(decoder, decoder.args, torch.device("cpu"), 0, str(tmp_path))
        decoder(ids, torch.arange(5), pack_documents([5])).square().sum().backward()
    grads = [decoder.tok_embeddings.weight.grad for decoder in (model, native)]
    assert grads[0] is not None
    assert grads[1] is not None
    assert grads[0][7].norm() > 0
    assert sweep.relative(grads[0], grads[1]) < 1e-5


def test_backend_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="hf_path"):
        load_config(["--model.backend=transformers"])
    assert transformers.__version__
