"""Token stores: content by hand, fingerprint, resumption, ledger, and that they appear whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbp_titan.data import build_set as build_set_module
from hbp_titan.data import build_source
from hbp_titan.data.prepare import prepare
from hbp_titan.data.token_store import TokenStore, check_fits
from hbp_titan.errors import UserError, WorkerGroup
from tests.data.preparing import PROMPT_TOKENS, byte_tokenizer, job, line, many, prepared, write


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_source, "SHARD_BYTES", 1000)
    monkeypatch.setattr(build_source, "BYTES_PER_PROCESS", 1000)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of the stores in `folder`."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "digests"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_store_holds_what_can_be_counted_by_hand(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", line("Hi", "Yo"), "\n", line("", "abc", source="named"))
    second = write(tmp_path / "b.jsonl", line("Hello", "x"))
    store = prepared(job(tmp_path, train_files=[str(first), str(second)]))
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
    assert list(store.incomplete_rows()) == []
    assert (store.totals()["rows"], store.totals()["trained"]) == (3, 3)


def test_samples_are_read_only_views_of_the_file(tmp_path: Path) -> None:
    store = prepared(job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *many(3)))]))
    tokens, loss_mask = store.stores[0]._shard(0)
    for index in range(3):
        assert np.shares_memory(store.sample(index)[0], tokens)
        assert np.shares_memory(store.sample(index)[1], loss_mask)
        assert not any(array.flags.writeable for array in store.sample(index))
    tail = tokens.base
    while isinstance(tail, np.ndarray) and not isinstance(tail, np.memmap):
        tail = tail.base
    assert isinstance(tail, np.memmap)


def test_a_store_reaches_another_process_without_its_content(tmp_path: Path) -> None:
    store = prepared(job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *many(2000)))]))
    text = pickle.dumps(store)
    assert len(text) < 1000
    again = pickle.loads(text)
    assert again.lengths.tolist() == store.lengths.tolist()
    assert again.sample(1999)[0].tolist() == store.sample(1999)[0].tolist()


def test_loss_tokens_count_positions_after_the_shift(tmp_path: Path) -> None:
    # Only a template that opens with the answer trains position 0, which nothing predicts.
    byte_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    answer = '{"messages": [{"role": "assistant", "content": "%s"}]}\n'
    file = write(tmp_path / "a.jsonl", answer % "abcd", answer % "x")
    store = prepared(job(tmp_path, train_files=[str(file)]))
    assert store.loss_tokens.tolist() == [3]
    (entry,) = store.incomplete_rows()
    assert (entry["line"], entry["reason"], entry["tokens"]) == (2, "no trained token", 1)


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


def run_team(size: int, work: Callable[[WorkerGroup], Any]) -> list[Any]:
    """`work` on `size` threads that gather as ranks do; what each returns or raises."""
    barrier, values, results = threading.Barrier(size), [None] * size, [None] * size

    def rank(number: int) -> None:
        def gather(value: Any) -> list[Any]:
            values[number] = value
            barrier.wait(30)
            gathered = list(values)
            barrier.wait(30)
            return gathered

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
def test_ranks_that_share_the_work_leave_the_same_bytes_as_one(tmp_path: Path) -> None:
    files = [str(write(tmp_path / f"{name}.jsonl", *many(count))) for name, count in (("a", 60), ("b", 7), ("c", 90))]
    contents = []
    for size in (1, 3):
        config = job(tmp_path, train_files=files, max_samples=130, cache_folder=str(tmp_path / str(size)))
        folders = run_team(size, lambda team, config=config: prepare(config, progress=False, workers=team))
        assert len(set(folders)) == 1
        contents.append(content(tmp_path / str(size)))
    assert contents[0] == contents[1]


@pytest.mark.usefixtures("small_shards")
def test_a_mistake_that_one_rank_meets_is_raised_by_all(tmp_path: Path) -> None:
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *many(40), "{}\n", *many(40)))])
    errors = run_team(3, lambda team: prepare(config, progress=False, workers=team))
    assert [type(error) for error in errors] == [UserError] * 3
    assert all("a.jsonl:41: " in error.lines[0] for error in errors)


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.usefixtures("small_shards")
def test_a_malformed_row_is_named_whatever_process_reads_it(tmp_path: Path, num_proc: int) -> None:
    file = write(tmp_path / "a.jsonl", *many(40), '{"messages": 1}\n', *many(3), "not json\n")
    config = job(tmp_path, train_files=[str(file)], num_proc=num_proc)
    with pytest.raises(UserError, match=r"a.jsonl:41: ") as caught:
        prepare(config)
    assert "a.jsonl:45: not JSON" in caught.value.lines[1]
    assert caught.value.lines[2].startswith("fix the rows, or set data.malformed")
    write(tmp_path / "a.jsonl", *many(4), "not json\n")
    with pytest.raises(UserError, match=r"a.jsonl:5: not JSON.*; fix the row, or set data.malformed") as caught:
        prepare(config)
    assert len(caught.value.lines) == 1
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith("set-")]


def test_only_the_first_malformed_rows_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *many(2), *["not json\n"] * 25)
    with pytest.raises(UserError) as caught:
        prepare(job(tmp_path, train_files=[str(file)], max_errors_shown=4))
    lines = caught.value.lines
    assert [line.split(": ")[0] for line in lines[:4]] == [f"{file}:{number}" for number in (3, 4, 5, 6)]
    assert lines[4].startswith("21 more malformed rows are not shown; fix the rows")
    assert len(lines) == 5


def test_malformed_rows_are_left_out_and_listed_where_that_is_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *many(2), "not json\n", line("q", "a"), '{"messages": "x"}\n')
    config = job(tmp_path, train_files=[str(file)], malformed="skip")
    store = prepared(config)
    assert (len(store), store.totals()["excluded: malformed"]) == (3, 2)
    assert [(entry["line"], entry["outcome"], entry["reason"]) for entry in store.incomplete_rows()] == [
        (3, "excluded", "malformed"),
        (5, "excluded", "malformed"),
    ]
    # The same store is not accepted by a run that does not allow them.
    with pytest.raises(UserError, match=r"a.jsonl:3: not JSON") as caught:
        prepared(job(tmp_path, train_files=[str(file)]))
    assert len(caught.value.lines) == 3


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("{{ raise_exception('no system turn') }}")
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *many(1)))])
    with pytest.raises(ValueError, match=r"a.jsonl:1: the chat template rejects the conversation: no system turn"):
        prepare(config)


def test_unchanged_inputs_find_the_store_again_without_reading_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *many(5)))])
    folder = prepare(config)
    monkeypatch.setattr(build_set_module, "index_rows", None)
    monkeypatch.setattr(build_set_module, "build_source_store", None)
    monkeypatch.setattr("hbp_titan.data.prepare.sha256_file", None)
    config.data.num_proc = 2
    assert prepare(config) == folder


def test_each_input_that_shapes_the_samples_changes_the_fingerprint(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *many(8))
    block = f'[[data.sources]]\npath = "{file}"\n'

    def build(sources: str = "", levels: str = "4096:1", **data: Any) -> str:
        data = data if sources else {"train_files": [str(file)], **data}
        return prepared(job(tmp_path, sources, levels, **data)).fingerprint

    seen = [build(), build(max_samples=3), build(max_length_policy="skip", levels="30:1"), build(duplicates="skip")]
    seen += [build(train_on="last"), build(block + "repeat = 2\n"), build(block + "name = 'n'\n")]
    write(file, *many(8)[::-1])
    seen.append(build())
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    seen.append(build())
    assert len(set(seen)) == 9
    write(file, *many(8))
    (tmp_path / "tokenizer" / "chat_template.jinja").unlink()
    assert build() == seen[0]
    # Where samples may have any length, the levels do not matter.
    assert build(levels="2048:1") == seen[0]


def test_a_share_is_random_in_order_and_counted(tmp_path: Path) -> None:
    files = [str(write(tmp_path / "a.jsonl", *many(50))), str(write(tmp_path / "b.jsonl", *many(30)))]

    def rows(**data: Any) -> list[str]:
        store = prepared(job(tmp_path, train_files=files, **data))
        assert store.totals()["not_chosen"] == 80 - len(store)
        return [store.where(index) for index in range(len(store))]

    share, whole = rows(max_samples=16), rows()
    assert len(whole) == 80
    assert share == [row for row in whole if row in share]
    # In proportion to the files.
    assert [sum(row.startswith(file) for row in share) for file in files] == [10, 6]
    assert share != whole[:10] + whole[50:56]
    assert rows(max_samples=1000) == whole


def test_rows_outside_a_limit_are_listed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *many(10))
    store = prepared(job(tmp_path, f'[[data.sources]]\npath = "{file}"\nlimit = 4\n'))
    listed = np.load(store.stores[0].folder / "not_chosen.npy").tolist()
    taken = [int(store.where(index).rsplit(":", 1)[1]) for index in range(4)]
    assert sorted(taken + [row for _, row in listed]) == list(range(1, 11))


def test_sources_with_weights_and_repeats_make_an_epoch(tmp_path: Path) -> None:
    short = write(tmp_path / "short.jsonl", *many(40))
    long = write(tmp_path / "long.jsonl", *[line("", "b" * (20 + k)) for k in range(8)])
    store = prepared(
        job(
            tmp_path,
            f"""
            [[data.sources]]
            path = "{short}"
            name = "tulu"
            weight = 3
            [[data.sources]]
            path = "{long}"
            name = "cite"
            weight = 2
            repeat = 1.5
            """,
        )
    )
    # 12 of the second are two fifths: 18 of the first.
    names = [store.source_names[source] for source in store.sources]
    assert (names.count("tulu"), names.count("cite")) == (18, 12)
    places = [store.where(index) for index in range(len(store))]
    assert len(set(places[:18])) == 18
    assert all(places[18:].count(place) in (1, 2) for place in places[18:])
    assert len(set(places[18:])) == 8
    totals = store.totals()
    assert (totals["rows"], totals["samples_made"], totals["trained"], totals["copies"]) == (48, 48, 26, 4)
    assert (totals["not drawn"], totals["samples"]) == (22, 30)
    not_drawn = {f"{entry['file']}:{entry['line']}" for entry in store.incomplete_rows()}
    assert not_drawn == {f"{short}:{number}" for number in range(1, 41)} - set(places)
    # Nothing was tokenized twice: a copy is the same bytes.
    doubled = next(place for place in places[18:] if places.count(place) == 2)
    first, second = (index for index, place in enumerate(places) if place == doubled)
    assert np.shares_memory(store.sample(first)[0], store.sample(second)[0])


def test_duplicates_are_left_out_and_listed_where_that_is_asked_for(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", line("q", "a"), line("q", "b"), line("q", "a", source="other"))
    second = write(tmp_path / "b.jsonl", line("q", "b"), line("q", "c"))
    files = [str(first), str(second)]
    assert len(prepared(job(tmp_path, train_files=files))) == 5
    store = prepared(job(tmp_path, train_files=files, duplicates="skip"))
    assert [store.where(index) for index in range(len(store))] == [f"{first}:1", f"{first}:2", f"{second}:2"]
    assert [(Path(entry["file"]).name, entry["line"], entry["reason"]) for entry in store.incomplete_rows()] == [
        ("a.jsonl", 3, "duplicate"),
        ("b.jsonl", 1, "duplicate"),
    ]
    assert store.totals()["duplicate"] == 2


def test_rows_left_out_are_listed_with_their_reason(tmp_path: Path) -> None:
    empty = '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]}\n'
    rows = [line("q", None), line("", "a"), '{"messages": []}\n', line("", "a" * 50), empty]
    file = write(tmp_path / "a.jsonl", *rows)
    store = prepared(job(tmp_path, train_files=[str(file)], max_length_policy="skip", levels="60:1"))
    assert store.lengths.tolist() == [PROMPT_TOKENS + 3]
    assert [(entry["line"], entry["reason"], entry["tokens"]) for entry in store.incomplete_rows()] == [
        (1, "no assistant turn", 0),
        (3, "empty", 0),
        (4, "over max_tokens", PROMPT_TOKENS + 52),
        (5, "empty", 0),
    ]
    totals = store.totals()
    assert totals["rows"] == 5 == totals["whole"] + sum(n for key, n in totals.items() if key.startswith("excluded"))


def turns(*exchanges: tuple[int, int], system: str = "S") -> str:
    """A row of questions and answers of so many bytes."""
    messages = [{"role": "system", "content": system}]
    for asked, answered in exchanges:
        messages += [{"role": "user", "content": "q" * asked}, {"role": "assistant", "content": "a" * answered}]
    return json.dumps({"messages": messages}) + "\n"


# <|im_start|> "system\n" S <|im_end|> "\n"; of an exchange all but what is said, with the last line end.
SYSTEM_TOKENS, EXCHANGE_TOKENS = 1 + 7 + 1 + 2, PROMPT_TOKENS + 2


def test_longer_samples_are_split_at_turn_borders_and_listed(tmp_path: Path) -> None:
    rows = [turns((3, 3)), turns((10, 20), (5, 5), (9, 90), (4, 4)), turns((0, 100)), line("q", "a")]
    file = write(tmp_path / "a.jsonl", *rows)
    store = prepared(job(tmp_path, train_files=[str(file)], max_length_policy="split", levels="100:1"))
    # Of the second row the first two exchanges share a sample, the third is too long, the fourth stands alone.
    assert store.lengths.tolist() == [
        SYSTEM_TOKENS + EXCHANGE_TOKENS + 6,
        SYSTEM_TOKENS + 2 * EXCHANGE_TOKENS + 40,
        SYSTEM_TOKENS + EXCHANGE_TOKENS + 8,
        EXCHANGE_TOKENS + 2,
    ]
    assert store.loss_tokens.tolist() == [4, 21 + 6, 5, 2]
    assert [store.where(index) for index in range(4)] == [f"{file}:{number}" for number in (1, 2, 2, 4)]
    assert [store.stores[0].samples["part"][k] for k in range(4)] == [0, 0, 1, 0]
    whole = SYSTEM_TOKENS + 4 * EXCHANGE_TOKENS + 147
    alone = SYSTEM_TOKENS + EXCHANGE_TOKENS
    assert [(e["line"], e["outcome"], e["tokens"], e["samples"], e["detail"]) for e in store.incomplete_rows()] == [
        (2, "split", whole, 2, f"1 exchanges of {alone + 99} tokens fit nowhere"),
        (3, "excluded", alone + 100, 0, "no exchange fits"),
    ]
    totals = store.totals()
    assert (totals["rows"], totals["whole"], totals["split"], totals["samples_made"]) == (4, 2, 1, 4)


def test_longer_samples_are_cut_with_their_last_answer_kept_and_listed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", turns((3, 3)), turns((200, 20)), turns((5, 200)))
    store = prepared(job(tmp_path, train_files=[str(file)], max_length_policy="truncate", levels="100:1"))
    assert store.lengths.tolist() == [SYSTEM_TOKENS + EXCHANGE_TOKENS + 6, 100, 100]
    # The whole answer with its end token; of an answer that does not fit, what does.
    assert store.loss_tokens[:2].tolist() == [4, 21]
    assert store.loss_tokens[2] == 100 - (SYSTEM_TOKENS + PROMPT_TOKENS + 5)
    assert store.sample(1)[0][0] == 2
    assert [(e["line"], e["outcome"], e["reason"], e["tokens"]) for e in store.incomplete_rows()] == [
        (2, "truncated", "over max_tokens", SYSTEM_TOKENS + EXCHANGE_TOKENS + 220),
        (3, "truncated", "over max_tokens", SYSTEM_TOKENS + EXCHANGE_TOKENS + 205),
    ]


def test_strict_turns_any_row_that_is_left_out_or_cut_into_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *many(3), line("q", None), line("", "a" * 50))
    files = {"train_files": [str(file)], "levels": "60:1", "strict": True}
    with pytest.raises(UserError) as caught:
        prepare(job(tmp_path, max_length_policy="truncate", **files))
    assert [text.removeprefix(f"{file}:") for text in caught.value.lines[:2]] == [
        "4: excluded: no assistant turn",
        "5: truncated: over max_tokens",
    ]
    assert caught.value.lines[2].startswith("data.strict: 2 rows were dropped or truncated")
    write(file, *many(3))
    assert len(prepared(job(tmp_path, max_length_policy="truncate", **files))) == 3


def test_no_sample_left_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", line("q", None))
    with pytest.raises(ValueError, match=r"no sample is left to train on: .*a.jsonl: 1 no assistant turn"):
        prepare(job(tmp_path, train_files=[str(file)]))


def test_a_sample_longer_than_the_largest_level_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", line("", "a"), line("", "a" * 50), line("", "a" * 49))
    store = prepared(job(tmp_path, train_files=[str(file)]))
    check_fits(store, PROMPT_TOKENS + 52)
    with pytest.raises(
        ValueError, match=r"a.jsonl:2: a sample of 71 tokens .* levels.max_tokens = 69 \(2 of 3 samples"
    ):
        check_fits(store, 69)


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
def test_a_killed_preparation_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *many(60)))])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = ["--job.config_file", str(tmp_path / "job.toml"), "--levels", "4096:1"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, check=False)
    assert killed.returncode == 9
    (partial,) = (tmp_path / "cache").glob("source-*")
    assert partial.name.endswith(".partial")
    kept = sorted(path.name for path in partial.glob("shard-*"))
    assert kept == ["shard-00000", "shard-00001", "shard-00002"]
    made: list[str] = []
    write_shard = build_source._write_shard

    def counted(folder: Path, shard: build_source.Shard, *arguments: Any) -> build_source.ShardReport:
        made.append(shard.name)
        return write_shard(folder, shard, *arguments)

    monkeypatch.setattr(build_source, "_write_shard", counted)
    resumed = prepared(config)
    assert made[0] == "shard-00003"
    assert len(resumed) == 60
    # As if nothing had happened.
    undisturbed = job(tmp_path, train_files=[str(tmp_path / "a.jsonl")], cache_folder=str(tmp_path / "other"))
    monkeypatch.undo()
    monkeypatch.setattr(build_source, "SHARD_BYTES", 1000)
    prepared(undisturbed)
    assert {name: data for name, data in content(tmp_path / "cache").items() if "/." not in name} == content(
        tmp_path / "other"
    )


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.usefixtures("small_shards")
def test_of_two_processes_that_make_the_same_store_both_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *many(60)))])
    write_shard, calls = build_source._write_shard, []

    def rival_first(folder: Path, shard: build_source.Shard, *arguments: Any) -> build_source.ShardReport:
        calls.append(shard.name)
        if len(calls) == at + 1:
            monkeypatch.setattr(build_source, "_write_shard", write_shard)
            prepare(config, progress=False)
        return write_shard(folder, shard, *arguments)

    monkeypatch.setattr(build_source, "_write_shard", rival_first)
    assert len(prepared(config)) == 60
    assert len(calls) == at + 1
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir())
    assert names == ["digests", "set", "source"]


def test_a_missing_foreign_or_damaged_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing: not a token store"):
        TokenStore.open(tmp_path / "nothing")
    store = prepared(job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *many(5)))]))
    os.truncate(store.stores[0].folder / "shard-00000" / "tokens.bin", 8)
    with pytest.raises(ValueError, match=r"tokens.bin: damaged"):
        TokenStore.open(store.folder).sample(0)
    meta = json.loads((store.folder / "meta.json").read_text())
    (store.folder / "meta.json").write_text(json.dumps({**meta, "format_version": 0}))
    with pytest.raises(ValueError, match=r"has format 0"):
        TokenStore.open(store.folder)
