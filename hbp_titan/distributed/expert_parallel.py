"""Expert parallelism: the experts of a layer are sharded over adjacent ranks, and tokens travel to them and back.

Owns the sharding of stacked experts over the axis "ep" and the exchange of rows (GShard, arXiv 2006.16668). A row has
neither document nor context parallelism, so of a level only its chunks matter. No token is dropped at any load. How
many rows each rank gets depends on the data: each forward reads these counts from the device once, also those of all
chunks; its recomputation does not.

Shape suffixes: T tokens, K experts per token, S = T * K copies of a rank's tokens, H hidden width, E experts of a
layer, P ranks of the axis, L = E / P experts per rank, R rows that a rank receives, W a row with its weight, C chunks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as collectives
from torch.distributed._functional_collectives import wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder, DecoderBlock
from hbp_titan.models.moe import Experts, MixtureOfExperts, gather_copies, inverse_order, sum_copies

# A float32 weight follows each row, padded so that rows stay aligned for wide loads.
_TAIL_BYTES = 16


class Splits(NamedTuple):
    """Row counts of one exchange.

    arriving_PL: from each rank for each of this rank's experts, int32 on the device.
    received_P, sent_P: from and to each rank.
    """

    arriving_PL: Tensor
    received_P: list[int]
    sent_P: list[int]


class ExpertExchange:
    """Replacement of `MixtureOfExperts.run_experts`: sends rows to the ranks of their experts and the outputs back.

    experts: their parameters are DTensors of which this rank has L experts. group: the ranks of the axis.
    A forward has three all-to-alls (row counts; rows with their weights; outputs), a backward two. The recomputation of
    a checkpointed forward repeats only that of the rows: the counts are kept, and it stops before the outputs. So does
    that of a chunk.
    """

    def __init__(self, experts: Experts, group: ProcessGroup) -> None:
        self.experts = experts
        self.group = group
        self.splits: Splits | None = None
        self.pending_backwards = 0
        self.output_is_read = False

    def attach(self, block: DecoderBlock) -> None:
        """Make the experts of `block` use this exchange."""
        mlp = block.experts_mlp
        mlp.run_experts, mlp.split_chunks = self, self.split_chunks  # type: ignore[method-assign]
        # By the backward of a norm that follows.
        self.output_is_read = not isinstance(block.mlp_output_norm, nn.Identity)

    def __call__(
        self, x_TH: Tensor, weights_TK: Tensor, order_S: Tensor, counts_E: Tensor, chunk: Splits | None = None
    ) -> Tensor:
        """Return y_TH, as `run_experts` does. chunk: of `split_chunks`; the experts' parameters are then gathered."""
        splits, run = chunk, self.experts.products
        if splits is None:
            splits, run = self._splits(counts_E), self.experts
        else:
            self.pending_backwards += torch.is_grad_enabled()
        order_R = order_by_expert(splits.arriving_PL, sum(splits.received_P))
        x_RH, weights_R = _ToExperts.apply(x_TH, weights_TK, order_S, order_R, splits, self)
        y_RH = run(x_RH, weights_R, splits.arriving_PL.sum(0))
        if chunk is not None and _in_backward() and not self.output_is_read:
            return _Unread.apply(y_RH, order_S, order_R, splits, self, weights_TK.shape[1])
        return _FromExperts.apply(y_RH, order_S, order_R, splits, self, weights_TK.shape[1])

    def split_chunks(self, counts_CE: Tensor) -> list[tuple[Splits]]:
        """Replacement of `MixtureOfExperts.split_chunks`; waits for the device once for all chunks."""
        return [(splits,) for splits in self.count(counts_CE)]

    def _splits(self, counts_E: Tensor) -> Splits:
        """Return the splits of this forward; of a recomputation those of its forward, without waiting for the device.

        Only with one pending forward is it known which one is recomputed.
        """
        if _in_backward() and self.pending_backwards == 1 and self.splits is not None:
            return self.splits
        if not _in_backward():
            self.pending_backwards += torch.is_grad_enabled()
        (self.splits,) = self.count(counts_E[None])
        return self.splits

    def count(self, counts_CE: Tensor) -> list[Splits]:
        """Exchange the row counts of each of C chunks; waits for the device."""
        # [C, E] -> [C, P, L] -> [P, C, L] -> all-to-all over dim 0 -> [P, C, L]
        counts_PCL = counts_CE.view(len(counts_CE), self.group.size(), -1).transpose(0, 1).contiguous()
        arriving_PCL = wait_tensor(collectives.all_to_all_single(counts_PCL, None, None, self.group))
        # One copy to the host for all lists.
        lists_CP = torch.stack([arriving_PCL.sum(2).T, counts_PCL.sum(2).T], dim=1).tolist()
        return [Splits(*pair) for pair in zip(arriving_PCL.unbind(1), *zip(*lists_CP, strict=True), strict=True)]

    def exchange(self, x: Tensor, received_P: list[int], sent_P: list[int]) -> Tensor:
        """Send sent_P rows to each rank and return the received_P rows from each, by rank; not differentiable."""
        # [sum(sent_P), ...] -> [sum(received_P), ...]
        return wait_tensor(collectives.all_to_all_single(x, received_P, sent_P, self.group))


