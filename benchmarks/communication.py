"""What processes send each other at a step, and what it costs: `python -m benchmarks.communication`.

Every process takes real optimizer steps of a preset's model in a network namespace of its own (root, Linux, iproute2),
one virtual Ethernet card each, joined by a bridge. What a process sends is read from its card's counters: whole frames
of packets of at most 1,500 bytes, headers and acknowledgements included. A token bucket slows the cards down, to see
what an exchange costs where networks are slower than processors. `python -m benchmarks.scaling` puts the tables into
docs/explanation/scaling.md.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from benchmarks.machine import RESULTS, describe
from textgen.commands.parsing import parse_train_config
from textgen.data.store import prepare_store
from textgen.distributed import launch
from textgen.distributed.signals import StopSignals
from textgen.runs.metrics_file import read_metrics
from textgen.training.setup import Training, build
from textgen.training.step import step_batches, train_step

ROOT = Path(__file__).parents[1]
RESULT = RESULTS / "communication.json"
CARD = "eth0"
# lanes x window that these two cores compute in a second or so; the bytes depend on the parameters alone
SHAPES = {"quick": (32, 32), "original-char": (16, 25), "default": (8, 12), "large": (8, 8)}
# preset, processes, and rates of the cards in Mbit/s, 0 for as fast as they go
TIMED: list[tuple[str, int, tuple[int, ...]]] = [
    ("quick", 2, (0, 1000, 200)),
    ("quick", 4, (0, 1000, 200)),
    ("original-char", 2, (0, 1000, 200)),
    ("original-char", 4, (0, 1000, 200)),
    ("default", 2, (1000,)),
    ("default", 4, (1000,)),
    ("large", 2, (1000,)),
]
COMPRESSIONS = ("none", "bf16")
OTHER_SHAPE = (8, 16)  # of `quick`, to see that the bytes stay
STEPS = 5
LANES = (1, 2, 4, 8, 16, 32, 64)
# of one and two processes, in the precision that trainings take: presets, and how often each layout is measured
SCALED: dict[str, tuple[int, int]] = {"quick": (32, 32), "default": (16, 32)}
SCALED_ROUNDS, SCALED_SECONDS = 3, 6.0
QUALITY_SEEDS, QUALITY_STEPS = (42, 43, 44), 300


def shell(line: str) -> None:
    """Run a command, its words separated by spaces."""
    subprocess.run(line.split(), check=True)


# --- one process -----------------------------------------------------------------------------------------------------


def sent() -> tuple[int, int]:
    """Return bytes and frames that this process's card has sent."""
    card = Path("/sys/class/net", CARD, "statistics")
    return int((card / "tx_bytes").read_text()), int((card / "tx_packets").read_text())


class Settings(TypedDict):
    """What a process is told."""

    preset: str
    shape: tuple[int, int]
    rates: tuple[int, ...]


def build_training(accelerator: Accelerator, settings: Settings, compression: str = "none") -> Training:
    """Build a preset's model, as a training of the packaged reviews does. Collective."""
    lanes, window = settings["shape"]
    flags = [
        "--config", f"launch/presets/{settings['preset']}.yaml", "--batch_size", str(lanes), "--seq_len", str(window),
        "--data.source", "package", "--data.train_on", "train", "--gradient_compression", compression,
    ]  # fmt: skip
    config = parse_train_config(flags)
    return build(config, accelerator, prepare_store(config.data, config.tokenizer), StopSignals())


def take_a_step(training: Training, agreement: launch.Agreement) -> None:
    """Take a step as the training loop does, its agreement included."""
    learner = training.learner
    for micro_batches, _ in step_batches(learner, training.loader, learner.progression.step + 1):
        train_step(learner, micro_batches).item()
        agreement.ask(False, learner.nonfinite, False)
        learner.progression.step += 1


def limit_rate(megabits: int) -> None:
    """Slow this process's card down; 0 for as fast as it goes."""
    if megabits:
        shell(f"tc qdisc replace dev {CARD} root tbf rate {megabits}mbit burst 128kb limit 8mb")
    else:
        subprocess.run(["tc", "qdisc", "delete", "dev", CARD, "root"], capture_output=True)  # there may be none


