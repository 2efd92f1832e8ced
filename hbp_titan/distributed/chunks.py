"""A region of a block over chunks of its tokens, each recomputed in backward (after tiled MLP, arXiv 2506.13996).

Every operator outside attention works on each token alone, so a long shard may pass through it in parts: the peak is
that of one chunk. Parameters are gathered once for all chunks, and the gradients of the chunks are summed in fp32 (in
float64 for float64 parameters). The loss has its own chunks, because both of its gradients are known in forward
(components/loss.py).

Shape suffixes: T tokens of a shard, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def in_chunks(
    region: Callable[..., Any],
    modules: Sequence[nn.Module],
    chunk_tokens: int,
    inputs: Sequence[Tensor],
    *,
    only_saved: bool = False,
    extras: Sequence[tuple[Any, ...]] | None = None,
) -> Any:
    """Return region(*inputs), computed over chunks of about `chunk_tokens` tokens.

    region: from tensors [C, ...] to one tensor [C, ...] or a tuple of them, each row a function of the inputs' rows.
    modules: whose parameters it uses; inputs: [T, ...] each.
    only_saved: for a recomputation, which needs what backward reads but not the result: returns an uninitialized
        tensor like the first input, as the region's one output must be.
    extras: for each of `chunk_slices`, further arguments of `region`, without gradients.
    """
    chunks = _Chunks(region, modules, chunk_slices(len(inputs[0]), chunk_tokens), extras)
    if not torch.is_grad_enabled():
        return _single(chunks.forward(inputs))
    return _single(_InChunks.apply(chunks, only_saved, len(inputs), *inputs, *chunks.trained()))


def chunk_slices(tokens: int, chunk_tokens: int) -> list[slice]:
    """Return chunks of nearly equal size: compiled regions then have one shape, or two."""
    size = -(-tokens // -(-tokens // chunk_tokens))
    return [slice(start, start + size) for start in range(0, tokens, size)]


@dataclass(frozen=True)
class _Chunks:
    region: Callable[..., Any]
    modules: Sequence[nn.Module]
    slices: Sequence[slice]
    extras: Sequence[tuple[Any, ...]] | None

    def parts(self) -> Iterable[tuple[slice, tuple[Any, ...]]]:
        """Return each chunk and its further arguments."""
        return zip(self.slices, self.extras or [()] * len(self.slices), strict=True)

    def trained(self) -> list[nn.Parameter]:
        return [parameter for module in self.modules for parameter in module.parameters() if parameter.requires_grad]

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = ()
        for part, extra in self.parts():
            results = _tuple(self.region(*(x[part] for x in inputs), *extra))
            if not outputs:
                outputs = tuple(result.new_empty(len(inputs[0]), *result.shape[1:]) for result in results)
            for output, result in zip(outputs, results, strict=True):
                output[part] = result
        return outputs


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunks: _Chunks, only_saved: bool, num_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = tensors[:num_inputs]
        ctx.chunks = chunks
        ctx.save_for_backward(*inputs)
        return (torch.empty_like(inputs[0]),) if only_saved else chunks.forward(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        # The modules' own, as gathered for this backward: what forward used may have been freed in between.
        parameters = ctx.chunks.trained()
        needed = ctx.needs_input_grad[3 : 3 + len(inputs)]
        input_grads = [torch.empty_like(x) if need else None for x, need in zip(inputs, needed, strict=True)]
        sums: list[Tensor | None] = [None] * len(parameters)
        for part, extra in ctx.chunks.parts():
            leaves = [x[part].detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
            with torch.enable_grad():
                outputs = _tuple(ctx.chunks.region(*leaves, *extra))
            wanted = [leaf for leaf in leaves if leaf.requires_grad] + parameters
            # A region may use some of the modules' parameters only.
            found = list(torch.autograd.grad(outputs, wanted, [grad[part] for grad in grads], allow_unused=True))
            for total in input_grads:
                if total is not None:
                    total[part] = found.pop(0)
            for i, grad in enumerate(found):
                if grad is not None:
                    # In bf16 each addition would round.
                    sums[i] = _wide(grad) if sums[i] is None else sums[i].add_(grad)  # type: ignore[union-attr]
        rounded = (s if s is None else s.to(p.dtype) for s, p in zip(sums, parameters, strict=True))
        return None, None, None, *input_grads, *rounded


def _wide(grad: Tensor) -> Tensor:
    return grad.to(torch.promote_types(grad.dtype, torch.float32))


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _single(results: tuple[Tensor, ...]) -> Any:
    return results if len(results) > 1 else results[0]
