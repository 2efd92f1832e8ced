"""The real engine on fake tensors: what a rank of a GPU job would run, recorded operator by operator.

`TracedEngine` builds a preset's model (real widths, few layers), parallelizes it in a fake world and runs micro-batches
under FakeTensorMode with a forced CUDA attention backend, so 128K tokens of a 70B shape take a second. Real: the
configuration, the engine, FSDP2, context and expert parallelism, checkpointing, dynamo and AOTAutograd, the documents'
lengths. Not real: kernels (their fake implementations give shapes) and other ranks. A value that the host reads from
the device (`.item()`, `.tolist()`, a branch on a tensor) raises DataDependentOutputException.

A CPU build of torch has no device guard for CUDA, so tensors are on "cpu". HBP_TRACE_DEVICE=cuda puts them on "cuda"
with a CUDA build; without a GPU autograd rejects that device ("hasPrimaryContext"), and only forward runs.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hbp_titan.config import load_config
from hbp_titan.data.batch import PackedBatch, make_batch, shard_batch
from hbp_titan.distributed import fsdp, mesh
from hbp_titan.distributed.expert_parallel import ExpertExchange, Splits
from hbp_titan.distributed.world import fake_world
from hbp_titan.engine import Engine, parallelized_on_meta
from hbp_titan.models import attention
from hbp_titan.packing import Level
from hbp_titan.preflight import model_args
from tests.gpu_trace import kernels

CONFIGS = Path(__file__).parents[2] / "train_configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.toml"))
DEVICE = os.environ.get("HBP_TRACE_DEVICE", "cpu")
CAN_DIFFERENTIATE = DEVICE == "cpu" or torch.cuda.is_available()

MAX_DOCUMENTS = 64
"""Maximum documents of a pack; the balance loss of experts has an entry for each, used or not."""

Operator = torch._ops.OpOverload


@dataclasses.dataclass(frozen=True)
class Call:
    """One operator call with its arguments by name."""

    name: str
    arguments: dict[str, Any]


class Recorder(TorchDispatchMode):
    """Records every operator that reaches the dispatcher, in eager code and in compiled graphs alike.

    races: operators that read the result of a functional collective before wait_tensor. On a GPU the collective may
    still be writing it; on the CPU and with fake tensors nothing else would show.
    """

    # Operators that take graphs appear only in compiled regions and are not recorded.
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.races: list[str] = []
        # Kept with their tensors, because the address of a freed storage may be reused.
        self._unfinished: dict[int, Tensor] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # Otherwise torch.compile does nothing while this mode is active.
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, Operator):
            return func(*args, **kwargs)
        defaults = _defaults(func)
        self.calls.append(Call(func.name(), defaults | dict(zip(defaults, args, strict=False)) | kwargs))
        if func.name() == "_c10d_functional::wait_tensor":
            self._unfinished.pop(_storage(args[0]), None)
        elif self._unfinished and not func.is_view and func.namespace != "prim":
            read = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
            self.races += [] if self._unfinished.keys().isdisjoint(read) else [func.name()]
        result = func(*args, **kwargs)
        if func.namespace == "_c10d_functional" and func.name() != "_c10d_functional::wait_tensor":
            self._unfinished[_storage(result)] = result
        return result

    def products(self, without: int) -> int:
        """Return the number of matrix products without a dimension of size `without` (the head's vocabulary)."""
        sizes = (
            [size for x in call.arguments.values() if isinstance(x, Tensor) for size in x.shape]
            for call in self.calls
            if call.name in ("aten::mm", "aten::addmm", "aten::mm.out")
        )
        return sum(without not in shape for shape in sizes)

    def collectives(self) -> Counter[str]:
        """Return the number of collectives of context and expert parallelism by kind."""
        kinds = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
        return Counter(kind for call in self.calls for kind in kinds if call.name == f"_c10d_functional::{kind}")

    def fsdp_collectives(self) -> dict[str, list[int]]:
        """Return the unsharded elements that FSDP2 gathered and reduced, in order."""
        return {
            "gathered": [call.arguments["output_tensor"].numel() for call in self.named("_allgather_base_")],
            "reduced": [call.arguments["input_tensor"].numel() for call in self.named("_reduce_scatter_base_")],
        }

    def order(self) -> str:
        """Return exchanges of context parallelism with their waits, attention and products, one word each, in order."""
        words = {
            "_c10d_functional::all_to_all_single": "scatter",
            "_c10d_functional::all_gather_into_tensor": "gather",
            "_c10d_functional::reduce_scatter_tensor": "sum",
            "_c10d_functional::wait_tensor": "wait",
            "aten::mm": "product",
        }
        names = (words.get(call.name) or ("attention" if call.name in _KERNELS else "") for call in self.calls)
        return " ".join(filter(None, names))

    @property
    def unfinished(self) -> int:
        """Number of collectives without a wait."""
        return len(self._unfinished)

    def named(self, *words: str) -> list[Call]:
        """Return the calls whose operator's name contains one of `words`."""
        return [call for call in self.calls if any(word in call.name for word in words)]

    def count(self, *words: str) -> int:
        return len(self.named(*words))


@cache
def _defaults(operator: Operator) -> dict[str, Any]:
    """Return an operator's arguments in order, with their defaults."""
    return {argument.name: argument.default_value for argument in operator._schema.arguments}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class RecordingBackend:
    """A torch.compile backend that lowers as inductor does up to code generation, and keeps every graph.

    The graphs run operator by operator, so that a Recorder sees them.
    """

    def __init__(self) -> None:
        self.graphs: list[tuple[str, torch.fx.GraphModule]] = []
        self.compile = aot_autograd(
            fw_compiler=self._keep("forward"),
            bw_compiler=self._keep("backward"),
            inference_compiler=self._keep("inference"),
            # inductor's: the default partitioner keeps more and recomputes less.
            partition_fn=min_cut_rematerialization_partition,
        )

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return self.compile(graph, inputs)

    def _keep(self, kind: str) -> Callable[[torch.fx.GraphModule, Any], Any]:
        def compile_graph(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            self.graphs.append((kind, graph))
            return make_boxed_func(graph)

        return compile_graph

    def operators(self) -> Counter[str]:
        """Return the number of each operator in all graphs."""
        nodes = (node for _, graph in self.graphs for node in graph.graph.nodes if node.op == "call_function")
        return Counter(str(node.target) for node in nodes)


class TokenCounts:
    """A token store of samples of given lengths, every token with a loss."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(self.lengths[index], np.int64), np.ones(self.lengths[index], np.bool_)


class TracedEngine:
    """A preset's engine on rank 0 of a fake world, as a context manager.

    preset: a file of train_configs. argv: overrides. levels: replace the preset's. backend: model.attention_backend.
    model: changes of the architecture.
    """

    def __init__(
        self,
        preset: str,
        argv: Sequence[str] = (),
        levels: Sequence[Level] | None = None,
        backend: str = "torch",
        world_size: int = 32,
        layers: int = 2,
        model: dict[str, Any] | None = None,
    ) -> None:
        self.config = load_config(
            [
                f"--job.config_file={CONFIGS / preset}.toml",
                "--training.mixed_precision_param=bfloat16",
                "--compile.enable=true",
                # One pass over the vocabulary: a chunk's operators are the same for each.
                "--training.loss_chunk_tokens=131072",
                *argv,
            ]
        )
        if self.config.model.weights_package:
            # Dimensions are enough: the flavor's.
            self.config.model.hf_path = ""
        if levels is not None:
            self.config.levels = tuple(levels)
        self.args = dataclasses.replace(model_args(self.config).with_layers(layers), **(model or {}))
        self.attention_backend = backend
        self.world_size = world_size
        self.backend = RecordingBackend()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._fakes: dict[int, Tensor] = {}
        self._reals: dict[int, Tensor] = {}

    def __enter__(self) -> TracedEngine:
        torch._dynamo.reset()
        counters.clear()
        with ExitStack() as stack:
            stack.enter_context(_attention_backend(self.attention_backend))
            stack.enter_context(mock.patch.object(ExpertExchange, "__call__", _even_exchange(ExpertExchange.__call__)))
            stack.enter_context(mock.patch.object(ExpertExchange, "split_chunks", _unknown_splits))
            stack.enter_context(_without_streams())
            world = stack.enter_context(fake_world(self.world_size, torch.device(DEVICE)))
            # A backend object cannot be given in TOML or on the command line.
            self.config.compile.backend = self.backend  # type: ignore[assignment]
            with mock.patch.object(fsdp, "fully_shard", self._fake_on_cuda(fsdp.fully_shard)):
                model, runtime = parallelized_on_meta(self.config, self.args, world, torch.device(DEVICE))
            self._stack = stack.pop_all()
        with self.mode:
            model.to_empty(device=DEVICE)
        self.engine = Engine.__new__(Engine)
        self.engine.device, self.engine.model, self.engine.runtime = torch.device(DEVICE), model, runtime
        self.engine.replicated = self.config.parallelism.dp_replicate > 1
        self.engine.chunk_tokens = self.config.training.loss_chunk_tokens
        self.engine.backend = self.backend if self.config.compile.enable else ""  # type: ignore[assignment]
        return self

    def _fake_on_cuda(self, shard: Callable[..., Any]) -> Callable[..., Any]:
        """Return fully_shard with FSDP2's own tensors fake; meshes read values of theirs, which stay real."""
        place = DeviceMesh._compute_coordinate_on_dim

        def place_without_fakes(device_mesh: DeviceMesh) -> Any:
            with unset_fake_temporarily():
                return place(device_mesh)

        def fully_shard(*inputs: Any, **options: Any) -> Any:
            with self.mode, mock.patch.object(DeviceMesh, "_compute_coordinate_on_dim", place_without_fakes):
                return shard(*inputs, **options)

        return shard if DEVICE == "cpu" else fully_shard

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        torch._dynamo.reset()

    def batch(self, level: int, lengths: Sequence[int]) -> PackedBatch:
        """Return this rank's shard of a pack of documents of `lengths`, as fake tensors."""
        shape = self.config.levels[level]
        whole = make_batch(TokenCounts(lengths), range(len(lengths)), shape, level, MAX_DOCUMENTS)
        gather_degree = shape.cp_shape(self.args.num_kv_heads)[0]
        shard = shard_batch(whole, 0, shape.cp_degree, gather_degree, self.args.sliding_window)
        fields = {item.name: getattr(shard, item.name) for item in dataclasses.fields(shard)}
        return PackedBatch(**tree_map_only(Tensor, self._fake, fields))

    def _fake(self, real: Tensor) -> Tensor:
        # Both are kept, because the id of a freed tensor may be reused.
        if id(real) not in self._fakes:
            with self.mode:
                fake = torch.empty(real.shape, dtype=real.dtype, device=DEVICE)
            self._fakes[id(real)] = fake
            self._reals[id(fake)] = real
        return self._fakes[id(real)]

    def value(self, fake: Tensor) -> Tensor:
        """Return the real tensor of a batch's fake tensor."""
        return self._reals[id(fake)]

    def kernel_calls(self, recorder: Recorder) -> list[KernelCall]:
        """Return the calls of attention kernels in order."""
        return [self._kernel_call(call) for call in recorder.calls if call.name in _KERNELS]

    def _kernel_call(self, call: Call) -> KernelCall:
        get = {name: call.arguments[key] for name, key in _KERNELS[call.name].items()}
        window = call.arguments.get("window_size") or [
            call.arguments["window_size_left"],
            call.arguments["window_size_right"],
        ]
        lengths = [tuple(self.value(get[name]).diff().tolist()) for name in ("cu_seqlens_q", "cu_seqlens_k")]
        return KernelCall(
            backward=call.name.endswith("backward"),
            tensors=tuple(get[name] for name in ("q", "k", "v")),
            lengths_q=lengths[0],
            lengths_k=lengths[1],
            max_seqlen=(get["max_seqlen_q"], get["max_seqlen_k"]),
            causal=get["causal"],
            window=tuple(window),
            scale=get["scale"],
        )

    def graphs_of(self, *functions: Callable[..., Any]) -> int:
        """Return the number of graphs that torch.compile has made of these functions."""
        return sum(len(_debug_get_cache_entry_list(function.__code__)) for function in functions)

    def run(self, level: int, lengths: Sequence[int], grad: bool = True) -> Recorder:
        """Run one micro-batch, forward and backward; without `grad`, validation's forward."""
        return self.run_batch(self.batch(level, lengths), grad)

    def run_batch(self, batch: PackedBatch, grad: bool = True) -> Recorder:
        with self.mode, Recorder() as recorder:
            if grad and CAN_DIFFERENTIATE:
                self.engine.forward_backward(batch)
            else:
                self.engine.evaluate(batch)
        return recorder


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """The arguments of an attention kernel. lengths: queries and keys of each document, from cu_seqlens."""

    backward: bool
    tensors: tuple[Tensor, ...]
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    max_seqlen: tuple[int, int]
    causal: bool
    window: tuple[int, ...]
    scale: float

    def check(self, scale: float, window: int | None) -> None:
        """Assert the preconditions of every flash kernel, and that max_seqlen is no larger than needed.

        window: of the model's layers that have one.
        """
        q_TND, k_SKD, v_SKD = self.tensors
        assert min(self.lengths_q) > 0, "a document without a query reached a kernel"
        assert all(queries <= keys for queries, keys in zip(self.lengths_q, self.lengths_k, strict=True))
        assert (sum(self.lengths_q), sum(self.lengths_k)) == (len(q_TND), len(k_SKD))
        assert len(v_SKD) == len(k_SKD)
        assert self.max_seqlen == (max(self.lengths_q), max(self.lengths_k))
        # A window's right bound of 0 is a causal mask, too.
        assert (self.causal and self.window in ((-1, 0), (-1, -1))) or self.window == ((window or 0) - 1, 0)
        assert self.scale == scale
        assert q_TND.shape[1] % k_SKD.shape[1] == 0
        assert k_SKD.shape == v_SKD.shape
        for tensor in self.tensors:
            assert tensor.dtype == torch.bfloat16
            # Heads are contiguous; rows may be strided as long as 16-byte loads are aligned.
            assert tensor.stride(2) == 1
            assert tensor.stride(1) == tensor.shape[2]
            assert tensor.stride(0) % 8 == 0
            assert tensor.storage_offset() % 8 == 0


_TORCH_NAMES = {
    "q": "query",
    "k": "key",
    "v": "value",
    "cu_seqlens_q": "cu_seq_q",
    "cu_seqlens_k": "cu_seq_k",
    "max_seqlen_q": "max_q",
    "max_seqlen_k": "max_k",
    "causal": "is_causal",
    "scale": "scale",
}
_FLASH_NAMES = {name: name for name in _TORCH_NAMES} | {"scale": "softmax_scale"}
_KERNELS = {
    "torch_attn::_varlen_attn": _TORCH_NAMES,
    "torch_attn::_varlen_attn_backward": _TORCH_NAMES,
    "flash_attn::_flash_attn_varlen_forward": _FLASH_NAMES,
    "flash_attn::_flash_attn_varlen_backward": _FLASH_NAMES,
}
"""Operators of kernels, with their names of the arguments."""


@contextmanager
def _attention_backend(name: str) -> Iterator[None]:
    """Select a backend even if its package is not installed: fake implementations need no kernel."""
    with mock.patch.object(attention, "missing", return_value=""), kernels.installed(name):
        attention.set_backend(name)
        try:
            yield
        finally:
            attention.set_backend("auto")


@contextmanager
def _without_streams() -> Iterator[None]:
    """For fake tensors on "cuda" without a GPU, give FSDP2 the streams and events of torch.cpu, which do nothing."""
    if DEVICE == "cpu" or torch.cuda.is_available():
        yield
        return
    handle = SimpleNamespace(**{name: getattr(torch.cpu, name) for name in torch.cpu.__all__})
    handle.current_device, handle.device_count = lambda: 0, lambda: 8
    package = importlib.import_module("torch.distributed.fsdp._fully_shard")
    modules = [
        getattr(package, name) for name in ("_fsdp_collectives", "_fsdp_init", "_fsdp_param_group", "_fsdp_state")
    ]
    with ExitStack() as stack:
        # The first collective of each group uses real tensors.
        stack.enter_context(mock.patch.object(mesh, "_connect"))
        for module in modules:
            stack.enter_context(mock.patch.object(module, "_get_device_handle", return_value=handle))
        yield


def _unknown_splits(exchange: ExpertExchange, counts_CE: Tensor) -> list[tuple[Splits]]:
    # Each chunk's are made even by _even_exchange.
    return [(Splits(counts_E, [], []),) for counts_E in counts_CE]


def _even_exchange(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an expert exchange with even row counts, which the host then need not read from the device."""

    def exchange_rows(
        exchange: ExpertExchange, x_TH: Tensor, weights_TK: Tensor, order_S: Tensor, counts_E: Tensor, *chunk: Splits
    ) -> Tensor:
        ranks = exchange.group.size()
        rows = [len(order_S) // ranks + (rank < len(order_S) % ranks) for rank in range(ranks)]
        splits = Splits(counts_E.view(ranks, -1), rows, rows)
        with mock.patch.object(exchange, "count", return_value=[splits]):
            return run(exchange, x_TH, weights_TK, order_S, counts_E, *(splits for _ in chunk))

    return exchange_rows
