"""Every memory plan of a level gives the plain block's loss and gradients, and keeps what it says where it says."""

from __future__ import annotations

import itertools
import mmap
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hbp_titan.config import load_config
from hbp_titan.distributed.activation_checkpoint import ActivationCheckpointState, apply_activation_checkpoint
from hbp_titan.distributed.chunks import in_chunks
from hbp_titan.distributed.context_parallel import ContextParallelState
from hbp_titan.distributed.offload import HostActivations, host_memory
from hbp_titan.distributed.parallelize import apply_compile, apply_context_parallel
from hbp_titan.errors import UserError
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.documents import pack_documents
from hbp_titan.models.lora import apply_lora, enable_input_require_grads
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing.level import AC_POLICIES, Level
from hbp_titan.preflight import check

DOCUMENTS = [70, 41, 9]
TOKENS = sum(DOCUMENTS)
DEBUG, EXPERTS = get_flavor("debug"), get_flavor("debug_moe")


class Model:
    """A decoder whose blocks follow `state`, on one process, and a pack."""

    def __init__(
        self, args: ModelArgs, dtype: torch.dtype = torch.float32, lora: bool = False, compile: bool = False
    ) -> None:
        self.model = Decoder(args)
        self.model.init_weights(1)
        if lora:
            apply_lora(self.model, 4, 8.0, ["all-linear"])
            for name, parameter in self.model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
            enable_input_require_grads(self.model)
        self.model.to(dtype)
        self.state = ActivationCheckpointState(host=HostActivations(torch.device("cpu")))
        apply_context_parallel(self.model, "fused", ContextParallelState())
        if compile:
            apply_compile(self.model, "aot_eager", num_levels=2)
        apply_activation_checkpoint(self.model, self.state)
        self.ids = torch.randint(args.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(3))
        self.positions = torch.cat([torch.arange(length) for length in DOCUMENTS])
        documents = torch.arange(len(DOCUMENTS)).repeat_interleave(torch.tensor(DOCUMENTS))
        self.model.balance.set_documents(documents, torch.tensor([0.5, 0.4, 0.1]))

    def forward(self, level: Level) -> Tensor:
        self.state.set_level(level, self.model.args.num_layers)
        # Not all tokens alike: gradients of documents differ.
        logits_TV = self.model(self.ids, self.positions, pack_documents(DOCUMENTS))
        return (logits_TV.float().logsumexp(-1) * torch.linspace(0.1, 1, TOKENS)).sum() / TOKENS

    def loss_and_grads(self, level: Level) -> dict[str, Tensor]:
        self.model.zero_grad()
        loss = self.forward(level)
        loss.backward()
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **grads}


def _worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[k] - v).double().norm() / v.double().norm()) for k, v in expected.items())


@pytest.mark.parametrize(
    ("args", "options"),
    [(DEBUG, {}), (EXPERTS, {}), (DEBUG, {"lora": True})],
)
def test_every_memory_plan_equals_plain_blocks(args: ModelArgs, options: dict[str, bool]) -> None:
    model = Model(args, **options)
    plain = model.loss_and_grads(Level(TOKENS))
    plans = [*itertools.product(AC_POLICIES, (0, 50, TOKENS), (1, 2, 4))]
    for policy, chunk, groups in plans if not options and args is DEBUG else plans[::4]:
        level = Level(TOKENS, ac_policy=policy, mlp_chunk_tokens=chunk, attention_head_groups=groups)
        # Without chunks the operations and their order are the same. Four groups of query heads share two kv heads.
        same_order = chunk == 0 and groups <= 2 and not options
        assert _worst(model.loss_and_grads(level), plain) <= (0 if same_order else 2e-6), level
    assert not model.state.host._blocks


@pytest.mark.parametrize("args", [DEBUG, pytest.param(EXPERTS, marks=pytest.mark.slow)])
def test_compiled_memory_plan_equals_plain_blocks(args: ModelArgs) -> None:
    torch._dynamo.reset()
    plain = Model(args).loss_and_grads(Level(TOKENS))
    model = Model(args, compile=True)
    for policy, chunk in (("none", 50), ("offload", 50), ("offload_attention", 0)):
        level = Level(TOKENS, ac_policy=policy, mlp_chunk_tokens=chunk, attention_head_groups=2)
        assert _worst(model.loss_and_grads(level), plain) < 2e-6, level


@pytest.mark.parametrize("changes", [{"ac_layers": 3, "offload_layers": 2}, {"ac_layers": 1}, {"offload_layers": 0}])
def test_layers_of_one_model_may_be_kept_in_different_places(changes: dict[str, int]) -> None:
    model = Model(DEBUG)
    plain = model.loss_and_grads(Level(TOKENS))
    level = Level(TOKENS, ac_policy="offload", **changes)  # type: ignore[arg-type]
    assert _worst(model.loss_and_grads(level), plain) == 0
    layers = min(changes.get("ac_layers", DEBUG.num_layers), changes.get("offload_layers", DEBUG.num_layers))
    assert model.state.host.buffer_bytes == layers * TOKENS * DEBUG.hidden_size * 4


