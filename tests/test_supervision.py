"""run_train.sh on one node and on two: a process that dies is restarted, and the run ends as if undisturbed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from hbp_titan.components.checkpoint import completed_checkpoints
from hbp_titan.experiments.soak import audit_faults, differences, kill_tree, ranks_of, steps_done
from hbp_titan.testing.local_ranks import run_distributed
from tests.checkout import make_checkout
from tests.runs import DEADLINE, train, wait_until
from tests.tiny_run import write_tiny_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc; run: scripts/run_tests.sh on Linux"),
]


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a run of two epochs."""
    folder = tmp_path_factory.mktemp("run")
    return [*write_tiny_run(folder, 90), "--training.epochs=2", "--checkpoint.interval=8"]


@pytest.fixture(scope="module")
def whole(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    run_distributed(train, 2, [*argv, f"--job.dump_folder={folder}"])
    return folder


def _start(root: Path, argv: Sequence[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    values = {**os.environ, "OMP_NUM_THREADS": "1", "CONFIG_FILE": "tiny.toml", **environment}
    command = ["bash", "run_train.sh", *argv, f"--job.dump_folder={folder}"]
    return subprocess.Popen(command, cwd=root, env=values, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def make_held(root: Path, release: Path) -> Path:
    """Make a checkout whose runs wait after step 12, past a checkpoint and before the next, until `release` exists."""
    make_checkout(root)
    shutil.copy(Path(__file__).with_name("held_run.py"), root / "hbp_titan" / "held_run.py")
    train = root / "hbp_titan" / "train.py"
    held = (
        f"from pathlib import Path\nfrom hbp_titan.held_run import hold\n\nhold(Trainer, 12, Path({str(release)!r}))\n"
    )
    before, main, after = train.read_text().partition('if __name__ == "__main__":')
    assert main
    train.write_text(f"{before}{held}{main}{after}")
    return root


def _wait_until_held(folder: Path, *processes: subprocess.Popen[str]) -> None:
    wait_until(lambda: steps_done(folder) >= 12 and bool(completed_checkpoints(folder / "checkpoint")), *processes)


def _assert_same(whole: Path, folder: Path) -> None:
    total = steps_done(whole)
    assert completed_checkpoints(folder / "checkpoint")[-1].name == f"step-{total}"
    assert differences(whole, folder, total) == []
    assert audit_faults(folder) == []


def test_killed_rank_is_restarted_by_torchrun(argv: list[str], whole: Path, tmp_path: Path) -> None:
    folder, release = tmp_path / "killed", tmp_path / "release"
    root = make_held(tmp_path / "checkout", release)
    process = _start(root, argv, folder, NGPU="2", MAX_RESTARTS="2")
    _wait_until_held(folder, process)
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    release.touch()
    output = process.communicate(timeout=DEADLINE)[0]
    assert process.returncode == 0, output
    # One restart: not one that met the store of the dead ranks, failed and was restarted again.
    assert output.count("resumed from step 8") == 1
    assert output.count("model: model, ") == 2
    _assert_same(whole, folder)


def test_two_nodes_resume_when_both_are_started_again(argv: list[str], whole: Path, tmp_path: Path) -> None:
    folder, release = tmp_path / "nodes", tmp_path / "release"
    root = make_held(tmp_path / "checkout", release)
    for start in range(2):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            endpoint = f"localhost:{free.getsockname()[1]}"
        environment = {"NGPU": "1", "NNODES": "2", "RDZV_ENDPOINT": endpoint, "RDZV_ID": "job"}
        nodes = [_start(root, argv, folder, **environment) for _ in range(2)]
        if start == 0:
            _wait_until_held(folder, *nodes)
            kill_tree(nodes[1].pid)
            release.touch()
            # A supervisor that sees a node die ends the others.
            nodes[0].terminate()
            assert all(node.communicate(timeout=DEADLINE) and node.returncode for node in nodes)
    outputs = [node.communicate(timeout=DEADLINE)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sum(output.count("resumed from step 8") for output in outputs) == 1
    _assert_same(whole, folder)
