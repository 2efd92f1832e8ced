"""HBPBatchSampler: epochs, steps, resume, and the loaders of torch, torchdata and accelerate around it."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from hbp_titan.packing import METHODS, Level
from hbp_titan.packing.sampler import RANDOM_NUMBER_OF_PACKS, HBPBatchSampler, PackIndices
from tests.properties import examples

LENGTHS = np.random.default_rng(0).integers(10, 400, size=97)


def _sampler(rank: int | None = 0, world_size: int = 2, levels: Any = "128,512", **options: Any) -> HBPBatchSampler:
    return HBPBatchSampler(LENGTHS, levels, rank=rank, world_size=world_size, **options)


class Seen(Dataset[tuple[int, ...]]):
    """Returns what __getitems__ is asked for: the level, the micro-batch, the loss tokens of its step and the ids."""

    def __getitems__(self, pack: PackIndices) -> list[tuple[int, ...]]:
        return [(pack.level, pack.micro_batch, pack.step_loss_tokens, *pack)]


@given(
    lengths=st.lists(st.integers(1, 512), min_size=1, max_size=80),
    world_size=st.integers(1, 5),
    method=st.sampled_from(sorted(set(METHODS) - set(RANDOM_NUMBER_OF_PACKS))),
    level_order=st.sampled_from(["alternate", "interleave"]),
)
@examples(40)
def test_every_epoch_trains_each_sample_once_in_as_many_packs_on_each_rank(
    lengths: list[int], world_size: int, method: str, level_order: str
) -> None:
    padding = len(lengths)
    samplers = [
        HBPBatchSampler(lengths, "128,512", rank=rank, world_size=world_size, padding_index=padding, method=method,
                        level_order=level_order)
        for rank in range(world_size)
    ]  # fmt: skip
    sizes = set()
    for epoch in (0, 1):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        packs = [list(sampler) for sampler in samplers]
        sizes |= {len(own) for own in packs} | {len(sampler) for sampler in samplers}
        trained = [index for own in packs for pack in own for index in pack]
        assert sorted(index for index in trained if index != padding) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in pack if i != padding) <= pack.max_tokens for own in packs for pack in own)
        for level in {pack.level for own in packs for pack in own}:
            counts = [len(pack) for own in packs for pack in own if pack.level == level]
            used = any(pack == [padding] for own in packs for pack in own if pack.level == level)
            # Padding only where no pack of the level has two samples.
            assert not used or max(counts) == 1
    assert len(sizes) == 1


def test_ranks_of_a_level_share_their_pack() -> None:
    levels = [Level(128), Level(512, cp_degree=2)]
    packs = [list(_sampler(rank, 4, levels)) for rank in range(4)]
    for pack in zip(*packs, strict=True):
        assert {p.level for p in pack} == {pack[0].level}
        assert (pack[0] == pack[1] and pack[2] == pack[3]) == (pack[0].level == 1)


def test_epochs_differ_and_repeat_by_seed() -> None:
    def epoch(number: int, **options: Any) -> list[PackIndices]:
        sampler = _sampler(**options)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(1) == epoch(1)
    assert epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, seed=1)


def test_step_has_a_constant_number_of_micro_batches_and_a_share_of_each_level() -> None:
    samplers = [_sampler(rank, micro_batches_per_step=4) for rank in range(2)]
    packs = [list(sampler) for sampler in samplers]
    assert len(packs[0]) % 4 != 0  # so that the last step has fewer
    share = np.mean([pack.level for pack in packs[0]])
    for start in range(0, len(packs[0]), 4):
        step = [pack for own in packs for pack in own[start : start + 4]]
        # All tokens but the first of each sample have a loss by default.
        expected = sum(int(LENGTHS[index]) - 1 for pack in step for index in pack)
        assert {pack.step_loss_tokens for pack in step} == {expected}
        assert len(step) < 8 or abs(np.mean([pack.level for pack in step]) - share) <= 0.25


def test_empty_pack_gets_half_of_another() -> None:
    sampler = HBPBatchSampler([100] * 9, "300", rank=0, world_size=4, method="bfd")
    # Three packs of three samples and an empty one.
    assert sorted(sampler.plan.packs.counts.tolist()) == [1, 2, 3, 3]


def test_padding_index_stands_for_an_empty_pack() -> None:
    with pytest.raises(ValueError, match="padding_index"):
        HBPBatchSampler([5, 6], "16", rank=0, world_size=3)
    packs = [list(HBPBatchSampler([5, 6], "16", rank=rank, world_size=3, padding_index=2)) for rank in range(3)]
    assert sorted(packs) == [[[0]], [[1]], [[2]]]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rank": 2}, "rank=2"),
        ({"micro_batches_per_step": 0}, "micro_batches_per_step"),
        ({"micro_batches_per_step": 2, "global_batch_tokens": 64}, "global_batch_tokens"),
        *(({"method": method}, "flat_sorted") for method in RANDOM_NUMBER_OF_PACKS),
    ],
)
def test_wrong_options_are_reported(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        _sampler(**options)


def test_resume_continues_in_the_middle_of_an_epoch_once() -> None:
    first = _sampler()
    first.set_epoch(1)
    packs = iter(first)
    trained = [next(packs) for _ in range(5)]
    second = _sampler()
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    second.set_epoch(1)  # as trainers call it at the start of each epoch
    assert second.state_dict() == first.state_dict()
    assert trained + list(second) == list(first)
    assert len(list(second)) == len(second)
    second.set_epoch(2)
    assert second.state_dict()["yielded"] == 0


def test_state_of_another_plan_is_rejected_by_the_name_of_what_differs() -> None:
    state = _sampler().state_dict()
    for other, name in (
        (_sampler(world_size=4), "world_size"),
        (_sampler(seed=1), "seed"),
        (_sampler(levels="512"), "levels"),
        (_sampler(micro_batches_per_step=2), "micro_batches_per_step"),
        (HBPBatchSampler(LENGTHS + 1, "128,512", rank=0, world_size=2), "lengths"),
    ):
        with pytest.raises(ValueError, match=name):
            other.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:.*set_vital")  # of torchdata, which torch 2.13 deprecates
@pytest.mark.parametrize("num_workers", [0, 2])
def test_stateful_dataloader_resumes_what_was_trained_not_what_was_prefetched(num_workers: int) -> None:
    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(
            Seen(), batch_sampler=_sampler(), collate_fn=lambda items: items[0], num_workers=num_workers
        )

    first = loader()
    batches = iter(first)
    trained = [next(batches) for _ in range(5)]
    state = first.state_dict()
    rest = list(batches)
    assert [item[3:] for item in trained + rest] == [tuple(pack) for pack in _sampler()]
    second = loader()
    second.load_state_dict(state)
    assert list(second) == rest


def test_data_set_gets_the_level_and_the_loss_tokens_with_the_ids() -> None:
    sampler = _sampler(micro_batches_per_step=2)
    items = list(DataLoader(Seen(), batch_sampler=sampler, collate_fn=lambda items: items[0], num_workers=1))
    assert items == [(p.level, p.micro_batch, p.step_loss_tokens, *p) for p in sampler]
    assert {p.max_tokens for p in sampler if p.level == 1} == {512}
    assert all(LENGTHS[p].sum() <= p.max_tokens for p in sampler)


def test_accelerate_distributes_the_packs_of_all_ranks_and_refuses_those_of_one() -> None:
    data_loader = pytest.importorskip(
        "accelerate.data_loader",
        reason="needs accelerate; run: .venv/bin/pip install accelerate && scripts/run_tests.sh tests/packing",
    )
    for rank in range(2):
        shard = data_loader.BatchSamplerShard(_sampler(rank=None), num_processes=2, process_index=rank)
        assert len(shard) == len(_sampler())
        assert list(shard) == list(_sampler(rank=rank))
    with pytest.raises(ValueError, match="rank=None"):
        data_loader.BatchSamplerShard(_sampler(rank=0), num_processes=2, process_index=0)
