"""The peers: which program runs each, with which settings, and how a run is started.

Owns the rows of the comparison and the start of one run in the peer's own Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hbp_titan
from hbp_titan.experiments.peers.runners.protocol import RESULT, Request, Result, read_result, write_request
from hbp_titan.utils import did_you_mean

RUNNERS = "peer_runners"
"""Name of the copied folder of runners as a package."""
OURS = "ours"
DEFAULT_PEERS = "transformers,transformers_packed,trl,torchtitan,llamafactory,swift,ours_flat,ours_flat_sorted,ours_hbp"


@dataclass(frozen=True)
class Peer:
    """A row of the comparison. environment: whose Python runs it (--python). module: its runner. note: its setting."""

    environment: str
    module: str
    note: str
    variant: dict[str, Any] = field(default_factory=dict)


def _transformers(note: str, rows: str, normalization: str = "tokens") -> Peer:
    return Peer("transformers", "run_transformers", note, {"rows": rows, "normalization": normalization})


PEERS: dict[str, Peer] = {
    "transformers": _transformers("plain loop, padded", "padded"),
    "transformers_packed": _transformers("plain loop, packed, position_ids", "packed"),
    "transformers_mean": _transformers("plain loop, padded, mean of micro-batch means", "padded", "micro_batches"),
    "trl": Peer("trl", "run_trl", 'packing="bfd", padding-free', {"packing": "bfd"}),
    "trl_padded": Peer("trl", "run_trl", "padded (its default)", {"packing": ""}),
    "trl_wrapped": Peer("trl", "run_trl", 'packing="wrapped"', {"packing": "wrapped"}),
    "torchtitan": Peer("torchtitan", "run_torchtitan", "ChatDataset, greedy packing"),
    "llamafactory": Peer("llamafactory", "run_llamafactory", "neat_packing", {"packing": "neat"}),
    "llamafactory_packing": Peer("llamafactory", "run_llamafactory", "packing", {"packing": "packing"}),
    "llamafactory_padded": Peer("llamafactory", "run_llamafactory", "padded (its default)", {"packing": ""}),
    "swift": Peer("swift", "run_swift", "packing, padding-free", {"packing": True}),
    "swift_padded": Peer("swift", "run_swift", "padded (its default)", {"packing": False}),
    "ours_flat": Peer(OURS, "", "one length, ISF packing", {"method": "isf"}),
    "ours_flat_sorted": Peer(OURS, "", "one length, flat + sort", {"method": "flat_sorted"}),
    "ours_hbp": Peer(OURS, "", "HBP, two levels", {"method": "hbp"}),
}


def parse_peers(text: str) -> list[str]:
    """Return the names in "trl,ours_hbp"; ValueError for an unknown or repeated one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PEERS:
            raise ValueError(f"--peers: {name!r} must be one of {', '.join(PEERS)}{did_you_mean(name, PEERS)}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"--peers {text!r}: must be different names, comma-separated")
    return names


def parse_pythons(entries: Sequence[str]) -> dict[str, str]:
    """Return the Python of each environment from "trl=/path/to/python"; the others use this one."""
    known = sorted({peer.environment for peer in PEERS.values()} - {OURS})
    pythons = {}
    for entry in entries:
        name, _, path = entry.partition("=")
        if name not in known:
            raise ValueError(f"--python {entry}: {name!r} must be one of {', '.join(known)}, as in trl=/path/to/python")
        if not os.access(path, os.X_OK):
            raise ValueError(f"--python {entry}: {path!r} is not an executable file; pass the environment's python")
        pythons[name] = path
    return pythons


@dataclass(frozen=True)
class Launcher:
    """Starts runs. folder: of the comparison. pythons: by environment. timeout: seconds after which a run failed."""

    folder: Path
    nproc: int
    pythons: Mapping[str, str]
    threads: int
    timeout: float

    def copy_runners(self) -> None:
        """Copy the runners next to the results."""
        target = self.folder / "code" / RUNNERS
        shutil.rmtree(target, ignore_errors=True)
        source = Path(__file__).parent / "runners"
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))

    def command(self, peer: Peer, request: Path) -> list[str]:
        """Return the command of a run."""
        ranks = [f"--nproc-per-node={self.nproc}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        if peer.environment == OURS:
            return [sys.executable, "-m", "hbp_titan.launch", *ranks, "-m", f"{__package__}.ours", str(request)]
        python = self.pythons.get(peer.environment, sys.executable)
        return [python, "-m", "torch.distributed.run", *ranks, "-m", f"{RUNNERS}.{peer.module}", str(request)]

    def run(self, peer: Peer, request: Request) -> Result:
        """Run one peer; a failure is a result with the last line that names an error."""
        shutil.rmtree(request.folder, ignore_errors=True)
        path = write_request(request)
        root = Path(hbp_titan.__file__).resolve().parents[1] if peer.environment == OURS else self.folder / "code"
        environment = {
            **os.environ,
            "PYTHONPATH": str(root.resolve()),
            "OMP_NUM_THREADS": str(self.threads),
            # No peer downloads anything, and none reports anything.
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "WANDB_MODE": "disabled",
            "DISABLE_VERSION_CHECK": "1",
            **({"CUDA_VISIBLE_DEVICES": ""} if request.device == "cpu" else {}),
        }
        log = request.folder / "log.txt"
        with log.open("w", encoding="utf-8") as file:
            try:
                status = subprocess.run(
                    self.command(peer, path),
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=self.timeout,
                ).returncode
            except subprocess.TimeoutExpired:
                return Result("failed", f"not finished after {self.timeout:.0f} s; raise --timeout ({log})")
        if status or not (request.folder / RESULT).exists():
            return failure(peer, log.read_text(encoding="utf-8", errors="replace"), log)
        return read_result(request.folder)


def failure(peer: Peer, text: str, log: Path) -> Result:
    """Return the result of a run that failed; a package that is not there makes the peer unavailable."""
    error = last_error(text)
    if "ModuleNotFoundError" in error or "PackageNotFoundError" in error:
        advice = f"install it, or pass --python {peer.environment}=PATH"
        return Result("unavailable", f"{error}; {advice} ({log})")
    return Result("failed", f"{error} ({log})")


def last_error(log: str) -> str:
    """Return the line of a log that names the error: the last one of a traceback, else the last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line and "ChildFailedError" not in line]
    return (named or lines or ["no output"])[-1][:300]
