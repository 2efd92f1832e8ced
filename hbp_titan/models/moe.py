"""Mixture of experts (DeepSeek-V2, arXiv 2405.04434, section 2.2): routed and shared experts.

Owns the way of a token: route (which experts, with which weights), sort_by_expert and dispatch (its copies, put in the
order of the experts), Experts (a grouped product over each expert's rows), combine (its copies added up). Expert
parallelism takes the place of `run_experts`, between `send` and `receive`. No token is dropped. All shapes are known
beforehand (T * K rows, for any routing): nothing synchronizes with the device, a block compiles to one graph. Copies
are added up by a gather in the inverse order and one sum, forward and backward: adding into place would round each
addition to bfloat16, in an order that varies on a GPU.

Shape suffixes: T tokens, H hidden width, E experts, F width of an expert, K experts of a token, S = T * K copies,
G groups of experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from hbp_titan.models.args import MoEArgs
from hbp_titan.models.balance import BalanceState, with_balance_loss
from hbp_titan.models.feed_forward import FeedForward
from hbp_titan.models.grouped_mm import grouped_mm


class Experts(nn.Module):
    """The routed experts, SwiGLU each; expert e is row e of every parameter."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int) -> None:
        super().__init__()
        wide = (num_experts, intermediate_size, hidden_size)
        self.gate_proj = nn.Parameter(torch.empty(wide))
        self.up_proj = nn.Parameter(torch.empty(wide))
        self.down_proj = nn.Parameter(torch.empty(wide[0], wide[2], wide[1]))

    def forward(self, x_SH: Tensor, weights_S: Tensor, counts_E: Tensor) -> Tensor:
        """weights_S times the expert of each row; the first counts_E[0] rows are expert 0's, and so on.

        Weighted before the last product, which is linear: F is narrower than H, and backward needs no output.
        """
        gate_EFH, up_EFH, down_EHF = (_local(p) for p in (self.gate_proj, self.up_proj, self.down_proj))
        offsets_E = counts_E.cumsum(0, dtype=torch.int32)
        gate_SF, up_SF = grouped_mm(x_SH, gate_EFH, offsets_E), grouped_mm(x_SH, up_EFH, offsets_E)
        return grouped_mm(self.activation(gate_SF, up_SF, weights_S), down_EHF, offsets_E)

    def activation(self, gate_SF: Tensor, up_SF: Tensor, weights_S: Tensor) -> Tensor:
        """What the last product multiplies."""
        return (F.silu(gate_SF) * up_SF * weights_S[:, None]).to(gate_SF.dtype)


def _local(parameter: Tensor) -> Tensor:
    """The experts that this rank runs, where they are spread over ranks."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class MixtureOfExperts(nn.Module):
    """In place of a dense feed-forward network; parameter names are HF's, but for the fused experts.

    tokens_per_expert: int32 [E] on the device, the copies that each expert got in the last forward on this rank,
        padding included; None before the first. Recomputation sets it to the same again.
    balance: shared by all layers of a model.
    """

    def __init__(self, hidden_size: int, moe: MoEArgs, balance: BalanceState) -> None:
        super().__init__()
        self.moe = moe
        self.balance = balance
        self.gate = nn.Linear(hidden_size, moe.n_routed_experts, bias=False)
        self.experts = Experts(hidden_size, moe.moe_intermediate_size, moe.n_routed_experts)
        self.shared_experts = FeedForward(hidden_size, moe.n_shared_experts * moe.moe_intermediate_size)
        self.tokens_per_expert: Tensor | None = None

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, order_S, counts_E, shared_TH = self.send(x_TH)
        self.tokens_per_expert = counts_E
        return self.receive(self.run_experts(x_TH, weights_TK, order_S, counts_E), shared_TH)

    def send(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where each copy goes: weights_TK, order_S and counts_E (as from sort_by_expert); the shared experts' output.

        The shared experts come first so that recomputation may stop before the copies are brought back.
        """
        # float32, as DeepSeek's code has it: which experts are chosen hangs on small differences.
        scores_TE = F.linear(x_TH.float(), self.gate.weight.float()).softmax(dim=-1)
        weights_TK, experts_TK = route(scores_TE, self.moe)
        weights_TK = with_balance_loss(weights_TK, scores_TE, experts_TK, self.balance, self.moe)
        order_S, counts_E = sort_by_expert(experts_TK, self.moe.n_routed_experts)
        return weights_TK, order_S, counts_E, self.shared_experts(x_TH)

    def run_experts(self, x_TH: Tensor, weights_TK: Tensor, order_S: Tensor, counts_E: Tensor) -> Tensor:
        """The weighted sum of what its experts make of each token, y_TH, wherever they lie."""
        x_SH, weights_S = dispatch(x_TH, weights_TK, order_S)
        return combine(self.experts(x_SH, weights_S, counts_E), order_S, self.moe.num_experts_per_tok)

    def receive(self, y_TH: Tensor, shared_TH: Tensor) -> Tensor:
        """The layer's output."""
        return y_TH + shared_TH


