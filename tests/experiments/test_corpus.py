"""The embedded corpus: conversations about a small pinned module, and the shape of the real one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from hbp_titan.experiments import corpus
from hbp_titan.experiments.corpus import build_stdlib_corpus, ensure_stdlib_corpus, module_conversations

MODULE = '''\
"""Counts things."""

LIMIT = 3


class Counter(dict):
    """A dict of counts.

    More about it.
    """

    @property
    def total(self):
        """Sum of all
        counts."""
        return sum(self.values())


def add(counter, key, *, by: int = 1) -> None:
    """Add to one count."""
    counter[key] = counter.get(key, 0) + by


def helper(x): return x
'''
SOURCE_OF_ADD = '''\
```python
def add(counter, key, *, by: int = 1) -> None:
    """Add to one count."""
    counter[key] = counter.get(key, 0) + by
```'''
OUTLINE = """\
- class `Counter`: A dict of counts.
  - method `Counter.total`: Sum of all counts.
- function `add`: Add to one count.
- function `helper`"""


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(module_conversations("count.things", MODULE, Random("0")))


def answers(rows: list[dict[str, Any]], kind: str) -> list[str]:
    return [message["content"] for row in rows if row["source"] == kind for message in row["messages"][1::2]]


def test_answers_equal_the_source(rows: list[dict[str, Any]]) -> None:
    assert answers(rows, "module_purpose") == ["Counts things."]
    assert answers(rows, "docstring") == [
        "A dict of counts.\n\nMore about it.",
        "Sum of all\ncounts.",
        "Add to one count.",
    ]
    assert answers(rows, "signature") == [
        "```python\nclass Counter(dict):\n```",
        "```python\ndef total(self):\n```",
        "```python\ndef add(counter, key, *, by: int=1) -> None:\n```",  # as ast prints it
    ]
    assert answers(rows, "source")[2] == SOURCE_OF_ADD
    assert answers(rows, "source")[1].startswith("```python\n@property\ndef total(self):\n    ")
    assert answers(rows, "implement")[2] == SOURCE_OF_ADD
    assert answers(rows, "write_docstring") == answers(rows, "docstring")
    assert answers(rows, "outline") == [OUTLINE]
    assert answers(rows, "write_module") == [f"```python\n{MODULE.rstrip()}\n```"]


def test_questions_do_not_contain_their_answers(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        question, answer = (message["content"] for message in row["messages"][:2])
        if row["source"] == "write_docstring":
            assert answer not in question
        if row["source"] in ("implement", "write_module"):
            assert "counter.get(key, 0) + by" not in question


def small_library(folder: Path) -> Path:
    for index in range(40):
        file = folder / "pack" / f"m{index}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(MODULE.replace("Counter", f"Counter{index}"))
    (folder / "pack" / "__init__.py").write_text(MODULE)
    for skipped in ("test/test_x.py", "site-packages/p.py", "pack/tests/t.py", "config-3/x.py"):
        (folder / skipped).parent.mkdir(parents=True, exist_ok=True)
        (folder / skipped).write_text(MODULE)
    (folder / "python2.py").write_text("print 'old'\n")
    return folder


def test_same_library_and_seed_give_the_same_bytes_of_two_disjoint_parts(tmp_path: Path) -> None:
    library = small_library(tmp_path / "lib")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_stdlib_corpus(tmp_path / name, seed, library)
    names = ["train.jsonl", "validation.jsonl", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / names[0]).read_bytes() != (tmp_path / "c" / names[0]).read_bytes()
    # Training and validation share no module.
    train, validation = (
        {json.loads(line)["module"] for line in (tmp_path / "a" / name).read_text().splitlines()} for name in names[:2]
    )
    assert validation
    assert not train & validation
    assert train | validation == {"pack", *(f"pack.m{index}" for index in range(40))}


def test_failed_build_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = small_library(tmp_path / "lib")
    with pytest.raises(ValueError, match="no Python module found"):
        build_stdlib_corpus(tmp_path / "out", 0, tmp_path / "nothing")
    monkeypatch.setattr(corpus, "train_tokenizer", None)
    with pytest.raises(TypeError):
        build_stdlib_corpus(tmp_path / "out", 0, library)
    assert [path.name for path in tmp_path.iterdir()] == ["lib"]


def test_folder_with_other_files_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"validation\.jsonl"):
        ensure_stdlib_corpus(tmp_path)
    assert (tmp_path / "train.jsonl").read_text() == "mine"


def test_corpus_has_short_and_long_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Less text for the tokenizer, which is not tested here.
    monkeypatch.setattr(corpus, "TOKENIZER_CHARACTERS", 300_000)
    # Every eighth module, to save time.
    all_modules = corpus._modules
    monkeypatch.setattr(corpus, "_modules", lambda stdlib: itertools.islice(all_modules(stdlib), 0, None, 8))
    folder = tmp_path / "stdlib"
    assert ensure_stdlib_corpus(folder)
    assert not ensure_stdlib_corpus(folder)
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    sizes = sorted(map(len, lines), reverse=True)
    assert len(lines) > 2_500
    assert sizes[len(sizes) // 2] < 1_000
    assert sizes[len(sizes) // 100] > 16_000
    assert sizes[0] > 100_000
    assert sum(sizes[: len(sizes) // 100]) > 0.25 * sum(sizes)
