"""What a run tells while it goes: metrics.jsonl, the progress line, Weights & Biases."""

from __future__ import annotations

import json
import logging
import netrc
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from textgen.config import TrackingConfig
from textgen.run_directory import write_whole

log = logging.getLogger("textgen")

METRICS_NAME = "metrics.jsonl"
LINE_SECONDS = 30  # between progress lines where standard error is no terminal


def setup_logging(*, main: bool) -> None:
    """Send textgen's log to standard error, from one process only."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO if main else logging.ERROR)


class Tracker:
    """Writes metrics of the main process; on the others every method does nothing.

    `metrics.jsonl` is the source of truth. Weights & Biases stands beside it: whatever fails there is said once and
    the training goes on.

    Args:
        accelerator: made with `log_with` unset; its W&B tracker is opened here.
        config: whether and where to W&B.
        run_dir: the run's folder.
        settings: shown as the run's config in W&B.
        wandb_id: of an earlier part of this run, to go on with it.
        first_step: metrics of later steps are dropped from the file: they are about to be made again.
        evaluated_step: the same of validation; an evaluation may have been interrupted before it was saved.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrackingConfig,
        run_dir: Path,
        settings: Mapping[str, Any],
        *,
        wandb_id: str | None,
        first_step: int,
        evaluated_step: int,
    ) -> None:
        self.wandb_id: str | None = None
        self._main, self._accelerator = accelerator.is_main_process, accelerator
        self._path = run_dir / METRICS_NAME
        if not self._main:
            return
        kept = [
            row
            for row in read_metrics(run_dir)
            if row["step"] <= (evaluated_step if "valid/loss" in row else first_step)
        ]
        write_whole(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        if config.mode != "disabled":
            self._guard(lambda: self._open_wandb(config, run_dir, settings, wandb_id))

    def _open_wandb(
        self, config: TrackingConfig, run_dir: Path, settings: Mapping[str, Any], wandb_id: str | None
    ) -> None:
        offline = config.mode == "offline" or (config.mode == "auto" and not has_wandb_key())
        os.environ.setdefault("WANDB_DATA_DIR", str(run_dir.resolve()))
        if offline:
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb
        from accelerate.tracking import WandBTracker

        tracker = WandBTracker(
            config.project,
            dir=str(run_dir), name=run_dir.name, id=wandb_id, mode="offline" if offline else "online",
            resume="allow" if wandb_id else None, settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        tracker.start()
        tracker.store_init_configuration(dict(settings))
        tracker.run.define_metric("*", step_metric="step")
        self._accelerator.trackers.append(tracker)
        self.wandb_id = str(tracker.run.id)
        if offline:
            log.info(
                "W&B offline; look with `wandb leet %s`, upload with `wandb sync %s`",
                run_dir / "wandb",
                Path(tracker.run.dir).parent,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row of metrics."""
        if not self._main:
            return
        row = {"step": step, **values}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._accelerator.trackers:
            self._guard(lambda: self._accelerator.log(row))

    def sync(self) -> None:
        """Wait until the rows so far are on disk: a checkpoint must not outlive them."""
        if self._main:
            with self._path.open("a") as file:
                os.fsync(file.fileno())

    def finish(self) -> None:
        """Close W&B."""
        if self._main and self._accelerator.trackers:
            self._guard(lambda: [tracker.finish() for tracker in self._accelerator.trackers])
            self._accelerator.trackers.clear()

    def _guard(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # a tracker must never end a training (law 7)
            self._accelerator.trackers.clear()
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("W&B is off from here on, `%s` goes on: %s", METRICS_NAME, reason)


def has_wandb_key() -> bool:
    """Tell whether a W&B API key exists, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl; a last line cut off by a kill is left out."""
    path = run_dir / METRICS_NAME
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Progress:
    """A bar where standard error is a terminal, else a line every half minute; the main process only."""

    def __init__(self, *, total: int, done: int, main: bool) -> None:
        self._bar = tqdm(total=total, initial=done, unit="step", disable=not (main and sys.stderr.isatty()))
        self._lines = main and not sys.stderr.isatty()
        self._total, self._started, self._first, self._said = total, time.monotonic(), done, time.monotonic()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show the latest figures after step `step`."""
        text = f"loss {values['train/loss']:.4f}, "
        if "train/bits_per_byte" in values:
            text += f"{values['train/bits_per_byte']:.3f} bits per byte, "
        text += f"{values['train/tokens_per_second']:,.0f} tokens/s"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)
        now = time.monotonic()
        if self._lines and now - self._said >= LINE_SECONDS:
            left = (now - self._started) / (step - self._first) * (self._total - step)
            log.info("step %d/%d, %s, %.0f s left", step, self._total, text, left)
            self._said = now

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def say(accelerator: Accelerator, message: str) -> None:
    """Print a line of results to standard output, from the main process and without breaking the bar."""
    if accelerator.is_main_process:
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()
