"""Context parallelism over packed documents: attention gets whole documents, everything else a sequence shard.

Owns the exchanges between cp ranks and the check that a cp degree fits the heads. A level's cp ranks form
gather_degree groups of ulysses_degree ranks (Level.cp_shape); attention passes through up to two exchanges:

    within a group    Ulysses (arXiv 2309.14509): all-to-alls give each rank the group's sequence for some of the heads
    between groups    keys and values are all-gathered (arXiv 2407.21783, section 3.3.2), queries stay. The groups hold
                      head-tail shards, so that their causal work is even (models/documents.py)

"ulysses" is the first alone, "allgather" the second alone, "hybrid" both. Shape suffixes: T tokens of the pack (inside
Ulysses: of the group), S tokens of a rank's shard, N query heads, K kv heads, D head dim, C ranks of a Ulysses group,
G ranks of a gather group, R rows of gathered keys that one pass reads.
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
    """What the attention layers read at each forward: the active level's cp mesh, and its groups of degree above 1."""

    ulysses_degree: int = 1
    ulysses_group: ProcessGroup | None = None
    gather_group: ProcessGroup | None = None
    mesh: DeviceMesh | None = None

    def set_mesh(self, mesh: DeviceMesh | None) -> None:
        """Activate a cp mesh from `LevelMeshes.mesh_for`, None at cp 1."""
        self.mesh = mesh
        groups = {axis: mesh.get_group(axis) for axis in mesh.mesh_dim_names or ()} if mesh is not None else {}
        self.ulysses_group, self.gather_group = groups.get("ulysses"), groups.get("gather")
        self.ulysses_degree = self.ulysses_group.size() if self.ulysses_group is not None else 1

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the cp ranks; not differentiable."""
        for group in (self.ulysses_group, self.gather_group):
            if group is not None:
                x = wait_tensor(collectives.all_reduce(x, "sum", group))
        return x


class Transfer:
    """A collective in flight, differentiable: backward issues the collective of the gradients.

    send: issues the collective of a contiguous tensor; its result is not there before wait_tensor.
    send_back: issues the collective of the gradients of what `receive` returned; its result is the sent tensor's.
    receive: converts the arrived result to what `finish` returns.
    grad_dtype: dtype of the sent tensor -> dtype in which its gradient travels. It must be exact: autograd casts a
        gradient of another dtype immediately, which would read it before it has arrived.
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
        """Wait for the result and return what `receive` makes of it, differentiable with respect to what was sent."""
        received = _Finish.apply(self.token, self)
        self.token = None
        return received


