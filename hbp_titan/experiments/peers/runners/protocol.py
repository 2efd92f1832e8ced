"""The request that a runner reads and the result that it writes, both JSON; standard library only.

Owns the settings that all peers share, and what each has to report. The tokens that reached the model are in
rank-N.npz next to the result (recording.py).
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

IGNORE_INDEX = -100
RESULT = "result.json"


@dataclass(frozen=True)
class Request:
    """One run of one peer.

    Args:
        peer, variant: the row of the table, and the settings of its runner that differ from other rows.
        model: HF folder with the initial weights and the tokenizer, the same for every peer.
        train: JSONL of samples: input_ids, labels (IGNORE_INDEX where not trained), messages.
        output: folder for result.json, rank-N.npz and model/ with the final weights.
        max_tokens: longest row of a packing peer; no sample is longer.
        global_batch_tokens: real tokens per optimizer step, all ranks; approximate, because samples stay whole.
        mean_tokens, num_samples: of the samples.
        micro_batch_rows: rows of one forward pass of a padding peer.
        steps: optimizer steps; 0 trains one epoch.
        lr: constant, without warm-up: the peers' other schedules differ by a step.
        probe_tokens: tokens at the start of a row that the document probe changes; at most the shortest sample.
    """

    peer: str
    variant: dict[str, Any]
    model: str
    train: str
    output: str
    max_tokens: int
    global_batch_tokens: int
    mean_tokens: float
    num_samples: int
    micro_batch_rows: int
    steps: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_norm: float
    seed: int
    device: str
    dtype: str
    probe_tokens: int

    @property
    def folder(self) -> Path:
        """Folder of the results."""
        return Path(self.output)

    def packs_per_step(self, world_size: int) -> int:
        """Rows of max_tokens per rank and optimizer step."""
        return max(round(self.global_batch_tokens / (self.max_tokens * world_size)), 1)

    def micro_batches_per_step(self, world_size: int) -> int:
        """Micro-batches of `micro_batch_rows` samples per rank and optimizer step."""
        rows = self.global_batch_tokens / self.mean_tokens
        return max(round(rows / (self.micro_batch_rows * world_size)), 1)

    def samples(self) -> list[dict[str, Any]]:
        """Return the rows of `train`."""
        with open(self.train, encoding="utf-8") as file:
            return [json.loads(line) for line in file]


@dataclass
class Result:
    """What a runner reports, in addition to the tokens.

    status: "ok", or "unavailable" with the reason if the peer or its best setting does not run here.
    versions: by package. settings: what the runner chose for the peer, for the page.
    losses, grad_norms, lrs [steps]: as the peer reports them; grad_norms before clipping, None where it reports none.
    weights: HF folder of the final weights.
    """

    status: str = "ok"
    reason: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    losses: list[float | None] = field(default_factory=list)
    grad_norms: list[float | None] = field(default_factory=list)
    lrs: list[float | None] = field(default_factory=list)
    world_size: int = 1
    weights: str = ""


def read_request(path: str | Path) -> Request:
    """Return the request in a JSON file; ValueError names a key that is missing or unknown."""
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        return Request(**values)
    except TypeError as error:
        raise ValueError(f"{path}: {error}; write the file with write_request") from None


def write_request(request: Request) -> Path:
    """Write request.json into the request's folder; return its path."""
    request.folder.mkdir(parents=True, exist_ok=True)
    path = request.folder / "request.json"
    path.write_text(json.dumps(asdict(request), indent=1) + "\n", encoding="utf-8")
    return path


def read_result(folder: Path) -> Result:
    """Return the result in a folder."""
    return Result(**json.loads((folder / RESULT).read_text(encoding="utf-8")))


def write_result(folder: Path, result: Result) -> None:
    """Write result.json."""
    (folder / RESULT).write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")


def write_once(path: Path, text: str, rank: int) -> Path:
    """Write a file on rank 0; the other ranks wait for it. There is no process group yet. Returns the path."""
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(path)
    deadline = time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > deadline:
            raise ValueError(f"{path}: rank 0 has not written it within 60 seconds; use a file system that ranks share")
        time.sleep(0.05)
    return path
