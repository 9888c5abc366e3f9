"""The training loop: build, resume or start, take all steps, end in order.

`run_steps` is the loop itself. The rest of the module is what happens before and after it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
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
from textgen.errors import DivergedError, TextgenError, is_lack_of_memory, user_error
from textgen.files import write_atomic
from textgen.hardware import sum_dtype
from textgen.kernels import amx
from textgen.reporting.report import leave_report
from textgen.runs.checkpoint import Saver, checkpoint_path
from textgen.runs.directory import DATA_NAME, SETTINGS_NAME, RunDirectory, refuse_other_kinds
from textgen.runs.environment import ENVIRONMENT_NAME, describe_environment
from textgen.tracking.backends import build_trackers, check_trackers, describe_launch
from textgen.tracking.tracker import RunEnd, Tracker
from textgen.tracking.wandb import choose_wandb_id
from textgen.training.budget import describe_cost, describe_request, describe_training, fit_steps
from textgen.training.copying import bring_checkpoint, finish_copying, start_copying
from textgen.training.metrics import Meter, log_metrics, say_epoch
from textgen.training.profile import Profile, check_profile
from textgen.training.resume import (
    ResumePoint,
    checkpoint_bytes,
    checkpoints_at_a_time,
    find_resume_point,
    keep_reading_rules,
    load_training,
    save,
    state_shapes,
)
from textgen.training.setup import Training, build, refuse_graph
from textgen.training.start import start_from_base, start_from_neighbours
from textgen.training.step import Learner, span, step_batches, train_step
from textgen.training.validation import draw_curve, log_validation, measure_decoder, update_best, validate

log = logging.getLogger("textgen")

NONFINITE_NAME = "nonfinite.json"

# float16 overflows once in a while, and the scaler halves its scale. This many overflows in a row have another cause.
MAX_SKIPS_IN_A_ROW = 30


def train(
    config: TrainConfig,
    *,
    config_file: str | None = None,
    on_row: Callable[[dict[str, float]], None] | None = None,
    owns_process: bool = True,
    is_trial: bool = False,
) -> None:
    """Train with the given settings, or resume from the run's newest valid checkpoint. Collective.

    Args:
        config: all settings.
        config_file: name of the settings for the first line of the log.
        on_row: called with each row of metrics on the main process; what it raises ends the training.
        owns_process: whether a signal may end the process; see `StopSignals`.
        is_trial: see `Training`.

    Raises:
        TextgenError: a setting, the data or a checkpoint cannot be used; the message is one line.
        Interrupted: a signal asked to stop. The training is saved if it had started.
    """
    with StopSignals(config.stop_signal, owns_process=owns_process) as stop:
        accelerator = start_processes(config)
        log.info("%s, %s", launch.describe(accelerator), describe_request(config, config_file))
        run_training(config, accelerator, stop, on_row=on_row, is_trial=is_trial)
        # DDP is freed by now, while Accelerate still holds the process group. As its last owner, DDP would destroy the
        # group with the GIL held, and gloo's destructor waits for a thread that may need the GIL: a process that had
        # trained hung there now and then (seen in a debugger with torch 2.13, 2026-11-29).
        accelerator.end_training()


def run_training(
    config: TrainConfig,
    accelerator: Accelerator,
    stop: StopSignals,
    *,
    on_row: Callable[[dict[str, float]], None] | None = None,
    is_trial: bool = False,
) -> None:
    """Train, or print what a training would cost. Collective. Nothing of the training is left after the return."""
    if config.dry_run:
        refuse_other_kinds(Path(config.run_dir))
        training = build_training(config, accelerator, stop)
        describe_cost(training.learner, training.loader, training.store)
        return
    with hold_run(config, accelerator) as run, _status_of_the_end(run, stop):
        copier = bring_checkpoint(config, accelerator, run)
        training = build_training(config, accelerator, stop)
        training.on_row, training.is_trial, training.copier = on_row, is_trial, copier
        with _name_in_errors(run.path):
            train_and_save(training, run)


def start_processes(config: TrainConfig) -> Accelerator:
    """Start Accelerate, and check that all processes have the same settings. Collective."""
    if config.elastic:
        accumulation = config.gradient_accumulation_steps
        launch.wait_for_divisor(config.batch_size, accumulation, seconds=config.distributed_timeout)
    accelerator = launch.start(
        config.mixed_precision,
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        model=config.model,
        seq_len=config.seq_len,
        timeout=config.distributed_timeout,
        deterministic=config.deterministic,
        elastic=config.elastic,
    )
    # Directories may have other names on other machines. `build_training` compares the text by content.
    settings = {n: v for n, v in asdict(config).items() if n not in ("run_dir", "data", "tokenizer", "tracking")}
    launch.assert_same(
        accelerator, (settings, accelerator.mixed_precision), "the configuration (flags and config file)"
    )
    refuse_graph(config, accelerator)
    check_trackers(config.tracking)
    amx.is_wanted()  # refuses what this machine lacks before the text is encoded
    return accelerator


@contextmanager
def hold_run(config: TrainConfig, accelerator: Accelerator) -> Iterator[RunDirectory]:
    """Hold the run's directory, the same one on all processes. Collective."""
    run = RunDirectory(config.run_dir, main=accelerator.is_main_process)
    with run.hold():
        # A training that finds the directory in use fails before this line, and does not change the other's status.
        accelerator.wait_for_everyone()
        run.is_shared = launch.count_different(accelerator, run.read_started()) == 1
        if not run.is_shared and config.checkpoint_copy is None:
            raise TextgenError(
                f"`{run.path}` is not the same on all {accelerator.num_processes} processes: wanted a disk that all "
                "share, or `--checkpoint_copy`"
            )
        yield run


