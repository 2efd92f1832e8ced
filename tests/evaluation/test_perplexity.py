"""Perplexity against transformers run document by document, and the bands' exact sums."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hbp_titan.data.token_store import TokenStore
from hbp_titan.evaluation.perplexity import as_json, evaluate, open_data, perplexity_table
from hbp_titan.models.decoder import Decoder
from tests.data.preparing import byte_tokenizer, line, write
from tests.models.test_decoder import build_pair, tiny_args
from tests.reference import token_losses

ROWS = [("q" * 5, "a" * 5), ("what" * 20, "so" * 18), ("x" * 280, "yz"), ("", "w" * 499), ("long " * 250, "end " * 62)]


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    byte_tokenizer(tmp_path / "hf")
    write(tmp_path / "d.jsonl", *(line(q, a, source=f"s{i % 2}") for i, (q, a) in enumerate(ROWS)))
    return open_data(tmp_path / "d.jsonl", tmp_path / "hf", 4096, tmp_path / "cache", 0, "error")


def one_by_one(theirs: torch.nn.Module, store: TokenStore) -> list[tuple[int, int, int, float]]:
    """Return (sample, its length, position from 1, loss) of each trained token, computed by transformers."""
    found = []
    for index in range(len(store)):
        ids, mask = store.sample(index)
        with torch.no_grad():
            losses = token_losses(theirs, ids, mask)
        positions = np.flatnonzero(mask[1:]) + 2
        found += [(index, len(ids), int(at), float(loss)) for at, loss in zip(positions, losses, strict=True)]
    return found


@pytest.mark.parametrize("pack_tokens", [1, 2000, 100_000])
def test_losses_equal_transformers_document_by_document(store: TokenStore, pack_tokens: int) -> None:
    ours, theirs = build_pair(tiny_args("llama", 3, 1, tied=False, vocab_size=260), 0)
    expected = one_by_one(theirs, store)
    means = evaluate(ours, store, pack_tokens)
    assert means["all"]["all"][1] == len(expected) == int(store.loss_tokens.sum())
    for kind, of in (("all", None), ("length", 1), ("position", 2)):
        for name, (total, count) in means[kind].items():
            low = 0 if name in ("all", 256) else int(name) // 2
            high = 10**9 if name == "all" else int(name)
            inside = [row[3] for row in expected if of is None or low < row[of] <= high]
            assert count == len(inside), (kind, name)
            assert total == pytest.approx(sum(inside), rel=1e-5)
    assert sum(count for _, count in means["position"].values()) == len(expected)
    assert set(means["length"]) == {256, 512, 1024, 2048}
    by_source = [sum(row[3] for row in expected if store.sources[row[0]] == number) for number in (0, 1)]
    assert [means["source"][name][0] for name in store.source_names] == pytest.approx(by_source, rel=1e-5)


def test_table_and_json_show_mean_and_perplexity() -> None:
    means = {
        "all": {"all": (math.log(8) * 4, 4)},
        "length": {256: (0.0, 1), 1024: (math.log(16) * 3, 3)},
        "position": {256: (math.log(8) * 4, 4)},
        "source": {"one": (math.log(8) * 4, 4)},
    }
    assert perplexity_table(means).splitlines() == [
        "                             trained tokens      loss  perplexity",
        "all                                       4    2.0794       8.000",
        "document of 1 to 256                      1    0.0000       1.000",
        "document of 513 to 1K                     3    2.7726      16.000",
        "token 1 to 256                            4    2.0794       8.000",
    ]
    assert as_json(means)["length"][1] == {
        "group": 1024,
        "trained_tokens": 3,
        "loss": math.log(16),
        "perplexity": pytest.approx(16),
    }


def test_prepared_set_opens_and_larger_vocabulary_raises(store: TokenStore, tmp_path: Path) -> None:
    again = open_data(store.folder, tmp_path / "elsewhere", 1, tmp_path, 0, "error")
    assert again.fingerprint == store.fingerprint
    model = Decoder(tiny_args("llama", 3, 1, tied=True))
    with pytest.raises(ValueError, match="259"):
        evaluate(model, store)


def test_sample_above_the_models_limit_raises_with_its_row(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path / "hf")
    file = write(tmp_path / "d.jsonl", line("q", "a"), line("q" * 90, "a"))
    with pytest.raises(ValueError, match=r"d\.jsonl:2: .*112 tokens"):
        open_data(file, tmp_path / "hf", 64, tmp_path / "cache", 0, "error")
    assert len(open_data(file, tmp_path / "hf", 64, tmp_path / "cache", 0, "skip")) == 1
