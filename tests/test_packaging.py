"""What an installation holds and does: the wheel's files, the command hbp-titan, presets by name, types.

A wheel of pure Python is installed by unpacking it, so most tests do that; the slow ones let pip do it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from hbp_titan.__main__ import NOT_COMMANDS, commands, presets, with_presets
from tests.tiny_run import write_tiny_run

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = ("hbp_titan", "scripts", "train_configs", "pyproject.toml", "README.md", "LICENSE")


def _copy_repository(root: Path) -> Path:
    for name in REPOSITORY:
        if (ROOT / name).is_dir():
            # Other tests write into the caches at the same time.
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, root / name)
    return root


def _call(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    hidden = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, env={**hidden, "OMP_NUM_THREADS": "1", **environment}
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel of the repository holds."""
    root = _copy_repository(tmp_path_factory.mktemp("repository"))
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    built = _call(sys.executable, "-c", code, cwd=root)
    assert built.returncode == 0, built.stderr
    folder = tmp_path_factory.mktemp("site")
    (wheel,) = (root / "dist").glob("hbp_titan-0.1.0-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def _hbp_titan(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return _call(sys.executable, "-m", "hbp_titan", *words, cwd=cwd, PYTHONPATH=str(installed))


def test_the_wheel_holds_every_file_of_the_package_the_scripts_and_the_presets(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        # The pages on experiments and their pictures are for readers of the repository.
        return {str(p.relative_to(folder)) for p in paths if p.suffix not in (".pyc", ".md", ".svg", ".png")}

    scripts = {f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py")}
    configs = {f"train_configs/{path.name}" for path in (ROOT / "train_configs").glob("*.toml")}
    assert files(installed / "hbp_titan") == files(ROOT / "hbp_titan") | scripts | configs
    assert {path.name for path in installed.iterdir()} == {"hbp_titan", "hbp_titan-0.1.0.dist-info"}
    assert (installed / "hbp_titan" / "py.typed").exists()


def test_help_lists_each_script_without_importing_torch(installed: Path, tmp_path: Path) -> None:
    code = "import sys; from hbp_titan.__main__ import main; main(); sys.exit('torch' in sys.modules)"
    listed = _call(sys.executable, "-c", code, "--help", cwd=tmp_path, PYTHONPATH=str(installed), COLUMNS="200")
    assert listed.returncode == 0, listed.stderr
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"__init__", *NOT_COMMANDS}
    assert {"train", "dry_run", "presets", *scripts} == set(re.findall(r"^  (\w+)  ", listed.stdout, re.MULTILINE))
    assert "  evaluate            Evaluate an exported HF folder: perplexity," in listed.stdout


def test_versions(installed: Path, tmp_path: Path) -> None:
    import torch

    python = ".".join(map(str, sys.version_info[:3]))
    assert _hbp_titan(installed, tmp_path, "--version").stdout == (
        f"hbp_titan 0.1.0, torch {torch.__version__}, Python {python}\n"
    )


def test_a_script_of_an_installation_runs_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    lengths = np.array([100, 200, 300, 400])
    np.save(tmp_path / "lengths.npy", lengths)
    words = ["--lengths", "lengths.npy", "--world_size", "1", "--levels", "1024:1", "--json", "plan.json"]
    result = _hbp_titan(installed, tmp_path, "plan-packing", *words)
    assert result.returncode == 0, result.stderr
    # One pack of 1000 tokens.
    assert json.loads((tmp_path / "plan.json").read_text())["methods"]["hbp"]["ave_tokens"] == 1000
    assert _hbp_titan(installed, tmp_path, "plan_packing", "--help").stdout.startswith("usage: hbp-titan plan_packing ")


def test_exit_codes_and_errors_are_the_scripts_own(installed: Path, tmp_path: Path) -> None:
    missing = _hbp_titan(installed, tmp_path, "plan_packing", "--lengths", "nowhere.npy", "--world_size", "1")
    assert (missing.returncode, missing.stderr) == (1, "error: nowhere.npy: No such file or directory\n")
    assert _hbp_titan(installed, tmp_path, "plan_packing").returncode == 2


def test_an_unknown_command_names_the_nearest(installed: Path, tmp_path: Path) -> None:
    result = _hbp_titan(installed, tmp_path, "evalute", "--help")
    assert (result.returncode, result.stderr) == (
        1,
        "error: unknown command 'evalute'; did you mean evaluate? (hbp-titan --help lists them)\n",
    )


def test_a_preset_is_found_by_name_and_a_file_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(ROOT / "train_configs" / "debug_model.toml")
    assert with_presets(["--job.config_file", "debug_model", "--data.seed", "1"]) == [
        "--job.config_file", path, "--data.seed", "1",
    ]  # fmt: skip
    assert with_presets(["--show", "debug_model", "--job.config_file=debug_model"]) == [
        "--show", "debug_model", "--job.config_file", path,
    ]  # fmt: skip
    assert with_presets(["--job.config_file", "sub/debug_model"]) == ["--job.config_file", "sub/debug_model"]
    (tmp_path / "debug_model").write_text("")
    assert with_presets(["--job.config_file", "debug_model"]) == ["--job.config_file", "debug_model"]
    with pytest.raises(ValueError, match="llama3_1_8b is neither a file nor a preset; did you mean llama3_1_8b_"):
        with_presets(["--job.config_file", "llama3_1_8b"])


def test_every_preset_says_what_hardware_it_is_for(installed: Path, tmp_path: Path) -> None:
    lines = _hbp_titan(installed, tmp_path, "presets").stdout.splitlines()
    assert lines[::2] == [str(installed / "hbp_titan" / "train_configs" / f"{name}.toml") for name in presets()]
    assert all("Hardware: " in line for line in lines[1::2])


def test_scripts_leave_the_import_path_alone() -> None:
    for path in commands().values():
        assert "sys.path" not in path.read_text(), path.name


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A fresh virtual environment that sees the packages of this one, but not this project."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (purelib,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # A .pth file's folders are searched last, and .pth files in them are not read: no editable install comes along.
    (purelib / "base.pth").write_text(str(Path(np.__file__).resolve().parents[1]) + "\n")
    return tmp_path / "venv" / "bin"


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True])
def test_pip_install_trains_from_an_empty_folder(environment: Path, tmp_path: Path, editable: bool) -> None:
    (tmp_path / "repository").mkdir()
    root = _copy_repository(tmp_path / "repository")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "python"), "install"]
    options = ["--no-deps", "--no-build-isolation", *(["--editable"] if editable else [])]
    done = _call(*pip, *options, str(root), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    where = _call(str(environment / "python"), "-c", "import hbp_titan as h; print(h.__file__)", cwd=empty).stdout
    assert where.startswith(str(root if editable else environment.parent))

    (tmp_path / "run").mkdir()
    argv = write_tiny_run(tmp_path / "run", num_rows=30)
    # Two processes: the ones that are started import the main module by its name.
    prepared = _call(str(environment / "hbp-titan"), "prepare_data", *argv, "--data.num_proc=2", cwd=empty)
    assert prepared.returncode == 0, prepared.stderr
    launcher = [str(environment / "python"), "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    trained = _call(*launcher, "-m", "hbp_titan", "train", *argv, "--training.steps=2", cwd=empty)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "run" / "hf" / "config.json").exists()
    assert (
        _call(str(environment / "hbp-titan"), "audit_epoch", str(tmp_path / "run" / "run"), cwd=empty).returncode == 0
    )


@pytest.mark.slow
def test_a_users_file_is_typed_by_the_installed_wheel(installed: Path, environment: Path, tmp_path: Path) -> None:
    shutil.copytree(installed, next(environment.parent.glob("lib/python*/site-packages")), dirs_exist_ok=True)
    (tmp_path / "user.py").write_text(
        "import numpy as np\n"
        "from hbp_titan.packing import Level, build_plan, measure\n"
        "plan = build_plan(np.array([10, 20]), [Level(max_tokens=64)], world_size=1)\n"
        "reveal_type(plan)\n"
        "reveal_type(measure(plan).abr)\n"
        "Level(max_tokens='64')\n"
    )
    command = [sys.executable, "-m", "mypy", "--python-executable", str(environment / "python"), "user.py"]
    found = _call(*command, cwd=tmp_path).stdout
    assert 'user.py:4: note: Revealed type is "hbp_titan.packing.plan.Plan"' in found
    assert 'user.py:5: note: Revealed type is "float"' in found.replace("builtins.", "")
    assert 'user.py:6: error: Argument "max_tokens" to "Level" has incompatible type "str"; expected "int"' in found
    assert "Found 1 error in 1 file" in found
