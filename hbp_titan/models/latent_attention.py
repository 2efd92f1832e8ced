"""Multi-head latent attention of DeepSeek-V2 and V3: the projections around the attention kernel.

Shape suffixes: T tokens of the pack, H hidden width, N heads, D = P + R head width, of which R is rotated, V width of a
value's head, C width of the key/value latent, M = N * D.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hbp_titan.models.configs import MLAArgs, ModelArgs
from hbp_titan.models.layers import apply_rope, halves_from_pairs

# Not rms_norm_eps: DeepSeek's code and transformers leave the norms of the latents at their default.
_LATENT_NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    """Attention's projections with key and value latents and decoupled RoPE (DeepSeek-V2, arXiv 2405.04434, 2.1).

    Keys and values are expanded before attention to one head per query head, and values are zero-padded to the width of
    keys: attention kernels and context parallelism then handle plain multi-head attention of one head width. That
    costs the kernel (D - V) / 2D of its work, a sixth for DeepSeek's 192 and 128.
    """

    def __init__(self, args: ModelArgs, mla: MLAArgs) -> None:
        super().__init__()
        self.mla = mla
        q_width = args.num_heads * mla.qk_head_dim
        if mla.q_lora_rank is None:
            self.q_proj = nn.Linear(args.hidden_size, q_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(args.hidden_size, mla.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(mla.q_lora_rank, eps=_LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(mla.q_lora_rank, q_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(args.hidden_size, mla.kv_lora_rank + mla.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(mla.kv_lora_rank, eps=_LATENT_NORM_EPS)
        kv_width = args.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        self.kv_b_proj = nn.Linear(mla.kv_lora_rank, kv_width, bias=False)
        self.o_proj = nn.Linear(args.num_heads * mla.v_head_dim, args.hidden_size, bias=False)

    def queries(self, x_TH: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        mla = self.mla
        q_TM = self.q_proj(x_TH) if mla.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TH)))
        q_TND = q_TM.unflatten(-1, (-1, mla.qk_head_dim))
        q_TNP, q_TNR = q_TND.split([mla.qk_nope_head_dim, mla.qk_rope_head_dim], dim=-1)
        return torch.cat((q_TNP, apply_rope(halves_from_pairs(q_TNR), cos_TR, sin_TR)), dim=-1)

    def keys_values(self, x_TH: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
        """Return k_TND and v_TND, whose last D - V elements are 0."""
        mla = self.mla
        c_TC, k_TR = self.kv_a_proj_with_mqa(x_TH).split([mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1)
        kv_TN = self.kv_b_proj(self.kv_a_layernorm(c_TC)).unflatten(-1, (-1, mla.qk_nope_head_dim + mla.v_head_dim))
        k_TNP, v_TNV = kv_TN.split([mla.qk_nope_head_dim, mla.v_head_dim], dim=-1)
        # One rotated key for all heads.
        k_T1R = apply_rope(halves_from_pairs(k_TR.unsqueeze(1)), cos_TR, sin_TR)
        k_TND = torch.cat((k_TNP, k_T1R.expand(-1, k_TNP.shape[1], -1)), dim=-1)
        return k_TND, F.pad(v_TNV, (0, mla.qk_head_dim - mla.v_head_dim))

    def output(self, o_TND: Tensor) -> Tensor:
        return self.o_proj(o_TND[..., : self.mla.v_head_dim].flatten(-2))
