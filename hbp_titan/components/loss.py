"""The cross entropy of a packed batch's trained tokens, without the [T, vocab] logits.

Owns the chunked linear cross entropy. Both gradients are computed while a chunk's logits exist (as in Liger Kernel's
fused_linear_cross_entropy and torch 2.13's linear_cross_entropy, which has no per-token weights and is missing in
2.11): backward only scales them, and no logits are computed twice or kept.

Memory above the hidden states, for a bf16 matrix: its gradient in fp32 and, of one chunk, the logits in fp32 with
their gradient in bf16; the matrix's gradient in bf16 only when backward returns it. A chunk takes three matrix
products. With bf16 inputs these multiply bf16 and add in fp32, and two of them also return fp32: logits are not
rounded, and the chunks' gradients are summed inside the product, without a [vocab, hidden] bf16 copy for each.

Shape suffixes: T tokens, L loss tokens, C tokens of a chunk, H hidden size, V vocabulary.

Loss normalizers: the weight that each trained token has in the gradient of its optimizer step (paper section 3.3).

Owns the four that the paper compares. The objective of a step is the sum over its trained tokens of weight * loss,
summed over all ranks and iterations, so a normalizer is nothing but these weights. They follow from the plan alone:
no rank asks another. With T tokens trained in the step, T_p of them in a pack (one data-parallel rank of one
iteration), t_i in a sample, P packs and S samples with trained tokens in the step:

    ave_token    1 / T           every token counts the same, however it is packed
    token_mean   1 / (T_p * P)   mean within each rank's pack, then over packs: a token in a sparse pack counts more
    sample_mean  1 / (t_i * S)   mean within each sample, then over samples: a token of a short answer counts more
    sum          1               grows with the step's tokens

Each function takes (plan, iteration, sample ids of one pack, int64 [n]) and returns the weight of each trained token of
each sample, float64 [n]; 0 for a sample that trains nothing.
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
    # A product of two bf16 numbers is exact in fp32.
    return torch.mm(a.float(), b.float())


@_matmul_fp32_cpu.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


@torch.library.custom_op("hbp_titan::add_matmul_fp32", mutates_args=("total",))
def _add_matmul_fp32(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.is_cuda:
        # An fp32 `self` next to bf16 factors works since torch 2.10 (pytorch #167931). On fake tensors the overload
        # fails before 2.13 (#163880): one more reason for an op.
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


@_add_matmul_fp32.register_fake
def _(total: Tensor, a: Tensor, b: Tensor) -> None:
    return None


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; of bf16 matrices in fp32."""
    if a.dtype != torch.bfloat16:
        return torch.mm(a, b)
    # torch has out_dtype on CUDA alone. On the CPU one op, so that a dry run does not count the copies that it makes.
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else _matmul_fp32_cpu(a, b)


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; total is fp32 where a and b are bf16."""
    if a.dtype == torch.bfloat16:
        _add_matmul_fp32(total, a, b)
    else:
        total.addmm_(a, b)


def _losses_and_exponentials(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """The losses [C] and the sums [C] of the exponentials of the logits, which take the logits' place.

    In place, because each [C, V] tensor of a large vocabulary takes a gigabyte; logsumexp and log_softmax make one.
    """
    largest_C = logits_CV.amax(-1)
    label_C = logits_CV.gather(1, labels_C[:, None])[:, 0]
    sums_C = logits_CV.sub_(largest_C[:, None]).exp_().sum(-1)
    return sums_C.log() + largest_C - label_C, sums_C


def _chunk(hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor, weights_C: Tensor) -> tuple[Tensor, Tensor]:
    """The losses [C] of a chunk, and the gradient of their weighted sum by the logits, [C, V] in hidden's dtype."""
    logits_CV = _matmul(hidden_CH, weight_VH.T)
    losses_C, sums_C = _losses_and_exponentials(logits_CV, labels_C)
    # d loss / d logits = softmax - one_hot, times the token's weight.
    grad_CV = logits_CV if logits_CV.dtype == hidden_CH.dtype else torch.empty_like(logits_CV, dtype=hidden_CH.dtype)
    torch.mul(logits_CV, (weights_C / sums_C)[:, None], out=grad_CV)
    # Rounded once, after the subtraction. expm1(-loss) is softmax - 1 without its cancellation.
    at_label_C = (torch.expm1(-losses_C) * weights_C).to(grad_CV.dtype)
    return losses_C, grad_CV.scatter_(1, labels_C[:, None], at_label_C[:, None])


