"""Checks of the disk of a run: writing, renaming, locks between processes, free space."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from textgen.config import TrainConfig
from textgen.diagnosis.process_group import ProcessGroup
from textgen.diagnosis.results import Check
from textgen.errors import TextgenError
from textgen.files import fsync_path, write_atomic
from textgen.model.lstm import LSTMLanguageModel
from textgen.runs.directory import RunDirectory
from textgen.runs.lock import SILENT_SECONDS, FileLock

if TYPE_CHECKING:
    from textgen.data.store import TokenStore

PROBE = ".textgen-doctor-"
"""start of the name of the directory that the check writes"""
PROBE_BYTES = 16 << 20
SEEN_SECONDS = 5.0  # until a file that one machine has written must appear on the others
STALE_SECONDS = 3600.0  # age from which a probe belongs to a check that was killed
CACHE_BYTES = 1 << 30  # for a token store that does not exist yet: ten times the store of the default settings


def check_disk(group: ProcessGroup, run_dir: Path) -> Check:
    """Write in the place of the run; check that every process sees the files and the lock on them. Collective.

    The main process writes into one new directory and removes it at the end.
    """
    place = _existing(run_dir)
    probe, lock, written = Path(), None, {"name": "", "error": "", "value": {}}
    try:
        if group.is_main:
            try:
                _remove_stale(place)
                probe = place / f"{PROBE}{uuid.uuid4().hex}"
                probe.mkdir()
                lock = FileLock(probe / "lock")
                if not lock.try_acquire():
                    raise TextgenError(f"`{place}`: a new lock is held by another process")
                kind = "lease" if lock.is_lease else "flock"
                written |= {"value": {"lock": kind} | _write_probe(probe), "name": probe.name}
            except OSError as error:
                written["error"] = f"`{place}`: {error.strerror}"
            except TextgenError as error:
                written["error"] = str(error)
        main = group.gather(written)[0]
        problem = _look_at_probe(place / main["name"]) if main["name"] else ""
        process = f"process {group.rank} on {socket.gethostname()}"
        everyone = group.gather({"process": process, "problem": problem})
    finally:
        if lock is not None:
            lock.release()
        if probe.name:
            shutil.rmtree(probe, ignore_errors=True)
    value = {"path": str(place)} | main["value"]
    if main["error"]:
        return Check("disk", "fail", value, f"{main['error']}: choose a `--run_dir` that can be written and locked")
    problems = [f"{one['process']} {one['problem']}" for one in everyone if one["problem"]]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        advice = f"{problems[0]}{more}: `--run_dir` must be on a disk that all processes share and that supports locks"
        return Check("disk", "fail", value, advice)
    value |= {"seen_by": len(everyone)}
    if value["lock"] == "lease":
        advice = (
            f"the disk of `{place}` has no locks (flock fails): a training holds its run by a lease, and the lease "
            f"of a dead machine is taken over after {SILENT_SECONDS:g} s; see docs/explanation/reliability.md"
        )
        return Check("disk", "warn", value, advice)
    return Check("disk", "ok", value)


def _existing(path: Path) -> Path:
    """Return the path if it exists, or else the nearest directory above it that exists."""
    return next(place for place in (path, *path.parents) if os.path.exists(place))


def _remove_stale(place: Path) -> None:
    """Remove the probes of earlier checks that were killed."""
    for probe in place.glob(f"{PROBE}*"):
        with suppress(OSError):
            if time.time() - probe.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(probe, ignore_errors=True)


def _write_probe(probe: Path) -> dict[str, float]:
    """Write, replace and rename as a training does; return the speed of writing and the duration of the renames."""
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
    fsync_path(probe)
    if (probe / "replaced").read_text(encoding="utf-8") != "new" or not (probe / "renamed").is_dir():
        raise OSError(0, "a renamed file or directory does not appear under its new name")
    return {"write_mb_per_s": len(content) / seconds / 1e6, "rename_ms": (time.perf_counter() - started) * 1e3}


def _look_at_probe(probe: Path) -> str:
    """Return the problem that this process has with the main process's files; empty without a problem."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not os.path.isdir(probe / "renamed"):
        if time.monotonic() > deadline:
            return "does not see the main process's files"
        time.sleep(0.02)
    lock = FileLock(probe / "lock")
    try:
        if not lock.try_acquire():  # the lock of the main process works on this process too
            return ""
        lock.release()
    except (OSError, TextgenError) as error:
        return f"cannot lock the main process's files ({error})"
    return "gets a lock that the main process holds"


def check_space(config: TrainConfig, run_dir: Path, store: TokenStore | None) -> Check:
    """Compare free space with the largest space of the training's checkpoints, as the training does at its start.

    Args:
        config: of the training.
        run_dir: directory of the run.
        store: token store of the training; None if it does not exist yet.
    """
    # Imported here, so that a missing package (sentencepiece) fails this check and not the whole command.
    from textgen.training.resume import checkpoint_bytes, checkpoints_at_a_time, state_shapes
    from textgen.training.step import steps_per_epoch

    vocab_size = store.record["vocab_size"] if store else config.tokenizer.vocab_size
    with torch.device("meta"):  # shapes alone are needed: allocate no weights
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
        "parameters": model.num_parameters,
        "checkpoint_mb": size / 1e6,
        "checkpoints": count,
        "free_gb": round(free / 1e9, 2),
        "cache_free_gb": round(cache_free / 1e9, 2),
    }
    try:
        RunDirectory(place, main=True).require_space(size, count=count)
    except TextgenError as error:
        return Check("space", "fail", value, str(error))
    if store is None and cache_free < CACHE_BYTES:
        advice = (
            f"`{cache}` has only {cache_free / 1e6:,.0f} MB free for the token store, which does not exist yet: "
            "see `--data.cache_dir`"
        )
        return Check("space", "warn", value, advice)
    return Check("space", "ok", value)
