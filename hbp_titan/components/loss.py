"""Chunked cross entropy of a packed batch, without [T, vocab] logits, and the weight of each token in it.

Both gradients are computed while a chunk's logits exist (as in Liger Kernel's fused_linear_cross_entropy and torch
2.13's linear_cross_entropy, which has no per-token weights and is missing in 2.11). Backward only scales them: no
logits are computed twice or kept. With bf16 inputs, products multiply bf16 and accumulate in fp32.

The weights (paper section 3.3) follow from the plan alone: a step's objective is the sum of weight * loss over its
trained tokens, all ranks and all micro-batches.

Shape suffixes: T tokens, L loss tokens, C tokens of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hbp_titan.data.loader import SampleWeights
from hbp_titan.packing import Plan


@torch.library.custom_op("hbp_titan::matmul_fp32_cpu", mutates_args=())
def _matmul_fp32_cpu(a: Tensor, b: Tensor) -> Tensor:
    # The product of two bf16 numbers is exact in fp32.
    return torch.mm(a.float(), b.float())


@_matmul_fp32_cpu.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


@torch.library.custom_op("hbp_titan::add_matmul_fp32", mutates_args=("total",))
def _add_matmul_fp32(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.is_cuda:
        # An fp32 `self` with bf16 factors works since torch 2.10 (pytorch #167931), but on fake tensors only since
        # 2.13 (#163880): one more reason for a custom op.
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


@_add_matmul_fp32.register_fake
def _(total: Tensor, a: Tensor, b: Tensor) -> None:
    return None


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, for bf16 matrices in fp32."""
    if a.dtype != torch.bfloat16:
        return torch.mm(a, b)
    # torch has out_dtype on CUDA only. On the CPU a single op: a dry run must not count the fp32 copies inside it.
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else _matmul_fp32_cpu(a, b)


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, which is fp32 if a and b are bf16."""
    if a.dtype == torch.bfloat16:
        _add_matmul_fp32(total, a, b)
    else:
        total.addmm_(a, b)


def _losses_and_exponentials(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses [C] and the sums of exponentials [C]; the logits are replaced by their exponentials."""
    # In place: a [C, V] tensor of a large vocabulary takes a gigabyte, and logsumexp or log_softmax would allocate one.
    largest_C = logits_CV.amax(-1)
    label_C = logits_CV.gather(1, labels_C[:, None])[:, 0]
    sums_C = logits_CV.sub_(largest_C[:, None]).exp_().sum(-1)
    return sums_C.log() + largest_C - label_C, sums_C


