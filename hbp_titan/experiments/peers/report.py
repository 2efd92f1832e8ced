"""The table of a comparison, as Markdown and JSON.

Owns the rows: speed against the reference peer within a round, what was trained, and the verdicts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from hbp_titan.experiments.peers.audit import LEAK, Audit
from hbp_titan.experiments.peers.normalization import Normalization
from hbp_titan.experiments.peers.runners.protocol import Result

WARM_UP = 1
"""First optimizer steps that the speed excludes."""


@dataclass
class Outcome:
    """What one peer did in all rounds. audits, results: one per finished round. held_out: loss of the final weights."""

    name: str
    note: str
    results: list[Result] = field(default_factory=list)
    audits: list[Audit] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    normalization: Normalization | None = None

    @property
    def ran(self) -> bool:
        """Whether every round finished."""
        return bool(self.results) and all(result.status == "ok" for result in self.results)

    def tokens_per_second(self) -> list[float]:
        """Return real tokens per second of each round, without the first step."""
        return [sum(audit.per_step[WARM_UP:]) / sum(audit.seconds[WARM_UP:]) for audit in self.audits]

    def tokens_per_cpu_second(self) -> list[float]:
        """Return real tokens per CPU second of each round, without the first step."""
        return [sum(audit.per_step[WARM_UP:]) / max(sum(audit.cpu_seconds[WARM_UP:]), 1e-9) for audit in self.audits]

    def comparable(self, whole_epoch: bool, max_doubled: float) -> bool:
        """Return whether every round trained what it was given."""
        return self.ran and all(audit.comparable(whole_epoch, max_doubled) for audit in self.audits)

    def verdicts(self, whole_epoch: bool) -> dict[str, str]:
        """Return what the peer trained, in words, by the name of the check."""
        audit = self.audits[0]
        leak = "-" if audit.leak is None else "no" if audit.leak <= LEAK else f"YES ({audit.leak:.1%})"
        return {
            "difference in samples and masks": "; ".join(audit.differences(whole_epoch)) or "none",
            "documents attend to each other": leak,
            "loss": self.normalization.verdict if self.normalization else "-",
        }


def ratios(own: Sequence[float], base: Sequence[float]) -> str:
    """Return median and range of a speed over the reference's in the same round: load changes more between rounds."""
    found = [value / reference for value, reference in zip(own, base, strict=True)]
    return f"{median(found):.2f} ({min(found):.2f}-{max(found):.2f})"


def table(outcomes: Sequence[Outcome], whole_epoch: bool, max_doubled: float) -> str:
    """Return one row per peer; the first comparable one is the reference of the speeds."""
    base = next((outcome for outcome in outcomes if outcome.comparable(whole_epoch, max_doubled)), None)
    if base is None:
        raise ValueError("no peer trained the samples that it was given, so there is nothing to compare")
    names = ("difference in samples and masks", "documents attend to each other", "loss")
    speeds = (f"speed / {base.name} (range)", "the same by CPU time", "tokens/s")
    columns = ("peer", "setting", *speeds, "padding", "steps", "held-out loss", *names)
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for outcome in outcomes:
        if not outcome.ran:
            reason = next(result for result in outcome.results if result.status != "ok")
            lines.append(f"| {outcome.name} | {outcome.note} | {reason.status}: {_cell(reason.reason)} |" + " - |" * 8)
            continue
        audit, words = outcome.audits[0], outcome.verdicts(whole_epoch)
        if outcome.comparable(whole_epoch, max_doubled):
            speed = ratios(outcome.tokens_per_second(), base.tokens_per_second())
            speed += " | " + ratios(outcome.tokens_per_cpu_second(), base.tokens_per_cpu_second())
            rate, loss = f"{median(outcome.tokens_per_second()):,.0f}", f"{median(outcome.held_out):.4f}"
        else:
            speed, rate, loss = "not comparable | -", "-", "-"
        padding = audit.padding / max(audit.padding + audit.tokens, 1)
        lines.append(
            f"| {outcome.name} | {outcome.note} | {speed} | {rate} | {padding:.1%} | {len(audit.per_step)} | {loss} | "
            + " | ".join(words[name] for name in names)
            + " |"
        )
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def as_json(outcomes: Sequence[Outcome], whole_epoch: bool, max_doubled: float) -> list[dict[str, Any]]:
    """Return everything that was measured."""
    return [
        {
            "peer": outcome.name,
            "setting": outcome.note,
            "comparable": outcome.comparable(whole_epoch, max_doubled),
            "tokens_per_second": outcome.tokens_per_second(),
            "tokens_per_cpu_second": outcome.tokens_per_cpu_second(),
            "held_out_loss": outcome.held_out,
            "verdicts": outcome.verdicts(whole_epoch) if outcome.audits else {},
            "normalization": dataclasses.asdict(outcome.normalization) if outcome.normalization else None,
            "audits": [dataclasses.asdict(audit) for audit in outcome.audits],
            "results": [dataclasses.asdict(result) for result in outcome.results],
        }
        for outcome in outcomes
    ]


def versions_line(outcomes: Sequence[Outcome]) -> str:
    """Return the versions that ran."""
    parts = []
    for outcome in outcomes:
        found = next((result.versions for result in outcome.results if result.versions), {})
        parts.append(f"{outcome.name}: {', '.join(f'{name} {version}' for name, version in found.items()) or 'none'}")
    return "; ".join(parts)
