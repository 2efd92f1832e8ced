"""The comparison with other trainers: the audit of recorded tokens, the probes with negative controls, the protocol."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hbp_titan.experiments.peers import main
from hbp_titan.experiments.peers.audit import LEAK, Audit, Recording, Samples, audit
from hbp_titan.experiments.peers.normalization import WEIGHTS, Weighed, check, classify
from hbp_titan.experiments.peers.peers import PEERS, Launcher, failure, last_error, parse_peers, parse_pythons
from hbp_titan.experiments.peers.prepare import Inputs, prepare
from hbp_titan.experiments.peers.report import Outcome, table
from hbp_titan.experiments.peers.runners.protocol import IGNORE_INDEX, Request, Result
from hbp_titan.experiments.peers.runners.recording import Recorder, documents_of, replaced, whole_labels
from hbp_titan.experiments.peers.runners.run_transformers import first_fit_decreasing, steps_of
from tests.tiny_run import write_tiny_run

# Two samples: prompt of two tokens, then three and two trained ones.
A, B = [1, 2, 3, 4, 5], [6, 7, 8, 9]
A_LABELS, B_LABELS = [-100, -100, 3, 4, 5], [-100, -100, 8, 9]
ROWS = [{"input_ids": A, "labels": A_LABELS}, {"input_ids": B, "labels": B_LABELS}]
SAMPLES = Samples(ROWS)


def record(folder: Path, *batches: dict[str, Any], shifted: bool = False) -> Recording:
    """Record micro-batches, each an optimizer step, through the hook of a model."""
    recorder, model = Recorder(labels_shifted=shifted), nn.Identity()
    model.forward = lambda **arguments: None  # type: ignore[method-assign]
    recorder.attach(model)
    recorder.start()
    for batch in batches:
        model(**{name: torch.tensor(rows) for name, rows in batch.items()})
        recorder.end_step()
    recorder.save(folder, 0)
    return Recording(folder, SAMPLES)


PACKED = {"input_ids": [A + B], "labels": [A_LABELS + B_LABELS], "position_ids": [[0, 1, 2, 3, 4, 0, 1, 2, 3]]}
PADDED = {
    "input_ids": [A, [*B, 0]],
    "labels": [A_LABELS, [*B_LABELS, -100]],
    "attention_mask": [[1] * 5, [1, 1, 1, 1, 0]],
}


def _changed(batch: dict[str, Any], **other: Any) -> dict[str, Any]:
    return {name: value for name, value in {**batch, **other}.items() if value is not None}


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (PACKED, {"tokens": 9, "trained": 5, "padding": 0}),
        (PADDED, {"tokens": 9, "trained": 5, "padding": 1}),
        # A label on a first token is predicted from the sample before, but not in the first column of a row.
        (_changed(PACKED, labels=[[1, *A_LABELS[1:], 6, *B_LABELS[1:]]]), {"across": 1}),
        (_changed(PADDED, labels=[[1, *A_LABELS[1:]], [6, *B_LABELS[1:], -100]]), {}),
        (_changed(PACKED, labels=[[-100, 2, 3, 4, 5, *B_LABELS]]), {"extra_labels": 1, "other_masks": 1}),
        (_changed(PACKED, labels=[[-100, -100, 3, 4, -100, *B_LABELS]]), {"lost_labels": 1, "other_masks": 1}),
        (_changed(PACKED, labels=[[-100, -100, 4, 5, 5, *B_LABELS]]), {"wrong_labels": 2}),
        # Two samples that the peer declares as one document are found by their tokens.
        (_changed(PACKED, position_ids=None), {"tokens": 9, "missing": 0}),
        ({"input_ids": [B + A[:4]], "labels": [B_LABELS + A_LABELS[:4]]}, {"cut": 1, "missing": 1}),
        ({"input_ids": [[4, 5, *B]], "labels": [[4, 5, *B_LABELS]]}, {"unknown": 2, "missing": 1}),
        ({"input_ids": [B + B], "labels": [B_LABELS * 2], "position_ids": [[0, 1, 2, 3] * 2]},
         {"doubled": 1, "doubled_tokens": 4, "missing": 1}),
    ],
)  # fmt: skip
def test_audit_of_one_micro_batch(tmp_path: Path, batch: dict[str, Any], found: dict[str, int]) -> None:
    seen = audit(record(tmp_path, batch))
    assert {name: getattr(seen, name) for name in found} == found
    wrong = {"across", "extra_labels", "lost_labels", "wrong_labels", "cut", "unknown"} & set(found)
    assert seen.comparable(whole_epoch=False, max_doubled=0.5) == (not wrong)
    assert bool(seen.differences(whole_epoch=False)) == bool(wrong or "doubled" in found)


def test_shifted_labels_and_an_input_without_the_last_token_are_the_same_samples(tmp_path: Path) -> None:
    shifted = [-100, 3, 4, 5, -100, -100, 8, 9, -100]
    assert audit(record(tmp_path, _changed(PACKED, labels=[shifted]), shifted=True)).differences(True) == []
    short = {"input_ids": [A[:-1] + B[:-1]], "labels": [shifted[:4] + shifted[5:8]],
             "position_ids": [[0, 1, 2, 3, 0, 1, 2]]}  # fmt: skip
    assert audit(record(tmp_path, short, shifted=True)).differences(True) == []
    # The same labels, not shifted, are those of other tokens.
    assert audit(record(tmp_path, _changed(PACKED, labels=[shifted]))).wrong_labels == 5


def test_doubled_tokens_above_the_limit_and_missing_samples_are_not_comparable() -> None:
    assert Audit(tokens=100, doubled=1, doubled_tokens=10).comparable(True, 0.1)
    assert not Audit(tokens=100, doubled=1, doubled_tokens=11).comparable(True, 0.1)
    assert not Audit(tokens=100, missing=1).comparable(True, 0.1)
    assert Audit(tokens=100, missing=1).comparable(False, 0.1)


def test_duplicate_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="duplicates"):
        Samples([ROWS[0], ROWS[0]])


def test_documents_are_read_from_every_form_of_mask() -> None:
    ids = torch.zeros(1, 5)
    numbers = torch.tensor([[1, 1, 2, 2, 0]])
    same = (numbers[:, :, None] == numbers[:, None]) & (numbers != 0)[:, None]
    block = (same & torch.ones(5, 5, dtype=torch.bool).tril())[:, None]
    additive = torch.where(block, 0.0, -1e9)
    forms: list[dict[str, Tensor]] = [
        {"attention_mask": numbers},
        {"attention_mask": block},
        {"attention_mask": additive},
        {"attention_mask": torch.tensor([[1, 1, 1, 1, 0]]), "position_ids": torch.tensor([[0, 1, 0, 1, 0]])},
    ]
    for form in forms:
        assert documents_of({"input_ids": ids, **form}).tolist() == [[0, 0, 1, 1, -1]]
    ends = torch.tensor([0, 2, 5])
    assert documents_of({"input_ids": ids, "cu_seq_lens_q": ends}).tolist() == [[0, 0, 1, 1, 1]]
    assert documents_of({"input_ids": ids}).tolist() == [[0] * 5]


@pytest.mark.parametrize(
    ("kept", "labels"), [(3, [[-100, 8, 9]]), (torch.tensor([False, True, True, True]), [[-100, 8, 9]])]
)
def test_labels_of_the_kept_logits_are_those_of_the_next_tokens(kept: Any, labels: list[list[int]]) -> None:
    arguments = {"input_ids": torch.tensor([B]), "logits_to_keep": kept}
    assert whole_labels(torch.tensor(labels), arguments).tolist() == [B_LABELS]


class Averager(nn.Module):
    """Logits of a token: running mean of the embeddings of its row, or of its document only."""

    def __init__(self, across: bool) -> None:
        super().__init__()
        self.across, self.embedding = across, nn.Embedding(16, 16)

    def forward(self, input_ids: Tensor, position_ids: Tensor, **other: Any) -> Tensor:
        hidden_BTV = self.embedding(input_ids)
        documents_BT = documents_of({"input_ids": input_ids, "position_ids": position_ids})
        seen_BTT = torch.ones(input_ids.shape[1], input_ids.shape[1]).tril().expand(len(input_ids), -1, -1)
        if not self.across:
            seen_BTT = seen_BTT * (documents_BT[:, :, None] == documents_BT[:, None])
        return seen_BTT @ hidden_BTV / seen_BTT.sum(-1, keepdim=True)


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("declared", [True, False])
def test_probe_finds_attention_across_documents(tmp_path: Path, across: bool, declared: bool) -> None:
    torch.manual_seed(0)
    model, recorder = Averager(across), Recorder()
    recorder.attach(model)
    recorder.start()
    batch = {name: torch.tensor(rows) for name, rows in PACKED.items()}
    model(**batch)
    recorder.end_step()
    if not declared:
        # As a peer that packs without saying where documents end; they are found by their tokens.
        recorder._probe["document"][:] = 0
    recorder.probe(lambda arguments: model(**arguments), 2, 16)
    recorder.save(tmp_path, 0)
    leak = Recording(tmp_path, SAMPLES).leak()
    assert leak is not None
    assert (leak > LEAK) == across
    if not across:
        assert leak == 0


def test_probe_changes_the_first_tokens_of_the_first_row_only() -> None:
    ids = torch.tensor([A, A])
    assert replaced(ids, 2, 10).tolist() == [[6, 7, 3, 4, 5], A]


def _weighed(rank: int, micro_batch: int, trained: int) -> Weighed:
    piece = SimpleNamespace(trained=np.ones(trained, dtype=bool), tokens=np.zeros(trained + 1))
    return Weighed(piece, rank, micro_batch)  # type: ignore[arg-type]


def test_weights_of_each_normalization_by_hand() -> None:
    # Rank 0 has micro-batches of 1 + 3 and of 4 tokens, rank 1 has one of 2.
    documents = [_weighed(0, 0, 1), _weighed(0, 0, 3), _weighed(0, 1, 4), _weighed(1, 0, 2)]
    weights = {name: weigh(documents).tolist() for name, weigh in WEIGHTS.items()}
    assert weights["tokens"] == pytest.approx([0.1, 0.1, 0.1, 0.1])
    assert weights["micro-batch means"] == pytest.approx([1 / 16, 1 / 16, 1 / 16, 1 / 4])
    assert weights["rank means"] == pytest.approx([1 / 16, 1 / 16, 1 / 16, 1 / 4])
    assert weights["sample means"] == pytest.approx([1 / 4, 1 / 12, 1 / 16, 1 / 8])
    for values in weights.values():
        assert np.dot(values, [1, 3, 4, 2]) == pytest.approx(1)


def test_a_norm_is_named_by_the_reference_that_it_equals() -> None:
    norms = dict(zip(WEIGHTS, (1.0, 1.1, 1.2, 1.3), strict=True))
    assert classify(1.0001, norms.__getitem__, 5e-4).verdict == "mean over tokens"
    assert classify(1.1, norms.__getitem__, 5e-4).name == "micro-batch means"
    assert classify(1.05, norms.__getitem__, 5e-4).verdict == "none (-4.5% of micro-batch means)"


# The runner of plain transformers, run as the comparison runs it.


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Return a folder with a tiny model, and random samples of 6 to 60 tokens in train.jsonl."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("peers")
    write_tiny_run(folder, num_rows=4)
    torch.manual_seed(0)
    config = SimpleNamespace(**json.loads((folder / "model" / "config.json").read_text()))
    from transformers import LlamaConfig

    AutoModelForCausalLM.from_config(LlamaConfig(**vars(config))).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(12):
        tokens = rng.integers(5, 300, int(rng.integers(6, 60))).tolist()
        cut = 2 + number % 3
        rows.append({"input_ids": tokens, "labels": [IGNORE_INDEX] * cut + tokens[cut:]})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, rows


def _request(folder: Path, rows: list[dict[str, Any]], name: str) -> Request:
    lengths = [len(row["input_ids"]) for row in rows]
    return Request(
        peer=name, variant=dict(PEERS[name].variant), model=str(folder / "model"), train=str(folder / "train.jsonl"),
        output=str(folder / name), max_tokens=64, global_batch_tokens=200, mean_tokens=sum(lengths) / len(lengths),
        num_samples=len(rows), micro_batch_rows=2, steps=0, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8,
        weight_decay=0.01, max_norm=1.0, seed=0, device="cpu", dtype="float32", probe_tokens=4,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["transformers", "transformers_packed", "transformers_mean"])
def test_plain_loop_trains_each_sample_once_and_its_normalization_is_named(
    inputs: tuple[Path, list[dict[str, Any]]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hbp_titan.experiments.peers.runners import run_transformers
    from hbp_titan.experiments.peers.runners.protocol import read_request, read_result, write_request

    folder, rows = inputs
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    path = write_request(_request(folder, rows, name))
    run_transformers.main(read_request(path))
    recording, result = Recording(folder / name, Samples(rows)), read_result(folder / name)
    seen = audit(recording)
    assert seen.differences(whole_epoch=True) == []
    assert seen.leak == 0
    assert len(seen.per_step) == len(result.losses) == len(result.grad_norms) > 1
    assert result.grad_norms[0] is not None
    found = check(recording, result.grad_norms[0], folder / "model", torch.device("cpu"), "float32")
    assert found.name == ("micro-batch means" if name == "transformers_mean" else "tokens")
    # The same tokens with one label more have another gradient.
    piece = recording.rows[0].pieces[0]
    piece.trained[1] = not piece.trained[1]
    assert check(recording, result.grad_norms[0], folder / "model", torch.device("cpu"), "float32").name == ""


def test_every_rank_has_a_micro_batch_in_every_step() -> None:
    request = dataclasses.replace(_request(Path(), ROWS, "transformers"), micro_batch_rows=1, global_batch_tokens=18)
    # 7 micro-batches of one sample, 4 in a step: the last step would have 3, and 1 with 5 of them.
    for samples, sizes in ((7, [4, 3]), (5, [5])):
        steps = steps_of(dataclasses.replace(request, mean_tokens=4.5), [4] * samples, 2)
        assert [sum(len(rank) for rank in step) for step in steps] == sizes
        assert sorted(i for step in steps for rank in step for batch in rank for i in batch) == list(range(samples))
        assert all(rank for step in steps for rank in step)


def test_first_fit_decreasing_by_hand() -> None:
    assert first_fit_decreasing([3, 6, 4, 2], 8) == [[1, 3], [2, 0]]


# The command.


def _outcome(name: str, seconds: list[float], **wrong: int) -> Outcome:
    audits = [
        Audit(tokens=20, padding=5, per_step=[10, 10], seconds=[9.0, s], cpu_seconds=[9.0, 2.0], **wrong)
        for s in seconds
    ]  # type: ignore[arg-type]
    return Outcome(name, "", [Result() for _ in seconds], audits, [2.0 for _ in seconds])


def test_table_compares_within_a_round_and_refuses_other_tokens() -> None:
    # The machine was busier in the second round: the ratios are 2, 2 and 4.
    slow, fast = _outcome("transformers", [4.0, 8.0, 4.0]), _outcome("ours_hbp", [2.0, 4.0, 1.0])
    other = _outcome("trl", [1.0], other_masks=3, extra_labels=7)
    broken = Outcome("swift", "", [Result("unavailable", "no FlashAttention")])
    text = table([slow, fast, other, broken], whole_epoch=True, max_doubled=0.1)
    assert "| ours_hbp |  | 2.00 (2.00-4.00) | 1.00 (1.00-1.00) | 5 | 20.0% | 2 | 2.0000 | none |" in text
    assert "| trl |  | not comparable | - | - |" in text
    assert "3 samples with other masks; 7 labels too many (prompts)" in text
    assert "unavailable: no FlashAttention" in text
    with pytest.raises(ValueError, match="nothing to compare"):
        table([other], whole_epoch=True, max_doubled=0.1)


@pytest.mark.parametrize("text", ["trl,ours_hpb", "trl,trl", ""])
def test_peers_are_known_and_different(text: str) -> None:
    with pytest.raises(ValueError, match="--peers"):
        parse_peers(text)


@pytest.mark.parametrize("entry", ["trll=/bin/sh", "trl=/no/such/python"])
def test_pythons_are_of_known_peers_and_executable(entry: str) -> None:
    with pytest.raises(ValueError, match="--python"):
        parse_pythons([entry])


@pytest.mark.parametrize("option", ["nproc", "rounds", "max_tokens"])
def test_counts_below_one_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=option):
        main([f"--{option}=0"])


def test_a_failed_run_is_a_result_with_its_error(tmp_path: Path) -> None:
    log = "Traceback:\n  x\n[rank0]: ValueError: no such file\ntorch.distributed...ChildFailedError: 1\n  exitcode: 1"
    assert last_error(log) == "[rank0]: ValueError: no such file"
    launcher = Launcher(tmp_path, 1, {"trl": "/bin/false"}, 1, 60)
    result = launcher.run(PEERS["trl"], _request(tmp_path, ROWS, "trl"))
    assert (result.status, "log.txt" in result.reason) == ("failed", True)
    missing = failure(PEERS["trl"], "[rank1]: ModuleNotFoundError: No module named 'trl'", tmp_path)
    assert (missing.status, "--python trl=" in missing.reason) == ("unavailable", True)


@pytest.fixture(scope="module")
def prepared(inputs: tuple[Path, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Return what prepare writes for the tiny model and 40 chat rows, of which the longest are over 128 tokens."""
    folder = tmp_path_factory.mktemp("prepared")
    write_tiny_run(folder, num_rows=40)
    (folder / "held_out.jsonl").write_text((folder / "train.jsonl").read_text())
    data, held_out = [str(folder / "train.jsonl")], [str(folder / "held_out.jsonl")]
    return prepare(folder, str(inputs[0] / "model"), data, held_out, 128, samples=0, multiple=4, seed=0)


