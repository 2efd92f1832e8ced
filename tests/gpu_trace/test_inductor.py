"""Kernels that inductor makes of a Llama block for an H100."""

from __future__ import annotations

import pytest

from tests.gpu_trace.inductor import AVAILABLE, regions

TOKENS, HIDDEN, INNER, HEADS, KV_HEADS, WIDTH = 16384, 4096, 14336, 32, 8, 128


@pytest.mark.skipif(not AVAILABLE, reason="needs torch built for CUDA, without a GPU; run: scripts/trace_all_torch.sh")
def test_norms_rotation_activation_and_residuals_are_one_kernel_each() -> None:
    before, after, after_backward, before_backward = regions("llama3_1_8b_hbp")
    # The norm; q's rotation; k's. Then the norm, and the activation: products add the residuals.
    assert (len(before.fused), len(before.products)) == (3, 3)
    assert (len(after.fused), len(after.products)) == (2, 4)
    norm, angles = 2 * TOKENS * HIDDEN, 2 * 2 * TOKENS * WIDTH
    rotations = [2 * TOKENS * heads * WIDTH + angles for heads in (HEADS, KV_HEADS)]
    # bfloat16, read once and written once; angles are in float32; the weights of a norm are next to nothing.
    assert before.fused_bytes / 2 == pytest.approx(norm + sum(rotations), rel=0.01)
    assert after.fused_bytes / 2 == pytest.approx(norm + 3 * TOKENS * INNER, rel=0.01)
    # Activation; norm, with the sum of all gradients of its input; two steps of the norm's weight's gradient.
    assert (len(after_backward.fused), len(after_backward.products)) == (3, 8)
    assert (len(before_backward.fused), len(before_backward.products)) == (4, 6)
    assert after_backward.fused_bytes / 2 == pytest.approx(5 * TOKENS * INNER + 5 * TOKENS * HIDDEN, rel=0.01)
