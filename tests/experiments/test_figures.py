"""The fit to the paper's trade-off, and the simulated order of its methods."""

from __future__ import annotations

import numpy as np
import pytest

from hbp_titan.experiments.paper.figures import (
    METHODS,
    PAPER_MODELS,
    TRADE_OFFS,
    PaperFit,
    fit_table,
    fit_trade_offs,
    models_table,
    predict_methods,
    predict_models,
    prediction_table,
)
from hbp_titan.tuning.simulate import tulu3_longcite_like

LENGTHS = tulu3_longcite_like(50_000)


@pytest.fixture(scope="module")
def fit() -> PaperFit:
    return fit_trade_offs(LENGTHS)


def test_trade_off_fits_within_three_percent(fit: PaperFit) -> None:
    residuals = fit.predicted / np.array([row.seconds for row in TRADE_OFFS]) - 1
    assert np.abs(residuals).max() < 0.03
    # With coefficients that are physically possible.
    assert 0.2 < fit.model.hardware.linear_efficiency < 0.7
    assert 0 < fit.model.fixed_seconds < 0.2


def test_methods_keep_the_order_of_the_paper(fit: PaperFit) -> None:
    predictions = dict(predict_methods(LENGTHS, fit.model))
    assert list(predictions) == list(METHODS)
    days = {row.name: p.replay.gpu_days for row, p in predictions.items()}
    for slow, fast in (
        ("no packing", "random"),
        ("random", "isf"),
        ("isf", "hbp, unbalanced"),
        ("isf", "flexsp"),
        ("flexsp", "hbp"),
        ("hbp, unbalanced", "hbp, 32K+128K"),
        ("hbp, 32K+128K", "hbp"),
    ):
        assert days[slow] > days[fast], (slow, fast)
    cr = {row.name: (row.cr, p.cr) for row, p in predictions.items()}
    for name in ("hbp", "flexsp", "isf", "hbp, 32K+128K"):
        paper, simulated = cr[name]
        assert paper is not None
        assert abs(paper - simulated) < 0.03
    table = prediction_table(predictions).splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == [row.name for row in METHODS]
    assert len(fit_table(fit).splitlines()) == 4 + len(TRADE_OFFS)


def test_larger_models_are_predicted(fit: PaperFit) -> None:
    predictions = list(predict_models(LENGTHS, fit.model))
    assert [row.flavor for row, _ in predictions] == [row.flavor for row in PAPER_MODELS]
    assert all(simulated > 1.0 for _, simulated in predictions)
    assert len(models_table(iter(predictions)).splitlines()) == 2 + len(PAPER_MODELS)