def test_host_memory_holds_what_the_policy_keeps() -> None:
    args, model = DEBUG, Model(DEBUG)
    model.loss_and_grads(Level(TOKENS, ac_policy="offload"))
    hidden = TOKENS * args.hidden_size * 4
    assert model.state.host.buffer_bytes == args.num_layers * hidden
    model.loss_and_grads(Level(TOKENS, ac_policy="offload_attention"))
    # Also q, k, v, the output and the logsumexp, each once.
    heads = TOKENS * args.head_dim * 4
    attention = heads * (2 * args.num_heads + 2 * args.num_kv_heads) + TOKENS * args.num_heads * 4
    assert model.state.host.buffer_bytes == args.num_layers * (hidden + attention)
    # Buffers are used again, by shorter levels too. A block gets a single one when its total is known.
    model.loss_and_grads(Level(TOKENS, ac_policy="offload_attention"))
    assert len(model.state.host._buffers) == args.num_layers
    pointers = {key: buffer.data_ptr() for key, buffer in model.state.host._buffers.items()}
    model.loss_and_grads(Level(TOKENS, ac_policy="offload"))
    assert {key: buffer.data_ptr() for key, buffer in model.state.host._buffers.items()} == pointers


def _inputs_alive_after_forward(policy: str) -> list[bool]:
    """Return whether the input of each block is still in device memory when the whole forward has run."""
    model = Model(DEBUG)
    inputs: list[Any] = []
    for block in model.model.blocks():
        block.register_forward_pre_hook(lambda _, x: inputs.append(weakref.ref(x[0].untyped_storage())))
    loss = model.forward(Level(TOKENS, ac_policy=policy))
    alive = [ref() is not None for ref in inputs]
    loss.backward()
    return alive


def test_device_memory_of_a_block_is_free_once_the_next_block_has_run() -> None:
    assert DEBUG.num_layers == 4
    assert _inputs_alive_after_forward("full") == [True, True, True, True]
    assert _inputs_alive_after_forward("offload") == [False, False, False, True]


def test_backward_fetches_one_block_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    model, events = Model(DEBUG), []
    fetch = HostActivations._fetch

    def recorded(host: HostActivations, block: Any) -> None:
        if block.kept[0].fetched is None:
            events.append(f"fetch {block.index}")
        fetch(host, block)

    monkeypatch.setattr(HostActivations, "_fetch", recorded)
    loss = model.forward(Level(TOKENS, ac_policy="offload"))
    for index, block in enumerate(model.model.blocks()):
        block.input_layernorm.register_forward_pre_hook(lambda *_, i=index: events.append(f"recompute {i}"))
    loss.backward()
    assert events == [
        *("fetch 3", "fetch 2", "recompute 3", "fetch 1", "recompute 2", "fetch 0", "recompute 1", "recompute 0")
    ]


