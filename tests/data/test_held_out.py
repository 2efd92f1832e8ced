"""validation.share: what is held out is never trained, and what decides is the content of a row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hbp_titan.config import load_config
from hbp_titan.data.build_set import held_out
from hbp_titan.data.prepare import open_stores
from hbp_titan.data.store_summary import check_totals
from hbp_titan.data.token_store import TokenStore
from tests.tiny_run import write_tiny_run


def _stores(folder: Path, *words: str) -> list[TokenStore]:
    return open_stores(load_config([*write_tiny_run(folder, num_rows=200), *words]), 512)


def _texts(store: TokenStore) -> list[bytes]:
    return [store.sample(index)[0].tobytes() for index in range(len(store))]


def test_training_and_held_out_samples_are_all_and_apart(tmp_path: Path) -> None:
    (whole,) = _stores(tmp_path)
    trained, held = _stores(tmp_path, "--validation.share=0.25")
    assert sorted(_texts(trained) + _texts(held)) == sorted(_texts(whole))
    # Four standard deviations of 200 rows.
    assert 25 <= len(held) <= 75
    for store, reason, samples in ((trained, "held out", len(held)), (held, "not held out", len(trained))):
        assert store.totals()[reason] == samples
        assert check_totals(store.totals(), len(store))[1] == []
    again, fewer = _stores(tmp_path, "--validation.share=0.25", "--validation.max_samples=10")
    assert _texts(again) == _texts(trained)
    assert len(fewer) == 10
    assert set(_texts(fewer)) <= set(_texts(held))
    other = _stores(tmp_path, "--validation.share=0.25", "--data.seed=1")[1]
    assert sorted(_texts(other)) != sorted(_texts(held))


def test_copies_of_a_row_and_pieces_of_it_are_on_its_side(tmp_path: Path) -> None:
    argv = write_tiny_run(tmp_path, num_rows=100)
    rows = (tmp_path / "train.jsonl").read_text().splitlines()
    # Every row is there twice; a third file has them as one long conversation each, in a thousand tokens or more.
    long = [{"messages": json.loads(row)["messages"] * 30} for row in rows[:60]]
    (tmp_path / "train.jsonl").write_text("\n".join([*rows, *rows[::-1]]) + "\n")
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    files = f"{tmp_path / 'train.jsonl'},{tmp_path / 'long.jsonl'}"
    argv += [f"--data.train_files={files}", "--data.max_length_policy=split", "--validation.share=0.3", "--levels=64"]
    trained, held = open_stores(load_config(argv), 64)
    lines = [{store.where(index) for index in range(len(store))} for store in (trained, held)]
    assert lines[0] & lines[1] == set()
    assert len(held) > len(lines[1]) + 20, "no row was split"
    # A row and its copy train the same tokens, whole or in pieces: they are on one side.
    own = [{s.sample(i)[0].tobytes() for i in range(len(s)) if "train.jsonl" in s.where(i)} for s in (trained, held)]
    assert own[0].isdisjoint(own[1])
    assert min(map(len, own)) > 10


def test_the_side_of_a_row_hangs_on_nothing_but_its_content_and_the_seed() -> None:
    digests = np.frombuffer(np.random.default_rng(0).bytes(16 * 10000), "V16")
    rows = np.arange(10000)
    held = held_out(digests, rows, 0.1, 7)
    # Five standard deviations of 10,000 draws.
    assert abs(held.sum() - 1000) < 150
    order = np.random.default_rng(1).permutation(10000)
    assert (held_out(digests[order], rows, 0.1, 7) == held[order]).all()
    # A larger share holds out what a smaller one does.
    assert held_out(digests, rows, 0.2, 7)[held].all()
    assert (held_out(digests, rows, 0.1, 8) & held).sum() < 200
    # Three samples of a row follow its first.
    assert (held[:9999:3] == held_out(digests, rows // 3, 0.1, 7)[:9999].reshape(-1, 3).T).all()
    assert held_out(digests[:0], rows[:0], 0.5, 0).tolist() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--validation.share=1"], "validation.share = 1.0 must be below 1"),
        (["--validation.share=0.1", "--data.validation_files=x.jsonl"], "comes from one of the two"),
        (["--validation.enable=true"], "nothing is held out: name data.validation_files, or set validation.share"),
        (["--validation.share=1e-9"], "leaves no sample to hold out of 200"),
        (["--validation.share=0.999999999"], "leaves no sample to train on of 200"),
    ],
)
def test_a_share_that_cannot_be_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _stores(tmp_path, *words)
