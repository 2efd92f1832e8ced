"""hbp-titan doctor: each check on files and values of a machine in trouble, the table, and several nodes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hbp_titan.testing import doctor, machine_checks
from hbp_titan.testing.doctor import Row, checks_across_nodes, merge_nodes, table
from hbp_titan.testing.machine_checks import Check


def _write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def _raise(name: str) -> str:
    raise OSError(f"{name} is unknown")


GPU = ["H100", "580.1", "81559", "600", "0"]
TROUBLE: dict[str, tuple[Callable[[Path], list[Check]], str, str]] = {
    "busy GPU": (lambda path: machine_checks.gpus([GPU, [*GPU[:3], "70000", "0"]]), "warn", "on GPU 1"),
    "two kinds of GPU": (lambda path: machine_checks.gpus([GPU, ["A100", *GPU[1:]]]), "warn", "A100 and H100"),
    "broken GPU memory": (lambda path: machine_checks.gpus([[*GPU[:4], "2"]]), "fail", "errors on GPU 0"),
    "no compiler": (lambda path: machine_checks.compiler(lambda name: None), "warn", "none"),
    "slow environment": (lambda path: machine_checks.environment({"NCCL_P2P_DISABLE": "1"}), "warn", "NCCL_P2P"),
    "container's CPUs": (
        lambda path: machine_checks.processors(1, _write(path, cpu_max="50000 100000")), "warn", "0.5 c",
    ),
    "container's memory": (
        lambda path: machine_checks.memory(0, cgroup=_write(path, memory_max=f"{2**30}", memory_current="0")),
        "warn",
        "container",
    ),
    "no /dev/shm": (lambda path: machine_checks.shared_memory(path / "shm"), "warn", "missing"),
    "local address": (
        lambda path: machine_checks.network({}, ["lo", "eth0"], path, lambda name: "127.0.1.1"), "warn", "127.0.1.1",
    ),
    "no address": (lambda path: machine_checks.network({}, ["eth0"], path, _raise), "warn", "no address"),
    "wrong interface": (
        lambda path: machine_checks.network({"GLOO_SOCKET_IFNAME": "ib0"}, ["eth0"], path, lambda name: "10.0.0.1"),
        "fail",
        "ib0",
    ),
    "folder without rights": (lambda path: machine_checks.folder(Path("/proc")), "fail", "/proc"),
    "folder in a container": (
        lambda path: machine_checks.folder(path, _write(path, mounts=f"none {path} overlay rw 0 0\n") / "mounts"),
        "warn",
        "volatile",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_is_found_and_has_advice(name: str, tmp_path: Path) -> None:
    run, verdict, found = TROUBLE[name]
    checks = [check for check in run(tmp_path) if check.verdict == verdict]
    assert [found in check.found for check in checks] == [True], checks
    assert checks[0].advice


def test_machine_without_trouble_is_ok(tmp_path: Path) -> None:
    variables = {"NCCL_P2P_DISABLE": "0", "NCCL_SOCKET_IFNAME": "eth"}
    checks = [
        *machine_checks.gpus([GPU, GPU]),
        *machine_checks.environment(variables),
        *machine_checks.network(variables, ["lo", "eth0"], tmp_path, lambda name: "10.0.0.1"),
        *machine_checks.network({"NCCL_SOCKET_IFNAME": "^docker"}, ["eth0"], tmp_path, lambda name: "10.0.0.1"),
    ]
    assert {check.verdict for check in checks} == {"ok"}, checks


def test_folder_is_checked_where_it_will_be_made_and_stays_as_it_was(tmp_path: Path) -> None:
    _write(tmp_path, mounts=f"none / overlay rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n")
    (check,) = machine_checks.folder(tmp_path / "new" / "outputs", tmp_path / "mounts")
    assert f"{tmp_path}: nfs4, shared" in check.found
    assert check.verdict != "fail"  # a slow or full disk is a warning
    assert [path.name for path in tmp_path.iterdir()] == ["mounts"]


@pytest.mark.parametrize("nvidia_smi", [True, False])
def test_gpus_are_reported_with_their_libraries_and_the_kernel_that_is_missing(
    nvidia_smi: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What torch reports of two H100 that cannot access each other, on a machine that has none.
    values = {"is_available": True, "device_count": 2, "get_device_name": "H100", "get_device_capability": (9, 0)}
    for name, value in (values | {"can_device_access_peer": False}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *words, value=value: value)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 3))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if nvidia_smi:
        monkeypatch.setattr(machine_checks, "nvidia_smi", lambda query: [GPU, GPU])
    else:
        monkeypatch.setenv("PATH", "")
    gpu, cuda, kernel = machine_checks.torch_and_gpus()
    assert (gpu.verdict, gpu.found[:8]) == ("ok" if nvidia_smi else "warn", "2 x H100")
    assert (cuda.verdict, "NCCL 2.29.3" in cuda.found, "GPU 1" in cuda.found) == ("warn", True, True)
    assert (kernel.verdict, kernel.found[:10]) == ("warn", "torch; fa3")


def test_inactive_infiniband_port_is_named(tmp_path: Path) -> None:
    for port, state in (("1", "4: ACTIVE\n"), ("2", "1: DOWN\n")):
        folder = tmp_path / "mlx5_0" / "ports" / port
        folder.mkdir(parents=True)
        _write(folder, state=state, rate="400 Gb/sec (4X NDR)\n")
    check = machine_checks.network({}, ["eth0"], tmp_path, lambda name: "10.0.0.1")[-1]
    assert (check.verdict, check.found) == ("warn", "mlx5_0:1 ACTIVE 400 Gb/sec, mlx5_0:2 DOWN 400 Gb/sec")
    assert "mlx5_0:2" in check.advice
    assert "mlx5_0:1" not in check.advice


def test_requirements_of_an_extra_include_those_of_the_extras_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["numpy"]\n[project.optional-dependencies]\ntrain = ["torch"]\n'
        'data = ["hbp-titan[train]", "pyarrow"]\ndev = ["hbp-titan[train,data]", "pytest"]\n'
    )
    assert sorted(machine_checks.requirements("dev", tmp_path)) == ["numpy", "pyarrow", "pytest", "torch"]
    with pytest.raises(ValueError, match="one of train, data, dev"):
        machine_checks.requirements("test", tmp_path)
    # Without a checkout, those of the installed package, as its metadata has them.
    listed = ["numpy", "torch<2; extra == 'train'", 'hbp-titan[train]; extra == "data"', 'pyarrow; extra == "data"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: listed)
    assert machine_checks.requirements("data", tmp_path / "no") == ["numpy", "pyarrow", "torch<2"]


def test_missing_and_outdated_packages_are_listed() -> None:
    unmet = machine_checks.unmet_requirements(
        ["numpy>=1", "numpy>=99", "no-such-package", "tomli; python_version < '3'"]
    )
    assert [text.split()[0] for text in unmet] == ["numpy>=99", "no-such-package"]


def test_nodes_share_a_row_unless_they_differ() -> None:
    def node(version: str, shm: str) -> list[Check]:
        return [Check("versions", "ok", version), Check("/dev/shm", "ok", shm)]

    same = merge_nodes({"a": node("1", "8"), "b": node("1", "9")})
    assert [(row.check.name, row.nodes) for row in same] == [
        ("versions", ()),
        ("/dev/shm", ("a",)),
        ("/dev/shm", ("b",)),
    ]
    assert [row.check.verdict for row in merge_nodes({"a": node("1", "8"), "b": node("2", "8")})].count("fail") == 1


@pytest.mark.parametrize("seen", [True, False])
def test_folder_that_a_node_does_not_see_and_clocks_that_differ_are_found(
    seen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(value: Any) -> list[Any]:
        # What a second node, whose clock is 5 s ahead, would send.
        return [value, value + 5 if isinstance(value, float) else ("b", seen) if isinstance(value, tuple) else "b"]

    monkeypatch.setattr(doctor, "VISIBLE_SECONDS", 0.0)
    folder, clocks = checks_across_nodes(tmp_path / "outputs", "a", gather)
    assert (folder.verdict, folder.advice == "") == (("ok", True) if seen else ("fail", False))
    assert ("not seen by b" in folder.found) is not seen
    assert (clocks.verdict, clocks.found) == ("warn", "2 nodes within 5.0 s")
    assert list((tmp_path / "outputs").iterdir()) == []


def test_command_reports_this_machine_and_fails_with_a_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_interface")
    assert doctor.main(["--folder", str(tmp_path), "--json"]) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert {"versions", "packages", "GPU", "attention kernel", "C compiler", "run folder", "/dev/shm"} <= set(checks)
    assert checks["interface"]["verdict"] == "fail"
    assert doctor.main(["--packages", "train"]) == 0


def test_check_that_cannot_run_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine_checks, "network", lambda: os.readlink(tmp_path))
    (broken,) = [check for check in doctor.checks_of_machine(tmp_path) if "cannot check" in check.found]
    assert broken.verdict == "warn"


def test_table_wraps_and_counts() -> None:
    text = table(
        [Row(Check("memory", "warn", "1 GiB " * 30, "more " * 30), ("a", "b")), Row(Check("CPU", "ok", "2"))], 80
    )
    assert text.splitlines()[0].startswith("warn  memory (a, b)")
    assert text.endswith("\n1 ok, 1 warn, 0 fail")
    assert max(map(len, text.splitlines())) <= 80
