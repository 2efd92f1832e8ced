"""Where an exported model stops, what its weights are stored in, and what the start says about it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hbp_titan.components.export import export_settings, turn_end_warnings
from hbp_titan.data.tokenizer import CHATML_TEMPLATE
from hbp_titan.evaluation.needles import stop_ids
from hbp_titan.models.flavors import DEBUG
from hbp_titan.models.hf_config import args_to_hf_config
from hbp_titan.models.hf_export import save_hf_folder
from hbp_titan.preflight import model_args
from scripts.convert_from_hf import convert
from tests.data.preparing import byte_tokenizer, job, line, prepared, write
from tests.models.deepseek_tiny import random_model
from tests.tiny_run import ARGS

# <|endoftext|> is 1, <|im_end|> is 3.
BASE = {"eos_token_id": 1, "bos_token_id": 1}
INSTRUCT = {"eos_token_id": [3, 1], "bos_token_id": 1}


def _model_folder(folder: Path, ids: dict[str, Any], eos_token: str, template: bool, weights: bool) -> Path:
    byte_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": eos_token}))
    if not template:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    if weights:
        (folder / "config.json").write_text(json.dumps(args_to_hf_config(ARGS) | ids))
    (folder / "generation_config.json").write_text(json.dumps(ids))
    return folder


@pytest.mark.parametrize(
    ("weights", "tokenizer", "stops", "eos_token", "warned"),
    [
        # The template comes from data.chat_template: eos_token becomes the end of a turn.
        (BASE, None, [1, 3], "<|im_end|>", True),
        (BASE, INSTRUCT, [1, 3], "<|im_end|>", True),
        (INSTRUCT, None, [3, 1], "<|im_end|>", False),
    ],
    ids=["base weights, base tokenizer, template", "base weights, Instruct tokenizer", "Instruct weights"],
)
def test_every_program_stops_at_the_end_of_a_trained_turn(
    tmp_path: Path, weights: dict[str, Any], tokenizer: Any, stops: list[int], eos_token: str, warned: bool
) -> None:
    has_template = weights is INSTRUCT
    eos = "<|im_end|>" if has_template else "<|endoftext|>"
    base = _model_folder(tmp_path / "base", weights, eos, template=has_template, weights=True)
    (tmp_path / "own.jinja").write_text(CHATML_TEMPLATE)
    own = {} if has_template or tokenizer else {"chat_template": str(tmp_path / "own.jinja")}
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", line("q", "a"), line("r", "b")))], **own)
    config.model.hf_path, config.model.tokenizer_path = str(base), ""
    config.checkpoint.initial_load_path = "none"
    if tokenizer:
        folder = _model_folder(tmp_path / "instruct", tokenizer, "<|im_end|>", template=True, weights=False)
        config.model.tokenizer_path = str(folder)
    store = prepared(config)
    settings = export_settings(config, ARGS, store)
    out, dtype = tmp_path / "out", settings.pop("export_dtype")
    assert dtype == "float32"
    save_hf_folder(ARGS, random_model(ARGS, 0).named_parameters(), out, dtype=torch.float32, **settings)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["eos_token_id"] == stops
    # transformers and vLLM; llama.cpp by the tokenizer's.
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == stops
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert (loaded.eos_token, loaded.eos_token_id) == (eos_token, 3)
    assert "<|im_end|>" in loaded.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False)
    # scripts/generate.py and evaluate.py.
    assert stop_ids(out) == stops
    lines = turn_end_warnings(config, store)
    assert ["<|im_end|> (3)" in text for text in lines] == [True] * warned


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_export_has_the_dtype_of_the_weights_that_the_run_starts_from(tmp_path: Path, dtype: str) -> None:
    folder = _model_folder(tmp_path / "base", BASE, "<|im_end|>", template=True, weights=False)
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", line("q", "a")))])
    store = prepared(config)
    parameters = random_model(ARGS, 0).named_parameters()
    save_hf_folder(ARGS, parameters, tmp_path / "hf", dtype=getattr(torch, dtype), tokenizer_path=folder)
    convert(tmp_path / "hf", tmp_path / "checkpoint")
    config.model.hf_path = str(tmp_path / "hf")
    assert export_settings(config, ARGS, store)["export_dtype"] == dtype
    config.checkpoint.initial_load_path = str(tmp_path / "checkpoint")
    assert export_settings(config, ARGS, store)["export_dtype"] == dtype
    config.checkpoint.initial_load_path = "none"
    config.training.dtype = "bfloat16"
    assert export_settings(config, ARGS, store)["export_dtype"] == "bfloat16"
    config.checkpoint.export_dtype = "float32"
    assert export_settings(config, ARGS, store)["export_dtype"] == "float32"


def test_start_says_what_other_programs_read_otherwise(tmp_path: Path) -> None:
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", line("q", "a")))])
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    values = args_to_hf_config(dataclasses.replace(DEBUG, rope_scaling=scaling))
    values["rope_scaling"]["attn_factor"] = values["rope_parameters"]["attn_factor"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(values | {"eos_token_id": 3}))
    config.model.hf_path = str(tmp_path)
    notes: list[str] = []
    model_args(config, notes)
    assert ["attn_factor" in text for text in notes] == [True, True]
