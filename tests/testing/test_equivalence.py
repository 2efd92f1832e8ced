"""Training on four and eight ranks with three levels against transformers on one process.

The parameters after several optimizer steps cover packing, each cp style, recomputation, accumulation, loss, clipping
and AdamW.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from hbp_titan.components.optimizer import lr_factor
from hbp_titan.config import JobConfig, load_config
from hbp_titan.data.epoch import EpochPlans
from hbp_titan.data.prepare import prepare
from hbp_titan.data.token_store import TokenStore
from hbp_titan.distributed.context_parallel import ContextParallelAttention
from hbp_titan.distributed.world import World
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.hf import to_hf_name
from hbp_titan.models.hf_config import args_to_hf_config
from hbp_titan.preflight import cost_model
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from tests.tiny_run import ARGS, write_tiny_run

LEVELS = {
    "ulysses": "64:1,128:2:ulysses:full,512:4:ulysses:keep_attention:1",
    "styles": "64:2,128:4:allgather:full,512:4:hybrid:keep_attention",
    "eight ranks": "64:1,128:8:allgather:full:1,512:8:hybrid:keep_attention",
}


@pytest.fixture(scope="module")
def argv_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Return the command line of a run for each set of levels."""
    folder = tmp_path_factory.mktemp("equivalence")
    arguments = [word for word in write_tiny_run(folder) if not word.startswith("--levels")]
    arguments += [
        "--training.global_batch_tokens=700",
        # With the usual 1e-8 Adam's first update is the sign of the gradient, also where that is rounding noise.
        "--optimizer.eps=1e-4",
        "--checkpoint.enable=false",
        "--checkpoint.export_hf=false",
    ]
    return {name: [*arguments, f"--levels={levels}"] for name, levels in LEVELS.items()}


def _train(world: World, argv: list[str], without: str | None) -> tuple[dict[str, torch.Tensor], set[int]]:
    # Patched permanently: this process ends with the test.
    if without == "all-to-all":
        ContextParallelAttention.all_to_all = lambda attention, x: x  # type: ignore[method-assign]
    if without == "all-gather":
        ContextParallelAttention.all_gather = lambda attention, x: torch.cat([x] * attention.state.gather_group.size())  # type: ignore[method-assign]
    trainer = Trainer(load_config(argv), world)
    trained: set[int] = set()
    whole_step = trainer.train_step

    def counted(plan: Any, step: int, batches: Any) -> dict[str, Any]:
        trained.update(plan.level_of_iteration[plan.step_offsets[step] : plan.step_offsets[step + 1]].tolist())
        return whole_step(plan, step, batches)

    trainer.train_step = counted  # type: ignore[method-assign]
    trainer.train()
    return {name: p.full_tensor().detach() for name, p in trainer.model.named_parameters()}, trained  # type: ignore[attr-defined]


def _reference(config: JobConfig, world_size: int) -> dict[str, torch.Tensor]:
    """Train transformers' Llama in a plain loop, one sample at a time; only the order of samples is the plan's."""
    store = TokenStore.open(prepare(config)[0])
    plans = EpochPlans(config, store, world_size, cost_model(ARGS))
    hf_config = transformers.AutoConfig.for_model(**args_to_hf_config(ARGS))
    model = transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager", dtype=torch.float32)
    ours = Decoder(ARGS)
    ours.init_weights(config.training.seed)
    state = {to_hf_name(name): value for name, value in ours.state_dict().items()}
    model.load_state_dict(state)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-4,
    )
    plan = plans.plan_for(0)
    factor = lr_factor(config.lr_scheduler, plan.num_steps)
    for step in range(plan.num_steps):
        packs = [
            pack
            for i in range(plan.step_offsets[step], plan.step_offsets[step + 1])
            for pack in plan.iteration(i).packs
        ]
        losses = []
        for sample_id in [int(i) for pack in packs for i in pack]:
            tokens, mask = store.sample(sample_id)
            ids = torch.tensor(tokens.astype("int64"))
            logits = model(ids[None]).logits[0, :-1]
            kept = torch.tensor(mask[1:])
            losses.append(F.cross_entropy(logits[kept], ids[1:][kept], reduction="none"))
        torch.cat(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor(step)
        optimizer.step()
        optimizer.zero_grad()
    assert plan.num_steps >= 4
    return {name: p.detach() for name, p in model.named_parameters()}


def _worst(trained: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    return max(
        float((value - reference[to_hf_name(name)]).norm() / reference[to_hf_name(name)].norm())
        for name, value in trained.items()
    )


@pytest.mark.parametrize(
    ("world_size", "levels", "options"),
    [
        pytest.param(4, "ulysses", ["--packing.level_order=alternate"], marks=pytest.mark.slow),
        pytest.param(4, "ulysses", ["--packing.level_order=interleave"], marks=pytest.mark.slow),
        (4, "ulysses", ["--packing.level_order=interleave", "--parallelism.dp_replicate=2"]),
        (4, "styles", ["--packing.level_order=alternate"]),
        pytest.param(
            4,
            "styles",
            ["--packing.level_order=interleave", "--parallelism.cp_backend=dtensor"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            8,
            "eight ranks",
            ["--packing.level_order=alternate", "--parallelism.dp_replicate=2"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ranks_with_three_levels_equal_transformers_on_one(
    argv_of: dict[str, list[str]], world_size: int, levels: str, options: list[str]
) -> None:
    argv = [*argv_of[levels], *options]
    parameters, trained = run_distributed(_train, world_size, argv, None)[0]
    assert trained == {0, 1, 2}
    error = _worst(parameters, _reference(load_config(argv), world_size))
    assert error < 1e-5


@pytest.mark.parametrize(("levels", "without"), [("ulysses", "all-to-all"), ("styles", "all-gather")])
def test_missing_collective_is_detected(argv_of: dict[str, list[str]], levels: str, without: str) -> None:
    parameters, _ = run_distributed(_train, 4, argv_of[levels], without)[0]
    error = _worst(parameters, _reference(load_config(argv_of[levels]), 4))
    assert error > 1e-3
