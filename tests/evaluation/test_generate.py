"""Greedy generation: token by token against transformers' generate; batches; folders and servers as backends."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hbp_titan.evaluation.generate import (
    CachedAttention,
    Generator,
    LocalBackend,
    ServerBackend,
    batches_by_length,
    load_model,
)
from hbp_titan.evaluation.needles import PromptFormatter, stop_ids
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.documents import pack_documents
from hbp_titan.models.hf_export import save_hf_folder
from tests.data.preparing import byte_tokenizer
from tests.models import deepseek_tiny
from tests.models.families import TINY
from tests.models.test_decoder import build_pair, tiny_args

LENGTHS = (1, 7, 40, 23, 100)
NEW_TOKENS = 24


def random_prompts(vocab_size: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def hf_greedy(model: Any, prompt: list[int], eos: list[int] | None, limit: int = NEW_TOKENS) -> list[int]:
    """transformers, one prompt at a time: it never sees a batch. The token that ends the answer is cut off."""
    ids = torch.tensor([prompt])
    settings = transformers.GenerationConfig(
        max_new_tokens=limit, do_sample=False, eos_token_id=eos, pad_token_id=0, use_cache=True
    )
    with torch.no_grad():
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0]
    new = answer[len(prompt) :].tolist()
    return new[:-1] if eos and new[-1] in eos else new


# (query heads, key/value heads, seed); with these seeds the five answers differ and do not repeat one token.
LAYOUTS = {"llama": (6, 2, 0), "qwen2": (3, 1, 2), "qwen3": (4, 2, 1), "deepseek_v2": (3, 3, 2), "windows": (4, 2, 1)}


def pair_of(family: str) -> tuple[Decoder, nn.Module]:
    heads, kv_heads, seed = LAYOUTS[family]
    if family == "deepseek_v2":
        model = deepseek_tiny.random_model(deepseek_tiny.tiny_args(heads), seed)
        return model, deepseek_tiny.hf_model(model)
    windows = {"layer_types": ("sliding_attention", "full_attention", "sliding_attention"), "sliding_window": 5}
    changes = windows if family == "windows" else {}
    return build_pair(tiny_args("qwen3" if changes else family, heads, kv_heads, tied=False, **changes), seed)


@pytest.mark.parametrize("family", LAYOUTS)
def test_answers_equal_those_of_transformers(family: str) -> None:
    ours, theirs = pair_of(family)
    kernels = [block.inner_attention for block in ours.blocks()]
    prompts = random_prompts(ours.args.vocab_size)
    expected = [hf_greedy(theirs, prompt, None) for prompt in prompts]
    assert len({tuple(answer) for answer in expected}) == len(LENGTHS)
    assert Generator(ours, ()).answers(prompts, [NEW_TOKENS] * len(prompts)) == expected
    # Tokens within the answers end them there; the other rows of the batch continue.
    eos = [expected[0][3], expected[3][10]]
    stopped = [hf_greedy(theirs, prompt, eos) for prompt in prompts]
    assert min(map(len, stopped)) < NEW_TOKENS
    assert Generator(ours, eos).answers(prompts, [NEW_TOKENS] * len(prompts)) == stopped
    assert [block.inner_attention for block in ours.blocks()] == kernels
    rows = ours.args.vocab_size
    with pytest.raises(ValueError, match=f"prompt 2 has the token id {rows}"):
        Generator(ours, ()).answers([[rows - 1], [1, rows]], [1, 1])


@pytest.mark.parametrize("family", TINY)
def test_first_tokens_of_every_family_equal_those_of_transformers(family: str) -> None:
    ours, theirs = build_pair(TINY[family], 0)
    # Longer than the windows.
    prompts = random_prompts(ours.args.vocab_size)
    assert Generator(ours, ()).answers(prompts, [8] * len(prompts)) == [hf_greedy(theirs, p, None, 8) for p in prompts]


def test_answers_do_not_depend_on_batches_and_limits() -> None:
    ours, _ = pair_of("llama")
    prompts = random_prompts(ours.args.vocab_size, seed=1)
    whole = Generator(ours, ()).answers(prompts, [12] * 5)
    limits = [0, 1, 12, 5, 3]
    for cache_tokens in (1, 60, 10_000):
        found = Generator(ours, (), cache_tokens).answers(prompts, limits)
        assert found == [answer[:limit] for answer, limit in zip(whole, limits, strict=True)]
    with pytest.raises(ValueError, match="prompt 2"):
        Generator(ours, ()).answers([[1], []], [1, 1])


def test_cache_without_the_first_token_changes_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair_of("llama")
    prompts = random_prompts(ours.args.vocab_size)
    stored = CachedAttention._stored

    def without_first(self: CachedAttention, x_TKD: torch.Tensor) -> torch.Tensor:
        cache = stored(self, x_TKD)
        cache[:, :, 0] = 0
        return cache

    monkeypatch.setattr(CachedAttention, "_stored", without_first)
    expected = [hf_greedy(theirs, prompt, None) for prompt in prompts]
    assert Generator(ours, ()).answers(prompts, [NEW_TOKENS] * len(prompts)) != expected


def test_batches_stay_within_the_limit_longest_first() -> None:
    assert batches_by_length([10, 100, 9, 50, 49], 100) == [[1], [3, 4], [0, 2]]
    assert batches_by_length([500], 100) == [[0]]
    assert batches_by_length([], 100) == []


@pytest.mark.parametrize("tied", [False, True])
def test_loaded_folder_has_the_exported_weights(tied: bool, tmp_path: Path) -> None:
    args = tiny_args("llama", 3, 1, tied=tied)
    model = Decoder(args)
    model.init_weights(0)
    save_hf_folder(args, model.named_parameters(), tmp_path / "hf", dtype=torch.float32)
    loaded = load_model(tmp_path / "hf", torch.device("cpu"))
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.gpu
def test_cached_answers_equal_uncached_ones_on_gpu() -> None:
    args = tiny_args("llama", 6, 2, tied=False, hidden_size=96, head_dim=16, num_layers=2)
    model = Decoder(args)
    model.init_weights(0)
    model = model.to("cuda", torch.bfloat16).eval()
    prompt, answer = list(range(1, 40)), []
    for _ in range(4):
        ids = torch.tensor(prompt + answer, device="cuda")
        documents = pack_documents([len(ids)], device=ids.device)
        with torch.no_grad():
            answer.append(int(model(ids, torch.arange(len(ids), device="cuda"), documents)[-1].argmax()))
    assert Generator(model, ()).answers([prompt], [4]) == [answer]


class StubServer(ThreadingHTTPServer):
    request_queue_size = 64  # more than PARALLEL_REQUESTS


class Stub(BaseHTTPRequestHandler):
    """Answers each prompt with its length and limit."""

    asked: list[dict[str, Any]]
    replies: dict[str, tuple[int, bytes]]
    refuses_ids = False

    def do_GET(self) -> None:
        self._reply(json.dumps({"data": [{"id": "first"}, {"id": "second"}]}))

    def do_POST(self) -> None:
        values = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(values)
        if self.refuses_ids and not isinstance(values["prompt"], str):
            self.replies[self.path] = (400, b"prompt must be a string")
        elif self.refuses_ids:
            self.replies.pop(self.path, None)
        self._reply(json.dumps({"choices": [{"text": f"{len(values['prompt'])} {values['max_tokens']}"}]}))

    def _reply(self, text: str) -> None:
        status, body = self.replies.get(self.path, (200, text.encode()))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    Stub.asked, Stub.replies = [], {}
    stub = StubServer(("127.0.0.1", 0), Stub)
    thread = threading.Thread(target=stub.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{stub.server_port}"
    stub.shutdown()
    thread.join()
    stub.server_close()


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_server_gets_token_ids_and_answers_keep_their_order(server: str, suffix: str) -> None:
    backend = ServerBackend(server + suffix)
    prompts = [[7] * length for length in range(1, 30)]
    assert backend(prompts, list(range(29))) == [f"{length} {length - 1}" for length in range(1, 30)]
    (asked,) = [values for values in Stub.asked if len(values["prompt"]) == 3]
    assert asked == {"model": "first", "prompt": [7, 7, 7], "max_tokens": 2, "temperature": 0.0}
    ServerBackend(server, "second")([[1]], [1])
    assert Stub.asked[-1]["model"] == "second"


def test_server_that_refuses_token_ids_gets_text(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stub, "refuses_ids", True)
    backend = ServerBackend(server, "m", lambda ids: "x" * len(ids))
    assert backend([[7] * 3], [5]) == ["3 5"]
    assert backend([[7] * 4], [6]) == ["4 6"]
    assert [values["prompt"] for values in Stub.asked] == [[7, 7, 7], "xxx", "xxxx"]
    with pytest.raises(ValueError, match="must be a string"):
        ServerBackend(server, "m")([[7]], [1])


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((404, b"no such model"), "404: no such model"),
        ((200, b"<html>"), "JSON"),
        ((200, b'{"choices": []}'), r"choices\.0\.text"),
    ],
)
def test_wrong_replies_of_a_server_raise(server: str, reply: tuple[int, bytes], message: str) -> None:
    Stub.replies["/v1/completions"] = reply
    with pytest.raises(ValueError, match=message):
        ServerBackend(server)([[1, 2]], [4])


def test_missing_server_and_wrong_address_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(ValueError, match="refused"):
        ServerBackend("http://127.0.0.1:9")
    with pytest.raises(ValueError, match="http://"):
        ServerBackend("localhost:8000")


def exported(folder: Path, **token_ids: Any) -> Path:
    """A tiny random Llama with a byte tokenizer, as a run exports it."""
    byte_tokenizer(folder / "tokenizer")
    args = tiny_args("llama", 3, 1, tied=True, vocab_size=260)
    model = Decoder(args)
    model.init_weights(0)
    parameters = model.named_parameters()
    save_hf_folder(
        args,
        parameters,
        folder / "hf",
        dtype=torch.float32,
        tokenizer_path=folder / "tokenizer",
        token_ids=token_ids,
    )
    return folder / "hf"


def test_folder_answers_with_text_up_to_the_limit(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    formatter = PromptFormatter(folder)
    backend = LocalBackend(folder, formatter, torch.device("cpu"))
    short, long = backend([formatter.ids("Hello"), formatter.ids("Hello")], [2, 6])
    assert long.startswith(short.rstrip("\ufffd"))
    assert len(long) <= 6


def test_stop_ids_are_the_folders_and_the_tokenizers(tmp_path: Path) -> None:
    # The tokenizer's is <|im_end|>, 3.
    folder = exported(tmp_path, eos_token_id=[7, 9])
    assert stop_ids(folder) == [7, 9, 3]
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert stop_ids(folder) == [5, 3]
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert stop_ids(folder) == [3]
    (folder / "generation_config.json").write_text("{}")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"eos_token_id"', '"was"'))
    assert stop_ids(folder) == [3]
