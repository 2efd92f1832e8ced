"""Ranks that start again over the store of those before them meet under a name of their own."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from hbp_titan.distributed.world import agree_on_prefix

TIMEOUT = timedelta(seconds=20)


def _start(store: dist.Store, ranks: list[int], found: dict[int, str], world_size: int) -> list[threading.Thread]:
    def meet(rank: int) -> None:
        found[rank] = agree_on_prefix(store, rank, world_size, TIMEOUT)

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("first", [[0, 1, 2], [1, 2, 0]])
def test_every_start_meets_under_one_new_name(first: list[int]) -> None:
    store = dist.HashStore()
    names = set()
    for _ in range(4):
        found: dict[int, str] = {}
        threads = _start(store, first[:1], found, 3)
        # The others come later: whoever waits sees what the start before has left for a while.
        time.sleep(0.2)
        for thread in [*threads, *_start(store, first[1:], found, 3)]:
            thread.join(30)
        assert len(found) == 3
        assert len(set(found.values())) == 1
        names |= set(found.values())
    assert len(names) == 4


def test_a_start_after_one_that_never_met_meets() -> None:
    store = dist.HashStore()
    # Rank 0 was killed when it had made its offer, rank 1 when it had joined.
    store.set("hbp_titan/offer", "gone")
    store.set("hbp_titan/gone/1", "dead")
    store.set("hbp_titan/gone", '["dead"]')
    found: dict[int, str] = {}
    threads = _start(store, [1], found, 2)
    time.sleep(0.2)
    assert not found
    for thread in [*threads, *_start(store, [0], found, 2)]:
        thread.join(30)
    assert found[0] == found[1] != "hbp_titan/gone"


def test_ranks_that_do_not_come_are_told() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1.*timed out"):
        agree_on_prefix(dist.HashStore(), 1, 2, timedelta(seconds=0.2))
    with pytest.raises(RuntimeError, match=r"rank 0.*timed out"):
        agree_on_prefix(dist.HashStore(), 0, 2, timedelta(seconds=0.2))
