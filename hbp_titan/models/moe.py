"""Mixture of experts (DeepSeek-V2, arXiv 2405.04434, section 2.2): routed and shared experts, and balance losses.

Owns the path of a token: `route` (which experts, with which weights), `sort_by_expert` and `dispatch` (its copies in
the order of the experts), `Experts` (a grouped product over each expert's rows), `combine` (the sum of its copies).
Expert parallelism replaces `run_experts`, between `send` and `receive`. No token is dropped, and all shapes are known
beforehand (T * K rows for any routing), so nothing synchronizes with the device.

Shape suffixes: T tokens, H hidden width, E experts, F width of an expert, K experts of a token, S = T * K copies,
G groups of experts, N documents of the pack. Of a grouped product: S rows, E groups, I and O widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from hbp_titan.models.configs import MoEArgs
from hbp_titan.models.documents import BalanceState
from hbp_titan.models.layers import FeedForward


class MixtureOfExperts(nn.Module):
    """Replacement of a dense feed-forward network; parameter names are HF's except those of the fused experts.

    tokens_per_expert: int32 [E] on the device, copies per expert in the last forward on this rank, padding included;
        None before the first. Recomputation sets it to the same value.
    balance: shared by all layers of a model.
    """

    def __init__(self, hidden_size: int, moe: MoEArgs, balance: BalanceState) -> None:
        super().__init__()
        self.moe = moe
        self.balance = balance
        self.gate = Router(hidden_size, moe)
        self.experts = Experts(hidden_size, moe.moe_intermediate_size, moe.n_routed_experts)
        shared = moe.n_shared_experts * moe.moe_intermediate_size
        self.shared_experts = FeedForward(hidden_size, shared) if shared else None
        self.tokens_per_expert: Tensor | None = None

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, order_S, counts_E, shared_TH = self.send(x_TH)
        self.tokens_per_expert = counts_E
        return self.receive(self.run_experts(x_TH, weights_TK, order_S, counts_E), shared_TH)

    def send(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return weights_TK, order_S and counts_E (see sort_by_expert), and the shared experts' output, if any."""
        weights_TK, experts_TK = self.choose(self.scores(x_TH))
        order_S, counts_E = self.sort(experts_TK)
        # The shared experts run here so that recomputation may stop before the copies are returned.
        return weights_TK, order_S, counts_E, self.shared(x_TH)

    def shared(self, x_TH: Tensor) -> Tensor | None:
        """Return the shared experts' output, None without any."""
        return None if self.shared_experts is None else self.shared_experts(x_TH)

    def scores(self, x_TH: Tensor) -> Tensor:
        """Return the softmax over the experts, or with noaux_tc their sigmoids, scores_TE in float32."""
        # float32 as in DeepSeek's code, because the choice of experts depends on small differences.
        logits_TE = F.linear(x_TH.float(), self.gate.weight.float())
        return logits_TE.softmax(dim=-1) if self.gate.e_score_correction_bias is None else logits_TE.sigmoid()

    def choose(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights_TK and experts_TK of all tokens of the shard, with the gradient of the balance losses."""
        weights_TK, experts_TK = route(scores_TE, self.moe, self.gate.e_score_correction_bias)
        return with_balance_loss(weights_TK, scores_TE, experts_TK, self.balance, self.moe), experts_TK

    def chosen_experts(self, x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor, *split: Any) -> Tensor:
        """Return the layer's output for a chunk of the tokens of `choose`. split: of `split_chunks`."""
        order_S, counts_E = self.sort(experts_TK)
        return self.receive(self.run_experts(x_TH, weights_TK, order_S, counts_E, *split), self.shared(x_TH))

    def count_chunks(self, experts_TK: Tensor, slices: Sequence[slice]) -> Tensor:
        """Return the copies per expert of each of C chunks of the shard, counts_CE, int32; set tokens_per_expert."""
        counts_CE = torch.stack([count_copies(experts_TK[part], self.moe.n_routed_experts) for part in slices])
        self.tokens_per_expert = counts_CE.sum(0, dtype=torch.int32)
        return counts_CE

    def split_chunks(self, counts_CE: Tensor) -> list[tuple[Any, ...]]:
        """Return what `run_experts` needs in addition for each chunk of `count_chunks`."""
        return [()] * len(counts_CE)

    def sort(self, experts_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Return order_S and counts_E of sort_by_expert."""
        return sort_by_expert(experts_TK, self.moe.n_routed_experts)

    def run_experts(self, x_TH: Tensor, weights_TK: Tensor, order_S: Tensor, counts_E: Tensor) -> Tensor:
        """Return the weighted sum of each token's routed experts, y_TH."""
        x_SH, weights_S = dispatch(x_TH, weights_TK, order_S)
        return combine(self.experts(x_SH, weights_S, counts_E), order_S, self.moe.num_experts_per_tok)

    def receive(self, y_TH: Tensor, shared_TH: Tensor | None) -> Tensor:
        """Return the layer's output."""
        return y_TH if shared_TH is None else y_TH + shared_TH


class Router(nn.Linear):
    """The router's matrix, and with noaux_tc each expert's bias, fp32 [E], which no gradient trains."""

    def __init__(self, hidden_size: int, moe: MoEArgs) -> None:
        super().__init__(hidden_size, moe.n_routed_experts, bias=False)
        self.e_score_correction_bias: nn.Parameter | None = None
        if moe.has_router_bias:
            bias_E = torch.zeros(moe.n_routed_experts, dtype=torch.float32)
            self.e_score_correction_bias = nn.Parameter(bias_E, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # Where a model is cast to bfloat16, on the meta device: the bias moves by steps that bfloat16 cannot hold.
        super()._apply(fn, recurse)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias.data = self.e_score_correction_bias.data.float()
        return self


class Experts(nn.Module):
    """The routed experts, each a SwiGLU; expert e is row e of every parameter."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int) -> None:
        super().__init__()
        wide = (num_experts, intermediate_size, hidden_size)
        self.gate_proj = nn.Parameter(torch.empty(wide))
        self.up_proj = nn.Parameter(torch.empty(wide))
        self.down_proj = nn.Parameter(torch.empty(wide[0], wide[2], wide[1]))

    def forward(self, *inputs: Tensor, region: Callable[..., Tensor] | None = None) -> Tensor:
        """Return `products` of the inputs, or region(*inputs), which may use `products` any number of times."""
        # FSDP2 gathers the parameters and reduces their gradients around each call of the module.
        return (region or self.products)(*inputs)

    def products(self, x_SH: Tensor, weights_S: Tensor, counts_E: Tensor) -> Tensor:
        """Return weights_S times the expert of each row; the first counts_E[0] rows are expert 0's, and so on."""
        parameters = (self.gate_proj, self.up_proj, self.down_proj)
        # Under expert parallelism, this rank's experts.
        gate_EFH, up_EFH, down_EHF = (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
        offsets_E = counts_E.cumsum(0, dtype=torch.int32)
        gate_SF, up_SF = grouped_mm(x_SH, gate_EFH, offsets_E), grouped_mm(x_SH, up_EFH, offsets_E)
        return grouped_mm(self.activation(gate_SF, up_SF, weights_S), down_EHF, offsets_E)

    def activation(self, gate_SF: Tensor, up_SF: Tensor, weights_S: Tensor) -> Tensor:
        """Return the weighted input of down_proj."""
        # Weighted before the last product, which is linear: F is narrower than H, and backward needs no output.
        return (F.silu(gate_SF) * up_SF * weights_S[:, None]).to(gate_SF.dtype)


def route(scores_TE: Tensor, moe: MoEArgs, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return weights_TK and experts_TK (int64) of each token, in any order.

    scores_TE: of MixtureOfExperts.scores. bias_E: with noaux_tc, of the choice but not of the weights.
    """
    candidates_TE = scores_TE if bias_E is None else scores_TE + bias_E.to(scores_TE.device)
    if moe.topk_method != "greedy":
        scores_TGe = candidates_TE.unflatten(-1, (moe.n_group, -1))
        best_TG = scores_TGe.amax(dim=-1) if bias_E is None else scores_TGe.topk(2, dim=-1).values.sum(dim=-1)
        groups_T = best_TG.topk(moe.topk_group, dim=-1, sorted=False).indices
        other_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter(1, groups_T, False)
        # A score with a bias may be below 0.
        least = 0.0 if bias_E is None else -torch.inf
        candidates_TE = scores_TGe.masked_fill(other_TG.unsqueeze(-1), least).flatten(-2)
    weights_TK, experts_TK = candidates_TE.topk(moe.num_experts_per_tok, dim=-1, sorted=False)
    if bias_E is not None:
        weights_TK = scores_TE.gather(1, experts_TK)
    if moe.norm_topk_prob and moe.num_experts_per_tok > 1:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        if bias_E is None:
            return weights_TK, experts_TK
    return weights_TK * moe.routed_scaling_factor, experts_TK


def sort_by_expert(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return order_S, the copies (token * K + choice) by expert, then by token, int64; and counts per expert, int32."""
    return experts_TK.flatten().argsort(stable=True), count_copies(experts_TK, num_experts)


def count_copies(experts_TK: Tensor, num_experts: int) -> Tensor:
    """Return the copies of each expert, counts_E, int32."""
    experts_S = experts_TK.flatten()
    counts_E = torch.zeros(num_experts, dtype=torch.int32, device=experts_S.device)
    return counts_E.scatter_add(0, experts_S, torch.ones_like(experts_S, dtype=torch.int32))


def dispatch(x_TH: Tensor, weights_TK: Tensor, order_S: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows and the weights of the copies in `order_S`: x_SH, weights_S."""
    x_SH = _Dispatch.apply(x_TH, order_S, weights_TK.shape[1])
    return x_SH, _Dispatch.apply(weights_TK.reshape(-1, 1), order_S, 1).squeeze(1)


def combine(y_SH: Tensor, order_S: Tensor, num_experts_per_tok: int) -> Tensor:
    """Return the sum of each token's copies, y_TH."""
    return _Combine.apply(y_SH, order_S, num_experts_per_tok)


def gather_copies(x_TH: Tensor, order_S: Tensor, num_experts_per_tok: int) -> Tensor:
    """Return the token of each copy in `order_S`, x_SH. Not differentiable by itself."""
    return x_TH.index_select(0, order_S // num_experts_per_tok)


def sum_copies(y_SH: Tensor, order_S: Tensor, num_experts_per_tok: int) -> Tensor:
    """Return the sum of each token's copies, y_TH, accumulated in float32. Not differentiable by itself."""
    # A gather in the inverse order and one sum, in forward and backward: index_add would round each addition to
    # bfloat16, in an order that varies on a GPU.
    y_TKH = y_SH.index_select(0, inverse_order(order_S)).unflatten(0, (-1, num_experts_per_tok))
    # torch accumulates a bfloat16 sum in float32, and rounds once.
    return y_TKH.sum(dim=1)


def inverse_order(order_N: Tensor) -> Tensor:
    """Return the inverse of a permutation, int64: result[order[i]] = i."""
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


def grouped_mm(x_SI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """Return y_SO: rows offsets[e - 1] to offsets[e] of x times weight[e].T. offsets_E: int32, ascending, S last."""
    # On CUDA in bfloat16, torch's grouped GEMM: one kernel for all groups, no synchronization. It does not promise to
    # accept zero rows, which a rank may receive under expert parallelism.
    if x_SI.is_cuda and x_SI.dtype == torch.bfloat16 and x_SI.shape[0] > 0:
        return F.grouped_mm(x_SI, weight_EOI.transpose(-2, -1), offs=offsets_E)
    return grouped_mm_cpu(x_SI, weight_EOI, offsets_E)


# Custom ops, because the loop depends on data (torch's own operator also rejects float32 fake tensors).
@torch.library.custom_op("hbp_titan::grouped_mm_cpu", mutates_args=())
def grouped_mm_cpu(x_SI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """Return grouped_mm by one product per group, on any device and dtype."""
    y_SO = x_SI.new_empty(x_SI.shape[0], weight_EOI.shape[1])
    sizes = _sizes(offsets_E)
    for x_GI, weight_OI, y_GO in zip(x_SI.split(sizes), weight_EOI, y_SO.split(sizes), strict=True):
        torch.mm(x_GI, weight_OI.T, out=y_GO)
    return y_SO


@torch.library.custom_op("hbp_titan::grouped_mm_cpu_backward", mutates_args=())
def grouped_mm_cpu_backward(
    grad_SO: Tensor, x_SI: Tensor, weight_EOI: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weights; that of a group without rows is 0."""
    dx_SI, dweight_EOI = torch.empty_like(x_SI), torch.empty_like(weight_EOI)
    sizes = _sizes(offsets_E)
    parts = (grad_SO.split(sizes), x_SI.split(sizes), weight_EOI, dx_SI.split(sizes), dweight_EOI)
    for grad_GO, x_GI, weight_OI, dx_GI, dweight_OI in zip(*parts, strict=True):
        torch.mm(grad_GO, weight_OI, out=dx_GI)
        torch.mm(grad_GO.T, x_GI, out=dweight_OI)
    return dx_SI, dweight_EOI


def _sizes(offsets_E: Tensor) -> list[int]:
    return offsets_E.diff(prepend=offsets_E.new_zeros(1)).tolist()


@grouped_mm_cpu.register_fake
def _forward_fake(x_SI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    return x_SI.new_empty(x_SI.shape[0], weight_EOI.shape[1])


@grouped_mm_cpu_backward.register_fake
def _backward_fake(grad_SO: Tensor, x_SI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_SI), torch.empty_like(weight_EOI)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_SO: Tensor) -> tuple:
    return *grouped_mm_cpu_backward(grad_SO.contiguous(), *ctx.saved_tensors), None


grouped_mm_cpu.register_autograd(_backward, setup_context=_setup_context)


def with_balance_loss(
    weights_TK: Tensor, scores_TE: Tensor, experts_TK: Tensor, state: BalanceState, moe: MoEArgs
) -> Tensor:
    """Return `weights_TK` unchanged; its backward adds the gradient of the balance losses to `scores_TE`.

    scores_TE: float32, of all experts. experts_TK: int64, the chosen ones.
    """
    if not moe.balances or state.document_ids_T is None or not torch.is_grad_enabled():
        return weights_TK
    return _AddLoss.apply(weights_TK, balance_loss(scores_TE, experts_TK, state, moe))


def balance_loss(scores_TE: Tensor, experts_TK: Tensor, state: BalanceState, moe: MoEArgs) -> Tensor:
    """Return the balance losses of this rank's tokens, float32 scalar; those of the ranks add up.

    DeepSeek-V2, section 2.2.3, per document. In a document of T tokens, each sent to K of E experts in G groups (the
    paper's devices), of which a token may use M, with s_t,i the softmax score of expert i:

        f_i  = E / (K T) * tokens sent to i                P_i = mean_t s_t,i
        expert         aux_loss_alpha        * sum_i f_i P_i
        device         device_aux_loss_alpha * sum_g mean(f_i of g) * sum(P_i of g)
        communication  comm_aux_loss_alpha   * sum_g (G / (M T) * tokens sent to g) * sum(P_i of g)

    Each document (seq_aux of the published config.json: never a whole batch) counts by its share of the optimizer step,
    the sum of its tokens' loss weights (components/loss.py). The shares of a step sum to 1 and follow from the plan, so
    neither packs, ranks, context parallelism nor accumulation change the gradient. Padding and documents without loss
    have share 0. Counts are constants: the gradient flows through the scores alone.
    """
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
    # P is a mean over the document, so a token contributes 1 / T of it.
    factor_NE = factor_NE * shares_N[:, None] / tokens_N1
    return (scores_TE * factor_NE[documents_T]).sum()


class _AddLoss(torch.autograd.Function):
    """Identity of x whose backward gives the loss a gradient of 1, as if it were added to the objective."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones((), dtype=ctx.loss_dtype)
