"""FP8 products on several ranks against torchao's own layers in one process, per level, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hbp_titan.components.checkpoint import Checkpointer
from hbp_titan.components.optimizer import build_optimizer, clip_grad_norm, step_unless
from hbp_titan.config import JobConfig, load_config
from hbp_titan.data.batch import PackedBatch
from hbp_titan.data.loader import BatchShapes, PlanDataset
from hbp_titan.distributed import float8
from hbp_titan.distributed.float8 import apply_float8, check_float8, fits_tokens, float8_params, selected_names
from hbp_titan.distributed.fsdp import whole_tensor
from hbp_titan.distributed.world import World
from hbp_titan.engine import Engine
from hbp_titan.job_config import Float8
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.registry import get_flavor, linear_params
from hbp_titan.packing import Level, Plan, build_plan, parse_levels
from hbp_titan.packing.level import format_level
from hbp_titan.testing.equivalence import (
    CAUGHT_FACTOR,
    FLOAT8_GRAD_TOLERANCE,
    LOSS_TOLERANCE,
    Outcome,
    compare,
    reference,
    run_case,
)
from hbp_titan.testing.equivalence_cases import Case
from hbp_titan.testing.local_ranks import run_distributed
from tests.distributed.test_expert_parallel import RandomSamples
from tests.runs import assert_same_run, equal, train, train_until
from tests.tiny_run import ARGS, write_tiny_run

if not float8.torchao_version():
    pytest.skip(
        "needs torchao; run: .venv/bin/pip install --no-deps torchao==0.18.0 && scripts/run_tests.sh tests/distributed",
        allow_module_level=True,
    )
torchao_float8 = float8.torchao_float8()
SEED = 3
WORDS = ("--float8.emulate=true", "--float8.filter_fqns=[]", f"--training.seed={SEED}", "--compile.backend=aot_eager")
LOW, HIGH = Level(64), Level(256, ac_policy="keep_attention")
PLAIN_HIGH = dataclasses.replace(HIGH, float8=False)
# Packs are whole on a rank, so that each scale is that of a pack in one process.
PACKS: dict[str, tuple[str, bool, tuple[Level, ...]]] = {
    "tensorwise": ("tensorwise", False, (LOW, HIGH)),
    "tensorwise, float8 all-gather": ("tensorwise", True, (LOW, HIGH)),
    "rowwise": ("rowwise", False, (LOW, HIGH)),
    "rowwise_with_gw_hp": ("rowwise_with_gw_hp", False, (LOW, HIGH)),
    "one level without": ("tensorwise", False, (LOW, PLAIN_HIGH)),
}
CHUNKS = Level(256, 2, "allgather", "full", mlp_chunk_tokens=32)
CASES = [
    Case("ulysses", 2, (Level(64), Level(256, 2))),
    Case("allgather, chunks", 2, (Level(64, mlp_chunk_tokens=32), CHUNKS)),
    Case("offload, 2 copies", 2, (Level(64, ac_policy="offload"), HIGH), dp_replicate=2),
    Case("without", 2, (Level(64, float8=False), dataclasses.replace(HIGH, float8=False))),
]


def _config(recipe: str, *argv: str) -> JobConfig:
    return load_config([f"--float8.recipe={recipe}", *WORDS, *argv])


def _batches(levels: tuple[Level, ...], world_size: int) -> tuple[Plan, list[PlanDataset]]:
    """Return the plan of one optimizer step, and the batches of each rank."""
    samples: Any = RandomSamples()
    plan = build_plan(
        samples.lengths, levels, world_size, loss_tokens=samples.loss_tokens, global_batch_tokens=1 << 40,
        level_order="interleave",
    )  # fmt: skip
    shapes = BatchShapes.from_plan(plan, ARGS.num_kv_heads)
    return plan, [PlanDataset(plan, samples, rank, shapes) for rank in range(world_size)]


def _run_packs(world: World, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (recipe, gathers, levels) in PACKS.items():
        config = _config(recipe, f"--float8.fsdp_all_gather={str(gathers).lower()}")
        config.levels = list(levels)
        engine = Engine(config, ARGS, world)
        found[name] = _step_gradients(engine, levels, world)
        if gathers:
            found |= _precomputed(engine, levels, world, folder)
    config = _config("rowwise")
    for case in CASES:
        found[case.name] = run_case(world, config, ARGS, case, RandomSamples())  # type: ignore[arg-type]
    return found


def _step_gradients(engine: Engine, levels: tuple[Level, ...], world: World) -> Outcome:
    plan, batches = _batches(levels, world.size)
    last = plan.num_iterations - 1
    losses = [engine.forward_backward(batches[world.rank][i], last=i == last).sum() for i in range(plan.num_iterations)]
    parameters = {name: p for name, p in engine.model.named_parameters() if p.grad is not None}
    grads = {name: whole_tensor(p.grad).clone() for name, p in parameters.items() if p.grad is not None}
    engine.model.zero_grad()
    return Outcome(float(sum(losses)), grads)


def _precomputed(engine: Engine, levels: tuple[Level, ...], world: World, folder: Path) -> dict[str, Any]:
    """Train a step with precomputed scales, save, load into a new engine, and break a scale."""
    optimizer = build_optimizer(engine.model, load_config(["--optimizer.lr=1e-2"]).optimizer)
    engine.runtime.float8_state.track(optimizer, engine.model)
    batches = _batches(levels, world.size)[1]
    engine.forward_backward(batches[world.rank][0])
    clip_grad_norm(engine.model, 1.0)
    step_unless(optimizer, torch.zeros(()))
    optimizer.zero_grad()
    linears = float8.float8_linears(engine.model)
    scales = [linear.weight._local_tensor._precomputed_scale for linear in linears]
    weights = {name: whole_tensor(p).clone() for name, p in engine.model.named_parameters()}
    found: dict[str, Any] = {"scales": [float(scale) for scale in scales if scale is not None], "weights": weights}
    config = _config("tensorwise", "--float8.fsdp_all_gather=true", "--checkpoint.async_mode=disabled")
    found["after a step"] = _step_gradients(engine, levels, world)
    with Checkpointer(folder, engine.model, optimizer, config.checkpoint) as checkpointer:
        checkpointer.stage(1, {"step": 1})
        checkpointer.write()
    config.levels = list(levels)
    again = Engine(config, ARGS, world, read_weights=False)
    with Checkpointer(folder, again.model, build_optimizer(again.model, config.optimizer), config.checkpoint) as loader:
        loader.load()
    found["loaded"] = {name: whole_tensor(p).clone() for name, p in again.model.named_parameters()}
    # The first forward after loading computes the scales by itself.
    found["after loading"] = _step_gradients(again, levels, world)
    linears[0].weight._local_tensor._precomputed_scale = 40 * scales[0]
    found["wrong scale"] = _step_gradients(engine, levels, world)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each rank computes; gradients are whole."""
    return run_distributed(_run_packs, 2, tmp_path_factory.mktemp("float8"))


