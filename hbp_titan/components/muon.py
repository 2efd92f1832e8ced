"""Muon for the matrices of the blocks, AdamW for embeddings, output matrix, norms and biases, on FSDP2's shards.

Muon (https://kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest orthogonal matrix. The
update is scaled to the size of AdamW's (0.2 sqrt(max(rows, columns)), arXiv 2502.16982), so that both share learning
rate and weight decay. Each step computes what torch.optim.Muon(adjust_lr_fn="match_rms_adamw") does in one process.

Orthogonalization needs the whole matrix, and a rank has some of its rows:

    momentum   on each rank, for its own shard
    gather     all-to-all: rank j gets the whole j-th matrix of a round of as many matrices as there are ranks, bfloat16
    orthogonalize   on each rank, one matrix
    scatter    all-to-all: each rank gets its shard of every matrix of the round

So each matrix is orthogonalized once, and a rank receives two shards of it instead of the whole. A stack of experts is
as many matrices; experts that are whole on a rank need no exchange.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, _zeropower_via_newtonschulz

from hbp_titan.components.sharded_optimizers import ShardedAdamW, State, local

COEFFICIENTS = (DEFAULT_A, DEFAULT_B, DEFAULT_C)
RMS_FACTOR = 0.2
"""Root mean square of AdamW's updates."""


