"""hbp-titan init: what it writes is accepted by the configuration, the preflight and the dry run, and says why."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.config import load_config
from hbp_titan.errors import UserError
from hbp_titan.models.hf import MissingWeights
from hbp_titan.models.hf_config import args_from_hf, args_to_hf_config
from hbp_titan.models.hf_families import FAMILIES
from hbp_titan.preflight import check
from hbp_titan.tuning.dry_run import dry_run
from hbp_titan.tuning.hardware import HARDWARE
from hbp_titan.tuning.init_config import Draft, FirstConfig, Request, configure, rounded_down
from hbp_titan.tuning.init_levels import Machine, holds
from hbp_titan.tuning.init_toml import commands, report, toml_text
from hbp_titan.tuning.sample_lengths import DataLengths
from scripts.init import main
from tests.models.families import MIXED, YARN, dense
from tests.models.test_published_configs import PUBLISHED
from tests.properties import examples
from tests.tiny_run import ARGS, write_tiny_run

SHARES = {"short": 0.0, "few long": 0.01, "70% long": 0.7}
TINY_GPU = dataclasses.replace(HARDWARE["h100-80gb"], name="tiny", memory_bytes=40 << 20, host_memory_bytes=8 << 20)
WIDE = dataclasses.replace(ARGS, hidden_size=256, intermediate_size=1024, num_layers=8)
FEWEST = r"--gpus (\d+) is the smallest"
# Families without a published configuration in the fixture, at the size of one.
SIZE = {"hidden_size": 4096, "intermediate_size": 12288, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
OTHERS = {
    "ministral": dense("ministral", layer_types=MIXED, sliding_window=4096, **SIZE),
    "olmo3": dense("olmo3", layer_types=MIXED, sliding_window=4096, sliding_rope_theta=1e4, rope_scaling=YARN, **SIZE),
}


def _data(share: float, longest: int, rows: int = 1000) -> DataLengths:
    """Return lengths of a mixture in which `share` of the samples have a quarter to all of `longest` tokens."""
    random = np.random.default_rng(0)
    short = np.clip(random.lognormal(6, 0.8, rows), 16, longest // 8).astype(np.int64)
    lengths = np.where(random.random(rows) < share, random.integers(longest // 4, longest, rows), short)
    return DataLengths(lengths, lengths - 1, rows, rows, rows, 0, {})


def _configure(folder: Path, data: DataLengths, gpus: int, gpu: str = "h100-80gb", **options: Any) -> FirstConfig:
    """Return the configuration for the model in `folder`, after a round trip through its file."""
    hardware = options.pop("hardware", None)
    request = Request(folder, ["a.jsonl"], gpus, gpu, folder / "X.toml", force=True, **options)
    draft, args = Draft.start(request), args_from_hf(folder)
    first = configure(request, draft, args, data, hardware or request.hardware())
    request.output.write_text(toml_text(first))
    read = load_config(["--job.config_file", str(request.output)])
    read.job.config_file = ""
    assert read == draft.config
    # The dry run of `configure` was of the same configuration but for intervals and rates.
    with contextlib.suppress(MissingWeights):  # the last thing that is checked
        check(read, gpus, torch.device("cuda"), args)
    first.found.check_memory()
    return first


def _write_config(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_config(tmp_path_factory.mktemp("tiny"), args_to_hf_config(ARGS))


@given(gpus=st.sampled_from([1, 6, 64]), share=st.sampled_from(list(SHARES.values())), lora=st.booleans())
@examples(3)
def test_written_file_passes_preflight_and_dry_run(tiny: Path, gpus: int, share: float, lora: bool) -> None:
    first = _configure(tiny, _data(share, 1000), gpus, lora=lora)
    assert first.found.config.levels[-1].max_tokens >= first.samples.lengths.max()


def _real_models() -> dict[str, dict[str, Any]]:
    """Return the last published configuration of each family, which is its largest or newest, by model_type."""
    found = {values["model_type"]: values for values in PUBLISHED.values()}
    return found | {name: args_to_hf_config(args) for name, args in OTHERS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_any_number_of_gpus(tmp_path_factory: pytest.TempPathFactory, family: str) -> None:
    folder = _write_config(tmp_path_factory.mktemp(family), _real_models()[family])

    @given(
        gpus=st.sampled_from([1, 2, 3, 8, 24, 64]),
        gpu=st.sampled_from(["h100-80gb", "rtx4090-24gb"]),
        share=st.sampled_from(list(SHARES.values())),
        lora=st.booleans(),
        goal=st.sampled_from(["fast", "memory"]),
    )
    @examples(6)
    def fits(gpus: int, gpu: str, share: float, lora: bool, goal: str) -> None:
        data = _data(share, 120_000)
        try:
            _configure(folder, data, gpus, gpu, lora=lora, goal=goal)
        except UserError as error:
            found = re.search(FEWEST, str(error))
            assert found is None or int(found[1]) > gpus
            if found and int(found[1]) <= 64:
                _configure(folder, data, int(found[1]), gpu, lora=lora, goal=goal)

    fits()


@pytest.mark.parametrize(
    ("mebibytes", "given", "optimizer", "offloaded"),
    [
        (160, [], "adamw", False),
        # 6.6M parameters: moments of 8 bits save 38 MiB.
        (100, [], "adamw8bit", False),
        (100, ["--optimizer.name", "adamw"], "adamw", True),
        (80, [], "adamw", True),
    ],
)
def test_memory_settings_come_in_order_and_leave_given_keys(
    tiny: Path, mebibytes: int, given: list[str], optimizer: str, offloaded: bool
) -> None:
    folder = _write_config(tiny.parent / "wide", args_to_hf_config(WIDE))
    gpu = dataclasses.replace(TINY_GPU, memory_bytes=mebibytes << 20, host_memory_bytes=64 << 30)
    found = _configure(folder, _data(0.0, 1000), 1, hardware=gpu, overrides=given).draft.config
    assert (found.optimizer.name, found.parallelism.cpu_offload) == (optimizer, offloaded)


def test_model_that_does_not_fit_gets_the_smallest_number_of_gpus_that_holds_it(tiny: Path) -> None:
    folder = _write_config(tiny.parent / "wide", args_to_hf_config(WIDE))
    data = _data(0.3, 1000)
    with pytest.raises(UserError, match="--gpus 1: ") as caught:
        _configure(folder, data, 1, hardware=TINY_GPU)
    fewest, adapters = (int(re.search(words, str(caught.value))[1]) for words in (FEWEST, r"--lora needs (\d+)"))  # type: ignore[index]
    assert 1 < adapters < fewest
    _configure(folder, data, fewest, hardware=TINY_GPU)
    config, args, longest = load_config([]), args_from_hf(folder), data.lengths.max(keepdims=True)
    assert not holds(config, args, Machine.of(TINY_GPU, fewest - 1), longest)
    config.lora.rank = 16
    assert [holds(config, args, Machine.of(TINY_GPU, adapters - k), longest) for k in (0, 1)] == [True, False]


def test_choices_follow_the_data_and_the_command_line(tiny: Path) -> None:
    first = _configure(tiny, _data(0.01, 1000, 100), 2, overrides=["--optimizer.lr=3e-5", "--job.dump_folder=runs/a"])
    config = first.draft.config
    assert (config.optimizer.lr, config.job.dump_folder, config.training.epochs) == (3e-5, "runs/a", 3)
    assert not config.validation.enable  # of 100 rows nothing is held out
    text = toml_text(first)
    assert f"longest {first.data.lengths.max():,}" in text
    assert re.search(r"# Given on the command line\.\nlr = 3e-05", text)
    first = _configure(tiny, _data(0.7, 8000), 2, lora=True)
    config = first.draft.config
    # The model has 1024 positions.
    assert (config.data.max_length_policy, config.levels[-1].max_tokens) == ("truncate", 1024)
    assert (config.lora.rank, config.optimizer.lr) == (16, 2e-4)
    assert (config.validation.share, config.checkpoint.interval) == (0.05, rounded_down(first.found.total_steps // 2))
    assert "all samples have more than" not in report(first)


def test_few_long_samples_do_not_make_every_step_large(tiny: Path) -> None:
    # 150 tokens each, and one of 1000: a micro-batch of the long level on 64 ranks has 64K tokens or more.
    lengths = np.array([150] * 4000 + [1000])
    first = _configure(tiny, DataLengths(lengths, lengths - 1, 4001, 4001, 4001, 0, {}), 64)
    levels = first.draft.config.levels
    assert [levels[0].max_tokens < 1000, levels[-1].max_tokens >= 1000] == [True, True]
    assert first.draft.config.training.global_batch_tokens < 64 * 1000


def test_commands_name_nodes_and_gpu(tiny: Path) -> None:
    request = Request(tiny, ["a"], 32, "h200-141gb", Path("X.toml"))
    (_, check), (_, start) = commands(request, on_cpu=False)
    for word in ("NNODES=4", "NGPU=8", "GPU=h200-141gb", "COMM_MODE=fake"):
        assert word in check
    assert "RDZV_ENDPOINT=" in start


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--gpu=h100"], "h100-80gb?"),
        (["--gpus=12"], "gpus_per_node"),
        (["--gpus=0"], "--gpus 0"),
        (["--model=nowhere"], "--model"),
        (["--data=nowhere.jsonl"], "nowhere.jsonl"),
        (["--data=empty.jsonl"], "no file has rows"),
        (["--data=image.png"], "image.png"),
        (["--output=there.toml"], "--force"),
        (["--output=X.json"], ".toml"),
        (["--data.train_files=a.jsonl"], "--data"),
        (["--model.backend=transformers"], "transformers"),
        (["--optimizer.lrr=1"], "optimizer.lr"),
    ],
)
def test_bad_input_is_one_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    _write_config(tmp_path / "model", {**args_to_hf_config(ARGS), "model_type": "llama"})
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    for name in ("empty.jsonl", "there.toml", "image.png"):
        (tmp_path / name).touch()
    options = ["--model=model", "--data=empty.jsonl", "--gpus=2", "--gpu=h100-80gb", "--output=X.toml", *words]
    with pytest.raises((ValueError, OSError)) as caught:
        main(options)
    assert key in str(caught.value)
    assert not (tmp_path / "X.toml").exists()


def test_command_reads_data_and_writes_a_file_that_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    main(["--model", "model", "--data", "train.jsonl", "--gpus", "2", "--gpu", "cpu", "--output", "X.toml"])
    printed = capsys.readouterr().out
    assert "60 of 60 rows" in printed
    assert "NGPU=2" in printed
    config = load_config(["--job.config_file", "X.toml"])
    # From any folder, as run_train.sh changes to its own.
    assert config.data.train_files == [str(tmp_path / "train.jsonl")]
    found = dry_run(config, 2, HARDWARE["h100-80gb"])
    assert found.samples.origin == "your data: 60 samples"
    assert found.total_steps == int(re.search(r"estimate: (\d+) steps", printed)[1])  # type: ignore[index]
