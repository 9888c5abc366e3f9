"""Weights & Biases as a tracker: online, offline, and resumed with each row recorded once."""

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
from textgen.runs.metrics_file import MetricsRow
from textgen.runs.samples import SampledText
from textgen.tracking.tracker import FINISH_SECONDS, RunEnd

log = logging.getLogger("textgen")

# A server that works answers at once. Without this question wandb tries for 101 s to reach a server that does not.
SERVER_SECONDS = 2
INIT_SECONDS = 30
UPLOAD_SECONDS = 10  # added online to the time that the end of a training waits
GRACE_SECONDS = 1  # for wandb's process to end before it is killed
# The seconds of an offline run that a kill loses at most. wandb's default is 15, with which `wandb leet` lags too.
FLUSH_SECONDS = 2.0
MIN_FREE_BYTES = 1 << 16


def has_wandb_key() -> bool:
    """Return whether a W&B API key exists, in the environment or in ~/.netrc; warn of a file that has no such form."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except OSError:
        return False
    except (netrc.NetrcParseError, UnicodeDecodeError) as error:  # a byte order mark too: W&B does not read it either
        log.warning("`%s` cannot be read: %s", os.environ.get("NETRC", "~/.netrc"), first_line(error))
        return False


def choose_wandb_id(begun: str | None) -> str:
    """Return the id of the run that was begun, else the id that a sweep's agent has set, else a new one."""
    known = begun or os.environ.get("WANDB_RUN_ID", "")
    return known if re.fullmatch(r"[\w-]{1,64}", known) else secrets.token_hex(4)  # the id becomes part of a path


