"""Installation: files of the wheel, the command hbp-titan, presets by name, types, checkouts without a package index.

A pure Python wheel is installed by unpacking it, which most tests do; the slow ones use pip.
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

from hbp_titan import __version__
from hbp_titan.__main__ import TRAIN_PACKAGES, commands, main, presets, with_presets
from hbp_titan.testing.machine_checks import requirements
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
    """Return a folder with the content of a wheel of the repository."""
    root = _copy_repository(tmp_path_factory.mktemp("repository"))
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    built = _call(sys.executable, "-c", code, cwd=root)
    assert built.returncode == 0, built.stderr
    folder = tmp_path_factory.mktemp("site")
    (wheel,) = (root / "dist").glob(f"hbp_titan-{__version__}-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_wheel_has_the_package_the_scripts_and_the_presets(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        # The pages on experiments and their pictures are for readers of the repository.
        return {str(p.relative_to(folder)) for p in paths if p.suffix not in (".pyc", ".md", ".svg", ".png")}

    scripts = {f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py")}
    configs = {f"train_configs/{path.name}" for path in (ROOT / "train_configs").glob("*.toml")}
    assert files(installed / "hbp_titan") == files(ROOT / "hbp_titan") | scripts | configs
    assert {path.name for path in installed.iterdir()} == {"hbp_titan", f"hbp_titan-{__version__}.dist-info"}
    assert (installed / "hbp_titan" / "py.typed").exists()


def test_help_lists_each_script_without_importing_torch(installed: Path, tmp_path: Path) -> None:
    code = "import sys; from hbp_titan.__main__ import main; main(); sys.exit('torch' in sys.modules)"
    listed = _call(sys.executable, "-c", code, "--help", cwd=tmp_path, PYTHONPATH=str(installed), COLUMNS="200")
    assert listed.returncode == 0, listed.stderr
    help_of_train = _call(sys.executable, "-c", code, "train", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert help_of_train.returncode == 0, help_of_train.stderr
    assert "--checkpoint.interval" in help_of_train.stdout
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"__init__"}
    assert {"train", "dry_run", "presets", *scripts} == set(re.findall(r"^  (\w+)  ", listed.stdout, re.MULTILINE))


# Installed without the extra "train": only NumPy (and tomli) can be imported.
PLANNER_ALONE = """
import importlib.abc, json, sys
missing, calls = map(json.loads, sys.argv[1:])
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import hbp_titan.packing.sampler
from hbp_titan.__main__ import main
for words in calls:
    try:
        main(words)
    except SystemExit as end:
        print("exit", end.code, file=sys.stderr)
"""


def test_installed_planner_works_in_an_empty_folder_without_the_packages_of_training(
    installed: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "lengths.npy", np.array([100, 200, 300, 400]))
    plan = ["--lengths", "lengths.npy", "--world_size", "1", "--levels", "1024:1", "--json", "plan.json"]
    calls = [
        ["--version"],
        ["plan-packing", *plan],
        ["train", *plan[:2]],
        ["plan-packing", "--job.config_file", "debug_model", *plan[2:4]],
    ]
    words = (json.dumps(TRAIN_PACKAGES), json.dumps(calls))
    done = _call(sys.executable, "-c", PLANNER_ALONE, *words, cwd=tmp_path, PYTHONPATH=str(installed))
    assert "Python" in done.stdout, done.stderr
    # One pack of 1000 tokens.
    assert json.loads((tmp_path / "plan.json").read_text())["methods"]["hbp"]["ave_tokens"] == 1000
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("exit")] == ["exit 1", "exit 1"]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 2
    assert all("pip install 'hbp-titan[train]'" in line for line in errors)
    assert len(lines) == 4


def test_changelog_begins_with_this_version_and_descends() -> None:
    text = (ROOT / "docs" / "changelog.md").read_text()
    versions = re.findall(r"^## ([\d.]+)", text, re.MULTILINE)
    assert versions[0] == __version__
    assert versions == sorted(versions, key=lambda version: [int(part) for part in version.split(".")], reverse=True)
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= {
        "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security",
    }  # fmt: skip


def test_extra_train_has_what_the_planner_does_not_need() -> None:
    def names(texts: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", text)[0] for text in texts}

    assert names(requirements("train")) == {"numpy", "tomli", *TRAIN_PACKAGES}
    assert "torch" not in names(requirements("hub"))
    project = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", project, re.MULTILINE)
    assert {"train", "hub", "data", "dev"} <= set(extras)
    for extra in {*extras} - {"hub"}:
        assert set(requirements("train")) <= set(requirements(extra)), extra


def test_checkout_runs_its_own_scripts_without_installation(tmp_path: Path) -> None:
    root = _copy_repository(tmp_path)
    script = root / "scripts" / "report.py"
    script.write_text(script.read_text().replace('"outputs", nargs="+"', '"changed", nargs="+"'))
    # -S hides an installed hbp_titan.
    numpy = str(Path(np.__file__).resolve().parents[1])
    shown = _call(sys.executable, "-S", "-m", "hbp_titan", "report", "--help", cwd=root, PYTHONPATH=numpy)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("usage: report.py")
    assert "changed" in shown.stdout


def test_exit_codes_and_errors_of_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["hbp-titan"])  # restored afterwards
    for words, code, error in (
        (["plan_packing", "--lengths", "nowhere.npy", "--world_size", "1"], 1, "error: nowhere.npy: No such file"),
        (["plan-packing"], 2, "usage: hbp-titan plan_packing"),
        (["evalute", "--help"], 1, "error: unknown command 'evalute'; did you mean evaluate?"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == code
        assert capsys.readouterr().err.startswith(error)


def test_preset_is_found_by_name_after_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(ValueError, match="did you mean llama3_1_8b_"):
        with_presets(["--job.config_file", "llama3_1_8b"])


def test_every_preset_names_its_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    main(["presets"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == [str(path) for path in presets().values()]
    assert all("Hardware: " in line for line in lines[1::2])


def test_scripts_print_errors_on_one_line_and_leave_the_import_path_alone() -> None:
    for path in commands().values():
        text = path.read_text()
        assert "sys.path" not in text, path.name
        assert "exit_on_user_error(" in text, path.name


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """Return the bin folder of a new virtual environment with the packages of this one, but without this project."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (purelib,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # .pth files in a folder that a .pth file adds are not read, so an editable install of this project stays hidden.
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
    # Two processes: a spawned one imports the main module by its name.
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
def test_checkout_is_importable_where_pip_has_no_index(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    root = _copy_repository(tmp_path / "repository")
    shutil.move(environment.parent, root / ".venv")
    setup = "source scripts/setup_env.sh train && echo $PY"
    done = _call("bash", "-c", setup, cwd=root, PIP_NO_INDEX="1", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    python = done.stdout.splitlines()[-1]
    where = _call(python, "-c", "import hbp_titan as h; print(h.__file__)", cwd=tmp_path)
    assert where.stdout == f"{root / 'hbp_titan' / '__init__.py'}\n", where.stderr
    assert _call(python, str(root / "scripts" / "report.py"), "--help", cwd=tmp_path).returncode == 0