def build_training(config: TrainConfig, accelerator: Accelerator, stop: StopSignals) -> Training:
    """Prepare the data and build the training. Collective."""
    config = keep_reading_rules(config)
    store = prepare_store(config.data, config.tokenizer)
    launch.assert_same(accelerator, store.training_key, "the training text")
    return build(config, accelerator, store, stop)


def train_and_save(training: Training, run: RunDirectory) -> None:
    """Resume or start, take all steps, and wait until everything is on disk. Collective."""
    accelerator = training.learner.accelerator
    run.require_lock()  # preparing the data may have taken long
    resume_or_start(training)
    progress = training.learner.progression
    if progress.finished:
        run.write_status("finished", step=progress.step, total_steps=progress.total_steps)
        say(
            accelerator,
            f"`{run.path}` has finished at step {progress.step}: nothing to do; `--init_from {run.path}` with another "
            "`--run_dir` starts a new training from its weights",
        )
        start_copying(training)  # of a training whose copy is behind
        finish_copying(training, stopped=False)
        return
    require_space(training, run)
    check_profile(training.learner)
    if accelerator.is_main_process:
        write_run_files(training)
    tracker = start_tracking(training, run)
    start_saving(training, run, tracker)
    start_copying(training)
    log.info("%s", describe_training(training.learner, training.store))
    # From here on a signal no longer ends the process at once: the loop saves first. All processes get here before any
    # of them defers signals, so that a signal to all of them rarely finds some before this line and some after it.
    accelerator.wait_for_everyone()
    training.stop.defer()
    run.write_status("running", step=progress.step, total_steps=progress.total_steps)
    try:
        with (
            _status_of_the_end(run, training.stop),  # inside the `try`: the status does not wait for W&B
            Progress("step", progress.total_steps, done=progress.step, per_epoch=training.loader.per_epoch) as bar,
            Profile(training.learner, run) as profile,
        ):
            run_steps(training, tracker, run, bar, profile)
            finish_saving(training)
            run.write_status("finished", step=progress.step, total_steps=progress.total_steps)
            finish_copying(training, stopped=False)
        if accelerator.is_main_process and not training.is_trial:
            measure_decoder(training, run)
    except Interrupted as interrupted:
        save(training)
        finish_saving(training)
        run.write_status("preempted", step=progress.step, total_steps=progress.total_steps, reason=str(interrupted))
        interrupted.saved = True
        log.info("%s: saved at step %d; run the same command again to continue", interrupted, progress.step)
        finish_copying(training, stopped=True)
        raise
    except Exception as failure:
        if is_lack_of_memory(failure):  # of which the command line prints one line, not the place
            frames = traceback.extract_tb(failure.__traceback__)
            place = " > ".join(f.name for f in frames if Path(__file__).parents[1] in Path(f.filename).parents)
            log.error("not enough memory after step %d, in %s", progress.step, place)
        raise
    finally:
        if training.saver is not None:
            training.saver.settle()
            error = sys.exception()
            if training.copier is not None and error is not None and not isinstance(error, Interrupted):
                training.copier.finish(stopped=True)
            if not (run.is_lost() or training.is_trial):
                leave_report(run.path)
        tracker.finish(_describe_end(training, sys.exception()))


# --- the loop --------------------------------------------------------------------------------------------------------


