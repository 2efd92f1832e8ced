"""Plan files: round trips, equal bytes, and every mismatch reported."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from hbp_titan.packing import CostModel, build_plan, load_plan, parse_levels, save_plan
from hbp_titan.tuning.simulate import tulu3_longcite_like

LEVELS = parse_levels("16384:1,131072:8")


@pytest.fixture(scope="module")
def plan():
    return build_plan(tulu3_longcite_like(2000, seed=1), LEVELS, 8, level_order="interleave", global_batch_tokens=10**6)


def test_a_saved_plan_loads_equal_and_memory_mapped(plan, tmp_path):
    save_plan(plan, tmp_path / "new" / "plan.safetensors", {"data": "ab12"})
    loaded = load_plan(tmp_path / "new" / "plan.safetensors", {"data": "ab12", "world_size": 8})
    assert loaded.fingerprint == plan.fingerprint
    assert loaded.settings() == plan.settings()
    assert isinstance(loaded.packs.ids, np.memmap)
    assert loaded.iteration(3).level == plan.iteration(3).level
    for ours, theirs in zip(loaded.iteration(3).packs, plan.iteration(3).packs, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_windows_of_the_cost_model_are_kept_only_if_there_are_any(plan, tmp_path):
    assert plan.settings()["costs"] == [{"alpha": 1.0, "beta": 2e-5}] * 2
    cost = CostModel(1.0, 1e-5, 4096, 0.75)
    windowed = build_plan(plan.lengths, LEVELS, 8, global_batch_tokens=10**6, cost=cost)
    save_plan(windowed, tmp_path / "p")
    loaded = load_plan(tmp_path / "p", windowed.settings())
    assert loaded.costs == (cost, cost)
    np.testing.assert_array_equal(loaded.pack_sum_sq, windowed.pack_sum_sq)
    assert windowed.pack_sum_sq.sum() < plan.pack_sum_sq.sum()


def test_files_are_safetensors_and_equal_plans_are_equal_bytes(plan, tmp_path):
    for name in ("a", "b"):
        save_plan(plan, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    arrays = load_file(tmp_path / "a")
    np.testing.assert_array_equal(arrays["ids"], plan.packs.ids)
    np.testing.assert_array_equal(arrays["lengths"], plan.lengths)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_mismatch_lists_every_difference(plan, tmp_path):
    save_plan(plan, tmp_path / "p", {"tokenizer": "t1"})
    wanted = build_plan(plan.lengths, LEVELS, 16, seed=5).settings()
    with pytest.raises(ValueError, match="other inputs") as error:
        load_plan(tmp_path / "p", {**wanted, "tokenizer": "t2"})
    for name in ("world_size", "seed", "tokenizer", "level_order"):
        assert f"{name} is" in str(error.value)
    assert "levels is" not in str(error.value)


@pytest.mark.parametrize("damage", ["truncate", "flip", "text", "header", "empty"])
def test_a_corrupt_file_raises(plan, tmp_path, damage):
    path = tmp_path / "p"
    save_plan(plan, path)
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        del data[-8:]
    elif damage == "flip":
        data[-20] ^= 1
    elif damage == "text":
        data = bytearray(b"this is not a plan at all")
    elif damage == "header":
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        metadata = json.loads(header["__metadata__"]["plan"])
        del metadata["settings"]["level_order"]
        header["__metadata__"]["plan"] = json.dumps(metadata)
        data[8 : 8 + size] = json.dumps(header).encode().ljust(size)
    else:
        data = bytearray()
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"p: .*(corrupt|not a plan file)"):
        load_plan(path)
