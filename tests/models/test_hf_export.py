"""What an exported folder takes over from its base: keys, files, modes, sampling settings, and the end of a turn."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hbp_titan.data.tokenizer import CHATML_TEMPLATE, train_tokenizer
from hbp_titan.models.hf import HFTensors
from hbp_titan.models.hf_config import args_to_hf_config
from hbp_titan.models.hf_export import save_adapter_folder, save_hf_folder
from tests.models.deepseek_tiny import random_model
from tests.tiny_run import ARGS


def _export(folder: Path, **options: Any) -> list[str]:
    model = random_model(ARGS, 0)
    return save_hf_folder(ARGS, model.named_parameters(), folder, **{"dtype": torch.float32, **options})


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ChatML template and the tokenizer of a base model: its eos_token ends texts, not turns."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the level of a pack of ranks"], folder, vocab_size=300)
    config = _read(folder / "tokenizer_config.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|endoftext|>"}))
    (folder / "special_tokens_map.json").write_text(
        '{"eos_token": {"content": "<|endoftext|>"}, "pad_token": "<|pad|>"}'
    )
    return folder


def test_unknown_keys_licences_and_code_are_carried_and_other_files_are_not(tmp_path: Path, tokenizer: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    auto_map = {"AutoModelForCausalLM": "modeling_own.Own"}
    published = {**args_to_hf_config(ARGS), "auto_map": auto_map, "dual_chunk_attention_config": {"chunk_size": 7}}
    published |= {"use_cache": False, "torch_dtype": "float16", "pretraining_tp": 1, "vendor": None}
    (base / "config.json").write_text(json.dumps(published))
    carried = ["LICENSE", "License.txt", "NOTICE", "USE_POLICY.md", "modeling_own.py", "configuration_own.py"]
    for name in [*carried, "README.md", "train.py", "pytorch_model.bin", "policy_head.pt", "tokenizer.json"]:
        (base / name).write_text(name)
    (base / "generation_config.json").write_text('{"do_sample": true, "top_p": 0.8, "vendor_flag": 3}')
    assert _export(tmp_path / "out", base_path=base, tokenizer_path=tokenizer, dtype=torch.bfloat16) == []
    config = _read(tmp_path / "out" / "config.json")
    kept = ("auto_map", "dual_chunk_attention_config", "use_cache", "pretraining_tp", "vendor")
    assert {key: config[key] for key in kept} == {key: published[key] for key in kept}
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    generation = _read(tmp_path / "out" / "generation_config.json")
    assert (generation["top_p"], generation["vendor_flag"]) == (0.8, 3)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files - {path.name for path in tokenizer.iterdir()} == {
        *carried, "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (tokenizer / "tokenizer.json").read_text()
    shutil.rmtree(base)
    assert "does not exist any more" in _export(tmp_path / "later", base_path=base)[0]


def test_every_file_has_the_mode_of_the_umask(tmp_path: Path, tokenizer: Path) -> None:
    before = os.umask(0o027)
    try:
        _export(tmp_path / "out", tokenizer_path=tokenizer, max_shard_bytes=20000)
        adapter = {"layers.0.self_attn.q_proj.lora_A.weight": torch.tensor([[1.0009765625]])}
        options: Any = {"rank": 1, "alpha": 1.0, "target_modules": ["q_proj"], "base": None}
        save_adapter_folder(ARGS, adapter, tmp_path / "adapter", tokenizer_path=tmp_path / "out", **options)
    finally:
        os.umask(before)
    files = [path for folder in ("out", "adapter") for path in (tmp_path / folder).iterdir() if path.is_file()]
    assert len(files) > 10
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}
    # Not rounded, whatever the dtype of the merged weights.
    (stored,) = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    assert (stored.dtype, stored.item()) == (torch.float32, 1.0009765625)


@pytest.mark.parametrize(
    ("published", "changed"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95}, {}),
        ({"do_sample": False, "max_new_tokens": 2048}, {}),
        # Vicuna, and what it means: sampling.
        ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True}),
        ({"do_sample": False, "temperature": 0.7, "top_k": 20}, {"do_sample": True}),
        ({"do_sample": False, "temperature": 0.0, "top_p": 0.5}, {"temperature": None, "top_p": None}),
        (
            {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
            {"early_stopping": None, "length_penalty": None},
        ),
        ({"num_return_sequences": 3}, {"num_return_sequences": None}),
        ({"output_scores": True, "max_new_tokens": 0}, {"output_scores": None, "max_new_tokens": None}),
    ],
)
def test_contradictory_generation_settings_are_exported_so_that_transformers_saves_them(
    tmp_path: Path, published: dict[str, Any], changed: dict[str, Any]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({**published, "pad_token_id": -1}))
    lines = _export(tmp_path / "out", tokenizer_path=tmp_path, token_ids={"eos_token_id": [2, 3]})
    found = _read(tmp_path / "out" / "generation_config.json")
    expected = {key: value for key, value in {**published, **changed}.items() if value is not None}
    assert found == {**expected, "bos_token_id": None, "eos_token_id": [2, 3], "pad_token_id": None}
    assert len(lines) == bool(changed)
    assert all(key in line for line in lines for key in changed)
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    settings.validate(strict=True)
    settings.bos_token_id = 1
    settings.save_pretrained(tmp_path / "again")


def test_the_tokenizers_eos_token_becomes_the_end_of_a_turn(tmp_path: Path, tokenizer: Path) -> None:
    lines = _export(
        tmp_path / "out", tokenizer_path=tokenizer, chat_template=CHATML_TEMPLATE, eos_token="<|im_end|>",
        token_ids={"eos_token_id": [1, 3]},
    )  # fmt: skip
    assert ["<|im_end|>" in line and "<|endoftext|>" in line for line in lines] == [True]
    before, after = (transformers.AutoTokenizer.from_pretrained(path) for path in (tokenizer, tmp_path / "out"))
    assert (before.eos_token, before.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert (after.eos_token, after.pad_token, after.eos_token_id) == ("<|im_end|>", "<|pad|>", 3)
    assert _read(tmp_path / "out" / "special_tokens_map.json")["eos_token"] == "<|im_end|>"
    messages = [{"role": "user", "content": "level"}, {"role": "assistant", "content": "pack"}]
    assert after.apply_chat_template(messages, tokenize=False) == before.apply_chat_template(messages, tokenize=False)
    assert after("the level")["input_ids"] == before("the level")["input_ids"]


def test_the_eos_token_stays_where_a_template_inserts_it(tmp_path: Path, tokenizer: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{{ eos_token }}"
    options: Any = {"tokenizer_path": tokenizer, "chat_template": template}
    (line,) = _export(tmp_path / "out", eos_token="<|im_end|>", **options)
    assert "stays <|endoftext|>" in line
    assert _read(tmp_path / "out" / "tokenizer_config.json")["eos_token"] == "<|endoftext|>"


def test_buffers_of_older_llamas_are_ignored_and_counted(tmp_path: Path) -> None:
    # Llama-2, CodeLlama, Vicuna and DeepSeek-LLM store them in each layer.
    _export(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    save_file({**tensors, **{name: torch.ones(4) for name in names}}, tmp_path / "out" / "model.safetensors")
    found = HFTensors(tmp_path / "out")
    assert found.ignored == names
    assert found["layers.1.mlp.up_proj.weight"].equal(tensors["model.layers.1.mlp.up_proj.weight"])
    save_file(
        {**tensors, "model.layers.0.self_attn.rotary_emb.other": torch.ones(4)}, tmp_path / "out" / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"rotary_emb\.other"):
        HFTensors(tmp_path / "out")


def test_dtypes_on_disk_are_listed_by_their_share(tmp_path: Path) -> None:
    _export(tmp_path / "out", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(mixed, tmp_path / "out" / "model.safetensors")
    assert HFTensors(tmp_path / "out").dtypes == ["BF16", "F32"]


def test_weights_beyond_float16_are_an_error(tmp_path: Path) -> None:
    model = random_model(ARGS, 0)
    with torch.no_grad():
        model.get_parameter("layers.1.mlp.up_proj.weight")[0, 0] = 70000.0
    with pytest.raises(ValueError, match="float16") as caught:
        save_hf_folder(ARGS, model.named_parameters(), tmp_path / "out", dtype=torch.float16)
    assert "layers.1.mlp.up_proj.weight" in str(caught.value)
    assert not (tmp_path / "out").exists()
