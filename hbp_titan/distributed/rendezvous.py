"""The store in which the ranks of one start meet, empty even where torchrun starts them again.

Owns the agreement on a name that no earlier start has used. torchrun's restarts hand every start the same store (torch
2.13), full of what the ranks before left: addresses of the dead, counts that are full already. Nor does it tell them
apart: each node counts its own restarts, and those of two nodes may differ.
"""

from __future__ import annotations

import json
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_MEND = "are all nodes started, with the same RDZV_ENDPOINT, RDZV_ID and NNODES, and is the port open?"
_POLL_SECONDS = 0.05


def fresh_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The job's store under a name that all ranks of this start have agreed on. Raises RuntimeError after `timeout`."""
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    return dist.PrefixStore(agree_on_name(store, rank, world_size, timeout), store)


def agree_on_name(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that is the same on all ranks of this start, whatever earlier starts have left in `store`.

    1. Rank 0 offers a new name. 2. Each rank joins under the name that is offered, by a number of its own; that may
    still be an earlier start's name. 3. Rank 0 confirms its name with the numbers of those who joined. 4. A rank
    accepts a name that is confirmed with its own number; until then it looks for another offer.
    """
    offer, own = "hbp_titan/offer", uuid.uuid4().hex
    if rank == 0:
        store.set(offer, own)
        joined = [f"hbp_titan/{own}/{other}" for other in range(1, world_size)]
        if joined:
            try:
                store.wait(joined, timeout)
            except dist.DistStoreError as error:
                raise RuntimeError(f"the ranks did not meet within {timeout.total_seconds():.0f} s: {_MEND}") from error
        store.set(f"hbp_titan/{own}", json.dumps([store.get(key).decode() for key in joined]))
        return f"hbp_titan/{own}"
    end = time.monotonic() + timeout.total_seconds()
    joined_under = ""
    while time.monotonic() < end:
        if store.check([offer]):
            name = f"hbp_titan/{store.get(offer).decode()}"
            if name != joined_under:
                store.set(f"{name}/{rank}", own)
                joined_under = name
            if store.check([name]) and own in json.loads(store.get(name)):
                return name
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(f"rank {rank} did not meet rank 0 within {timeout.total_seconds():.0f} s: {_MEND}")
