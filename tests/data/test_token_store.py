"""The token store: what it holds, that it is found again, and that nothing is lost in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from hbp_titan.data import tokenize_rows
from hbp_titan.data.token_store import TokenStore, build_token_store, check_fits
from hbp_titan.data.tokenizer import train_tokenizer

TEXTS = ["What does the level hold?", "It holds packs of tokens.", "And the plan?", "The plan holds the levels."]


def _row(*turns: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)], **more}


ROWS = [
    _row(TEXTS[0], TEXTS[1], source="one"),
    _row(TEXTS[0]),
    _row(*TEXTS, source="two"),
    _row(TEXTS[2], TEXTS[3] * 40, source="one"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_tokenizer(TEXTS, tmp_path / "tokenizer", vocab_size=300)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def _build(folder: Path, cache: str = "cache", **options: Any) -> TokenStore:
    options = {"num_proc": 1, "progress": False, **options}
    path = build_token_store([folder / "rows.jsonl"], folder / "tokenizer", folder / cache, **options)
    return TokenStore.open(path)


def test_tokens_are_those_of_transformers_and_trained_text_is_the_assistants(folder: Path) -> None:
    store = _build(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    kept = [ROWS[0], ROWS[2], ROWS[3]]
    assert len(store) == 3
    for index, row in enumerate(kept):
        tokens, mask = store.sample(index)
        expected = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"]
        assert tokens.tolist() == expected
        trained = tokenizer.decode(tokens[mask])
        assert trained == "".join(turn["content"] + "<|im_end|>" for turn in row["messages"][1::2])
        assert store.lengths[index] == len(tokens)
        assert store.loss_tokens[index] == mask[1:].sum()
    assert [store.source_names[i] for i in store.sources] == ["one", "two", "one"]


def test_row_without_assistant_turn_is_listed_with_its_reason(folder: Path) -> None:
    store = _build(folder)
    assert store.excluded() == [
        {"file": str(folder / "rows.jsonl"), "line": 2, "reason": "no assistant turn", "tokens": 0}
    ]
    assert store.where(1).endswith("rows.jsonl:3")


def test_longer_samples_are_left_out_and_listed_or_refused(folder: Path) -> None:
    whole = _build(folder)
    longest = int(whole.lengths.max())
    with pytest.raises(ValueError, match=rf"rows\.jsonl:4: a sample of {longest} tokens .* levels\.max_tokens = 64"):
        check_fits(whole, 64)
    check_fits(whole, longest)
    limited = _build(folder, max_tokens=64)
    assert len(limited) == 2
    assert [(row["line"], row["reason"]) for row in limited.excluded()] == [
        (2, "no assistant turn"),
        (4, "over max_tokens"),
    ]
    assert limited.fingerprint != whole.fingerprint


def test_longer_samples_are_cut_and_listed_unless_nothing_trained_is_left(folder: Path) -> None:
    whole = _build(folder)
    cut = _build(folder, max_tokens=64, overlong="truncate")
    assert cut.lengths.tolist() == np.minimum(whole.lengths, 64).tolist()
    for index in range(3):
        tokens, mask = whole.sample(index)
        assert cut.sample(index)[0].tolist() == tokens[:64].tolist()
        assert cut.loss_tokens[index] == mask[1:64].sum()
    assert [(row["line"], row["tokens"]) for row in cut.truncated()] == [
        (index_line, int(length)) for index_line, length in zip((1, 3, 4), whole.lengths, strict=True) if length > 64
    ]
    with pytest.raises(ValueError, match=r"no sample is left to train on \(3 no trained token, 1 no assistant turn\)"):
        _build(folder, max_tokens=8, overlong="truncate")


def test_unchanged_input_is_found_again_and_a_change_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _build(folder)
    with monkeypatch.context() as patched:
        patched.setattr(tokenize_rows, "_Worker", None)  # whoever tokenizes again fails
        assert _build(folder).folder == first.folder
    (folder / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert len(_build(folder)) == 1
    config_file = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    config["chat_template"] = config["chat_template"].replace("<|im_start|>", "<|im_end|>")
    config_file.write_text(json.dumps(config))
    assert _build(folder).fingerprint != first.fingerprint


def test_number_of_processes_does_not_change_a_byte(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(ROWS[i % 4]) + "\n" for i in range(200)))
    monkeypatch.setattr(tokenize_rows, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(tokenize_rows, "BYTES_PER_PROCESS", 1)
    stores = [_build(folder, cache=f"cache{n}", num_proc=n).folder for n in (1, 2)]
    names = sorted(path.name for path in stores[0].iterdir())
    assert "tokens.bin" in names
    for name in names:
        assert (stores[0] / name).read_bytes() == (stores[1] / name).read_bytes(), name


def test_share_of_samples_is_seeded_and_the_rest_is_counted(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(_row(f"{i}", "yes")) + "\n" for i in range(50)))
    store = _build(folder, max_samples=10)
    assert (len(store), store.meta["rows"], store.meta["sampled_out"]) == (10, 50, 40)
    assert _build(folder, cache="other", max_samples=10).lengths.tolist() == store.lengths.tolist()


def test_leftover_of_a_killed_preparation_is_no_store(folder: Path) -> None:
    store = _build(folder)
    leftover = store.folder.with_name(f".{store.folder.name}-dead")
    store.folder.rename(leftover)
    (leftover / "tokens.bin").write_bytes(b"half")
    again = _build(folder)
    assert again.folder == store.folder
    assert len(again) == 3


def test_malformed_row_leaves_no_store(folder: Path) -> None:
    with (folder / "rows.jsonl").open("a") as file:
        file.write("{oops\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:5: not JSON"):
        _build(folder)
    assert [path.name for path in (folder / "cache").iterdir() if path.is_dir()] == []


def test_samples_are_views_of_the_file(folder: Path) -> None:
    tokens, mask = _build(folder).sample(0)
    assert (tokens.dtype, mask.dtype) == (np.uint32, np.bool_)
    assert not tokens.flags.writeable
    assert not tokens.flags.owndata
