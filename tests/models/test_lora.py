"""Adapters against PEFT on transformers: adapted matrices, logits, gradients, merging; and initial values."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hbp_titan.models.decoder import Decoder
from hbp_titan.models.hf import to_hf_name
from hbp_titan.models.hf_export import save_adapter_folder
from hbp_titan.models.layers import is_adapter
from hbp_titan.models.lora import LoRALinear, apply_lora, init_lora_parameter, lora_targets, merged
from tests.models import deepseek_tiny
from tests.models.families import TINY
from tests.models.test_decoder import build_pair, hf_logits, make_pack, tiny_args

DEFAULT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_name(fqn: str) -> str:
    """Return PEFT's name, inside a model, of an adapter's parameter."""
    return "base_model.model." + to_hf_name(fqn).removesuffix("weight") + "default.weight"


def build_adapted_pair(args: Any, targets: list[str], rank: int = 3, alpha: float = 7.0) -> tuple[Decoder, nn.Module]:
    """Return our model and PEFT's on the same base with the same random A and B."""
    ours, theirs = build_pair(args, 0)
    return adapt_pair(ours, theirs, targets, "all-linear" if targets == ["all-linear"] else targets, rank, alpha)


def adapt_pair(
    ours: Decoder, theirs: nn.Module, targets: list[str], peft_targets: Any, rank: int = 3, alpha: float = 7.0
) -> tuple[Decoder, nn.Module]:
    """Add adapters with the same random A and B to both models. peft_targets: the targets in PEFT's form."""
    apply_lora(ours, rank, alpha, targets)
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=peft_targets, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(theirs, config)
    generator = torch.Generator().manual_seed(1)
    their_parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for fqn, parameter in ours.named_parameters():
            if is_adapter(fqn):
                parameter.normal_(std=0.2, generator=generator)
                their_parameters[peft_name(fqn)].copy_(parameter)
    return ours, theirs


def assert_equal(ours: Decoder, theirs: nn.Module, logits: Tensor, expected: Tensor, labels: Tensor) -> int:
    """Compare logits and the gradients of all adapters; return the number of adapters."""
    assert (logits - expected).norm() < 1e-5 * expected.norm()
    for scores in (logits, expected):
        F.cross_entropy(scores, labels).backward()
    found = {peft_name(fqn): p.grad for fqn, p in ours.named_parameters() if p.grad is not None}
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert grad.norm() > 0
        assert (found[name] - grad).norm() < 1e-5 * grad.norm(), name
    return len(found)


@pytest.mark.parametrize(
    ("hf_model_type", "heads", "kv_heads", "targets", "tied"),
    [
        ("llama", 6, 2, DEFAULT, True),
        ("llama", 3, 1, ["all-linear"], False),
        ("qwen2", 6, 3, ["q_proj", "v_proj"], False),
        ("qwen3", 4, 2, ["self_attn.o_proj", "1.mlp.down_proj"], True),
    ],
)
def test_logits_and_gradients_equal_peft(
    hf_model_type: str, heads: int, kv_heads: int, targets: list[str], tied: bool
) -> None:
    args = tiny_args(hf_model_type, heads, kv_heads, tied=tied)
    ours, theirs = build_adapted_pair(args, targets)
    pack = make_pack(args, 0)
    number = assert_equal(ours, theirs, ours(**pack), hf_logits(theirs, pack), pack["input_ids_T"].roll(-1))
    assert number == 2 * len(lora_targets(Decoder(args), targets))


@pytest.mark.parametrize("targets", [["all-linear"], ["q_b_proj", "kv_b_proj", "o_proj"]])
def test_adapters_of_latent_attention_equal_peft(targets: list[str]) -> None:
    lengths = (1, 23, 9, 40)
    args = deepseek_tiny.tiny_args()
    ours = deepseek_tiny.random_model(args, 0)
    theirs = deepseek_tiny.hf_model(ours)
    # By name, because PEFT treats the matrices of experts as linear layers too.
    names = sorted({name.rpartition(".")[2] for name in lora_targets(Decoder(args), targets)})
    ours, theirs = adapt_pair(ours, theirs, targets, names)
    pack = deepseek_tiny.make_pack(args, lengths, 0)
    documents = zip(pack["input_ids_T"].split(lengths), pack["position_ids_T"].split(lengths), strict=True)
    expected = torch.cat([theirs(input_ids=i[None], position_ids=p[None]).logits[0] for i, p in documents])
    assert assert_equal(ours, theirs, ours(**pack), expected, pack["input_ids_T"].roll(-1))


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("phi3", ["all-linear"]),
        # Of three matrices in one, and of two on one layer only.
        ("phi3", ["q_proj", "v_proj", "1.mlp.up_proj", "down_proj"]),
        ("mixtral", ["all-linear"]),
        ("olmo2", ["all-linear"]),
        ("deepseek_v3", ["q_b_proj", "o_proj"]),
    ],
)
def test_peft_loads_the_exported_adapter_of_a_family(tmp_path: Path, family: str, targets: list[str]) -> None:
    args = TINY[family]
    ours, theirs = build_pair(args, 0)
    apply_lora(ours, 3, 7.0, targets)
    generator = torch.Generator().manual_seed(1)
    adapter = {
        fqn: p.detach().normal_(std=0.2, generator=generator) for fqn, p in ours.named_parameters() if is_adapter(fqn)
    }
    names = sorted({fqn.split(".")[-3] for fqn in adapter})
    options: Any = {"rank": 3, "alpha": 7.0, "target_modules": names, "base": None, "tokenizer_path": tmp_path}
    save_adapter_folder(args, adapter, tmp_path / "adapter", **options)
    import peft

    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    pack = make_pack(args, 0)
    expected = hf_logits(adapted, pack)
    assert (ours(**pack) - expected).norm() < 1e-5 * expected.norm()


