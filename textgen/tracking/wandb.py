"""Weights & Biases as a tracker: online, offline, and resumed with each row recorded once."""

from __future__ import annotations

import errno
import http.client
import logging
import netrc
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil

from textgen.config import DEFAULT_PROJECT, TrackingConfig
from textgen.errors import first_line
from textgen.runs.metrics_file import MetricsRow, read_metrics
from textgen.runs.samples import SampledText
from textgen.tracking.recorded import RecordedRows
from textgen.tracking.tracker import FINISH_SECONDS, RunEnd
from textgen.tracking.wandb_settings import find_mode, find_setting, setting_value

log = logging.getLogger("textgen")

# A server that works answers at once. Without this question wandb tries for 101 s to reach a server that does not.
SERVER_SECONDS = 2
INIT_SECONDS = 30
UPLOAD_SECONDS = 10  # added online to the time that the end of a training waits
GRACE_SECONDS = 1  # for wandb's process to end before it is killed
# The seconds of an offline run that a kill loses at most. wandb's default is 15, with which `wandb leet` lags too.
FLUSH_SECONDS = 2.0
MIN_FREE_BYTES = 1 << 16
# The id becomes part of paths and of a shell's pattern.
WANDB_ID = r"[\w.-]{1,64}"
# wandb's settings of every run, unless the user sets them in the environment or in a settings file.
OUR_SETTINGS: dict[str, Any] = {
    "silent": True,
    "console": "off",
    "disable_code": True,
    "disable_git": True,  # a remote's address may hold a token; the commit is in the config
    "init_timeout": INIT_SECONDS,
    "finish_timeout": UPLOAD_SECONDS,
    "x_transaction_log_flush_interval": FLUSH_SECONDS,
}


def server_address() -> str:
    """Return the address of W&B's server."""
    return setting_value("base_url") or "https://api.wandb.ai"


def has_wandb_key() -> bool:
    """Return whether a W&B API key exists: in the environment, in W&B's settings files or in ~/.netrc.

    Warn of a ~/.netrc that cannot be read.
    """
    if setting_value("api_key") or setting_value("identity_token_file"):
        return True
    host = urlsplit(server_address()).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except OSError:
        return False
    except (netrc.NetrcParseError, UnicodeDecodeError) as error:  # a byte order mark too: W&B does not read it either
        log.warning("`%s` cannot be read: %s", os.environ.get("NETRC", "~/.netrc"), first_line(error))
        return False


def choose_wandb_id(begun: str | None, run_dir: Path) -> str:
    """Return the id of the run to continue, else the id that the user or a sweep's agent has set, else a new one.

    Args:
        begun: the id in the checkpoint that the training resumes from; None for a new training. A run that replaced
            the one of the checkpoint is continued.
        run_dir: the run's folder.
    """
    replaced_by = RecordedRows(run_dir, "wandb").run_id if begun else None
    for known in (replaced_by, begun, setting_value("run_id")):
        if known and re.fullmatch(WANDB_ID, known):
            return known
    return secrets.token_hex(4)


