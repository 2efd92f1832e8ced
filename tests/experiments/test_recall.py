"""The recall task: documents, faults and tables by hand; a small run learns, and its faults do not (slow)."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbp_titan.config import load_config
from hbp_titan.data.batch import PackedBatch, make_batch, shard_batch
from hbp_titan.data.prepare import open_stores
from hbp_titan.experiments.recall.__main__ import main
from hbp_titan.experiments.recall.documents import (
    KEYS,
    VALUES,
    WORDS,
    Answer,
    answers_in,
    document,
    first_word_id,
    mixed_lengths,
    write_documents,
    write_tokenizer,
)
from hbp_titan.experiments.recall.report import accuracy, columns_of, distance_table, draw, fault_table
from hbp_titan.experiments.recall.runs import attention_within_shards, train_and_score, write_run
from hbp_titan.models.documents import Documents
from hbp_titan.packing import Level


def _ids(text: str, first: int = 100) -> np.ndarray:
    return np.array([first + WORDS.index(word) if word in WORDS else 0 for word in text.split()])


def test_answers_are_the_last_value_written_for_the_key() -> None:
    tokens = _ids("start <w0> <k3=v1> <k5=v2> <w1> <k3=v4> <w2> <k5?> <v2> end start <k3?> <v4> end")
    assert answers_in(tokens, 100) == [Answer(7, 3, False), Answer(11, 5, True)]
    assert answers_in(_ids("some other text"), 100) == []
    with pytest.raises(AssertionError, match="answer"):
        answers_in(_ids("<k3=v1> <k3?> <v2>"), 100)


def test_documents_are_exactly_as_long_as_asked_and_hold_every_answer_once(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    lengths = [16, 64, 300, 1000]
    assert write_tokenizer(folder) > len(WORDS)
    write_documents(tmp_path / "rows.jsonl", lengths, seed=1)
    config = load_config(
        [
            f"--model.tokenizer_path={folder}",
            f"--data.train_files={tmp_path / 'rows.jsonl'}",
            f"--data.cache_folder={tmp_path / 'cache'}",
            "--data.num_proc=1",
        ]
    )
    (store,) = open_stores(config, 1000)
    assert store.lengths.tolist() == lengths
    first = first_word_id(folder)
    for index, length in enumerate(lengths):
        tokens, mask = store.sample(index)
        places = [answer.place for answer in answers_in(tokens, first)]
        assert len(places) == min(KEYS, length // 8)
        # A value and the end of its turn are trained, nothing else.
        assert np.flatnonzero(mask).tolist() == sorted([p + 1 for p in places] + [p + 2 for p in places])


def test_values_are_drawn_anew_and_uniform() -> None:
    generator = np.random.default_rng(0)
    answers: dict[str, list[str]] = {}
    for _ in range(400):
        turns = document(generator, 80, KEYS, 0.5)["messages"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            answers.setdefault(question["content"][-5:], []).append(answer["content"])
    assert len(answers) == KEYS
    for values in answers.values():
        # Guessing the commonest value of a key is right in 1 of 16 cases, with a deviation of 1.2%.
        assert max(values.count(value) for value in set(values)) / len(values) < 1 / VALUES + 0.07


def test_mixed_lengths_fill_each_level() -> None:
    lengths = mixed_lengths(np.random.default_rng(0), (64, 256), (30, 20))
    assert [((lengths >= 16) & (lengths <= 64)).sum(), ((lengths > 64) & (lengths <= 256)).sum()] == [30, 20]


class _Rows:
    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.arange([5, 3][index]), np.ones([5, 3][index], dtype=bool)


def _ends(batch: PackedBatch) -> list[int]:
    assert isinstance(batch.documents, Documents)
    return batch.documents.whole.cu_seqlens_q.tolist()


def test_cp_fault_cuts_documents_at_shards() -> None:
    # 8 tokens on 2 ranks: the document of 5 tokens begins on the first and ends on the second.
    batch = shard_batch(make_batch(_Rows(), [0, 1], Level(8, 2), 0, 2), 1, 2)
    assert (_ends(batch), _ends(attention_within_shards(batch))) == ([0, 5, 8], [0, 4, 5, 8])
    whole = make_batch(_Rows(), [0, 1], Level(8), 0, 2)
    assert _ends(attention_within_shards(whole)) == [0, 5, 8]
    gathered = shard_batch(make_batch(_Rows(), [0, 1], Level(8, 2, "allgather"), 0, 2), 0, 2, 2)
    with pytest.raises(ValueError, match="ulysses"):
        attention_within_shards(gathered)


def _scores(correct: float, count: int, **fields: Any) -> dict[str, list[Any]]:
    values = {"level": 0, "distance": 40, "ranks_away": 0, "documents_before": 0, "rewritten": False, **fields}
    hits = round(correct * count)
    return {
        **{name: [value] * count for name, value in values.items()},
        "correct": [True] * hits + [False] * (count - hits),
    }


def _outcome() -> dict[str, Any]:
    parts = [
        _scores(1.0, 20),
        _scores(0.5, 20, level=1, distance=100, documents_before=1),
        _scores(0.25, 40, level=1, distance=300, ranks_away=1),
        # Not in the distances' table.
        _scores(9 / 11, 11, level=1, distance=300, ranks_away=1, rewritten=True),
        # Too few for a cell.
        _scores(0.0, 9, level=1, distance=3000, ranks_away=2),
    ]
    joined = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    return {"levels": ["256/cp1", "512/cp2"], "shards": [256, 256], "packed": joined, "alone": joined}


def test_tables_by_hand() -> None:
    rows = distance_table(_outcome()).splitlines()
    assert (
        rows[0]
        == "| tokens between value and question | 256/cp1 (shard 256) | 512/cp2 (shard 256) | alone, all levels |"
    )
    assert rows[2:6] == [
        "| 1 to 64 | 100% |  | 100% |",
        "| 65 to 128 |  | 50% | 50% |",
        "| 129 to 256 |  |  |  |",
        "| 257 to 512 |  | 25%* | 25% |",
    ]
    # Right: 20 + 10 + 10 + 9 of 100; of 40 on the question's rank 30; of 69 that are first in their pack 30.
    row = fault_table({"cp": _outcome()}).splitlines()[2]
    assert row == "| shards see only themselves | 49% | 75% | 25% |  | 43% | 50% | 82% | 49% |"


def test_heat_map_frames_what_is_beyond_a_shard() -> None:
    root = ET.fromstring(draw({"sound": _outcome(), "cp": _outcome()}))
    cells = [node for node in root.iter("{http://www.w3.org/2000/svg}rect") if len(node)]
    framed = [cell for cell in cells if cell.attrib["stroke"] == "var(--ink)"]
    # In each of two panels three cells, one of which is beyond a shard, and one of keys written twice.
    assert (len(cells), len(framed)) == (8, 4)
    assert ["".join(cell.itertext()) for cell in framed[:2]] == ["40 answers", "11 answers"]


@pytest.mark.parametrize("words", [["--faults", "masks"], ["--ranks", "0"]])
def test_mistakes_raise_before_training(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(words[1])):
        main([*words, "--folder", str(tmp_path / "recall")])
    assert not (tmp_path / "recall").exists()


@pytest.mark.slow
def test_values_on_another_rank_are_recalled_and_faults_break_it(tmp_path: Path) -> None:
    levels = (Level(256), Level(512, 2, ac_policy="full"))
    write_run(tmp_path, levels, {"train": (4000, 300), "held_out": (60, 60)})
    found = {}
    for fault in ("sound", "mask", "cp"):
        outcome = train_and_score(tmp_path, [], fault, 2)
        columns = columns_of(outcome["packed"])
        parts = {
            "near": columns["ranks_away"] == 0,
            "far": columns["ranks_away"] == 1,
            "after others": columns["documents_before"] > 1,
        }
        found[fault] = {name: accuracy(columns, chosen)[0] for name, chosen in parts.items()}
        if fault == "sound":
            # One process, one document at a time: the same model gives the same answers.
            alone = np.mean(outcome["alone"]["correct"])
            assert alone == pytest.approx(np.mean(outcome["packed"]["correct"]), abs=0.01)
    assert min(found["sound"].values()) > 0.5, found
    # Chance is 1 / 16; a document after two others has three values to choose from.
    assert found["cp"]["far"] < 0.2 < 0.5 < found["cp"]["near"], found
    assert found["mask"]["after others"] < found["sound"]["after others"] - 0.2, found