def route(scores_TE: Tensor, moe: MoEArgs) -> tuple[Tensor, Tensor]:
    """weights_TK and experts_TK (int64) of each token, in no certain order. scores_TE: softmax over the experts."""
    candidates_TE = scores_TE
    if moe.topk_method == "group_limited_greedy":
        scores_TGe = scores_TE.unflatten(-1, (moe.n_group, -1))
        groups_T = scores_TGe.amax(dim=-1).topk(moe.topk_group, dim=-1, sorted=False).indices
        other_TG = torch.ones_like(scores_TGe[..., 0], dtype=torch.bool).scatter(1, groups_T, False)
        candidates_TE = scores_TGe.masked_fill(other_TG.unsqueeze(-1), 0.0).flatten(-2)
    weights_TK, experts_TK = candidates_TE.topk(moe.num_experts_per_tok, dim=-1, sorted=False)
    if moe.norm_topk_prob and moe.num_experts_per_tok > 1:
        return weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20), experts_TK
    return weights_TK * moe.routed_scaling_factor, experts_TK


def sort_by_expert(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """order_S: the copies (token * K + choice) in the order of their experts, and of tokens inside each; int64.

    Also tokens_per_expert, int32 [E].
    """
    experts_S = experts_TK.flatten()
    counts_E = torch.zeros(num_experts, dtype=torch.int32, device=experts_S.device)
    ones_S = torch.ones_like(experts_S, dtype=torch.int32)
    return experts_S.argsort(stable=True), counts_E.scatter_add(0, experts_S, ones_S)


def dispatch(x_TH: Tensor, weights_TK: Tensor, order_S: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and the weights of the copies in `order_S`: x_SH, weights_S."""
    x_SH = _Dispatch.apply(x_TH, order_S, weights_TK.shape[1])
    return x_SH, _Dispatch.apply(weights_TK.reshape(-1, 1), order_S, 1).squeeze(1)


def combine(y_SH: Tensor, order_S: Tensor, num_experts_per_tok: int) -> Tensor:
    """The sum of each token's copies, y_TH."""
    return _Combine.apply(y_SH, order_S, num_experts_per_tok)


def gather_copies(x_TH: Tensor, order_S: Tensor, num_experts_per_tok: int) -> Tensor:
    """The token of each copy in `order_S`, x_SH. Not differentiable by itself."""
    return x_TH.index_select(0, order_S // num_experts_per_tok)


def sum_copies(y_SH: Tensor, order_S: Tensor, num_experts_per_tok: int) -> Tensor:
    """The sum of each token's copies, y_TH, accumulated in float32. Not differentiable by itself."""
    y_TKH = y_SH.index_select(0, inverse_order(order_S)).unflatten(0, (-1, num_experts_per_tok))
    # torch accumulates a bfloat16 sum in float32, and rounds once.
    return y_TKH.sum(dim=1)


def inverse_order(order_N: Tensor) -> Tensor:
    """Where each row went: place with place[order[i]] = i. order_N: int64, a permutation."""
    return torch.empty_like(order_N).scatter(0, order_N, torch.arange(len(order_N), device=order_N.device))


class _Dispatch(torch.autograd.Function):
    """gather_copies, whose gradient is a sum of copies."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, order_S: Tensor, num_experts_per_tok: int) -> Tensor:
        ctx.save_for_backward(order_S)
        ctx.num_experts_per_tok = num_experts_per_tok
        return gather_copies(x_TH, order_S, num_experts_per_tok)

    @staticmethod
    def backward(ctx: Any, grad_SH: Tensor) -> tuple[Tensor, None, None]:
        (order_S,) = ctx.saved_tensors
        return sum_copies(grad_SH, order_S, ctx.num_experts_per_tok), None, None


class _Combine(torch.autograd.Function):
    """sum_copies, whose gradient is a gather of tokens."""

    @staticmethod
    def forward(ctx: Any, y_SH: Tensor, order_S: Tensor, num_experts_per_tok: int) -> Tensor:
        ctx.save_for_backward(order_S)
        ctx.num_experts_per_tok = num_experts_per_tok
        return sum_copies(y_SH, order_S, num_experts_per_tok)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, None]:
        (order_S,) = ctx.saved_tensors
        return gather_copies(grad_TH, order_S, ctx.num_experts_per_tok), None, None
