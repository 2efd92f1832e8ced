"""The logic of the SLURM script, with stand-ins for srun and scontrol that record their calls and run the command."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from hbp_titan.components.checkpoint import completed_checkpoints
from hbp_titan.experiments.soak import audit_faults, differences
from hbp_titan.testing.local_ranks import run_distributed
from tests.checkout import make_checkout
from tests.runs import read_metrics, train, wait_until
from tests.tiny_run import write_tiny_run

SRUN = """#!/usr/bin/env bash
echo "srun $*" >> calls
while [[ $1 == --* ]]; do
    [[ $1 == --output=* ]] && output=${1#--output=}
    shift
done
pids=()
trap 'echo "srun got USR1" >> calls; kill -USR1 "${pids[@]}"' USR1
for ((node = 0; node < SLURM_NNODES; node++)); do
    "$@" > "${output/\\%N/node$node}" 2>&1 &
    pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
    while :; do
        last=0
        wait "$pid" || last=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    wait "$pid" || code=$?
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> calls
[[ $1 == show ]] && echo localhost
exit 0
"""
# SLURM's %L: the time that the job has left.
SQUEUE = """#!/usr/bin/env bash
[ "$*" == "-h -j 20077 -o %L" ] && echo "$TIME_LEFT"
"""


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A checkout that uses this environment, with SLURM's commands next to it."""
    root = make_checkout(tmp_path / "repository")
    _write(tmp_path / "bin" / "srun", SRUN)
    _write(tmp_path / "bin" / "scontrol", SCONTROL)
    _write(tmp_path / "bin" / "squeue", SQUEUE)
    return root


def _submit(root: Path, *argv: str, nodes: int = 1, **environment: str) -> subprocess.Popen[str]:
    slurm = {
        "SLURM_SUBMIT_DIR": str(root),
        "SLURM_JOB_ID": "20077",
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_CPUS_ON_NODE": "2",
        "PATH": f"{root.parent / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    # SLURM runs a copy of the script in another folder.
    script = shutil.copy(root / "scripts" / "slurm_train.sbatch", root.parent / "slurm_script")
    return subprocess.Popen(
        ["bash", script, *argv],
        cwd=root.parent,
        env={**os.environ, **slurm, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _calls(root: Path) -> list[str]:
    return (root / "calls").read_text().splitlines()


STUCK = "trap 'exit 138' USR1; mkdir up; sleep 60 & wait"
SAVED_BUT_LATE = "trap 'exit 138' USR1; mkdir -p run/checkpoint/step-12 up; sleep 60 & wait"
# What the run does, whether SLURM warns it, the job's exit code, whether it is requeued.
ENDS = {
    "complete": ("mkdir -p run/checkpoint/step-9; exit 0", False, 0, False),
    "preempted": ("echo 'SIGUSR1 step 7' > run/preempted; exit 1", False, 0, True),
    "ended": ("echo 'SIGTERM step 7' > run/preempted; exit 1", False, 1, False),
    "failed": ("mkdir -p run/checkpoint/step-7; exit 1", False, 1, False),
    "out of time": (SAVED_BUT_LATE, True, 0, True),
    "out of time in the first start": (SAVED_BUT_LATE, True, 0, True),
    "no checkpoint in time": (STUCK, True, 0, True),
    "no checkpoint in time again and again": (STUCK, True, 138, False),
    "preempted before its first step": (STUCK, True, 0, True),
    "preempted before its first step without a limit": (STUCK, True, 0, True),
    "preempted where each process is signalled": ("mkdir up; sleep 60", True, 0, True),
    "complete in time": ("trap 'sleep 0.3; exit 0' USR1; mkdir up; sleep 60 & wait", True, 0, False),
}


@pytest.mark.parametrize("end", ENDS)
def test_job_is_requeued_if_it_stopped_for_lack_of_time(repository: Path, end: str) -> None:
    command, warned, code, requeued = ENDS[end]
    _write(repository / "run_train.sh", f"#!/usr/bin/env bash\nmkdir -p run\n{command}\n")
    _write(repository / "scripts" / "prepare_data.py", "print('prepared')\n")
    # Three starts without a checkpoint came before.
    idle = repository / "outputs" / "slurm" / "20077-idle-starts"
    if "again" in end or "before" in end:
        _write(idle, "start\n" * 3)
    time_left = "UNLIMITED" if "without a limit" in end else "1-00:03:04" if end.startswith("preempted") else "3:04"
    if end != "out of time in the first start":
        # Of an earlier start: neither the marker nor the checkpoint may count for this one.
        _write(repository / "run" / "preempted", "SIGUSR1 step 3\n")
        (repository / "run" / "checkpoint" / "step-3").mkdir(parents=True)
    process = _submit(repository, "--job.dump_folder=run", TIME_LEFT=time_left)
    if warned:
        wait_until((repository / "up").exists, process)
        process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert ("scontrol requeue 20077" in _calls(repository)) == requeued
    assert ("srun got USR1" in _calls(repository)) == warned
    assert ("requeued" in output) == requeued
    assert ("not requeued" in errors) == (code != 0)
    # Counted until a checkpoint is saved.
    starts = {"no checkpoint in time": 1, "no checkpoint in time again and again": 4}
    starts |= dict.fromkeys((name for name in ENDS if "before" in name), 3)
    assert (len(idle.read_text().splitlines()) if idle.exists() else 0) == starts.get(end, 0)


@pytest.mark.parametrize("stage", ["setup", "preparation"])
def test_signal_before_the_nodes_start_requeues_the_job(repository: Path, stage: str) -> None:
    wait = "import pathlib, time; pathlib.Path('up').touch(); time.sleep(60)\n"
    if stage == "setup":
        # bash runs its trap when the command in the foreground has ended.
        setup = repository / "scripts" / "setup_env.sh"
        _write(setup, setup.read_text() + "touch up; while [ ! -e go ]; do sleep 0.05; done\n")
        wait = "raise SystemExit(1)\n"
    _write(repository / "scripts" / "prepare_data.py", wait)
    process = _submit(repository, "--job.dump_folder=run", TIME_LEFT="59:00")
    wait_until((repository / "up").exists, process)
    process.send_signal(signal.SIGUSR1)
    (repository / "go").touch()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert _calls(repository) == ["scontrol requeue 20077"]
    assert "preempted before a step was saved at step 0: requeued" in output


def test_user_error_ends_the_job_before_a_node_starts(repository: Path) -> None:
    process = _submit(repository, "--trainin.steps=3")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "did you mean training.steps?" in errors
    assert not (repository / "calls").exists()


@pytest.mark.slow
def test_job_of_two_nodes_saves_in_time_is_requeued_and_ends_like_an_undisturbed_run(repository: Path) -> None:
    argv = [*write_tiny_run(repository.parent, num_rows=150), "--training.epochs=2", "--checkpoint.interval=1000"]
    folder, whole = repository.parent / "run", repository.parent / "whole"
    environment = {"NGPU": "1", "CONFIG_FILE": "tiny.toml"}
    process = _submit(repository, *argv, nodes=2, **environment)
    wait_until(lambda: len(read_metrics(folder)) >= 5, process)
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=120)
    (saved,) = completed_checkpoints(folder / "checkpoint")
    step = saved.name.removeprefix("step-")
    assert (process.returncode, errors) == (0, "")
    assert output.endswith(f"preempted at step {step}: requeued\n")
    (srun,) = [call for call in _calls(repository) if call.startswith("srun --")]
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in srun

    process = _submit(repository, *argv, nodes=2, SLURM_RESTART_COUNT="1", **environment)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    total = int(completed_checkpoints(folder / "checkpoint")[-1].name.removeprefix("step-"))
    assert output.endswith(f"complete at step {total}: {folder}\n")
    assert _calls(repository).count("scontrol requeue 20077") == 1
    logs = {path.name: path.read_text() for path in (repository / "outputs" / "slurm").iterdir()}
    assert logs.keys() == {f"20077-start-{start}-node{node}.log" for start in (0, 1) for node in (0, 1)}
    assert sum(f"resumed from step {step}" in text for name, text in logs.items() if "start-1" in name) == 1
    assert not any("Traceback" in text for text in logs.values())
    run_distributed(train, 2, [*argv, f"--job.dump_folder={whole}"])
    assert differences(whole, folder, total) == []
    assert audit_faults(folder) == []
