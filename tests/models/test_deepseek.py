"""DeepSeek-V2 against transformers: logits and every gradient of packed documents, each document by itself there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.documents import pack_documents
from tests.models.deepseek_tiny import YARN, hf_model, in_hf_memory, make_pack, random_model, tiny_args

LENGTHS = (1, 23, 9, 40)


def differences(ours: Decoder, theirs: nn.Module, pack: dict[str, Any]) -> dict[str, float]:
    """Relative differences (2-norm) of the logits and of the gradient of each parameter, by transformers' names."""
    documents = zip(pack["input_ids_T"].split(LENGTHS), pack["position_ids_T"].split(LENGTHS), strict=True)
    expected = torch.cat([theirs(input_ids=ids[None], position_ids=at[None]).logits[0] for ids, at in documents])
    logits = ours(**pack)
    targets = pack["input_ids_T"].roll(-1)
    for model, scores in ((ours, logits), (theirs, expected)):
        model.zero_grad()
        F.cross_entropy(scores, targets).backward()
    wanted = {"logits": expected.detach(), **_grads(theirs)}
    found = {"logits": logits.detach(), **in_hf_memory(_grads(ours))}
    assert found.keys() == wanted.keys()
    return {name: float((found[name] - grad).norm() / grad.norm()) for name, grad in wanted.items()}


def _grads(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad for name, grad in grads.items() if grad is not None}


def worst(args: ModelArgs, seed: int, first_position: int = 0) -> float:
    ours = random_model(args, seed)
    return max(differences(ours, hf_model(ours), make_pack(args, LENGTHS, seed, first_position)).values())


GREEDY = {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
LAYOUTS = {
    "groups": tiny_args(),
    "one group of four": tiny_args(moe={"topk_group": 1, "num_experts_per_tok": 2}),
    "greedy, queries without latent": tiny_args(4, mla={"q_lora_rank": None}, moe=GREEDY),
    "one expert a token": tiny_args(moe=GREEDY | {"num_experts_per_tok": 1, "routed_scaling_factor": 16.0}),
    "every expert": tiny_args(moe=GREEDY | {"num_experts_per_tok": 8}),
    "two dense layers, tied": tiny_args(moe={"first_k_dense_replace": 2}, tie_embeddings=True),
    "no dense layer, one shared expert": tiny_args(moe={"first_k_dense_replace": 0, "n_shared_experts": 1}),
    "values as wide as keys": tiny_args(2, mla={"v_head_dim": 24}),
    "one head, plain rope": tiny_args(1, rope_scaling=None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_logits_and_gradients_equal_transformers_per_document(layout: str, seed: int) -> None:
    assert worst(LAYOUTS[layout], seed) < 1e-5


@pytest.mark.parametrize(
    "scaling",
    [
        YARN,
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64},
        None,
    ],
)
def test_positions_far_out_rotate_as_in_transformers(scaling: dict[str, Any] | None) -> None:
    args = tiny_args(rope_scaling=scaling, max_position_embeddings=163840)
    assert worst(args, 5, first_position=160000) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": None},
        {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        {"moe": {"topk_group": 3}},
        {"moe": {"routed_scaling_factor": 1.0}},
    ],
)
def test_another_architecture_with_the_same_weights_is_caught(changes: dict[str, Any]) -> None:
    ours, other = random_model(tiny_args(), 0), random_model(tiny_args(**changes), 0)
    pack = make_pack(ours.args, LENGTHS, 0)
    assert max(differences(other, hf_model(ours), pack).values()) > 1e-3


def test_a_pack_equals_its_documents_one_by_one() -> None:
    args = tiny_args()
    model = random_model(args, 3)
    pack = make_pack(args, LENGTHS, 3)
    packed = model(**pack)
    alone = [
        model(ids, at, pack_documents([len(ids)]))
        for ids, at in zip(pack["input_ids_T"].split(LENGTHS), pack["position_ids_T"].split(LENGTHS), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_blocks_compile_in_one_graph_for_all_packs() -> None:
    args = tiny_args(moe={"aux_loss_alpha": 0.1})
    models = random_model(args, 0), random_model(args, 0)
    graphs = []

    def counting_backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    for block in models[1].layers:
        block.compile(fullgraph=True, dynamic=False, backend=counting_backend)
    for seed, lengths in ((0, LENGTHS), (1, (50, 10, 12, 1))):
        pack = make_pack(args, lengths, seed)
        documents = torch.arange(4).repeat_interleave(torch.tensor(lengths))
        for model in models:
            model.zero_grad()
            model.balance.set_documents(documents, torch.tensor([0.1, 0.2, 0.3, 0.4]))
            model(**pack).square().mean().backward()
        for eager, compiled in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-4, atol=1e-6)
        loads = [torch.stack(list(model.tokens_per_expert().values())) for model in models]
        assert torch.equal(*loads)
    # The dense layer and the sparse ones.
    assert len(graphs) == 2