@cache
def _compiled_chunk(backend: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`_chunk` compiled: it reads the logits in few passes and writes their gradient alone."""
    compiled = torch.compile(_chunk, backend=backend, fullgraph=True, dynamic=False)

    def chunk(hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor, weights_C: Tensor) -> tuple[Tensor, Tensor]:
        if len(hidden_CH) == 1:
            # The compiler would make a graph for size 1 alone.
            return _chunk(hidden_CH, weight_VH, labels_C, weights_C)
        for tensor in (hidden_CH, labels_C, weights_C):
            # The last chunk has another size in each batch: one graph for all sizes.
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
        # Many chunks are summed: fp32 keeps what bf16 would round away. A frozen matrix (LoRA) needs no gradient.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=dtype) if ctx.needs_input_grad[1] else None
        chunk = _compiled_chunk(backend) if backend else _chunk
        for start in range(0, hidden_LH.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            hidden_CH, labels_C, weights_C = hidden_LH[part], labels_L[part], token_weights_L[part]
            losses_L[part], grad_CV = chunk(hidden_CH, weight_VH, labels_C, weights_C)
            torch.mm(grad_CV, weight_VH, out=grad_hidden_LH[part])
            if grad_weight_VH is not None:
                _add_matmul(grad_weight_VH, grad_CV.T, hidden_CH)
            # Not held while the next chunk makes its own.
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
            # Scaled and rounded in one pass. autograd frees the fp32 sum when this returns.
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
    """cross_entropy(hidden @ weight.T, labels) of L tokens: their weighted sum, a scalar, and each token's loss, [L].

    Both are fp32 (float64 for float64 inputs); only the first is differentiable. hidden, weight: of one dtype.
    token_weights_L: fp32 (components/normalizer.py); L may be 0. At most `chunk_tokens` rows of logits exist at one
    time. backend: of torch.compile for the work on a chunk's logits; "" runs it eagerly.
    """
    return _ChunkedLinearCrossEntropy.apply(hidden_LH, weight_VH, labels_L, token_weights_L, chunk_tokens, backend)


def linear_cross_entropy_losses(hidden_LH: Tensor, weight_VH: Tensor, labels_L: Tensor, chunk_tokens: int) -> Tensor:
    """Each token's loss alone, [L] as linear_cross_entropy returns it, without gradients."""
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
    """x[index] of rows that are named at most once, with a backward that copies rows.

    Indexing would sort the index in its backward, and index_select would add atomically: both for rows named twice.
    """
    return _SelectRows.apply(x_TH, index_L)


def ave_token(plan: Plan, iteration: int, sample_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Every trained token of the step counts the same."""
    step = int(plan.step_of_iteration[iteration])
    return _where_trained(plan, sample_ids, 1.0 / max(int(plan.step_loss_tokens[step]), 1))


def token_mean(plan: Plan, iteration: int, sample_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Every pack with trained tokens counts the same."""
    first, last = _iterations_of_step(plan, iteration)
    trained = _trained_by_pack(plan, first, last)
    in_pack = int(plan.loss_tokens[sample_ids].sum())
    return _where_trained(plan, sample_ids, 1.0 / max(in_pack * int((trained > 0).sum()), 1))


def sample_mean(plan: Plan, iteration: int, sample_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Every sample with trained tokens counts the same."""
    first, last = _iterations_of_step(plan, iteration)
    samples = int((plan.loss_tokens[plan.samples_of(first, last)] > 0).sum())
    trained = plan.loss_tokens[sample_ids]
    return np.where(trained > 0, 1.0 / np.maximum(trained * samples, 1), 0.0)


def loss_sum(plan: Plan, iteration: int, sample_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """The plain sum."""
    return _where_trained(plan, sample_ids, 1.0)


NORMALIZERS: dict[str, SampleWeights] = {
    "ave_token": ave_token,
    "token_mean": token_mean,
    "sample_mean": sample_mean,
    "sum": loss_sum,
}


def weight_range(normalizer: SampleWeights, plan: Plan, step: int) -> tuple[float, float]:
    """Smallest and largest weight of any trained token of an optimizer step, as multiples of ave_token's 1 / T.

    (1, 1) says that every token counts the same; (0.2, 9) that some count 45 times as much as others.
    """
    first, last = int(plan.step_offsets[step]), int(plan.step_offsets[step + 1])
    if normalizer is token_mean:
        trained = _trained_by_pack(plan, first, last)
        weights = 1.0 / (trained[trained > 0] * max(int((trained > 0).sum()), 1))
    else:
        # Its pack does not matter to a sample: all of the step at once.
        weights = normalizer(plan, first, plan.samples_of(first, last))
    weights = weights[weights > 0] * int(plan.step_loss_tokens[step])
    return (float(weights.min()), float(weights.max())) if len(weights) else (0.0, 0.0)


def _trained_by_pack(plan: Plan, first: int, last: int) -> NDArray[np.int64]:
    """Trained tokens of each pack of iterations first to last - 1."""
    offsets = plan.packs.offsets[plan.pack_offsets[first] : plan.pack_offsets[last] + 1]
    running = np.concatenate([[0], np.cumsum(plan.loss_tokens[plan.samples_of(first, last)])])
    return np.diff(running[offsets - offsets[0]])


def _iterations_of_step(plan: Plan, iteration: int) -> tuple[int, int]:
    step = int(plan.step_of_iteration[iteration])
    return int(plan.step_offsets[step]), int(plan.step_offsets[step + 1])


def _where_trained(plan: Plan, sample_ids: NDArray[np.int64], weight: float) -> NDArray[np.float64]:
    return np.where(plan.loss_tokens[sample_ids] > 0, weight, 0.0)
