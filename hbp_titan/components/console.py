"""What the console shows while a run trains, in lines of at most 80 columns.

Owns the parts of a step's line, their order, and which of them give way; and how lines are filled and broken.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from hbp_titan.components.run_totals import clock
from hbp_titan.utils import human_count

COLUMNS = 80
_GIVE_WAY = ("memory", "waiting", "grad", "mfu", "experts")
"""Parts that are left out of a longer line, the first of them first."""


def step_line(record: Mapping[str, Any], total_steps: int, seconds_left: float) -> str:
    """One optimizer step: number, level, loss, gradient norm, speed, MFU, waiting, memory, time to finish."""
    mfu, idle, experts = record["mfu"], record["idle_share"], record.get("expert_load")
    parts = {
        "step": f"{record['step']:>{len(str(total_steps))}}/{total_steps}",
        "level": record["level_name"],
        "loss": f"loss {number(record['loss'], 6, 4)}",
        "grad": f"grad {number(record['grad_norm'], 5, 3)}",
        "speed": f"{human_count(record['tokens_per_second'])} tok/s",
        "mfu": "" if mfu is None else f"mfu {mfu:.1f}%",
        "experts": f"experts {experts['worst']:.2f}x" if experts else "",
        "waiting": "" if idle is None else f"idle {idle:.0%}",
        "memory": f"{record['peak_memory_gib']:.1f}G",
        "left": f"eta {clock(seconds_left)}",
    }
    for name in ("", *_GIVE_WAY):
        parts.pop(name, None)
        line = "  ".join(part for part in parts.values() if part)
        if len(line) <= COLUMNS:
            break
    return line


def number(value: float | None, width: int, digits: int) -> str:
    """A figure of metrics.jsonl; "nan" where it is None."""
    return f"{'nan':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def filled(parts: Iterable[str]) -> list[str]:
    """As many of `parts` to an indented line as it holds."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 3 + len(part) <= COLUMNS:
            lines[-1] += f"   {part}"
        else:
            lines.append(f"    {part}")
    return lines


def fit(text: str) -> str:
    """`text` with its longer lines broken and indented; a word that is longer than a line stays whole."""
    lines = []
    for line in text.splitlines():
        broken = textwrap.wrap(line, COLUMNS, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        lines += broken if len(line) > COLUMNS else [line]
    return "\n".join(lines)