def run_steps(training: Training, tracker: Tracker, run: RunDirectory, bar: Progress, profile: Profile) -> None:
    """Take all remaining steps; log, evaluate, sample and save at their intervals. Collective.

    Raises:
        Interrupted: a signal asked some process to stop; all processes have taken the same number of steps.
        DivergedError: a loss or gradient was not finite.
    """
    learner = training.learner
    config, accelerator, progress = learner.config, learner.accelerator, learner.progression
    per_epoch = training.loader.per_epoch
    agreement, meter = launch.Agreement(accelerator), Meter()

    def evaluation_is_due() -> bool:
        return progress.step == progress.total_steps or progress.step % (config.evaluate_every or per_epoch) == 0

    # A base is scored before the first step. An evaluation that a signal interrupted is repeated after the resume.
    is_unscored_base = training.base is not None and progress.step == 0 and progress.best_step is None
    if is_unscored_base or (evaluation_is_due() and progress.evaluated_step < progress.step):
        evaluate_and_save(training, tracker, run, bar, meter)
    remaining = step_batches(learner, training.loader, progress.total_steps) if not progress.finished else ()
    profile.begin_or_end()
    for micro_batches, waiting in remaining:
        training.nats += train_step(learner, micro_batches)
        progress.step, progress.unlogged_steps = progress.step + 1, progress.unlogged_steps + 1
        meter.steps, meter.waited = meter.steps + 1, meter.waited + waiting
        epoch_end, evaluating = progress.step % per_epoch == 0, evaluation_is_due()
        saving = evaluating or (config.save_every is not None and progress.step % config.save_every == 0)
        agreeing = time.perf_counter()
        with span("agree"):
            stopped = agree(training, agreement, now=saving)
        if accelerator.device.type == "cpu":  # a GPU would still be computing the step
            meter.agreed += time.perf_counter() - agreeing
        if progress.step % config.log_every == 0 or evaluating or epoch_end:
            with span("log"):
                bar.show(log_metrics(training, tracker, meter))
            meter = Meter()
        bar.update(progress.step)
        if epoch_end or progress.step == progress.total_steps:
            say_epoch(training)
        if epoch_end:
            progress.epoch_nats, progress.epoch_tokens = 0.0, 0
        if stopped:
            launch.raise_if_stopped(accelerator, training.stop)
        if evaluating:
            profile.end()
            evaluate_and_save(training, tracker, run, bar, meter)
        elif saving:
            with span("checkpoint"):
                meter.paused += save(training)
        profile.begin_or_end()
        if progress.finished:  # also by early stopping
            break


def evaluate_and_save(training: Training, tracker: Tracker, run: RunDirectory, bar: Progress, meter: Meter) -> None:
    """Validate, update the best checkpoint, log and save. Collective.

    Raises:
        Interrupted: a signal came before score and samples were done. A resumed run repeats the evaluation.
        DivergedError: the score is nan or infinite.
    """
    started = time.perf_counter()
    validation = validate(training, run)
    update_best(training.learner.progression, validation)
    log_validation(training, validation, tracker, bar, seconds=time.perf_counter() - started)
    pause = save(training)
    if training.learner.accelerator.is_main_process and not training.is_trial:
        draw_curve(run)
    meter.paused += pause
    meter.evaluated += time.perf_counter() - started - pause


def agree(training: Training, agreement: launch.Agreement, *, now: bool) -> bool:
    """Return whether any process was asked to stop. Collective.

    On CUDA the flags of all processes arrive one call late, unless `now` is set.

    Args:
        training: just after a step.
        agreement: of the loop.
        now: whether this step is saved, so that its flags must be known at once.

    Raises:
        DivergedError: a loss or gradient was not finite on some process.
        TextgenError: a checkpoint could not be written.
    """
    learner = training.learner

    def ask(now: bool) -> tuple[bool, ...]:
        unsaved = training.saver is not None and training.saver.failed
        return agreement.ask(training.stop.number is not None, learner.nonfinite, unsaved, now=now)

    stopped, nonfinite, unsaved = ask(now)
    if stopped and not now:  # the stop will save this step
        _, nonfinite, unsaved = ask(True)
    if nonfinite or learner.skips_in_a_row > MAX_SKIPS_IN_A_ROW:
        raise DivergedError(describe_nonfinite(learner, training.loader.per_epoch))
    if unsaved:
        if training.saver is not None:
            training.saver.wait()  # raises the reason
        raise TextgenError("the checkpoint could not be written")
    return stopped


