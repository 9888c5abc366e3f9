"""Weights & Biases as a tracker: online, offline, and resumed without a row lost or doubled."""

from __future__ import annotations

import errno
import http.client
import logging
import netrc
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil

from textgen.config import TrackingConfig
from textgen.errors import first_line
from textgen.runs.metrics import MetricsRow
from textgen.runs.samples import SampledText
from textgen.tracking.tracker import RunEnd


def has_wandb_key() -> bool:
    """Tell whether a W&B API key exists, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


log = logging.getLogger("textgen")

# A server that is there answers at once. One that is not would have wandb try for 101 s.
PROBE_SECONDS = 2
INIT_SECONDS = 30
# How long the end of a training waits at most: for what is on its way to the disk, which takes a moment unless the
# training was shorter than wandb's start, and online for the upload as well.
PATIENCE_SECONDS = 10
UPLOAD_SECONDS = 10
GRACE_SECONDS = 1  # for wandb's own process to end by itself where it is given up
# So many seconds of an offline run are lost at most when it is killed; wandb's own 15 also make `wandb leet` lag.
FLUSH_SECONDS = 2.0
MIN_FREE_BYTES = 1 << 16


def choose_wandb_id(begun: str | None) -> str:
    """Return the id of a run: of the one that was begun, else what an agent of a sweep has chosen, else a new one."""
    known = begun or os.environ.get("WANDB_RUN_ID", "")
    return known if re.fullmatch(r"[\w-]{1,64}", known) else secrets.token_hex(4)  # it becomes part of a path


class WandbRun:
    """A run of Weights & Biases: online where there is a key and a server that answers, else offline.

    wandb's own counter is the number of the row in metrics.jsonl. So a training that goes on knows which rows W&B has
    already, and gives it those that a kill lost, and no others: each row is there once.

    Args:
        config: how to track.
        run_dir: the run's folder; wandb's files come under it.
        settings: shown as the run's config.
        run_id: new, or of an earlier part of the training.
        resumed: whether there was one.
    """

    def __init__(
        self, config: TrackingConfig, run_dir: Path, settings: Mapping[str, Any], *, run_id: str, resumed: bool
    ) -> None:
        self._config, self._dir, self._settings = config, run_dir.resolve(), settings
        self._id, self._resumed = run_id, resumed
        self._run: Any = None
        self._next = 0
        self._own_data_dir = "WANDB_DATA_DIR" not in os.environ
        self.patience: float = PATIENCE_SECONDS
        self.catches_up = True

    def open(self, rows: Sequence[MetricsRow]) -> None:
        """Begin the run or go on with it, on the server or on disk, and give it the rows that it lacks."""
        os.environ.setdefault("WANDB_SILENT", "true")
        if self._own_data_dir:  # artifacts are copied into the home directory otherwise
            os.environ["WANDB_DATA_DIR"] = str(self._dir / "wandb")
        here = recorded_rows(self._dir, self._id) if self._resumed else 0
        reason = self._why_offline()
        if reason is None:
            try:
                self._init("online")
                self._next = self._run.step  # of a resumed run: what the server has
            except Exception as error:
                _tear_down()
                reason = first_line(error)
        if self._run is None:
            if reason:
                log.warning("W&B records offline: %s", reason)
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            self._init("offline")
            self._next = here
            folder = self._dir / "wandb"  # of a resumed run it holds several parts
            if folder.is_relative_to(Path.cwd()):
                folder = folder.relative_to(Path.cwd())
            upload = f"wandb sync {folder / f'*run-*-{self._id}'}"
            log.info("W&B offline; look with `wandb leet %s`, upload with `%s`", folder, upload)
        else:
            log.info("W&B: %s", self._run.url)
            self.patience += UPLOAD_SECONDS
        for number, row in enumerate(rows):
            self.log(number, row, ())

    def _why_offline(self) -> str | None:
        """Return why not to go online; nothing to say where that was asked for or needs no saying."""
        mode = self._config.mode
        if mode == "auto" and os.environ.get("WANDB_MODE") == "offline":
            mode = "offline"
        if not has_wandb_key():
            return "there is no API key: `wandb login`, or WANDB_API_KEY" if mode == "online" else ""
        if mode == "offline":
            return ""
        url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        try:
            urllib.request.urlopen(url, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:  # it answers
            return None
        except (OSError, ValueError, http.client.HTTPException) as error:
            return f"{urlsplit(url).hostname} does not answer: {error}"
        return None

    def _init(self, mode: Literal["online", "offline"]) -> None:
        import wandb

        swept = "WANDB_SWEEP_ID" in os.environ or "SLURM_ARRAY_JOB_ID" in os.environ
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") if "WANDB_SWEEP_ID" in os.environ else self._config.project,
            group=self._config.group or os.environ.get("WANDB_RUN_GROUP") or (array and f"array-{array}"),
            job_type=self._config.job_type or os.environ.get("WANDB_JOB_TYPE") or ("sweep" if swept else "train"),
            dir=str(self._dir), name=self._dir.name, id=self._id, mode=mode, config=dict(self._settings),
            resume="allow" if self._resumed else None,
            settings=wandb.Settings(
                silent=True, console="off", disable_code=True,
                disable_git=True,  # a remote's address may hold a token; the commit is in the config
                init_timeout=INIT_SECONDS, finish_timeout=UPLOAD_SECONDS,
                x_transaction_log_flush_interval=FLUSH_SECONDS,
            ),
        )  # fmt: skip
        for name in ("step", "tokens"):
            self._run.define_metric(name, hidden=True)
        self._run.define_metric("*", step_metric="step")
        for name in ("train/bits_per_byte", "valid/bits_per_byte"):  # comparable between sizes of batches
            self._run.define_metric(name, step_metric="tokens")

    def log(self, number: int, row: MetricsRow, samples: Sequence[SampledText]) -> None:
        """Record a row of metrics.jsonl, and samples as a table."""
        if number < self._next:
            return
        if shutil.disk_usage(self._run.dir).free < MIN_FREE_BYTES:  # wandb itself would say nothing
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._run.dir)
        values = dict(row)
        if samples:
            import wandb

            table = [[row["step"], *sample] for sample in samples]
            values["samples"] = wandb.Table(columns=["step", "temperature", "prompt", "text"], data=table)
        self._run.log(values, step=number, commit=True)

    def checkpoint(self, path: Path, *, best: bool, about: MetricsRow) -> None:
        """Record a checkpoint as an artifact: where it is, or, if asked, what is in it."""
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self._id}", type="model", metadata=dict(about))
        try:
            if self._config.upload_checkpoints:
                artifact.add_dir(str(path))
            else:
                artifact.add_reference(path.resolve().as_uri(), checksum=False)  # manifest.json has the checksums
        except (OSError, ValueError):
            if path.exists():
                raise
            return  # newer ones have taken its place
        self._run.log_artifact(artifact, aliases=["latest", "best"] if best else ["latest"])

    def finish(self, end: RunEnd) -> None:
        """Send an alert, tell the exit code and close."""
        level = {"finished": "INFO", "preempted": "WARN", "failed": "ERROR"}[end.state]
        self._run.alert(title=f"{self._dir.name[:50]} {end.state}", text=end.reason, level=level)  # 64 letters at most
        if end.state == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=end.exit_code)
        self._restore()

    def abandon(self) -> None:
        """End wandb's own process, which would have this one wait at its end.

        It is asked before it is killed: wandb waits for it only where it took the question, and would leave a zombie.
        """
        logging.getLogger("wandb").setLevel(logging.CRITICAL)  # it would print tracebacks of what is done here
        asked = threading.Thread(target=_tear_down, daemon=True)
        asked.start()
        asked.join(GRACE_SECONDS)
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if child.name() == "wandb-core":
                    child.kill()
        asked.join()
        self._restore()

    def _restore(self) -> None:
        if self._own_data_dir:
            os.environ.pop("WANDB_DATA_DIR", None)


def _tear_down() -> None:
    """Have wandb forget its own process; it would call `sys.exit` where that one was killed."""
    if (wandb := sys.modules.get("wandb")) is not None:
        with suppress(Exception, SystemExit):
            wandb.teardown()


def recorded_rows(run_dir: Path, run_id: str) -> int:
    """Return how many rows of metrics.jsonl the parts of a W&B run on this disk hold."""
    rows = 0
    for path in (run_dir / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb"):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        listing = subprocess.run(command, capture_output=True, text=True).stdout  # up to where a kill cut it off
        steps = re.findall(r'^\{"num":\d+,"type":"history".*"step":\{"num":(\d+)\}', listing, re.MULTILINE)
        rows = max([rows, *(int(step) + 1 for step in steps)])
    return rows
