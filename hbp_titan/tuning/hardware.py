"""Hardware table: what a GPU and its node can do, for planning without one.

Owns the machines that the time model (time_model.py) and the memory limit use. Peaks and bandwidths are the vendor's;
efficiencies follow from published measurements (published.py) or are assumed there with a range.
`scripts/simulate.py --calibrate` fits measured ones instead.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from hbp_titan.components.oom import device_memory
from hbp_titan.components.step_stats import PEAK_FLOPS
from hbp_titan.utils import did_you_mean


@dataclass(frozen=True)
class AttentionKernel:
    """What an attention kernel reaches on a GPU in causal attention, forward and backward together.

    efficiency: share of peak_flops with long documents and heads of 128. block: tokens by which a document of L tokens
    is effectively longer: it takes the time of L^2 + 2 * block * L + 3/4 * block^2 squares. head_factors: (head dim up
    to, share of the rate at 128). DeepSeek's MLA, keys of 192 and values of 128, counts as 192.
    """

    efficiency: float
    block: int
    head_factors: tuple[tuple[int, float], ...]


# Derived in published.py from the figures of the kernels' authors; tests/tuning/test_published.py repeats it. Of heads:
# FA2 at 256 and FA4 at 64 are published in forward only, and the backward is assumed to scale in the same way. Assumed:
# FA2 at 192, FA3 at 192 and 256, FA4 at 256 (published.ASSUMED has the ranges), and the whole of rtx4090, whose
# instructions FA2 was tuned for. FA2 on B200, which lacks the new matrix instructions: about 330 TFLOP/s, issue #1589.
ATTENTION: dict[str, dict[str, AttentionKernel]] = {
    "a100": {"fa2": AttentionKernel(0.525, 210, ((64, 0.91), (128, 1.0), (256, 0.88)))},
    "h100": {
        "fa2": AttentionKernel(0.285, 230, ((64, 0.88), (128, 1.0), (256, 0.88))),
        "fa3": AttentionKernel(0.525, 210, ((64, 0.82), (128, 1.0), (192, 0.9), (256, 0.9))),
    },
    "b200": {
        "fa2": AttentionKernel(0.13, 230, ((64, 0.88), (128, 1.0), (256, 0.88))),
        "fa4": AttentionKernel(0.525, 390, ((64, 0.66), (128, 1.0), (192, 0.86), (256, 0.75))),
    },
    "rtx4090": {"fa2": AttentionKernel(0.55, 210, ((64, 0.91), (128, 1.0), (256, 0.88)))},
}
# The same chip with more memory; flash-attention issue #1438 measured 4% less in forward and 3.5% more in backward.
ATTENTION["h200"] = ATTENTION["h100"]
# Share of peak_flops in matrix products, and of the NVLink bandwidth in exchanges with their copies (published.py). Of
# H200 and B200 the first is assumed to be the H100's, all of rtx4090.
_LINEAR = {"a100": 0.65, "h100": 0.52, "h200": 0.52, "b200": 0.52, "rtx4090": 0.6}
_EXCHANGE = {"a100": 0.5, "h100": 0.52, "h200": 0.57, "b200": 0.54, "rtx4090": 0.5}
BEST_KERNEL = {"a100": "fa2", "h100": "fa3", "h200": "fa3", "b200": "fa4", "rtx4090": "fa2"}
"""The kernel that the documentation recommends, which model.attention_backend = "auto" then selects."""


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU in its usual node.

    peak_flops: dense bf16 FLOP/s. memory_bytes: what CUDA reports, somewhat less than the nominal size.
    memory_bandwidth: byte/s. intra_node_bandwidth, inter_node_bandwidth: byte/s per GPU in one direction (NVLink: half
    of the data sheet's bidirectional figure; network: its own adapter). gpus_per_node: GPUs connected by NVLink.
    pcie_bandwidth: byte/s between a GPU and host memory in one direction (half of the bidirectional figure).
    host_bandwidth: byte/s of host memory per GPU. host_memory_bytes: of a node, as usually bought.

    Derived from published figures (published.py): linear_efficiency: share of peak_flops in the matrix products (with
    the norms and activations between them). attention_efficiency, attention_block, head_factors: of attention_kernel,
    as in AttentionKernel. exchange_efficiency: share of bandwidth in the collectives inside attention, with the copies
    around them. gather_efficiency: in FSDP's collectives.

    Assumed: pcie_efficiency: in copies of pinned memory. launch_seconds: CPU time of one kernel launch. hop_seconds:
    latency of a collective per doubling of its ranks.
    """

    name: str
    peak_flops: float
    memory_bytes: int
    memory_bandwidth: float
    intra_node_bandwidth: float
    inter_node_bandwidth: float
    gpus_per_node: int = 8
    linear_efficiency: float = 0.52
    attention_efficiency: float = 0.45
    exchange_efficiency: float = 0.5
    gather_efficiency: float = 0.8
    launch_seconds: float = 6e-6
    hop_seconds: float = 8e-6
    attention_kernel: str = ""
    attention_block: int = 128
    pcie_bandwidth: float = 64e9
    pcie_efficiency: float = 0.75
    host_bandwidth: float = 75e9
    host_memory_bytes: int = 2 * 10**12
    head_factors: tuple[tuple[int, float], ...] = ((64, 0.75), (128, 1.0), (256, 0.85))

    def with_attention(self, backend: str) -> Hardware:
        """Return the machine with the kernel of `model.attention_backend`; "auto" keeps the table's."""
        # torch's varlen attention is the FA2 kernel.
        backend = "fa2" if backend == "torch" else backend
        kernel = ATTENTION.get(self.name.split("-")[0], {}).get(backend)
        if kernel is None:
            return self
        return dataclasses.replace(
            self,
            attention_efficiency=kernel.efficiency,
            attention_block=kernel.block,
            head_factors=kernel.head_factors,
            attention_kernel=backend,
        )

    def with_published(self) -> Hardware:
        """Return the machine with its best attention kernel and the efficiencies derived from published figures."""
        gpu = self.name.split("-")[0]
        efficiencies = {"linear_efficiency": _LINEAR[gpu], "exchange_efficiency": _EXCHANGE[gpu]}
        return dataclasses.replace(self, **efficiencies).with_attention(BEST_KERNEL[gpu])  # type: ignore[arg-type]

    def with_host(self, pcie_bandwidth: float, host_bandwidth: float, memory_bytes: int = 2 * 10**12) -> Hardware:
        """Return the machine with another link to the host and other memory there."""
        return dataclasses.replace(
            self, pcie_bandwidth=pcie_bandwidth, host_bandwidth=host_bandwidth, host_memory_bytes=memory_bytes
        )

    @property
    def fp8_peak_flops(self) -> float:
        """Dense float8 FLOP/s by the data sheets: twice those in bf16 from Ada and Hopper on, 0 before."""
        return 0.0 if self.name.startswith("a100") else 2 * self.peak_flops

    def attention_rate(self, head_dim: int) -> float:
        """Return the FLOP/s of attention with heads of this width."""
        factors = (factor for width, factor in self.head_factors if head_dim <= width)
        return self.peak_flops * self.attention_efficiency * next(factors, self.head_factors[-1][1])

    def bus_bandwidth(self, members: int, members_per_node: int) -> float:
        """Return the byte/s at which each of `members` ranks receives in a ring.

        NVLink inside a node; across nodes at most what the adapters of `members_per_node` ranks bring into a node.
        """
        if members <= members_per_node:
            return self.intra_node_bandwidth
        return min(self.intra_node_bandwidth, members_per_node * self.inter_node_bandwidth)


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM, B200 (HGX); nodes as in the DGX A100 (ConnectX-6, 200 Gbit/s
# per GPU), DGX H100, DGX H200 and DGX B200 (ConnectX-7, 400 Gbit/s per GPU). PCIe with 16 lanes has 32 GB/s in each
# direction as 4.0 and 64 as 5.0. Host memory is 2 TB in 16 channels, of DDR4-3200 in the DGX A100 and of DDR5-4800 from
# the DGX H100. RTX 4090: Ada's data sheet (fp32 accumulation); its node is assumed: 8 GPUs that send to each other over
# PCIe, 1 TB in 16 channels of DDR4-3200, 100 Gbit/s of network.
HARDWARE: dict[str, Hardware] = {
    hardware.name: hardware.with_published()
    for hardware in (
        #        name         peak                memory               bandwidth NVLink network
        Hardware("a100-80gb", PEAK_FLOPS["A100"], int(79.1 * 2**30), 2.039e12, 300e9, 25e9).with_host(32e9, 51e9),
        Hardware("h100-80gb", PEAK_FLOPS["H100"], int(79.1 * 2**30), 3.35e12, 450e9, 50e9),
        Hardware("h200-141gb", PEAK_FLOPS["H200"], int(139.7 * 2**30), 4.8e12, 450e9, 50e9),
        Hardware("b200-180gb", PEAK_FLOPS["B200"], int(178.3 * 2**30), 8.0e12, 900e9, 50e9),
        Hardware("rtx4090-24gb", 165e12, int(23.6 * 2**30), 1.008e12, 24e9, 1.5e9).with_host(32e9, 51e9, 10**12),
    )
}


def hardware_of(device: torch.device) -> Hardware | None:
    """Return the machine of a device; None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    return next((hardware for key, hardware in HARDWARE.items() if key.split("-")[0] in name), None)


def get_hardware(name: str) -> Hardware:
    """Return the machine called `name`; raise ValueError with the closest name if there is none."""
    key = name.strip().lower()
    if key not in HARDWARE:
        raise ValueError(f"hardware {name!r}: must be one of {', '.join(HARDWARE)}{did_you_mean(key, HARDWARE)}")
    return HARDWARE[key]


def total_memory(device: torch.device, local_ranks: int) -> int:
    """Return the bytes of a GPU, or of this rank's share of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return device_memory(device, local_ranks)


def hardware_like(device: torch.device, memory_bytes: int, gpus_per_node: int) -> Hardware:
    """Return the table's entry of `device`, or the H100's if there is none (as on a CPU), with this memory and node."""
    like = hardware_of(device) or HARDWARE["h100-80gb"]
    return dataclasses.replace(like, memory_bytes=memory_bytes, gpus_per_node=gpus_per_node)
