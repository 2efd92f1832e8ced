#!/usr/bin/env bash
# Sets up once, prepares the data, trains (resuming where a run stopped) and exports HF weights.
#   ./run_train.sh                                        the debug model on real text, two CPU ranks or all GPUs
#   NGPU=8 CONFIG_FILE=train_configs/llama3_1_8b_hbp.toml ./run_train.sh --training.steps 1000
#   COMM_MODE=fake NGPU=32 CONFIG_FILE=... ./run_train.sh  tries a configuration for 32 ranks: no GPU, no weights, no data
# env: NGPU ranks on this machine; CONFIG_FILE; LOG_RANK the rank that prints; MAX_RESTARTS how often torchrun starts the
#      ranks again when one dies (0); NUMA_BINDING how ranks are bound to the CPUs next to their GPU (node, or none;
#      torchrun --numa-binding); CUDA_VISIBLE_DEVICES="" to train on the CPU of a GPU machine; for several nodes NNODES, RDZV_ENDPOINT=host:port and RDZV_ID (the same on each).
#      Further arguments override the TOML: --section.key value; with COMM_MODE=fake, GPU is the kind of GPU to plan
#      for (h100-80gb). What happens when something fails: docs/checkpoint.md
set -euo pipefail
cd "$(dirname "$0")"

CONFIG_FILE=${CONFIG_FILE:-train_configs/debug_model.toml}
NNODES=${NNODES:-1}
export LOG_RANK=${LOG_RANK:-0}

source scripts/setup_env.sh run

case "${COMM_MODE:-}" in
    "")
        # Ends here, with torch's reason, where the machine has a GPU that torch cannot use.
        RANKS=$("$PY" -m hbp_titan.distributed.world ${NGPU:+"$NGPU"})
        NGPU=${RANKS%% *}
        ;;
    fake)
        NGPU=${NGPU:-$("$PY" -c 'import torch; print(torch.cuda.device_count() or 2)')}
        exec "$PY" -m hbp_titan.tuning.dry_run --world_size $((NGPU * NNODES)) --gpu "${GPU:-h100-80gb}" \
            --job.config_file "$CONFIG_FILE" "$@"
        ;;
    *)
        echo "error: COMM_MODE=$COMM_MODE is not known: fake is (a dry run), and none for a run" >&2
        exit 1
        ;;
esac

# A rank's share of this machine's cores, at least one.
CORES=$(($(getconf _NPROCESSORS_ONLN) / NGPU))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > 0 ? CORES : 1))}

for word in "$@"; do
    case "$word" in -h | --help) exec "$PY" -m hbp_titan.train --help ;; esac
done

# Every mistake in configuration or data ends here, in one line, before a rank is started.
"$PY" scripts/prepare_data.py --job.config_file "$CONFIG_FILE" --world_size $((NGPU * NNODES)) "$@"

# By the environment, because a torchrun that does not know of it has no such option.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}

# Levels that take turns leave the allocator with blocks of other sizes: these grow and shrink instead. The name with
# CUDA in it is the older one of the same variable.
[ -n "${PYTORCH_CUDA_ALLOC_CONF:-}" ] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# RANKS: the number of ranks, then torchrun's options for GPUs.
exec "$PY" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node $RANKS --max-restarts "${MAX_RESTARTS:-0}" \
    --rdzv-backend c10d --rdzv-endpoint "${RDZV_ENDPOINT:-localhost:0}" --rdzv-id "${RDZV_ID:-hbp_titan}" \
    -m hbp_titan.train --job.config_file "$CONFIG_FILE" "$@"