class _ToExperts(torch.autograd.Function):
    """Sends copies of tokens, each followed by its weight, to the ranks of their experts and sorts them by expert."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weights_TK: Tensor,
        order_S: Tensor,
        order_R: Tensor,
        splits: Splits,
        exchange: ExpertExchange,
    ) -> tuple[Tensor, Tensor]:
        # Attributes instead of save_for_backward: under checkpointing a saved tensor would be computed again.
        ctx.orders, ctx.splits, ctx.exchange, ctx.chosen = (order_S, order_R), splits, exchange, weights_TK.shape[1]
        tokens_S = order_S // ctx.chosen
        joined_SW = _join(x_TH, tokens_S, weights_TK.flatten().index_select(0, order_S))
        # [S, W] -> all-to-all over dim 0 -> [R, W], sorted by sender, then by expert
        joined_RW = exchange.exchange(joined_SW, splits.received_P, splits.sent_P)
        x_RH, weights_R = _split_tail(joined_RW, x_TH.shape[1])
        return x_RH.index_select(0, order_R), weights_R.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, grad_RH: Tensor, grad_R: Tensor) -> tuple[Tensor | None, ...]:
        (order_S, order_R), splits = ctx.orders, ctx.splits
        ctx.exchange.pending_backwards -= 1
        place_R = inverse_order(order_R)
        joined_RW = _join(grad_RH, place_R, grad_R.index_select(0, place_R))
        # [R, W] -> all-to-all over dim 0 -> [S, W]
        joined_SW = ctx.exchange.exchange(joined_RW, splits.sent_P, splits.received_P)
        grad_SH, grad_S = _split_tail(joined_SW, grad_RH.shape[1])
        grad_TK = sum_copies(grad_S[:, None], order_S, 1).view(-1, ctx.chosen)
        return sum_copies(grad_SH, order_S, ctx.chosen), grad_TK, None, None, None, None


class _FromExperts(torch.autograd.Function):
    """Sends outputs back to the ranks of their tokens and sums the copies of each token."""

    @staticmethod
    def forward(
        ctx: Any,
        y_RH: Tensor,
        order_S: Tensor,
        order_R: Tensor,
        splits: Splits,
        exchange: ExpertExchange,
        chosen: int,
    ) -> Tensor:
        ctx.orders, ctx.splits, ctx.exchange, ctx.chosen = (order_S, order_R), splits, exchange, chosen
        # [R, H] by expert -> [R, H] by sender -> all-to-all over dim 0 -> [S, H] -> [T, H]
        y_RH = y_RH.index_select(0, inverse_order(order_R))
        return sum_copies(exchange.exchange(y_RH, splits.sent_P, splits.received_P), order_S, chosen)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        (order_S, order_R), splits = ctx.orders, ctx.splits
        # [T, H] -> [S, H] -> all-to-all over dim 0 -> [R, H] by sender -> [R, H] by expert
        grad_SH = gather_copies(grad_TH, order_S, ctx.chosen)
        grad_RH = ctx.exchange.exchange(grad_SH, splits.received_P, splits.sent_P)
        return grad_RH.index_select(0, order_R), None, None, None, None, None


class _Unread(_FromExperts):
    """_FromExperts in the recomputation of a chunk, whose backward does not read the outputs."""

    @staticmethod
    def forward(ctx: Any, y_RH: Tensor, order_S: Tensor, order_R: Tensor, *rest: Any) -> Tensor:
        ctx.orders, (ctx.splits, ctx.exchange, ctx.chosen) = (order_S, order_R), rest
        # Not a number, so that a reader would show in every gradient.
        return y_RH.new_full((len(order_S) // ctx.chosen, y_RH.shape[1]), torch.nan)


def _in_backward() -> bool:
    """Return whether a recomputation runs; FSDP2 detects it the same way."""
    return torch._C._current_graph_task_id() != -1


def _join(x_NH: Tensor, rows_M: Tensor, weights_M: Tensor) -> Tensor:
    """Return x[rows] with the bits of a float32 weight after each row, [M, W] in the dtype of x, for one exchange."""
    # Eager only: a compiler that computes bfloat16 in float32 would change bits that are not a bfloat16 number.
    width, tail = x_NH.shape[1], _TAIL_BYTES // x_NH.element_size()
    joined_MW = x_NH.new_empty(len(rows_M), width + tail)
    torch.index_select(x_NH, 0, rows_M, out=joined_MW[:, :width])
    bits = nn.functional.pad(weights_M[:, None].float(), (0, _TAIL_BYTES // 4 - 1)).view(x_NH.dtype)
    joined_MW[:, width:] = bits
    return joined_MW


def _split_tail(joined_MW: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the rows [M, width], a view, and the float32 weights [M] from a result of `_join`."""
    weights_M = joined_MW[:, width:].contiguous().view(torch.float32)[:, 0]
    return joined_MW[:, :width], weights_M


