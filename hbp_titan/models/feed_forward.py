"""SwiGLU: the dense feed-forward network of every family, and a mixture's shared experts.

Shape suffixes: T tokens, H hidden width, F intermediate width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """SwiGLU of width `intermediate_size`."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.down_proj(self.hidden(x_TH))

    def hidden(self, x_TH: Tensor) -> Tensor:
        """What the last product multiplies, [T, F]."""
        return F.silu(self.gate_proj(x_TH)) * self.up_proj(x_TH)
