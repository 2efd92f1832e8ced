"""Programs that others use on an exported folder, for real: lm_eval with local tasks, and transformers' server.

Both are optional: python -m pip install lm_eval 'transformers[serving]'. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from hbp_titan.data.tokenizer import read_tokenizer_folder
from hbp_titan.evaluation.generate import load_model
from hbp_titan.evaluation.needles import PromptFormatter
from hbp_titan.models.documents import pack_documents
from hbp_titan.testing.local_ranks import run_distributed
from scripts import evaluate, generate
from tests.runs import DEADLINE, train_until
from tests.tiny_run import write_tiny_run

pytestmark = pytest.mark.slow
DOCS = [
    {"question": "level pack", "choices": ["rank token", "mesh"], "answer": 0, "text": "rank token"},
    {"question": "cost mesh head", "choices": ["short", "long plan", "loss"], "answer": 2, "text": "plan"},
]
# JSON is YAML as well.
TASK = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
CHOICE = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
TEXT = {
    "output_type": "generate_until",
    "doc_to_target": "text",
    "generation_kwargs": {"until": ["never"], "max_gen_toks": 8, "do_sample": False},
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a short run."""
    folder = tmp_path_factory.mktemp("exported")
    run_distributed(train_until, 1, [*write_tiny_run(folder, levels="512:1"), "--training.epochs=15"])
    return folder / "run" / "hf"


def log_likelihood(folder: Path, text: str, answer: str) -> float:
    """As lm_eval takes it: the white space that ends a prompt counts as part of the answer."""
    tokenizer = read_tokenizer_folder(folder).load()
    prompt, ids = (tokenizer.encode(part, add_special_tokens=False).ids for part in (text.rstrip(), text + answer))
    with torch.no_grad():
        logits_TV = load_model(folder, torch.device("cpu"))(
            torch.tensor(ids), torch.arange(len(ids)), pack_documents([len(ids)])
        )
    tokens = torch.tensor(ids[len(prompt) :])
    chosen = logits_TV[len(prompt) - 1 : -1].log_softmax(-1).gather(1, tokens[:, None])
    return float(chosen.sum())


@pytest.mark.skipif(
    find_spec("lm_eval") is None,
    reason="needs lm_eval; run: .venv/bin/pip install lm_eval && scripts/run_tests.sh -m slow tests/evaluation",
)
def test_lm_eval_gets_our_likelihoods_and_answers(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, own in (("choice", CHOICE), ("text", TEXT)):
        task = {"task": f"own_{name}", **TASK, **own, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))
    (tmp_path / "tasks.toml").write_text(
        "[[runs]]\nname = 'own'\ntasks = ['own_choice', 'own_text']\nmodel_args = 'dtype=float32'\nbatch_size = '2'\n"
        f"num_fewshot = 0\narguments = ['--include_path', '{tmp_path}', '--device', 'cpu', '--log_samples']\n"
    )
    evaluate.main([str(hf), "--tasks", str(tmp_path / "tasks.toml"), "--out", str(tmp_path / "out")])
    assert "|own_choice|" in capfd.readouterr().out.replace(" ", "")
    [choices], [texts] = (list((tmp_path / "out").rglob(f"samples_own_{name}_*")) for name in ("choice", "text"))
    for line in map(json.loads, choices.open()):
        found = [float(response[0][0]) for response in line["resps"]]
        prompt = line["arguments"]["gen_args_0"]["arg_0"]
        assert prompt.endswith("<|im_start|>assistant\n")
        expected = [log_likelihood(hf, prompt, choice) for choice in line["doc"]["choices"]]
        assert found == pytest.approx(expected, rel=1e-4)
    answers = generate.answer(hf, [str(doc["question"]) for doc in DOCS], 8)
    assert [line["resps"][0][0] for line in map(json.loads, texts.open())] == answers
    assert all(answers)


# transformers starts its server only where all of them are installed.
MISSING = [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]
serving = pytest.mark.skipif(
    bool(MISSING),
    reason=f"needs {MISSING}; run: .venv/bin/pip install 'transformers[serving]' && "
    "scripts/run_tests.sh -m slow tests/evaluation",
)


@pytest.fixture(scope="module")
def server(hf: Path) -> Iterator[str]:
    """The address of `transformers serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", str(hf), "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    log = hf.parent / "server.log"
    with log.open("w") as out:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", *words], env=environment, stdout=out, stderr=out
        )
    try:
        deadline = time.monotonic() + DEADLINE
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                    break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _needles(hf: Path, out: Path, *options: str) -> list[str]:
    words = ["--needles", "--lengths", "900", "--needle_tasks", "niah_single,variable_tracking", "--depths", "2"]
    evaluate.main([str(hf), "--out", str(out), *words, *options])
    return [entry["answer"] for entry in json.loads((out / "needles.json").read_text())["answers"]]


@serving
def test_needles_answered_by_transformers_serve_are_the_local_ones(tmp_path: Path, hf: Path, server: str) -> None:
    local = _needles(hf, tmp_path / "local")
    assert _needles(hf, tmp_path / "server", "--server", server) == local
    assert len({*local, ""}) > 2


@serving
def test_chat_with_transformers_serve_gives_the_answers_of_generate(hf: Path, server: str) -> None:
    questions = [*(str(doc["question"]) for doc in DOCS), "token"]
    replies = []
    for question in questions:
        body: dict[str, Any] = {"model": str(hf), "max_tokens": 24, "temperature": 0.0}
        body["messages"] = [{"role": "user", "content": question}]
        request = urllib.request.Request(
            f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=DEADLINE) as reply:
            replies.append(json.load(reply))
    answers = [reply["choices"][0]["message"]["content"] for reply in replies]
    assert answers == generate.answer(hf, questions, 24)
    assert all(answers)
    formatter = PromptFormatter(hf)
    assert [reply["usage"]["prompt_tokens"] for reply in replies] == [len(formatter.ids(text)) for text in questions]
    assert {reply["choices"][0]["finish_reason"] for reply in replies} == {"stop"}