class WandbRun:
    """A run of Weights & Biases: online if a key exists and the server answers, else offline.

    wandb's counter is the number of the row in metrics.jsonl. From the counter a training that continues a run knows
    which rows W&B has, and records only the rows that a kill lost: each row is recorded once.

    Args:
        config: mode, project and names.
        run_dir: the run's folder; wandb's files go into its folder `wandb`.
        settings: recorded as the run's config.
        run_id: a new id, or that of an earlier part of the training.
        resumed: whether an earlier part of the training has begun the run.
    """

    def __init__(
        self, config: TrackingConfig, run_dir: Path, settings: Mapping[str, Any], *, run_id: str, resumed: bool
    ) -> None:
        self._config, self._dir, self._settings = config, run_dir.resolve(), settings
        self._id, self._resumed = run_id, resumed
        self._run: Any = None
        self._next = 0
        self._own_data_dir = "WANDB_DATA_DIR" not in os.environ
        self.finish_seconds: float = FINISH_SECONDS
        self.catches_up = True

    def open(self, rows: Sequence[MetricsRow]) -> None:
        """Begin or continue the run, on the server or on disk, and record the rows that it lacks."""
        os.environ.setdefault("WANDB_SILENT", "true")
        if self._own_data_dir:  # wandb would copy artifacts into the home directory
            os.environ["WANDB_DATA_DIR"] = str(self._dir / "wandb")
        rows_on_disk = recorded_rows(self._dir, self._id) if self._resumed else 0
        reason = self._why_offline()
        if reason is None:
            try:
                self._init("online")
                self._next = self._run.step  # of a resumed run: the number of rows on the server
            except Exception as error:
                _tear_down()
                reason = first_line(error)
        if self._run is None:
            if reason:
                log.warning("W&B records offline: %s", reason)
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            self._init("offline")
            self._next = rows_on_disk
            folder = self._dir / "wandb"  # a resumed run has several parts there
            if folder.is_relative_to(Path.cwd()):
                folder = folder.relative_to(Path.cwd())
            upload = f"wandb sync {folder / f'*run-*-{self._id}'}"
            log.info("W&B offline; look with `wandb leet %s`, upload with `%s`", folder, upload)
        else:
            log.info("W&B: %s", self._run.url)
            self.finish_seconds += UPLOAD_SECONDS
        for number, row in enumerate(rows):
            self.log(number, row, ())

    def _why_offline(self) -> str | None:
        """Return why the run is offline: empty if no warning is needed; None if the run can be online."""
        mode = self._config.mode
        if mode == "auto" and os.environ.get("WANDB_MODE") == "offline":
            mode = "offline"
        if not has_wandb_key():
            return "there is no API key: `wandb login`, or WANDB_API_KEY" if mode == "online" else ""
        if mode == "offline":
            return ""
        url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        try:
            urllib.request.urlopen(url, timeout=SERVER_SECONDS).close()
        except urllib.error.HTTPError:  # the server answers, with a status of failure
            return None
        except (OSError, ValueError, http.client.HTTPException) as error:
            return f"{urlsplit(url).hostname} does not answer: {error}"
        return None

    def _init(self, mode: Literal["online", "offline"]) -> None:
        """Begin or continue the run in a mode, and choose the x axes of its charts."""
        import wandb

        swept = "WANDB_SWEEP_ID" in os.environ or "SLURM_ARRAY_JOB_ID" in os.environ
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") if "WANDB_SWEEP_ID" in os.environ else self._config.project,
            group=self._config.group or os.environ.get("WANDB_RUN_GROUP") or (array and f"array-{array}"),
            job_type=self._config.job_type or os.environ.get("WANDB_JOB_TYPE") or ("sweep" if swept else "train"),
            dir=str(self._dir),
            name=self._dir.name,
            id=self._id,
            mode=mode,
            config=dict(self._settings),
            resume="allow" if self._resumed else None,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,  # a remote's address may hold a token; the commit is in the config
                init_timeout=INIT_SECONDS,
                finish_timeout=UPLOAD_SECONDS,
                x_transaction_log_flush_interval=FLUSH_SECONDS,
            ),
        )
        for name in ("step", "tokens"):
            self._run.define_metric(name, hidden=True)
        self._run.define_metric("*", step_metric="step")
        for name in ("train/bits_per_byte", "valid/bits_per_byte"):  # comparable between sizes of batches
            self._run.define_metric(name, step_metric="tokens")

    def log(self, number: int, row: MetricsRow, samples: Sequence[SampledText]) -> None:
        """Record a row of metrics.jsonl unless W&B has it, and samples as a table.

        Raises:
            OSError: the disk is full; wandb itself reports nothing then.
        """
        if number < self._next:
            return
        if shutil.disk_usage(self._run.dir).free < MIN_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._run.dir)
        values = dict(row)
        if samples:
            import wandb

            table = [[row["step"], *sample] for sample in samples]
            values["samples"] = wandb.Table(columns=["step", "temperature", "prompt", "text"], data=table)
        self._run.log(values, step=number, commit=True)

    def checkpoint(self, path: Path, *, best: bool, metadata: Mapping[str, Any]) -> None:
        """Record a checkpoint as an artifact: its path, or its content with `tracking.upload_checkpoints`."""
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self._id}", type="model", metadata=dict(metadata))
        try:
            if self._config.upload_checkpoints:
                artifact.add_dir(str(path))
            else:
                artifact.add_reference(path.resolve().as_uri(), checksum=False)  # manifest.json has the checksums
        except (OSError, ValueError):
            if path.exists():
                raise
            return  # pruned, since newer checkpoints exist
        self._run.log_artifact(artifact, aliases=["latest", "best"] if best else ["latest"])

    def finish(self, end: RunEnd) -> None:
        """Send an alert, record the exit code and close the run."""
        level = {"finished": "INFO", "preempted": "WARN", "failed": "ERROR"}[end.state]
        title = f"{self._dir.name[:50]} {end.state}"  # W&B allows 64 letters
        self._run.alert(title=title, text=end.reason, level=level)
        if end.state == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=end.exit_code)
        self._restore()

    def abandon(self) -> None:
        """End wandb's process, which would make this process wait at its exit.

        wandb is asked to end the process before it is killed. Only then does wandb wait for the process, which would
        remain as a zombie otherwise.
        """
        logging.getLogger("wandb").setLevel(logging.CRITICAL)  # no tracebacks of the connection that is cut here
        teardown = threading.Thread(target=_tear_down, daemon=True)
        teardown.start()
        teardown.join(GRACE_SECONDS)
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if child.name() == "wandb-core":
                    child.kill()
        teardown.join()
        self._restore()

    def _restore(self) -> None:
        if self._own_data_dir:
            os.environ.pop("WANDB_DATA_DIR", None)


def _tear_down() -> None:
    """Disconnect wandb from its process. wandb calls `sys.exit` if the process was killed; that is suppressed."""
    if (wandb := sys.modules.get("wandb")) is not None:
        with suppress(Exception, SystemExit):
            wandb.teardown()


def recorded_rows(run_dir: Path, run_id: str) -> int:
    """Return the number of rows of metrics.jsonl that the parts of a W&B run on this disk hold."""
    rows = 0
    for path in (run_dir / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb"):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        # The listing ends where a kill cut the file off.
        listing = subprocess.run(command, capture_output=True).stdout.decode(errors="replace")
        steps = re.findall(r'^\{"num":\d+,"type":"history".*"step":\{"num":(\d+)\}', listing, re.MULTILINE)
        rows = max([rows, *(int(step) + 1 for step in steps)])
    return rows