def describe_nonfinite(learner: Learner, per_epoch: int) -> str:
    """Write nonfinite.json: where a loss or gradient became nan or infinite. Return it as one line. Collective."""
    accelerator, step = learner.accelerator, learner.progression.step
    if learner.skips_in_a_row > MAX_SKIPS_IN_A_ROW:  # the same on all processes, as `nonfinite` need not be
        return f"float16 overflowed in {learner.skips_in_a_row} steps in a row up to step {step}"
    # Every process reports its micro-batches of the last steps: step, first and last lane, whether the loss and the
    # gradient are not finite.
    rows = []
    for record in learner.recent:
        for lanes, nats in record.parts:
            wrong = [float(value is not None and not value.isfinite()) for value in (nats, record.norm)]
            rows.append([float(record.step + 1), float(lanes.min()), float(lanes.max()), *wrong])
    everyone = accelerator.gather(
        torch.tensor(rows, dtype=sum_dtype(accelerator.device), device=accelerator.device)
    ).tolist()
    first = int(min((row[0] for row in everyone if row[3] or row[4]), default=step))
    of_step = [row for row in everyone if row[0] == first]
    wrong_loss = [row for row in of_step if row[3]]
    ranges = sorted([int(row[1]), int(row[2])] for row in wrong_loss or of_step)  # a gradient is that of all lanes
    epoch, window = divmod(first - 1, per_epoch)
    quantity = "loss" if wrong_loss else "gradient"
    values = {"step": first, "epoch": epoch, "window": window, "quantity": quantity, "lanes": ranges}
    if accelerator.is_main_process:
        write_atomic(Path(learner.config.run_dir) / NONFINITE_NAME, json.dumps(values, indent=2) + "\n")
    where = ", ".join(f"{low}-{high}" for low, high in ranges)
    return (
        f"the {quantity} turned to nan or infinity in step {first}, lanes {where} (`{NONFINITE_NAME}`); "
        "nothing was saved since"
    )


# --- before the loop -------------------------------------------------------------------------------------------------


def resume_or_start(training: Training) -> None:
    """Load the checkpoint to resume from, if there is one, and decide how many steps to take. Collective."""
    learner = training.learner
    point = find_resume_point(training)
    total = decide_total_steps(training, point)  # may time steps, so it comes before weights are loaded
    if point is not None:
        load_training(training, point)
    elif learner.config.init_from is not None:
        start_from_base(training)
    else:
        start_from_neighbours(training)
    progress = learner.progression
    if total != progress.total_steps:
        progress.total_steps, progress.finished = total, progress.step >= total
    if point is not None and not progress.finished:
        log.info("resuming at step %d", progress.step)


def decide_total_steps(training: Training, point: ResumePoint | None) -> int:
    """Return the number of steps of the whole training: by epochs, `max_steps` and `max_minutes`. Collective.

    What the minutes decided once stays. A resume times steps only if it may take more of them: epochs or `max_steps`,
    which are more now, had decided, or the minutes are others. It never ends a training before the steps that were
    taken, or promised within the same minutes.
    """
    config, total = training.learner.config, training.learner.progression.total_steps
    if config.max_minutes is None:
        return total
    taken = promised = 0
    if point is not None:
        saved, taken = point.trainer["config"], point.progression.step
        if saved.get("max_minutes") == config.max_minutes:
            promised = point.progression.total_steps
            limit = saved.get("max_epochs", config.max_epochs) * training.loader.per_epoch
            if promised >= total or promised < min(limit, saved.get("max_steps") or limit):
                return min(total, promised)
    fitting = fit_steps(training.learner, training.loader)
    if taken and fitting <= taken:
        log.info("the time is over: %d steps are taken", taken)
    return min(total, max(fitting, taken, promised))


def require_space(training: Training, run: RunDirectory) -> None:
    """Raise TextgenError if the disk is too small for the checkpoints."""
    learner = training.learner
    count = checkpoints_at_a_time(
        learner.config, total_steps=learner.progression.total_steps, per_epoch=training.loader.per_epoch
    )
    size = checkpoint_bytes(_shapes(learner)) + len(training.store.tokenizer.model_proto)
    run.require_space(size, count=count)


def _shapes(learner: Learner) -> dict[str, dict[str, tuple[int, ...]]]:
    batch_size, averaged = learner.config.batch_size, learner.average is not None
    return state_shapes(learner.unwrapped_model, batch_size=batch_size, averaged=averaged)