def _chunk(hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor, weights_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return a chunk's losses [C] and the gradient of their weighted sum by the logits, [C, V] in hidden's dtype."""
    logits_CV = _matmul(hidden_CH, weight_VH.T)
    losses_C, sums_C = _losses_and_exponentials(logits_CV, labels_C)
    # d loss / d logits = softmax - one_hot, times the token's weight.
    grad_CV = logits_CV if logits_CV.dtype == hidden_CH.dtype else torch.empty_like(logits_CV, dtype=hidden_CH.dtype)
    torch.mul(logits_CV, (weights_C / sums_C)[:, None], out=grad_CV)
    # Rounded once, after the subtraction; expm1(-loss) is softmax - 1 without the cancellation.
    at_label_C = (torch.expm1(-losses_C) * weights_C).to(grad_CV.dtype)
    return losses_C, grad_CV.scatter_(1, labels_C[:, None], at_label_C[:, None])


@cache
def _compiled_chunk(backend: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return `_chunk` compiled, which reads the logits in few passes and writes only their gradient."""
    compiled = torch.compile(_chunk, backend=backend, fullgraph=True, dynamic=False)

    def chunk(hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor, weights_C: Tensor) -> tuple[Tensor, Tensor]:
        if len(hidden_CH) == 1:
            # The compiler specializes size 1 and would build a graph for it.
            return _chunk(hidden_CH, weight_VH, labels_C, weights_C)
        for tensor in (hidden_CH, labels_C, weights_C):
            # The last chunk of each batch has another size: one graph for all sizes.
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(hidden_CH, weight_VH, labels_C, weights_C)

    return chunk


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_LH: Tensor,
        weight_VH: Tensor,
        labels_L: Tensor,
        token_weights_L: Tensor,
        chunk_tokens: int,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(weight_VH.dtype, torch.float32)
        token_weights_L = token_weights_L.to(dtype)
        losses_L = torch.empty(len(hidden_LH), dtype=dtype, device=hidden_LH.device)
        grad_hidden_LH = torch.empty_like(hidden_LH)
        # fp32, because a bf16 sum over many chunks loses small terms. A frozen matrix (LoRA) needs no gradient.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=dtype) if ctx.needs_input_grad[1] else None
        chunk = _compiled_chunk(backend) if backend else _chunk
        for start in range(0, hidden_LH.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            hidden_CH, labels_C, weights_C = hidden_LH[part], labels_L[part], token_weights_L[part]
            losses_L[part], grad_CV = chunk(hidden_CH, weight_VH, labels_C, weights_C)
            torch.mm(grad_CV, weight_VH, out=grad_hidden_LH[part])
            if grad_weight_VH is not None:
                _add_matmul(grad_weight_VH, grad_CV.T, hidden_CH)
            # Otherwise it would still exist while the next chunk allocates its own.
            del grad_CV
        ctx.save_for_backward(grad_hidden_LH, grad_weight_VH)
        ctx.weight_dtype = weight_VH.dtype
        ctx.mark_non_differentiable(losses_L)
        return losses_L @ token_weights_L, losses_L

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_LH, grad_weight_VH = ctx.saved_tensors
        grad_hidden_LH = grad_hidden_LH * grad.to(grad_hidden_LH.dtype)
        if grad_weight_VH is not None:
            # Scaled and rounded in one pass; autograd frees the fp32 sum when this returns.
            rounded_VH = torch.empty_like(grad_weight_VH, dtype=ctx.weight_dtype)
            grad_weight_VH = torch.mul(grad_weight_VH, grad, out=rounded_VH)
        return grad_hidden_LH, grad_weight_VH, None, None, None, None


def linear_cross_entropy(
    hidden_LH: Tensor,
    weight_VH: Tensor,
    labels_L: Tensor,
    token_weights_L: Tensor,
    chunk_tokens: int,
    backend: str = "",
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of cross_entropy(hidden @ weight.T, labels), a scalar, and each token's loss, [L].

    Both are fp32 (float64 for float64 inputs); only the sum is differentiable. At most `chunk_tokens` rows of logits
    exist at a time.

    Args:
        hidden_LH, weight_VH: of the same dtype. L may be 0.
        token_weights_L: fp32, see NORMALIZERS.
        backend: torch.compile's for the work on a chunk's logits; "" runs it eagerly.
    """
    return _ChunkedLinearCrossEntropy.apply(hidden_LH, weight_VH, labels_L, token_weights_L, chunk_tokens, backend)


def linear_cross_entropy_losses(hidden_LH: Tensor, weight_VH: Tensor, labels_L: Tensor, chunk_tokens: int) -> Tensor:
    """Return each token's loss, [L] as linear_cross_entropy does, without gradients."""
    parts = zip(hidden_LH.split(chunk_tokens), labels_L.split(chunk_tokens), strict=True)
    losses = [_losses_and_exponentials(_matmul(h_CH, weight_VH.T), l_C)[0] for h_CH, l_C in parts]
    return torch.cat(losses)


class _SelectRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, index_L: Tensor) -> Tensor:
        ctx.save_for_backward(index_L)
        ctx.num_rows = len(x_TH)
        return x_TH.index_select(0, index_L)

    @staticmethod
    def backward(ctx: Any, grad_LH: Tensor) -> tuple[Tensor, None]:
        (index_L,) = ctx.saved_tensors
        return grad_LH.new_zeros(ctx.num_rows, *grad_LH.shape[1:]).index_copy_(0, index_L, grad_LH), None


def select_rows(x_TH: Tensor, index_L: Tensor) -> Tensor:
    """Return x[index] for distinct rows, with a backward that only copies.

    The backward of plain indexing sorts the index and that of index_select adds atomically, both for repeated rows.
    """
    return _SelectRows.apply(x_TH, index_L)


# Loss normalizers: (plan, micro_batch, sample ids of a pack, int64 [n]) -> weight of each trained token of each sample,
# float64 [n], 0 for a sample that trains nothing. With T trained tokens in the step, T_p of them in a pack (one
# data-parallel rank of one micro-batch), t_i in a sample, P packs and S samples with trained tokens:


def ave_token(plan: Plan, micro_batch: int, sample_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """1 / T: every token counts the same, however it is packed."""
    step = int(plan.step_of_iteration[micro_batch])
    return _where_trained(plan, sample_ids, 1.0 / max(int(plan.step_loss_tokens[step]), 1))


def token_mean(plan: Plan, micro_batch: int, sample_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """1 / (T_p * P): mean within each pack, then over packs; a token of a sparse pack counts more."""
    trained = _trained_by_pack(plan, *_micro_batches_of_step(plan, micro_batch))
    in_pack = int(plan.loss_tokens[sample_ids].sum())
    return _where_trained(plan, sample_ids, 1.0 / max(in_pack * int((trained > 0).sum()), 1))


def sample_mean(plan: Plan, micro_batch: int, sample_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """1 / (t_i * S): mean within each sample, then over samples; a token of a short answer counts more."""
    samples = int((plan.loss_tokens[plan.samples_of(*_micro_batches_of_step(plan, micro_batch))] > 0).sum())
    trained = plan.loss_tokens[sample_ids]
    return np.where(trained > 0, 1.0 / np.maximum(trained * samples, 1), 0.0)


def loss_sum(plan: Plan, micro_batch: int, sample_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """1: the objective grows with the tokens of the step."""
    return _where_trained(plan, sample_ids, 1.0)


NORMALIZERS: dict[str, SampleWeights] = {
    "ave_token": ave_token,
    "token_mean": token_mean,
    "sample_mean": sample_mean,
    "sum": loss_sum,
}
"""By training.loss_normalization; the four that the paper compares."""


def weight_range(normalizer: SampleWeights, plan: Plan, step: int) -> tuple[float, float]:
    """Return the smallest and largest token weight in an optimizer step, as multiples of ave_token's 1 / T.

    (1, 1) means that every token counts the same; (0.2, 9) that some count 45 times as much as others.
    """
    first, last = int(plan.step_offsets[step]), int(plan.step_offsets[step + 1])
    if normalizer is token_mean:
        trained = _trained_by_pack(plan, first, last)
        weights = 1.0 / (trained[trained > 0] * max(int((trained > 0).sum()), 1))
    else:
        # The other weights do not depend on the pack: all samples of the step at once.
        weights = normalizer(plan, first, plan.samples_of(first, last))
    weights = weights[weights > 0] * int(plan.step_loss_tokens[step])
    return (float(weights.min()), float(weights.max())) if len(weights) else (0.0, 0.0)


def _trained_by_pack(plan: Plan, first: int, last: int) -> NDArray[np.int64]:
    """Return the trained tokens of each pack of micro-batches first to last - 1."""
    offsets = plan.packs.offsets[plan.pack_offsets[first] : plan.pack_offsets[last] + 1]
    running = np.concatenate([[0], np.cumsum(plan.loss_tokens[plan.samples_of(first, last)])])
    return np.diff(running[offsets - offsets[0]])


def _micro_batches_of_step(plan: Plan, micro_batch: int) -> tuple[int, int]:
    step = int(plan.step_of_iteration[micro_batch])
    return int(plan.step_offsets[step]), int(plan.step_offsets[step + 1])


def _where_trained(plan: Plan, sample_ids: NDArray[np.int64], weight: float) -> NDArray[np.float64]:
    return np.where(plan.loss_tokens[sample_ids] > 0, weight, 0.0)
