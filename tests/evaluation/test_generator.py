"""Greedy generation with a cache against transformers' generate, token by token; batches; the model left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hbp_titan.evaluation.generate import Generator, batches_by_length, load_model
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.hf import save_hf_folder
from hbp_titan.models.hf_config import token_ids_from_hf
from tests.models import deepseek_tiny
from tests.models.test_decoder import build_pair, tiny_args

LENGTHS = (1, 7, 40, 23, 100)
NEW_TOKENS = 24


def random_prompts(vocab_size: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def theirs_greedy(model: Any, prompt: list[int], eos: list[int] | None, limit: int = NEW_TOKENS) -> list[int]:
    """transformers, one prompt at a time: it never sees a batch. The token that ends the answer is cut off."""
    ids = torch.tensor([prompt])
    settings = transformers.GenerationConfig(
        max_new_tokens=limit, do_sample=False, eos_token_id=eos, pad_token_id=0, use_cache=True
    )
    with torch.no_grad():
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0]
    new = answer[len(prompt) :].tolist()
    return new[:-1] if eos and new[-1] in eos else new


# (query heads, key/value heads, seed); with these seeds the answers to the five prompts differ and do not stand still.
LAYOUTS = {"llama": (6, 2, 0), "qwen2": (3, 1, 2), "qwen3": (4, 2, 1), "deepseek_v2": (3, 3, 2)}


def pair_of(family: str) -> tuple[Decoder, nn.Module]:
    heads, kv_heads, seed = LAYOUTS[family]
    if family == "deepseek_v2":
        model = deepseek_tiny.random_model(deepseek_tiny.tiny_args(heads), seed)
        return model, deepseek_tiny.hf_model(model)
    return build_pair(tiny_args(family, heads, kv_heads, tied=False), seed)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "deepseek_v2"])
def test_answers_of_prompts_of_different_lengths_equal_transformers_greedy(family: str) -> None:
    ours, theirs = pair_of(family)
    prompts = random_prompts(ours.args.vocab_size)
    expected = [theirs_greedy(theirs, prompt, None) for prompt in prompts]
    assert len({tuple(answer) for answer in expected}) == len(LENGTHS)
    assert Generator(ours, ()).answers(prompts, [NEW_TOKENS] * len(prompts)) == expected
    # Tokens that the answers hold somewhere end them there; the other rows of the batch go on.
    eos = [expected[0][3], expected[3][10]]
    stopped = [theirs_greedy(theirs, prompt, eos) for prompt in prompts]
    assert min(map(len, stopped)) < NEW_TOKENS
    assert Generator(ours, eos).answers(prompts, [NEW_TOKENS] * len(prompts)) == stopped


def test_batches_and_limits_do_not_change_an_answer() -> None:
    ours, _ = pair_of("llama")
    prompts = random_prompts(ours.args.vocab_size, seed=1)
    whole = Generator(ours, ()).answers(prompts, [12] * 5)
    limits = [0, 1, 12, 5, 3]
    for cache_tokens in (1, 60, 10_000):
        found = Generator(ours, (), cache_tokens).answers(prompts, limits)
        assert found == [answer[:limit] for answer, limit in zip(whole, limits, strict=True)]


def test_a_cache_that_forgets_a_token_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from hbp_titan.evaluation.generate import CachedAttention

    ours, theirs = pair_of("llama")
    prompts = random_prompts(ours.args.vocab_size)
    stored = CachedAttention._stored

    def without_first(self: CachedAttention, x_TKD: torch.Tensor) -> torch.Tensor:
        cache = stored(self, x_TKD)
        cache[:, :, 0] = 0
        return cache

    monkeypatch.setattr(CachedAttention, "_stored", without_first)
    expected = [theirs_greedy(theirs, prompt, None) for prompt in prompts]
    assert Generator(ours, ()).answers(prompts, [NEW_TOKENS] * len(prompts)) != expected


def test_the_model_is_as_before_afterwards() -> None:
    ours, _ = pair_of("qwen2")
    kernels = [block.inner_attention for block in ours.blocks()]
    Generator(ours, ()).answers([[1, 2, 3]], [4])
    assert [block.inner_attention for block in ours.blocks()] == kernels


def test_an_empty_prompt_is_refused() -> None:
    ours, _ = pair_of("llama")
    with pytest.raises(ValueError, match="prompt 2 has no token"):
        Generator(ours, ()).answers([[1], []], [1, 1])


def test_batches_hold_no_more_than_they_may_and_the_longest_come_first() -> None:
    assert batches_by_length([10, 100, 9, 50, 49], 100) == [[1], [3, 4], [0, 2]]
    assert batches_by_length([500], 100) == [[0]]
    assert batches_by_length([], 100) == []


@pytest.mark.parametrize("tied", [False, True])
def test_a_loaded_folder_has_the_weights_and_the_stop_ids_of_the_export(tied: bool, tmp_path: Path) -> None:
    args: ModelArgs = tiny_args("llama", 3, 1, tied=tied)
    model = Decoder(args)
    model.init_weights(0)
    save_hf_folder(
        args, model.named_parameters(), tmp_path / "hf", dtype=torch.float32, token_ids={"eos_token_id": [5]}
    )
    loaded = load_model(tmp_path / "hf", torch.device("cpu"))
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert token_ids_from_hf(tmp_path / "hf")["eos_token_id"] == [5]


@pytest.mark.gpu
def test_on_a_gpu_cached_answers_equal_those_without_a_cache() -> None:
    args = tiny_args("llama", 6, 2, tied=False, hidden_size=96, head_dim=16, num_layers=2)
    model = Decoder(args)
    model.init_weights(0)
    model = model.to("cuda", torch.bfloat16).eval()
    prompt, answer = list(range(1, 40)), []
    for _ in range(4):
        ids = torch.tensor(prompt + answer, device="cuda")
        ends = torch.tensor([0, len(ids)], dtype=torch.int32, device="cuda")
        with torch.no_grad():
            answer.append(int(model(ids, torch.arange(len(ids), device="cuda"), ends, len(ids))[-1].argmax()))
    assert Generator(model, ()).answers([prompt], [4]) == [answer]