def write_run_files(training: Training) -> None:
    """Write the settings, the data's description and the environment into the run's directory."""
    config = training.learner.config
    run_dir = Path(config.run_dir)
    settings = json.loads(json.dumps(asdict(config)))  # YAML gets lists for tuples
    write_atomic(run_dir / SETTINGS_NAME, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    # Equal texts have one store, whose record names the source that they came from first.
    record = training.store.record | ({"source": "memory"} if config.data.source == "memory" else {})
    write_atomic(run_dir / DATA_NAME, json.dumps(record, indent=2) + "\n")
    write_atomic(run_dir / ENVIRONMENT_NAME, json.dumps(describe_environment(), indent=2) + "\n")


def start_tracking(training: Training, run: RunDirectory) -> Tracker:
    """Open metrics.jsonl, and on the main process the trackers that follow it."""
    learner = training.learner
    config, accelerator, progress = learner.config, learner.accelerator, learner.progression
    saved_id, trackers = training.wandb_id, {}
    training.wandb_id = choose_wandb_id(saved_id, run.path)
    if accelerator.is_main_process:
        settings = asdict(config) | {
            "parameters": learner.unwrapped_model.num_parameters,
            "environment": describe_environment(),
            **({} if training.base is None else {"base": training.base}),
            "launch": describe_launch(os.environ)
            | {"processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision},
        }
        trackers = build_trackers(
            config.tracking,
            run.path,
            settings,
            wandb_id=training.wandb_id,
            resumed=saved_id is not None,
            first_step=progress.step,
        )
    return Tracker(
        run.path,
        trackers,
        main=accelerator.is_main_process,
        first_step=progress.step,
        evaluated_step=progress.evaluated_step,
        on_row=training.on_row,
        require=run.require_lock,
    )


def start_saving(training: Training, run: RunDirectory, tracker: Tracker) -> None:
    """Give the main process a `Saver`, which tells the tracker of every checkpoint that is on disk."""
    learner = training.learner
    config, accelerator, progress = learner.config, learner.accelerator, learner.progression
    copier = training.copier

    def written(step: int) -> None:
        run.write_status("running", step=step, total_steps=progress.total_steps)
        best = {"step": step, "best_step": progress.best_step, "best_loss": progress.best_loss}
        tracker.checkpoint(checkpoint_path(run.path, step), best=step == progress.best_step, metadata=best)
        if copier is not None:
            copier.offer(step, best_step=progress.best_step)

    if accelerator.is_main_process:
        training.saver = Saver(
            run.path,
            keep_last=config.keep_last,
            device=accelerator.device,
            before=tracker.sync,
            after=written,
            require=run.require_lock,
            in_use=lambda: () if copier is None else copier.copying,
        )
        training.saver.reserve(_shapes(learner))


# --- the end ---------------------------------------------------------------------------------------------------------


def finish_saving(training: Training) -> None:
    """Wait until the last checkpoint is on disk. Collective.

    Raises:
        Exception: the checkpoint could not be written, mostly an OSError; on the main process.
    """
    if training.saver is not None:
        training.saver.wait()
    training.learner.accelerator.wait_for_everyone()


@contextmanager
def _status_of_the_end(run: RunDirectory, stop: StopSignals) -> Iterator[None]:
    """Write the reason into status.json if the training ends with an error or before its first step."""
    try:
        yield
    except Interrupted as interrupted:
        if not stop.deferred:  # after that, the main process writes the step at which all of them stopped
            run.end("preempted", f"{interrupted} before the first step")
        raise
    except BaseException as error:
        run.end("failed", _reason(error))
        raise


def _reason(error: BaseException) -> str:
    """Return an error as one line; with its type unless it is a user's error or one of the operating system."""
    line = user_error(error)
    message = (line or str(error)).partition("\n")[0]
    if line is not None or (isinstance(error, ValueError | OSError) and message):
        return message
    named = f"{type(error).__name__}: {message}"
    if isinstance(error, torch.distributed.DistError) or "gloo" in message:
        return f"another process has ended, or did not answer: {named.partition('. ')[0]}"
    return named


@contextmanager
def _name_in_errors(run_dir: Path) -> Iterator[None]:
    """Add the run directory to an OSError without a file name, as a write to an open file raises it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(run_dir)) from error


def _describe_end(training: Training, error: BaseException | None) -> RunEnd:
    """Return the end of the training for the trackers."""
    progress = training.learner.progression
    if error is None:
        best = ""
        if progress.best_loss is not None:
            best = f", best validation loss {progress.best_loss:.4f} at step {progress.best_step}"
        return RunEnd("finished", 0, f"step {progress.step} of {progress.total_steps}{best}")
    if isinstance(error, Interrupted):
        return RunEnd("preempted", error.exit_code, f"{error}: saved at step {progress.step}")
    return RunEnd("failed", 1 if user_error(error) is None else 2, _reason(error))
