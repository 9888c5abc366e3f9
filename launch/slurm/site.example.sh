# shellcheck shell=bash
# What this cluster is like, in one place. Copy it to `site.sh` beside it, which git ignores, and keep what fits:
#
#   cp launch/slurm/site.example.sh launch/slurm/site.sh
#
# It is read twice: before a job is submitted, by `textgen submit` (or by hand: `source launch/slurm/site.sh`, then
# `sbatch`), and inside each job by the scripts of this folder. Every line may be left out.

# --- before submitting ------------------------------------------------------------------------------------------------
# `#SBATCH` lines cannot read variables; sbatch itself reads SBATCH_*. They win over `#SBATCH` lines, and flags on the
# command line win over them. All names: `man sbatch`, "INPUT ENVIRONMENT VARIABLES".

# export SBATCH_ACCOUNT=my_project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=h100
# export SBATCH_MEM_PER_NODE=0                # all memory of each node
# export TEXTGEN_HOME=$HOME/textgen           # the checkout, for jobs from another folder; `textgen submit` knows it
# export TEXTGEN_PROCESSES_PER_NODE=4         # of jobs without GPUs; left out: 1. On GPUs there is one for each

[ -n "${SLURM_JOB_ID:-}" ] || return 0        # what follows is for jobs only

# --- inside a job: software -------------------------------------------------------------------------------------------

# module purge
# module load cuda/12.8

# The Python that has textgen's requirements. Left out: the checkout's `.venv` where there is one, else `python3`.
# export TEXTGEN_PYTHON=$HOME/venvs/textgen/bin/python

# A container: the words that stand before every command. Mount the checkout, the runs and the caches at the paths that
# they have outside, and name the Python inside.
# TEXTGEN_CONTAINER=(apptainer exec --nv --bind "/scratch/$USER" "/scratch/$USER/textgen.sif")
# export TEXTGEN_PYTHON=python3

# --- inside a job: files ----------------------------------------------------------------------------------------------
# Compute nodes often reach no network. Fetch what is needed on a login node first (`textgen prepare` with the flags of
# the training: it encodes the text too), then say so here; else every job waits for time-outs. The encoded text lies in
# `~/.cache/textgen`, or where the flag `--data.cache_dir` says: like the two below on a disk that all nodes share.

# export HF_HOME=/scratch/$USER/huggingface   # datasets and models of the Hugging Face hub
# export HF_HUB_OFFLINE=1
# export WANDB_MODE=offline                   # later, on a login node: wandb sync runs/*/wandb/offline-run-*

# --- inside a job: NCCL, between GPUs ---------------------------------------------------------------------------------
# Nothing is needed where NCCL finds the right network. What it found: NCCL_DEBUG=INFO.

# export NCCL_DEBUG=WARN                      # version and errors; INFO: rings, transports, interfaces
# export NCCL_SOCKET_IFNAME=^lo,docker        # interfaces to meet on, and to send on without InfiniBand; ^ excludes
# export NCCL_IB_HCA=mlx5                     # InfiniBand adapters to use: all whose names begin so
# export NCCL_IB_GID_INDEX=3                  # RoCE: which of an adapter's addresses; 3 often is version 2 over IPv4
# export NCCL_IB_TIMEOUT=22                   # 4.096 us x 2^22 = 17 s until a packet counts as lost; busy fabrics
# export NCCL_NET_GDR_LEVEL=PHB               # adapter and GPU on the same processor talk without main memory
# export NCCL_P2P_DISABLE=1                   # no direct copies between a node's GPUs: slow, for finding faults
# export GLOO_SOCKET_IFNAME=eth0              # CPU jobs on nodes with several networks: the one to use
