"""`textgen doctor`: check a machine, or all machines of an allocation, before hours are spent.

Runs alone and under whatever starts a training. Every process makes every check, in the same order; what they found is
gathered and the main process prints it. A check that fails is a line, never an exception: the others are still made.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from textgen.commands.parsing import PEER_WAIT_SECONDS, parse_train_config
from textgen.config import ModelConfig, TrainConfig
from textgen.distributed.signals import StopSignals, end_with_launcher
from textgen.distributed.world import env_flag
from textgen.errors import TextgenError
from textgen.files import fsync_directory, write_atomic
from textgen.runs.directory import RunDirectory

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from textgen.data.store import TokenStore


Status = Literal["ok", "warn", "fail"]
Value = Mapping[str, str | int | float]
T = TypeVar("T")

HELP = """usage: textgen doctor [--json] [--config FILE] [--SETTING VALUE] ...

Check the machine, or all machines of an allocation, that a training would run on: versions, processes, GPUs,
processors, precision, an all-reduce, the disk of `--run_dir`, free space, data and tokenizer without a network, W&B,
clocks, limits.

  --json    print one JSON object and nothing else
  others    as `train_distributed.py` takes them: what would be trained, and where to

Runs alone, under `accelerate launch -m textgen doctor`, torchrun and `srun`; a value a/b/c is the smallest, the median
and the largest of the processes'. Exit code 1 where a check failed, 2 where a flag is wrong.
"""

PACKAGE = Path(__file__).parents[1]
"""the folder of textgen"""

PACKAGES = ("torch", "accelerate", "safetensors", "sentencepiece", "datasets", "wandb")

# How long processes wait for each other, unless `--distributed_timeout` is shorter. The slowest of many machines may
# take a minute to import torch from a cold network disk.
WAIT_SECONDS = 120.0

LATENCY_ROUNDS = 100
BANDWIDTH_ROUNDS = 5
BANDWIDTH_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
CLOCK_ROUNDS = 30
MAX_CLOCK_SECONDS = 1.0
PROBE = ".textgen-doctor-"
PROBE_BYTES = 16 << 20
SEEN_SECONDS = 5.0  # for a file of one machine to show on the others
STALE_SECONDS = 3600.0
CACHE_BYTES = 1 << 30  # of a token store that is still to be made, the default's ten times over
MIN_OPEN_FILES = 1024
MIN_SHM_BYTES = 1 << 30  # NCCL's buffers between the GPUs of a machine; containers come with 64 MiB
MIN_LOCKED_BYTES = 64 << 20
MATRIX = {"cpu": 256, "cuda": 4096}


@dataclass(frozen=True)
class Check:
    """What one process found."""

    name: str
    status: Status
    value: Value
    """figures by name, units in the names, and texts"""
    advice: str = ""
    """where it is not ok: what is wrong and what to do, in one line"""


class Peers:
    """The processes that joined; one that is alone where they did not, or once one of them was lost.

    Attributes:
        problem: why this process is alone, if it should not be.
    """

    def __init__(self, accelerator: Accelerator | None, *, problem: str = "") -> None:
        self.accelerator, self.problem = accelerator, problem
        self.main = self.rank == 0

    @classmethod
    def join(cls, config: TrainConfig) -> Peers:
        """Join the other processes as a training would. Collective."""
        from textgen.distributed import launch

        try:
            accelerator = launch.start(
                config.mixed_precision,
                batch_size=config.batch_size,
                gradient_accumulation_steps=config.gradient_accumulation_steps,
                model=config.model,
                seq_len=config.seq_len,
                timeout=min(config.distributed_timeout, WAIT_SECONDS),
            )
        except (ValueError, RuntimeError) as error:  # TextgenError, or not all came in time
            return cls(None, problem=_first_line(error))
        return cls(accelerator)

    @property
    def rank(self) -> int:
        """Number of this process, the launcher's where it did not join."""
        if self.accelerator is not None:
            return int(self.accelerator.process_index)
        return int(os.environ.get("RANK", "0"))

    @property
    def size(self) -> int:
        """Number of processes, this one included."""
        return 1 if self.accelerator is None else int(self.accelerator.num_processes)

    @property
    def precision(self) -> str | None:
        """What the processes train in; None where they did not join."""
        return None if self.accelerator is None else str(self.accelerator.mixed_precision)

    @property
    def device(self) -> torch.device:
        """What this process computes on."""
        import torch

        if self.accelerator is not None:
            return torch.device(self.accelerator.device.type, self.accelerator.device.index)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, which JSON can hold; they travel as tensors of bytes. Collective."""
        return self.attempt(lambda: self._gather(value), otherwise=[value])

    def _gather(self, value: Any) -> list[Any]:
        import torch

        if self.accelerator is None or self.size == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.accelerator.gather(torch.tensor([len(content)], device=self.device)).tolist()
        row = torch.zeros((1, max(sizes)), dtype=torch.uint8)
        row[0, : len(content)] = content
        rows = self.accelerator.gather(row.to(self.device)).cpu()  # (processes, bytes)
        return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]

    def attempt(self, action: Callable[[], T], *, otherwise: T) -> T:
        """Do something with all processes; where one of them is lost, go on alone with what is to be had then."""
        try:
            return action()
        except RuntimeError as error:
            self.accelerator = None
            self.problem = self.problem or f"another process has ended, or did not answer: {_first_line(error)}"
            return otherwise


def doctor_command(argv: Sequence[str]) -> None:
    """Check what a training would run on, print a table or JSON, and end with exit code 1 where a check failed."""
    if {"--help", "-h"} & set(argv):
        print(HELP, end="")
        raise SystemExit(0)
    config = parse_train_config([flag for flag in argv if flag != "--json"], prog="textgen doctor")
    os.environ["HF_HUB_OFFLINE"] = "1"  # read at the import of the hub's client: it is never asked
    end_with_launcher()
    with StopSignals():
        peers = Peers.join(config)
        several = peers.size > 1
        checks = examine(peers, config)
        everyone = peers.gather({"machine": socket.gethostname(), "checks": [asdict(check) for check in checks]})
        everyone[0]["checks"].insert(0, asdict(check_world(peers, everyone)))
        rows = merge(everyone)
        failed = any(row["status"] == "fail" for row in rows)
        if peers.main:
            print(as_json(rows, everyone) if "--json" in argv else as_table(rows), flush=True)
        elif peers.problem:
            # The main process has the word; where it lives, it needs about as long as this one, and launchers end it
            # once another one has ended.
            time.sleep(PEER_WAIT_SECONDS)
            print(f"process {peers.rank}: {peers.problem}", file=sys.stderr)
        peers.gather(None)  # no process ends before the main one has spoken
    if failed or several:  # of several processes none tears the group down before another (`cli.run`): that one aborts
        raise SystemExit(int(failed))


def examine(peers: Peers, config: TrainConfig) -> list[Check]:
    """Make all checks but that of the world itself. Collective."""
    run_dir, device = Path(config.run_dir).absolute(), peers.device
    data, store = find_data(config)
    return [
        check_versions(peers),
        _guard("gpus", lambda: check_gpus(device)),
        check_processors(peers),
        _guard("precision", lambda: check_precision(config, device, peers.precision)),
        check_all_reduce(peers),
        check_disk(peers, run_dir),
        _guard("space", lambda: check_space(config, run_dir, store)),
        check_data(peers, data, store),
        _guard("wandb", lambda: check_wandb(config)),
        check_clocks(peers),
        _guard("limits", lambda: check_limits(device)),
    ]


def _guard(name: str, check: Callable[[], Check]) -> Check:
    """Make a check that needs no other process; what it raises is its answer."""
    try:
        return check()
    except Exception as error:  # drivers, file systems and torch each raise their own
        return Check(name, "fail", {}, _first_line(error))


def _first_line(error: BaseException) -> str:
    message = str(error).partition("\n")[0]
    return message if isinstance(error, ValueError | OSError) and message else f"{type(error).__name__}: {message}"


# --- the checks ------------------------------------------------------------------------------------------------------


def check_world(peers: Peers, everyone: Sequence[Mapping[str, Any]]) -> Check:
    """Say what joined, as the launcher's promise was kept."""
    if peers.problem:
        return Check("world", "fail", {}, peers.problem)
    assert peers.accelerator is not None
    from torch import distributed

    value = {
        "processes": peers.size,
        "machines": len({one["machine"] for one in everyone}),
        "backend": distributed.get_backend() if distributed.is_initialized() else "none",
        "device": peers.device.type,
        "precision": str(peers.accelerator.mixed_precision),
    }
    return Check("world", "ok", value)