def test_prepared_samples_fit_and_come_with_their_messages(prepared: Inputs) -> None:
    rows = [json.loads(line) for line in prepared.train.read_text().splitlines()]
    assert len(rows) == len(prepared.lengths) > 0
    assert len(rows) % 4 == 0
    assert max(map(len, (row["input_ids"] for row in rows))) <= 128
    assert prepared.left_out["over max_tokens"] >= 2
    for row in rows:
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        # The answer is trained, the question is not.
        labels = row["labels"]
        assert labels[0] == IGNORE_INDEX
        assert any(label != IGNORE_INDEX for label in labels)
        assert all(label in (IGNORE_INDEX, token) for label, token in zip(labels, row["input_ids"], strict=True))


@pytest.mark.parametrize(
    ("data", "held_out", "code", "key"),
    [
        (["x.jsonl"], [], False, "held_out"),
        ([], [], True, "code"),
        (["train.jsonl"], ["train.jsonl"], False, "at least 1000"),
    ],
)
def test_prepare_refuses_what_it_cannot_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: list[str], held_out: list[str], code: bool, key: str
) -> None:
    write_tiny_run(tmp_path, num_rows=15)
    if code:
        (tmp_path / "model" / "modeling_own.py").write_text("")
    monkeypatch.setattr("hbp_titan.experiments.peers.prepare.ensure_stdlib_corpus", lambda folder: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=key):
        prepare(tmp_path, "model", data, held_out, 128, samples=0, multiple=1000, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ours_flat", "ours_hbp"])
def test_our_trainer_trains_what_it_is_given(prepared: Inputs, tmp_path: Path, name: str) -> None:
    rows = [json.loads(line) for line in prepared.train.read_text().splitlines()]
    levels = "64:1,128:2" if name == "ours_hbp" else "128:1"
    request = dataclasses.replace(
        _request(tmp_path, rows, name), model=str(prepared.model), train=str(prepared.train), max_tokens=128,
        variant={**PEERS[name].variant, "levels": levels},
    )  # fmt: skip
    result = Launcher(tmp_path, 2, {}, 1, 600).run(PEERS[name], request)
    assert result.status == "ok", result.reason
    recording = Recording(request.folder, Samples(rows))
    seen = audit(recording)
    assert seen.differences(whole_epoch=True) == []
    assert seen.leak == 0
    assert result.grad_norms[0] is not None
    assert check(recording, result.grad_norms[0], prepared.model, torch.device("cpu"), "float32").name == "tokens"


@pytest.mark.slow
@pytest.mark.parametrize(("peer", "package"), [("trl", "trl"), ("llamafactory", "llamafactory"), ("swift", "ms-swift")])
def test_installed_peer_trains_what_it_is_given(
    inputs: tuple[Path, list[dict[str, Any]]], peer: str, package: str
) -> None:
    pytest.importorskip(
        peer,
        reason=f"needs {peer}; run: .venv/bin/pip install {package} && scripts/run_tests.sh -m slow tests/experiments",
    )
    folder, rows = inputs
    launcher = Launcher(folder, 2, {peer: sys.executable}, 1, 600)
    launcher.copy_runners()
    result = launcher.run(PEERS[peer], _request(folder, rows, peer))
    assert result.status in ("ok", "unavailable"), result.reason
    if result.status == "ok":
        assert audit(Recording(folder / peer, Samples(rows))).comparable(whole_epoch=True, max_doubled=0.5)