class _Start(torch.autograd.Function):
    """Returns a token in place of the result; the token's gradient is in flight while autograd does other work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, transfer: Transfer) -> Tensor:
        ctx.dtype = x.dtype
        transfer.result = transfer.send(x.contiguous())
        # Autograd checks a gradient's shape and dtype against the token's; expanded, the token takes no memory.
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
    """A model's inner attention with the exchanges of the active level around it; without cp ranks just the attention.

    forward takes q [S, N, D] and k, v [S, K, D] of the rank's sequence shard, and the documents of the whole pack
    (PackedBatch.documents): a HeadTailShard where keys and values are gathered. Returns o [S, N, D].

    `start` sends keys and values, `finish` waits for them. Between the two the block projects its queries, in backward
    while the gradients of keys and values travel back:

        forward     project k, v | start k, v | project q | exchange q, wait for k, v | attention | exchange o
        backward    attention | start dk, dv, exchange dq | q's projection | wait for dk, dv | k's and v's projection
    """

    def __init__(self, inner: nn.Module, state: ContextParallelState) -> None:
        super().__init__()
        self.inner = inner
        self.state = state

    @property
    def window(self) -> int | None:
        """The sliding window of the attention."""
        window: int | None = getattr(self.inner, "window", None)
        return window

    @property
    def exchanges(self) -> bool:
        """Whether the active level has cp ranks, so that splitting forward into `start` and `finish` gives overlap."""
        return self.state.ulysses_group is not None or self.state.gather_group is not None

    def forward(self, q_SND: Tensor, k_SKD: Tensor, v_SKD: Tensor, documents: Documents | HeadTailShard) -> Tensor:
        if not self.exchanges:
            return self.inner(q_SND, k_SKD, v_SKD, documents)
        return self.finish(q_SND, self.start(k_SKD, v_SKD, documents))

    def start(self, k_SKD: Tensor, v_SKD: Tensor, documents: Documents | HeadTailShard) -> KeysValues:
        """Send the keys and values of this rank's shard to the ranks that attend to them."""
        return KeysValues(self, k_SKD, v_SKD, documents)

    def finish(self, q_SND: Tensor, keys_values: KeysValues) -> Tensor:
        """Wait for keys and values and return the attention of this rank's queries to them, o [S, N, D]."""
        documents = keys_values.documents
        scatters = self.state.ulysses_group is not None
        if scatters:
            q_SND = self.scatter_queries(q_SND)
        if isinstance(documents, HeadTailShard):
            (heads_k, heads_v), (tails_k, tails_v) = keys_values.passes()
            heads, tails = documents.passes(self.window)
            q_heads, q_tails = q_SND.split([part.documents.whole.num_queries for part in (heads, tails)])
            # Two passes: a head's keys are also keys of its document's tail, and one varlen call cannot share rows.
            o_heads = self.inner(q_heads, heads_k, heads_v, heads.documents)
            o_SND = torch.cat([o_heads, self.inner(q_tails, tails_k, tails_v, tails.documents)])
        else:
            o_SND = self.inner(q_SND, *keys_values.sequence(), documents)
        return self.gather_heads(o_SND) if scatters else o_SND

    def in_head_groups(
        self, groups: int, q_SND: Tensor, k_SKD: Tensor, v_SKD: Tensor, documents: Documents | HeadTailShard
    ) -> Tensor:
        """Return `forward` computed for one group of adjacent query heads and their kv heads after another.

        What attention allocates in addition to its inputs and its output is then that of one group.
        """
        # With more groups than kv heads several groups read the same one.
        kv_groups = min(groups, k_SKD.shape[1])
        keys, values = (x.split(x.shape[1] // kv_groups, dim=1) for x in (k_SKD, v_SKD))
        queries = q_SND.split(q_SND.shape[1] // groups, dim=1)
        of_group = [group * kv_groups // groups for group in range(groups)]
        if not self.exchanges:
            parts = [self.inner(q, keys[i], values[i], documents) for q, i in zip(queries, of_group, strict=True)]
            return torch.cat(parts, dim=1)
        parts, following = [], self.start(keys[0], values[0], documents)
        for group, q in enumerate(queries):
            # The next group's keys and values travel during this group's attention.
            arriving, more = following, group + 1 < groups
            if more:
                following = self.start(keys[of_group[group + 1]], values[of_group[group + 1]], documents)
            parts.append(self.finish(q, arriving))
        return torch.cat(parts, dim=1)

    def scatter_queries(self, q_SND: Tensor) -> Tensor:
        """Return the queries of the group's sequence for this rank's heads, [T, N/C, D]."""
        # [C, S, N/C, D] -> [T, N/C, D]
        return self.scatter_heads(q_SND).finish().flatten(0, 1)

    def scatter_heads(self, x_SND: Tensor) -> Transfer:
        """Start sending each rank its heads; the result is the group's sequence with this rank's heads."""
        # [S, N, D] -> [S, C, N/C, D] -> [C, S, N/C, D] -> all-to-all over dim 0, which then is the sequence
        x_CSND = x_SND.unflatten(1, (self.state.ulysses_degree, -1)).transpose(0, 1)
        return self._exchange(x_CSND)

    def gather_heads(self, o_TND: Tensor) -> Tensor:
        """Return this rank's sequence shard with all heads, [S, N, D], from the group's sequence with some heads."""
        # [T, N/C, D] -> [C, S, N/C, D] -> all-to-all over dim 0, which then is the heads -> [S, C, N/C, D] -> [S, N, D]
        o_CSND = o_TND.unflatten(0, (self.state.ulysses_degree, -1))
        return self._exchange(o_CSND).finish().transpose(0, 1).flatten(1, 2)

    def _exchange(self, x: Tensor) -> Transfer:
        # The all-to-all is its own inverse, and so its own transpose.
        return Transfer(self.all_to_all, lambda grad: self.all_to_all(grad.contiguous())).start(x)

    # The collectives, asynchronous: contiguous tensors to results that are not there before wait_tensor. The ops are
    # called directly: functional wrappers return an AsyncCollectiveTensor, which the first op on it waits for.

    def all_to_all(self, x: Tensor) -> Tensor:
        """Send part i of dim 0 to rank i of the Ulysses group."""
        group = self.state.ulysses_group
        assert group is not None
        # [C, S, N/C, D] -> [C, S, N/C, D]
        sizes = [x.shape[0] // group.size()] * group.size()
        return torch.ops._c10d_functional.all_to_all_single(x, sizes, sizes, group.group_name)

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate the parts of all ranks of the gather group on dim 0."""
        group = self.state.gather_group
        assert group is not None
        # [S, 2K, D] -> [G * S, 2K, D]
        return torch.ops._c10d_functional.all_gather_into_tensor(x, group.size(), group.group_name)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sum part i of dim 0 over the ranks of the gather group and send it to rank i."""
        group = self.state.gather_group
        assert group is not None
        # [G * S, 2K, D] -> [S, 2K, D]
        return torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", group.size(), group.group_name)


class KeysValues:
    """Keys and values in flight to the ranks that attend to them."""

    def __init__(
        self,
        attention: ContextParallelAttention,
        k_SKD: Tensor,
        v_SKD: Tensor,
        documents: Documents | HeadTailShard,
    ) -> None:
        self.documents = documents
        degree = attention.state.ulysses_degree
        # Fewer kv heads than ranks are repeated, so that each rank holds the kv head that its query heads use.
        repeats = max(degree // k_SKD.shape[1], 1)
        k_SKD, v_SKD = (x if repeats == 1 else x.repeat_interleave(repeats, dim=1) for x in (k_SKD, v_SKD))
        # [S, K, D] twice -> [S, C, K/C, D] twice -> [S, C, 2K/C, D] -> [S, 2K, D]: one collective for both, and the
        # part of heads for one rank holds its keys followed by its values.
        kv_S2KD = torch.cat([x.unflatten(1, (degree, -1)) for x in (k_SKD, v_SKD)], dim=2).flatten(1, 2)
        self.transfer: Transfer | None = None
        if attention.state.ulysses_group is not None:
            self.transfer = attention.scatter_heads(kv_S2KD)
        if isinstance(documents, HeadTailShard):
            if self.transfer is not None:
                # [C, S, 2K/C, D] -> [C * S, 2K/C, D]
                kv_S2KD = self.transfer.finish().flatten(0, 1)
            self.transfer = _gather_passes(attention, documents).start(kv_S2KD)

    def sequence(self) -> tuple[Tensor, Tensor]:
        """Return k and v of the group's sequence, [T, K/C, D] each."""
        assert self.transfer is not None
        # [C, S, 2K/C, D] -> [T, 2K/C, D] -> twice [T, K/C, D]
        k_TKD, v_TKD = self.transfer.finish().flatten(0, 1).chunk(2, dim=1)
        return k_TKD, v_TKD

    def passes(self) -> list[tuple[Tensor, Tensor]]:
        """Return k and v that the queries of the heads and of the tails attend to, [R, K, D] each."""
        assert self.transfer is not None
        return [tuple(kv_R2KD.chunk(2, dim=1)) for kv_R2KD in self.transfer.finish()]


def _gather_passes(attention: ContextParallelAttention, shard: HeadTailShard) -> Transfer:
    """Return the all-gather of [S, 2K, D]; it receives the rows of the heads' and of the tails' pass, [R, 2K, D] each.

    Gradients of both passes and of all ranks are summed in fp32: in bf16 each of 2G additions would round.
    """
    head_rows, tail_rows = (part.key_rows for part in shard.passes(attention.window))
    num_rows = 0

    def rows(kv_T2KD: Tensor) -> tuple[Tensor, Tensor]:
        return kv_T2KD.index_select(0, head_rows), kv_T2KD.index_select(0, tail_rows)

    def send_back(head_grad: Tensor, tail_grad: Tensor) -> Tensor:
        dtype = _sum_dtype(head_grad.dtype)
        total = head_grad.new_zeros(num_rows, *head_grad.shape[1:], dtype=dtype)
        # Copies instead of index_add_, whose atomic additions are slow and in random order: a pass has each row at
        # most once.
        total.index_copy_(0, tail_rows, tail_grad.to(dtype))
        total.index_copy_(0, head_rows, total.index_select(0, head_rows) + head_grad)
        return attention.reduce_scatter(total)

    def send(kv_S2KD: Tensor) -> Tensor:
        nonlocal num_rows
        gathered = attention.all_gather(kv_S2KD)
        num_rows = len(gathered)
        return gathered

    return Transfer(send, send_back, rows, _sum_dtype)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which gradients are summed."""
    return torch.promote_types(dtype, torch.float32)


def check_heads(levels: Sequence[Level], num_heads: int, num_kv_heads: int) -> None:
    """Raise ValueError if a level's cp_degree or attention_head_groups does not fit the model's heads."""
    for level in levels:
        groups = level.attention_head_groups
        ulysses_degree = level.cp_shape(num_kv_heads)[1]
        if groups > 1:
            allowed = [
                g for g in range(1, num_heads + 1) if head_groups_fit(g, num_heads, num_kv_heads, ulysses_degree)
            ]
            if groups not in allowed:
                raise ValueError(
                    f"level of max_tokens={level.max_tokens}: attention_head_groups={groups} does not fit "
                    f"{num_heads} attention heads and {num_kv_heads} kv heads over {ulysses_degree} ranks; use "
                    f"{', '.join(map(str, allowed)) or 1}"
                )
        if level.cp_style != "ulysses":
            continue
        cp = level.cp_degree
        fitting = [c for c in range(1, num_heads + 1) if not (num_heads % c or (num_kv_heads % c and c % num_kv_heads))]
        fix = f'use {", ".join(map(str, fitting))}, or cp_style = "hybrid"'
        name = f"level of max_tokens={level.max_tokens}: cp_degree={cp}"
        if num_heads % cp:
            raise ValueError(f"{name} does not divide the model's {num_heads} attention heads; {fix}")
        if num_kv_heads % cp and cp % num_kv_heads:
            raise ValueError(f"{name} neither divides the model's {num_kv_heads} kv heads nor is a multiple; {fix}")


def head_groups_fit(groups: int, num_heads: int, num_kv_heads: int, ulysses_degree: int) -> bool:
    """Return whether each group has whole kv heads, or a part of one's query heads, and each rank a part of a group."""
    if num_heads % (groups * ulysses_degree) or (num_kv_heads % groups and groups % num_kv_heads):
        return False
    kv_heads = max(1, num_kv_heads // groups)
    return kv_heads % ulysses_degree == 0 or ulysses_degree % kv_heads == 0
