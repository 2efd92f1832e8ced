"""The quality study: settings, statistics against tables, Markdown tables and chart by hand, a whole small study."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from hbp_titan.experiments.study.built_in import study_config
from hbp_titan.experiments.study.quality import (
    band_table,
    draw,
    loss_table,
    paired_difference,
    plan_table,
    recall_table,
    t_probability,
    t_quantile,
)
from scripts import quality_study
from tests.programs import run_python
from tests.tiny_run import write_tiny_run


@pytest.mark.parametrize(
    ("probability", "degrees", "t"),
    # From the printed table of Student's t.
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 4, 2.776), (0.995, 3, 5.841), (0.975, 30, 2.042), (0.9, 9, 1.383)],
)
def test_t_quantiles_equal_the_printed_table(probability: float, degrees: int, t: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(t, abs=5e-4)
    assert t_probability(t, degrees) == pytest.approx(2 * probability - 1, abs=1e-4)


def test_paired_difference_by_hand() -> None:
    # Differences 1, 2 and 3: mean 2, standard error 1 / sqrt(3), t of two degrees 4.303.
    difference = paired_difference([11.0, 102.0, 1003.0], [10.0, 100.0, 1000.0])
    assert difference.mean == pytest.approx(2)
    assert difference.low == pytest.approx(2 - 4.303 / math.sqrt(3), abs=1e-3)
    assert difference.high == pytest.approx(2 + 4.303 / math.sqrt(3), abs=1e-3)
    # t = 2 * sqrt(3) = 3.4641 with two degrees: p = 1 - t / sqrt(2 + t^2) = 0.0742.
    assert difference.p == pytest.approx(1 - 3.4641 / math.sqrt(14), abs=1e-4)
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).p == 1
    assert paired_difference([2.0, 3.0], [1.0, 2.0]).p == 0


def _run(variant: str, seed: int, loss: float, long: float, samples: int = 60) -> dict[str, Any]:
    return {
        "variant": variant,
        "seed": seed,
        "loss": loss,
        "steps": 60,
        "samples": samples,
        "recall": {"1024": {"answers": 40, "correct": 10 + seed}, "256": {"answers": 10, "correct": seed}},
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
        # One seed: no interval.
        _run("sum", 1, 5.0, 2.0),
    ],
}


def test_loss_table_by_hand() -> None:
    rows = loss_table(STUDY).splitlines()
    # Standard deviation of 5, 6, 7 is 1, of 6, 8, 10 is 2; the interval is that of 1, 2, 3: 2 +- 4.303 / sqrt(3).
    assert rows[2] == "| hbp | 60 | 60 | 6.0000 +- 1.0000 |  |  |  |"
    assert rows[3] == "| isf | 60 | 60-62 | 8.0000 +- 2.0000 | +2.0000 (-0.4841 to +4.4841) | 0.074 | no |"
    assert rows[4] == "| sum | 60 | 60 | 5.0000 |  |  |  |"


def test_significance_depends_on_the_number_of_comparisons() -> None:
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


def test_band_table_by_hand() -> None:
    rows = band_table(STUDY).splitlines()
    assert rows[0] == "| variant | 1 to 256 tokens (1,000 trained) | 257 to 1K tokens (900 trained) |"
    assert rows[2] == "| hbp | 1.0000 +- 0.0000 | 2.0000 +- 0.0000 |"
    assert rows[3] == "| isf | +0.0000 (+0.0000 to +0.0000) | **+0.1000 (+0.1000 to +0.1000)** |"


def test_recall_table_by_hand() -> None:
    rows = recall_table(STUDY).splitlines()
    assert rows[0] == "| variant | 1 to 256 tokens back (10 answers) | 257 to 1K tokens back (40 answers) |"
    # 1, 2 and 3 of 10 are 10, 20 and 30%; 11, 12 and 13 of 40 are 27.5, 30 and 32.5%.
    assert rows[2] == "| hbp | 20.0 +- 10.0 | 30.0 +- 2.5 |"
    assert rows[3] == "| isf | +0.0 (+0.0 to +0.0) | +0.0 (+0.0 to +0.0) |"


def test_plan_table_by_hand() -> None:
    assert plan_table(STUDY).splitlines()[3] == "| isf | 0.250 | 1.000 | 0.000 | 4,000 +- 100 | 12.5% | 50.0% | 2 |"


def test_chart_has_a_row_per_variant_with_an_interval() -> None:
    root = ET.fromstring(draw(STUDY))
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    # Once in each panel; three differences there, 1, 2 and 3.
    assert (texts.count("isf"), texts.count("hbp"), texts.count("sum")) == (2, 0, 0)
    lefts = [float(circle.attrib["cx"]) for circle in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert lefts[:3] == sorted(lefts[:3])


def test_study_without_a_config_file_is_the_built_in_one(tmp_path: Path) -> None:
    config = study_config(["--optimizer.lr=1e-3"], tmp_path)
    assert [(level.max_tokens, level.cp_degree) for level in config.levels] == [(512, 1), (2048, 2), (8192, 4)]
    assert [source.name for source in config.data.sources] == ["", "recall"]
    assert (config.optimizer.lr, config.model.hf_path) == (1e-3, f"{tmp_path}/model")
    assert config.checkpoint.initial_load_path == f"{tmp_path}/base/seed-{{seed}}/hf"


def test_study_needs_levels_and_held_out_samples(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("")
    own = [f"--job.config_file={tmp_path / 'empty.toml'}"]
    with pytest.raises(ValueError, match="same levels"):
        study_config([*own, "--packing.auto_levels=true"], tmp_path)
    with pytest.raises(ValueError, match=r"data\.validation_files"):
        study_config([*own, "--levels=128:1"], tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1,x"], "--seeds 1,x"),
        (["--seeds", "2,2"], "--seeds 2,2"),
        (["--parallel", "0"], "--parallel 0"),
        (["--variants", "ifs"], "did you mean isf?"),
    ],
)
def test_mistakes_raise_before_training(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        quality_study.main([*words, "--folder", str(tmp_path / "study")])
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_study_is_trained_once_and_its_tables_are_of_its_runs(tmp_path: Path) -> None:
    argv = write_tiny_run(tmp_path)
    (tmp_path / "empty.toml").write_text("")
    words = [
        f"--job.config_file={tmp_path / 'empty.toml'}",
        *argv,
        f"--data.validation_files={tmp_path / 'train.jsonl'}",
    ]
    words += ["--checkpoint.enable=false", "--training.global_batch_tokens=1200", "--validation.interval=2"]
    words += ["--folder", str(tmp_path / "study"), "--variants", "sum", "--ranks", "2", "--parallel", "2"]
    result = run_python("scripts/quality_study.py", *words, "--seeds", "1,2", timeout=900)
    assert result.returncode == 0, result.stderr
    study = json.loads((tmp_path / "study" / "study.json").read_text())
    losses = {(run["variant"], run["seed"]): run["loss"] for run in study["runs"]}
    assert sorted(losses) == [("hbp", 1), ("hbp", 2), ("sum", 1), ("sum", 2)]
    assert len(set(losses.values())) == 4
    found = paired_difference([losses["sum", 1], losses["sum", 2]], [losses["hbp", 1], losses["hbp", 2]])
    assert f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})" in result.stdout
    for run in study["runs"]:
        assert [run["steps"], run["tokens"]] == [study["runs"][0]["steps"], study["runs"][0]["tokens"]]
        assert run["loss"] < run["course"][0][1]
        bands = run["by_length"].values()
        mean = sum(b["loss"] * b["trained_tokens"] for b in bands) / sum(b["trained_tokens"] for b in bands)
        assert mean == pytest.approx(run["loss"])
    assert (tmp_path / "study" / "tables.md").read_text().strip() in result.stdout
    assert "<svg" in (tmp_path / "study" / "quality.svg").read_text()

    again = run_python("scripts/quality_study.py", *words, "--seeds", "1,2", timeout=900)
    assert again.returncode == 0, again.stderr
    assert "4 runs, 4 already finished" in again.stdout
    assert json.loads((tmp_path / "study" / "study.json").read_text()) == study
