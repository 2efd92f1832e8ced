"""Weights & Biases, on request ([metrics] enable_wandb): online, or offline with WANDB_MODE=offline.

Owns the run over there: its project and name (torchtitan's environment variables), its identity over a resume, and its
step axis. `wandb sync OUTPUTS/wandb/offline-run-*` uploads what was kept offline.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_IDENTITY = "wandb_id"


def check_wandb() -> None:
    """ValueError where the package is missing, or the run is to go online and nobody is logged in."""
    try:
        import wandb
    except ImportError:
        raise ValueError(
            "metrics.enable_wandb = true but wandb is not installed: pip install 'hbp-titan[wandb]', or set it to false"
        ) from None
    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    try:
        wandb.login()
    except wandb.Error as error:
        raise ValueError(
            f"metrics.enable_wandb = true, but: {error} Or set WANDB_MODE=offline: the run folder keeps all of it"
        ) from None


class WandbRun:
    """A run that `folder` belongs to, started anew or gone on with. config: the resolved configuration."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        identity = folder / _IDENTITY
        if not identity.exists():
            identity.write_text(secrets.token_hex(4), encoding="utf-8")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "hbp_titan"),
            entity=os.environ.get("WANDB_TEAM"),
            name=os.environ.get("WANDB_RUN_NAME", folder.name),
            id=identity.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=folder,
            config=dict(config),
        )
        # Our own axis: a resumed run logs steps anew that were logged before, which W&B's own axis does not take.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add the figures of one step."""
        self.run.log({"step": step, **scalars})

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()
