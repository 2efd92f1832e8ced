"""Every preset passes a dry run for the hardware that its header names, with room to spare, on a machine without GPU,
weights, tokenizer and data."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hbp_titan.config import load_config
from hbp_titan.tuning.dry_run import describe, dry_run
from hbp_titan.tuning.hardware import get_hardware

FOLDER = Path(__file__).resolve().parents[2] / "train_configs"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.toml"))
# Its epoch has fewer steps than the paper's 500.
CURRICULUM = {"deepseek_v2_236b_hbp": 100}
# Of the memory of a GPU; the estimate knows nothing of fragmentation.
MOST = 0.9


def _hardware(text: str) -> tuple[int, str]:
    """The number and kind of GPUs in a preset's header."""
    found = re.search(r"^# Hardware: (\d+) x (\S+) ", text, re.MULTILINE)
    assert found, "the header names no hardware"
    return int(found[1]), found[2]


@pytest.mark.parametrize("name", PRESETS)
def test_preset_fits_its_hardware(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = FOLDER / f"{name}.toml"
    world_size, gpu = _hardware(path.read_text())
    found = dry_run(load_config(["--job.config_file", str(path)]), world_size, get_hardware(gpu))
    for memory in found.levels:
        assert found.peak_bytes(memory.configured) <= MOST * found.hardware.memory_bytes, memory.level
    found.check_memory()
    assert found.warnings == []
    assert found.plan.num_steps == found.total_steps > 100
    text = describe(found)
    assert f"dry run: {world_size} x {gpu}" in text
    assert "SYNTHETIC data, because" in text


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "debug_model"])
def test_preset_trains_as_the_paper_does(name: str) -> None:
    config = load_config(["--job.config_file", str(FOLDER / f"{name}.toml")])
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-5, 0.01)
    assert config.packing.curriculum_steps == CURRICULUM.get(name, 500)
    assert config.packing.method == name.rpartition("_")[2]
    assert config.training.loss_normalization == "ave_token"
