"""What a store at an address costs a training: `python -m benchmarks.remote [ten] [fast] [outage] [start]`.

The storage is an S3 server on this machine behind a proxy of so many bytes a second. The training is `quick`, on the
reviews in 256 shards. Figures are kept by part, with the load of the machine: the share of the time that waits for text
at ten times the bytes that the training reads, at 50 MB/s, and while the storage is gone for ten seconds; the time to
the first step.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import load, save
from tests.object_storage import Faults, ObjectStorage, start_object_storage
from textgen.commands.parsing import parse_train_config
from textgen.data.store import TokenStore, prepare_store
from textgen.runs.metrics_file import read_metrics

SHAPE = ["--config", "quick", "--data.source", "package", "--tracking.mode", "disabled", "--sample_tokens", "1"]
SHARDS, ADDRESS, FAST = 256, "s3://benchmark/store", 50e6
LOCAL_STEPS, STEPS = 100, 600
OUTAGE = 10.0


class Training:
    """A training in a process.

    Args:
        folder: for its run and its cache; what is there is deleted.
        flags: besides `SHAPE`.
        environment: variables that lead to the storage.
    """

    def __init__(self, folder: Path, *flags: str, environment: Mapping[str, str]) -> None:
        self.run = folder / "run"
        shutil.rmtree(self.run, ignore_errors=True)
        self._argv = [
            sys.executable, "train_distributed.py", *SHAPE, "--run_dir", str(self.run),
            "--data.cache_dir", str(folder / "cache"), *flags,
        ]  # fmt: skip
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            self._argv, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def wait_for_step(self) -> float:
        """Return the seconds from the start of the process until the metrics have a step."""
        while not (self.run / "metrics.jsonl").exists() or not read_metrics(self.run):
            if self._process.poll() is not None:
                break
            time.sleep(0.005)
        return time.perf_counter() - self.started

    def finish(self) -> None:
        """Wait for its end."""
        _, error = self._process.communicate()
        if self._process.returncode:
            raise SystemExit(f"{' '.join(self._argv)}: {error}")

    def figures(self) -> dict[str, float]:
        """Return tokens per second, seconds of waiting for text, and their share of the seconds of the steps."""
        rows = [row for row in read_metrics(self.run) if "train/data_share" in row]
        steps = [row["step"] - before["step"] for before, row in zip([{"step": 0}, *rows], rows, strict=False)]
        tokens = [1024 * count for count in steps]
        seconds = [count / row["train/tokens_per_second"] for count, row in zip(tokens, rows, strict=True)]
        waited = sum(row["train/data_share"] * spent for row, spent in zip(rows, seconds, strict=True))
        return {
            "steps": sum(steps),
            "tokens_per_second": round(sum(tokens) / sum(seconds)),
            "seconds": round(sum(seconds), 1),
            "waited_seconds": round(waited, 3),
            "waited_share": round(waited / sum(seconds), 5),
        }


def measure_start(folder: Path, stores: Mapping[str, str], storage: ObjectStorage) -> dict[str, list[float]]:
    """Return the seconds to the first step, twice with each store; the first time with a remote one is a cold cache."""
    seconds: dict[str, list[float]] = {name: [] for name in stores}
    for _ in range(2):
        for name, store in stores.items():
            flags = ["--data.store", store, "--max_steps", "1", "--log_every", "1"]
            training = Training(folder, *flags, environment=storage.environment)
            seconds[name].append(round(training.wait_for_step(), 2))
            training.finish()
    return seconds


def measure_waiting(
    folder: Path, storage: ObjectStorage, rate: float, *, steps: int, outage: float = 0.0
) -> dict[str, float]:
    """Return the figures of a training with an empty cache at so many bytes a second.

    Args:
        folder: for the run and the cache.
        storage: with the store.
        rate: bytes a second.
        steps: of the training.
        outage: seconds for which the storage is gone, once the first step is taken.
    """
    shutil.rmtree(folder / "cache", ignore_errors=True)
    storage.faults = Faults(bytes_per_second=rate)
    training = Training(
        folder, "--data.store", ADDRESS, "--max_steps", str(steps), "--log_every", "10", environment=storage.environment
    )
    if outage:
        training.wait_for_step()
        time.sleep(2)
        storage.faults = Faults(refused=True)
        time.sleep(outage)
        storage.faults = Faults(bytes_per_second=rate)
    training.finish()
    return {"bytes_per_second": round(rate), **training.figures()}


def bytes_read(store: TokenStore, tokens_per_second: float) -> float:
    """Return the bytes of shards that a training reads in a second."""
    assert store.shards is not None
    records = store.shards.records
    return tokens_per_second * sum(shard.size for shard in records) / sum(shard.tokens for shard in records)


def main(parts: Sequence[str]) -> None:
    """Measure the parts, all by default, and keep their figures beside those of the others."""
    figures = load("remote")

    def keep(name: str, measured: Any) -> None:
        figures[name] = {"load": round(os.getloadavg()[0], 1), "measured": measured}
        print(name, json.dumps(figures[name]), flush=True)
        save("remote", figures)

    with tempfile.TemporaryDirectory() as name, start_object_storage() as storage:
        folder = Path(name)
        config = parse_train_config(SHAPE, prog="textgen prepare")
        whole = prepare_store(config.data, config.tokenizer)
        store = prepare_store(replace(config.data, shards=SHARDS), config.tokenizer)
        storage.send(store.directory, ADDRESS)
        if "ten" in parts:
            flags = ["--data.store", str(store.directory), "--max_steps", str(LOCAL_STEPS), "--log_every", "10"]
            training = Training(folder, *flags, environment=storage.environment)
            training.finish()
            keep("local", training.figures())
            rate = 10 * bytes_read(store, training.figures()["tokens_per_second"])
            keep("ten", measure_waiting(folder, storage, rate, steps=STEPS))
        if "fast" in parts:
            keep("fast", measure_waiting(folder, storage, FAST, steps=2 * LOCAL_STEPS))
        if "outage" in parts:
            keep("outage", measure_waiting(folder, storage, FAST, steps=STEPS, outage=OUTAGE))
        if "start" in parts:
            stores = {"whole": str(whole.directory), "in shards": str(store.directory), "at an address": ADDRESS}
            keep("start", measure_start(folder, stores, storage))


if __name__ == "__main__":
    main(sys.argv[1:] or ["ten", "fast", "outage", "start"])
