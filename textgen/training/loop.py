"""The training loop: build or resume, then step, log, evaluate, save; and end in order."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator

from textgen.config import TrainConfig
from textgen.console import Progress, say
from textgen.data.store import prepare_store
from textgen.distributed import launch
from textgen.distributed.signals import Interrupted, StopSignals
from textgen.errors import TextgenError
from textgen.files import write_atomic
from textgen.reporting.report import leave_report
from textgen.runs.checkpoint import Saver, checkpoint_path
from textgen.runs.directory import DATA_NAME, SETTINGS_NAME, RunDirectory
from textgen.runs.environment import ENVIRONMENT_NAME, describe_environment
from textgen.tracking.backends import assert_installed, build_trackers, describe_launch
from textgen.tracking.tracker import RunEnd, Tracker
from textgen.tracking.wandb import choose_wandb_id
from textgen.training.budget import describe_cost, describe_request, describe_training, fit_steps
from textgen.training.metrics import Meter, log_metrics, say_epoch
from textgen.training.resume import checkpoint_bytes, checkpoints_at_a_time, resume, save, state_shapes
from textgen.training.setup import build, refuse_graph
from textgen.training.step import Training, step_batches, steps_per_epoch, train_step
from textgen.training.validation import evaluate_and_save

log = logging.getLogger("textgen")

NONFINITE_NAME = "nonfinite.json"

# float16 overflows now and then, and the scale is halved; so often in a row it is no longer that.
MAX_SKIPS_IN_A_ROW = 30


def train(config: TrainConfig, *, config_file: str | None = None) -> None:
    """Train as the config says, or go on where the run's newest valid checkpoint stands. Collective.

    Args:
        config: all settings.
        config_file: what the first line of the run calls them.

    Raises:
        TextgenError, TokenizerError, CheckpointError,
            TextgenError: what is wrong, in a line.
        Interrupted: a signal asked to stop; the training is saved, if it had begun.
    """
    with StopSignals(config.stop_signal) as stop:
        accelerator = launch.start(
            config.mixed_precision,
            batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            model=config.model,
            seq_len=config.seq_len,
            timeout=config.distributed_timeout,
            deterministic=config.deterministic,
        )
        # the text is compared by content, and folders may have other names elsewhere
        settings = {n: v for n, v in asdict(config).items() if n not in ("run_dir", "data", "tokenizer", "tracking")}
        launch.assert_same(accelerator, (settings, accelerator.mixed_precision), "what flags and config file say")
        refuse_graph(config, accelerator)
        assert_installed(config.tracking)
        log.info("%s, %s", launch.describe(accelerator), describe_request(config, config_file))
        if config.dry_run:
            describe_cost(_build(config, accelerator, stop))
        else:
            run = RunDirectory(config.run_dir, main=accelerator.is_main_process)
            with run.hold():
                accelerator.wait_for_everyone()  # one that was refused leaves the status of who holds it alone
                launch.assert_same(accelerator, run.read_started(), f"`{run.path}` (is it on a disk that all share?)")
                with _status_of_the_end(run, stop):
                    training = _build(config, accelerator, stop)
                    with _naming(run.path):
                        _train(training, run)
        accelerator.end_training()


def _build(config: TrainConfig, accelerator: Accelerator, stop: StopSignals) -> Training:
    store = prepare_store(config.data, config.tokenizer)
    launch.assert_same(accelerator, store.training_key, "the training text")
    return build(config, accelerator, store, stop)


@contextmanager
def _status_of_the_end(run: RunDirectory, stop: StopSignals) -> Iterator[None]:
    """Write into status.json why a training ended that did not say so itself."""
    try:
        yield
    except Interrupted as interrupted:
        if not stop.deferred:  # else the main process says where all stopped
            run.end("preempted", f"{interrupted} before the first step")
        raise
    except BaseException as error:
        run.end("failed", _reason(error))
        raise


def _reason(error: BaseException) -> str:
    """Return what ended a training in one line, with its kind unless that is a user's to mend."""
    message = str(error).partition("\n")[0]
    if isinstance(error, ValueError | OSError) and message:
        return message
    named = f"{type(error).__name__}: {message}"
    if isinstance(error, torch.distributed.DistError) or "gloo" in message:
        return f"another process has ended, or was waited for in vain: {named.partition('. ')[0]}"
    return named


