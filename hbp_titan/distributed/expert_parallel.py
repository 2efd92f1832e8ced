"""Expert parallelism: the experts of a layer are dealt out to adjacent ranks, and tokens travel to them and back.

Owns the sharding of stacked experts over the axis "ep" and the exchange of rows (GShard, arXiv 2006.16668). Each rank
of the axis runs its own tokens, of whatever level: a row knows neither documents nor context parallelism, so nothing
here depends on the level, and a swap changes nothing. No token is dropped, whatever the load. How many rows each rank
gets is in the data: each forward reads these numbers from the device once.

Shape suffixes: S copies of a rank's tokens, H hidden width, E experts of a layer, P ranks of the axis, L = E / P
experts of a rank, R rows that a rank receives.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as collectives
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from hbp_titan.models.args import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.moe import Experts, MixtureOfExperts


class ExpertExchange:
    """Stands in for `MixtureOfExperts.run_experts`: rows to the ranks of their experts, their outputs back.

    experts: whose parameters are DTensors of which this rank has L experts. group: the ranks of the axis.
    """

    def __init__(self, experts: Experts, group: ProcessGroup) -> None:
        self.experts = experts
        self.group = group

    def __call__(self, x_SH: Tensor, weights_S: Tensor, counts_E: Tensor) -> Tensor:
        """Rows in the order of their experts, their weights, and how many each expert has; returns y_SH."""
        arriving_PL, received_P, sent_P = self.count(counts_E)
        # [S, H] -> rows to the rank of their expert -> [R, H], by sender and of each sender by expert
        x_RH = self.exchange(x_SH, received_P, sent_P)
        weights_R = self.exchange(weights_S, received_P, sent_P)
        order_R = order_by_expert(arriving_PL, sum(received_P))
        place_R = torch.empty_like(order_R).scatter(0, order_R, torch.arange(len(order_R), device=order_R.device))
        sorted_RH, sorted_R = x_RH.index_select(0, order_R), weights_R.index_select(0, order_R)
        y_RH = self.experts(sorted_RH, sorted_R, arriving_PL.sum(0)).index_select(0, place_R)
        # [R, H] -> back to their senders -> [S, H]
        return self.exchange(y_RH, sent_P, received_P)

    def count(self, counts_E: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """What each rank sends to each of this rank's experts, [P, L]; rows received from, and sent to, each rank."""
        # [E] -> [P, L] -> all-to-all over dim 0 -> [P, L]
        counts_PL = counts_E.view(self.group.size(), -1)
        arriving_PL = wait_tensor(collectives.all_to_all_single(counts_PL, None, None, self.group))
        received_P, sent_P = torch.stack([arriving_PL.sum(1), counts_PL.sum(1)]).tolist()
        return arriving_PL, received_P, sent_P

    def exchange(self, x: Tensor, received_P: list[int], sent_P: list[int]) -> Tensor:
        """sent_P rows to each rank for received_P rows from each, in the order of ranks; differentiable."""
        return wait_tensor(all_to_all_single_autograd(x, received_P, sent_P, self.group))


def order_by_expert(counts_PL: Tensor, num_rows: int) -> Tensor:
    """order_R, int64: rows that lie by sender, and of each sender by expert, in the order of their experts alone.

    counts_PL: rows of each sender for each expert; num_rows: their sum, known without asking the device.
    """
    senders, num_experts = counts_PL.shape
    experts_PL = torch.arange(num_experts, device=counts_PL.device).repeat(senders)
    experts_R = experts_PL.repeat_interleave(counts_PL.flatten(), output_size=num_rows)
    return experts_R.argsort(stable=True)


def apply_expert_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Deal out the experts of every layer of `model` (best on the meta device) over the one axis of `mesh` in place."""
    for block in model.blocks():
        if not isinstance(block.mlp, MixtureOfExperts):
            continue
        experts = block.mlp.experts
        for name, parameter in list(experts.named_parameters()):
            dealt = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
            setattr(experts, name, nn.Parameter(dealt, requires_grad=parameter.requires_grad))
        block.mlp.run_experts = ExpertExchange(experts, mesh.get_group())  # type: ignore[method-assign]


def check_experts(args: ModelArgs, degree: int, shards: int) -> None:
    """Raise ValueError where the experts of `args` cannot be dealt out to `degree` ranks of `shards`."""
    if degree == 1:
        return
    key = f"parallelism.expert_parallel_degree = {degree}"
    if args.moe is None:
        raise ValueError(f"{key}: the model {args.name} has no experts; leave it at 1")
    if shards % degree:
        raise ValueError(f"{key} does not divide the {shards} ranks of one copy of the parameters: change one of them")
    if args.moe.n_routed_experts % degree:
        raise ValueError(f"{key} does not divide the model's {args.moe.n_routed_experts} experts: change it")
    rest, widths = shards // degree, (args.moe.moe_intermediate_size, args.hidden_size)
    if all(width % rest for width in widths):
        raise ValueError(
            f"{key} leaves each expert to {rest} ranks, which divide neither moe_intermediate_size={widths[0]} nor "
            f"hidden_size={widths[1]}: change it so that one is divided"
        )
