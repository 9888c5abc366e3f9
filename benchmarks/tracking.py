"""What W&B costs a training, step by step: `python -m benchmarks.tracking`.

One training of the shape of `make train` goes on in blocks of steps, in turn with metrics.jsonl alone and with an
offline W&B run that follows it, a row every ten steps. Figures of the whole clock are noisy; so what the following
takes is also counted where it is spent: by the call in the training loop, by the thread, and by wandb's process.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import save
from textgen.commands.parsing import parse_train_config
from textgen.data.store import prepare_store
from textgen.distributed import launch
from textgen.distributed.signals import StopSignals
from textgen.runs.directory import RunDirectory
from textgen.tracking.tracker import RunEnd, Tracker
from textgen.training.loop import start_tracking
from textgen.training.metrics import Meter, log_metrics
from textgen.training.setup import build
from textgen.training.step import step_batches, train_step

PAIRS, STEPS, LOG_EVERY = 12, 100, 10
SHAPE = [
    "--data.source", "package", "--batch_size", "32", "--seq_len", "32", "--tokenizer.vocab_size", "4000",
    "--model.embedding_dim", "256", "--model.hidden_size", "512", "--model.num_layers", "1",
    "--max_steps", str(2 * PAIRS * STEPS + STEPS), "--tracking.mode", "offline",
]  # fmt: skip


class TimedTracker:
    """A tracker whose calls in the training loop are timed."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker, self.seconds, self.rows = tracker, 0.0, 0

    def log(self, *row: Any) -> None:
        """Pass a row on."""
        started = time.perf_counter()
        self._tracker.log(*row)
        self.seconds += time.perf_counter() - started
        self.rows += 1


def following_seconds() -> float:
    """Return processor seconds so far of the thread that follows, and of wandb's own process."""
    threads = [thread.ident for thread in threading.enumerate() if thread.name == "W&B"]
    clocks = [time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in threads if ident is not None]
    cores = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return float(sum(clocks) + sum(times.user + times.system for times in cores))


def main() -> None:
    """Train, in turn with and without W&B; print and keep what it costs."""
    os.environ.pop("WANDB_API_KEY", None)
    with tempfile.TemporaryDirectory() as directory:
        config = parse_train_config([*SHAPE, "--run_dir", f"{directory}/followed"])
        accelerator = launch.start("bf16", batch_size=config.batch_size)
        training = build(config, accelerator, prepare_store(config.data, config.tokenizer), StopSignals(None))
        run = RunDirectory(config.run_dir, main=True)
        Path(config.run_dir).mkdir()
        (Path(directory) / "alone").mkdir()
        followed = start_tracking(training, run)
        alone = Tracker(Path(directory) / "alone", {}, main=True, first_step=0, evaluated_step=0)
        timed, plain = TimedTracker(followed), TimedTracker(alone)
        learner = training.learner
        progress, batches = learner.progression, step_batches(learner, training.loader, config.max_steps or 0)

        def block(tracker: TimedTracker) -> float:
            started, meter = time.perf_counter(), Meter()
            for _ in range(STEPS):
                micro_batches, waiting = next(batches)
                training.nats += train_step(learner, micro_batches)
                progress.step += 1
                progress.unlogged_steps += 1
                meter.steps, meter.waited = meter.steps + 1, meter.waited + waiting
                if progress.step % LOG_EVERY == 0:
                    log_metrics(training, tracker, meter)  # type: ignore[arg-type]
                    meter = Meter()
            return (time.perf_counter() - started) / STEPS

        block(timed)  # wandb starts meanwhile
        timed.seconds, timed.rows, begun = 0.0, 0, following_seconds()
        seconds: dict[str, list[float]] = {"alone": [], "followed": []}
        for pair in range(PAIRS):
            for name in ("alone", "followed") if pair % 2 else ("followed", "alone"):
                seconds[name].append(block(timed if name == "followed" else plain))
        spent = following_seconds() - begun
        followed.finish(RunEnd("finished", 0, ""))
    step = statistics.median(seconds["alone"])
    ratios = [a / b for a, b in zip(seconds["followed"], seconds["alone"], strict=True)]
    per_step = {
        "loop": (timed.seconds - plain.seconds) / timed.rows / LOG_EVERY,
        "beside": spent / timed.rows / LOG_EVERY,
    }
    figures = {
        "step_ms": round(step * 1e3, 3),
        "clock_share_median": round(statistics.median(ratios) - 1, 4),
        "clock_share_quartiles": [round(value - 1, 4) for value in statistics.quantiles(ratios, n=4)[::2]],
        "loop_us_per_step": round(per_step["loop"] * 1e6, 2),
        "thread_and_wandb_us_per_step": round(per_step["beside"] * 1e6, 2),
        "counted_share": round(sum(per_step.values()) / step, 5),
        "log_every": LOG_EVERY, "blocks": 2 * PAIRS, "steps_per_block": STEPS,
    }  # fmt: skip
    print(json.dumps(figures, indent=2))
    save("tracking", figures)


if __name__ == "__main__":
    main()
