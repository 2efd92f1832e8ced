"""The chunked linear cross entropy against torch's own on the whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hbp_titan.components.loss import linear_cross_entropy, linear_cross_entropy_losses


def _inputs(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 50, (num_tokens,), generator=generator)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 20, 64])
def test_sum_and_gradients_equal_the_whole_logits(chunk_tokens: int) -> None:
    hidden, weight, labels = _inputs(20)
    token_weights = torch.linspace(0.0, 2.0, 20)
    losses = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    expected = losses @ token_weights
    expected_grads = torch.autograd.grad(expected * 0.25, (hidden, weight), retain_graph=True)
    objective, token_losses = linear_cross_entropy(hidden, weight, labels, token_weights, chunk_tokens)
    grads = torch.autograd.grad(objective * 0.25, (hidden, weight))
    torch.testing.assert_close(objective, expected)
    torch.testing.assert_close(token_losses, losses.detach())
    torch.testing.assert_close(grads, expected_grads)
    assert not token_losses.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy_losses(hidden, weight, labels, chunk_tokens), losses)


def test_frozen_output_matrix_gets_no_gradient_and_changes_none() -> None:
    hidden, weight, labels = _inputs(20)
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, torch.ones(20), 7)[0], hidden)
    objective, _ = linear_cross_entropy(hidden, weight.detach(), labels, torch.ones(20), 7)
    (saved,) = [t for t in objective.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    assert saved.shape == hidden.shape
    assert torch.autograd.grad(objective, hidden)[0].equal(expected[0])


def test_no_loss_token_gives_zero_and_zero_gradients() -> None:
    hidden, weight, labels = _inputs(0)
    loss, token_losses = linear_cross_entropy(hidden, weight, labels, torch.zeros(0), 8)
    loss.backward()
    assert loss.item() == 0.0
    assert token_losses.shape == (0,)
    assert linear_cross_entropy_losses(hidden, weight, labels, 8).shape == (0,)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_bfloat16_stays_near_the_fp32_result() -> None:
    hidden, weight, labels = _inputs(300, torch.bfloat16)
    loss, _ = linear_cross_entropy(hidden, weight, labels, torch.ones(300), 64)
    loss.backward()
    hidden_32, weight_32 = (x.detach().float().requires_grad_() for x in (hidden, weight))
    expected = F.cross_entropy(hidden_32 @ weight_32.T, labels, reduction="sum")
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0.0)
    assert weight.grad is not None
    assert weight_32.grad is not None
    assert (weight.grad - weight_32.grad).norm() < 1e-2 * weight_32.grad.norm()


def test_logits_of_one_chunk_only_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = _inputs(20)
    rows = []
    whole = F.cross_entropy

    def watched(logits: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        rows.append(len(logits))
        return whole(logits, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "cross_entropy", watched)
    linear_cross_entropy(hidden, weight, labels, torch.ones(20), 8)
    assert rows == [8, 8, 4]
