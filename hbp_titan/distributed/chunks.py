"""A region of a block over chunks of its tokens, each recomputed in backward (after tiled MLP, arXiv 2506.13996).

Every operator outside attention works on each token alone, so a long shard may pass through it in parts: the peak is
that of one chunk. Parameters are gathered once for all chunks, and the gradients of the chunks are summed in fp32 (in
float64 for float64 parameters). The loss has its own chunks, because both of its gradients are known in forward
(components/loss.py).

Shape suffixes: T tokens of a shard, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
) -> Any:
    """Return region(*inputs), computed over chunks of about `chunk_tokens` tokens.

    region: from tensors [C, ...] to one tensor [C, ...] or a tuple of them, each row a function of the inputs' rows.
    modules: whose parameters it uses; inputs: [T, ...] each.
    only_saved: for a recomputation, which needs what backward reads but not the result: returns an uninitialized
        tensor like the first input, as the region's one output must be.
    """
    if not torch.is_grad_enabled():
        return _single(_forward(region, chunk_tokens, inputs))
    parameters = _trained(modules)
    return _single(_InChunks.apply(region, modules, chunk_tokens, only_saved, len(inputs), *inputs, *parameters))


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        region: Callable[..., Any],
        modules: Sequence[nn.Module],
        chunk_tokens: int,
        only_saved: bool,
        num_inputs: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = tensors[:num_inputs]
        ctx.region, ctx.modules, ctx.chunk_tokens = region, modules, chunk_tokens
        ctx.save_for_backward(*inputs)
        return (torch.empty_like(inputs[0]),) if only_saved else _forward(region, chunk_tokens, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        # The modules' own, as gathered for this backward: what forward used may have been freed in between.
        parameters = _trained(ctx.modules)
        needed = ctx.needs_input_grad[5 : 5 + len(inputs)]
        input_grads = [torch.empty_like(x) if need else None for x, need in zip(inputs, needed, strict=True)]
        sums: list[Tensor | None] = [None] * len(parameters)
        for part in _parts(len(inputs[0]), ctx.chunk_tokens):
            leaves = [x[part].detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
            with torch.enable_grad():
                outputs = _tuple(ctx.region(*leaves))
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
        return None, None, None, None, None, *input_grads, *rounded


def _forward(region: Callable[..., Any], chunk_tokens: int, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = ()
    for part in _parts(len(inputs[0]), chunk_tokens):
        results = _tuple(region(*(x[part] for x in inputs)))
        if not outputs:
            outputs = tuple(result.new_empty(len(inputs[0]), *result.shape[1:]) for result in results)
        for output, result in zip(outputs, results, strict=True):
            output[part] = result
    return outputs


def _parts(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Yield chunks of nearly equal size: compiled regions then have one shape, or two."""
    size = -(-tokens // -(-tokens // chunk_tokens))
    return (slice(start, start + size) for start in range(0, tokens, size))


def _trained(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def _wide(grad: Tensor) -> Tensor:
    return grad.to(torch.promote_types(grad.dtype, torch.float32))


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _single(results: tuple[Tensor, ...]) -> Any:
    return results if len(results) > 1 else results[0]
