"""Hardware: what a GPU and its node can do, for planning without one.

Owns the peak FLOP/s of known devices and the table of machines that the estimate (time_parts.py) computes with. Peaks
and bandwidths are the vendor's; efficiencies are the share of them that training reaches, and are assumptions until
`scripts/simulate.py --calibrate` replaces them by measured ones.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass

import torch

# Dense bf16 FLOP/s by the vendors' data sheets (after torchtitan v0.2.2 tools/utils.py); the first match counts.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "MI300X": 1300e12,
    "MI325X": 1300e12,
    "MI355X": 2500e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device, None where it is not known (a CPU, a new GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU in its usual node.

    peak_flops: dense bf16 FLOP/s. memory_bytes: what CUDA reports, somewhat less than the name's. memory_bandwidth:
    byte/s. intra_node_bandwidth, inter_node_bandwidth: byte/s of one GPU in one direction (NVLink: half of the data
    sheet's bidirectional figure; network: its own adapter). gpus_per_node: GPUs that NVLink joins.

    Assumed unless measured: linear_efficiency, attention_efficiency: reached share of peak_flops in the matrix
    products (with the norms and activations between them) and in causal attention, forward and backward together.
    exchange_efficiency: reached share of bandwidth in the collectives inside attention, with the copies around them;
    gather_efficiency: in FSDP's. launch_seconds: CPU time of one kernel launch. hop_seconds: latency of a collective,
    for each doubling of its ranks.
    """

    name: str
    peak_flops: float
    memory_bytes: int
    memory_bandwidth: float
    intra_node_bandwidth: float
    inter_node_bandwidth: float
    gpus_per_node: int = 8
    linear_efficiency: float = 0.6
    attention_efficiency: float = 0.45
    exchange_efficiency: float = 0.5
    gather_efficiency: float = 0.75
    launch_seconds: float = 6e-6
    hop_seconds: float = 8e-6

    def bus_bandwidth(self, members: int, members_per_node: int) -> float:
        """Byte/s at which each of `members` ranks receives in a ring: NVLink inside a node, and across nodes at most
        what the adapters of its `members_per_node` ranks bring into a node together."""
        if members <= members_per_node:
            return self.intra_node_bandwidth
        return min(self.intra_node_bandwidth, members_per_node * self.inter_node_bandwidth)


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM, B200 (HGX); nodes as in the DGX A100 (ConnectX-6, 200 Gbit/s
# for each GPU), DGX H100, DGX H200 and DGX B200 (ConnectX-7, 400 Gbit/s for each GPU).
HARDWARE: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        #        name         peak                memory               bandwidth NVLink network
        Hardware("a100-80gb", PEAK_FLOPS["A100"], int(79.1 * 2**30), 2.039e12, 300e9, 25e9),
        Hardware("h100-80gb", PEAK_FLOPS["H100"], int(79.1 * 2**30), 3.35e12, 450e9, 50e9),
        Hardware("h200-141gb", PEAK_FLOPS["H200"], int(139.7 * 2**30), 4.8e12, 450e9, 50e9),
        Hardware("b200-180gb", PEAK_FLOPS["B200"], int(178.3 * 2**30), 8.0e12, 900e9, 50e9),
    )
}


def hardware_of(device: torch.device) -> Hardware | None:
    """The machine that has such a device; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((hardware for key, hardware in HARDWARE.items() if key.split("-")[0] in name), None)


def get_hardware(name: str) -> Hardware:
    """The machine called `name`; ValueError that names the nearest one otherwise."""
    key = name.strip().lower()
    if key in HARDWARE:
        return HARDWARE[key]
    close = difflib.get_close_matches(key, HARDWARE, n=1, cutoff=0.3)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"hardware {name!r} is none of {', '.join(HARDWARE)}{hint}")


def hardware_like(device: torch.device, memory_bytes: int, gpus_per_node: int) -> Hardware:
    """The entry of the table that `device` is called by, with its own memory; without one, as on a CPU, the H100's."""
    like = hardware_of(device) or HARDWARE["h100-80gb"]
    return dataclasses.replace(like, memory_bytes=memory_bytes, gpus_per_node=gpus_per_node)