def code_digest(package: Path = PACKAGE) -> str:
    """Return a hash of all source files of textgen, the same for a checkout and an installed wheel."""
    folders = package, package / "tokenizer"  # of a checkout the latter is a link, into which `rglob` does not go
    files = {path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".cpp")}
    named = "".join(f"{path.relative_to(package)} {path.read_text(encoding='utf-8')}" for path in sorted(files))
    return hashlib.sha256(named.encode()).hexdigest()[:8]


def check_versions(peers: Peers) -> Check:
    """Compare versions, and textgen's own code, over all processes. Collective."""
    versions = {"python": platform.python_version(), "textgen": f"code {code_digest()}"}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    everyone = peers.gather(versions)
    missing = sorted({name for one in everyone for name, version in one.items() if version == "missing"})
    other = [name for name in versions if len({one[name] for one in everyone}) > 1]
    if missing:
        advice = f"install {', '.join(missing)}: `pip install -e .`"
    elif other:
        told = (f"{name} ({', '.join(sorted({one[name] for one in everyone}))})" for name in other)
        advice = f"not the same on all processes: {', '.join(told)}; start them from one environment"
    else:
        return Check("versions", "ok", versions)
    return Check("versions", "fail", versions, advice)


def check_gpus(
    device: torch.device, *, environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")
) -> Check:
    """Compare the GPUs that driver, Slurm and environment promise with those torch sees; look at this process's.

    Args:
        device: of this process.
        environment: where CUDA_VISIBLE_DEVICES, SLURM_GPUS_ON_NODE and ACCELERATE_USE_CPU are looked for.
        devices: where the driver shows its GPUs.
    """
    import torch

    drivers = _nvidia_smi()
    found = max(len(drivers), sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in devices.glob("nvidia*")))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        promised = max(found, int(environment.get("SLURM_GPUS_ON_NODE") or 0))
    else:
        promised = len([name for name in visible.split(",") if name not in ("", "-1", "NoDevFiles")])
    seen = torch.cuda.device_count()
    value: dict[str, str | int | float] = {"seen": seen, "promised": promised}
    if seen < promised and not env_flag(environment, "ACCELERATE_USE_CPU"):
        why = (
            f"torch {torch.__version__} is built without CUDA: install another build"
            if torch.version.cuda is None
            else "`nvidia-smi` and `python -c 'import torch; torch.cuda.init()'` say why"
        )
        return Check("gpus", "fail", value, f"{promised} GPUs are promised, torch sees {seen}: {why}")
    if device.type != "cuda":
        return Check("gpus", "ok", value)
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    major, minor = torch.cuda.get_device_capability(device)
    value |= {
        "name": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}",
        "driver": drivers[0] if drivers else "unknown", "cuda": str(torch.version.cuda),
        "free_gb": free / 1e9, "total_gb": total / 1e9,
    }  # fmt: skip
    if others > 0.1 * total:  # a context of CUDA and NCCL's buffers take about 1 GB
        return Check("gpus", "warn", value, "something else holds a tenth of a GPU's memory or more: see `nvidia-smi`")
    return Check("gpus", "ok", value)