class Muon(ShardedAdamW):
    """Muon for parameter groups with "momentum", AdamW for the others.

    A parameter of Muon's groups is a matrix [R, C] or a stack of matrices [E, R, C].
    """

    def new_state(self, parameter: Tensor, group: dict[str, Any]) -> State:
        """Return the state of a parameter before the first step: one moment for Muon."""
        if "momentum" in group:
            return self.new_moment(parameter, "momentum_buffer")
        return super().new_state(parameter, group)

    def update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Update the parameters of one group; with "momentum" a collective of all ranks."""
        if "momentum" not in group:
            return super().update(group, parameters)
        by_ranks: dict[Any, list[MatrixShard]] = {}
        for shard in (shard for parameter in parameters for shard in matrices(parameter, self.state[parameter])):
            by_ranks.setdefault(shard.ranks, []).append(shard)
        for shard in by_ranks.pop(None, []):
            self._apply(group, shard, orthogonalize(self._momentum(group, shard)))
        for ranks, shards in by_ranks.items():
            # Matrices of a round should take equally long. Sorting is stable: the order is the same on all ranks.
            shards.sort(key=lambda shard: -shard.rows * shard.columns)
            size = dist.get_world_size(ranks)
            for start in range(0, len(shards), size):
                self._round(group, shards[start : start + size], ranks)
        return None

    def _momentum(self, group: dict[str, Any], shard: MatrixShard) -> Tensor:
        """Update the momentum of a shard; return what is to be orthogonalized, bfloat16, on the device."""
        momentum, grad, old = group["momentum"], shard.grad.float(), shard.buffer.float()
        new = torch.lerp(old, grad, 1 - momentum)
        update = torch.lerp(grad, new, momentum).bfloat16()
        # The stored momentum may be rounded; the update is not.
        shard.buffer.copy_(new if self.found_inf is None else torch.where(self.found_inf.bool(), old, new))
        # Shards in host memory (cpu_offload) are orthogonalized on the GPU all the same.
        return update.to(shard.device)

    def _round(self, group: dict[str, Any], shards: list[MatrixShard], ranks: dist.ProcessGroup) -> None:
        """Update up to as many matrices as there are ranks, each orthogonalized on a rank of its own."""
        size, own = dist.get_world_size(ranks), dist.get_rank(ranks)
        # Ranks without a matrix in the last round.
        mine = shards[own] if own < len(shards) else None
        updates = [self._momentum(group, shard) for shard in shards]
        sent = [update.numel() for update in updates] + [0] * (size - len(shards))
        shapes = mine.shard_shapes(size) if mine else []
        received = [math.prod(shape) for shape in shapes] or [0] * size

        pieces = torch.cat([update.flatten() for update in updates])
        gathered = pieces.new_empty(sum(received))
        dist.all_to_all_single(gathered, pieces, received, sent, group=ranks)
        if mine:
            parts = zip(gathered.split(received), shapes, strict=True)
            whole_RC = orthogonalize(torch.cat([part.view(shape) for part, shape in parts], dim=mine.dim))
            parts_back = whole_RC.split([shape[mine.dim] for shape in shapes], dim=mine.dim)
            gathered = torch.cat([part.flatten() for part in parts_back])
        dist.all_to_all_single(pieces, gathered, sent, received, group=ranks)
        for shard, update in zip(shards, pieces.split(sent[: len(shards)]), strict=True):
            self._apply(group, shard, update.view(shard.parameter.shape))

    def _apply(self, group: dict[str, Any], shard: MatrixShard, update: Tensor) -> None:
        """Subtract the orthogonalized update from a shard of the parameter, after weight decay."""
        lr, parameter = group["lr"], shard.parameter
        decay: Any = 1 - lr * group["weight_decay"]
        update = update.to(parameter.device)
        if self.found_inf is not None:
            skip = self.found_inf.bool()
            decay, update = torch.where(skip, 1.0, decay), torch.where(skip, 0.0, update)
        scale = RMS_FACTOR * math.sqrt(max(shard.rows, shard.columns))
        parameter.mul_(decay).add_(update, alpha=-lr * scale)


@dataclass(frozen=True)
class MatrixShard:
    """A rank's shard of one matrix.

    parameter, grad, buffer: views [r, c]. rows, columns: of the whole matrix. dim: the sharded dimension. ranks: over
    which it is sharded, None if the matrix is whole. device: that computes.
    """

    parameter: Tensor
    grad: Tensor
    buffer: Tensor
    rows: int
    columns: int
    dim: int
    ranks: dist.ProcessGroup | None
    device: str

    def shard_shapes(self, size: int) -> list[tuple[int, int]]:
        """Return the shape of each rank's shard, as torch.chunk cuts: the last ones may be smaller or empty."""
        whole = (self.rows, self.columns)[self.dim]
        most = -(-whole // size)
        lengths = [max(0, min(most, whole - rank * most)) for rank in range(size)]
        return [(n, self.columns) if self.dim == 0 else (self.rows, n) for n in lengths]


def matrices(parameter: Tensor, state: State) -> list[MatrixShard]:
    """Return the matrices of a parameter [R, C] or [E, R, C] of which this rank has a shard."""
    grad = parameter.grad
    assert grad is not None
    rows, columns = parameter.shape[-2:]
    dim, ranks, device = 0, None, parameter.device.type
    if isinstance(parameter, DTensor):
        device = parameter.device_mesh.device_type
        for axis, placement in enumerate(parameter.placements):
            # A stack that is sharded over its experts, by expert parallelism or FSDP2, consists of whole matrices.
            stack = parameter.ndim - 2
            if isinstance(placement, Shard) and placement.dim >= stack and parameter.device_mesh.size(axis) > 1:
                dim, ranks = placement.dim - stack, parameter.device_mesh.get_group(axis)
    tensors = [local(tensor).detach() for tensor in (parameter, grad, state["momentum_buffer"])]
    stacks = [tensor.unbind() if tensor.ndim == 3 else (tensor,) for tensor in tensors]
    return [MatrixShard(p, g, buffer, rows, columns, dim, ranks, device) for p, g, buffer in zip(*stacks, strict=True)]


def orthogonalize(update_RC: Tensor) -> Tensor:
    """Return the orthogonalized matrix, bfloat16: torch.optim.Muon's Newton-Schulz iteration."""
    return _zeropower_via_newtonschulz(update_RC, COEFFICIENTS, DEFAULT_NS_STEPS, EPS)
