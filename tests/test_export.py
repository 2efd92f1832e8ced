"""Out to HF and back in: transformers gives the logits that we train, and a run starts from such a folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from hbp_titan.components.weights import check_load_path
from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.models.documents import pack_documents
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from tests.programs import run_python
from tests.tiny_run import ARGS, write_tiny_run

ROOT = Path(__file__).resolve().parents[1]
PROMPT = torch.arange(5, 105)


def _trained_logits(world: World, argv: list[str]) -> torch.Tensor:
    trainer = Trainer(load_config(argv), world)
    trainer.train()
    return _logits(trainer)


def _first_logits(world: World, argv: list[str]) -> torch.Tensor:
    return _logits(Trainer(load_config(argv), world))


def _logits(trainer: Trainer) -> torch.Tensor:
    trainer.engine.runtime.activate(0)
    with torch.no_grad():
        return trainer.model(PROMPT, torch.arange(len(PROMPT)), pack_documents([len(PROMPT)]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, torch.Tensor]:
    """The arguments of a run of two ranks, its folder, and its logits after training."""
    folder = tmp_path_factory.mktemp("export")
    argv = [*write_tiny_run(folder), "--training.steps=6"]
    return argv, folder, run_distributed(_trained_logits, 2, argv)[0]


def _transformers_logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(PROMPT[None]).logits[0]


def _script(name: str, *argv: object) -> str:
    result = run_python(f"scripts/{name}", *argv)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_transformers_gives_the_logits_of_the_exported_run(run: tuple[list[str], Path, torch.Tensor]) -> None:
    _, folder, logits = run
    assert logits.std() > 0.1
    torch.testing.assert_close(_transformers_logits(folder / "run" / "hf"), logits, rtol=1e-4, atol=1e-4)


def test_converted_checkpoint_is_the_exported_folder(run: tuple[list[str], Path, torch.Tensor], tmp_path: Path) -> None:
    _, folder, _ = run
    _script("convert_to_hf.py", folder / "run", tmp_path / "hf")
    exported = folder / "run" / "hf"
    names = sorted(path.name for path in exported.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(names)
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == 3  # <|im_end|>
    for name in names:
        assert (exported / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name


def test_bfloat16_export_is_the_rounded_fp32_one(run: tuple[list[str], Path, torch.Tensor], tmp_path: Path) -> None:
    _, folder, _ = run
    _script("convert_to_hf.py", folder / "run", tmp_path / "hf", "--dtype", "bfloat16")
    whole = load_file(folder / "run" / "hf" / "model.safetensors")
    rounded = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(rounded[name].equal(whole[name].bfloat16()) for name in whole)


def test_run_starts_from_an_hf_folder_and_from_a_converted_one(
    run: tuple[list[str], Path, torch.Tensor], tmp_path: Path
) -> None:
    argv, folder, logits = run
    hf_folder = folder / "run" / "hf"
    _script("convert_from_hf.py", hf_folder, tmp_path / "checkpoint")
    for path in (hf_folder, tmp_path / "checkpoint"):
        changed = [*argv, f"--checkpoint.initial_load_path={path}", f"--job.dump_folder={tmp_path / 'new'}"]
        torch.testing.assert_close(run_distributed(_first_logits, 2, changed)[0], logits, rtol=1e-6, atol=1e-6)
    without = run_distributed(_first_logits, 2, [*argv, f"--job.dump_folder={tmp_path / 'new'}"])[0]
    assert (without - logits).abs().max() > 0.1


def test_a_checkpoint_of_another_model_is_named_tensor_by_tensor_before_the_start(
    run: tuple[list[str], Path, torch.Tensor],
) -> None:
    _, folder, _ = run
    path = str(folder / "run" / "checkpoint" / "step-6")
    check_load_path(path, ARGS)
    deeper = dataclasses.replace(ARGS, num_layers=3, intermediate_size=72)
    with pytest.raises(ValueError, match=r"step-6: its tensors are not those of this model; missing: ") as caught:
        check_load_path(path, deeper)
    assert "model.layers.2.mlp.up_proj.weight" in str(caught.value)
    assert "misshapen: model.layers.0.mlp.down_proj.weight [32, 64] instead of [32, 72], " in str(caught.value)
    with pytest.raises(ValueError, match=r"unknown: model\.layers\.1\.input_layernorm\.weight, "):
        check_load_path(path, dataclasses.replace(ARGS, num_layers=1))


def test_conversion_of_what_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    result = run_python("scripts/convert_to_hf.py", tmp_path, tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1


def test_longer_run_replaces_its_own_export(run: tuple[list[str], Path, torch.Tensor]) -> None:
    argv, folder, _ = run
    before = (folder / "run" / "hf" / "model.safetensors").read_bytes()
    logits = run_distributed(_trained_logits, 2, [*argv, "--training.steps=8"])[0]
    assert (folder / "run" / "hf" / "model.safetensors").read_bytes() != before
    torch.testing.assert_close(_transformers_logits(folder / "run" / "hf"), logits, rtol=1e-4, atol=1e-4)
