"""A clean copy of the repository in which the commands of the docs run: with small files where docs have placeholders.

Owns that copy (programs, models, data, configurations) and a call in it; nothing here checks anything.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hbp_titan.models.hf import save_hf_folder
from hbp_titan.models.registry import build_model
from tests.checkout import ROOT, make_checkout
from tests.tiny_run import ARGS, write_tiny_run

# Eight heads, because levels of eight ranks are tried on it, and positions for the longest of them.
MODEL = replace(ARGS, hidden_size=64, num_heads=8, max_position_embeddings=131072)

SECONDS = 900
"""That one command may take."""

X_TOML = """
[job]
dump_folder = "outputs/X"
[model]
hf_path = "models/tiny"
[data]
train_files = ["my_data.jsonl"]
validation_files = ["held_out.jsonl"]
num_proc = 1
num_workers = 0
[[levels]]
max_tokens = 128
[[levels]]
max_tokens = 512
cp_degree = 2
[training]
steps = 3
[validation]
enable = true
[optimizer]
lr = 1e-2
"""

EDITS = {
    "train_configs/debug_model.toml": {
        "max_samples = 3500": "max_samples = 250",
        "max_samples = 200": "max_samples = 10",
    },
    "scripts/simulate.py": {"10_000_000": "100_000"},
    "hbp_titan/experiments/paper/scale.py": {
        '"llama3_1_8b", "llama3_1_70b", "deepseek_v2_236b"': '"llama3_1_8b",',
        "131_072, 262_144, 524_288, 1_048_576": "131_072, 262_144",
        "8, 64, 512, 4096": "8, 64",
    },
}
"""What is shortened in the copy: file -> old text -> new text."""

SMALL_8B = {
    "131072": "512",
    "16384": "128",
    "cp_degree = 8": "cp_degree = 2",
    "ac_layers = 28": "ac_layers = 1",
    "curriculum_steps = 500": "curriculum_steps = 2",
    "1048576": "2048",
    "num_workers = 2": "num_workers = 0",
    "enable = true": "enable = false",
}
"""The preset of the worked example, at a size that two CPU ranks train in seconds: small/llama3_1_8b_hbp.toml."""


def make_documented_checkout(root: Path) -> Path:
    """Make it at `root`; returns that."""
    make_checkout(root)
    _write_programs(root / "bin")
    for file, edits in EDITS.items():
        _edit(root / file, root / file, edits)
    (root / "small").mkdir()
    preset = "llama3_1_8b_hbp.toml"
    _edit(root / "train_configs" / preset, root / "small" / preset, SMALL_8B)
    for name in ("X.toml", "train_configs/X.toml"):
        (root / name).write_text(X_TOML)
    shutil.copytree(ROOT / "docs", root / "docs")
    _write_data(root)
    _write_models(root)
    return root


def run(text: str, checkout: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run a command of bash in the copy; one of several nodes once for each, at the same time."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {
        "PATH": f"{checkout / 'bin'}:{environment['PATH']}",
        "OMP_NUM_THREADS": "1",
        "M": "models/Llama-3.1-8B-Instruct",
    }
    nodes = 2 if "NNODES=" in text and "COMM_MODE" not in text else 1
    if nodes == 2:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            text = text.replace("node0:29500", f"localhost:{probe.getsockname()[1]}")
    started = [
        subprocess.Popen(
            ["bash", "-c", text],
            cwd=checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(nodes)
    ]
    ended = []
    for process in started:
        output, errors = process.communicate(timeout=SECONDS)
        ended.append(subprocess.CompletedProcess(text, process.returncode, output, errors))
    return ended


def _write_programs(folder: Path) -> None:
    folder.mkdir()
    launcher = "-m torch.distributed.run --rdzv-backend c10d --rdzv-endpoint localhost:0"
    for name, words in (("python", ""), ("torchrun", launcher), ("hbp-titan", "-m hbp_titan")):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (folder / name).chmod(0o755)


def _edit(source: Path, target: Path, edits: dict[str, str]) -> None:
    text = source.read_text()
    for old, new in edits.items():
        assert old in text, f"{source.name} no longer has {old!r}"
        text = text.replace(old, new)
    target.write_text(text)


def _write_data(root: Path) -> None:
    """Rows of 10 to 700 tokens under the names that docs use, lengths, and a file of measured iterations."""
    (root / "tiny" / "model").mkdir(parents=True)
    write_tiny_run(root / "tiny", num_rows=90)
    rows = (root / "tiny" / "train.jsonl").read_text().splitlines(keepends=True)
    kept = [row for row in rows if len(row) < 1000]
    (root / "my_data.jsonl").write_text("".join(kept[:-8]))
    (root / "held_out.jsonl").write_text("".join(kept[-8:]))
    for name in ("tulu-3-sft-mixture", "LongCite-45k"):
        (root / "data" / name).mkdir(parents=True)
        (root / "data" / name / "train.jsonl").write_text("".join(rows))
    generator = np.random.default_rng(0)
    short = generator.lognormal(6.0, 1.0, 3000).astype(np.int64) + 10
    np.save(root / "L.npy", np.concatenate([np.minimum(short, 16000), [40_000, 90_000, 120_000]]))
    loads = [[[1, n, n * 1000 * k, n / (1000 * k)] for k in (1, 2)] for n in (4000, 8000, 12000, 16000)]
    iterations = [
        {"level": level, "seconds": 0.01 + 1e-5 * load[1][1] * scale + 1e-9 * load[1][2] * scale, "loads": load}
        for level, scale in ((0, 1.0), (1, 0.5))
        for load in loads
    ]
    levels = [{"max_tokens": 16384, "cp_degree": 1}, {"max_tokens": 131072, "cp_degree": 8}]
    measured = {"levels": levels, "step_seconds": 0.1, "iterations": iterations}
    (root / "measured.json").write_text(json.dumps(measured))


def _write_models(root: Path) -> None:
    torch.manual_seed(0)
    model = build_model(MODEL)
    weights = [(name, torch.randn_like(parameter) * 0.02) for name, parameter in model.named_parameters()]
    folder = root / "models" / "tiny"
    save_hf_folder(MODEL, weights, folder, dtype=torch.float32, tokenizer_path=root / "tiny" / "model")
    for name in ("models/Llama-3.1-8B-Instruct", "models/Qwen2.5-7B", "MODEL", "DIR", "HF_DIR"):
        os.symlink(folder, root / name)
