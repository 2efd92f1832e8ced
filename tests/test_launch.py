"""The launcher of run_train.sh: a line for ranks that ended, whatever torchrun raises."""

from __future__ import annotations

import signal
from collections.abc import Sequence

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from hbp_titan.launch import main


def _failure(local_rank: int, exitcode: int, timestamp: int) -> ProcessFailure:
    failure = ProcessFailure(local_rank=local_rank, pid=100 + local_rank, exitcode=exitcode, error_file="none")
    failure.timestamp = timestamp
    return failure


FAILURES = {0: _failure(0, -signal.SIGKILL, 2000), 3: _failure(1, 1, 1000)}


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (None, 0, ""),
        (SignalException("", signal.SIGUSR1), 1, "torchrun: SIGUSR1 received, all ranks ended\n"),
        (
            ChildFailedError("train", FAILURES),
            1,
            "torchrun: rank 3 (pid 101) exited with code 1; rank 0 (pid 100) ended by SIGKILL\n",
        ),
    ],
)
def test_ended_ranks_are_one_line(
    capsys: pytest.CaptureFixture[str], raised: Exception | None, code: int, line: str
) -> None:
    def torchrun(argv: Sequence[str] | None) -> None:
        if raised is not None:
            raise raised

    assert main([], torchrun) == code
    assert capsys.readouterr().err == line
