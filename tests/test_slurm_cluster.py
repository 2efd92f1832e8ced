"""The SLURM script under a real SLURM: two nodes on this machine, without cgroups: signals reach every process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hbp_titan.components.checkpoint import completed_checkpoints
from hbp_titan.experiments.soak import audit_faults, differences, steps_done
from hbp_titan.testing.local_ranks import run_distributed
from tests.runs import train, wait_until
from tests.test_supervision import make_held
from tests.tiny_run import write_tiny_run

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "srun")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.name != "posix" or os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)),
        reason="needs root, slurm-wlm and munge; run: apt-get install slurm-wlm munge && "
        "scripts/run_tests.sh -m slow tests/test_slurm_cluster.py",
    ),
]
# Addresses as names: they resolve everywhere.
CONF = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/node-%n.log
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/node-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
MpiDefault=none
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cores} State=UNKNOWN
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cores} State=UNKNOWN
PartitionName=low Nodes=127.0.0.[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=high Nodes=127.0.0.[1-2] MaxTime=INFINITE PriorityTier=10
"""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _slurm(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "slurm"
    (folder / "state").mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    values = {"folder": folder, "host": socket.gethostname().split(".")[0], "ports": _free_ports(3)}
    (folder / "slurm.conf").write_text(CONF.format(cores=os.cpu_count(), **values))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("key-file", "socket", "pid-file", "log-file")]
    commands = [["munged", "--foreground", "--force", f"--seed-file={folder}/munge.seed", *munge]]
    commands += [["slurmctld", "-D"], *(["slurmd", "-D", "-N", f"127.0.0.{number}"] for number in (1, 2))]
    daemons = []
    try:
        for command in commands:
            daemons.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            if command[0] == "munged":
                wait_until((folder / "munge.socket").exists, *daemons)
        wait_until(lambda: _states() == {"idle"}, *daemons)
        yield
    finally:
        # The ranks of a test that failed would live on, and hold the port that the next cluster's first job uses.
        if len(daemons) == len(commands):
            subprocess.run(["scancel", *_slurm("squeue", "-h", "-o", "%i").split()], capture_output=True)
            wait_until(lambda: not _slurm("squeue", "-h"), *daemons)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def _states() -> set[str]:
    result = subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], capture_output=True, text=True)
    return set(result.stdout.split())


def _traps_signal(folder: Path) -> bool:
    """Whether the job's shell, a copy of the script in `folder`, has set its trap; earlier signals may kill it."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{folder}/slurm/spool" in (process / "cmdline").read_text():
                caught = re.search(r"SigCgt:\s*(\w+)", (process / "status").read_text())
                if caught and int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1:
                    return True
    return False


def _start_again(job: str) -> None:
    """Wait until the job is requeued, and start it without SLURM's pause of two minutes."""
    wait_until(lambda: _slurm("squeue", "-h", "-j", job, "-o", "%T %r") == "PENDING BeginTime")
    _slurm("scontrol", "update", f"jobid={job}", "StartTime=now")


@pytest.mark.usefixtures("cluster")
def test_job_signalled_at_its_start_and_preempted_ends_like_an_undisturbed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole, release = tmp_path / "run", tmp_path / "whole", tmp_path / "release"
    argv = [*write_tiny_run(tmp_path, 90), "--training.epochs=2", "--checkpoint.interval=1000", "--data.num_workers=1"]
    root = make_held(tmp_path / "checkout", release)
    monkeypatch.chdir(root)
    for name, value in {"NGPU": "1", "CONFIG_FILE": "tiny.toml", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    script = ["scripts/slurm_train.sbatch", *argv]
    job = _slurm("sbatch", "--parsable", "--nodes=2", "--time=1:00:00", "--output=job.out", *script)
    wait_until(lambda: _traps_signal(tmp_path))
    _slurm("scancel", "--signal=USR1", "--batch", job)
    _start_again(job)
    wait_until(lambda: steps_done(folder) >= 12)
    _slurm("sbatch", "-p", "high", "--nodes=2", "--exclusive", "--output=high.out", "--wrap=sleep 1")
    _start_again(job)
    release.touch()
    wait_until(lambda: not _slurm("squeue", "-h"))
    total = steps_done(folder)
    lines = (root / "job.out").read_text().splitlines()
    ends = [line for line in lines if "requeued" in line or line.startswith("complete")]
    assert ends == [
        "preempted before a step was saved at step 0: requeued",
        "preempted at step 13: requeued",
        f"complete at step {total}: {folder}",
    ]
    logs = [path.read_text() for path in (root / "outputs" / "slurm").glob("*.log")]
    assert not any("Traceback" in text for text in logs)
    run_distributed(train, 2, [*argv, f"--job.dump_folder={whole}"])
    assert completed_checkpoints(folder / "checkpoint")[-1].name == f"step-{total}"
    assert differences(whole, folder, total) == []
    assert audit_faults(folder) == []