def order_by_expert(counts_PL: Tensor, num_rows: int) -> Tensor:
    """Return order_R, int64, which sorts rows that lie by sender, then expert, by expert alone.

    counts_PL: rows of each sender for each expert. num_rows: their sum, known on the host.
    """
    senders, num_experts = counts_PL.shape
    experts_PL = torch.arange(num_experts, device=counts_PL.device).repeat(senders)
    experts_R = experts_PL.repeat_interleave(counts_PL.flatten(), output_size=num_rows)
    return experts_R.argsort(stable=True)


def apply_expert_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Shard the experts of every layer of `model` (preferably on the meta device) over the 1-D `mesh` in place."""
    for block in model.blocks():
        if not isinstance(block.mlp, MixtureOfExperts):
            continue
        experts = block.mlp.experts
        for name, parameter in list(experts.named_parameters()):
            sharded = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
            setattr(experts, name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
        ExpertExchange(experts, mesh.get_group()).attach(block)


def check_experts(args: ModelArgs, degree: int, shards: int) -> None:
    """Raise ValueError if the experts of `args` cannot be sharded over `degree` of the `shards` ranks of a copy."""
    if degree == 1:
        return
    key = f"parallelism.expert_parallel_degree={degree}"
    if args.moe is None:
        raise ValueError(f"{key}: the model {args.name} has no experts; leave it at 1")
    if shards % degree:
        raise ValueError(f"{key} does not divide the {shards} ranks of one copy of the parameters; change one of them")
    if args.moe.n_routed_experts % degree:
        raise ValueError(f"{key} does not divide the model's {args.moe.n_routed_experts} experts; use a divisor")
    rest, widths = shards // degree, (args.moe.moe_intermediate_size, args.hidden_size)
    if all(width % rest for width in widths):
        raise ValueError(
            f"{key} shards each expert over {rest} ranks, which divides neither moe_intermediate_size={widths[0]} nor "
            f"hidden_size={widths[1]}; use a degree that leaves a divisor of one of them"
        )
