"""Optimizers on shards against references in one process: AdamW in bfloat16 and 8 bits, Muon; their checkpoints."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from hbp_titan.components import sharded_optimizers
from hbp_titan.components.checkpoint import Checkpointer, collect_state
from hbp_titan.components.metrics import describe_start
from hbp_titan.components.muon import matrices
from hbp_titan.components.optimizer import build_optimizer, step_unless
from hbp_titan.config import JobConfig, load_config
from hbp_titan.data.epoch import EpochPlans
from hbp_titan.distributed.fsdp import compute_device, whole_tensor
from hbp_titan.distributed.world import World, fake_world
from hbp_titan.engine import Engine
from hbp_titan.job_config import Optimizer
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.lora import apply_lora
from hbp_titan.packing import CostModel
from hbp_titan.testing.local_ranks import run_distributed
from tests.models.deepseek_tiny import tiny_args
from tests.runs import equal

NEEDS_TORCHAO = pytest.mark.skipif(
    find_spec("torchao") is None,
    reason="needs torchao; run: .venv/bin/pip install --no-deps torchao==0.18.0 && scripts/run_tests.sh",
)
BF16 = Optimizer(lr=0.1, weight_decay=0.5, state_dtype="bfloat16")
EIGHT_BITS = Optimizer(lr=0.1, weight_decay=0.5, name="adamw8bit")
MUON = Optimizer(lr=0.1, weight_decay=0.5, name="muon")
MUON_BF16 = dataclasses.replace(MUON, state_dtype="bfloat16")
# 9 experts cannot be cut evenly over 2 or 4 ranks, so each rank has a part of every expert.
ARGS = tiny_args(4)
ODD = tiny_args(4, moe={"n_routed_experts": 9, "n_group": 3})
WIDE = tiny_args(4, hidden_size=256)
Tensors = dict[str, Tensor]


def _small() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(256, 32), nn.LayerNorm(32), nn.Linear(32, 4, bias=False))
    return nn.ModuleDict({"layers": layers, "head": nn.Linear(256, 16, bias=False)})


def _set_grads(model: nn.Module, seed: int) -> None:
    """Give every trained parameter the gradient that its name and `seed` stand for."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(1000 * seed + sum(map(ord, name)))
            whole = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = whole.to(parameter.grad_dtype)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    named = dict(model.named_parameters())
    states = {f"{n} {k}": v for n, p in named.items() for k, v in optimizer.state.get(p, {}).items()}
    return {name: whole_tensor(value).detach().clone() for name, value in (named | states).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_with_bfloat16_moments_computes_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_optimizers, "CHUNK", 1024)
    model = _small().to(dtype)
    optimizer = build_optimizer(model, BF16)
    for step in (1, 2, 3):
        _set_grads(model, step)
        expected = {}
        for name, parameter in model.named_parameters():
            value, state = parameter.detach().float(), optimizer.state[parameter]
            grad = parameter.grad.float()  # type: ignore[union-attr]
            first = 0.9 * state["exp_avg"].float() + 0.1 * grad
            second = 0.95 * state["exp_avg_sq"].float() + 0.05 * grad**2
            value = value * (1 - 0.1 * (0.5 if value.ndim > 1 else 0))
            value -= 0.1 / (1 - 0.9**step) * first / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
            expected[name] = (value.to(dtype), first.bfloat16(), second.bfloat16())
        optimizer.step()
        for name, parameter in model.named_parameters():
            state = optimizer.state[parameter]
            assert float(state["step"]) == step
            for found, value in zip((parameter, state["exp_avg"], state["exp_avg_sq"]), expected[name], strict=True):
                # The order of operations may move a value to the next number of its dtype.
                rtol = 2**-7 if value.dtype == torch.bfloat16 else 1e-5
                torch.testing.assert_close(found.detach(), value, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("config", [BF16, EIGHT_BITS], ids=["bfloat16", "8 bits"])
def test_parameter_in_pieces_is_updated_as_in_one(config: Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    # The largest matrix has 8192 elements.
    for chunk in (8192, 1024):
        monkeypatch.setattr(sharded_optimizers, "CHUNK", chunk)
        model = _small()
        optimizer = build_optimizer(model, config)
        for seed in (1, 2):
            _set_grads(model, seed)
            optimizer.step()
        states.append(_state(model, optimizer))
    assert equal(*states)


@NEEDS_TORCHAO
@pytest.mark.slow  # torchao compiles each shape
def test_adamw_in_8_bits_follows_torchao_s(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.optim import AdamW8bit

    monkeypatch.setattr(sharded_optimizers, "CHUNK", 1024)
    model, twin = (nn.ModuleDict({"layers": _small()["layers"][0]}) for _ in range(2))  # type: ignore[index]
    model["layers"].bias, twin["layers"].bias = None, None
    optimizer = build_optimizer(model, EIGHT_BITS)
    reference = AdamW8bit(twin.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
    for step in (1, 2, 3):
        for each, stepped in ((model, optimizer), (twin, reference)):
            _set_grads(each, step)
            stepped.step()
        (own,), (other,) = optimizer.state.values(), reference.state.values()
        for name in ("exp_avg", "exp_avg_sq"):
            codes, expected = own[f"{name}_codes"].int(), other[name].codes.int()
            # Rounding may move a value to the next code.
            assert (codes - expected).abs().max() <= 1
            assert (codes != expected).float().mean() < 0.01
            torch.testing.assert_close(own[f"{name}_scale"].flatten(), other[name].scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(model["layers"].weight, twin["layers"].weight, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_and_the_largest_value_of_a_block_is_exact(signed: bool) -> None:
    values = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    values[300] = 5.0
    values = values if signed else values.abs()
    codes, scale = sharded_optimizers.quantize(values, signed)
    table = sharded_optimizers.code_values(signed, values.device)
    scaled = values / scale.repeat_interleave(256)
    assert (len(table.unique()), scale[1].item()) == (256, 5.0)
    nearest = (scaled[:, None] - table).abs().min(1).values
    torch.testing.assert_close((scaled - table[codes.int()]).abs(), nearest, rtol=0, atol=1e-7)
    found = sharded_optimizers.dequantize(codes, scale, signed)
    assert found[300] == 5.0
    assert ((found - values).abs() < 0.02 * scale.repeat_interleave(256)).all()


def test_moments_in_8_bits_take_a_byte_and_the_share_of_a_scale() -> None:
    optimizer = build_optimizer(_small(), EIGHT_BITS)
    sizes = {
        (tuple(p.shape), key): (value.dtype, tuple(value.shape))
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }
    assert sizes[(32, 256), "exp_avg_codes"] == (torch.uint8, (32, 256))
    assert sizes[(32, 256), "exp_avg_sq_scale"] == (torch.float32, (32, 1))
    # Rows of 32 elements, and 16 x 256 elements.
    assert sizes[(4, 32), "exp_avg"] == (torch.float32, (4, 32))
    assert sizes[(16, 256), "exp_avg_codes"] == (torch.uint8, (16, 256))


OPTIMIZERS = [
    pytest.param(BF16, id="bfloat16"),
    pytest.param(MUON, id="muon"),
    pytest.param(MUON_BF16, id="muon, bfloat16"),
    pytest.param(EIGHT_BITS, id="8 bits"),
]


@pytest.mark.parametrize("config", OPTIMIZERS)
def test_skipped_step_changes_nothing_and_the_next_is_as_if_it_had_not_been(config: Optimizer) -> None:
    model, twin = _small(), _small()
    optimizers = [build_optimizer(each, config) for each in (model, twin)]
    for seed, skips in ((1, 0.0), (2, 1.0), (3, 0.0)):
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            if each is twin and skips:
                continue
            _set_grads(each, seed)
            if skips:
                for parameter in each.parameters():
                    parameter.grad.fill_(float("nan"))  # type: ignore[union-attr]
            before = _state(each, optimizer)
            step_unless(optimizer, torch.tensor(skips))
            assert equal(before, _state(each, optimizer)) == bool(skips)
    assert equal(_state(model, optimizers[0]), _state(twin, optimizers[1]))


class _HostShards(nn.Module):
    """Half of each parameter, in host memory, on a mesh of GPUs, as parallelism.cpu_offload leaves them."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        shards = {"layers": (16, 256), "experts": (2, 16, 256), "norm": (16,)}
        for name, shape in shards.items():
            whole = torch.empty(2 * shape[0], *shape[1:], device="meta")
            spec = DTensorSpec(mesh, (Shard(0),), TensorMeta(whole.shape, whole.stride(), whole.dtype))
            self.register_parameter(name, nn.Parameter(DTensor(torch.zeros(shape), spec, requires_grad=False)))


@pytest.mark.parametrize("config", [Optimizer(), BF16, MUON], ids=["adamw", "bfloat16", "muon"])
def test_state_of_shards_in_host_memory_is_there_too(config: Optimizer) -> None:
    # This machine has no GPU: what would be copied to one raises.
    with fake_world(2, torch.device("cuda")):
        model = _HostShards(DeviceMesh("cuda", torch.arange(2)))
        optimizer = build_optimizer(model, config)
        tensors = collect_state(model, optimizer)[0]
        assert {value.device.type for value in tensors.values()} == {"cpu"}
        assert compute_device(model).type == "cuda"
        if config.name == "adamw":
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            step_unless(optimizer, torch.zeros(()))
            assert all(bool((p.to_local() < 0).all()) for p in model.parameters())  # type: ignore[operator]
        else:
            parameter = model.layers
            parameter.grad = torch.ones_like(parameter)
            (shard,) = matrices(parameter, {"momentum_buffer": parameter.detach()})
            assert (shard.device, shard.grad.device.type, shard.shard_shapes(2)) == ("cuda", "cpu", [(16, 256)] * 2)


def test_start_names_the_device_that_computes_with_shards_in_host_memory() -> None:
    config = load_config(["--levels=64", "--packing.print_comparison=false"])
    lengths = np.array([40, 50])
    plans = EpochPlans(config, SimpleNamespace(lengths=lengths, loss_tokens=lengths - 1), 2, CostModel())
    with fake_world(2, torch.device("cuda")):
        model = _HostShards(DeviceMesh("cuda", torch.arange(2)))
        text = describe_start(config, ARGS, model, plans, plans.plan_for(0), 1)
    assert "compute dtype bfloat16" in text
    assert "\nranks: 2 on cuda\n" in text


def test_muon_trains_the_matrices_of_the_blocks_alone() -> None:
    optimizer = build_optimizer(Decoder(ARGS), MUON)
    muon = {tuple(p.shape) for group in optimizer.param_groups if "momentum" in group for p in group["params"]}
    experts, rest = {shape for shape in muon if len(shape) == 3}, {shape for shape in muon if len(shape) == 2}
    assert experts == {(8, 16, 48), (8, 48, 16)}
    assert (97, 48) not in rest  # embedding and output
    assert (80, 48) in rest
    with_momentum = sum("momentum_buffer" in state for state in optimizer.state.values())
    assert with_momentum == sum(len(g["params"]) for g in optimizer.param_groups if "momentum" in g)


# Ranks, words, architecture. The last has adapters [4, in] and [out, 4].
CASES = [
    (1, [], ARGS),
    (2, [], ODD),
    (4, [], ODD),
    (4, [], ARGS),
    (4, ["--parallelism.expert_parallel_degree=2"], ARGS),
    (4, ["--parallelism.expert_parallel_degree=2", "--parallelism.dp_replicate=2"], ARGS),
    (4, ["--parallelism.dp_replicate=2", "--parallelism.cpu_offload=true"], ODD),
    (2, ["--lora.rank=4", "--lora.target_modules=all-linear"], ARGS),
]


def _config(words: list[str], optimizer: Optimizer) -> JobConfig:
    config = load_config(["--levels=64:1", *words])
    config.optimizer = optimizer
    return config


def _steps(world: World, cases: list[tuple[list[str], ModelArgs]]) -> list[tuple[Tensors, Tensors]]:
    """Return the state of each case before and after two steps of Muon with given gradients."""
    found = []
    for words, args in cases:
        model = Engine(_config(words, MUON), args, world).model
        optimizer = build_optimizer(model, MUON)
        start = _state(model, optimizer)
        for seed in (1, 2):
            _set_grads(model, seed)
            optimizer.step()
        found.append((start, _state(model, optimizer)))
    return found


def _muon_reference(words: list[str], args: ModelArgs, start: Tensors) -> Tensors:
    """Return parameters after two steps of torch's own optimizers, each expert a matrix of its own."""
    model = Decoder(args)
    if any("lora" in word for word in words):
        apply_lora(model, 4, 16, ["all-linear"])
    model.load_state_dict({name: value for name, value in start.items() if " " not in name})
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    split = {n: nn.ParameterList(p.detach().unbind()) for n, p in named.items() if p.ndim == 3}
    matrices = [p for n, p in named.items() if n.startswith("layers.") and p.ndim == 2]
    matrices += [matrix for stack in split.values() for matrix in stack]
    others = [p for n, p in named.items() if not n.startswith("layers.") or p.ndim == 1]
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5}
    optimizers = [torch.optim.Muon(matrices, momentum=0.95, adjust_lr_fn="match_rms_adamw", **settings)]
    for parameters, decay in (([p for p in others if p.ndim > 1], 0.5), ([p for p in others if p.ndim == 1], 0.0)):
        if parameters:
            settings["weight_decay"] = decay
            optimizers.append(torch.optim.AdamW(parameters, betas=(0.9, 0.95), **settings))
    for seed in (1, 2):
        _set_grads(model, seed)
        for name, stack in split.items():
            for matrix, grad in zip(stack, named[name].grad, strict=True):  # type: ignore[arg-type]
                matrix.grad = grad
        for optimizer in optimizers:
            optimizer.step()
    return {name: torch.stack([*split[name]]) if name in split else p for name, p in named.items()}


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_muon_on_shards_is_torch_s_muon_on_whole_matrices(world_size: int) -> None:
    cases = [(words, args) for size, words, args in CASES if size == world_size]
    found = run_distributed(_steps, world_size, cases)[0]
    for (words, args), (start, state) in zip(cases, found, strict=True):
        reference = _muon_reference(words, args, start)
        assert reference
        for name, value in reference.items():
            assert not state[name].equal(start[name])
            torch.testing.assert_close(state[name], value.detach(), rtol=1e-6, atol=1e-6, msg=f"{words} {name}")


def _train_and_save(world: World, words: list[str], settings: list[Optimizer], folder: Path) -> list[Tensors]:
    """Return the state of each optimizer after two steps, which `folder` has as a checkpoint."""
    found = []
    for number, each in enumerate(settings):
        checkpointer, model, optimizer = _checkpointer(world, words, each, folder / str(number))
        for seed in (1, 2):
            _set_grads(model, seed)
            optimizer.step()
        checkpointer.stage(2, {"step": 2})
        checkpointer.write()
        checkpointer.wait()
        found.append(_state(model, optimizer))
        resumed = _checkpointer(world, words, each, folder / str(number))
        assert resumed[0].load() is not None
        for of in (model, resumed[1]):
            _set_grads(of, 3)
        optimizer.step()
        resumed[2].step()
        assert equal(_state(model, optimizer), _state(*resumed[1:])), "the step after a resume"
    return found


def _load(world: World, settings: list[Optimizer], folder: Path) -> list[Tensors]:
    found = []
    for number, each in enumerate(settings):
        checkpointer, *loaded = _checkpointer(world, [], each, folder / str(number))
        assert checkpointer.load() is not None
        found.append(_state(*loaded))
    return found


def _checkpointer(
    world: World, words: list[str], settings: Optimizer, folder: Path
) -> tuple[Checkpointer, nn.Module, torch.optim.Optimizer]:
    config = _config(words, settings)
    model = Engine(config, WIDE, world).model
    optimizer = build_optimizer(model, settings)
    return Checkpointer(folder, model, optimizer, config.checkpoint), model, optimizer


@pytest.mark.parametrize(
    "settings", [[EIGHT_BITS, MUON_BF16], pytest.param([BF16, MUON], marks=pytest.mark.slow)], ids=["most", "rest"]
)
def test_resumed_state_is_that_of_the_checkpoint_on_any_ranks(tmp_path: Path, settings: list[Optimizer]) -> None:
    experts = ["--parallelism.expert_parallel_degree=2"]
    saved = run_distributed(_train_and_save, 4, experts, settings, tmp_path)[0]
    for size in (2, 1):
        loaded = run_distributed(_load, size, settings, tmp_path)[0]
        assert all(equal(found, state) for found, state in zip(loaded, saved, strict=True))
