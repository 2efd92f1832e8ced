"""Auxiliary balance losses of a mixture of experts (DeepSeek-V2, arXiv 2405.04434, section 2.2.3), per document.

Owns the three losses and the rule by which they are weighted. In a document of T tokens, each sent to K of E experts
in G groups (the paper's devices), of which a token may use M, with s_t,i the softmax score of expert i:

    f_i  = E / (K T) * tokens sent to i                P_i = mean_t s_t,i
    expert         aux_loss_alpha        * sum_i f_i P_i
    device         device_aux_loss_alpha * sum_g mean(f_i of g) * sum(P_i of g)
    communication  comm_aux_loss_alpha   * sum_g (G / (M T) * tokens sent to g) * sum(P_i of g)

The rule: the losses of a document (seq_aux of the published config.json: never of a whole batch) count by the
document's share in the gradient of the optimizer step: the sum of the loss weights of its tokens
(components/normalizer.py; with ave_token its trained tokens over all of the step's). The shares of a step add up to 1
and follow from the plan, so neither packs, ranks, context parallelism nor accumulation change the gradient. Padding
and documents that train nothing have share 0. Counts are constants; the gradient goes through the scores alone.

Shape suffixes: T tokens, K chosen experts of a token, E experts, G groups, N documents of the pack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbp_titan.models.args import MoEArgs


def _of_one_rank(counts: Tensor) -> Tensor:
    return counts


@dataclass
class BalanceState:
    """What the layers with experts read at each forward; without documents there are no balance losses.

    document_ids_T: int64 [T], the document of each of this rank's tokens. document_shares_N: float32 [N], see above.
    sum_counts: adds a tensor up over the ranks that share the documents (context parallelism).
    """

    document_ids_T: Tensor | None = None
    document_shares_N: Tensor | None = None
    sum_counts: Callable[[Tensor], Tensor] = _of_one_rank

    def use(self, document_ids_T: Tensor, document_shares_N: Tensor) -> None:
        """Make these the documents of the next forward and of its recomputation."""
        self.document_ids_T, self.document_shares_N = document_ids_T, document_shares_N


def with_balance_loss(
    weights_TK: Tensor, scores_TE: Tensor, experts_TK: Tensor, state: BalanceState, moe: MoEArgs
) -> Tensor:
    """`weights_TK` unchanged, through whose backward the balance losses reach `scores_TE`.

    scores_TE: float32, of all experts. experts_TK: int64, the chosen ones.
    """
    if not moe.balances or state.document_ids_T is None or not torch.is_grad_enabled():
        return weights_TK
    return _AddLoss.apply(weights_TK, balance_loss(scores_TE, experts_TK, state, moe))


def balance_loss(scores_TE: Tensor, experts_TK: Tensor, state: BalanceState, moe: MoEArgs) -> Tensor:
    """The losses of this rank's tokens, float32 scalar: each token's part, so that ranks add up."""
    documents_T, shares_N = state.document_ids_T, state.document_shares_N
    assert documents_T is not None
    assert shares_N is not None
    num_experts, num_groups = moe.n_routed_experts, moe.n_group
    group_size = num_experts // num_groups
    flat = (documents_T[:, None] * num_experts + experts_TK).flatten()
    counts_NE = scores_TE.new_zeros(len(shares_N) * num_experts)
    counts_NE = counts_NE.scatter_add(0, flat, scores_TE.new_ones(flat.shape)).view(-1, num_experts)
    sent_TG = scores_TE.new_zeros(len(documents_T), num_groups).scatter(1, experts_TK // group_size, 1.0)
    sent_NG = scores_TE.new_zeros(len(shares_N), num_groups).index_add(0, documents_T, sent_TG)
    counts_NE, sent_NG = state.sum_counts(torch.cat((counts_NE, sent_NG), dim=1)).split([num_experts, num_groups], 1)

    tokens_N1 = (counts_NE.sum(1, keepdim=True) / moe.num_experts_per_tok).clamp(min=1)
    f_NE = counts_NE * num_experts / (moe.num_experts_per_tok * tokens_N1)
    device_NG = f_NE.unflatten(1, (num_groups, group_size)).mean(2)
    comm_NG = sent_NG * num_groups / (moe.topk_group * tokens_N1)
    of_group_NG = moe.device_aux_loss_alpha * device_NG + moe.comm_aux_loss_alpha * comm_NG
    factor_NE = moe.aux_loss_alpha * f_NE + of_group_NG.repeat_interleave(group_size, dim=1)
    # P is a mean over the document: a token has 1 / T of it.
    factor_NE = factor_NE * shares_N[:, None] / tokens_N1
    return (scores_TE * factor_NE[documents_T]).sum()


class _AddLoss(torch.autograd.Function):
    """Hands x on; in backward the loss gets the gradient 1, as if it had been added to the objective."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones((), dtype=ctx.loss_dtype)
