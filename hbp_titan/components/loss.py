"""The cross entropy of a packed batch's trained tokens, without the [T, vocab] logits.

Owns the chunked linear cross entropy. Both gradients are made while a chunk's logits exist (as in Liger Kernel's
fused_linear_cross_entropy and torch 2.13's linear_cross_entropy, which has no per-token weights and is missing in
2.11): backward only scales them, and no logits are computed twice or kept.

Shape suffixes: L loss tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_LD: Tensor, weight_VD: Tensor, labels_L: Tensor, token_weights_L: Tensor, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        objective = torch.zeros((), dtype=torch.float32, device=hidden_LD.device)
        losses_L = torch.empty(len(hidden_LD), dtype=torch.float32, device=hidden_LD.device)
        grad_hidden_LD = torch.empty_like(hidden_LD)
        dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        # Many chunks are summed: fp32 keeps what bf16 would round away. A frozen matrix (LoRA) needs none.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden_LD.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            hidden_CD, labels_C, weights_C = hidden_LD[part], labels_L[part], token_weights_L[part]
            logits_CV = (hidden_CD @ weight_VD.T).to(dtype)
            losses_C = F.cross_entropy(logits_CV, labels_C, reduction="none")
            objective += losses_C @ weights_C.to(losses_C.dtype)
            losses_L[part] = losses_C
            # d loss / d logits = softmax - one_hot
            grad_CV = torch.softmax(logits_CV, dim=-1)
            grad_CV.scatter_add_(1, labels_C[:, None], grad_CV.new_full((len(labels_C), 1), -1.0))
            grad_CV = (grad_CV * weights_C[:, None]).to(hidden_LD.dtype)
            torch.matmul(grad_CV, weight_VD, out=grad_hidden_LD[part])
            if grad_weight_VD is not None:
                grad_weight_VD += grad_CV.T @ hidden_CD
        ctx.save_for_backward(grad_hidden_LD, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(losses_L)
        return objective, losses_L

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_LD, grad_weight_VD = ctx.saved_tensors
        grad_hidden_LD = grad_hidden_LD * grad.to(grad_hidden_LD.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD * grad.to(grad_weight_VD.dtype)
        return grad_hidden_LD, grad_weight_VD, None, None, None


def linear_cross_entropy(
    hidden_LD: Tensor, weight_VD: Tensor, labels_L: Tensor, token_weights_L: Tensor, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """cross_entropy(hidden @ weight.T, labels) of L tokens: their sum by weight, a scalar, and each one's own, [L].

    Both are fp32; only the first is differentiable. token_weights_L: fp32 (components/normalizer.py); L may be 0. At
    most `chunk_tokens` rows of logits exist at one time.
    """
    return _ChunkedLinearCrossEntropy.apply(hidden_LD, weight_VD, labels_L, token_weights_L, chunk_tokens)


def linear_cross_entropy_losses(hidden_LD: Tensor, weight_VD: Tensor, labels_L: Tensor, chunk_tokens: int) -> Tensor:
    """Each token's own alone, fp32 [L], without gradients."""
    parts = zip(hidden_LD.split(chunk_tokens), labels_L.split(chunk_tokens), strict=True)
    losses = [F.cross_entropy((h_CD @ weight_VD.T).float(), l_C, reduction="none") for h_CD, l_C in parts]
    return torch.cat(losses)
