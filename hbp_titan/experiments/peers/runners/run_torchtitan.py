"""torchtitan's SFT: its Trainer, ChatDataset (greedy packing, positions per document) and FlexAttention.

The step that would tokenize a row returns the tokens and labels of the sample whose number the row holds. Inputs end
one token before the sample does, as there. On a CPU it is unavailable: FlexAttention has no backward there. The
settings follow its sft_debugmodel, with the sizes of the model's config.json. **It has not run on a GPU yet.**
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .protocol import IGNORE_INDEX, Request, Result, read_request, write_once, write_result
from .recording import Recorder, documents_of, replaced

PACKAGES = ("torch", "torchtitan")


def why_not(device: str) -> str:
    """Return why torchtitan's SFT cannot run here, or ""."""
    from torch.nn.attention.flex_attention import flex_attention

    try:
        import torchtitan.trainer  # noqa: F401
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    query = torch.randn(1, 1, 128, 16, device=device, requires_grad=True)
    try:
        torch.compile(flex_attention)(query, query, query).sum().backward()
    except NotImplementedError as error:
        return f"NotImplementedError: {error}"
    return ""


def model_spec(folder: str) -> Any:
    """Return the ModelSpec of a Llama in an HF folder, with FlexAttention."""
    from torchtitan.models import llama3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm

    values = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    if values["model_type"] != "llama":
        raise ValueError(f"{folder}: model_type {values['model_type']}; this runner has Llama only")
    dim, vocab_size, heads = values["hidden_size"], values["vocab_size"], values["num_attention_heads"]
    if values.get("head_dim", dim // heads) * heads != dim:
        raise ValueError(
            f"{folder}: head_dim times num_attention_heads is not hidden_size; torchtitan has no such Llama"
        )
    scaling = values.get("rope_scaling") or {}
    rope = ComplexRoPE.Config(
        dim=dim // heads,
        max_seq_len=values["max_position_embeddings"],
        theta=values["rope_theta"],
        scaling="llama" if scaling.get("rope_type") == "llama3" else "none",
        scaling_factor=scaling.get("factor", 8.0),
    )
    layers = llama3._build_llama3_layers(
        n_layers=values["num_hidden_layers"],
        dim=dim,
        n_heads=heads,
        n_kv_heads=values["num_key_value_heads"],
        hidden_dim=values["intermediate_size"],
        rope=rope,
        attn_backend="flex",
    )
    norm = partial(RMSNorm.Config, normalized_shape=dim, eps=values["rms_norm_eps"])
    for layer in layers:
        layer.attention_norm.eps = layer.ffn_norm.eps = values["rms_norm_eps"]
    config = llama3.Llama3Model.Config(
        dim=dim,
        vocab_size=vocab_size,
        enable_weight_tying=values["tie_word_embeddings"],
        tok_embeddings=Embedding.Config(
            num_embeddings=vocab_size, embedding_dim=dim, param_init=llama3._EMBEDDING_SKIP_INIT
        ),
        norm=norm(param_init=llama3._NORM_INIT),
        lm_head=Linear.Config(in_features=dim, out_features=vocab_size, param_init=llama3._output_linear_init(dim)),
        layers=layers,
    )
    spec = llama3.model_registry("debugmodel", attn_backend="flex")
    spec.model, spec.flavor = config, "peers"
    return spec


def tokenized(samples: list[dict[str, Any]]) -> Any:
    """Return a replacement of ChatDataset._tokenize_sample: inputs, and the labels that they predict."""

    def encode(self: Any, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        sample = samples[int(row["number"])]
        return sample["input_ids"][:-1], sample["labels"][1:]

    return encode


def packed_rows(dataset: Any, request: Request, world_size: int) -> int:
    """Return the rows of one epoch of the rank with the most."""
    from types import SimpleNamespace

    from torchtitan.hf_datasets.text_datasets import ChatDataset

    tokenizer = SimpleNamespace(eos_id=0)
    make = partial(ChatDataset, dataset, tokenizer, None, request.max_tokens, infinite=False)
    return max(sum(1 for _ in make(dp_rank=rank, dp_world_size=world_size)) for rank in range(world_size))


def build_config(request: Request, world_size: int, path: Path, steps: int) -> Any:
    """Return the Trainer.Config."""
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
    from torchtitan.config import TrainingConfig
    from torchtitan.hf_datasets.text_datasets import ChatDataLoader
    from torchtitan.trainer import Trainer

    spec = model_spec(request.model)
    options = {"lr": request.lr, "betas": (request.beta1, request.beta2), "eps": request.eps}
    return Trainer.Config(
        loss=CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size),
        hf_assets_path=request.model,
        dump_folder=str(request.folder / "trainer"),
        model_spec=spec,
        # It decays norms as well: torchtitan has one group of parameters by default.
        optimizer=default_adamw(**options, weight_decay=request.weight_decay),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0, min_lr_factor=1.0),
        training=TrainingConfig(
            local_batch_size=1,
            global_batch_size=world_size * request.packs_per_step(world_size),
            seq_len=request.max_tokens,
            max_norm=request.max_norm,
            steps=steps,
            mixed_precision_param=request.dtype,
        ),
        dataloader=ChatDataLoader.Config(
            dataset_path="json",
            load_dataset_kwargs={"data_files": str(path), "split": "train"},
            sample_processor=lambda row: row,
        ),
        metrics=MetricsProcessor.Config(log_freq=1),
        checkpoint=CheckpointManager.Config(
            enable=True,
            interval=max(steps, 1),
            initial_load_path=request.model,
            initial_load_in_hf=True,
            last_save_in_hf=True,
            last_save_model_only=True,
        ),
        activation_checkpoint=None,
    )