class WandbRun:
    """A run of Weights & Biases: online if a key exists and the server answers, else offline.

    wandb's counter is the number of the row in metrics.jsonl. From the counter a training that continues a run knows
    which rows W&B has, and records only the rows that a kill lost: each row is recorded once. W&B cannot change a row.
    If a row differs from the one that the run has, a new run begins, with all rows of metrics.jsonl.

    Args:
        config: mode, project and names.
        run_dir: the run's folder; wandb's files go into its folder `wandb`, unless WANDB_DIR names another.
        settings: recorded as the run's config.
        run_id: a new id, or that of an earlier part of the training.
        resumed: whether an earlier part of the training has begun the run.
    """

    def __init__(
        self, config: TrackingConfig, run_dir: Path, settings: Mapping[str, Any], *, run_id: str, resumed: bool
    ) -> None:
        self._config, self._dir, self._settings = config, run_dir.resolve(), dict(settings)
        self._id, self._resumed = run_id, resumed
        self._run: Any = None
        self._mode: Literal["online", "offline"] = "offline"
        self._abandoned = False
        self._next = self._seen = 0
        self._recorded = RecordedRows(run_dir, "wandb")
        self._base_dir = _base_dir(self._dir)
        self._own_data_dir = "WANDB_DATA_DIR" not in os.environ
        self.finish_seconds: float = FINISH_SECONDS
        self.catches_up = True

    def open(self, rows: Sequence[MetricsRow]) -> None:
        """Begin or continue the run, on the server or on disk, and record the rows that it lacks."""
        os.environ.setdefault("WANDB_SILENT", "true")
        if self._own_data_dir:  # wandb would copy artifacts into the home directory
            os.environ["WANDB_DATA_DIR"] = str(self._base_dir / "wandb")
        known = self._recorded.run_id == self._id
        folders = {self._base_dir / "wandb", *map(Path, self._recorded.folders if known else ())}
        rows_on_disk = recorded_rows(folders, self._id) if self._resumed else 0
        reason = self._why_offline()
        if reason is None:
            try:
                self._mode = "online"
                self._init()
                self._next = self._run.starting_step  # the number of rows on the server; `step` is 0 at first (0.31)
            except Exception as error:
                if self._abandoned:
                    raise
                _tear_down()
                reason, self._mode = first_line(error), "offline"
        if self._run is None:
            if reason:
                log.warning("W&B records offline: %s", reason)
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            self._init()
            self._next = rows_on_disk
        if self._mode == "online":
            self.finish_seconds += float(self._run.settings.finish_timeout)
        # Rows that this folder's training has not sent: WANDB_RUN_ID and WANDB_RESUME name another training's run, or a
        # copy of the folder continues the run too. An earlier version of textgen has left no list of the rows.
        sent = len(self._recorded) if known else self._next if self._resumed else 0
        if self._mode == "online" and self._next > sent:
            self._begin_again(sent)
        else:
            self._note_folder()
        for number, row in enumerate(rows):
            self.log(number, row, ())

    def _note_folder(self) -> None:
        """Note where the run's files are, and log how to look at the run."""
        folder = Path(self._run.dir).resolve().parents[1]  # not always WANDB_DIR, if that cannot be written
        self._recorded.begin(self._id, str(folder), empty=not self._next)
        if self._mode == "online":
            log.info("W&B: %s", self._run.url)
            return
        # A resumed run has several parts. A folder may have been removed or renamed since.
        shown = [shlex.quote(_shown(Path(name))) for name in self._recorded.folders if Path(name).exists()]
        upload = " ".join(["wandb sync", *(f"{name}/*run-*-{self._id}" for name in shown)])
        log.info(
            "W&B is offline: view the run with `wandb leet %s`, upload it with `%s`",
            shlex.quote(_shown(folder)),
            upload,
        )

    def _why_offline(self) -> str | None:
        """Return why the run is offline: empty if no warning is needed; None if the run can be online."""
        mode = find_mode(self._config).value
        if not has_wandb_key():
            return "there is no API key: run `wandb login` or set WANDB_API_KEY" if mode == "online" else ""
        if mode == "offline":
            return ""
        url = server_address()
        try:
            urllib.request.urlopen(url, timeout=SERVER_SECONDS).close()
        except urllib.error.HTTPError:  # the server answers, with a status of failure
            return None
        except (OSError, ValueError, http.client.HTTPException) as error:
            return f"{urlsplit(url).hostname} does not answer: {error}"
        return None

    def _init(self) -> None:
        """Begin or continue the run, and choose its charts' x axes. wandb's own settings win over our defaults."""
        import wandb

        swept = "WANDB_SWEEP_ID" in os.environ
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        project, asked = setting_value("project"), self._config.project
        if swept and project and asked not in (None, project):
            log.warning("W&B: the sweep's runs are in the project %s, not in tracking.project %s", project, asked)
        ours = {name: value for name, value in OUR_SETTINGS.items() if find_setting(name) is None}
        if setting_value("save_code"):
            ours.pop("disable_code", None)
        self._run = wandb.init(
            project=((swept and project) or asked or project or DEFAULT_PROJECT),
            group=self._config.group or setting_value("run_group") or (array and f"array-{array}"),
            job_type=self._config.job_type or setting_value("run_job_type") or ("sweep" if swept or array else "train"),
            dir=str(self._base_dir),
            name=setting_value("run_name") or self._dir.name,
            id=self._id,
            mode=self._mode,
            config=self._settings,
            resume="allow" if self._resumed else None,
            settings=wandb.Settings(**ours),
        )
        for name in ("step", "tokens"):
            self._run.define_metric(name, hidden=True)
        self._run.define_metric("*", step_metric="step")
        if "base" in self._settings and not self._resumed:
            self._use_base(self._settings["base"])
        sources = [source["name"] for source in self._settings.get("data", {}).get("sources", ())]
        # comparable between sizes of batches
        for name in (
            "train/bits_per_byte",
            "valid/bits_per_byte",
            *(f"valid/bits_per_byte/{name}" for name in sources),
        ):
            self._run.define_metric(name, step_metric="tokens")

    def _use_base(self, base: Mapping[str, Any]) -> None:
        """Record the model whose weights the training started from as an artifact that the run uses.

        `use_artifact` does the same, but waits for the server, and refuses an offline run.
        """
        import wandb

        artifact = wandb.Artifact(f"base-{base['sha256'][:12]}", type="model", metadata=dict(base))
        if (directory := Path(base["directory"])).exists():  # a later run of the same training may find it gone
            artifact.add_reference(directory.resolve().as_uri(), checksum=False)
        self._run._log_artifact(artifact, aliases=[], is_user_created=True, use_after_commit=True)

    def _begin_again(self, number: int) -> None:
        """Begin a new run, without rows, since the run has another row of a number; link the two runs."""
        old, self._id = self._id, secrets.token_hex(4)
        log.warning(
            "W&B: run %s has other rows than `metrics.jsonl` from row %d on, and keeps them; new run: %s",
            old, number + 1, self._id,
        )  # fmt: skip
        self._run.config.update({"replaced_by": self._id}, allow_val_change=True)
        self._run.finish()
        self._settings |= {"replaces": old}
        self._resumed, self._next = False, 0
        self._init()
        self._note_folder()

    def _record_first(self, number: int) -> None:
        """Record the first rows of metrics.jsonl in a new run."""
        for earlier, row in enumerate(read_metrics(self._dir)[:number]):
            self._record(earlier, row, ())

    def log(self, number: int, row: MetricsRow, samples: Sequence[SampledText]) -> None:
        """Record a row of metrics.jsonl unless W&B has it, and samples as a table; begin a new run if it has another.

        Raises:
            OSError: the disk is full; wandb itself reports nothing then.
        """
        self._seen = number + 1
        if number < self._next:
            if not self._recorded.differs(number, row):
                return
            self._begin_again(number)
            self._record_first(number)
        self._record(number, row, samples)

    def _record(self, number: int, row: MetricsRow, samples: Sequence[SampledText]) -> None:
        if shutil.disk_usage(self._run.dir).free < MIN_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._run.dir)
        values = dict(row)
        if samples:
            import wandb

            table = [[row["step"], *sample] for sample in samples]
            values["samples"] = wandb.Table(columns=["step", "temperature", "prompt", "text"], data=table)
        self._recorded.add(number, row)
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
        if end.state == "finished" and self._seen < self._next:  # the abandoned history was longer
            self._begin_again(self._seen)
            self._record_first(self._seen)
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
        self._abandoned = True
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


def _base_dir(run_dir: Path) -> Path:
    """Return the folder that gets W&B's folder: WANDB_DIR, or the run's. A sweep's agent sets WANDB_DIR by default."""
    named = Path(os.environ.get("WANDB_DIR") or run_dir).expanduser().resolve()
    return run_dir if "WANDB_SWEEP_ID" in os.environ and named == Path.cwd() else named


def _shown(folder: Path) -> str:
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def recorded_rows(folders: Iterable[Path], run_id: str) -> int:
    """Return the number of rows of metrics.jsonl that the parts of a W&B run on this disk hold."""
    rows = 0
    for path in chain.from_iterable(folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb") for folder in folders):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        # The listing ends where a kill cut the file off.
        listing = subprocess.run(command, capture_output=True).stdout.decode(errors="replace")
        steps = re.findall(r'^\{"num":\d+,"type":"history".*"step":\{"num":(\d+)\}', listing, re.MULTILINE)
        rows = max([rows, *(int(step) + 1 for step in steps)])
    return rows
