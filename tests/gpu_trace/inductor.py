"""What inductor makes of a block's regions for an H100: kernels and their bytes, on a machine without a GPU.

    python -m tests.gpu_trace.inductor llama3_1_8b_hbp          needs a CUDA build of torch, with Triton, and no GPU

The graphs are those of a traced engine (harness.py). Inductor lowers, fuses and generates code for them as on an H100;
nothing is compiled or run. Only its questions about the device are answered from here.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter

from hbp_titan.packing import Level
from tests.gpu_trace.harness import TracedEngine

AVAILABLE = torch.version.cuda is not None and not torch.cuda.is_available()
"""Whether torch is built for CUDA, and no GPU answers the questions itself."""
H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "total_memory": 80 * 2**30,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
    "shared_memory_per_block_optin": 232448,
    "gcnArchName": "",
}


@dataclass(frozen=True)
class Region:
    """One compiled graph. kind: forward or backward. fused: generated kernels. products: calls of a library.

    fused_bytes: what the generated kernels read and write.
    """

    kind: str
    fused: list[str]
    products: list[str]
    fused_bytes: int


def regions(preset: str, tokens: int = 16384) -> list[Region]:
    """Return the regions of one block of `preset` with `tokens` tokens per rank, without recomputation."""
    with TracedEngine(preset, levels=[Level(tokens)], layers=1, backend="fa2") as traced:
        traced.run(0, (tokens // 2, tokens // 4, 100))
        graphs = list(traced.backend.graphs)
    with _pretended_h100():
        # The loss has a graph for any number of tokens.
        return [_lowered(kind, graph) for kind, graph in graphs if not _is_dynamic(graph)]


def _is_dynamic(graph: GraphModule) -> bool:
    return any(isinstance(node.meta["val"], torch.SymInt) for node in graph.graph.find_nodes(op="placeholder"))


@contextmanager
def _pretended_h100() -> Iterator[None]:
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._subclasses import fake_tensor
    from torch.utils._triton import has_triton, has_triton_package
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    facts = SimpleNamespace(**H100)
    of_interface: dict[str, Any] = {
        "current_device": 0,
        "device_count": 1,
        "is_available": True,
        "get_compute_capability": 90,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "get_raw_stream": 0,
        "is_bf16_supported": True,
    }
    of_torch = {"get_device_properties": facts, "current_device": 0, "get_device_capability": (9, 0)}
    of_torch |= {"is_available": True, "device_count": 1, "_lazy_init": None, "get_device_name": facts.name}
    properties = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, 1024, 32)
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    with ExitStack() as stack:
        for place, answers in ((torch.cuda, of_torch), (CudaInterface, of_interface)):
            for name, answer in answers.items():
                stack.enter_context(mock.patch.object(place, name, staticmethod(lambda *_, a=answer, **__: a)))
        worker = {"get_device_properties": staticmethod(lambda *_: facts), "current_device": staticmethod(lambda: 0)}
        stack.enter_context(mock.patch.multiple(CudaInterface.Worker, **worker))
        stack.enter_context(mock.patch.object(DeviceProperties, "create", staticmethod(lambda device: properties)))
        stack.enter_context(mock.patch.object(driver, "_active", target))
        # It would allocate on the device.
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context"))
        for answer in (has_triton, has_triton_package):
            # Asked before, without a GPU, and again afterwards.
            answer.cache_clear()
            stack.callback(answer.cache_clear)
        yield


def _lowered(kind: str, graph: GraphModule) -> Region:
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    graph, mode = copy.deepcopy(graph), FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    graph.recompile()
    shapes = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    with mode:
        inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in shapes]
        graph = make_fx(Interpreter(graph).run, decomposition_table=select_decomp_table())(*inputs)
        FakeTensorProp(graph, mode).propagate(*inputs)

    def lowering() -> GraphLowering:
        return GraphLowering(graph, example_inputs=inputs, shape_env=mode.shape_env, is_inference=False)

    with V.set_debug_handler(DebugContext()), V.set_fake_mode(mode):
        with V.set_graph_handler(lowering()):
            post_grad_passes(graph, is_inference=False)
        with mode:
            FakeTensorProp(graph, mode).propagate(*inputs)
        graph.recompile()
        with V.set_graph_handler(final := lowering()):
            final.run(*inputs)
            source: Any = final.codegen()[0]
            nodes = [node for node in final.scheduler.nodes if not node.is_extern()]
            moved = sum(node.get_read_write_buffers_sizes() for node in nodes)
    text = getattr(source, "value", source)
    fused = re.findall(r"^\s*(triton_\w+?)\.run\(", text, re.MULTILINE)
    return Region(kind, fused, re.findall(r"extern_kernels\.(\w+)\(", text), moved)


if __name__ == "__main__":
    for region in regions(sys.argv[1]):
        print(
            f"{region.kind:<9} {len(region.fused)} kernels, {region.fused_bytes / 2**20:.0f} MiB: "
            f"{' '.join(region.fused)}; {len(region.products)} products: {' '.join(region.products)}"
        )
