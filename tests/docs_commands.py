"""How each command of the docs is run on a machine with two CPU cores, and which cannot be run there.

Owns the table. Commands run as they stand in the docs, in the copy of docs_checkout.py, but for SHORTER and for what a
Run itself replaces or adds. tests/test_docs.py holds the table complete.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

NOT_RUN = {
    **dict.fromkeys(
        (
            "pip install .",
            "pip install 'hbp-titan[data]'",
            "pip install '.[eval]'",
        ),
        "installs packages; tests/test_packaging.py installs this one",
    ),
    "source .venv/bin/activate": "the environment of the tests is used",
    "export M=models/Llama-3.1-8B-Instruct": "set for every command below",
    "export OMP_NUM_THREADS=1": "set for every command below",
    "./scripts/run_tests.sh": "runs this very test",
    "scripts/run_tests.sh --hypothesis-profile=random -m hypothesis": "takes ten minutes",
    "python -m pytest -m gpu": "needs a GPU",
    "python -m pytest tests/gpu_trace": "is part of the tests",
    **dict.fromkeys(
        ("./scripts/trace_all_torch.sh", "./scripts/trace_all_torch.sh -m slow"), "downloads three versions of torch"
    ),
    **dict.fromkeys(("pip install '.[flash]'", "pip install flash-attn-4==4.0.0b19"), "installs a kernel of a GPU"),
    "python scripts/gpu_check.py --out gpu_check": "needs a GPU",
    "CUDA_VISIBLE_DEVICES= ./run_train.sh": "is ./run_train.sh where there is no GPU",
    "tensorboard --logdir outputs/debug_model/tensorboard": "serves until it is stopped",
    **dict.fromkeys(
        (
            "hf download meta-llama/Llama-3.1-8B-Instruct --local-dir models/Llama-3.1-8B-Instruct",
            "hf download --repo-type dataset allenai/tulu-3-sft-mixture --local-dir data/tulu-3-sft-mixture",
            "hf download --repo-type dataset THUDM/LongCite-45k --local-dir data/LongCite-45k",
        ),
        "needs a network",
    ),
    "python scripts/evaluate.py MODEL --needles --server http://localhost:8000": "needs a server of vLLM or SGLang; "
    "tests/evaluation/test_answerers.py asks a stand-in",
    **dict.fromkeys(
        ("python scripts/evaluate.py MODEL --tasks hbp_titan/evaluation/paper_tasks.toml --runs mmlu,gsm8k",),
        "needs lm_eval and its data sets from the network; tests/evaluation/test_harness.py has a task of its own",
    ),
    **dict.fromkeys(
        (
            "CONFIG_FILE=train_configs/llama3_1_8b_hbp.toml sbatch --nodes 4 --gpus-per-node 8 --time 4:00:00 "
            "scripts/slurm_train.sbatch --training.epochs 2",
            "CONFIG_FILE=train_configs/llama3_1_8b_hbp.toml sbatch --nodes 4 --gpus-per-node 8 --time 4:00:00 "
            "scripts/slurm_train.sbatch --model.hf_path $M --checkpoint.initial_load_path $M "
            "--levels 8192:1,131072:8:ulysses:keep_attention:11",
        ),
        "needs SLURM; tests/test_slurm.py runs the script with stand-ins for srun and scontrol",
    ),
}
"""Commands that this machine cannot run -> why."""

SHORTER = {
    r"\bNGPU=8\b": "NGPU=2",
    r"\bNNODES=4\b": "NNODES=2",
    r"--nproc([-_])per([-_])node 8": r"--nproc\1per\2node 2",
    r" /models/": " models/",
    r"train_configs/llama3_1_8b_hbp\.toml": "small/llama3_1_8b_hbp.toml",
    r"8192:1,131072:8:ulysses:keep_attention:\d+": "128:1,512:2:ulysses:keep_attention:1",
    r"--lengths 4096,(16384|32768,131072)$": "--lengths 1024,2048 --depths 2 --needle_tasks niah_single",
}
"""Of every command that trains or measures, by regular expression; dry runs and estimates keep their size."""


@dataclass(frozen=True)
class Run:
    """A command of the docs; `replace` changes words of it, `add` comes after it, `before` in front of it."""

    command: str
    add: str = ""
    replace: dict[str, str] = field(default_factory=dict)
    before: str = ""

    def text(self) -> str:
        """What bash gets."""
        text = self.command
        if "COMM_MODE=fake" not in text and "--estimate" not in text:
            for old, new in SHORTER.items():
                text = re.sub(old, new, text)
        for old, new in self.replace.items():
            assert old in text, f"{self.command} no longer has {old}"
            text = text.replace(old, new)
        return " ".join(filter(None, (self.before, text, self.add)))


_PREPARED = "python scripts/prepare_data.py --job.config_file"
_BENCH = {"llama3_2_1b": "debug", "16384,32768,65536,131072": "256,512"}
_SHORT = "--training.steps 1 --data.max_samples 60 --validation.enable false --checkpoint.enable false"
# The preset's data is in the copy, for the worked example; without it lengths like its own stand in.
_NO_DATA = "--data.sources=[] --data.train_files not_here.jsonl"
_FEW = "--repeats 1 --documents one"
_COMPARED = {"train_configs/debug_model.toml": "X.toml", "--data.max_samples 1": "--repeats 1 --data.max_samples 1"}
_LEVELS = {"8192": "512", "2048": "256", "1024": "128"}
_STUDY = "--job.config_file X.toml --training.steps 1 --checkpoint.enable false"
_ELASTIC = {"train_configs/debug_model.toml": "X.toml", "2500": "60"}

RUNS = [
    Run("hbp-titan --help"),
    Run("hbp-titan --version"),
    Run("hbp-titan presets"),
    Run("./run_train.sh --help"),
    # The debug model, stopped after each of its first steps and gone on with on other ranks; then to its end.
    Run(f"{_PREPARED} train_configs/debug_model.toml"),
    Run("hbp-titan prepare_data --job.config_file debug_model"),
    Run("NGPU=4 ./run_train.sh", "--training.steps 1"),
    Run("NGPU=2 ./run_train.sh", "--training.steps 2"),
    Run("NGPU=1 ./run_train.sh --levels 1024:1,8192:1", "--training.steps 3"),
    Run("MAX_RESTARTS=3 ./run_train.sh", "--training.steps 4"),
    Run("./run_train.sh"),
    Run("./run_train.sh --packing.method hbp"),
    Run("./run_train.sh --levels 1024:1,8192:2"),
    Run("./run_train.sh --levels 1024:1::::false,8192:2", "--training.steps 1 --job.dump_folder outputs/reshard"),
    Run("torchrun --nproc_per_node 2 -m hbp_titan train --job.config_file debug_model"),
    Run("NNODES=2 RDZV_ENDPOINT=node0:29500 RDZV_ID=my_run ./run_train.sh", before="NGPU=1"),
    Run("./run_train.sh --levels 1024:1,8192:2:allgather", "--training.steps 1 --job.dump_folder outputs/allgather"),
    Run(
        "./run_train.sh --levels 1024,8192:2:allgather:keep_attention:4",
        "--training.steps 1 --job.dump_folder outputs/kept",
    ),
    Run("LOG_RANK=1 ./run_train.sh"),
    Run("WANDB_MODE=offline ./run_train.sh --metrics.enable_wandb true", f"{_SHORT} --job.dump_folder outputs/wandb"),
    Run(
        "./run_train.sh --profiling.enable_profiling true --profiling.first_step 10 --profiling.last_step 12",
        f"{_SHORT} --job.dump_folder outputs/profiled",
        {"first_step 10": "first_step 1", "last_step 12": "last_step 1"},
    ),
    Run("./run_train.sh --profiling.enable_memory_snapshot true", f"{_SHORT} --job.dump_folder outputs/snapshot"),
    Run("python scripts/report.py outputs/debug_model"),
    Run("HBP_TRACEBACK=1 LOG_RANK=3 ./run_train.sh", replace={"LOG_RANK=3": "LOG_RANK=1"}),
    Run(
        "NGPU=4 ./run_train.sh --model.flavor debug_moe --parallelism.expert_parallel_degree 2 "
        "--job.dump_folder outputs/moe",
        _SHORT,
    ),
    Run("python scripts/generate.py outputs/debug_model/hf", "--count 1 --max_new_tokens 4"),
    Run("python scripts/audit_epoch.py outputs/debug_model"),
    Run("python scripts/convert_to_hf.py outputs/debug_model OUT"),
    Run('python scripts/generate.py OUT --prompt "What does os.getcwd do?"', "--max_new_tokens 4"),
    Run(
        "python scripts/convert_to_hf.py outputs/debug_model/checkpoint/step-100 OUT",
        replace={"step-100": "$(ls outputs/debug_model/checkpoint | sort -V | tail -n 1)", "OUT": "OUT_step"},
    ),
    Run("python scripts/convert_from_hf.py HF_DIR OUT", replace={" OUT": " OUT_checkpoint"}),
    Run(
        "python scripts/evaluate.py outputs/debug_model/hf --perplexity .data/stdlib/validation.jsonl --overlong skip",
        "--max_samples 20",
    ),
    Run(
        './run_train.sh --data.embedded "" --data.train_files my_data.jsonl --data.max_samples 0 '
        "--validation.enable false --job.dump_folder outputs/my_data"
    ),
    # A configuration of the user's own.
    Run(f"{_PREPARED} X.toml --show 3"),
    Run(f"{_PREPARED} X.toml --strict"),
    Run("torchrun --nproc_per_node 8 scripts/prepare_data.py --job.config_file X.toml"),
    Run("COMM_MODE=fake NGPU=8 CONFIG_FILE=X.toml ./run_train.sh"),
    Run("COMM_MODE=fake NGPU=32 CONFIG_FILE=X.toml ./run_train.sh"),
    Run("NGPU=8 CONFIG_FILE=X.toml ./run_train.sh"),
    Run("NGPU=8 CONFIG_FILE=X.toml ./run_train.sh --optimizer.lr 2e-5 --job.dump_folder outputs/X_lr"),
    Run("NNODES=4 NGPU=8 RDZV_ENDPOINT=node0:29500 CONFIG_FILE=X.toml ./run_train.sh", "--job.dump_folder outputs/4"),
    Run("python scripts/audit_epoch.py outputs/X"),
    Run(
        "python scripts/report.py outputs/hbp outputs/flat_sorted --html compared.html",
        replace={"hbp": "X", "flat_sorted": "X_lr"},
    ),
    Run(f"{_PREPARED} X.toml --world_size 32"),
    Run("python scripts/convert_to_hf.py outputs/X OUT", replace={" OUT": " OUT_X32"}),
    Run("python scripts/evaluate.py outputs/X/hf --perplexity held_out.jsonl --overlong skip"),
    Run("python scripts/evaluate.py outputs/X/hf --needles --lengths 4096,16384"),
    Run("python scripts/convert_to_hf.py outputs/X OUT --dtype bfloat16", replace={" OUT": " OUT_X"}),
    Run(
        "CONFIG_FILE=X.toml ./run_train.sh --model.flavor llama3_2_1b",
        "--job.dump_folder outputs/new --training.steps 1 --model.tokenizer_path models/tiny",
        {"--model.flavor llama3_2_1b": '--model.hf_path "" --model.flavor debug'},
    ),
    Run(
        "CONFIG_FILE=X.toml ./run_train.sh --model.hf_path /models/Qwen2.5-7B",
        "--job.dump_folder outputs/qwen --training.steps 1",
    ),
    Run(
        "CONFIG_FILE=X.toml ./run_train.sh --model.hf_path DIR --checkpoint.initial_load_path DIR",
        "--job.dump_folder outputs/dir --training.steps 1",
    ),
    Run('python scripts/generate.py MODEL --prompt "What does os.getcwd do?"', "--max_new_tokens 4"),
    Run("python scripts/evaluate.py MODEL --needles --lengths 4096,32768,131072"),
    # The worked example.
    Run(
        "NGPU=8 CONFIG_FILE=train_configs/llama3_1_8b_hbp.toml ./run_train.sh --model.hf_path "
        "/models/Llama-3.1-8B-Instruct --checkpoint.initial_load_path /models/Llama-3.1-8B-Instruct --data.sources=[] "
        "--data.train_files my_data.jsonl",
        "--job.dump_folder outputs/readme --training.steps 2",
    ),
    Run(f"{_PREPARED} train_configs/llama3_1_8b_hbp.toml --model.hf_path $M --world_size 32 --show 3"),
    Run(
        "COMM_MODE=fake NGPU=8 NNODES=4 CONFIG_FILE=train_configs/llama3_1_8b_hbp.toml ./run_train.sh "
        "--model.hf_path $M --checkpoint.initial_load_path $M"
    ),
    Run(
        "python scripts/plan_packing.py --job.config_file train_configs/llama3_1_8b_hbp.toml --model.hf_path $M "
        "--world_size 32 --compare --html plan.html"
    ),
    Run(
        "torchrun --nproc_per_node 8 scripts/select_levels.py --job.config_file train_configs/llama3_1_8b_hbp.toml "
        "--model.hf_path $M --checkpoint.initial_load_path $M --output train_configs/my_8b.toml",
        "--candidates 128:1,512:2",
    ),
    Run(
        "NGPU=8 CONFIG_FILE=train_configs/llama3_1_8b_hbp.toml ./run_train.sh --model.hf_path $M "
        "--checkpoint.initial_load_path $M --levels 8192:1,131072:8:ulysses:keep_attention:16"
    ),
    # Dry runs and estimates, as they stand.
    Run("COMM_MODE=fake NGPU=32 CONFIG_FILE=train_configs/llama3_1_70b_hbp.toml ./run_train.sh", _NO_DATA),
    Run(
        "COMM_MODE=fake NGPU=64 GPU=h200-141gb CONFIG_FILE=X.toml ./run_train.sh "
        "--levels 16384:1:ulysses:full,131072:8:ulysses:full"
    ),
    Run("COMM_MODE=fake NGPU=32 CONFIG_FILE=train_configs/llama3_1_8b_hbp.toml ./run_train.sh"),
    Run("python -m hbp_titan.tuning.dry_run --world_size 32 --gpu h100-80gb --job.config_file X.toml"),
    Run("hbp-titan dry_run --world_size 32 --job.config_file llama3_1_8b_hbp", _NO_DATA),
    Run("python scripts/select_levels.py --job.config_file X.toml --estimate h100-80gb --world_size 32"),
    Run(
        "python scripts/simulate.py --estimate h100-80gb --world_size 32 --flavor llama3_1_8b "
        "--levels 16384:1,131072:8 --methods isf,flat_sorted,flexsp,hbp_paper,hbp"
    ),
    Run(
        "python scripts/simulate.py --estimate h200-141gb --world_size 64 --job.config_file "
        "train_configs/llama3_1_8b_hbp.toml"
    ),
    Run(
        "python scripts/simulate.py --estimate h100-80gb --world_size 32 --flavor llama3_1_8b --ac_layers 28 "
        "--levels 16384:1,32768:2,65536:4,131072:8,262144:16:hybrid"
    ),
    Run("python scripts/simulate.py --lengths L.npy --world_size 32 --methods isf,flat_sorted,flexsp,hbp_paper,hbp"),
    Run("python scripts/simulate.py --calibrate measured.json --lengths L.npy"),
    Run("python scripts/simulate.py --paper", "--num_samples 20000"),
    Run("python scripts/simulate.py --scale --svg hbp_titan/experiments/scale.svg"),
    Run("python scripts/simulate.py --speed"),
    # Packing.
    Run(
        "python scripts/plan_packing.py --lengths L.npy --world_size 32 --levels 16384:1,131072:8 --compare "
        "--html plan.html"
    ),
    Run(
        "python scripts/plan_packing.py --job.config_file train_configs/debug_model.toml --world_size 2 "
        "--json plan.json"
    ),
    Run("python scripts/bench_packing.py", "--num_samples 20000 --repeat 1"),
    # Measurements.
    Run(
        "torchrun --nproc_per_node 8 scripts/select_levels.py --job.config_file X.toml --output X_levels.toml",
        "--candidates 128:1,512:2",
    ),
    Run("torchrun --nproc_per_node 2 scripts/compare_methods.py --job.config_file X.toml", "--repeats 1"),
    Run(
        "torchrun --nproc_per_node 2 scripts/compare_methods.py --job.config_file train_configs/debug_model.toml "
        "--data.max_samples 1200 --validation.max_samples 60 --training.global_batch_tokens 16384 "
        '--packing.curriculum_steps 0 --json compared.json --runs "isf@8192:2:allgather;isf@8192:1;'
        "flat_sorted@8192:2:allgather;flat_sorted@8192:1;hbp_paper@2048:1,8192:2:allgather;"
        'hbp@2048:1,8192:2:allgather;hbp@1024:1,8192:2:ulysses"',
        replace=_COMPARED | _LEVELS,
    ),
    Run(
        'python scripts/simulate.py --validate compared.json --fit "isf@8192:2:allgather;isf@8192:1;'
        'hbp@1024:1,8192:2:ulysses"',
        replace={old: _LEVELS[old] for old in ("8192", "1024")},
    ),
    Run(
        'python scripts/simulate.py --validate compared.json --fit "RUN;RUN"',
        replace={"RUN;RUN": "isf@512:1;hbp@128:1,512:2:ulysses"},
    ),
    Run(
        "torchrun --nproc_per_node 2 scripts/compare_methods.py --job.config_file train_configs/debug_model.toml "
        "--select --data.max_samples 1000 --validation.max_samples 60 --training.global_batch_tokens 16384 "
        "--packing.curriculum_steps 0 --job.dump_folder outputs/compared --json compared.json",
        replace=_COMPARED,
    ),
    Run("python scripts/simulate.py --validate compared.json --profile outputs/compared/profile.json"),
    Run(
        "python scripts/gpu_check.py --device cpu --tiny --out gpu_check",
        "--steps environment,varlen,gpu_tests --minutes 3",
    ),
    Run("python scripts/bench_train.py --help"),
    Run("python scripts/bench_train.py", f"--lengths 256 {_FEW}"),
    Run(
        "python scripts/bench_train.py --flavors llama3_2_1b --lengths 16384,32768,65536,131072 --layers auto",
        _FEW,
        _BENCH,
    ),
    Run(
        "torchrun --nproc_per_node 2 scripts/bench_train.py --lengths 1024:1,8192:2",
        _FEW,
        {"1024:1,8192:2": "256:1,512:2"},
    ),
    Run(
        "torchrun --nproc_per_node 2 scripts/bench_train.py --swap --lengths 1024:1,8192:2 --policies none",
        _FEW,
        {"1024:1,8192:2": "256:1,512:2"},
    ),
    Run(
        "torchrun --nproc_per_node 2 scripts/bench_train.py --swap --lengths 1024:1,8192:2 --policies none "
        "--documents 600 --swap_iterations 4 --repeats 12",
        replace={"1024:1,8192:2": "256:1,512:2", "--repeats 12": "--repeats 1"},
    ),
    Run(
        "OMP_NUM_THREADS=1 python scripts/bench_train.py --flavors debug --lengths 1024,8192 --documents one,600 "
        "--compile both --repeats 9",
        replace={"1024,8192": "256", "--repeats 9": "--repeats 1 --policies none"},
    ),
    Run(
        "python scripts/bench_train.py --flavors llama3_1_8b --lengths 16384,32768,65536,131072 --layers auto "
        "--compile both --json 8b.json",
        _FEW,
        {"llama3_1_8b": "debug", "16384,32768,65536,131072": "256,512", "both": "off"},
    ),
    Run(
        "torchrun --nproc_per_node 8 scripts/bench_train.py --flavors llama3_1_8b --layers auto "
        "--lengths 8192:1,131072:8 --compile on --json 8b.json",
        _FEW,
        {"llama3_1_8b": "debug", "8192:1,131072:8": "256:1,512:2", "compile on": "compile off"},
    ),
    Run("python scripts/bench_data.py --job.config_file X.toml", "--rounds 1 --workers 0"),
    Run(
        "python scripts/bench_data.py --job.config_file train_configs/debug_model.toml --data.max_samples 12000 "
        "--rounds 3",
        replace={"12000": "100", "--rounds 3": "--rounds 1"},
    ),
    # Proofs.
    Run(
        "python scripts/verify_equivalence.py --job.config_file train_configs/debug_model.toml",
        "--shrink --num_samples 8 --world_sizes 1,2 --only levels",
    ),
    Run(
        "python scripts/verify_equivalence.py --job.config_file X.toml --shrink",
        "--num_samples 8 --world_sizes 1 --only CONTROL",
    ),
    Run("python scripts/verify_equivalence.py --job.config_file X.toml --shrink --only ulysses", "--num_samples 8"),
    Run(
        "python scripts/verify_equivalence.py --job.config_file train_configs/debug_model.toml "
        '--model.flavor debug_moe --max_tokens 512 --only "experts over"',
        "--shrink --num_samples 6",
    ),
    Run(
        "python scripts/plot_elastic.py --job.config_file train_configs/debug_model.toml "
        "--data.max_samples 2500 --validation.interval 4 --validation.max_samples 60 "
        "--checkpoint.interval 5 --svg hbp_titan/experiments/elastic.svg",
        "--stretches 2,1 --training.steps 0",
        _ELASTIC,
    ),
    Run(
        "python scripts/soak.py --minutes 60 --job.config_file train_configs/debug_model.toml --training.epochs 40 "
        "--checkpoint.interval 10 --validation.enable false --packing.curriculum_steps 0",
        "--kill_every 10 --training.steps 0",
        {
            "--minutes 60": "--minutes 0.3",
            "train_configs/debug_model.toml": "X.toml",
            "epochs 40": "epochs 4",
            "interval 10": "interval 2",
        },
    ),
    # The quality study: on the copy's own configuration, without bases.
    Run("python scripts/quality_study.py --parallel 2", f"--variants hbp --seeds 1 {_STUDY}"),
    Run(
        "python scripts/quality_study.py --variants isf,flat_sorted --seeds 1,2,3",
        f"--folder outputs/part {_STUDY}",
        {"isf,flat_sorted": "isf", "1,2,3": "1"},
    ),
    Run(
        "python scripts/quality_study.py --launch torchrun --ranks 8 --seeds 1,2,3 --folder outputs/study_8b "
        "--job.config_file train_configs/llama3_1_8b_hbp.toml --data.max_samples 20000 "
        "--data.validation_files held_out.jsonl",
        "--variants hbp --training.steps 1 --checkpoint.enable false",
        {"--ranks 8": "--ranks 2", "1,2,3": "1", "small/llama3_1_8b_hbp.toml": "X.toml", "20000": "60"},
    ),
    Run(
        "python scripts/quality_study.py --variants hbp --folder outputs/quality_48 --training.steps 48 "
        "--job.config_file outputs/quality/hbp/seed-1/run.toml "
        "--checkpoint.initial_load_path 'outputs/quality/base/seed-{seed}/hf'",
        "--seeds 1",
        {" --checkpoint.initial_load_path 'outputs/quality/base/seed-{seed}/hf'": "", "steps 48": "steps 2"},
    ),
]
"""In this order: some need what those before them left."""
