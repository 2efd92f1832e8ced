"""The recall task: whether a model trained through the whole recipe reads what is far apart, and when it cannot.

documents.py makes the data, runs.py trains on real ranks, sound or with a fault, report.py draws accuracy by distance.
"""

from __future__ import annotations


def main(argv: list[str] | None = None) -> None:
    """Run the command of `python -m hbp_titan.experiments.recall`."""
    # Not at the top: the quality study imports the documents without the command.
    from hbp_titan.experiments.recall.__main__ import main as run

    run(argv)
