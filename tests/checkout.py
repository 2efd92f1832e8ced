"""A checkout whose environment is the tests' own: run_train.sh and the scripts, without an installation.

Owns that folder; nothing here checks anything.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make_checkout(root: Path) -> Path:
    """Make it at `root`; returns that. tiny.toml in it is a configuration without a key."""
    for name in ("hbp_titan", "train_configs", "scripts"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run_train.sh", root)
    (root / "scripts" / "setup_env.sh").write_text(f"PY={sys.executable}\nexport PYTHONPATH=$PWD\n")
    (root / "tiny.toml").write_text("")
    return root
