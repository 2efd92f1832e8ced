"""What must stay when a run goes on: every difference is named, with the mend; what may change is not compared."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hbp_titan.components.resume import check_resume_compatible, resume_invariants
from hbp_titan.config import load_config
from tests.tiny_run import ARGS

PATH = Path("run/checkpoint/step-4")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def _settings(tokenizer: Path, *words: str, data: str = "a" * 64, **changes: Any) -> dict[str, Any]:
    config = load_config([f"--model.tokenizer_path={tokenizer}", "--levels=128", *words])
    return resume_invariants(config, dataclasses.replace(ARGS, **changes), data)


def test_what_may_change_is_not_compared(tokenizer: Path) -> None:
    saved = json.loads(json.dumps(_settings(tokenizer)))
    changed = ["--levels=64,512:2", "--training.epochs=3", "--checkpoint.interval=7", "--compile.enable=true"]
    check_resume_compatible(saved, _settings(tokenizer, *changed), PATH)
    check_resume_compatible(saved, _settings(tokenizer, "--parallelism.dp_replicate=2", name="renamed"), PATH)


def test_every_difference_is_named_with_the_mend(tokenizer: Path) -> None:
    saved = _settings(tokenizer)
    words = [
        "--packing.seed=1",
        "--optimizer.lr=0.5",
        "--lr_scheduler.decay=linear",
        "--training.loss_normalization=sum",
    ]
    (tokenizer / "tokenizer.json").write_text("{ }")
    own = _settings(tokenizer, *words, data="b" * 64, num_layers=3)
    with pytest.raises(ValueError, match="cannot resume: run/checkpoint/step-4 is of a run with other") as error:
        check_resume_compatible(saved, own, PATH)
    for text in (
        "data is aaaaaaaaaaaaaaaa there but bbbbbbbbbbbbbbbb here",
        "tokenizer is ",
        "packing.seed is 42 there but 1 here",
        "optimizer.lr is 1e-05 there but 0.5 here",
        'lr_scheduler.decay is "cosine" there but "linear" here',
        'training.loss_normalization is "ave_token" there but "sum" here',
        "model.num_layers is 2 there but 3 here",
        "the largest level's max_tokens",
        "set them back, or name another --job.dump_folder",
    ):
        assert text in str(error.value)
    assert str(error.value).count(" there but ") == 7


def test_a_setting_that_one_side_lacks_is_a_difference(tokenizer: Path) -> None:
    saved = _settings(tokenizer)
    del saved["packing.level_order"]
    with pytest.raises(ValueError, match=r'packing.level_order is "not named" there but "alternate" here: set'):
        check_resume_compatible(saved, _settings(tokenizer), PATH)
