"""ms-swift's SFT pipeline, with its own packing, on samples that are tokenized already.

Variants: packing true (bin packing, padding-free; ms-swift refuses it without FlashAttention) or false (padded).
The template's encoding of a row returns the tokens and labels of the sample whose number is the row's answer.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from swift import SftArguments, sft_main
from swift.template import Template

from .hf_trainer import RecordingCallback, finish, keep_trainers, trainer_settings, unavailable
from .protocol import Request, read_request, write_once
from .recording import Recorder

PACKAGES = ("ms-swift", "accelerate")
OWN = ("use_cpu", "bf16", "gradient_checkpointing", "output_dir", "disable_tqdm", "data_seed", "seed")


def tokenized(samples: list[dict[str, Any]]) -> Any:
    """Return a replacement of Template._encode_truncated."""

    def encode(self: Any, inputs: Any) -> dict[str, Any]:
        sample = samples[int(inputs.messages[-1]["content"])]
        tokens = list(sample["input_ids"])
        return {"input_ids": tokens, "labels": list(sample["labels"]), "loss_scale": None, "length": len(tokens)}

    return encode


def main(request: Request) -> None:
    """Train as the request says, or write why it is refused."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    packing = bool(request.variant["packing"])
    samples = request.samples()
    Template._encode_truncated = tokenized(samples)
    turns = ([("user", "sample"), ("assistant", str(number))] for number in range(len(samples)))
    rows = ({"messages": [{"role": role, "content": text} for role, text in row]} for row in turns)
    path = write_once(request.folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows), rank)
    shared = trainer_settings(request, world_size, packs=packing)
    attention = "flash_attention_2" if request.device == "cuda" else "sdpa"
    options = {"packing": packing, "attn_impl": attention}
    arguments = {
        **{name: value for name, value in shared.items() if name not in OWN},
        **options,
        "model": request.model,
        "model_type": request.variant.get("model_type", "llama"),
        "template": request.variant.get("template", "chatml"),
        "tuner_type": "full",
        "torch_dtype": "float32",
        "dataset": [str(path)],
        "split_dataset_ratio": 0.0,
        "max_length": request.max_tokens,
        "gradient_checkpointing": False,
        "output_dir": shared["output_dir"],
        "add_version": False,
        "seed": request.seed,
        "data_seed": request.seed,
        "bf16": shared["bf16"],
        "use_cpu": shared["use_cpu"],
        "disable_tqdm": True,
    }
    recorder = Recorder()
    callback = RecordingCallback(recorder, request)
    trainers = keep_trainers(callback)
    try:
        settings = SftArguments(**arguments)
    except ValueError as error:
        if rank == 0:
            unavailable(request, f"{type(error).__name__}: {error}", PACKAGES)
        return
    sft_main(settings)
    finish(request, trainers[0], trainers[0].processing_class, recorder, PACKAGES, options)


if __name__ == "__main__":
    main(read_request(sys.argv[1]))
