"""What the tests of data preparation share: a tokenizer of one token a byte, rows, and configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hbp_titan.config import JobConfig, load_config
from hbp_titan.data.prepare import prepare
from hbp_titan.data.token_store import TokenStore
from hbp_titan.data.tokenizer import train_tokenizer
from hbp_titan.errors import exit_on_user_error
from scripts import prepare_data

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_data.py"
# With one token a byte: <|im_start|> "user\n" Q <|im_end|> "\n" <|im_start|> "assistant\n" A <|im_end|> "\n"
PROMPT_TOKENS = 1 + 5 + 1 + 1 + 1 + 10  # around a question of no bytes


def run_script(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of scripts/prepare_data.py, run in this process."""
    capsys.readouterr()
    code = 0
    try:
        exit_on_user_error(lambda: prepare_data.main(list(arguments)))
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, *capsys.readouterr()


def byte_tokenizer(folder: Path) -> Path:
    """A ChatML tokenizer whose tokens are bytes; ids 2 and 3 open and close a turn."""
    train_tokenizer(["text"], folder, vocab_size=260)
    return folder


def line(question: str, answer: str | None, **more: Any) -> str:
    """A row of one question and, unless None, its answer."""
    turns = [{"role": "user", "content": question}]
    turns += [] if answer is None else [{"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns, **more}) + "\n"


def write(file: Path, *lines: str) -> Path:
    """`file` with these lines."""
    file.write_text("".join(lines))
    return file


def many(count: int) -> list[str]:
    """Rows of different lengths from three sources."""
    return [line("q" * (index % 7), "a" * (index % 11 + 1), source=f"s{index % 3}") for index in range(count)]


def job(folder: Path, sources: str = "", levels: str = "4096:1", **data: Any) -> JobConfig:
    """A configuration that keeps its stores in `folder`/cache; sources: TOML blocks; data: keys of [data]."""
    settings = {"cache_folder": str(folder / "cache"), "num_proc": 1, **data}
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    if not (folder / "tokenizer").is_dir():
        byte_tokenizer(folder / "tokenizer")
    text = f'[model]\ntokenizer_path = "{folder}/tokenizer"\n[data]\n' + "\n".join(lines) + "\n" + sources
    (folder / "job.toml").write_text(text)
    return load_config(["--job.config_file", str(folder / "job.toml"), "--levels", levels])


def prepared(config: JobConfig) -> TokenStore:
    """The training store of `config`."""
    return TokenStore.open(prepare(config, progress=False)[0])
