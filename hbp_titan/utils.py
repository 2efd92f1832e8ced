"""Helpers that several packages share: one function per concept."""

from __future__ import annotations


def human_count(value: float, thousand: int = 1000) -> str:
    """A number in a few characters: 1.5M, 16K (thousand = 1024 for lengths), 0.25."""
    for size, unit in ((thousand**3, "G"), (thousand**2, "M"), (thousand, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
