"""What a run has done since its first step, by level and by source, and the tables of it.

Owns the sums over the records of metrics.jsonl, those before a resume among them. A skipped step trained nothing and
counts in neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hbp_titan.utils import human_count

SHOWN_SOURCES = 30


@dataclass
class LevelTotals:
    """positions: tokens with the padding. waiting: seconds, the ranks' mean. work_mfu: sum of MFU times seconds; None
    where it is unknown. Losses are those of the first and the last step."""

    iterations: int = 0
    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    work_mfu: float | None = 0.0
    first_loss: float | None = None
    last_loss: float | None = None

    def add(self, record: Mapping[str, Any], loss: float | None) -> None:
        """Count a level's entry of `per_level`; loss: its mean per trained token."""
        self.iterations += record["iterations"]
        self.tokens += record["tokens"]
        self.positions += record["positions"]
        self.seconds += record["seconds"]
        self.waiting += record["waiting_seconds"]
        unknown = self.work_mfu is None or record["mfu"] is None
        self.work_mfu = None if unknown else self.work_mfu + record["mfu"] * record["seconds"]
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = self.last_loss if loss is None else loss


class RunTotals:
    """`add` the record of every step. sources: counts by the names of metrics.jsonl; levels: by their names."""

    def __init__(self) -> None:
        self.sources: dict[str, Counter[str]] = {}
        self.levels: dict[str, LevelTotals] = {}
        self.tokens = 0
        self.seconds = 0.0
        self.data_wait = 0.0

    def add(self, record: Mapping[str, Any]) -> None:
        """Count one step."""
        self.seconds += record["step_seconds"]
        self.data_wait += record["data_wait_seconds"]
        if "skipped" in record:
            return
        self.tokens += record["tokens"]
        for name, counts in record["sources"].items():
            counted = self.sources.setdefault(name, Counter())
            counted.update({key: counts[key] for key in ("samples", "tokens", "trained_tokens")})
        for name, done in record["per_level"].items():
            self.levels.setdefault(name, LevelTotals()).add(done, record["loss_by_level"][name])

    def describe(self) -> str:
        """Tables of levels and of sources, the largest first, and the time spent waiting for data; 80 columns."""
        lines = [
            f"{'level':<11}{'iterations':>11}{'tokens':>8}{'time':>9}{'tok/s':>7}{'mfu':>7}{'padding':>9}{'waiting':>9}"
        ]
        lines += [_level_line(name, total) for name, total in self.levels.items()]
        lines += [_loss_line(name, total) for name, total in self.levels.items()]
        lines += self._source_lines()
        share = self.data_wait / max(self.seconds, 1e-9)
        return "\n".join([*lines, f"waiting for data: {self.data_wait:.2f} s of {self.seconds:.1f} s, {share:.2%}"])

    def _source_lines(self) -> list[str]:
        shown = sorted(self.sources, key=lambda name: -self.sources[name]["tokens"])
        lines = [f"{'source':<32}{'samples':>12}{'tokens':>15}{'trained':>15}"]
        for name in shown[:SHOWN_SOURCES]:
            counts = self.sources[name]
            lines.append(
                f"{name[:31]:<32}{counts['samples']:>12,}{counts['tokens']:>15,}{counts['trained_tokens']:>15,}"
            )
        if len(shown) > SHOWN_SOURCES:
            lines.append(f"... and {len(shown) - SHOWN_SOURCES} smaller sources (metrics.jsonl has all)")
        return lines


def _level_line(name: str, total: LevelTotals) -> str:
    seconds = max(total.seconds, 1e-9)
    mfu = "-" if total.work_mfu is None else f"{total.work_mfu / seconds:.1f}%"
    return (
        f"{name:<11}{total.iterations:>11,}{human_count(total.tokens):>8}{clock(total.seconds):>9}"
        f"{human_count(total.tokens / seconds):>7}{mfu:>7}{1 - total.tokens / total.positions:>9.1%}"
        f"{total.waiting / seconds:>9.1%}"
    )


def _loss_line(name: str, total: LevelTotals) -> str:
    first, last = ("-" if loss is None else f"{loss:.4f}" for loss in (total.first_loss, total.last_loss))
    return f"{name:<11}loss {first} -> {last}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
