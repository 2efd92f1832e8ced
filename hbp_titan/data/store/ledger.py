"""The sums of a store's ledger: every row and every sample accounted for.

Owns which counts of TokenStore.totals make up which.
"""

from __future__ import annotations

from collections.abc import Mapping


def check_ledger(totals: Mapping[str, int], samples: int) -> tuple[list[str], list[str]]:
    """The sums of a store's ledger (TokenStore.totals) as lines, and what does not add up to its `samples`."""
    outcomes = [key for key in totals if key.startswith("excluded: ")]
    sums = {
        "rows": ["whole", "truncated", "split", *outcomes, "not_chosen"],
        "samples_made": ["duplicate", "not drawn", "held out", "not held out", "trained"],
        "samples": ["trained", "copies"],
    }
    lines, faults = [], []
    for whole, parts in sums.items():
        text = " + ".join(f"{totals[part]:,} {part}" for part in parts if totals[part]) or "0"
        lines.append(f"ledger: {totals[whole]:,} {whole} = {text}")
        if totals[whole] != sum(totals[part] for part in parts):
            faults.append(f"ledger: {totals[whole]:,} {whole} are not {text}")
    if totals["samples"] != samples:
        faults.append(f"ledger: {totals['samples']:,} samples where the store has {samples:,}")
    return lines, faults
