# shellcheck shell=bash
# What the jobs of this folder have in common. Sourced by them with `home`, the checkout; sets
#   python       the words that start Python, in the site's container if there is one
#   processes    of each node: one for each GPU, else TEXTGEN_PROCESSES_PER_NODE, else 1
: "${home:?}"

TEXTGEN_CONTAINER=()
if [ -f "$home/launch/slurm/site.sh" ]; then
    set +u # `module` and the like know nothing of it
    # shellcheck source=launch/slurm/site.example.sh
    source "$home/launch/slurm/site.sh"
    set -u
fi

default=python3
[ ! -x "$home/.venv/bin/python" ] || default=$home/.venv/bin/python
# shellcheck disable=SC2034 # for those who source this
python=("${TEXTGEN_CONTAINER[@]}" "${TEXTGEN_PYTHON:-$default}")
export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}

processes=${SLURM_GPUS_ON_NODE:-0}
[ "$processes" != 0 ] || processes=${TEXTGEN_PROCESSES_PER_NODE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE > processes ? SLURM_CPUS_ON_NODE / processes : 1))}
