"""scripts/select_levels.py: what it prints and writes, and that a mistake ends in one line."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from hbp_titan.config import load_config
from tests.programs import run_python
from tests.tiny_run import write_tiny_run

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "scripts" / "select_levels.py")

Capture = pytest.CaptureFixture[str]

TOML = """\
# The user's own file.
[data]
train_files = ["{folder}/train.jsonl"]
max_length_policy = "error"  # none is longer
cache_folder = "{folder}/cache"
num_proc = 1

[[levels]]
max_tokens = 64  # too short for the data

[model]
hf_path = "{folder}/model"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("select")
    write_tiny_run(path)
    (path / "run.toml").write_text(TOML.format(folder=path))
    return path


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("select_levels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _main(folder: Path, *words: object) -> None:
    _script().main(["--job.config_file", str(folder / "run.toml"), *map(str, words)])


ESTIMATE = ("--estimate", "h100-80gb", "--world_size", "8")


def test_an_estimate_writes_the_user_s_file_with_levels_that_hold_the_data(folder: Path, capsys: Capture) -> None:
    output = folder / "new" / "levels.toml"
    _main(folder, *ESTIMATE, "--output", output)
    printed = capsys.readouterr().out
    for row in ("search", "paper", "ISF", r"flat \+ sort"):
        assert re.search(rf"^{row} .*%", printed, re.MULTILINE), printed
    text = output.read_text()
    assert text.startswith("# The user's own file.\n[data]\n")
    assert 'max_length_policy = "error"  # none is longer\n' in text
    assert "max_tokens = 64  #" not in text
    config = load_config(["--job.config_file", str(output)])
    assert config.levels[-1].max_tokens > 340
    assert all(8 % level.cp_degree == 0 for level in config.levels)


def test_named_candidates_are_the_only_ones_and_levels_are_printed(folder: Path, capsys: Capture) -> None:
    _main(folder, *ESTIMATE, "--candidates", "128:1,1024:1,1024:2", "--method", "paper")
    printed = capsys.readouterr().out
    assert " of 9 candidates fit in memory" in printed
    blocks = printed[printed.index("[[levels]]") :]
    assert set(re.findall(r"max_tokens = (\d+)", blocks)) <= {"128", "1024"}


def test_two_ranks_measure_and_speak_once(folder: Path) -> None:
    output, cache = folder / "measured.toml", folder / "profile.json"
    words = ["--job.config_file", folder / "run.toml", "--candidates", "128:1,1024:2", "--profile_cache", cache]
    result = run_python(SCRIPT, *words, "--output", output, ranks=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("candidates fit in memory") == 1
    assert load_config(["--job.config_file", str(output)]).levels[-1].max_tokens == 1024
    assert cache.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (ESTIMATE[:2], "--estimate HARDWARE and --world_size N go together"),
        (("--estimate", "h10", "--world_size", "8"), "did you mean h100"),
        ((*ESTIMATE, "--candidates", "1023:3"), "cp_degree=3 of the level with max_tokens=1023 does not divide the"),
        ((*ESTIMATE, "--candidates", "128:1"), "no candidate holds the longest sample"),
        (
            ("--packing.auto_levls", "true"),
            "did you mean packing.auto_levels",
        ),
        ((*ESTIMATE, "--packing.max_sample_tokens", "99"), r"is longer than packing\.max_sample_tokens"),
    ],
)
def test_a_mistake_is_named(folder: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _main(folder, *words)


def test_a_mistake_is_one_line(folder: Path) -> None:
    result = run_python(SCRIPT, "--estimate", "h100-80gb")
    assert result.returncode == 1
    assert re.fullmatch("error: --estimate HARDWARE .*\n", result.stderr)