def test_the_comparison_detects_a_wrong_scaling() -> None:
    args = tiny_args("llama", 3, 1, tied=False)
    ours, theirs = build_adapted_pair(args, DEFAULT)
    for module in ours.modules():
        if isinstance(module, LoRALinear):
            module.scaling *= 3
    pack = make_pack(args, 0)
    expected = hf_logits(theirs, pack)
    assert (ours(**pack) - expected).norm() > 1e-2 * expected.norm()


def test_merged_weights_equal_the_adapted_model_and_pefts_merge() -> None:
    args = tiny_args("qwen2", 6, 3, tied=False)
    ours, theirs = build_adapted_pair(args, ["all-linear"])
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    adapter = {name: p for name, p in parameters.items() if is_adapter(name)}
    base = [(name, p) for name, p in parameters.items() if not is_adapter(name)]
    whole = dict(merged(base, adapter, 7.0 / 3))
    plain = Decoder(args)
    plain.load_state_dict(whole)
    pack = make_pack(args, 0)
    torch.testing.assert_close(plain(**pack), ours(**pack), rtol=1e-4, atol=1e-4)
    for name, value in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close({to_hf_name(fqn): t for fqn, t in whole.items()}[name], value, rtol=1e-5, atol=1e-6)


def test_merging_is_in_fp32_and_keeps_other_weights() -> None:
    base = [("layers.0.a.weight", torch.full((1, 1), 256.0).bfloat16()), ("norm.weight", torch.ones(1).bfloat16())]
    # 256 + 0.5 * 1 * 1 is 256 in bfloat16.
    adapter = {f"layers.0.a.lora_{x}.weight": torch.ones(1, 1).bfloat16() for x in "AB"}
    whole = dict(merged(base, adapter, 0.5))
    assert whole["layers.0.a.weight"].item() == 256.5
    assert whole["norm.weight"] is base[1][1]


def test_an_adapted_model_starts_as_its_base_and_depends_on_the_seed_alone() -> None:
    args = tiny_args("llama", 3, 1, tied=True)
    base = Decoder(args)
    base.init_weights(0)
    model = copy.deepcopy(base)
    apply_lora(model, 4, 16, DEFAULT)
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        for fqn, parameter in reversed(list(model.named_parameters())):
            if is_adapter(fqn):
                values[fqn] = init_lora_parameter(fqn, parameter.shape, seed=5)
                parameter.copy_(values[fqn])
    pack = make_pack(args, 0)
    assert model(**pack).equal(base(**pack))
    first = "layers.0.self_attn.q_proj.lora_A.weight"
    assert values[first].shape == (4, 48)
    assert values[first].equal(init_lora_parameter(first, (4, 48), seed=5))
    assert not values[first].equal(init_lora_parameter(first, (4, 48), seed=6))
    assert not values[first].equal(values[first.replace(".0.", ".1.")])
    # Uniform in +-1/sqrt(48) = +-0.144.
    assert 0.13 < values[first].abs().max() < 0.1444
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [name for name, _ in model.named_parameters() if is_adapter(name)]
    assert len(trained) == 3 * 7 * 2


def test_models_with_fused_experts_get_adapters_on_attention_only() -> None:
    model = Decoder(tiny_args("llama", 3, 1, tied=False))
    model.layers[1].mlp.experts = nn.Parameter(torch.zeros(2, 4, 4))
    names = {name.split(".", 2)[2] for name in lora_targets(model, ["all-linear"])}
    assert names == {f"self_attn.{x}_proj" for x in "qkvo"}
    with pytest.raises(ValueError, match="'down_proj'"):
        lora_targets(model, ["o_proj", "down_proj"])


@pytest.mark.parametrize("unknown", ["lm_head", "wq", "proj"])  # the output matrix; no module; part of a name
def test_an_unknown_target_raises_with_the_known_names(unknown: str) -> None:
    model = Decoder(tiny_args("llama", 3, 1, tied=False))
    with pytest.raises(ValueError, match=f"'{unknown}'.*q_proj"):
        lora_targets(model, ["q_proj", unknown])
    assert len(lora_targets(model, ["all-linear"])) == 3 * 7
