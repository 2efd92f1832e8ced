"""A model and a machine whose every figure can be computed by hand."""

from __future__ import annotations

from hbp_titan.tuning.hardware import Hardware
from hbp_titan.tuning.time_model import ModelDims

TOY = ModelDims(
    name="toy",
    num_layers=2,
    hidden_size=8,
    body_params=100,
    active_body_params=100,
    last_params=20,
    head_params=50,
    embedding_params=50,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    v_head_dim=2,
)
# 1000 FLOP/s, reached but for a quarter in attention with narrow heads; 100 byte/s between the two GPUs of a node, 10
# byte/s from each to other nodes.
MACHINE = Hardware("toy", 1000.0, 10**6, 1400.0, 100.0, 10.0, 2, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, attention_block=0)
