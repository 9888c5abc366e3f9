"""Checks of a machine: versions, GPUs, processors, limits of the operating system."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from textgen.diagnosis.process_group import ProcessGroup
from textgen.diagnosis.results import Check
from textgen.distributed.world import env_flag
from textgen.packages import HOME, foreign_version, how_to_install

PACKAGE = Path(__file__).parents[1]
"""the folder of textgen"""

DISTRIBUTIONS = ("torch", "accelerate", "safetensors", "sentencepiece", "datasets", "wandb")
"""packages whose versions are compared"""

MIN_OPEN_FILES = 1024
MIN_SHM_BYTES = 1 << 30  # for NCCL's buffers between the GPUs of a machine; containers start with 64 MiB
MIN_LOCKED_BYTES = 64 << 20  # for InfiniBand


def code_digest(package: Path = PACKAGE) -> str:
    """Return a hash of all source files of textgen, equal for a checkout and an installed wheel."""
    folders = package, package / "tokenizer"  # a link in a checkout, which `rglob` does not follow
    files = {path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".cpp")}
    named = "".join(f"{path.relative_to(package)} {path.read_text(encoding='utf-8')}" for path in sorted(files))
    return hashlib.sha256(named.encode()).hexdigest()[:8]


def check_versions(group: ProcessGroup) -> Check:
    """Compare the versions of packages, and textgen's source code, between all processes. Collective."""
    versions = {"python": platform.python_version(), "textgen": f"code {code_digest()}"}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    everyone = group.gather(versions)
    missing = sorted({name for one in everyone for name, version in one.items() if version == "missing"})
    different = [name for name in versions if len({one[name] for one in everyone}) > 1]
    if missing:
        advice = f"missing {', '.join(missing)}: {how_to_install(*missing)}"
    elif different:
        listed = (f"{name} ({', '.join(sorted({one[name] for one in everyone}))})" for name in different)
        advice = f"not the same on all processes: {', '.join(listed)}; start them from one environment"
    elif (foreign := foreign_version()) is not None:
        advice = (
            f"the installed `textgen` {foreign} is another project of this name: run `pip uninstall textgen`, then "
            f"`pip install -e .` in `{HOME}`"
        )
        return Check("versions", "warn", versions, advice)
    else:
        return Check("versions", "ok", versions)
    return Check("versions", "fail", versions, advice)


def check_gpus(
    device: torch.device, *, environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")
) -> Check:
    """Compare the GPUs that driver, Slurm and environment promise with those of torch; report this process's GPU.

    Args:
        device: of this process.
        environment: has CUDA_VISIBLE_DEVICES, SLURM_GPUS_ON_NODE and ACCELERATE_USE_CPU.
        devices: the directory in which the driver lists its GPUs.
    """
    drivers = _driver_versions()
    found = max(len(drivers), sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in devices.glob("nvidia*")))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        promised = max(found, int(environment.get("SLURM_GPUS_ON_NODE") or 0))
    else:  # the user or Slurm has chosen: fewer than the driver lists, or none
        promised = len([name for name in visible.split(",") if name not in ("", "-1", "NoDevFiles")])
    seen = torch.cuda.device_count()
    value: dict[str, str | int | float] = {"seen": seen, "promised": promised}
    if seen < promised and not env_flag(environment, "ACCELERATE_USE_CPU"):
        remedy = (
            f"torch {torch.__version__} is built without CUDA: install another build"
            if torch.version.cuda is None
            else "run `nvidia-smi` and `python -c 'import torch; torch.cuda.init()'` for the reason"
        )
        return Check("gpus", "fail", value, f"{promised} GPUs are promised, torch sees {seen}: {remedy}")
    if device.type != "cuda":
        return Check("gpus", "ok", value)
    free, total = torch.cuda.mem_get_info(device)
    used_by_others = total - free - torch.cuda.memory_reserved(device)
    major, minor = torch.cuda.get_device_capability(device)
    value |= {
        "name": torch.cuda.get_device_name(device),
        "capability": f"{major}.{minor}",
        "driver": drivers[0] if drivers else "unknown",
        "cuda": str(torch.version.cuda),
        "free_gb": free / 1e9,
        "total_gb": total / 1e9,
    }
    if used_by_others > 0.1 * total:  # a context of CUDA and NCCL's buffers use about 1 GB
        return Check("gpus", "warn", value, "other programs use more than a tenth of a GPU's memory: see `nvidia-smi`")
    return Check("gpus", "ok", value)


def _driver_versions() -> list[str]:
    """Return the driver's version, once per GPU; empty without a driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10)
        return done.stdout.split() if done.returncode == 0 else []
    return []


def check_processors(group: ProcessGroup) -> Check:
    """Compare the threads of all processes of this machine with the cores that they may use. Collective."""
    machine, threads = socket.gethostname(), torch.get_num_threads()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    everyone = group.gather({"machine": machine, "cores": cores, "threads": threads})
    here = [one for one in everyone if one["machine"] == machine]
    available = min(len({core for one in here for core in one["cores"]}), cpu_quota())
    running = sum(one["threads"] for one in here)
    value = {"cores": available, "processes": len(here), "threads": threads}
    fitting = max(1, int(available // len(here)))
    if running > available:
        advice = f"more threads than cores on a machine: export OMP_NUM_THREADS={fitting}"
        return Check("processors", "warn", value, advice)
    if group.device.type == "cpu" and 2 * running < available:
        return Check("processors", "warn", value, f"most cores are idle: export OMP_NUM_THREADS={fitting}")
    return Check("processors", "ok", value)


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the number of processors that a container allows; infinity without a limit."""
    for name in ("cpu.max", "cpu/cpu.cfs_quota_us"):  # cgroups version 2, version 1
        with suppress(OSError, ValueError):
            words = (cgroup / name).read_text(encoding="utf-8").split()
            period = words[1] if len(words) > 1 else (cgroup / "cpu/cpu.cfs_period_us").read_text(encoding="utf-8")
            return math.inf if words[0] in ("max", "-1") else int(words[0]) / int(period)
    return math.inf


def check_limits(device: torch.device) -> Check:
    """Check the limits that can end a training: open files, shared memory, locked memory."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shm = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    unlimited = resource.RLIM_INFINITY
    value = {
        "open_files": "unlimited" if files == unlimited else files,
        "shm_gb": shm / 1e9,
        "locked_mb": "unlimited" if locked == unlimited else locked / 1e6,
    }
    cuda = device.type == "cuda"
    problems = []
    if files != unlimited and files < MIN_OPEN_FILES:
        problems.append(f"the limit of open files is low: `ulimit -n {MIN_OPEN_FILES}`")
    if cuda and shm < MIN_SHM_BYTES:
        problems.append("NCCL needs a larger /dev/shm: `docker run --ipc=host`, or `--shm-size=1g`")
    if cuda and locked != unlimited and locked < MIN_LOCKED_BYTES:
        problems.append("InfiniBand needs locked memory: `ulimit -l unlimited`")
    return Check("limits", "warn" if problems else "ok", value, "; ".join(problems))
