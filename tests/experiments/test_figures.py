"""The fit to the paper's trade-off, and the simulated order of its methods."""

from __future__ import annotations

import numpy as np

from hbp_titan.experiments.paper.figures import (
    METHODS,
    PAPER_MODELS,
    TRADE_OFFS,
    fit_table,
    fit_trade_offs,
    models_table,
    predict_methods,
    predict_models,
    prediction_table,
)
from hbp_titan.tuning.simulate import tulu3_longcite_like

LENGTHS = tulu3_longcite_like(50_000)
FIT = fit_trade_offs(LENGTHS)


def test_trade_off_fits_within_three_percent() -> None:
    residuals = FIT.predicted / np.array([row.seconds for row in TRADE_OFFS]) - 1
    assert np.abs(residuals).max() < 0.03
    # With coefficients that are physically possible.
    assert 0.2 < FIT.model.hardware.linear_efficiency < 0.7
    assert 0 < FIT.model.fixed_seconds < 0.2


def test_methods_keep_the_order_of_the_paper() -> None:
    predictions = dict(predict_methods(LENGTHS, FIT.model))
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
    assert len(fit_table(FIT).splitlines()) == 4 + len(TRADE_OFFS)


def test_larger_models_are_predicted() -> None:
    predictions = list(predict_models(LENGTHS, FIT.model))
    assert [row.flavor for row, _ in predictions] == [row.flavor for row in PAPER_MODELS]
    assert all(simulated > 1.0 for _, simulated in predictions)
    assert len(models_table(iter(predictions)).splitlines()) == 2 + len(PAPER_MODELS)