def _plain(seed: int = SEED) -> Decoder:
    model = Decoder(ARGS)
    model.init_weights(seed)
    return model


def _of_torchao(recipe: str, levels: tuple[Level, ...]) -> Outcome:
    """Return the step of one process with torchao's own conversion, pack by pack."""
    plain = _plain()
    config = dataclasses.replace(torchao_float8.Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    converted = torchao_float8.convert_to_float8_training(
        copy.deepcopy(plain), config=config, module_filter_fn=lambda module, name: name.startswith("layers.")
    )
    plan, batches = _batches(levels, 2)
    total = 0.0
    for i in range(plan.num_iterations):
        model = plain if levels[int(plan.level_of_iteration[i])].float8 is False else converted
        for of_rank in batches:
            total += _backward(model, of_rank[i])
    grads = [dict(model.named_parameters()) for model in (plain, converted)]
    zero = torch.zeros(())
    sums = {
        name: sum((of[name].grad if of[name].grad is not None else zero for of in grads), zero) for name in grads[0]
    }
    return Outcome(total, sums)


def _backward(model: Decoder, batch: PackedBatch) -> float:
    index = batch.loss_index
    logits_TV = model(batch.input_ids, batch.position_ids, batch.documents)
    losses_L = F.cross_entropy(logits_TV[index], batch.labels[index], reduction="none")
    (losses_L * batch.loss_weights[index]).sum().backward()
    return float(losses_L.detach().sum())


@pytest.mark.parametrize("name", PACKS)
def test_packs_equal_torchao_in_one_process(found: list[dict[str, Any]], name: str) -> None:
    recipe, _, levels = PACKS[name]
    expected, results = _of_torchao(recipe, levels), [rank[name] for rank in found]
    difference = compare(expected, Outcome(sum(result.loss for result in results), results[0].grads))
    assert difference.loss < LOSS_TOLERANCE
    assert max(difference.grads.values()) < FLOAT8_GRAD_TOLERANCE, difference.grads


def test_float8_all_gather_changes_nothing_but_a_wrong_scale_does(found: list[dict[str, Any]]) -> None:
    plain, gathered = found[0]["tensorwise"], found[0]["tensorwise, float8 all-gather"]
    assert equal(plain.grads, gathered.grads)
    differences = compare(found[0]["after a step"], found[0]["wrong scale"]).grads
    assert max(differences.values()) > CAUGHT_FACTOR * FLOAT8_GRAD_TOLERANCE


def test_scales_are_those_of_whole_weights_after_the_step(found: list[dict[str, Any]]) -> None:
    names = [name for name, module in _plain().named_modules() if isinstance(module, nn.Linear) and "layers." in name]
    largest = [found[0]["weights"][f"{name}.weight"].abs().max() for name in names]
    assert found[0]["scales"] == found[1]["scales"] == pytest.approx([448 / value.item() for value in largest])


def test_checkpoint_restores_weights_and_gradients_bit_for_bit(found: list[dict[str, Any]]) -> None:
    rank = found[0]
    assert equal(rank["weights"], rank["loaded"])
    assert equal(rank["after a step"].grads, rank["after loading"].grads)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_rowwise_scales_make_packing_and_parallelism_exact(found: list[dict[str, Any]], case: Case) -> None:
    samples: Any = RandomSamples()
    expected = reference(ARGS, SEED, samples, torch.device("cpu"), float8=_config("rowwise").float8)[1]
    difference = compare(expected, found[0][case.name])
    worst = max(difference.grads.values())
    # The control: the same without float8.
    assert worst > CAUGHT_FACTOR * FLOAT8_GRAD_TOLERANCE if case.name == "without" else worst < FLOAT8_GRAD_TOLERANCE


def test_switch_is_an_attribute_that_all_layers_share() -> None:
    model, plain = _plain(), _plain()
    state = apply_float8(model, Float8("rowwise", filter_fqns=["down_proj"], emulate=True))
    assert [*dict(model.named_parameters())] == [*dict(plain.named_parameters())]
    assert "12 of 14" in state.description
    assert "down_proj" in state.description
    assert "warning" not in state.description
    assert "warning" in apply_float8(_plain(), Float8("rowwise", filter_fqns=[])).description

    def outputs(block: Decoder) -> list[Tensor]:
        x_TH = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
        return [layer(x_TH if layer.in_features == 32 else x_TH.repeat(1, 2)) for layer in linears(block)]

    def linears(block: Decoder) -> list[nn.Linear]:
        return [module for module in block.layers.modules() if isinstance(module, nn.Linear)]

    expected = outputs(plain)
    different = [not one.equal(other) for one, other in zip(outputs(model), expected, strict=True)]
    assert different == [layer.in_features == 32 for layer in linears(model)]
    state.active = False
    assert all(one.equal(other) for one, other in zip(outputs(model), expected, strict=True))


def _saved_bytes(model: Decoder) -> int:
    """Return the bytes that a model keeps for backward, apart from its parameters."""
    storages: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    batch = _batches((Level(64), Level(256)), 1)[1][0][0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits_TV = model(batch.input_ids, batch.position_ids, batch.documents)
    assert logits_TV.requires_grad
    return sum(storages.values())


def test_float8_keeps_as_much_for_backward_as_a_plain_layer() -> None:
    model, plain = _plain(), _plain()
    apply_float8(model, _config("tensorwise").float8)
    assert _saved_bytes(model) == _saved_bytes(plain)


@pytest.mark.parametrize(("float8", "text"), [(None, "64:1:ulysses:none"), (False, "64:1:ulysses:none::::::false")])
def test_short_form_of_a_level(float8: bool | None, text: str) -> None:
    level = Level(64, float8=float8)
    assert format_level(level) == text
    assert parse_levels(text) == (level,)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("flavor", ["llama3_1_8b", "qwen2_5_32b", "deepseek_v2_lite_16b"])
def test_small_layers_are_those_of_torchao(recipe: str, flavor: str) -> None:
    from torchao.float8.float8_linear_utils import _auto_filter_for_recipe

    with torch.device("meta"):
        model = Decoder(get_flavor(flavor).with_layers(2))
    chosen = _auto_filter_for_recipe(recipe, ["q_a_proj", "kv_a_proj"])
    linears = {
        name: module for name, module in model.named_modules() if type(module) is nn.Linear and "layers." in name
    }
    assert selected_names(model, Float8(recipe)) == [name for name, linear in linears.items() if chosen(linear, name)]


def test_counts_for_the_time_model() -> None:
    args = get_flavor("llama3_1_8b")
    found = float8_params(args, Float8("tensorwise", fsdp_all_gather=True))
    # Keys and values have 1024 outputs, which is too few.
    assert found.first == 32 * 4096 * 4096
    assert found.last == 32 * 4096 * 14336
    head, small = args.vocab_size * args.hidden_size, 32 * 2 * 1024 * 4096
    assert found.body == found.gathered == linear_params(args) - head - small
    assert float8_params(args, Float8()).body == 0


def test_tokens_of_a_rank_and_of_chunks_are_divisible_by_16() -> None:
    levels = [Level(64), Level(64, 8), Level(96, 2, mlp_chunk_tokens=32), Level(160, mlp_chunk_tokens=100)]
    assert [fits_tokens(level) for level in levels] == [True, False, False, True]


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--float8.emulate=false"], "needs a GPU"),
        (["--levels=64:1,264:1"], "264"),
        (["--levels=64:8"], "64/cp8"),
        (["--lora.rank=4"], "lora.rank"),
        (["--float8.filter_fqns=auto_filter_small_kn"], "remove auto_filter_small_kn"),
        (["--float8.recipe="], "float8.recipe"),
        (["--float8.fsdp_all_gather=true", "--float8.recipe=rowwise"], "tensorwise"),
        (["--float8.fsdp_all_gather=true", "--parallelism.cpu_offload=true"], "cpu_offload"),
        (["--float8.fsdp_all_gather=true", "--levels=64:1::::::::false"], "levels.float8"),
        (["--float8.fsdp_all_gather=true", "--parallelism.reshard_after_forward=2"], "reshard_after_forward"),
    ],
)
def test_what_float8_cannot_do_is_refused(argv: list[str], word: str) -> None:
    config = _config("tensorwise", "--levels=64:1,256:1", *argv)
    with pytest.raises(ValueError, match=word):
        check_float8(config, 8, torch.device("cpu"), ARGS)


