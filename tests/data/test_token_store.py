"""The token store: its content by hand, its fingerprint, what is left out, and that it appears whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbp_titan.data import token_store, tokenize_rows
from hbp_titan.data.token_store import TokenStore, build_token_store, check_fits
from hbp_titan.data.tokenizer import train_tokenizer

# With one token a byte: <|im_start|> "user\n" Q <|im_end|> "\n" <|im_start|> "assistant\n" A <|im_end|> "\n"
PROMPT_TOKENS = 1 + 5 + 1 + 1 + 1 + 10  # around a question of no bytes


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["text"], folder, vocab_size=260)
    return folder


def line(question: str, answer: str | None, **more: Any) -> str:
    turns = [{"role": "user", "content": question}]
    turns += [] if answer is None else [{"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns, **more}) + "\n"


def write(file: Path, *lines: str) -> Path:
    file.write_text("".join(lines))
    return file


def many(count: int) -> list[str]:
    return [line("q" * (index % 7), "a" * (index % 11 + 1), source=f"s{index % 3}") for index in range(count)]


def test_the_store_holds_what_can_be_counted_by_hand(tmp_path: Path, tokenizer_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", line("Hi", "Yo"), "\n", line("", "abc", source="named"))
    second = write(tmp_path / "b.jsonl", line("Hello", "x"))
    store = TokenStore.open(build_token_store([first, second], tokenizer_path, tmp_path / "cache", num_proc=1))
    assert len(store) == 3
    assert store.lengths.tolist() == [PROMPT_TOKENS + 2 + 4, PROMPT_TOKENS + 5, PROMPT_TOKENS + 5 + 3]
    assert store.loss_tokens.tolist() == [3, 4, 2]
    assert [store.source_names[source] for source in store.sources] == ["a", "named", "b"]
    assert [store.where(index) for index in range(3)] == [f"{first}:1", f"{first}:3", f"{second}:1"]
    tokens, loss_mask = store.sample(1)
    assert (tokens.dtype, loss_mask.dtype) == (np.uint32, np.bool_)
    assert loss_mask.tolist() == [False] * PROMPT_TOKENS + [True] * 4 + [False]
    assert tokens[[0, 6, 8, 22]].tolist() == [2, 3, 2, 3]
    assert store.meta["vocab_size"] == 260
    assert (store.meta["pad_token_id"], store.meta["eos_token_id"]) == (0, 3)
    assert (store.meta["rows"], store.meta["sampled_out"], store.excluded()) == (3, 0, [])


def test_samples_are_read_only_views_of_the_file(tmp_path: Path, tokenizer_path: Path) -> None:
    store = TokenStore.open(build_token_store([write(tmp_path / "a.jsonl", *many(3))], tokenizer_path, tmp_path / "c"))
    assert np.shares_memory(store.sample(0)[0], store._tokens)
    assert not store.sample(0)[0].flags.writeable
    assert not store.sample(2)[1].flags.writeable


def test_loss_tokens_count_positions_after_the_shift(tmp_path: Path, tokenizer_path: Path) -> None:
    # Only a template that opens with the answer trains position 0, which nothing predicts.
    folder = tmp_path / "tokenizer"
    train_tokenizer(["text"], folder, vocab_size=260)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    file = write(tmp_path / "a.jsonl", line("", "abcd"), line("", "x"))
    store = TokenStore.open(build_token_store([file], folder, tmp_path / "cache"))
    assert store.loss_tokens.tolist() == [3]
    assert store.excluded() == [{"file": str(file), "line": 2, "reason": "no trained token", "tokens": 1}]


def test_the_number_of_processes_does_not_change_a_byte(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize_rows, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(tokenize_rows, "BYTES_PER_PROCESS", 1000)
    file = write(tmp_path / "a.jsonl", *many(60), line("no answer", None), *many(30))
    folders = [build_token_store([file], tokenizer_path, tmp_path / str(n), num_proc=n) for n in (1, 2)]
    names = sorted(path.name for path in folders[0].iterdir())
    assert len(names) == 11
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    assert TokenStore.open(folders[1]).meta["num_samples"] == 90


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_malformed_row_is_named_whatever_process_reads_it(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, num_proc: int
) -> None:
    monkeypatch.setattr(tokenize_rows, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(tokenize_rows, "BYTES_PER_PROCESS", 1000)
    file = write(tmp_path / "a.jsonl", *many(40), "{}\n", *many(3), "not json\n")
    with pytest.raises(ValueError, match=r"a.jsonl:41: no `messages` list"):
        build_token_store([file], tokenizer_path, tmp_path / "cache", num_proc=num_proc)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["file_digests.json"]


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    train_tokenizer(["text"], tmp_path, vocab_size=260)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system turn') }}")
    with pytest.raises(ValueError, match=r"a.jsonl:1: the chat template refuses the conversation: no system turn"):
        build_token_store([write(tmp_path / "a.jsonl", *many(1))], tmp_path, tmp_path / "cache")


def test_unchanged_inputs_find_the_store_again_without_reading_them(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.jsonl", *many(5))
    folder = build_token_store([file], tokenizer_path, tmp_path / "cache")
    monkeypatch.setattr(token_store, "tokenize", None)
    monkeypatch.setattr(token_store, "index_rows", None)
    monkeypatch.setattr("hbp_titan.data.fingerprint._digest", None)
    assert build_token_store([file], tokenizer_path, tmp_path / "cache", num_proc=2) == folder


def test_each_input_that_shapes_the_tokens_changes_the_fingerprint(tmp_path: Path) -> None:
    train_tokenizer(["text"], tmp_path, vocab_size=260)
    file = write(tmp_path / "a.jsonl", *many(8))

    def build(**settings: int) -> str:
        return TokenStore.open(build_token_store([file], tmp_path, tmp_path / "cache", **settings)).fingerprint

    seen = [build(), build(max_samples=3), build(max_samples=3, seed=1), build(max_tokens=30)]
    write(file, *many(8)[::-1])
    seen.append(build())
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    seen.append(build())
    assert len(set(seen)) == 6
    write(file, *many(8))
    (tmp_path / "chat_template.jinja").unlink()
    assert build() == seen[0]


def test_a_share_is_random_by_seed_in_order_and_only_counted(tmp_path: Path, tokenizer_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", *many(50)), write(tmp_path / "b.jsonl", *many(50))]

    def rows(**settings: int) -> list[str]:
        store = TokenStore.open(build_token_store(files, tokenizer_path, tmp_path / "cache", **settings))
        assert (store.meta["rows"], store.meta["sampled_out"], store.meta["excluded"]) == (100, 100 - len(store), {})
        return [store.where(index) for index in range(len(store))]

    share, whole = rows(max_samples=20), rows()
    assert len(share) == 20
    assert share == [row for row in whole if row in share]
    assert {Path(row).name[0] for row in share} == {"a", "b"}
    assert share != rows(max_samples=20, seed=1)
    assert rows(max_samples=1000) == whole


def test_rows_left_out_are_listed_with_their_reason(tmp_path: Path, tokenizer_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", line("q", None), line("", "a"), '{"messages": []}\n', line("", "a" * 50))
    store = TokenStore.open(build_token_store([file], tokenizer_path, tmp_path / "cache", max_tokens=60))
    assert store.lengths.tolist() == [PROMPT_TOKENS + 3]
    assert store.meta["excluded"] == {"no assistant turn": 2, "over max_tokens": 1}
    assert [(row["line"], row["reason"], row["tokens"]) for row in store.excluded()] == [
        (1, "no assistant turn", 0),
        (3, "no assistant turn", 0),
        (4, "over max_tokens", PROMPT_TOKENS + 52),
    ]


def test_no_sample_left_is_an_error(tmp_path: Path, tokenizer_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", line("q", None))
    with pytest.raises(ValueError, match=r"a.jsonl: no sample is left to train on \(1 no assistant turn\)"):
        build_token_store([file], tokenizer_path, tmp_path / "cache")


def test_a_sample_longer_than_the_largest_level_is_named(tmp_path: Path, tokenizer_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", line("", "a"), line("", "a" * 50), line("", "a" * 49))
    store = TokenStore.open(build_token_store([file], tokenizer_path, tmp_path / "cache"))
    check_fits(store, PROMPT_TOKENS + 52)
    with pytest.raises(
        ValueError, match=r"a.jsonl:2: a sample of 71 tokens .* levels.max_tokens = 69 \(2 of 3 samples"
    ):
        check_fits(store, 69)


KILLED = """
import os, sys
from pathlib import Path
from hbp_titan.data import token_store
token_store._StoreWriter.finish = lambda self, meta: os._exit(9)
token_store.build_token_store([sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]), num_proc=1)
"""


def test_a_killed_process_leaves_no_store_and_does_not_hinder_the_next(tmp_path: Path, tokenizer_path: Path) -> None:
    file, cache = write(tmp_path / "a.jsonl", *many(5)), tmp_path / "cache"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", KILLED, file, tokenizer_path, cache], env=environment, check=False)
    assert killed.returncode == 9
    left = [path.name for path in cache.iterdir() if path.is_dir()]
    assert len(left) == 1
    assert left[0].startswith(".")
    assert len(TokenStore.open(build_token_store([file], tokenizer_path, cache))) == 5


def test_of_two_processes_that_make_the_same_store_both_find_it(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = write(tmp_path / "a.jsonl", *many(5)), tmp_path / "cache"
    publish = token_store._publish

    def rival_first(temporary: Path, folder: Path) -> None:
        monkeypatch.setattr(token_store, "_publish", publish)
        build_token_store([file], tokenizer_path, cache)
        publish(temporary, folder)

    monkeypatch.setattr(token_store, "_publish", rival_first)
    folder = build_token_store([file], tokenizer_path, cache)
    assert len(TokenStore.open(folder)) == 5
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]


def test_a_missing_foreign_or_damaged_store_is_named(tmp_path: Path, tokenizer_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing: no token store here"):
        TokenStore.open(tmp_path / "nothing")
    folder = build_token_store([write(tmp_path / "a.jsonl", *many(5))], tokenizer_path, tmp_path / "cache")
    os.truncate(folder / "tokens.bin", 8)
    with pytest.raises(ValueError, match=r"tokens.bin: 2 tokens where meta.json says \d+: the store is damaged"):
        TokenStore.open(folder)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "format_version": 0}))
    with pytest.raises(ValueError, match=r"format 0 is not this version's 2"):
        TokenStore.open(folder)