def _nvidia_smi() -> list[str]:
    """Return the driver's version once for each GPU it has; nothing where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return done.stdout.split() if done.returncode == 0 else []
    return []


def check_processors(peers: Peers) -> Check:
    """Compare the threads of all processes of this machine with the cores they may use. Collective."""
    import torch

    machine, threads = socket.gethostname(), torch.get_num_threads()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    everyone = peers.gather({"machine": machine, "cores": cores, "threads": threads})
    here = [one for one in everyone if one["machine"] == machine]
    available = min(len({core for one in here for core in one["cores"]}), cpu_quota())
    running = sum(one["threads"] for one in here)
    value = {"cores": available, "processes": len(here), "threads": threads}
    fitting = max(1, int(available // len(here)))
    if running > available:
        advice = f"more threads than cores on a machine: export OMP_NUM_THREADS={fitting}"
        return Check("processors", "warn", value, advice)
    if peers.device.type == "cpu" and 2 * running < available:
        return Check("processors", "warn", value, f"most cores stay idle: export OMP_NUM_THREADS={fitting}")
    return Check("processors", "ok", value)


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the processors' worth of time that a container allows; infinity where it sets no limit."""
    for name in ("cpu.max", "cpu/cpu.cfs_quota_us"):
        with suppress(OSError, ValueError):
            words = (cgroup / name).read_text().split()
            period = words[1] if len(words) > 1 else (cgroup / "cpu/cpu.cfs_period_us").read_text()
            return math.inf if words[0] in ("max", "-1") else int(words[0]) / int(period)
    return math.inf