def record(trainer: Any, recorder: Recorder, result: Result) -> list[dict[str, Any]]:
    """Record every micro-batch, step and metric of a trainer; return the list that gets the first micro-batch."""
    forward, step, log = trainer.forward_backward_step, trainer.train_step, trainer.metrics_processor.log
    kept: list[dict[str, Any]] = []

    def recorded(*, input_dict: Any, labels: Any, global_valid_tokens: Any) -> Any:
        ids, positions = input_dict["input"], input_dict["positions"]
        recorder.add(ids, labels, documents_of({"input_ids": ids, "position_ids": positions}), positions)
        if not kept:
            kept.append({"input": ids.clone(), "positions": positions.clone()})
        return forward(input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens)

    def marked(iterator: Any) -> Any:
        if not recorder.marks:
            recorder.start()
        value = step(iterator)
        recorder.end_step()
        return value

    def logged(number: int, loss: float, largest: float, norm: float, **more: Any) -> Any:
        result.losses.append(loss)
        result.grad_norms.append(norm)
        return log(number, loss, largest, norm, **more)

    trainer.forward_backward_step, trainer.train_step, trainer.metrics_processor.log = recorded, marked, logged
    return kept


@torch.no_grad()
def probe(trainer: Any, recorder: Recorder, batch: dict[str, Any], request: Request) -> None:
    """Run the document probe on the first micro-batch of each rank. A collective."""
    model, positions = trainer.model_parts[0], batch["positions"]
    changed = replaced(batch["input"], request.probe_tokens, trainer.model_config.vocab_size)
    masks = model.get_attention_masks(positions=positions)
    with trainer.train_context():
        before, after = (
            model(ids, positions=positions, attention_masks=masks).float() for ids in (batch["input"], changed)
        )
    documents = documents_of({"input_ids": batch["input"], "position_ids": positions})
    recorder.set_probe((after - before).abs().amax(-1), documents, positions, batch["input"])


def main(request: Request) -> None:
    """Train as the request says, or write why not."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    if reason := why_not(request.device):
        if rank == 0:
            write_result(request.folder, Result("unavailable", reason, versions))
        return
    from datasets import load_dataset
    from torchtitan.hf_datasets.text_datasets import ChatDataset

    samples = request.samples()
    ChatDataset._tokenize_sample = tokenized(samples)
    rows = "".join(json.dumps({"number": number}) + "\n" for number in range(len(samples)))
    path = write_once(request.folder / "rows.jsonl", rows, rank)
    per_step = request.packs_per_step(world_size)
    dataset = load_dataset("json", data_files=str(path), split="train")
    steps = request.steps or -(-packed_rows(dataset, request, world_size) // per_step)
    trainer = build_config(request, world_size, path, steps).build()
    recorder, result = Recorder(labels_shifted=True), Result(versions=versions, world_size=world_size)
    kept = record(trainer, recorder, result)
    trainer.train()
    probe(trainer, recorder, kept[0], request)
    recorder.save(request.folder, rank)
    if rank == 0:
        weights = request.folder / "trainer" / "checkpoint" / f"step-{steps}"
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(request.model) / name, weights)
        result.weights, result.lrs = str(weights), [request.lr] * steps
        result.settings = {"attention": "flex", "packs_per_step": per_step, "ignore_index": IGNORE_INDEX}
        write_result(request.folder, result)
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(read_request(sys.argv[1]))
