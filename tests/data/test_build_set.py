"""Building stores: content by hand, shards and ranks, limits, mixtures, duplicates, held-out rows, row accounting."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.config import load_config
from hbp_titan.data import build_source
from hbp_titan.data.build_set import draw, epoch_counts, first_of_each, held_out, share_out
from hbp_titan.data.prepare import open_stores, prepare
from hbp_titan.data.store_summary import check_totals, show_samples, summary, unread
from hbp_titan.data.token_store import TokenStore, check_strict
from hbp_titan.errors import UserError, WorkerGroup
from tests.data.preparing import PROMPT_TOKENS, byte_tokenizer, job, line, many, prepared, write
from tests.tiny_run import write_tiny_run


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_source, "SHARD_BYTES", 1000)
    monkeypatch.setattr(build_source, "BYTES_PER_PROCESS", 1000)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of the stores in `folder`."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "digests"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def incomplete(store: TokenStore, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(row[key] for key in keys) for row in store.incomplete_rows()]


def places(store: TokenStore) -> list[str]:
    return [store.where(index) for index in range(len(store))]


# Content.


def test_the_store_has_what_can_be_counted_by_hand(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", line("Hi", "Yo"), "\n", line("", "abc", source="named"))
    second = write(tmp_path / "b.jsonl", line("Hello", "x"))
    store = prepared(job(tmp_path, train_files=[str(first), str(second)]))
    assert store.lengths.tolist() == [PROMPT_TOKENS + 2 + 4, PROMPT_TOKENS + 5, PROMPT_TOKENS + 5 + 3]
    assert store.loss_tokens.tolist() == [3, 4, 2]
    assert [store.source_names[source] for source in store.sources] == ["a", "named", "b"]
    assert places(store) == [f"{first}:1", f"{first}:3", f"{second}:1"]
    tokens, loss_mask = store.sample(1)
    assert (tokens.dtype, loss_mask.dtype) == (np.uint32, np.bool_)
    assert loss_mask.tolist() == [False] * PROMPT_TOKENS + [True] * 4 + [False]
    assert tokens[[0, 6, 8, 22]].tolist() == [2, 3, 2, 3]
    assert (store.meta["vocab_size"], store.meta["pad_token_id"], store.meta["eos_token_id"]) == (260, 0, 3)
    assert incomplete(store, "line") == []
    assert (store.totals()["rows"], store.totals()["trained"]) == (3, 3)


def test_loss_tokens_count_positions_after_the_shift(tmp_path: Path) -> None:
    # Only a template that begins with the answer trains position 0, which nothing predicts.
    template = "{% generation %}{{ messages[1].content }}{% endgeneration %}"
    byte_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    answer = '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "%s"}]}\n'
    store = prepared(job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", answer % "abcd", answer % "x"))]))
    assert store.loss_tokens.tolist() == [3]
    assert incomplete(store, "line", "reason", "tokens") == [(1, "", 4), (2, "no trained token", 1)]


def turns(*exchanges: tuple[int, int]) -> str:
    """A row of questions and answers of so many bytes, after the system prompt "S"."""
    messages = [{"role": "system", "content": "S"}]
    for asked, answered in exchanges:
        messages += [{"role": "user", "content": "q" * asked}, {"role": "assistant", "content": "a" * answered}]
    return json.dumps({"messages": messages}) + "\n"


# <|im_start|> "system\n" S <|im_end|> "\n"; all of an exchange but its contents, with the last line end.
SYSTEM_TOKENS, EXCHANGE_TOKENS = 1 + 7 + 1 + 2, PROMPT_TOKENS + 2


def test_longer_samples_are_split_at_turn_boundaries_and_listed(tmp_path: Path) -> None:
    rows = [turns((3, 3)), turns((10, 20), (5, 5), (9, 90), (4, 4)), turns((0, 100)), line("q", "a")]
    file = write(tmp_path / "a.jsonl", *rows)
    store = prepared(job(tmp_path, train_files=[str(file)], max_length_policy="split", levels="100:1"))
    # The first two exchanges of the second row share a sample, the third is too long, the fourth is alone.
    alone = SYSTEM_TOKENS + EXCHANGE_TOKENS
    lengths = [alone + 6, alone + EXCHANGE_TOKENS + 40, alone + 8, EXCHANGE_TOKENS + 2]
    assert store.lengths.tolist() == lengths
    assert store.loss_tokens.tolist() == [4, 21 + 6, 5, 2]
    assert places(store) == [f"{file}:{number}" for number in (1, 2, 2, 4)]
    assert store.stores[0].samples["part"].tolist() == [0, 0, 1, 0]
    assert incomplete(store, "line", "outcome", "tokens", "samples", "detail") == [
        (2, "split", alone + 3 * EXCHANGE_TOKENS + 147, 2, f"1 exchanges of {alone + 99} tokens fit nowhere"),
        (3, "excluded", alone + 100, 0, "no exchange fits"),
    ]
    totals = store.totals()
    assert (totals["rows"], totals["whole"], totals["split"], totals["samples_made"]) == (4, 2, 1, 4)


def test_longer_samples_are_truncated_around_their_last_answer_and_listed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", turns((3, 3)), turns((200, 20)), turns((5, 200)))
    store = prepared(job(tmp_path, train_files=[str(file)], max_length_policy="truncate", levels="100:1"))
    alone = SYSTEM_TOKENS + EXCHANGE_TOKENS
    assert store.lengths.tolist() == [alone + 6, 100, 100]
    # The whole answer with its end token, or as much of it as fits.
    assert store.loss_tokens.tolist() == [4, 21, 100 - (SYSTEM_TOKENS + PROMPT_TOKENS + 5)]
    assert store.sample(1)[0][0] == 2
    assert incomplete(store, "line", "outcome", "reason", "tokens") == [
        (2, "truncated", "over max_tokens", alone + 220),
        (3, "truncated", "over max_tokens", alone + 205),
    ]


def test_excluded_rows_are_listed_with_their_reason(tmp_path: Path) -> None:
    empty = '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]}\n'
    rows = [line("q", None), line("", "a"), '{"messages": []}\n', line("", "a" * 50), empty]
    files = [str(write(tmp_path / "a.jsonl", *rows))]
    store = prepared(job(tmp_path, train_files=files, max_length_policy="skip", levels="60:1"))
    assert store.lengths.tolist() == [PROMPT_TOKENS + 3]
    assert incomplete(store, "line", "reason", "tokens") == [
        (1, "no assistant turn", 0),
        (3, "empty", 0),
        (4, "over max_tokens", PROMPT_TOKENS + 52),
        (5, "empty", 0),
    ]
    assert check_totals(store.totals(), 1)[1] == []
    with pytest.raises(UserError) as caught:
        prepare(job(tmp_path, train_files=files, max_length_policy="truncate", levels="60:1", strict=True))
    assert [text.partition(".jsonl:")[2] for text in caught.value.lines[:4]] == [
        "1: excluded: no assistant turn",
        "3: excluded: empty",
        "4: truncated: over max_tokens",
        "5: excluded: empty",
    ]
    assert "data.strict: 4 rows" in caught.value.lines[4]


def test_no_sample_left_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", line("q", None))
    with pytest.raises(ValueError, match=r"no sample is left .*a.jsonl: 1 no assistant turn"):
        prepare(job(tmp_path, train_files=[str(file)]))


# What is not read.


def folder_of(path: Path, **files: list[str]) -> Path:
    path.mkdir(parents=True)
    for name, lines in files.items():
        write(path / f"{name}.jsonl", *lines)
    return path


def test_empty_files_among_others_are_listed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", a=[line("q", "a")], b=[], c=["\n \n"], d=[line("q", "b")])
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(b""))
    write(folder / "f.json", "[]")
    write(folder / "g.json", '{"data": []}')
    store = prepared(job(tmp_path, train_files=[str(folder)]))
    assert (len(store), store.totals()["rows"]) == (2, 2)
    empty = [str(folder / name) for name in ("b.jsonl", "c.jsonl", "e.jsonl.gz", "f.json", "g.json")]
    assert store.stores[0].empty_files() == empty
    assert unread(store) == [f"not read: 5 files without rows: {', '.join(empty)}"]
    with pytest.raises(ValueError, match=r"data.train_files: no file has rows: .*b.jsonl, .*c.jsonl"):
        prepare(job(tmp_path, train_files=[str(folder / "[bc].jsonl")]))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_empty_tables_among_others_are_listed(tmp_path: Path, kind: str) -> None:
    table = pa.Table.from_pylist([json.loads(line("q", "a"))])
    (tmp_path / "data").mkdir()
    for name, part in (("a", table), ("b", table[:0]), ("c", table)):
        file = tmp_path / "data" / f"{name}.{kind}"
        if kind == "parquet":
            pq.write_table(part, file)
        else:
            with pa.ipc.new_stream(str(file), part.schema) as writer:
                writer.write_table(part)
    (tmp_path / "data" / f"d.{kind}").write_bytes(b"")
    store = prepared(job(tmp_path, train_files=[str(tmp_path / "data")]))
    assert len(store) == 2
    assert store.stores[0].empty_files() == [str(tmp_path / "data" / f"{name}.{kind}") for name in "bd"]


@pytest.mark.usefixtures("small_shards")
def test_columns_that_no_format_reads_are_counted_once_per_source(tmp_path: Path) -> None:
    rows = [line("q", "a", id=k, score=None if k % 2 else 0.5, source="s", system="") for k in range(40)]
    file = write(tmp_path / "a.jsonl", *rows, "broken\n", line("q", "a", meta={}))
    blocks = f'[[data.sources]]\npath = "{file}"\n[[data.sources]]\npath = "{file}"\ncolumns = {{ source = "id" }}\n'
    store = prepared(job(tmp_path, blocks, malformed="skip"))
    assert [source.meta["unread_columns"] for source in store.stores] == [
        {"id": 40, "score": 20, "meta": 1},
        {"source": 40, "score": 20, "meta": 1},
    ]
    assert unread(store) == [
        f"read by several sources: {file}",
        f"not read: {file}: columns 'id' (40 rows), 'score' (20 rows), 'meta' (1 rows)",
        f"not read: {file}: columns 'source' (40 rows), 'score' (20 rows), 'meta' (1 rows)",
    ]
    assert {"s", "a", "0", "39"} <= set(store.source_names)


@pytest.mark.usefixtures("small_shards")
def test_mapped_columns_and_message_keys_that_no_row_has_are_listed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *(line("q", "a", extra="S" if k == 39 else None) for k in range(40)))
    block = f'[[data.sources]]\npath = "{file}"\ncolumns = {{ tools = "tool_list", source = "extra", weight = "w" }}\n'
    store = prepared(job(tmp_path, block))
    assert unread(store) == [f"not found: {file}: columns 'messages[].w', 'tool_list'"]
    assert store.source_names == ["a", "S"]


def test_names_of_columns_that_are_data_do_not_fill_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_source, "MAX_UNREAD_COLUMNS", 3)
    file = write(tmp_path / "a.jsonl", *(line("q", "a", **{f"c{k}": 1}) for k in range(10)))
    columns = prepared(job(tmp_path, train_files=[str(file)])).stores[0].meta["unread_columns"]
    assert columns == {"(others)": 7, "c0": 1, "c1": 1, "c2": 1}


def test_files_of_a_folder_in_no_split_are_listed_with_their_rows(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "f1", code_train=[line("q", "a")], math=many(400), my_test=many(3))
    pq.write_table(pa.table({"x": [1, 2]}), folder / "table.parquet")
    write(folder / "pointer.jsonl", "version https://git-lfs.github.com/spec/v1\n")
    config = job(tmp_path, train_files=[str(folder)])
    store = prepared(config)
    assert (len(store), store.totals()["rows"]) == (1, 1)
    math, pointer, table = (folder / name for name in ("math.jsonl", "pointer.jsonl", "table.parquet"))
    in_no_split = f"{math} (400 rows), {pointer} (not readable), {table} (2 rows)"
    other = f"not read: files of split test: {folder / 'my_test.jsonl'}"
    assert unread(store) == [f"not read: files in no split: {in_no_split}", other]
    # The set is found again, but knows of a new file.
    write(folder / "new.jsonl", *many(5))
    again = prepared(config)
    assert again.folder == store.folder
    assert f"{folder / 'new.jsonl'} (5 rows)" in unread(again)[0]
    # Another source may read it.
    both = prepared(job(tmp_path, train_files=[str(folder), str(folder / "math.jsonl")]))
    assert (both.totals()["rows"], "math.jsonl" in "".join(unread(both))) == (401, False)
    # A pattern reads all of a kind.
    patterns = job(tmp_path, train_files=[f"{folder}/[cmn]*.jsonl"])
    assert (prepared(patterns).totals()["rows"], unread(prepared(patterns))) == (409, [])


# Names and places.


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("tulu", ["tulu"]),
        ("tulu/*.jsonl", ["data", "train"]),
        ("tulu/train-00000-of-00002.jsonl", ["train"]),
        ("tulu/data.v1.csv.jsonl", ["data.v1.csv"]),
    ],
)
def test_rows_without_a_source_are_named_by_their_folder_or_file(tmp_path: Path, path: str, names: list[str]) -> None:
    folder = tmp_path / "tulu"
    folder.mkdir()
    shards = ("train-00000-of-00002", "train-00001-of-00002", "data-00000-of-00001")
    for name in ("data.v1.csv",) if "csv" in path else shards:
        write(folder / f"{name}.jsonl", line("q", name))
    write(folder / "README.md", "---\nconfigs: [{config_name: a, data_files: '*.jsonl'}]\n---\n")
    assert prepared(job(tmp_path, train_files=[str(tmp_path / path)])).source_names == names
    assert prepared(job(tmp_path, f'[[data.sources]]\npath = "{tmp_path / path}"\nname = "n"\n')).source_names == ["n"]


def test_a_copy_of_the_data_keeps_the_store_and_names_its_own_files(tmp_path: Path) -> None:
    folders = [folder_of(tmp_path / at / "data", a=[line("q", "a"), line("q", None)], b=[]) for at in ("one", "two")]
    stores = []
    for folder in (*folders, folders[0]):
        store = prepared(job(tmp_path, train_files=[str(folder)]))
        stores.append((store.folder, store.stores[0].folder))
        assert store.where(0) == f"{folder}/a.jsonl:1"
        assert incomplete(store, "file", "line") == [(f"{folder}/a.jsonl", 2)]
        assert unread(store) == [f"not read: 1 files without rows: {folder}/b.jsonl"]
        (listed,) = (text.removeprefix("  listed in ") for text in summary(store).splitlines() if "listed in" in text)
        assert json.loads(Path(listed).read_text())["file"] == f"{folder}/a.jsonl"
        assert pickle.loads(pickle.dumps(store.stores[0])).where(0) == store.where(0)
        with pytest.raises(UserError, match=f"^{re.escape(str(folder))}/a.jsonl:2: "):
            prepare(job(tmp_path, train_files=[str(folder)], strict=True))
    assert len(set(stores)) == 1


def test_a_store_that_cannot_be_written_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [folder_of(tmp_path / at / "data", a=[line("q", "a")]) for at in ("one", "two")]
    store = prepared(job(tmp_path, train_files=[str(folders[0])]))
    # Not by chmod: root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr("hbp_titan.data.build_set.record_places", None)
    assert prepared(job(tmp_path, train_files=[str(folders[1])])).where(0) == store.where(0)


# Calls.

CALLS = {
    "older form": {"content": "Let me see.", "function_call": {"name": "f", "arguments": '{"a": null}'}},
    "older form, no text": {"content": None, "function_call": {"name": "f", "arguments": ""}},
    "no arguments": {"content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": ""}}]},
    "JSON text": {"tool_calls": ['{"type": "function", "function": {"name": "f", "arguments": {"a": null}}}']},
}


@pytest.mark.parametrize("form", CALLS)
def test_calls_of_every_form_are_rendered_and_trained(tmp_path: Path, form: str) -> None:
    turn = {"role": "assistant", **CALLS[form]}
    result = {"role": "function", "name": "f", "content": "1"}
    row = {"messages": [{"role": "user", "content": "w?"}, turn, result, {"role": "assistant", "content": "one"}]}
    file = write(tmp_path / "a.jsonl", json.dumps({**row, "functions": [{"name": "f", "parameters": {}}]}))
    store = prepared(job(tmp_path, train_files=[str(file)], chat_template="qwen3"))
    text = show_samples(store, 1, tmp_path / "tokenizer")
    tool = '{"type": "function", "function": {"name": "f", "parameters": {}}}'
    assert f"<tools>\n{tool}\n</tools>" in text
    arguments = '{"a": null}' if form in ("older form", "JSON text") else "{}"
    call = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call><|im_end|>'
    before = "Let me see.\n" if form == "older form" else ""
    assert f"<|im_start|>assistant\n\x1b[32m{before}{call}\x1b[0m" in text
    assert "<tool_response>\n1\n</tool_response>" in text


# Malformed rows.


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.usefixtures("small_shards")
def test_malformed_rows_are_reported_whatever_process_reads_them(tmp_path: Path, num_proc: int) -> None:
    file = write(tmp_path / "a.jsonl", *many(40), '{"messages": 1}\n', *many(3), *["not json\n"] * 25)
    with pytest.raises(UserError, match=r"a.jsonl:41: ") as caught:
        prepare(job(tmp_path, train_files=[str(file)], num_proc=num_proc, max_errors_shown=4))
    numbers = [text.partition(".jsonl:")[2].partition(":")[0] for text in caught.value.lines[:4]]
    assert numbers == ["41", "45", "46", "47"]
    assert caught.value.lines[4].startswith("22 more malformed rows")
    assert len(caught.value.lines) == 5
    assert not list((tmp_path / "cache").glob("set-*"))


def test_malformed_rows_can_be_skipped_and_are_listed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *many(2), "not json\n", line("q", "a"), '{"messages": "x"}\n')
    store = prepared(job(tmp_path, train_files=[str(file)], malformed="skip"))
    assert (len(store), store.totals()["excluded: malformed"]) == (3, 2)
    assert incomplete(store, "line", "outcome", "reason") == [
        (3, "excluded", "malformed"),
        (5, "excluded", "malformed"),
    ]
    # A run that does not allow them refuses the existing store.
    with pytest.raises(UserError, match=r"a.jsonl:3: not JSON") as caught:
        prepared(job(tmp_path, train_files=[str(file)]))
    assert len(caught.value.lines) == 3


# Processes, ranks, kills.


@pytest.mark.usefixtures("small_shards")
def test_the_number_of_processes_does_not_change_a_byte(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *many(60), line("no answer", None), *many(30))
    contents = []
    for processes in (1, 2):
        config = job(tmp_path, train_files=[str(file)], num_proc=processes, cache_folder=str(tmp_path / str(processes)))
        assert len(prepared(config)) == 90
        contents.append(content(tmp_path / str(processes)))
    assert contents[0] == contents[1]
    assert sum(name.endswith("tokens.bin") for name in contents[0]) > 5


def run_ranks(size: int, work: Callable[[WorkerGroup], Any]) -> list[Any]:
    """What `work` returns or raises on each of `size` threads that gather as ranks do."""
    barrier, values, results = threading.Barrier(size), [None] * size, [None] * size
    # One at a time: Python 3.11's compiler, which reads the header of each .npy file, is not safe for threads.
    running = threading.Lock()

    def rank(number: int) -> None:
        def gather(value: Any) -> list[Any]:
            values[number] = value
            running.release()
            barrier.wait(30)
            gathered = list(values)
            barrier.wait(30)
            running.acquire()
            return gathered

        with running:
            try:
                results[number] = work(WorkerGroup(number, size, gather))
            except ValueError as error:
                results[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.usefixtures("small_shards")
def test_ranks_share_the_work_and_leave_the_same_bytes_as_one(tmp_path: Path) -> None:
    files = [str(write(tmp_path / f"{name}.jsonl", *many(count))) for name, count in (("a", 60), ("b", 7), ("c", 90))]
    contents = []
    for size in (1, 3):
        config = job(tmp_path, train_files=files, max_samples=130, cache_folder=str(tmp_path / str(size)))
        folders = run_ranks(size, lambda workers, config=config: prepare(config, progress=False, workers=workers))
        assert len(set(folders)) == 1
        contents.append(content(tmp_path / str(size)))
    assert contents[0] == contents[1]


@pytest.mark.usefixtures("small_shards")
def test_a_user_error_of_one_rank_is_raised_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *many(40), "{}\n", *many(40)))])
    errors = run_ranks(3, lambda workers: prepare(config, progress=False, workers=workers))
    assert [type(error) for error in errors] == [UserError] * 3
    assert all("a.jsonl:41: " in error.lines[0] for error in errors)

    def unreadable(file: Path) -> str:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("hbp_titan.data.prepare.sha256_file", unreadable)
    write(tmp_path / "a.jsonl", *many(3))
    errors = run_ranks(3, lambda workers: prepare(config, progress=False, workers=workers))
    assert [type(error) for error in errors] == [UserError] * 3


KILLED = """
import os, sys
from hbp_titan.config import load_config
from hbp_titan.data import build_source
from hbp_titan.data.prepare import prepare
build_source.SHARD_BYTES = 1000
write, made = build_source._ShardWriter.write, []
def killed(self):
    made.append(None)
    if len(made) == 4:
        self._add = lambda line, row: os._exit(9)
    return write(self)
