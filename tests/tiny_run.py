"""A run small enough for tests: some rows of text, a tokenizer trained on them, a Llama of two layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from hbp_titan.data.tokenizer import train_tokenizer
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.hf_config import args_to_hf_config

VOCAB_SIZE = 320
WORDS = ["the", "level", "pack", "rank", "token", "length", "short", "long", "cost", "mesh", "head", "loss", "plan"]

ARGS = ModelArgs(
    name="tiny",
    hf_model_type="llama",
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=1024,
    rope_theta=10000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
)


def _row(generator: np.random.Generator, num_words: int) -> dict[str, object]:
    text = " ".join(generator.choice(WORDS, size=num_words))
    middle = num_words * 2
    return {
        "messages": [
            {"role": "user", "content": text[:middle]},
            {"role": "assistant", "content": text[middle:]},
        ]
    }


def write_tiny_run(
    folder: Path,
    num_rows: int = 60,
    seed: int = 0,
    levels: str = "128:1,512:2",
    saves: bool = True,
    args: ModelArgs = ARGS,
) -> list[str]:
    """Write data, tokenizer and model configuration into `folder`; return the command-line arguments of a run.

    Of 15 rows, nine have a few words, five 50 to 80 and one 260 to 340; a word takes one to two tokens. levels: ""
    leaves them to the caller. saves: write checkpoints and the export.
    """
    generator = np.random.default_rng(seed)
    shapes = {0: (260, 340), **dict.fromkeys((3, 5, 8, 11, 14), (50, 80))}
    counts = [int(generator.integers(*shapes.get(number % 15, (4, 15)))) for number in range(num_rows)]
    rows = [_row(generator, count) for count in counts]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = [message["content"] for row in rows for message in row["messages"]]  # type: ignore[attr-defined]
    train_tokenizer(texts, folder / "model", vocab_size=VOCAB_SIZE)
    (folder / "model" / "config.json").write_text(json.dumps(args_to_hf_config(args)), encoding="utf-8")
    return [
        f"--model.hf_path={folder / 'model'}",
        "--checkpoint.initial_load_path=none",
        f"--data.train_files={folder / 'train.jsonl'}",
        f"--data.cache_folder={folder / 'cache'}",
        f"--job.dump_folder={folder / 'run'}",
        "--data.num_proc=1",
        "--data.num_workers=0",
        "--metrics.enable_tensorboard=false",
        "--metrics.progress_bar=false",
        "--metrics.report=false",
        "--packing.print_comparison=false",
        "--optimizer.lr=1e-2",
        *([f"--levels={levels}"] if levels else []),
        *([] if saves else ["--checkpoint.enable=false", "--checkpoint.export_hf=false"]),
    ]