class _LateCopies(HostActivations):
    """Copies that run as late as the streams' events allow, as a slow bus would make them."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.stream: Any = self
        self.pending: list[Callable[[], None]] = []
        self.done = 0
        self.after_computation = False

    # The copy stream.
    def synchronize(self) -> None:
        self.wait_event(len(self.pending))

    def wait_stream(self, computation: Any) -> None:
        self.after_computation = True

    def record_event(self) -> int:
        self.after_computation = False
        return len(self.pending)

    # The computation's stream.
    def wait_event(self, event: int) -> None:
        while self.done < event:
            self.pending[self.done]()
            self.done += 1

    def _copy(self, target: Tensor, source: Tensor) -> None:
        assert self.after_computation
        source_ref = weakref.ref(source)

        def copy() -> None:
            alive = source_ref()
            assert alive is not None, "freed before its copy ended"
            target.copy_(alive)

        self.pending.append(copy)


@pytest.mark.parametrize(("policy", "kept"), [("offload", 1), ("offload_attention", 6)])
def test_nothing_is_read_before_its_copy_has_ended(policy: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(DEBUG)
    plain = model.loss_and_grads(Level(TOKENS))
    late = model.state.host = _LateCopies()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: late)
    for _ in range(2):
        assert _worst(model.loss_and_grads(Level(TOKENS, ac_policy=policy)), plain) == 0
    # Copies to the host and back, the last block's only to it.
    assert late.done == len(late.pending) == 2 * kept * (2 * DEBUG.num_layers - 1)


def test_pinned_memory_is_registered_page_by_page_and_released(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[int, int] = {}

    class Runtime:
        def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
            registered[pointer] = size
            return 0 if size < 10_000 else 2

        def cudaHostUnregister(self, pointer: int) -> int:
            del registered[pointer]
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    buffers = [host_memory(5000, True, ""), host_memory(100, True, "")]
    host_memory(300, False, "")
    assert sorted(registered.values()) == [100, 5000]
    assert {buffer.data_ptr() % mmap.PAGESIZE for buffer in buffers} == {0}
    assert all((buffer.fill_(7) == 7).all() for buffer in buffers)
    del buffers[0]
    assert list(registered.values()) == [100]
    # Not an error of torch's, which would be taken for one of the device's memory.
    with pytest.raises(UserError, match="offload_layers"):
        HostActivations._allocate(SimpleNamespace(device=torch.device("cuda")), 10_000)  # type: ignore[arg-type]


def test_host_memory_does_not_grow_with_the_ways_in_which_documents_divide_a_pack() -> None:
    host = HostActivations(torch.device("cpu"))
    for sizes in ([1000], [600, 300, 100], [100, 300, 600], [1000], [300, 700]):
        parts = [torch.arange(float(size), requires_grad=True) for size in sizes]
        with host.block(0, ()):
            loss = sum(part.square().sum() for part in parts)
        loss.backward()  # type: ignore[union-attr]
        assert all(part.grad.equal(2 * part) for part in parts)  # type: ignore[union-attr]
    # Up to 63 bytes of alignment for each of three parts.
    assert 4000 <= host.buffer_bytes < 4300
    assert list(host._buffers) == [(0, 0)]


def test_empty_tensors_take_no_host_memory() -> None:
    host, x_0H = HostActivations(torch.device("cpu")), torch.empty(0, 8, requires_grad=True)
    with host.block(0, ()):
        loss = x_0H.square().sum()
    loss.backward()
    assert not host._buffers


def test_a_forward_after_one_without_backward_starts_afresh() -> None:
    model = Model(DEBUG)
    level = Level(TOKENS, ac_policy="offload_attention")
    expected = model.loss_and_grads(level)
    model.forward(level)
    assert _worst(model.loss_and_grads(level), expected) == 0
    with torch.no_grad():
        model.forward(level)
    assert not model.state.host._blocks


def _region_case(dtype: torch.dtype, chunk: int) -> dict[str, Tensor]:
    """Return the gradients of a feed-forward network over 512 tokens, in chunks."""
    generator = torch.Generator().manual_seed(0)
    block = next(iter(Decoder(DEBUG).blocks()))
    for parameter in block.mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    x_TH = torch.randn(512, DEBUG.hidden_size, generator=generator)
    weight_TH = torch.randn(512, DEBUG.hidden_size, generator=generator)
    block.mlp.to(dtype)
    x_TH = x_TH.to(dtype).requires_grad_()
    y_TH = in_chunks(block.mlp, [block.mlp], chunk, [x_TH])
    (y_TH * weight_TH.to(dtype)).sum().backward()
    return {"x": x_TH.grad.double(), **{k: p.grad.double() for k, p in block.mlp.named_parameters()}}  # type: ignore[union-attr]


def test_gradients_of_chunks_are_summed_beyond_the_precision_of_bfloat16() -> None:
    exact = _region_case(torch.float64, 512)
    assert _worst(_region_case(torch.float64, 100), exact) < 1e-14
    whole, chunks = (_region_case(torch.bfloat16, size) for size in (512, 4))
    for name in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"):
        error, of_whole = ((grads[name] - exact[name]).norm() for grads in (chunks, whole))
        # A sum of 128 chunks in bfloat16 would be about 5 times as wrong.
        assert error < 1.2 * of_whole


def _saved_bytes(run: Callable[[], Tensor]) -> int:
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    result.sum().backward()
    return sum(sizes.values())


def test_a_region_in_chunks_keeps_its_inputs_alone() -> None:
    block = next(iter(Decoder(DEBUG).blocks()))
    x_TH = torch.randn(512, DEBUG.hidden_size, requires_grad=True)
    assert _saved_bytes(lambda: in_chunks(block.mlp, [block.mlp], 64, [x_TH])) == x_TH.nbytes
    assert _saved_bytes(lambda: block.mlp(x_TH)) > 5 * x_TH.nbytes


def _check(args: ModelArgs, words: Sequence[str] = (), **fields: Any) -> None:
    """Check a run of one level on two ranks."""
    config = load_config(["--data.train_files=x", *words])
    config.levels = [Level(128, **fields)]
    check(config, 2, torch.device("cpu"), args)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offload_layers": 2, "ac_policy": "full"}, "offload_layers=2 has no effect"),
        ({"mlp_chunk_tokens": -1}, "mlp_chunk_tokens=-1"),
        ({"attention_head_groups": 0}, "attention_head_groups=0"),
        # 4 query and 2 kv heads over two ranks.
        ({"attention_head_groups": 4, "cp_degree": 2}, r"attention_head_groups=4 .* use 1, 2$"),
        ({"attention_head_groups": 3}, r"attention_head_groups=3 .* use 1, 2, 4$"),
        ({"ac_layers": 5, "ac_policy": "full"}, "ac_layers=5 exceeds the 4 layers"),
        ({"offload_layers": 3, "ac_layers": 2, "ac_policy": "offload"}, "offload_layers=3 exceeds the 2 layers"),
    ],
)
def test_memory_plan_that_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _check(DEBUG, **fields)
