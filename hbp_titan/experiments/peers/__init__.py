"""Head-to-head with other trainers: same weights, samples, masks and optimizer; loss, speed, and what was trained."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> None:
    """Run the command of `python -m hbp_titan.experiments.peers`."""
    # Not at the top: the runners' modules are imported on their own, without the trainer.
    from hbp_titan.experiments.peers.__main__ import main as run

    run(argv)