def test_shards_widths_devices_and_versions_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config("tensorwise", "--float8.fsdp_all_gather=true", "--levels=64:1,256:1")
    check_float8(config, 8, torch.device("cpu"), ARGS)
    with pytest.raises(ValueError, match="dp_replicate"):
        check_float8(config, 64, torch.device("cpu"), ARGS)
    with pytest.raises(ValueError, match="up_proj"):
        check_float8(config, 8, torch.device("cpu"), dataclasses.replace(ARGS, intermediate_size=72))
    with pytest.raises(ValueError, match=r"9\.0"):
        float8.check_capability((8, 9), "rowwise")
    float8.check_capability((8, 9), "tensorwise")
    monkeypatch.setattr(float8, "torchao_version", lambda: "0.9.0")
    with pytest.raises(ValueError, match="torchao"):
        check_float8(config, 8, torch.device("cpu"), ARGS)


def _whole_on_one_rank(world: World) -> list[str]:
    config = _config("tensorwise", "--float8.fsdp_all_gather=true", "--levels=64:1")
    return [type(whole_tensor(p)).__name__ for p in Engine(config, ARGS, world).model.parameters()]


def test_whole_tensors_of_one_shard_are_plain() -> None:
    assert set(run_distributed(_whole_on_one_rank, 1)[0]) <= {"Tensor", "Parameter"}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
def test_run_with_float8_all_gather_resumes_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    words = ("--float8.recipe=tensorwise", "--float8.fsdp_all_gather=true", *WORDS, f"--optimizer.name={optimizer}")
    argv = [*write_tiny_run(tmp_path), *words, "--checkpoint.interval=4"]
    whole = [*argv, f"--job.dump_folder={tmp_path / 'whole'}"]
    run_distributed(train, 2, whole)
    run_distributed(train_until, 2, argv, 6)
    assert run_distributed(train, 2, argv)[0][0] == 4
    assert_same_run(tmp_path / "whole", tmp_path / "run")
