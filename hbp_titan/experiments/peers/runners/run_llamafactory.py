"""LLaMA-Factory's SFT stage, with its own packing, on samples that are tokenized already.

Variants: packing "neat" (neat_packing: whole samples by its knapsack, a block mask), "packing" (the same without the
mask: documents attend to each other), or "" (padded). Its data pipeline reads chat rows that hold a sample's number;
the step that would tokenize them returns the tokens and labels of that sample. Everything after it is its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from llamafactory.data.processor import supervised
from llamafactory.train.tuner import run_exp

from .hf_trainer import RecordingCallback, finish, keep_trainers, trainer_settings
from .protocol import Request, read_request, write_once
from .recording import Recorder

OWN = ("output_dir", "use_cpu", "bf16", "gradient_checkpointing")
"""Settings of transformers' Trainer that LLaMA-Factory gets in another form."""


def tokenized(samples: list[dict[str, Any]]) -> Any:
    """Return a replacement of SupervisedDatasetProcessor._encode_data_example."""

    def encode(
        self: Any, prompt: list[dict[str, str]], response: list[dict[str, str]], *args: Any, **kwargs: Any
    ) -> tuple[list[int], list[int]]:
        sample = samples[int(response[0]["content"])]
        return list(sample["input_ids"]), list(sample["labels"])

    return encode


def write_dataset(folder: Path, count: int, rank: int) -> str:
    """Write a data set of sample numbers and its dataset_info.json; return the folder."""
    rows = [
        {"messages": [{"role": "user", "content": "sample"}, {"role": "assistant", "content": str(number)}]}
        for number in range(count)
    ]
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    info = {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    write_once(folder / "rows.json", json.dumps(rows), rank)
    write_once(folder / "dataset_info.json", json.dumps({"rows": info}), rank)
    return str(folder)


def main(request: Request) -> None:
    """Train as the request says."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    packing = request.variant["packing"]
    samples = request.samples()
    supervised.SupervisedDatasetProcessor._encode_data_example = tokenized(samples)
    shared = trainer_settings(request, world_size, packs=bool(packing))
    # Its rows are one token longer than cutoff_len, before they are padded to a multiple of 8.
    options = {"packing": bool(packing), "neat_packing": packing == "neat", "flash_attn": "sdpa"}
    if request.device == "cuda":
        options["flash_attn"] = "fa2"
    arguments = {
        **{name: value for name, value in shared.items() if name not in OWN},
        **options,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": request.model,
        "template": "default",
        "dataset": "rows",
        "dataset_dir": write_dataset(request.folder / "dataset", len(samples), rank),
        "cutoff_len": request.max_tokens,
        "overwrite_cache": True,
        "preprocessing_batch_size": max(len(samples), 1000),
        "output_dir": shared["output_dir"],
        "overwrite_output_dir": True,
        "use_cpu": shared["use_cpu"],
        "bf16": shared["bf16"],
        "disable_gradient_checkpointing": True,
    }
    recorder = Recorder()
    callback = RecordingCallback(recorder, request)
    trainers = keep_trainers()
    run_exp(arguments, callbacks=[callback])
    finish(request, trainers[0], trainers[0].processing_class, recorder, ("llamafactory", "accelerate"), options)


if __name__ == "__main__":
    main(read_request(sys.argv[1]))
