"""Out to HF and back in: transformers computes the trained logits, and a run starts from such a folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hbp_titan.components.weights import check_load_path
from hbp_titan.config import load_config
from hbp_titan.data.tokenizer import CHATML_TEMPLATE
from hbp_titan.distributed.world import World
from hbp_titan.models.documents import pack_documents
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from scripts import convert_to_hf
from tests.programs import run_python
from tests.tiny_run import ARGS, write_tiny_run

PROMPT = torch.arange(5, 105)
# Asks otherwise than the tokenizer's own.
OWN_TEMPLATE = "{{- '<|endoftext|>' }}" + CHATML_TEMPLATE
Run = tuple[list[str], Path, Tensor]


def _logits_each(world: World, runs: list[list[str]], train: bool) -> list[Tensor]:
    """Return the logits of each run, trained or at its start."""
    found = []
    for argv in runs:
        trainer = Trainer(load_config(argv), world)
        if train:
            trainer.train()
        trainer.engine.runtime.activate(0)
        with torch.no_grad():
            found.append(trainer.model(PROMPT, torch.arange(len(PROMPT)), pack_documents([len(PROMPT)])))
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two ranks over 4 steps, resumed up to step 6: its arguments, folder and final logits."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "own.jinja").write_text(OWN_TEMPLATE)
    argv = [*write_tiny_run(folder), f"--data.chat_template={folder}/own.jinja"]
    shorter, longer = ([*argv, f"--training.steps={steps}"] for steps in (4, 6))
    before, after = run_distributed(_logits_each, 2, [shorter, longer], True)[0]
    assert (before - after).abs().max() > 0.01
    return longer, folder / "run", after


def _script(name: str, *argv: object) -> None:
    result = run_python(f"scripts/{name}", *argv)
    assert result.returncode == 0, result.stderr


def test_transformers_computes_the_logits_of_the_export_which_a_longer_run_replaces(run: Run) -> None:
    _, folder, logits = run
    # Not imported by the ranks.
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    with torch.no_grad():
        found = model(PROMPT[None]).logits[0]
    assert logits.std() > 0.1
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


def test_converted_checkpoint_is_the_exported_folder(run: Run, tmp_path: Path) -> None:
    exported, converted = run[1] / "hf", tmp_path / "hf"
    _script("convert_to_hf.py", run[1], converted)
    names = sorted(path.name for path in exported.iterdir())
    assert names == sorted(path.name for path in converted.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(names)
    import transformers

    asked = transformers.AutoTokenizer.from_pretrained(exported).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "<|endoftext|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == 3  # <|im_end|>
    for name in names:
        assert (exported / name).read_bytes() == (converted / name).read_bytes(), name


def test_bfloat16_conversion_is_the_rounded_fp32_export(run: Run, tmp_path: Path) -> None:
    _script("convert_to_hf.py", run[1], tmp_path / "hf", "--dtype", "bfloat16")
    whole, rounded = (load_file(folder / "hf" / "model.safetensors") for folder in (run[1], tmp_path))
    assert all(rounded[name].equal(whole[name].bfloat16()) for name in whole)


def test_run_starts_from_an_hf_folder_and_from_a_converted_checkpoint(run: Run, tmp_path: Path) -> None:
    argv, folder, logits = run
    _script("convert_from_hf.py", folder / "hf", tmp_path / "checkpoint")
    # "" is the default: the weights of model.hf_path.
    settings = [["--checkpoint.initial_load_path=", f"--model.hf_path={folder / 'hf'}"]]
    paths = (folder / "hf", tmp_path / "checkpoint", "none")
    settings += [[f"--checkpoint.initial_load_path={path}"] for path in paths]
    runs = [[*argv, *words, f"--job.dump_folder={tmp_path / 'new'}"] for words in settings]
    *loaded, drawn = run_distributed(_logits_each, 2, runs, False)[0]
    for found in loaded:
        torch.testing.assert_close(found, logits, rtol=1e-6, atol=1e-6)
    assert (drawn - logits).abs().max() > 0.1


def test_checkpoint_of_another_model_is_rejected_by_tensor_before_the_start(run: Run) -> None:
    path = str(run[1] / "checkpoint" / "step-6")
    check_load_path(path, ARGS)
    with pytest.raises(ValueError, match=r"missing: .*model.layers.2.mlp.up_proj.weight") as caught:
        check_load_path(path, dataclasses.replace(ARGS, num_layers=3, intermediate_size=72))
    assert "model.layers.0.mlp.down_proj.weight [32, 64] instead of [32, 72]" in str(caught.value)
    with pytest.raises(ValueError, match=r"unknown: model\.layers\.1\.input_layernorm\.weight"):
        check_load_path(path, dataclasses.replace(ARGS, num_layers=1))


def test_conversion_of_a_folder_without_checkpoint_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint"):
        convert_to_hf.main([str(tmp_path), str(tmp_path / "out")])
