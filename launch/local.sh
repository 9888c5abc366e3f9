#!/usr/bin/env bash
# Train on this machine: one process for each GPU, or one on the processor where there is none.
#
#   launch/local.sh --config launch/presets/default.yaml    # flags of train_distributed.py
#   PROCESSES=2 launch/local.sh ...                         # two GPUs only, or two processes on a processor
#   CUDA_VISIBLE_DEVICES= launch/local.sh ...               # the processor, although there are GPUs
set -euo pipefail
home=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)

fail() {
    echo "error: $1" >&2
    exit 2
}

count_gpus() {
    local count=0 device devices found
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        IFS=, read -ra devices <<< "$CUDA_VISIBLE_DEVICES"
        for device in "${devices[@]}"; do
            [[ $device != -1 && $device != NoDevFiles ]] || break # CUDA reads no further
            count=$((count + 1))
        done
    elif command -v nvidia-smi > /dev/null; then
        found=$(nvidia-smi -L) ||
            fail "\`nvidia-smi -L\` fails: mend the driver, or set CUDA_VISIBLE_DEVICES= to train on the processor"
        count=$(grep -c '^GPU ' <<< "$found") || true # it prints 0 and fails where there are none
    fi
    echo "$count"
}

gpus=$(count_gpus)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES must be a number of at least 1: $processes"

accelerate=$(command -v accelerate) || accelerate=$home/.venv/bin/accelerate
[ -x "$accelerate" ] || fail "there is no \`accelerate\`: run \`make .venv/installed\` in $home, or activate its environment"

if [ -z "${OMP_NUM_THREADS:-}" ]; then # accelerate would give each process one thread
    cores=$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
fi
# else the launcher dies of SIGUSR1, and kills its processes 30 s after any other signal
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 PET_SHUTDOWN_TIMEOUT=120

exec "$accelerate" launch --config_file "$home/accelerate_config.yaml" --num_processes "$processes" \
    --main_process_port 0 "$home/train_distributed.py" "$@"
