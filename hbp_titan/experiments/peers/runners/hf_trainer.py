"""What the peers on transformers' Trainer share: its settings, the hooks, and the result.

TRL, LLaMA-Factory and ms-swift all train with a subclass of transformers.Trainer.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from .protocol import Request, Result, write_result
from .recording import Recorder


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of torch, transformers and `packages`."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)}


def trainer_settings(request: Request, world_size: int, packs: bool) -> dict[str, Any]:
    """Return the arguments of TrainingArguments that every such peer gets.

    packs: whether a row is a pack of max_tokens, one per forward, or a micro-batch has padded samples.
    """
    if packs:
        rows, accumulation = 1, request.packs_per_step(world_size)
    else:
        rows, accumulation = request.micro_batch_rows, request.micro_batches_per_step(world_size)
    return {
        "output_dir": str(request.folder / "trainer"),
        "num_train_epochs": 1,
        "max_steps": request.steps or -1,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": request.lr,
        "adam_beta1": request.beta1,
        "adam_beta2": request.beta2,
        "adam_epsilon": request.eps,
        "weight_decay": request.weight_decay,
        "max_grad_norm": request.max_norm,
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": request.seed,
        "data_seed": request.seed,
        "use_cpu": request.device == "cpu",
        "bf16": request.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "ddp_find_unused_parameters": False,
        "dataloader_num_workers": 0 if request.device == "cpu" else 2,
    }


class RecordingCallback(TrainerCallback):
    """Attaches the recorder when training starts, and marks the steps."""

    def __init__(self, recorder: Recorder, request: Request) -> None:
        self.recorder, self.request = recorder, request

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Hook the model, which accelerate has wrapped by now or not."""
        self.model = getattr(model, "module", model)
        self.recorder.attach(self.model)
        self.recorder.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the end of an optimizer step."""
        self.recorder.end_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run the document probe on the trained model, in the mode in which it was trained."""
        self.recorder.enabled = False
        self.recorder.probe(self.logits, self.request.probe_tokens, self.model.config.vocab_size)

    def logits(self, arguments: dict[str, Any]) -> torch.Tensor:
        """Return the logits [B, T, V] of the model for the arguments of a recorded forward."""
        # As the trainer calls it: on a GPU under autocast.
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.request.dtype == "bfloat16"):
            return self.model(**arguments).logits


def keep_trainers(callback: TrainerCallback | None = None) -> list[Any]:
    """Return a list that gets every Trainer that is made from now on. callback: added to each of them.

    For peers whose entry point returns neither the trainer nor the model.
    """
    trainers: list[Any] = []
    init = Trainer.__init__

    # wraps: ms-swift reads the names of the parameters.
    @functools.wraps(init)
    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if callback is not None:
            self.add_callback(callback)
        trainers.append(self)

    Trainer.__init__ = keep  # type: ignore[method-assign]
    return trainers


def finish(
    request: Request,
    trainer: Any,
    tokenizer: Any,
    recorder: Recorder,
    packages: tuple[str, ...],
    settings: dict[str, Any],
) -> None:
    """Save the weights in float32, the recorded tokens and the result, after training."""
    args = trainer.args
    recorder.save(request.folder, args.process_index)
    if args.process_index:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = request.folder / "model"
    model.to(torch.float32).save_pretrained(weights)
    tokenizer.save_pretrained(weights)
    history = [row for row in trainer.state.log_history if "loss" in row]
    kept = ("per_device_train_batch_size", "gradient_accumulation_steps", "average_tokens_across_devices")
    result = Result(
        versions=versions(*packages),
        settings={
            **settings,
            "attention": model.config._attn_implementation,
            **{name: getattr(args, name) for name in kept if hasattr(args, name)},
        },
        losses=[row["loss"] for row in history],
        grad_norms=[row.get("grad_norm") for row in history],
        lrs=[row.get("learning_rate") for row in history],
        world_size=args.world_size,
        weights=str(weights),
    )
    write_result(request.folder, result)


def unavailable(request: Request, reason: str, packages: tuple[str, ...]) -> None:
    """Write a result that says why the peer does not run."""
    found = {}
    for name in packages:
        try:
            found.update(versions(name))
        except importlib.metadata.PackageNotFoundError:
            reason = reason or f"{name} is not installed"
    write_result(request.folder, Result(status="unavailable", reason=reason, versions=found))