def all_reduce_seconds(values: Tensor, count: int) -> float:
    """Return the median seconds of all-reduces of a tensor. Collective."""
    seconds = []
    for _ in range(count):
        torch.distributed.barrier()
        started = time.perf_counter()
        torch.distributed.all_reduce(values)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure_network() -> dict[str, float]:
    """Return the rate of a sum of 32 MiB and the seconds of one of three numbers. Collective."""
    return {
        "bytes_per_second": (1 << 25) / all_reduce_seconds(torch.zeros(1 << 23), 3),
        "small_seconds": all_reduce_seconds(torch.zeros(3), 30),
    }


def count_bytes(settings: Settings) -> dict[str, Any]:
    """Take steps as a training takes them; return bytes and frames that this process sent at one, by compression."""
    accelerator, found = launch.start("no"), {}
    for compression in COMPRESSIONS:
        training, agreement = build_training(accelerator, settings, compression), launch.Agreement(accelerator)
        take_a_step(training, agreement)
        torch.distributed.barrier()
        before = sent()
        take_a_step(training, agreement)
        torch.distributed.barrier()
        found[compression] = [b - a for a, b in zip(before, sent(), strict=True)]
    return {"parameters": training.learner.unwrapped_model.num_parameters, "sent": found}


class Exchange:
    """A communication hook of DDP that does what torch's own do, or nothing, and notes when."""

    def __init__(self, processes: int) -> None:
        self.kind = "none"
        self.began = 0.0
        self.ready: list[tuple[int, float]] = []
        """bytes of each bucket of the gradient, and seconds from the step's beginning until it was there"""
        self.summed: list[tuple[int, float]] = []
        """the same until it was the sum of all processes'"""
        self._processes = processes

    def __call__(self, bucket: GradBucket) -> Future[Tensor]:
        """Exchange a bucket."""
        gradient = bucket.buffer()
        self.ready.append((gradient.nbytes, time.perf_counter() - self.began))

        def note(done: Future[Any]) -> Tensor:
            self.summed.append((gradient.nbytes, time.perf_counter() - self.began))
            value: Tensor = done.value()[0] if isinstance(done.value(), list) else done.value()
            return value

        if self.kind == "nothing":
            exchange: Future[Any] = Future()
            exchange.set_result(gradient)
        elif self.kind == "bf16":
            exchange = bf16_compress_hook(torch.distributed.distributed_c10d._get_default_group(), bucket)
        else:
            exchange = torch.distributed.all_reduce(gradient.div_(self._processes), async_op=True).get_future()
        return exchange.then(note)


def measure_times(settings: Settings) -> dict[str, Any]:
    """Return the seconds of a step at each rate, and what `benchmarks.scaling` predicts them from."""
    accelerator = launch.start("no")
    network = measure_network()
    training = build_training(accelerator, settings)
    exchange, model = Exchange(accelerator.num_processes), training.learner.model
    assert isinstance(model, DistributedDataParallel)
    model.register_comm_hook(None, lambda _, bucket: exchange(bucket))  # DDP would read annotations
    cases = []
    for rate in settings["rates"]:
        limit_rate(rate)
        cases += [{"rate": rate, **case} for case in time_steps(training, exchange)]
    return {"network": network, "cases": cases}