@contextmanager
def _naming(run_dir: Path) -> Iterator[None]:
    """Name the run directory in an error of a disk that does not say where: a write to an open file does not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(run_dir)) from error


def _train(training: Training, run: RunDirectory) -> None:
    """Resume or begin, take all steps, and see to it that everything is written."""
    config, accelerator = training.config, training.accelerator
    resumed = resume(training)
    progress = training.progression
    if resumed and progress.finished:
        run.write_status("finished", step=progress.step, total_steps=progress.total_steps)
        say(accelerator, f"`{config.run_dir}` has finished at step {progress.step}: nothing to do")
        return
    if resumed:
        log.info("resuming at step %d", progress.step)
    elif config.max_minutes is not None:
        progress.total_steps = min(progress.total_steps, fit_steps(training))
    per_epoch = steps_per_epoch(config, training.store)
    count = checkpoints_at_a_time(config, total_steps=progress.total_steps, per_epoch=per_epoch)
    shapes = state_shapes(training.unwrapped_model, batch_size=config.batch_size, averaged=training.average is not None)
    size = checkpoint_bytes(shapes) + len(training.store.tokenizer.model_proto)
    run.require_space(size, count=count)
    if accelerator.is_main_process:
        write_run_files(training)
    tracker = start_tracking(training, run)

    def written(step: int) -> None:
        run.write_status("running", step=step, total_steps=progress.total_steps)
        about = {"step": step, "best_step": progress.best_step, "best_loss": progress.best_loss}
        tracker.checkpoint(checkpoint_path(run.path, step), best=step == progress.best_step, about=about)

    if accelerator.is_main_process:
        training.saver = Saver(
            run.path, keep_last=config.keep_last, device=accelerator.device, before=tracker.sync, after=written
        )
        training.saver.reserve(shapes)
    log.info("%s", describe_training(training))
    accelerator.wait_for_everyone()  # so that a signal to all of them hardly finds only some of them saving
    training.stop.defer()
    run.write_status("running", step=progress.step, total_steps=progress.total_steps)
    try:
        with (
            _status_of_the_end(run, training.stop),  # which does not wait for W&B
            Progress("step", progress.total_steps, done=progress.step, per_epoch=per_epoch) as bar,
        ):
            run_steps(training, tracker, run, bar)
            finish_saving(training)
            run.write_status("finished", step=progress.step, total_steps=progress.total_steps)
    except Interrupted as interrupted:
        save(training)
        finish_saving(training)
        run.write_status("preempted", step=progress.step, total_steps=progress.total_steps, reason=str(interrupted))
        log.info("%s: saved at step %d; the same command goes on from there", interrupted, progress.step)
        raise
    finally:
        if training.saver is not None:
            training.saver.settle()
            leave_report(run.path)
        tracker.finish(_how_it_ended(training, sys.exception()))


def start_tracking(training: Training, run: RunDirectory) -> Tracker:
    """Open metrics.jsonl, and on the main process the trackers that follow it."""
    config, accelerator, progress = training.config, training.accelerator, training.progression
    begun, trackers = training.wandb_id, {}
    training.wandb_id = choose_wandb_id(begun)
    if accelerator.is_main_process:
        settings = asdict(config) | {
            "parameters": training.unwrapped_model.num_parameters,
            "environment": describe_environment(),
            "launch": describe_launch(os.environ)
            | {"processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision},
        }
        trackers = build_trackers(
            config.tracking, run.path, settings, wandb_id=training.wandb_id, resumed=begun == training.wandb_id,
            first_step=progress.step,
        )  # fmt: skip
    return Tracker(
        run.path,
        trackers,
        main=accelerator.is_main_process,
        first_step=progress.step,
        evaluated_step=progress.evaluated_step,
    )


def _how_it_ended(training: Training, error: BaseException | None) -> RunEnd:
    """Return what trackers are told in the end."""
    progress = training.progression
    if error is None:
        best = (
            ""
            if progress.best_loss is None
            else f", best validation loss {progress.best_loss:.4f} at step {progress.best_step}"
        )
        return RunEnd("finished", 0, f"step {progress.step} of {progress.total_steps}{best}")
    if isinstance(error, Interrupted):
        return RunEnd("preempted", error.exit_code, f"{error}: saved at step {progress.step}")
    return RunEnd("failed", 2 if isinstance(error, TextgenError | OSError) else 1, _reason(error))


def finish_saving(training: Training) -> None:
    """Wait until the last checkpoint is on disk. Collective.

    Raises:
        Exception: what went wrong with it, mostly an OSError; on the main process.
    """
    if training.saver is not None:
        training.saver.wait()
    training.accelerator.wait_for_everyone()


def run_steps(training: Training, tracker: Tracker, run: RunDirectory, bar: Progress) -> None:
    """Take all remaining steps: log, evaluate, sample and save by the way. Collective.

    Raises:
        Interrupted: a signal asked some process to stop; all of them stand at the same step.
        TextgenError: a loss or gradient was not finite.
    """
    config, accelerator, progress = training.config, training.accelerator, training.progression
    per_epoch = steps_per_epoch(config, training.store)
    agreement, meter = launch.Agreement(accelerator), Meter()

    def evaluation_is_due() -> bool:
        return progress.step == progress.total_steps or progress.step % (config.evaluate_every or per_epoch) == 0

    if evaluation_is_due() and progress.evaluated_step < progress.step:  # a signal came before it was done
        evaluate_and_save(training, tracker, run, bar, meter)
    for micro_batches, waiting in step_batches(training, progress.total_steps) if not progress.finished else ():
        training.nats += train_step(training, micro_batches)
        progress.step, progress.unlogged_steps = progress.step + 1, progress.unlogged_steps + 1
        meter.steps, meter.waited = meter.steps + 1, meter.waited + waiting
        epoch_end, evaluating = progress.step % per_epoch == 0, evaluation_is_due()
        saving = evaluating or (config.save_every is not None and progress.step % config.save_every == 0)
        stopped = agree(training, agreement, now=saving)
        if progress.step % config.log_every == 0 or evaluating or epoch_end:
            bar.show(log_metrics(training, tracker, meter))
            meter = Meter()
        bar.update(progress.step)
        if epoch_end or progress.step == progress.total_steps:
            say_epoch(training, per_epoch)
        if epoch_end:
            progress.epoch_nats, progress.epoch_tokens = 0.0, 0
        if stopped:
            launch.raise_if_stopped(accelerator, training.stop)
        if evaluating:
            evaluate_and_save(training, tracker, run, bar, meter)
        elif saving:
            meter.paused += save(training)
        if progress.finished:
            break


def agree(training: Training, agreement: launch.Agreement, *, now: bool) -> bool:
    """Return whether any process was asked to stop; raise what has gone wrong on any of them. Collective.

    Args:
        training: just after a step.
        agreement: of the loop.
        now: whether a checkpoint is to be made of this step.
    """

    def ask(now: bool) -> tuple[bool, ...]:
        unsaved = training.saver is not None and training.saver.failed
        return agreement.ask(training.stop.number is not None, training.nonfinite, unsaved, now=now)

    stopped, nonfinite, unsaved = ask(now)
    if stopped and not now:  # a checkpoint will be made of this step after all
        _, nonfinite, unsaved = ask(True)
    if nonfinite or training.skips_in_a_row > MAX_SKIPS_IN_A_ROW:
        raise TextgenError(describe_nonfinite(training))
    if unsaved:
        if training.saver is not None:
            training.saver.wait()
        raise TextgenError("the checkpoint could not be written")
    return stopped


def describe_nonfinite(training: Training) -> str:
    """Write nonfinite.json, where a loss or gradient stopped being finite, and return it as a line. Collective."""
    accelerator, progress = training.accelerator, training.progression
    if training.skips_in_a_row > MAX_SKIPS_IN_A_ROW:  # the same on all processes, as `nonfinite` need not be
        return f"float16 overflowed in {training.skips_in_a_row} steps in a row up to step {progress.step}"
    rows = []
    for record in training.recent:
        for lanes, nats in record.parts:
            wrong = [float(value is not None and not value.isfinite()) for value in (nats, record.norm)]
            rows.append([float(record.step + 1), float(lanes.min()), float(lanes.max()), *wrong])
    everyone = accelerator.gather(torch.tensor(rows, dtype=torch.float64, device=accelerator.device)).tolist()
    first = int(min((row[0] for row in everyone if row[3] or row[4]), default=progress.step))
    of_step = [row for row in everyone if row[0] == first]
    wrong_loss = [row for row in of_step if row[3]]
    ranges = sorted([int(row[1]), int(row[2])] for row in wrong_loss or of_step)  # a gradient is that of all lanes
    epoch, window = divmod(first - 1, steps_per_epoch(training.config, training.store))
    quantity = "loss" if wrong_loss else "gradient"
    values = {"step": first, "epoch": epoch, "window": window, "quantity": quantity, "lanes": ranges}
    if accelerator.is_main_process:
        write_atomic(Path(training.config.run_dir) / NONFINITE_NAME, json.dumps(values, indent=2) + "\n")
    where = ", ".join(f"{low}-{high}" for low, high in ranges)
    return (
        f"the {quantity} turned to nan or infinity in step {first}, lanes {where} (`{NONFINITE_NAME}`); "
        "nothing was saved since"
    )


def write_run_files(training: Training) -> None:
    """Write what the run is made of, before its first step."""
    run_dir = Path(training.config.run_dir)
    settings = json.loads(json.dumps(asdict(training.config)))  # tuples become lists, as the parser wants them
    write_atomic(run_dir / SETTINGS_NAME, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    write_atomic(run_dir / DATA_NAME, json.dumps(training.store.record, indent=2) + "\n")
    write_atomic(run_dir / ENVIRONMENT_NAME, json.dumps(describe_environment(), indent=2) + "\n")
