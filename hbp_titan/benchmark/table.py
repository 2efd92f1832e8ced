"""The table of a benchmark: one Markdown row a measurement.

Owns the columns and how a measurement is compared with the same level without recomputation.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from hbp_titan.benchmark.bench import Measurement

COLUMNS = (
    ("model", 12),
    ("layers", 6),
    ("length", 7),
    ("cp", 2),
    ("documents", 11),
    ("compile", 7),
    ("policy", 16),
    ("tokens/s", 9),
    ("TFLOP/s", 7),
    ("MFU", 6),
    ("peak GiB", 8),
    ("B/token/layer", 13),
    ("seconds", 8),
    ("time / none", 18),
    ("FLOPs / none", 12),
)


def header() -> str:
    """The two lines above the rows."""
    rule = "|".join("-" * (width + 2) for _, width in COLUMNS)
    return f"{_line([name for name, _ in COLUMNS])}\n|{rule}|"


def rows(group: Sequence[Measurement], peak_flops: float | None) -> list[str]:
    """One line for each policy of a level. peak_flops: FLOP/s of a rank's device, None where it is not known."""
    base = next((m for m in group if m.ac_policy == "none"), None)
    return [_line(_cells(m, base, peak_flops)) for m in group]


def relative_times(found: Measurement, base: Measurement | None) -> tuple[float, float, float] | None:
    """(median, least, greatest) over the rounds of the time of `found` / `base`; None where one did not fit."""
    if base is None or not found.fits or not base.fits:
        return None
    ratios = [a / b for a, b in zip(found.seconds, base.seconds, strict=True)]
    return median(ratios), min(ratios), max(ratios)


def _cells(found: Measurement, base: Measurement | None, peak_flops: float | None) -> list[str]:
    policy = found.ac_policy if found.ac_layers is None else f"{found.ac_policy}:{found.ac_layers}"
    level = [found.model, str(found.layers), str(found.max_tokens), str(found.cp_degree), found.documents]
    level += ["on" if found.compile else "off", policy]
    saved = "-" if found.saved_bytes is None else f"{found.saved_bytes:,.0f}"
    flops_ratio = f"{found.flops_ratio:.2f}"
    if found.peak_bytes is None or not found.fits:
        return [*level, "out of memory", "", "", "", saved, "", "", flops_ratio]
    seconds = median(found.seconds)
    achieved = found.flops / seconds
    relative = relative_times(found, base)
    return [
        *level,
        f"{found.tokens / seconds:,.0f}",
        f"{achieved / 1e12:.3g}",
        f"{achieved / peak_flops:.1%}" if peak_flops else "-",
        f"{found.peak_bytes / 2**30:.3g}",
        saved,
        f"{seconds:.4g}",
        "-" if relative is None else "{:.2f} ({:.2f}-{:.2f})".format(*relative),
        flops_ratio,
    ]


def _line(cells: Sequence[str]) -> str:
    padded = (cell.ljust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True))
    return f"| {' | '.join(padded)} |"