def time_steps(training: Training, exchange: Exchange) -> list[dict[str, Any]]:
    """Take steps of each kind by turns, so that what else the machine does hits all alike.

    Returns:
        For each kind the seconds of its steps and, of the fastest one, when each bucket was ready and the share of the
        gradient that had been summed before the last bucket was.
    """
    kinds, learner = ("nothing", *COMPRESSIONS), training.learner
    progress, agreement = learner.progression, launch.Agreement(learner.accelerator)
    taken: dict[str, list[tuple[float, list[tuple[int, float]], float]]] = {kind: [] for kind in kinds}
    for micro_batches, _ in step_batches(learner, training.loader, progress.step + len(kinds) * (STEPS + 1)):
        exchange.kind, exchange.ready, exchange.summed = kinds[progress.step % len(kinds)], [], []
        torch.distributed.barrier()
        exchange.began = time.perf_counter()
        train_step(learner, micro_batches).item()
        if exchange.kind != "nothing":
            agreement.ask(False, learner.nonfinite, False)
        seconds = time.perf_counter() - exchange.began
        total, last = sum(size for size, _ in exchange.ready), exchange.ready[-1][1]
        early = sum(size for size, at in exchange.summed if at < last) / total
        taken[exchange.kind].append((seconds, exchange.ready, early))
        progress.step += 1
    cases = []
    for kind, steps in taken.items():
        del steps[0]  # it warms up
        _, ready, early = min(steps)
        cases.append({"kind": kind, "seconds": [seconds for seconds, *_ in steps], "ready": ready, "early": early})
    return cases


def measure_rows(settings: Settings) -> dict[str, Any]:
    """Time forward and backward passes of one process; return their seconds by number of lanes."""
    model, window, seconds = (
        build_training(launch.start("no"), settings).learner.unwrapped_model,
        settings["shape"][1],
        {},
    )
    for lanes in LANES:
        tokens, taken = torch.randint(model.vocab_size, (lanes, window)), []
        for _ in range(STEPS):
            started = time.perf_counter()
            nats, _ = model(tokens, model.zero_state(lanes), tokens)
            nats.backward()
            taken.append(time.perf_counter() - started)
        seconds[lanes] = statistics.median(taken[1:])
    return {"window": window, "seconds": seconds}


def measure_scaled(settings: Settings) -> dict[str, Any]:
    """Take steps for some seconds, every other one without exchange, and return what became of the time of each.

    Returns:
        For each kind of step, for each step: seconds, and for each bucket its bytes and the seconds until it was there,
        since the step's beginning, which lies behind a barrier.
    """
    accelerator = launch.start(None)
    training = build_training(accelerator, settings)
    learner, agreement, network = training.learner, launch.Agreement(accelerator), {}
    progress = learner.progression
    exchange, kinds = Exchange(accelerator.num_processes), ["none"]
    if isinstance(learner.model, DistributedDataParallel):
        network = measure_network()
        learner.model.register_comm_hook(None, lambda _, bucket: exchange(bucket))
        kinds = ["none", "nothing"]
    steps: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    limit = time.perf_counter() + SCALED_SECONDS
    for micro_batches, _ in step_batches(learner, training.loader, progress.total_steps):
        exchange.kind, exchange.ready, exchange.summed = kinds[progress.step % len(kinds)], [], []
        accelerator.wait_for_everyone()
        exchange.began = time.perf_counter()
        train_step(learner, micro_batches).item()
        agreement.ask(False, learner.nonfinite, False)
        steps[exchange.kind].append({"seconds": time.perf_counter() - exchange.began, "ready": exchange.ready})
        progress.step += 1
        late = torch.tensor(float(time.perf_counter() > limit))
        if progress.step % len(kinds) == 0 and float(accelerator.reduce(late, "sum")) > 0:
            break
    return {"network": network, "steps": {kind: taken[1:] for kind, taken in steps.items()}}


TASKS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "bytes": count_bytes, "times": measure_times, "rows": measure_rows, "scaled": measure_scaled,
}  # fmt: skip


# --- all of them -----------------------------------------------------------------------------------------------------