def check_precision(config: TrainConfig, device: torch.device, joined_in: str | None = None) -> Check:
    """Train a step of a tiny LSTM in each dtype, and time a matrix product relative to float32.

    Args:
        config: of the training.
        device: of this process.
        joined_in: the precision that the processes chose; None where they did not join.
    """
    import torch

    from textgen.distributed import launch
    from textgen.hardware import has_bfloat16

    use_cpu = device.type == "cpu"
    told = os.environ.get("ACCELERATE_MIXED_PRECISION")
    chosen = joined_in or launch.resolve_precision(config.mixed_precision, told, use_cpu=use_cpu)
    value: dict[str, str | int | float] = {"training": chosen}
    seconds = _product_seconds(torch.float32, device)
    for dtype in launch.LSTM_DTYPES.values():
        speed = 1.0 if dtype == torch.float32 else seconds / _product_seconds(dtype, device)
        value[_name(dtype)] = round(speed, 2) if _trains_in(dtype, device) else "does not train"
    if not use_cpu:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        value["tf32"] = round(seconds / _product_seconds(torch.float32, device), 2)
        torch.set_float32_matmul_precision(before)
    if isinstance(value[_name(launch.LSTM_DTYPES[chosen])], str):
        return Check("precision", "fail", value, f"no LSTM trains in {chosen} here: `--mixed_precision no`")
    if chosen == "bf16" and not has_bfloat16(use_cpu=use_cpu):
        return Check("precision", "warn", value, "bf16 is slow on this hardware: `--mixed_precision no`")
    return Check("precision", "ok", value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _trains_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether an LSTM's forward and backward pass work in a dtype, and give finite gradients."""
    import torch

    from textgen.model.lstm import LSTMLanguageModel

    model = LSTMLanguageModel(ModelConfig(embedding_dim=32, hidden_size=32, num_layers=1), 64).to(device)
    tokens = torch.arange(64, device=device).reshape(4, 16)
    try:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            nats, (hidden, _) = model(tokens, model.zero_state(4), tokens)
        nats.backward()
    except RuntimeError:
        return False
    finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    return finite and hidden.dtype == dtype


def _product_seconds(dtype: torch.dtype, device: torch.device) -> float:
    import torch

    size = MATRIX[device.type]
    a = torch.ones((size, size), dtype=dtype, device=device)
    return _median_seconds(lambda: a @ a, device, rounds=9)


def _median_seconds(action: Callable[[], object], device: torch.device, *, rounds: int) -> float:
    """Return how long an action lasts until its result is there, after one that is not counted."""
    import torch

    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def check_all_reduce(peers: Peers, all_reduce: Callable[[torch.Tensor], object] | None = None) -> Check:
    """Sum a tensor over all processes: is it right, and how long does it take? Collective.

    Algorithm bandwidth is bytes over seconds; bus bandwidth, which does not depend on the number of processes n, is
    2 (n - 1) / n times that, as nccl-tests has it (doc/PERFORMANCE.md).

    Args:
        peers: the processes.
        all_reduce: sums a tensor in place; torch's.
    """
    if peers.size == 1:
        return Check("all_reduce", "ok", {"skipped": "one process"})

    from torch import distributed

    lost = Check("all_reduce", "fail", {}, "a process was lost: look for its error; NCCL_DEBUG=INFO tells more")
    return peers.attempt(lambda: _measure_all_reduce(peers, all_reduce or distributed.all_reduce), otherwise=lost)


def _measure_all_reduce(peers: Peers, reduce: Callable[[torch.Tensor], object]) -> Check:
    import torch

    device, count = peers.device, BANDWIDTH_BYTES[peers.device.type] // 4
    pattern = torch.arange(count, device=device).remainder(251).float()  # sums of small integers are exact in float32
    summed = pattern + peers.rank
    reduce(summed)
    wrong = int((summed != pattern * peers.size + peers.size * (peers.size - 1) / 2).sum())
    small, large = torch.zeros(1, device=device), torch.zeros(count, device=device)
    latency = _median_seconds(lambda: reduce(small), device, rounds=LATENCY_ROUNDS)
    seconds = _median_seconds(lambda: reduce(large), device, rounds=BANDWIDTH_ROUNDS)
    algorithm = 4 * count / seconds / 1e9
    value = {
        "latency_us": latency * 1e6, "mib": 4 * count / (1 << 20), "algorithm_gb_per_s": algorithm,
        "bus_gb_per_s": algorithm * 2 * (peers.size - 1) / peers.size,
    }  # fmt: skip
    if wrong:
        advice = "sums over the processes are wrong: do not train here; NCCL_DEBUG=INFO, NCCL_P2P_DISABLE=1 tell more"
        return Check("all_reduce", "fail", value | {"wrong_sums": wrong}, advice)
    return Check("all_reduce", "ok", value)


def check_disk(peers: Peers, run_dir: Path) -> Check:
    """Write where the run will lie, and see whether every process sees it and the lock on it. Collective.

    Everything is written into one directory, which is removed in the end.
    """
    place = _existing(run_dir)
    probe, lock, mine = Path(), None, {"name": "", "error": "", "value": {}}
    try:
        if peers.main:
            try:
                _remove_stale(place)
                probe = place / f"{PROBE}{uuid.uuid4().hex}"
                probe.mkdir()
                lock = os.open(probe / "lock", os.O_CREAT | os.O_RDWR)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine |= {"value": _write_probe(probe), "name": probe.name}
            except OSError as error:
                mine["error"] = f"`{place}`: {error.strerror}"
        first = peers.gather(mine)[0]
        seen = _look_at_probe(place / first["name"]) if first["name"] else ""
        everyone = peers.gather({"seen": seen, "who": f"process {peers.rank} on {socket.gethostname()}"})
    finally:
        if lock is not None:
            os.close(lock)
        if probe.name:
            shutil.rmtree(probe, ignore_errors=True)
    value = {"path": str(place)} | first["value"]
    if first["error"]:
        return Check("disk", "fail", value, f"{first['error']}: name a `--run_dir` that can be written to and locked")
    blind = [f"{one['who']} {one['seen']}" for one in everyone if one["seen"]]
    if blind:
        more = f" and {len(blind) - 1} more" if len(blind) > 1 else ""
        advice = f"{blind[0]}{more}: `--run_dir` must lie on one disk that all processes share, with locks"
        return Check("disk", "fail", value, advice)
    return Check("disk", "ok", value | {"seen_by": len(everyone)})


def _existing(path: Path) -> Path:
    """Return the directory itself, or the nearest one above it that is there."""
    return next(place for place in (path, *path.parents) if os.path.exists(place))


def _remove_stale(place: Path) -> None:
    """Remove what a doctor left that was killed."""
    for left in place.glob(f"{PROBE}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _write_probe(probe: Path) -> dict[str, float]:
    """Do to a disk what a training does, and return how long it took."""
    size = min(PROBE_BYTES, shutil.disk_usage(probe).free // 4)
    content = os.urandom(1 << 20) * (size >> 20) or os.urandom(size)  # random, since some disks compress
    started = time.perf_counter()
    with (probe / "large").open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    (probe / "large").unlink()
    started = time.perf_counter()
    write_atomic(probe / "replaced", "old")
    write_atomic(probe / "replaced", "new")
    (probe / "aside").mkdir()
    (probe / "aside").rename(probe / "renamed")
    fsync_directory(probe)
    if (probe / "replaced").read_text() != "new" or not (probe / "renamed").is_dir():
        raise OSError(0, "a file that was renamed over another does not show")
    return {"write_mb_per_s": len(content) / seconds / 1e6, "rename_ms": (time.perf_counter() - started) * 1e3}


def _look_at_probe(probe: Path) -> str:
    """Return what is wrong with the main process's files as this process sees them; nothing where nothing is."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not os.path.isdir(probe / "renamed"):
        if time.monotonic() > deadline:
            return "does not see the main process's files"
        time.sleep(0.02)
    try:
        with (probe / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return ""
    except OSError as error:
        return f"cannot lock the main process's files ({error.strerror})"
    return "gets a lock that the main process holds"


def check_space(config: TrainConfig, run_dir: Path, store: TokenStore | None) -> Check:
    """Compare free space with what the training's checkpoints take at a time, as the training will at its start."""
    import torch

    from textgen.model.lstm import LSTMLanguageModel
    from textgen.training.resume import checkpoint_bytes, checkpoints_at_a_time, state_shapes
    from textgen.training.step import steps_per_epoch

    vocab_size = store.record["vocab_size"] if store else config.tokenizer.vocab_size
    with torch.device("meta"):
        model = LSTMLanguageModel(config.model, vocab_size)
    shapes = state_shapes(model, batch_size=config.batch_size, averaged=config.ema_decay is not None)
    size = checkpoint_bytes(shapes)
    count = config.keep_last + 2
    if store is not None:
        size += len(store.tokenizer.model_proto)
        per_epoch = steps_per_epoch(config, store)
        total = min(config.max_epochs * per_epoch, config.max_steps or sys.maxsize)
        count = checkpoints_at_a_time(config, total_steps=total, per_epoch=per_epoch)
    place, cache = _existing(run_dir), _existing(Path(config.data.cache_dir).expanduser().absolute())
    free, cache_free = shutil.disk_usage(place).free, shutil.disk_usage(cache).free
    value = {
        "parameters": model.num_parameters, "checkpoint_mb": size / 1e6, "checkpoints": count,
        "free_gb": round(free / 1e9, 2), "cache_free_gb": round(cache_free / 1e9, 2),
    }  # fmt: skip
    try:
        RunDirectory(place, main=True).require_space(size, count=count)
    except TextgenError as error:
        return Check("space", "fail", value, str(error))
    if store is None and cache_free < CACHE_BYTES:
        advice = f"`{cache}` has {cache_free / 1e6:,.0f} MB for a token store that is still to be made"
        return Check("space", "warn", value, f"{advice}: see `--data.cache_dir`")
    return Check("space", "ok", value)


def find_data(config: TrainConfig) -> tuple[Check, TokenStore | None]:
    """Look for the training's token store, and where there is none for its source; nothing is asked of a network."""
    try:
        description, store = find_store(config)
    except Exception as error:  # whatever files, packages and their readers raise
        problem, offline, _ = _first_line(error).partition(", and HF_HUB_OFFLINE is set")
        advice = (
            "prepare it where there is a network: `textgen prepare`" if offline else "nothing can be trained without it"
        )
        return Check("data", "warn" if offline else "fail", {}, f"{problem}; {advice}"), None
    if store is None:
        advice = "not encoded yet: `textgen prepare` with the same flags spares the job that time"
        return Check("data", "warn", {"source": description}, advice), None
    train = store.record["splits"]["train"]
    value = {
        "source": description, "store": str(store.directory), "vocab_size": store.record["vocab_size"],
        "train_tokens": train["tokens"], "key": store.training_key[:8],
    }  # fmt: skip
    return Check("data", "ok", value), store


def find_store(config: TrainConfig) -> tuple[str, TokenStore | None]:
    """Return what the text is and its token store, if `prepare_store` has made it.

    Raises:
        TextgenError, TokenizerError: there is no such text, tokenizer or store.
    """
    from textgen.data.corpus import open_corpus
    from textgen.data.store import TokenStore, find_prepared

    if config.data.store is not None:
        store = TokenStore.open(config.data.store)
        return str(store.record["source"]), store
    corpus = open_corpus(config.data)
    return corpus.description, find_prepared(config.data, config.tokenizer, corpus)


def check_data(peers: Peers, found: Check, store: TokenStore | None) -> Check:
    """Compare the text of all processes. Collective."""
    keys = set(peers.gather(store.training_key if store else None)) - {None}
    if len(keys) > 1:
        advice = "the training text is not the same on all processes: `--data.store` names one that all share"
        return Check("data", "fail", found.value, advice)
    return found


def check_wandb(config: TrainConfig) -> Check:
    """Say where figures go: a key is looked for, never shown."""
    from textgen.tracking.wandb import has_wandb_key

    mode, key = config.tracking.mode, has_wandb_key()
    if mode == "auto":
        mode = "online" if key else "offline"
    value = {"mode": mode, "key": "present" if key else "none"}
    if mode == "online" and not key:
        return Check("wandb", "warn", value, "no API key: `wandb login`, or WANDB_API_KEY in the job's environment")
    return Check("wandb", "ok", value)


def check_clocks(peers: Peers, clock: Callable[[], float] = time.time) -> Check:
    """Compare the clocks of all processes. Collective.

    Nobody leaves an all-reduce before all have entered it. So in each round process i's clock is ahead of process 0's
    by no less than entry i - exit 0 and no more than exit i - entry 0; the rounds together narrow that down.
    """
    import torch
    from torch import distributed

    if peers.size == 1:
        return Check("clocks", "ok", {"skipped": "one process"})
    token = torch.zeros(1, device=peers.device)

    def measure() -> list[tuple[float, float]]:
        rounds = []
        for _ in range(CLOCK_ROUNDS):
            entry = clock()
            distributed.all_reduce(token)
            token.item()  # on CUDA, the end of it
            rounds.append((entry, clock()))
        return rounds

    everyone = peers.gather(peers.attempt(measure, otherwise=[(0.0, 0.0)]))
    ahead, width = [0.0], [0.0]
    for rounds in everyone[1:]:
        pairs = list(zip(rounds, everyone[0], strict=True))
        low = max(entry - first_exit for (entry, _), (_, first_exit) in pairs)
        high = min(exit_ - first_entry for (_, exit_), (first_entry, _) in pairs)
        ahead.append((low + high) / 2)
        width.append(abs(high - low) / 2)
    last, first = ahead.index(max(ahead)), ahead.index(min(ahead))
    apart, uncertain = ahead[last] - ahead[first], sum(sorted(width)[-2:])
    value = {"apart_ms": apart * 1e3, "uncertainty_ms": uncertain * 1e3}
    if apart - uncertain > MAX_CLOCK_SECONDS:
        advice = f"clocks of process {first} and {last} differ by {apart:,.1f} s: have chrony or ntpd mend it"
        return Check("clocks", "warn", value, advice)
    return Check("clocks", "ok", value)


def check_limits(device: torch.device) -> Check:
    """Look at limits that end trainings: open files, shared memory, locked memory."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shm = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    unlimited = resource.RLIM_INFINITY
    value = {
        "open_files": "unlimited" if files == unlimited else files, "shm_gb": shm / 1e9,
        "locked_mb": "unlimited" if locked == unlimited else locked / 1e6,
    }  # fmt: skip
    cuda = device.type == "cuda"
    problems = []
    if files != unlimited and files < MIN_OPEN_FILES:
        problems.append(f"few open files are allowed: `ulimit -n {MIN_OPEN_FILES}`")
    if cuda and shm < MIN_SHM_BYTES:
        problems.append("NCCL wants a larger /dev/shm: `docker run --ipc=host`, or `--shm-size=1g`")
    if cuda and locked != unlimited and locked < MIN_LOCKED_BYTES:
        problems.append("InfiniBand wants locked memory: `ulimit -l unlimited`")
    return Check("limits", "warn" if problems else "ok", value, "; ".join(problems))


# --- what is printed -------------------------------------------------------------------------------------------------


def merge(everyone: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each check, and more only where machines differ in more than figures.

    Args:
        everyone: of each process `machine` and `checks`.

    Returns:
        Rows of name, status, machines (None for all), value and advice. A figure that is not the same on all
        processes of a row is a list: smallest, median, largest.
    """
    rows = []
    names = dict.fromkeys(check["name"] for one in everyone for check in one["checks"])
    for name in names:
        found = [(one["machine"], check) for one in everyone for check in one["checks"] if check["name"] == name]
        alike: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for machine, check in found:
            texts = {key: value if isinstance(value, str) else None for key, value in check["value"].items()}
            alike.setdefault(json.dumps([check["status"], check["advice"], texts]), []).append((machine, check))
        for group in alike.values():
            machines = None if len(alike) == 1 else list(dict.fromkeys(machine for machine, _ in group))
            one = group[0][1]
            value = {key: _sum_up([check["value"][key] for _, check in group]) for key in one["value"]}
            rows.append(one | {"machines": machines, "value": value})
    return rows


def _sum_up(values: Sequence[Any]) -> Any:
    if len(set(values)) == 1:
        return values[0]
    return [min(values), statistics.median(values), max(values)]


def as_json(rows: Sequence[Mapping[str, Any]], everyone: Sequence[Mapping[str, Any]]) -> str:
    """Return the report as one JSON object."""
    machines = list(dict.fromkeys(one["machine"] for one in everyone))
    worst = next(status for status in ("fail", "warn", "ok") if status in {row["status"] for row in rows})
    return json.dumps({"status": worst, "processes": len(everyone), "machines": machines, "checks": rows})


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the report as lines, the last one a verdict."""
    lines = []
    for row in rows:
        where = f"[{', '.join(row['machines'][:3])}{', ...' * (len(row['machines']) > 3)}] " if row["machines"] else ""
        shown = ", ".join(f"{name} {_show(value)}" for name, value in row["value"].items())
        lines.append(f"{row['name']:12}{row['status']:6}{where}{shown}".rstrip())
        if row["advice"]:
            lines.append(f"{'':18}-> {row['advice']}")
    named = {status: [row["name"] for row in rows if row["status"] == status] for status in ("fail", "warn")}
    if not any(named.values()):
        return "\n".join([*lines, "all is well"])
    told = [f"{status}: {', '.join(dict.fromkeys(names))}" for status, names in named.items() if names]
    return "\n".join([*lines, "; ".join(told)])


def _show(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(_show(one) for one in value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value
