"""Thread blocks that flash kernels launch for a preset's plan, against those that have work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from hbp_titan.config import load_config
from hbp_titan.data.batch import make_batch, shard_batch
from hbp_titan.models.documents import Documents, HeadTailShard
from hbp_titan.packing import Level, Plan, build_plan
from hbp_titan.tuning.simulate import tulu3_longcite_like
from tests.gpu_trace.harness import CONFIGS, TokenCounts

BLOCK_TOKENS = 128


@pytest.fixture(scope="module")
def plan() -> Plan:
    config = load_config([f"--job.config_file={CONFIGS / 'llama3_1_8b_hbp.toml'}"])
    lengths = tulu3_longcite_like(20_000)
    loss_tokens = np.maximum(lengths // 2, 1)
    tokens = config.training.global_batch_tokens
    return build_plan(lengths, config.levels, 32, "hbp", loss_tokens=loss_tokens, global_batch_tokens=tokens)


def launched_and_useful(documents: Documents) -> np.ndarray:
    """Return blocks per head, [launched, useful], summed over forward (queries) and backward (keys)."""
    total = np.zeros(2, dtype=np.int64)
    for group in documents.groups:
        of_lengths = ((group.cu_seqlens_q, group.max_seqlen_q), (group.cu_seqlens_k, group.max_seqlen_k))
        for cu_seqlens, longest in of_lengths:
            lengths = np.diff(cu_seqlens.numpy())
            total += -(-longest // BLOCK_TOKENS) * len(lengths), (-(-lengths // BLOCK_TOKENS)).sum()
    return total


def blocks(plan: Plan, index: int, level: Level, ranks: Sequence[int]) -> tuple[float, int]:
    """Return launched / useful blocks over all packs of a level, and the maximum kernel calls of an attention pass."""
    total, calls = np.zeros(2, dtype=np.int64), 0
    store = TokenCounts(plan.lengths.tolist())
    for pack in np.flatnonzero(plan.pack_levels == index):
        ids = plan.packs.ids[plan.packs.offsets[pack] : plan.packs.offsets[pack + 1]]
        whole = make_batch(store, ids, level, index, len(ids))
        for rank in ranks:
            documents = shard_batch(whole, rank, level.cp_degree, level.cp_shape(8)[0]).documents
            passes = (
                [part.documents for part in documents.passes(None)]
                if isinstance(documents, HeadTailShard)
                else [documents]
            )
            total += sum(launched_and_useful(part) for part in passes)
            calls = max(calls, *(len(part.groups) for part in passes))
    return total[0] / total[1], calls


@pytest.mark.parametrize(
    ("index", "level", "ranks", "ratio"),
    [
        # The target is at most 1.35 with 3 calls.
        (0, Level(16384, 1), [0], 1.338),
        (1, Level(131072, 8), [0], 1.132),
        # Rank 0 has the shortest keys of heads and the longest of tails, rank 7 chunks of nearly one length.
        (1, Level(131072, 8, "allgather"), [0, 3, 7], 1.113),
    ],
    ids=["16K/cp1", "128K/cp8-ulysses", "128K/cp8-allgather"],
)
def test_launched_blocks_stay_close_to_useful_blocks(
    plan: Plan, index: int, level: Level, ranks: list[int], ratio: float
) -> None:
    found, calls = blocks(plan, index, level, ranks)
    assert found == pytest.approx(ratio, abs=0.01)
    assert found <= 1.35
    assert calls <= 3


def test_one_call_for_all_documents_would_launch_several_times_as_many_blocks(plan: Plan) -> None:
    store = TokenCounts(plan.lengths.tolist())
    level, total = Level(16384, 1), np.zeros(2, dtype=np.int64)
    for pack in np.flatnonzero(plan.pack_levels == 0):
        ids = plan.packs.ids[plan.packs.offsets[pack] : plan.packs.offsets[pack + 1]]
        documents = make_batch(store, ids, level, 0, len(ids)).documents
        total += launched_and_useful(documents._replace(groups=(documents.whole,)))
    assert total[0] > 3 * total[1]
