"""TRL's SFTTrainer on samples that are tokenized already.

Variants: packing "bfd" (whole samples, best-fit decreasing, padding-free), "wrapped" (cut at max_tokens), or "".
"""

from __future__ import annotations

import os
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from .hf_trainer import RecordingCallback, finish, trainer_settings
from .protocol import Request, read_request
from .recording import Recorder


def main(request: Request) -> None:
    """Train as the request says."""
    packing = request.variant["packing"]
    attention = request.variant.get("attention", "") or ("flash_attention_2" if request.device == "cuda" else "sdpa")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    settings = trainer_settings(request, world_size, packs=bool(packing))
    options = {"packing": bool(packing), **({"packing_strategy": packing} if packing else {})}
    args = SFTConfig(**settings, **options, max_length=request.max_tokens, shuffle_dataset=True)
    tokenizer = AutoTokenizer.from_pretrained(request.model)
    model = AutoModelForCausalLM.from_pretrained(request.model, dtype=torch.float32, attn_implementation=attention)
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in request.samples()]
    recorder = Recorder()
    callback = RecordingCallback(recorder, request)
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[callback]
    )
    trainer.train()
    finish(request, trainer, tokenizer, recorder, ("trl", "accelerate"), options)


if __name__ == "__main__":
    main(read_request(sys.argv[1]))
