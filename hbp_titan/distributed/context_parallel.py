"""Context parallelism over packed documents: attention sees whole documents, everything else a sequence shard.

Owns the exchanges between the cp ranks and the check that a cp degree fits the heads. A level's cp ranks form
gather_degree groups of ulysses_degree ranks (Level.cp_shape), and attention runs through two optional layers:

    inside a group    Ulysses (arXiv 2309.14509): all-to-alls give each rank the group's sequence for some of the heads
    between groups    keys and values are all-gathered (arXiv 2407.21783, section 3.3.2), queries stay; backward
                      reduce-scatters their gradients in fp32. The groups hold head-tail shards, so their causal work
                      is even (data/sequence_shard.py)

"ulysses" is the first alone, "allgather" the second alone, "hybrid" both. The active groups are read at each forward,
so that a level switch costs nothing. Attention is called in two halves: `start` sends keys and values on their way,
`finish` waits for them; between the two the block projects its queries, and in backward it does so while their
gradients travel back:

    forward     project k, v | start k, v | project q | exchange q, wait for k, v | attention | exchange o
    backward    attention | start dk, dv, exchange dq | q's projection | wait for dk, dv | k's and v's projection

context_parallel_dtensor.py declares the same exchanges as DTensor placements.

Shape suffixes: T tokens of the pack (of the group's shard inside Ulysses), S tokens of a rank's shard, N query heads,
K key/value heads, D head dim, C ranks of a group, R rows of gathered keys that one pass reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as collectives
from torch.distributed._functional_collectives import wait_tensor
from torch.distributed.device_mesh import DeviceMesh

from hbp_titan.models.documents import Documents, HeadTailShard
from hbp_titan.packing.level import Level


@dataclass
class ContextParallelState:
    """What the attention layers read: the active cp mesh (`LevelMeshes.of`) and its groups, None of degree 1."""

    ulysses_degree: int = 1
    ulysses_group: ProcessGroup | None = None
    gather_group: ProcessGroup | None = None
    mesh: DeviceMesh | None = None

    def use(self, mesh: DeviceMesh | None) -> None:
        """Make the groups of a cp mesh, None at cp 1, the active ones."""
        self.mesh = mesh
        axes = mesh.mesh_dim_names if mesh is not None and mesh.mesh_dim_names else ()
        groups = {axis: mesh.get_group(axis) for axis in axes} if mesh is not None else {}
        self.ulysses_group, self.gather_group = groups.get("ulysses"), groups.get("gather")
        self.ulysses_degree = self.ulysses_group.size() if self.ulysses_group is not None else 1

    def sum(self, x: Tensor) -> Tensor:
        """`x` added up over the cp ranks, without a gradient."""
        for group in (self.ulysses_group, self.gather_group):
            if group is not None:
                x = wait_tensor(collectives.all_reduce(x, "sum", group))
        return x


class Transfer:
    """One collective under way, and its counterpart in backward.

    send: issues the collective of a contiguous tensor and returns its result, not yet there. receive: what the waiting
    side makes of the result. send_back: issues the collective of the gradients of what `receive` returned; its result
    is the gradient of what was sent. grad_dtype: the dtype in which it travels, from that of what was sent. It must be
    right: autograd casts a gradient of another dtype at once, which would read it before it has arrived.
    """

    def __init__(
        self,
        send: Callable[[Tensor], Tensor],
        send_back: Callable[..., Tensor],
        receive: Callable[[Tensor], Any] = lambda result: result,
        grad_dtype: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype,
    ) -> None:
        self.send, self.receive, self.send_back, self.grad_dtype = send, receive, send_back, grad_dtype
        self.result: Tensor | None = None
        self.token: Tensor | None = None

    def start(self, x: Tensor) -> Transfer:
        """Issue the collective of `x`."""
        self.token = _Start.apply(x, self)
        return self

    def finish(self) -> Any:
        """Wait for it; returns what `receive` makes of the result, differentiable with respect to what was sent."""
        received = _Finish.apply(self.token, self)
        self.token = None
        return received


class _Start(torch.autograd.Function):
    """Hands on a token in place of the result: its gradient travels back to here while the engine does other work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, transfer: Transfer) -> Tensor:
        ctx.dtype = x.dtype
        transfer.result = transfer.send(x.contiguous())
        # Expanded: it has the shape and dtype of the gradient that will come, but no memory.
        return x.new_zeros((), dtype=transfer.grad_dtype(x.dtype)).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return wait_tensor(grad).to(ctx.dtype), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, transfer: Transfer) -> Any:
        assert transfer.result is not None
        ctx.transfer = transfer
        result, transfer.result = wait_tensor(transfer.result), None
        return transfer.receive(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.send_back(*grads), None


class ContextParallelAttention(nn.Module):
    """Wraps a model's inner attention with the exchanges that the active level asks for; without any it is that.

    forward takes q [S, N, D] and k, v [S, K, D] of the rank's sequence shard, and the documents of the whole pack
    (PackedBatch.documents): a HeadTailShard where keys and values are gathered. Returns o [S, N, D].
    """

    def __init__(self, inner: nn.Module, state: ContextParallelState) -> None:
        super().__init__()
        self.inner = inner
        self.state = state

    @property
    def exchanges(self) -> bool:
        """Whether the active level has cp ranks: then `start` and `finish` let the exchange overlap with other work."""
        return self.state.ulysses_group is not None or self.state.gather_group is not None

    def forward(self, q_SND: Tensor, k_SKD: Tensor, v_SKD: Tensor, documents: Documents | HeadTailShard) -> Tensor:
        if not self.exchanges:
            return self.inner(q_SND, k_SKD, v_SKD, documents)
        return self.finish(q_SND, self.start(k_SKD, v_SKD, documents))

    def start(self, k_SKD: Tensor, v_SKD: Tensor, documents: Documents | HeadTailShard) -> KeysValues:
        """Send the keys and values of this rank's shard to where they are attended to."""
        return KeysValues(self, k_SKD, v_SKD, documents)

    def finish(self, q_SND: Tensor, keys_values: KeysValues) -> Tensor:
        """Attention of this rank's queries to the keys and values on their way; returns o [S, N, D]."""
        documents = keys_values.documents
        scatters = self.state.ulysses_group is not None
        if scatters:
            q_SND = self.scatter_queries(q_SND)
        if isinstance(documents, HeadTailShard):
            (heads_k, heads_v), (tails_k, tails_v) = keys_values.of_passes()
            split = documents.heads.documents.whole.num_queries
            q_heads, q_tails = q_SND.split([split, len(q_SND) - split])
            # Two passes because the keys of a head are among those of its document's tail.
            o_heads = self.inner(q_heads, heads_k, heads_v, documents.heads.documents)
            o_SND = torch.cat([o_heads, self.inner(q_tails, tails_k, tails_v, documents.tails.documents)])
        else:
            o_SND = self.inner(q_SND, *keys_values.of_sequence(), documents)
        return self.gather_heads(o_SND) if scatters else o_SND

    def scatter_queries(self, q_SND: Tensor) -> Tensor:
        """Queries of a sequence shard with all heads -> of the group's sequence with this rank's heads, [T, N/C, D]."""
        return self.scatter_heads(q_SND).finish().flatten(0, 1)

    def scatter_heads(self, x_SND: Tensor) -> Transfer:
        """Sequence shard with all heads -> the group's sequence with this rank's heads, [C, S, N/C, D]."""
        # [S, N, D] -> [S, C, N/C, D] -> [C, S, N/C, D] -> all-to-all over dim 0: then dim 0 is the sequence
        x_CSND = x_SND.unflatten(1, (self.state.ulysses_degree, -1)).transpose(0, 1)
        return Transfer(self.all_to_all, lambda grad: self.all_to_all(grad.contiguous())).start(x_CSND)

    def gather_heads(self, o_TND: Tensor) -> Tensor:
        """The group's sequence with this rank's heads -> this rank's sequence shard with all heads, [S, N, D]."""
        # [T, N/C, D] -> [C, S, N/C, D] -> all-to-all -> [C, S, N/C, D], now dim 0 is the heads -> [S, C, N/C, D]
        o_CSND = o_TND.unflatten(0, (self.state.ulysses_degree, -1))
        transfer = Transfer(self.all_to_all, lambda grad: self.all_to_all(grad.contiguous())).start(o_CSND)
        return transfer.finish().transpose(0, 1).flatten(1, 2)

    # The collectives themselves: contiguous tensors to results that are not there before wait_tensor.

    def all_to_all(self, x: Tensor) -> Tensor:
        """Part i of dim 0 goes to rank i of the Ulysses group; applied twice it is the identity."""
        group = self.state.ulysses_group
        assert group is not None
        sizes = [x.shape[0] // group.size()] * group.size()
        return torch.ops._c10d_functional.all_to_all_single(x, sizes, sizes, group.group_name)

    def all_gather(self, x: Tensor) -> Tensor:
        """The parts of all ranks of the gather group, end to end on dim 0."""
        group = self.state.gather_group
        assert group is not None
        return torch.ops._c10d_functional.all_gather_into_tensor(x, group.size(), group.group_name)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Part i of dim 0, summed over the ranks of the gather group, goes to rank i."""
        group = self.state.gather_group
        assert group is not None
        return torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", group.size(), group.group_name)


class KeysValues:
    """Keys and values on their way to the ranks that attend to them."""

    def __init__(
        self,
        attention: ContextParallelAttention,
        k_SKD: Tensor,
        v_SKD: Tensor,
        documents: Documents | HeadTailShard,
    ) -> None:
        self.documents = documents
        # [S, K, D] twice -> [S, 2K, D] for one collective; where each rank gets some heads, its keys lie by its values.
        degree = attention.state.ulysses_degree
        # Fewer kv heads than ranks are repeated, so that each rank holds the kv head that its query heads use.
        repeats = max(degree // k_SKD.shape[1], 1)
        k_SKD, v_SKD = (x if repeats == 1 else x.repeat_interleave(repeats, dim=1) for x in (k_SKD, v_SKD))
        parts = [x.unflatten(1, (degree, -1)) for x in (k_SKD, v_SKD)]
        kv_S2KD = torch.cat(parts, dim=2).flatten(1, 2)
        self.transfer: Transfer | None = None
        if attention.state.ulysses_group is not None:
            self.transfer = attention.scatter_heads(kv_S2KD)
        if isinstance(documents, HeadTailShard):
            if self.transfer is not None:
                kv_S2KD = self.transfer.finish().flatten(0, 1)
            self.transfer = self._gather(attention, documents).start(kv_S2KD)

    @staticmethod
    def _gather(attention: ContextParallelAttention, shard: HeadTailShard) -> Transfer:
        """All-gather of [S, 2K, D]; received are the rows of the heads' pass and of the tails', [R, 2K, D] each.

        Gradients of both passes and of all ranks are added up in fp32: in bf16 each of 2C sums would round.
        """
        head_rows, tail_rows = shard.heads.key_rows, shard.tails.key_rows
        num_rows = 0

        def rows(kv_T2KD: Tensor) -> tuple[Tensor, Tensor]:
            return kv_T2KD.index_select(0, head_rows), kv_T2KD.index_select(0, tail_rows)

        def back(head_grad: Tensor, tail_grad: Tensor) -> Tensor:
            dtype = _summed(head_grad.dtype)
            total = head_grad.new_zeros(num_rows, *head_grad.shape[1:], dtype=dtype)
            # Copies, no atomic additions: a pass has each row at most once.
            total.index_copy_(0, tail_rows, tail_grad.to(dtype))
            total.index_copy_(0, head_rows, total.index_select(0, head_rows) + head_grad)
            return attention.reduce_scatter(total)

        def send(kv_S2KD: Tensor) -> Tensor:
            nonlocal num_rows
            gathered = attention.all_gather(kv_S2KD)
            num_rows = len(gathered)
            return gathered

        return Transfer(send, back, rows, _summed)

    def of_sequence(self) -> tuple[Tensor, Tensor]:
        """k and v of the group's sequence, [T, K/C, D] each."""
        assert self.transfer is not None
        k_TKD, v_TKD = self.transfer.finish().flatten(0, 1).chunk(2, dim=1)
        return k_TKD, v_TKD

    def of_passes(self) -> list[tuple[Tensor, Tensor]]:
        """k and v that the queries of the heads and of the tails see, [R, K, D] each."""
        assert self.transfer is not None
        return [tuple(kv_R2KD.chunk(2, dim=1)) for kv_R2KD in self.transfer.finish()]


def _summed(dtype: torch.dtype) -> torch.dtype:
    """In which gradients of many parts are added up."""
    return torch.promote_types(dtype, torch.float32)


def check_heads(levels: Sequence[Level], num_heads: int, num_kv_heads: int) -> None:
    """Raise ValueError where the cp_degree of a level of style "ulysses" does not fit the model's heads."""
    for level in levels:
        if level.cp_style != "ulysses":
            continue
        cp = level.cp_degree
        where = f'the level with max_tokens={level.max_tokens}: change levels.cp_degree, or cp_style to "hybrid"'
        if num_heads % cp:
            raise ValueError(f"cp_degree={cp} does not divide the model's {num_heads} attention heads in {where}")
        if num_kv_heads % cp and cp % num_kv_heads:
            raise ValueError(
                f"cp_degree={cp} neither divides the model's {num_kv_heads} kv heads nor is a multiple of them in "
                f"{where}"
            )
