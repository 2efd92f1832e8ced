"""An epoch's predicted time, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hbp_titan.components.timing import LevelTimeModel, pack_loads, predict_epoch
from hbp_titan.packing import Level, build_plan


def test_an_iteration_takes_as_long_as_its_slowest_rank() -> None:
    # Two ranks: documents of 4 and of 2 + 2 tokens fill one iteration of one level.
    plan = build_plan([4, 2, 2], [Level(4)], world_size=2, method="hbp")
    assert sorted(map(tuple, pack_loads(plan).tolist())) == [(1, 2, 8, 2), (1, 3, 16, 1)]
    epoch = predict_epoch(plan, [LevelTimeModel(base=1.0, per_loss_token=0.1, per_square=0.01, per_document=0.2)], 0.5)
    #   1 + 0.3 + 0.16 + 0.2 = 1.66 and 1 + 0.2 + 0.08 + 0.4 = 1.68
    np.testing.assert_allclose(epoch.slowest, [1.68])
    np.testing.assert_allclose(epoch.mean, [1.67])
    assert epoch.seconds == pytest.approx(2.18)
    assert epoch.idle == pytest.approx(0.01 / 1.68)


def test_each_level_has_its_own_time() -> None:
    plan = build_plan([2, 2, 8], [Level(2), Level(8, cp_degree=2)], world_size=2, method="hbp")
    epoch = predict_epoch(plan, [LevelTimeModel(1.0), LevelTimeModel(10.0)])
    assert sorted(epoch.slowest.tolist()) == [1.0, 10.0]
    assert epoch.idle == 0.0
