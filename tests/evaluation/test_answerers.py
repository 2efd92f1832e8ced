"""The two answerers: a folder on this machine, and a server of which a stub on localhost stands in."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from hbp_titan.evaluation.generate import LocalAnswerer, ServerAnswerer
from hbp_titan.evaluation.needles import Prompter, stop_ids
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.hf import save_hf_folder
from tests.data.preparing import byte_tokenizer
from tests.models.test_decoder import tiny_args


class StubServer(ThreadingHTTPServer):
    request_queue_size = 64  # more than the requests that come at once


class Stub(BaseHTTPRequestHandler):
    """Says of each prompt how long it is and how many tokens may follow."""

    asked: list[dict[str, Any]]
    replies: dict[str, tuple[int, bytes]]

    def do_GET(self) -> None:
        self._reply(json.dumps({"data": [{"id": "first"}, {"id": "second"}]}))

    def do_POST(self) -> None:
        values = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(values)
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
def test_a_server_gets_the_tokens_greedily_and_its_answers_come_in_order(server: str, suffix: str) -> None:
    answerer = ServerAnswerer(server + suffix)
    prompts = [[7] * length for length in range(1, 30)]
    assert answerer(prompts, list(range(29))) == [f"{length} {length - 1}" for length in range(1, 30)]
    (asked,) = [values for values in Stub.asked if len(values["prompt"]) == 3]
    assert asked == {"model": "first", "prompt": [7, 7, 7], "max_tokens": 2, "temperature": 0.0}


def test_the_servers_model_may_be_named(server: str) -> None:
    ServerAnswerer(server, "second")([[1]], [1])
    assert Stub.asked[0]["model"] == "second"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((404, b"no such model"), r"/v1/completions: the server refuses with status 404: no such model"),
        ((200, b"<html>"), r"/v1/completions: the server's answer is not JSON"),
        (
            (200, b'{"choices": []}'),
            r"/v1/completions: the server's answer lacks choices\.0\.text: \{'choices': \[\]\}",
        ),
    ],
)
def test_a_server_that_does_not_answer_as_it_should_is_named(
    server: str, reply: tuple[int, bytes], message: str
) -> None:
    Stub.replies["/v1/completions"] = reply
    with pytest.raises(ValueError, match=message):
        ServerAnswerer(server)([[1, 2]], [4])


def test_no_server_and_no_address_are_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9/v1/models: no answer from the server: .*refused"):
        ServerAnswerer("http://127.0.0.1:9")
    with pytest.raises(ValueError, match="--server localhost:8000: an address begins with http"):
        ServerAnswerer("localhost:8000")


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


def test_a_folder_answers_as_text_of_at_most_the_limit(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    prompter = Prompter(folder)
    answerer = LocalAnswerer(folder, prompter, torch.device("cpu"))
    short, long = answerer([prompter.ids("Hello"), prompter.ids("Hello")], [2, 6])
    assert long.startswith(short.rstrip("\ufffd"))
    assert len(long) <= 6


def test_what_ends_an_answer_is_the_folders_own_or_else_the_tokenizers(tmp_path: Path) -> None:
    folder = exported(tmp_path, eos_token_id=[7, 9])
    assert stop_ids(folder) == [7, 9]
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert stop_ids(folder) == [5]
    (folder / "generation_config.json").write_text("{}")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"eos_token_id"', '"was"'))
    assert stop_ids(folder) == [3]  # <|im_end|>