build_source._ShardWriter.write = killed
prepare(load_config(sys.argv[1:]), progress=False)
"""


@pytest.mark.usefixtures("small_shards")
def test_a_killed_preparation_resumes_with_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *many(60)))])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = ["--job.config_file", str(tmp_path / "job.toml"), "--levels", "4096:1"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, check=False)
    assert killed.returncode == 9
    (partial,) = (tmp_path / "cache").glob("source-*.partial")
    assert sorted(path.name for path in partial.glob("shard-*")) == ["shard-00000", "shard-00001", "shard-00002"]
    made: list[str] = []
    write_shard = build_source._write_shard

    def counted(folder: Path, shard: build_source.Shard, *arguments: Any) -> build_source.ShardReport:
        made.append(shard.name)
        return write_shard(folder, shard, *arguments)

    monkeypatch.setattr(build_source, "_write_shard", counted)
    assert len(prepared(config)) == 60
    assert made[0] == "shard-00003"
    # The bytes are those of an undisturbed build.
    prepared(job(tmp_path, train_files=[str(tmp_path / "a.jsonl")], cache_folder=str(tmp_path / "other")))
    resumed = {name: data for name, data in content(tmp_path / "cache").items() if "/." not in name}
    assert resumed == content(tmp_path / "other")


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.usefixtures("small_shards")
def test_two_jobs_may_build_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *many(60)))])
    write_shard, calls = build_source._write_shard, []

    def other_job_first(folder: Path, shard: build_source.Shard, *arguments: Any) -> build_source.ShardReport:
        calls.append(shard.name)
        if len(calls) == at + 1:
            monkeypatch.setattr(build_source, "_write_shard", write_shard)
            prepare(config, progress=False)
        return write_shard(folder, shard, *arguments)

    monkeypatch.setattr(build_source, "_write_shard", other_job_first)
    assert len(prepared(config)) == 60
    assert len(calls) == at + 1
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir())
    assert names == ["digests", "set", "source"]


# Limits, mixtures, duplicates.


def test_a_limit_takes_random_rows_in_order_and_lists_the_others(tmp_path: Path) -> None:
    files = [str(write(tmp_path / "a.jsonl", *many(50))), str(write(tmp_path / "b.jsonl", *many(30)))]

    def rows(**data: Any) -> list[str]:
        store = prepared(job(tmp_path, train_files=files, **data))
        assert store.totals()["not_chosen"] == 80 - len(store)
        return places(store)

    share, whole = rows(max_samples=16), rows()
    assert len(whole) == 80
    assert share == [row for row in whole if row in share] != whole[:10] + whole[50:56]
    # In proportion to the files.
    assert [sum(row.startswith(file) for row in share) for file in files] == [10, 6]
    assert rows(max_samples=1000) == whole
    store = prepared(job(tmp_path, f'[[data.sources]]\npath = "{files[0]}"\nlimit = 4\n'))
    listed = np.load(store.stores[0].folder / "not_chosen.npy").tolist()
    taken = [int(place.rsplit(":", 1)[1]) for place in places(store)]
    assert sorted(taken + [row for _, row in listed]) == list(range(1, 51))


def test_sources_with_weights_and_repeats_make_an_epoch(tmp_path: Path) -> None:
    short = write(tmp_path / "short.jsonl", *many(40))
    long = write(tmp_path / "long.jsonl", *[line("", "b" * (20 + k)) for k in range(8)])
    blocks = f'[[data.sources]]\npath = "{short}"\nname = "tulu"\nweight = 3\n'
    blocks += f'[[data.sources]]\npath = "{long}"\nname = "cite"\nweight = 2\nrepeat = 1.5\n'
    store = prepared(job(tmp_path, blocks))
    # 12 of the second are two fifths: 18 of the first.
    names = [store.source_names[source] for source in store.sources]
    assert (names.count("tulu"), names.count("cite")) == (18, 12)
    drawn = places(store)
    assert len(set(drawn[:18])) == 18
    assert Counter(Counter(drawn[18:]).values()) == {1: 4, 2: 4}
    totals = store.totals()
    assert (totals["rows"], totals["samples_made"], totals["trained"], totals["copies"]) == (48, 48, 26, 4)
    assert (totals["not drawn"], totals["samples"]) == (22, 30)
    not_drawn = {f"{file}:{number}" for file, number in incomplete(store, "file", "line")}
    assert not_drawn == {f"{short}:{number}" for number in range(1, 41)} - set(drawn)
    # Nothing is tokenized twice: a copy is the same bytes.
    doubled = next(place for place in drawn[18:] if drawn.count(place) == 2)
    first, second = (index for index, place in enumerate(drawn) if place == doubled)
    assert np.shares_memory(store.sample(first)[0], store.sample(second)[0])


def test_duplicates_can_be_dropped_and_are_listed(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", line("q", "a"), line("q", "b"), line("q", "a", source="other"))
    second = write(tmp_path / "b.jsonl", line("q", "b"), line("q", "c"))
    files = [str(first), str(second)]
    assert len(prepared(job(tmp_path, train_files=files))) == 5
    store = prepared(job(tmp_path, train_files=files, duplicates="skip"))
    assert places(store) == [f"{first}:1", f"{first}:2", f"{second}:2"]
    listed = [(str(first), 3, "duplicate"), (str(second), 1, "duplicate")]
    assert incomplete(store, "file", "line", "reason") == listed


@pytest.mark.parametrize(
    ("counts", "repeats", "weights", "expected"),
    [
        ([100, 10], [1, 3], [0, 0], [100, 30]),
        ([100, 10], [0.25, 1.5], [0, 0], [25, 15]),
        # 10 samples of the second are a half: the first gives as many.
        ([100, 10], [1, 1], [1, 1], [10, 10]),
        # Up to four times: 40 are a half.
        ([100, 10], [1, 4], [0.5, 0.5], [40, 40]),
        ([100, 10], [1, 1], [9, 1], [90, 10]),
        # 100 are a twentieth of 2000, but the second has only 10.
        ([100, 10], [1, 1], [1, 19], [1, 10]),
        # A source without weight is added.
        ([100, 10, 7], [1, 1, 1], [1, 1, 0], [10, 10, 7]),
        ([0, 10], [1, 1], [1, 1], [0, 0]),
    ],
)
def test_epoch_counts_by_hand(
    counts: list[int], repeats: list[float], weights: list[float], expected: list[int]
) -> None:
    assert epoch_counts(counts, repeats, weights) == expected


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.1, 4), st.floats(0.01, 10)), min_size=1, max_size=6))
def test_weights_are_kept_and_one_source_is_used_up(sources: list[tuple[int, float, float]]) -> None:
    counts, repeats, weights = ([source[k] for source in sources] for k in range(3))
    taken = epoch_counts(counts, repeats, weights)
    limits = [count * repeat for count, repeat in zip(counts, repeats, strict=True)]
    assert all(got <= limit + 0.5 for got, limit in zip(taken, limits, strict=True))
    assert any(abs(got - limit) <= 0.5 for got, limit in zip(taken, limits, strict=True))
    unit = min(limit / weight for limit, weight in zip(limits, weights, strict=True))
    slack = 0.5 + 1e-9 * max(weights)
    assert all(abs(got - unit * weight) <= slack for got, weight in zip(taken, weights, strict=True))


@given(st.integers(1, 40), st.integers(0, 200), st.integers(0, 3))
def test_samples_are_drawn_equally_often_up_to_one(count: int, drawn: int, seed: int) -> None:
    samples = np.arange(100, 100 + count)
    first, again, other = (draw(samples, drawn, key).tolist() for key in ((seed, 0), (seed, 0), (seed, 1)))
    assert first == again
    assert other != first or drawn % count in (0, count - 1, 1) or count < 9
    times = Counter(first)
    assert times.total() == drawn
    assert max(times[s] for s in samples.tolist()) - min(times[s] for s in samples.tolist()) <= 1


@given(st.integers(0, 300), st.lists(st.integers(0, 100), min_size=1, max_size=6))
def test_a_share_of_all_sources_is_in_proportion(total: int, counts: list[int]) -> None:
    shares = share_out(total, counts)
    assert sum(shares) == min(total, sum(counts))
    assert all(share <= count for share, count in zip(shares, counts, strict=True))
    if sum(counts) > total:
        assert all(abs(s - total * c / sum(counts)) < 1 for s, c in zip(shares, counts, strict=True))


@given(st.lists(st.lists(st.integers(0, 5), max_size=8), min_size=1, max_size=4))
def test_only_the_first_of_equal_samples_is_kept(sources: list[list[int]]) -> None:
    digests = [np.array([bytes([value] * 15) + b"\0" for value in source], dtype="V16") for source in sources]
    seen: set[int] = set()
    for source, flags in zip(sources, first_of_each(digests), strict=True):
        for value, flag in zip(source, flags.tolist(), strict=True):
            assert flag == (value not in seen)
            seen.add(value)


# validation.share.


def _stores(folder: Path, *words: str) -> list[TokenStore]:
    return open_stores(load_config([*write_tiny_run(folder, num_rows=200), *words]), 512)


def _texts(store: TokenStore) -> list[bytes]:
    return [store.sample(index)[0].tobytes() for index in range(len(store))]


def test_training_and_held_out_samples_are_disjoint_and_complete(tmp_path: Path) -> None:
    (whole,) = _stores(tmp_path)
    trained, held = _stores(tmp_path, "--validation.share=0.25")
    assert sorted(_texts(trained) + _texts(held)) == sorted(_texts(whole))
    # Four standard deviations of 200 rows.
    assert 25 <= len(held) <= 75
    for store, reason, samples in ((trained, "held out", len(held)), (held, "not held out", len(trained))):
        assert store.totals()[reason] == samples
        assert check_totals(store.totals(), len(store))[1] == []
        # Held out is not lost: data.strict accepts it.
        check_strict(store, max_errors=1)
    again, fewer = _stores(tmp_path, "--validation.share=0.25", "--validation.max_samples=10")
    assert _texts(again) == _texts(trained)
    assert len(fewer) == 10
    assert set(_texts(fewer)) <= set(_texts(held))
    other = _stores(tmp_path, "--validation.share=0.25", "--data.seed=1")[1]
    assert sorted(_texts(other)) != sorted(_texts(held))


def test_copies_and_pieces_of_a_row_are_on_the_same_side(tmp_path: Path) -> None:
    argv = write_tiny_run(tmp_path, num_rows=80)
    rows = (tmp_path / "train.jsonl").read_text().splitlines()
    # Each row twice; a second file has each as one long conversation.
    long = [{"messages": json.loads(row)["messages"] * 15} for row in rows[:30]]
    (tmp_path / "train.jsonl").write_text("\n".join([*rows, *rows[::-1]]) + "\n")
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    argv += [f"--data.train_files={tmp_path / 'train.jsonl'},{tmp_path / 'long.jsonl'}"]
    argv += ["--data.max_length_policy=split", "--validation.share=0.3", "--levels=64"]
    trained, held = open_stores(load_config(argv), 64)
    lines = [set(places(store)) for store in (trained, held)]
    assert lines[0].isdisjoint(lines[1])
    assert len(held) > len(lines[1]) + 20, "no row was split"
    # A row and its copy train the same tokens, whole or in pieces.
    own = [{s.sample(i)[0].tobytes() for i in range(len(s)) if "train.jsonl" in s.where(i)} for s in (trained, held)]
    assert own[0].isdisjoint(own[1])
    assert min(map(len, own)) > 10


def test_content_and_seed_decide_the_side_of_a_row() -> None:
    digests = np.frombuffer(np.random.default_rng(0).bytes(16 * 10000), "V16")
    rows = np.arange(10000)
    held = held_out(digests, rows, 0.1, 7)
    # Five standard deviations of 10,000 draws.
    assert abs(held.sum() - 1000) < 150
    order = np.random.default_rng(1).permutation(10000)
    assert (held_out(digests[order], rows, 0.1, 7) == held[order]).all()
    # A larger share includes a smaller one.
    assert held_out(digests, rows, 0.2, 7)[held].all()
    assert (held_out(digests, rows, 0.1, 8) & held).sum() < 200
    # Three samples of a row follow its first one.
    assert (held[:9999:3] == held_out(digests, rows // 3, 0.1, 7)[:9999].reshape(-1, 3).T).all()
    assert held_out(digests[:0], rows[:0], 0.5, 0).tolist() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--validation.share=1"], "validation.share = 1.0"),
        (["--validation.share=0.1", "--data.validation_files=x.jsonl"], "validation_files"),
        (["--validation.enable=true"], "nothing is held out"),
        (["--validation.share=1e-9"], "no sample to hold out of 200"),
        (["--validation.share=0.999999999"], "no sample to train on of 200"),
    ],
)
def test_an_impossible_share_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _stores(tmp_path, *words)
