"""The embedded corpus from a small library whose questions and answers can be read here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hbp_titan.data.corpus import build_stdlib_corpus, ensure_stdlib_corpus

MODULE = '''"""Adds numbers. Nothing else."""


def add(a: int, b: int = 1) -> int:
    """Return the sum of a and b."""
    total = a + b
    return total
'''


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    folder = tmp_path / "lib"
    for number in range(30):
        (folder / "pkg").mkdir(parents=True, exist_ok=True)
        (folder / "pkg" / f"m{number}.py").write_text(MODULE.replace("add", f"add_{number}"))
    (folder / "broken.py").write_text("def (:\n")
    (folder / "test").mkdir()
    (folder / "test" / "hidden.py").write_text(MODULE)
    return folder


def _rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_questions_quote_the_source_and_modules_are_split(stdlib: Path, tmp_path: Path) -> None:
    build_stdlib_corpus(tmp_path / "out", stdlib=stdlib)
    train, validation = (_rows(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "validation"))
    texts = {name: json.dumps(rows) for name, rows in (("train", train), ("validation", validation))}
    for number in range(30):
        # A function appears on one side only.
        assert (f"add_{number}(" in texts["train"]) != (f"add_{number}(" in texts["validation"])
    assert "hidden" not in texts["train"] + texts["validation"]
    signatures = [row for row in train if row["source"] == "signature"]
    answers = [row["messages"][-1]["content"] for row in signatures]  # type: ignore[index]
    assert any("(a: int, b: int = 1) -> int" in answer or "(a: int, b: int=1) -> int" in answer for answer in answers)
    kinds = {row["source"] for row in train}
    assert {"signature", "docstring", "source", "implement", "write_module", "module_questions"} <= kinds


def test_same_library_and_seed_give_the_same_bytes(stdlib: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_stdlib_corpus(tmp_path / name, stdlib=stdlib)
    for file in ("train.jsonl", "validation.jsonl", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_folder_that_is_there_is_kept_and_half_a_one_is_refused(stdlib: Path, tmp_path: Path) -> None:
    build_stdlib_corpus(tmp_path / "out", stdlib=stdlib)
    assert ensure_stdlib_corpus(tmp_path / "out") is False
    (tmp_path / "out" / "validation.jsonl").unlink()
    with pytest.raises(ValueError, match=r"is not empty and lacks validation\.jsonl"):
        ensure_stdlib_corpus(tmp_path / "out")


def test_folder_without_modules_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no Python module found"):
        build_stdlib_corpus(tmp_path / "out", stdlib=tmp_path / "empty")
    assert not (tmp_path / "out").exists()
