"""Losses by length band and source, in training and on held-out samples: transformers' own, whatever the ranks."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hbp_titan.config import load_config
from hbp_titan.data.prepare import open_stores
from hbp_titan.testing.local_ranks import run_distributed
from tests.reference import token_losses
from tests.runs import read_metrics, train
from tests.tiny_run import write_tiny_run

RANKS = (1, 4)


def _argv(folder: Path, ranks: int) -> list[str]:
    argv = write_tiny_run(folder, num_rows=30)
    rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    for name, share in (("train", rows[:15]), ("other", rows[15:]), ("held", rows[::3]), ("out", rows[1::3])):
        (folder / f"{name}.jsonl").write_text("".join(share))
    files = {key: ",".join(str(folder / f"{name}.jsonl") for name in names) for key, names in FILES.items()}
    # Without a learning rate all steps see the weights that are exported.
    argv += ["--optimizer.lr=0", "--validation.enable=true", f"--job.dump_folder={folder / f'run{ranks}'}"]
    argv.append(f"--metrics.report={ranks == 4}")
    argv += [f"--data.{key}={value}" for key, value in files.items()]
    # Batches come from the process itself, and from a worker.
    argv.append(f"--data.num_workers={int(ranks == 1)}")
    argv.append(f"--parallelism.cpu_offload={ranks == 4}")
    return [*argv, "--levels=128:1,512:1" if ranks == 1 else "--levels=128:1,512:4:hybrid"]


FILES = {"train_files": ("train", "other"), "validation_files": ("held", "out")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Folder with the run folders run1 and run4, and the arguments of the first."""
    folder = tmp_path_factory.mktemp("validation")
    for ranks in RANKS:
        run_distributed(train, ranks, _argv(folder, ranks))
    return folder, _argv(folder, 1)


def _groups(store: Any, model: Any) -> dict[str, dict[str, tuple[float, int]]]:
    """Sums of token losses and their number by band and source; each sample alone through transformers."""
    groups: dict[str, dict[str, tuple[float, int]]] = {"by_length": {}, "by_source": {}}
    for index in range(len(store)):
        tokens, mask = store.sample(index)
        with torch.no_grad():
            losses = token_losses(model, tokens, mask)
        band = str(max(256, 1 << (len(tokens) - 1).bit_length()))
        for kind, name in (("by_length", band), ("by_source", store.source_names[store.sources[index]])):
            total, number = groups[kind].get(name, (0.0, 0))
            groups[kind][name] = total + float(losses.sum()), number + len(losses)
    return groups


@pytest.mark.parametrize("ranks", RANKS)
def test_losses_by_group_in_validation_and_in_an_epoch_are_those_of_transformers(
    runs: tuple[Path, list[str]], ranks: int
) -> None:
    folder, argv = runs
    model = AutoModelForCausalLM.from_pretrained(folder / "run1" / "hf", attn_implementation="eager")
    trained, held_out = open_stores(load_config(argv), 512)[:2]
    lines = read_metrics(folder / f"run{ranks}")
    means = lines[-1]["validation"]
    for kind, expected in _groups(held_out, model).items():
        found = {
            name: (mean["loss"] * mean["trained_tokens"], mean["trained_tokens"]) for name, mean in means[kind].items()
        }
        assert found.keys() == expected.keys()
        assert len(found) == 2 if kind == "by_source" else len(found) > 1
        for name, (total, count) in expected.items():
            assert found[name] == (pytest.approx(total, rel=1e-5), count)
    whole = sum(total for total, _ in expected.values()) / means["trained_tokens"]
    assert means["loss"] == pytest.approx(whole, rel=1e-5)
    assert sum(mean["trained_tokens"] for mean in means["by_level"].values()) == means["trained_tokens"]
    # The weights never change, so the initial ones have the same loss; it is recorded once, before step 1.
    assert lines[0]["validation_at_start"] == means
    assert not [line["step"] for line in lines[1:] if "validation_at_start" in line]
    assert (folder / f"run{ranks}" / "report.html").exists() == (ranks == 4)

    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for line in lines:
        for kind, groups in (("by_length", line["loss_by_length"]), ("by_source", line["sources"])):
            for name, mean in groups.items():
                sums[kind, name][0] += mean["loss"] * mean["trained_tokens"]
                sums[kind, name][1] += mean["trained_tokens"]
    of_transformers = {
        (kind, name): [pytest.approx(total, rel=1e-5), count]
        for kind, groups in _groups(trained, model).items()
        for name, (total, count) in groups.items()
    }
    assert sums == of_transformers
