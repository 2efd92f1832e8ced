"""A copy of the repository for run_train.sh and the scripts, which uses the environment of the tests."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make_checkout(root: Path) -> Path:
    """Copy the repository to `root` and return it; tiny.toml in it is an empty configuration."""
    for name in ("hbp_titan", "train_configs", "scripts"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run_train.sh", root)
    (root / "scripts" / "setup_env.sh").write_text(f"PY={sys.executable}\nexport PYTHONPATH=$PWD\n")
    (root / "tiny.toml").write_text("")
    return root
