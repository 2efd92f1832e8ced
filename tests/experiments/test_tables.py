"""Tables and chart of a study whose figures can be checked by hand."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

from hbp_titan.experiments.study.quality import band_table, draw, loss_table, plan_table


def _run(variant: str, seed: int, loss: float, long: float, steps: int = 60) -> dict[str, Any]:
    return {
        "variant": variant,
        "seed": seed,
        "loss": loss,
        "best": loss - 0.5,
        "steps": steps,
        "by_length": {"1024": {"loss": long, "trained_tokens": 900}, "256": {"loss": 1.0, "trained_tokens": 1000}},
        "step_tokens": [4000.0, 100.0],
        "weight_ratio": 2.0,
    }


STUDY: dict[str, Any] = {
    "variants": {"hbp": "the default", "isf": "", "sum": ""},
    "plans": {
        name: {"abr": 0.25, "dbr": 0.1, "cr": 1.0, "pr": 0.0, "trained_spread": 0.125, "long_spread": 0.5}
        for name in ("hbp", "isf", "sum")
    },
    "runs": [
        *(_run("hbp", seed, 4.0 + seed, 2.0) for seed in (1, 2, 3)),
        # Differences 1, 2 and 3, and in the long band 0.1 each time.
        *(_run("isf", seed, 4.0 + 2 * seed, 2.1, 59 + seed) for seed in (1, 2, 3)),
        # One seed alone: no interval.
        _run("sum", 1, 5.0, 2.0),
    ],
}


def test_losses_stand_beside_their_differences_seed_by_seed() -> None:
    rows = loss_table(STUDY).splitlines()
    # Standard deviation of 5, 6, 7 is 1, of 6, 8, 10 is 2; the interval is that of 1, 2, 3: 2 +- 4.303 / sqrt(3).
    assert rows[2] == "| hbp | 60 | 6.0000 +- 1.0000 | 5.5000 +- 1.0000 |  |  |  |"
    assert rows[3] == (
        "| isf | 60-62 | 8.0000 +- 2.0000 | 7.5000 +- 2.0000 | +2.0000 (-0.4841 to +4.4841) | 0.074 | no |"
    )
    assert rows[4] == "| sum | 60 | 5.0000 | 4.5000 |  |  |  |"


def test_more_comparisons_need_more_evidence() -> None:
    # Differences 1.9, 2.0 and 2.1: t is 20 * sqrt(3) = 34.64, p with two degrees 1 - t / sqrt(2 + t^2) = 0.00083.
    near = [_run("isf", seed, 4.0 + seed + 1.8 + 0.1 * seed, 2.1) for seed in (1, 2, 3)]
    runs = [*STUDY["runs"][:3], *near]
    for others, verdict in ((1, "yes"), (60, "yes"), (61, "no")):
        names = [f"v{number}" for number in range(others - 1)]
        study = {
            "variants": dict.fromkeys(["hbp", "isf", *names], ""),
            "runs": runs + [_run(v, 1, 9, 9) for v in names],
        }
        assert loss_table(study).splitlines()[3].endswith(f"| < 0.001 | {verdict} |"), others


def test_length_bands_ascend_and_what_excludes_0_is_bold() -> None:
    rows = band_table(STUDY).splitlines()
    assert rows[0] == "| variant | 1 to 256 tokens (1,000 trained) | 513 to 1K tokens (900 trained) |"
    assert rows[2] == "| hbp | 1.0000 +- 0.0000 | 2.0000 +- 0.0000 |"
    assert rows[3] == "| isf | +0.0000 (+0.0000 to +0.0000) | **+0.1000 (+0.1000 to +0.1000)** |"


def test_plans_and_steps_are_told() -> None:
    assert plan_table(STUDY).splitlines()[3] == "| isf | 0.250 | 1.000 | 0.000 | 4,000 +- 100 | 12.5% | 50.0% | 2 |"


def test_the_chart_has_a_row_for_each_variant_with_an_interval() -> None:
    root = ET.fromstring(draw(STUDY))
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "all lengths: loss - hbp's" in texts
    assert "513 to 1K tokens: loss - hbp's" in texts
    # Once in each panel.
    assert (texts.count("isf"), texts.count("hbp"), texts.count("sum")) == (2, 0, 0)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 6
    lefts = [float(c.attrib["cx"]) for c in root.iter("{http://www.w3.org/2000/svg}circle")][:3]
    assert lefts == sorted(lefts)