def run_processes(task: str, settings: Settings, processes: int, *, threads: int = 1) -> list[dict[str, Any]]:
    """Run a task in processes with a network namespace each; return what each of them found."""
    for rank in range(processes):
        shell(f"ip netns add r{rank}")
        shell(f"ip link add v{rank} master bridge type veth peer name {CARD} netns r{rank}")
        shell(f"ip link set v{rank} up")
        shell(f"ip -n r{rank} address add 10.9.0.{rank + 1}/24 dev {CARD}")
        # Where bytes are counted: packets as on a wire. Else up to 64 KiB pass with one header, which costs a processor
        # less: it has no card that would cut them up.
        segments = 1 if task == "bytes" else 65535
        shell(f"ip -n r{rank} link set {CARD} gso_max_segs {segments} up")
        shell(f"ip -n r{rank} link set lo up")
    started = []
    for rank in range(processes):
        world = {
            "RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "10.9.0.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": CARD,
            "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }  # fmt: skip
        argv = ["ip", "netns", "exec", f"r{rank}", sys.executable, "-m", "benchmarks.communication"]
        argv += [task, json.dumps(settings)]
        started.append(subprocess.Popen(argv, env=os.environ | world, stdout=subprocess.PIPE, text=True))
    answers = [process.communicate()[0] for process in started]
    for rank in range(processes):
        shell(f"ip link delete v{rank}")
        shell(f"ip netns delete r{rank}")
    if any(process.returncode for process in started):
        raise SystemExit(f"{task} of {settings} failed")
    found = [json.loads(answer.splitlines()[-1]) for answer in answers]
    print(f"{task} {processes} {settings}: {json.dumps(found[0])[:1000]}", file=sys.stderr, flush=True)
    return found


def measure_quality() -> list[dict[str, Any]]:
    """Train `quick` on 2 processes, exchanging float32 and bfloat16; return losses by seed."""
    rows = []
    with tempfile.TemporaryDirectory() as home:
        for seed in QUALITY_SEEDS:
            row: dict[str, Any] = {"seed": seed}
            for compression in ("none", "bf16"):
                run_dir = Path(home, f"{compression}-{seed}")
                flags = [
                    "--config", "launch/presets/quick.yaml", "--data.source", "package", "--run_dir", str(run_dir),
                    "--max_minutes", "null", "--max_steps", str(QUALITY_STEPS), "--evaluate_every", "10000",
                    "--seed", str(seed), "--gradient_compression", compression, "--tracking.mode", "disabled",
                    "--mixed_precision", "no", "--log_every", "1",
                ]  # fmt: skip
                world = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
                command = [sys.executable, "-m", "accelerate.commands.launch", *world, "train_distributed.py", *flags]
                environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
                subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
                metrics = read_metrics(run_dir)
                row[f"{compression}_valid"] = metrics[-1]["valid/loss"]
                row[f"{compression}_losses"] = [each["train/loss"] for each in metrics if "train/loss" in each]
            none, bf16 = row.pop("none_losses"), row.pop("bf16_losses")
            row["largest_difference"] = max(abs(a / b - 1) for a, b in zip(bf16, none, strict=True))
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    return rows


def measure_bytes() -> list[dict[str, Any]]:
    """Count the bytes of each preset's step, and of another shape's."""
    cases = [(preset, SHAPES[preset], processes) for preset in SHAPES for processes in (2, 4)]
    rows = []
    for preset, shape, processes in [*cases, ("quick", OTHER_SHAPE, 2)]:
        found = run_processes("bytes", {"preset": preset, "shape": shape, "rates": ()}, processes)
        rows.append({"preset": preset, "processes": processes, "shape": shape, **spread(found)})
    return rows


def measure_all_times() -> list[dict[str, Any]]:
    """Time each preset's step."""
    rows = []
    for preset, processes, rates in TIMED:
        settings: Settings = {"preset": preset, "shape": SHAPES[preset], "rates": rates}
        rows.append({"preset": preset, "processes": processes, **run_processes("times", settings, processes)[0]})
    return rows


def measure_all_scaled() -> list[dict[str, Any]]:
    """Time a step of one and two processes, by turns: its lanes, half of them and twice as many."""
    rows = []
    for preset, (lanes, window) in SCALED.items():
        layouts = [(1, 1, lanes // 2), (1, 1, lanes), (2, 1, lanes), (2, 1, 2 * lanes), (1, 2, lanes)]
        taken: dict[tuple[int, int, int], list[list[dict[str, Any]]]] = {layout: [] for layout in layouts}
        for _ in range(SCALED_ROUNDS):
            for processes, threads, batch in layouts:
                settings: Settings = {"preset": preset, "shape": (batch, window), "rates": ()}
                found = run_processes("scaled", settings, processes, threads=threads)
                taken[processes, threads, batch].append(found)
        for (processes, threads, batch), rounds in taken.items():
            layout = {"preset": preset, "processes": processes, "threads": threads, "shape": (batch, window)}
            rows.append(layout | summed_up(rounds))
    return rows


def summed_up(rounds: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Return what the steps of some rounds took, in seconds, from what each process of each round found.

    Returns:
        seconds: the median of each round's steps, with exchange; alone: the median of all, without.
        waited: how much later the last process had its gradient than the mean of them, in steps without exchange.
        buckets: bytes and seconds until it was there of each bucket, in the step of median length without exchange.
    """
    medians = [statistics.median(step["seconds"] for step in processes[0]["steps"]["none"]) for processes in rounds]
    told: dict[str, Any] = {"seconds": medians, "steps": sum(len(each[0]["steps"]["none"]) for each in rounds)}
    if len(rounds[0]) == 1:
        return told
    waited, alone = [], []
    for processes in rounds:
        for steps in zip(*(found["steps"]["nothing"] for found in processes), strict=True):
            there = [step["ready"][-1][1] for step in steps]
            waited.append(max(there) - statistics.fmean(there))
            alone.append(max(steps, key=lambda step: step["seconds"]))
    typical = sorted(alone, key=lambda step: step["seconds"])[len(alone) // 2]
    networks = [processes[0]["network"] for processes in rounds]
    network = {name: statistics.median(each[name] for each in networks) for name in networks[0]}
    return told | {
        "alone": typical["seconds"],
        "waited": statistics.fmean(waited),
        "buckets": typical["ready"],
        "network": network,
    }


def spread(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the first process found, and of what each has sent the least and the most bytes, and the frames."""
    sent = {}
    for compression in COMPRESSIONS:
        amounts = [each["sent"][compression] for each in found]
        sent[compression] = {
            "least": min(size for size, _ in amounts), "most": max(size for size, _ in amounts),
            "frames": max(frames for _, frames in amounts),
        }  # fmt: skip
    return {"parameters": found[0]["parameters"], "sent": sent}


PARTS: dict[str, Callable[[], Any]] = {
    "bytes": measure_bytes,
    "times": measure_all_times,
    "rows": lambda: run_processes("rows", {"preset": "default", "shape": SHAPES["default"], "rates": ()}, 1)[0],
    "scaled": measure_all_scaled,
    "quality": measure_quality,
}


def measure(parts: Sequence[str]) -> None:
    """Measure parts of it, and keep what was measured of the others."""
    shell("mkdir -p /run/netns")
    shell("mount -t tmpfs tmpfs /run/netns")
    shell("ip link set lo up")
    shell("ip link add bridge type bridge")
    shell("ip link set bridge up")
    for part in parts:
        started = time.monotonic()
        figures = PARTS[part]()
        measured = {
            "date": datetime.now(UTC).date().isoformat(), "seconds": round(time.monotonic() - started),
            "machine": describe() | {"kernel": os.uname().release.split("-")[0]}, "figures": figures,
        }  # fmt: skip
        before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        RESULT.write_text(json.dumps({**before, part: measured}, indent=1) + "\n")


def main() -> None:
    """Measure in a network namespace of its own, where nothing is left of it; all parts, or those that are named."""
    match sys.argv[1:]:
        case ["--inside", *parts]:
            measure(parts or list(PARTS))
        case [task, settings] if task in TASKS and settings.startswith("{"):
            print(json.dumps(TASKS[task](json.loads(settings))), flush=True)
            os._exit(0)  # gloo's threads abort a process that ends in order now and then
        case parts if not set(parts) <= set(PARTS):
            raise SystemExit(f"there are {', '.join(PARTS)}: {' '.join(parts)}")
        case parts:
            argv = ["unshare", "--net", "--mount", sys.executable, "-m", "benchmarks.communication", "--inside", *parts]
            raise SystemExit(subprocess.run(argv).returncode)


if __name__ == "__main__":
    main()
