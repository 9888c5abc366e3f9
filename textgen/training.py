"""Training: build or resume, then step, log, evaluate, save; and end in order, whoever asks."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator

from textgen import launch
from textgen.checkpoint import Saver
from textgen.config import SamplingConfig, TrainConfig
from textgen.corpus import normalize
from textgen.data import prepare_store
from textgen.evaluation import Score, score, split_documents
from textgen.generation import Sample, generate
from textgen.optim import learning_rate
from textgen.processes import Interrupted, StopSignals
from textgen.report import draw_loss_curve
from textgen.resume import checkpoint_bytes, checkpoints_at_a_time, resume, save, state_shapes
from textgen.run_directory import RunDirectory, write_whole
from textgen.steps import (
    Training,
    TrainingError,
    build,
    describe_cost,
    describe_request,
    describe_training,
    fit_steps,
    step_batches,
    steps_per_epoch,
    train_step,
)
from textgen.tracking import Progress, Tracker, say

log = logging.getLogger("textgen")

NONFINITE_NAME = "nonfinite.json"
SAMPLES_NAME = "samples.md"

# float16 overflows now and then, and the scale is halved; so often in a row it is no longer that.
MAX_SKIPS_IN_A_ROW = 30


def train(config: TrainConfig, *, config_file: str | None = None) -> None:
    """Train as the config says, or go on where the run's newest valid checkpoint stands. Collective.

    Args:
        config: all settings.
        config_file: what the first line of the run calls them.

    Raises:
        CorpusError, DataError, TokenizerError, LaunchError, CheckpointError, RunDirectoryError, TrainingError: what is
            wrong, in a line.
        Interrupted: a signal asked to stop; the training is saved, if it had begun.
    """
    with StopSignals(config.stop_signal) as stop:
        accelerator = launch.start(
            config.mixed_precision,
            batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            timeout=config.distributed_timeout,
            deterministic=config.deterministic,
        )
        # the text is compared by content, and folders may have other names elsewhere
        told = {n: v for n, v in asdict(config).items() if n not in ("run_dir", "data", "tokenizer", "tracking")}
        launch.assert_same(accelerator, (told, accelerator.mixed_precision), "what flags and config file say")
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
    told = f"{type(error).__name__}: {message}"
    if isinstance(error, torch.distributed.DistError) or "gloo" in message:
        return f"another process has ended, or was waited for in vain: {told.partition('. ')[0]}"
    return told


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
    now = training.progression
    if resumed and now.finished:
        run.write_status("finished", step=now.step, total_steps=now.total_steps)
        say(accelerator, f"`{config.run_dir}` has finished at step {now.step}: nothing to do")
        return
    if resumed:
        log.info("resuming at step %d", now.step)
    elif config.max_minutes is not None:
        now.total_steps = min(now.total_steps, fit_steps(training))
    per_epoch = steps_per_epoch(config, training.store)
    count = checkpoints_at_a_time(config, total_steps=now.total_steps, per_epoch=per_epoch)
    shapes = state_shapes(training.bare, batch_size=config.batch_size, averaged=training.average is not None)
    size = checkpoint_bytes(shapes) + len(training.store.tokenizer.model_proto)
    run.require_space(size, count=count)
    if accelerator.is_main_process:
        write_run_files(training)
    settings = asdict(config) | {"parameters": training.bare.num_parameters}
    tracker = Tracker(
        accelerator, config.tracking, run.path, settings, wandb_id=training.wandb_id, first_step=now.step,
        evaluated_step=now.evaluated_step,
    )  # fmt: skip
    training.wandb_id = tracker.wandb_id
    if accelerator.is_main_process:
        training.saver = Saver(
            run.path, keep_last=config.keep_last, device=accelerator.device, before=tracker.sync,
            after=lambda step: run.write_status("running", step=step, total_steps=now.total_steps),
        )  # fmt: skip
        training.saver.reserve(shapes)
    log.info("%s", describe_training(training))
    accelerator.wait_for_everyone()  # so that a signal to all of them hardly finds only some of them saving
    training.stop.defer()
    run.write_status("running", step=now.step, total_steps=now.total_steps)
    try:
        with _status_of_the_end(run, training.stop):  # which does not wait for W&B
            run_steps(training, tracker, run)
            finish_saving(training)
            run.write_status("finished", step=now.step, total_steps=now.total_steps)
    except Interrupted as interrupted:
        save(training)
        finish_saving(training)
        run.write_status("preempted", step=now.step, total_steps=now.total_steps, reason=str(interrupted))
        log.info("%s: saved at step %d; the same command goes on from there", interrupted, now.step)
        raise
    finally:
        if training.saver is not None:
            training.saver.settle()
        tracker.finish()


def finish_saving(training: Training) -> None:
    """Wait until the last checkpoint is on disk. Collective.

    Raises:
        Exception: what went wrong with it, mostly an OSError; on the main process.
    """
    if training.saver is not None:
        training.saver.wait()
    training.accelerator.wait_for_everyone()


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass
class Meter:
    """Time and steps since the last row of metrics, or since the resume."""

    steps: int = 0
    waited: float = 0.0
    """seconds for data"""
    paused: float = 0.0
    """seconds for checkpoints"""
    mark: float = field(default_factory=time.perf_counter)
    """when the steps began; evaluations do not count"""


def run_steps(training: Training, tracker: Tracker, run: RunDirectory) -> None:
    """Take all remaining steps: log, evaluate, sample and save by the way. Collective.

    Raises:
        Interrupted: a signal asked some process to stop; all of them stand at the same step.
        TrainingError: a loss or gradient was not finite.
    """
    config, accelerator, now = training.config, training.accelerator, training.progression
    per_epoch = steps_per_epoch(config, training.store)
    bar = Progress(total=now.total_steps, done=now.step, main=accelerator.is_main_process)
    agreement, meter = launch.Agreement(accelerator), Meter()

    def evaluation_is_due() -> bool:
        return now.step == now.total_steps or now.step % (config.evaluate_every or per_epoch) == 0

    if evaluation_is_due() and now.evaluated_step < now.step:  # a signal came before it was done
        meter = Meter(paused=evaluate_and_save(training, tracker, run))
    for micro_batches, waiting in step_batches(training, now.total_steps) if not now.finished else ():
        training.nats += train_step(training, micro_batches)
        now.step, now.unlogged_steps = now.step + 1, now.unlogged_steps + 1
        meter.steps, meter.waited = meter.steps + 1, meter.waited + waiting
        epoch_end, evaluating = now.step % per_epoch == 0, evaluation_is_due()
        saving = evaluating or (config.save_every is not None and now.step % config.save_every == 0)
        stopped = agree(training, agreement, now=saving)
        if now.step % config.log_every == 0 or evaluating or epoch_end:
            values = log_metrics(training, tracker, meter)
            bar.update(now.step, values)
            meter = Meter()
        if epoch_end or now.step == now.total_steps:
            say_epoch(training, per_epoch)
        if epoch_end:
            now.epoch_nats, now.epoch_tokens = 0.0, 0
        if stopped:
            launch.raise_if_stopped(accelerator, training.stop)
        if saving:
            before = time.perf_counter()
            meter.paused += evaluate_and_save(training, tracker, run) if evaluating else save(training)
            meter.mark += time.perf_counter() - before
        if now.finished:
            break
    bar.close()


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
        raise TrainingError(describe_nonfinite(training))
    if unsaved:
        if training.saver is not None:
            training.saver.wait()
        raise TrainingError("the checkpoint could not be written")
    return stopped


def log_metrics(training: Training, tracker: Tracker, meter: Meter) -> dict[str, float]:
    """Write a row of metrics of the steps since the last one, and return it. Collective."""
    config, now = training.config, training.progression
    step_tokens = config.batch_size * config.seq_len
    total = float(training.accelerator.reduce(training.nats, "sum"))
    tokens, seconds = now.unlogged_steps * step_tokens, time.perf_counter() - meter.mark
    now.epoch_nats, now.epoch_tokens = now.epoch_nats + total, now.epoch_tokens + tokens
    training.nats.zero_()
    now.unlogged_steps = 0
    loss, bits = total / tokens, bits_per_nat(training)
    values: dict[str, float] = {
        "tokens": now.step * step_tokens,
        "train/loss": loss,
        **({"train/bits_per_byte": loss * bits} if bits else {}),
        "train/learning_rate": learning_rate(now.step - 1, now.total_steps, config),
        "train/tokens_per_second": meter.steps * step_tokens / seconds,
        "train/data_share": meter.waited / seconds,
        **({"train/skipped_steps": now.skipped_steps} if now.skipped_steps else {}),
        **({"checkpoint/pause_seconds": meter.paused} if meter.paused else {}),
    }
    tracker.log(now.step, values)
    return values


def bits_per_nat(training: Training) -> float | None:
    """Return what turns nats per token into bits per byte; a tokenizer that loses text has none."""
    store = training.store
    return 1 / math.log(2) / store.bytes_per_token("train") if store.tokenizer.is_lossless else None


def say_epoch(training: Training, per_epoch: int) -> None:
    """Print the average loss of an epoch, or of what there is of the last one."""
    now, bits = training.progression, bits_per_nat(training)
    average = now.epoch_nats / now.epoch_tokens
    say(
        training.accelerator,
        f"Epoch [{math.ceil(now.step / per_epoch)}/{math.ceil(now.total_steps / per_epoch)}], "
        f"Avg Loss: {average:.4f}" + (f" ({average * bits:.4f} bits per byte)" if bits else ""),
    )


def evaluate_and_save(training: Training, tracker: Tracker, run: RunDirectory) -> float:
    """Score the validation split, sample, write a checkpoint; mark the training finished where it is. Collective.

    Returns:
        Seconds that the training paused for the checkpoint.

    Raises:
        Interrupted: a signal came before score and samples were done; the evaluation will be made anew.
    """
    config, accelerator, now = training.config, training.accelerator, training.progression
    best_loss, best_step, without_better = now.best_loss, now.best_step, now.evaluations_without_better + 1
    patience, last = config.early_stopping_patience, now.step == now.total_steps
    stop_early = False
    score = evaluate(training, config.evaluate_documents)
    if score is not None:
        if best_loss is None or score.nats_per_token < best_loss:
            best_loss, best_step, without_better = score.nats_per_token, now.step, 0
        stop_early = patience is not None and without_better >= patience
        if (stop_early or last) and config.evaluate_documents is not None:
            score = evaluate(training, None) or score  # the figure to report; the best one is chosen by like measures
    if score is not None and not math.isfinite(score.nats):
        raise TrainingError(f"the validation loss turned to {score.nats_per_token} by step {now.step}; it is not saved")
    if accelerator.is_main_process:
        write_samples(training)
    launch.raise_if_stopped(accelerator, training.stop)
    now.best_loss, now.best_step, now.evaluations_without_better = best_loss, best_step, without_better
    now.evaluated_step, now.finished = now.step, stop_early or last
    if score is not None:
        lossless = training.store.tokenizer.is_lossless
        values = {"valid/loss": score.nats_per_token}
        tracker.log(now.step, values | ({"valid/bits_per_byte": score.bits_per_byte} if lossless else {}))
        say(
            accelerator,
            f"step {now.step}: valid loss {score.nats_per_token:.4f}"
            + (f", {score.bits_per_byte:.4f} bits per byte" if lossless else "")
            + f" ({score.documents} documents, {score.seconds:.0f} s)",
        )
    if stop_early:
        say(accelerator, f"stopping early: no better validation loss in {patience} evaluations")
    pause = save(training)
    if accelerator.is_main_process:
        try:
            draw_loss_curve({"": run.path}, run.path / "loss.png")
        except Exception as error:  # a picture is no reason to end a training
            log.warning("no loss.png: %s", error)
    return pause


def evaluate(training: Training, limit: int | None) -> Score | None:
    """Score the validation split, if there is one. Collective.

    Raises:
        Interrupted: a signal came; no figure is made.
    """
    if "validation" not in training.store.record["splits"]:
        return None
    documents, num_bytes = split_documents(training.store.split("validation"), limit)

    def poll() -> None:
        launch.raise_if_stopped(training.accelerator, training.stop)

    return score(
        training.accelerator, training.best_weights, documents, num_bytes,
        bos_id=training.store.tokenizer.bos_id, progress=True, poll=poll,
    )  # fmt: skip


def write_samples(training: Training) -> None:
    """Write samples at every temperature into samples.md, in place of those of this step and later ones.

    Leaves the file as it is where a signal comes in between.
    """
    config, model, step = training.config, training.best_weights, training.progression.step
    if not config.sample_prompts:
        return
    model.eval()
    prompts = [normalize(prompt, model.text["normalization"]) for prompt in config.sample_prompts]
    lines = [f"## step {step}\n"]
    for temperature in config.sample_temperatures:
        sampling = SamplingConfig(temperature=temperature, max_new_tokens=config.sample_tokens, seed=config.seed)
        samples: dict[int, Sample] = {}
        for row, event in generate(model, training.store.tokenizer, prompts, sampling):
            if training.stop.number is not None:
                model.train()
                return
            if isinstance(event, Sample):
                samples[row] = event
        lines += [f"- temperature {temperature}: **{samples[i].prompt}**{samples[i].text}" for i in sorted(samples)]
    model.train()
    path = Path(config.run_dir) / SAMPLES_NAME
    earlier = re.split(r"(?m)^(?=## step \d+$)", path.read_text(encoding="utf-8")) if path.exists() else []
    kept = [part for part in earlier if (found := re.match(r"## step (\d+)\n", part)) and int(found[1]) < step]
    write_whole(path, "".join(kept) + "\n".join(lines) + "\n\n")  # samples of earlier steps are made only once


def describe_nonfinite(training: Training) -> str:
    """Write nonfinite.json, where a loss or gradient stopped being finite, and return it as a line. Collective."""
    accelerator, now = training.accelerator, training.progression
    if training.skips_in_a_row > MAX_SKIPS_IN_A_ROW:  # the same on all processes, as `nonfinite` need not be
        return f"float16 overflowed in {training.skips_in_a_row} steps in a row up to step {now.step}"
    rows = []
    for taken in training.recent:
        for lanes, nats in taken.parts:
            wrong = [float(value is not None and not value.isfinite()) for value in (nats, taken.norm)]
            rows.append([float(taken.step + 1), float(lanes.min()), float(lanes.max()), *wrong])
    everyone = accelerator.gather(torch.tensor(rows, dtype=torch.float64, device=accelerator.device)).tolist()
    first = int(min((row[0] for row in everyone if row[3] or row[4]), default=now.step))
    of_step = [row for row in everyone if row[0] == first]
    wrong_loss = [row for row in of_step if row[3]]
    ranges = sorted([int(row[1]), int(row[2])] for row in wrong_loss or of_step)  # a gradient is that of all lanes
    epoch, window = divmod(first - 1, steps_per_epoch(training.config, training.store))
    quantity = "loss" if wrong_loss else "gradient"
    values = {"step": first, "epoch": epoch, "window": window, "quantity": quantity, "lanes": ranges}
    if accelerator.is_main_process:
        write_whole(Path(training.config.run_dir) / NONFINITE_NAME, json.dumps(values, indent=2) + "\n")
    where = ", ".join(f"{low}-{high}" for low, high in ranges)
    return (
        f"the {quantity} turned to nan or infinity in step {first}, lanes {where} (`{NONFINITE_NAME}`); "
        "nothing was saved since"
    )


def write_run_files(training: Training) -> None:
    """Write config.yaml of the run, before its first step."""
    run_dir = Path(training.config.run_dir)
    settings = json.loads(json.dumps(asdict(training.config)))  # tuples become lists, as the parser wants them
    write_whole(run_dir / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    write_whole(run_dir / "data.json", json.dumps(training.store.record, indent=2) + "\n")
