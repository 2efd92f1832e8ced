"""What float8 products take in the time model and in the memory estimate, and where the search leaves them out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hbp_titan.config import load_config
from hbp_titan.distributed.float8 import Float8Params
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level
from hbp_titan.preflight import cost_model
from hbp_titan.tuning.contributions import contributions
from hbp_titan.tuning.float8_time import SHARE, Float8Products, with_plain_levels
from hbp_titan.tuning.hardware import HARDWARE, get_hardware
from hbp_titan.tuning.memory import estimate_memory
from hbp_titan.tuning.search import Workload, baselines, describe_level, select_search
from hbp_titan.tuning.time_model import TimeModel, estimate_candidates, time_model
from tests.tuning.toy import MACHINE, TOY

LLAMA = get_flavor("llama3_1_8b")
H100 = get_hardware("h100-80gb")
PACK = np.array([[1.0, 0, 0, 0]])


def _toy(recipe: str = "tensorwise", gathered: int = 0, world_size: int = 1) -> TimeModel:
    # 60 of the 100 parameters, 16 of the 20 of last products.
    params = Float8Params(body=60, first=10, last=16, inputs=7, outputs=9, gathered=gathered)
    return TimeModel(TOY, MACHINE, world_size, float8=Float8Products(recipe, params, MACHINE))


def _linear(model: TimeModel, level: Level) -> tuple[float, float]:
    parts = model.parts(level, PACK)
    return float(parts["linear"][0]), float(parts["recompute"][0])


@pytest.mark.parametrize(
    ("recipe", "products", "casts"),
    [
        # 6 x 40 in bf16 and 6 x 60 at twice the rate less its share; inputs twice 5 bytes, outputs 7.
        ("tensorwise", 240 + 360 / (2 * SHARE["tensorwise"]), 10 * 7 + 7 * 9),
        ("rowwise", 240 + 360 / (2 * SHARE["rowwise"]), 10 * 7 + 7 * 9),
        # Gradients of weights in bf16; nothing is cast in their layout.
        ("rowwise_with_gw_hp", 360 + 240 / (2 * SHARE["rowwise"]), 5 * 7 + 5 * 9),
    ],
)
def test_products_and_casts_by_hand(recipe: str, products: float, casts: float) -> None:
    model = _toy(recipe)
    weights = 10 * 60 / 1400
    linear, again = _linear(model, Level(16))
    assert linear == pytest.approx(16 * (products / 1000 + casts / 1400) + weights)
    assert again == 0
    # 80 parameters run again, 44 of them in float8, with casts of their inputs and weights.
    linear_full, again = _linear(model, Level(16, ac_policy="full"))
    assert again == pytest.approx(16 * (2 * 36 + 2 * 44 / (2 * SHARE[recipe])) / 1000)
    assert linear_full - linear == pytest.approx((16 * 5 * 7 + 5 * 60) / 1400)


def test_chunks_cast_weights_once_each() -> None:
    one, four = (_linear(_toy(), Level(16, mlp_chunk_tokens=size))[0] for size in (16, 4))
    assert four - one == pytest.approx(3 * 15 * 60 / 1400)


def test_level_without_float8_takes_the_time_of_bf16() -> None:
    plain = TimeModel(TOY, MACHINE, 1)
    assert _toy().parts(Level(16, float8=False), PACK) == plain.parts(Level(16), PACK)


def test_gathers_move_one_byte_of_a_converted_parameter() -> None:
    level = Level(16)
    plain, gathered = (_toy(gathered=n, world_size=2).fsdp_seconds(level) for n in (0, 60))
    # Half of 60 bytes at 100 byte/s, in forward and again in backward.
    assert np.subtract(plain, gathered) == pytest.approx([0.3, 0.3])


def _speed_up(recipe: str, gathers: bool) -> float:
    """Return tokens/s over bf16's in torchtitan's setting: 2 x 8192 tokens, half of the products recomputed, FA2."""
    level = Level(16384, ac_policy="keep_attention", ac_layers=16)
    words = ["--float8.filter_fqns=[]", "--model.attention_backend=fa2"]
    seconds = []
    for name in ("", recipe):
        config = load_config([*words, f"--float8.recipe={name}", f"--float8.fsdp_all_gather={str(gathers).lower()}"])
        parts = time_model(LLAMA, config, H100, 8).parts(level, np.array([[1.0, 16384, 2 * 8192**2, 2]]))
        seconds.append(sum(float(part[0]) for part in parts.values()))
    return seconds[0] / seconds[1]


def test_published_speed_ups_follow_from_the_shares() -> None:
    assert _speed_up("tensorwise", True) == pytest.approx(8532 / 6667, rel=0.02)
    assert _speed_up("rowwise", False) == pytest.approx(6412 / 5760, rel=0.02)


def test_few_tokens_of_a_rank_do_not_pay_for_the_casts_of_weights() -> None:
    model = time_model(LLAMA, load_config(["--float8.recipe=tensorwise"]), H100, 8)
    gains = []
    for tokens in (512, 2048, 8192):
        float8, plain = (model.parts(Level(tokens, float8=on), PACK)["linear"][0] for on in (None, False))
        gains.append(float(plain / float8))
    assert gains[0] < 1 < gains[1] < gains[2] < 2


@pytest.mark.parametrize("machine", HARDWARE)
def test_machines_without_such_products_are_refused(machine: str) -> None:
    config = load_config(["--float8.recipe=rowwise"])
    if machine in ("a100-80gb", "rtx4090-24gb"):
        with pytest.raises(ValueError, match="capability"):
            time_model(LLAMA, config, get_hardware(machine), 8)
    else:
        assert time_model(LLAMA, config, get_hardware(machine), 8).float8 is not None


def test_candidates_without_float8_where_it_may_not_gain() -> None:
    config = load_config(["--float8.recipe=tensorwise"])
    levels = [Level(2048), Level(40), Level(131072, 8)]
    expected = [Level(2048), Level(2048, float8=False), Level(40, float8=False), Level(131072, 8)]
    assert with_plain_levels(levels, config) == expected
    config.float8.fsdp_all_gather = True
    assert with_plain_levels(levels, config) == levels
    assert describe_level(expected[1]).endswith("no float8 products")


@pytest.mark.parametrize("tokens", [512, 8192])
def test_selection_leaves_float8_out_of_a_level_of_few_tokens(tokens: int) -> None:
    config = load_config(["--float8.recipe=tensorwise"])
    lengths = np.full(64, tokens - 12)
    workload = Workload(lengths, lengths, 8, cost_model(LLAMA))
    # Launches of kernels and gathers would hide the casts of so few tokens.
    machine = dataclasses.replace(H100, launch_seconds=0.0, gather_efficiency=100.0)
    levels = with_plain_levels([Level(tokens, ac_policy="full")], config)
    candidates = estimate_candidates(LLAMA, config, machine, 8, levels)
    selection = select_search(candidates, workload)
    assert [level.float8 for level in selection.levels] == [False if tokens == 512 else None]
    found = contributions(selection, baselines(candidates, workload), workload, config, LLAMA, machine)
    without = {row.name: row.seconds for row in found.rows if row.seconds is not None}
    if tokens == 512:
        assert without["float8 by level"] > found.seconds == pytest.approx(without["float8 products"])
    else:
        assert without["float8 products"] > 1.2 * found.seconds
    assert "float8 all-gather" in found.absent


def test_memory_has_casts_and_gathers_of_one_byte() -> None:
    level = Level(16384, ac_policy="full")

    def peak(*argv: str, float8: bool | None = None) -> int:
        at = dataclasses.replace(level, float8=float8)
        return estimate_memory(LLAMA, at, load_config([*argv]), 8, device_type="cuda").peak_bytes

    plain, float8 = peak(), peak("--float8.recipe=tensorwise")
    # 16K tokens of 4096 and 14336 elements, and the matrix.
    assert float8 - plain == 16384 * (4096 + 14336) + 4096 * 14336
    assert peak("--float8.recipe=tensorwise", float8=False) == plain
    gathered = peak("--float8.recipe=tensorwise", "--float8.fsdp_all_gather=true")
    # Parameters and the buffer of the next all-gather, all but keys and values of a block.
    assert float8 - gathered == 2 * (2 * 4096 * 4096 + 3 * 4096 * 14336)
