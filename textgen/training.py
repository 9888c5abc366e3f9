"""Training: build or resume, then step, log, evaluate, save; and end in order, whoever asks."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator

from textgen.config import SamplingConfig, TrainConfig
from textgen.console import Progress, say
from textgen.data.corpus import normalize
from textgen.data.store import prepare_store
from textgen.decoding.generation import Sample, generate
from textgen.distributed import launch
from textgen.distributed.signals import Interrupted, StopSignals
from textgen.evaluation import Score, perplexity, score, split_documents
from textgen.files import write_whole
from textgen.optim import learning_rate
from textgen.reporting.report import SAMPLES_NAME, draw_loss_curve, leave_report
from textgen.resume import checkpoint_bytes, checkpoints_at_a_time, resume, save, state_shapes
from textgen.runs.checkpoint import Saver, checkpoint_path
from textgen.runs.directory import RunDirectory
from textgen.runs.environment import ENVIRONMENT_NAME, describe_environment
from textgen.steps import (
    Training,
    TrainingError,
    build,
    describe_cost,
    describe_request,
    describe_training,
    fit_steps,
    refuse_graph,
    step_batches,
    steps_per_epoch,
    train_step,
)
from textgen.tracking.backends import assert_installed, build_trackers, describe_launch
from textgen.tracking.tracker import RunEnd, SampledText, Tracker
from textgen.tracking.wandb import choose_wandb_id
from textgen.usage import flops_per_token, measure_machines, peak_flops

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
        CorpusError, DataError, TokenizerError, LaunchError, CheckpointError, RunDirectoryError, TrackingError,
            TrainingError: what is wrong, in a line.
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
        told = {n: v for n, v in asdict(config).items() if n not in ("run_dir", "data", "tokenizer", "tracking")}
        launch.assert_same(accelerator, (told, accelerator.mixed_precision), "what flags and config file say")
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
    tracker = start_tracking(training, run)

    def written(step: int) -> None:
        run.write_status("running", step=step, total_steps=now.total_steps)
        about = {"step": step, "best_step": now.best_step, "best_loss": now.best_loss}
        tracker.checkpoint(checkpoint_path(run.path, step), best=step == now.best_step, about=about)

    if accelerator.is_main_process:
        training.saver = Saver(
            run.path, keep_last=config.keep_last, device=accelerator.device, before=tracker.sync, after=written
        )
        training.saver.reserve(shapes)
    log.info("%s", describe_training(training))
    accelerator.wait_for_everyone()  # so that a signal to all of them hardly finds only some of them saving
    training.stop.defer()
    run.write_status("running", step=now.step, total_steps=now.total_steps)
    try:
        with (
            _status_of_the_end(run, training.stop),  # which does not wait for W&B
            Progress("step", now.total_steps, done=now.step, per_epoch=per_epoch) as bar,
        ):
            run_steps(training, tracker, run, bar)
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
            leave_report(run.path)
        tracker.finish(_how_it_ended(training, sys.exception()))


def start_tracking(training: Training, run: RunDirectory) -> Tracker:
    """Open metrics.jsonl, and on the main process the trackers that follow it."""
    config, accelerator, now = training.config, training.accelerator, training.progression
    begun, trackers = training.wandb_id, {}
    training.wandb_id = choose_wandb_id(begun)
    if accelerator.is_main_process:
        settings = asdict(config) | {
            "parameters": training.bare.num_parameters,
            "environment": describe_environment(),
            "launch": describe_launch(os.environ)
            | {"processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision},
        }
        trackers = build_trackers(
            config.tracking, run.path, settings, wandb_id=training.wandb_id, resumed=begun == training.wandb_id,
            first_step=now.step,
        )  # fmt: skip
    return Tracker(
        run.path, trackers, main=accelerator.is_main_process, first_step=now.step, evaluated_step=now.evaluated_step
    )


def _how_it_ended(training: Training, error: BaseException | None) -> RunEnd:
    """Return what trackers are told in the end."""
    now = training.progression
    if error is None:
        best = "" if now.best_loss is None else f", best validation loss {now.best_loss:.4f} at step {now.best_step}"
        return RunEnd("finished", 0, f"step {now.step} of {now.total_steps}{best}")
    if isinstance(error, Interrupted):
        return RunEnd("preempted", error.exit_code, f"{error}: saved at step {now.step}")
    return RunEnd("failed", 2 if isinstance(error, TrainingError | OSError) else 1, _reason(error))


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
    """Steps since the last row of metrics, or since the resume, and what became of the time."""

    steps: int = 0
    waited: float = 0.0
    """seconds for data"""
    evaluated: float = 0.0
    """seconds for scores, samples and pictures"""
    paused: float = 0.0
    """seconds for checkpoints"""
    started: float = field(default_factory=time.perf_counter)


def run_steps(training: Training, tracker: Tracker, run: RunDirectory, bar: Progress) -> None:
    """Take all remaining steps: log, evaluate, sample and save by the way. Collective.

    Raises:
        Interrupted: a signal asked some process to stop; all of them stand at the same step.
        TrainingError: a loss or gradient was not finite.
    """
    config, accelerator, now = training.config, training.accelerator, training.progression
    per_epoch = steps_per_epoch(config, training.store)
    agreement, meter = launch.Agreement(accelerator), Meter()

    def evaluation_is_due() -> bool:
        return now.step == now.total_steps or now.step % (config.evaluate_every or per_epoch) == 0

    if evaluation_is_due() and now.evaluated_step < now.step:  # a signal came before it was done
        evaluate_and_save(training, tracker, run, bar, meter)
    for micro_batches, waiting in step_batches(training, now.total_steps) if not now.finished else ():
        training.nats += train_step(training, micro_batches)
        now.step, now.unlogged_steps = now.step + 1, now.unlogged_steps + 1
        meter.steps, meter.waited = meter.steps + 1, meter.waited + waiting
        epoch_end, evaluating = now.step % per_epoch == 0, evaluation_is_due()
        saving = evaluating or (config.save_every is not None and now.step % config.save_every == 0)
        stopped = agree(training, agreement, now=saving)
        if now.step % config.log_every == 0 or evaluating or epoch_end:
            bar.show(log_metrics(training, tracker, meter))
            meter = Meter()
        bar.update(now.step)
        if epoch_end or now.step == now.total_steps:
            say_epoch(training, per_epoch)
        if epoch_end:
            now.epoch_nats, now.epoch_tokens = 0.0, 0
        if stopped:
            launch.raise_if_stopped(accelerator, training.stop)
        if evaluating:
            evaluate_and_save(training, tracker, run, bar, meter)
        elif saving:
            meter.paused += save(training)
        if now.finished:
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
    tokens, norm = now.unlogged_steps * step_tokens, training.recent[-1].norm
    now.epoch_nats, now.epoch_tokens = now.epoch_nats + total, now.epoch_tokens + tokens
    training.nats.zero_()
    now.unlogged_steps = 0
    loss, bits = total / tokens, bits_per_nat(training)
    values: dict[str, float] = {
        "tokens": now.step * step_tokens,
        "epoch": now.step / steps_per_epoch(config, training.store),
        "train/loss": loss,
        "train/perplexity": perplexity(loss),
        **({"train/bits_per_byte": loss * bits} if bits else {}),
        "train/learning_rate": learning_rate(now.step - 1, now.total_steps, config),
        "train/gradient_norm": float(norm) if norm is not None else math.nan,
        **({"train/skipped_steps": now.skipped_steps} if now.skipped_steps else {}),
        **measure_speed(training, meter),
        **measure_machines(training.accelerator),
    }
    values = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON knows no others
    tracker.log(now.step, values)
    return values


def measure_speed(training: Training, meter: Meter) -> dict[str, float]:
    """Return tokens and operations per second of the steps, and the shares of all time that went elsewhere."""
    config, accelerator = training.config, training.accelerator
    everything = time.perf_counter() - meter.started
    tokens = meter.steps * config.batch_size * config.seq_len
    rate = tokens / (everything - meter.evaluated - meter.paused)
    flops, peak = rate * flops_per_token(training.bare), peak_flops(accelerator)
    return {
        "train/tokens_per_second": rate,
        "train/tokens_per_second_per_process": rate / accelerator.num_processes,
        "train/flops_per_second": flops,
        **({"train/flops_share": flops / peak / accelerator.num_processes} if peak else {}),
        "train/data_share": meter.waited / everything,
        "train/evaluate_share": meter.evaluated / everything,
        "train/save_share": meter.paused / everything,
        **({"checkpoint/pause_seconds": meter.paused} if meter.paused else {}),
    }


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


def evaluate_and_save(training: Training, tracker: Tracker, run: RunDirectory, bar: Progress, meter: Meter) -> None:
    """Score the validation split, sample, write a checkpoint; mark the training finished where it is. Collective.

    Raises:
        Interrupted: a signal came before score and samples were done; the evaluation will be made anew.
    """
    config, accelerator, now = training.config, training.accelerator, training.progression
    best_loss, best_step, without_better = now.best_loss, now.best_step, now.evaluations_without_better + 1
    patience, last = config.early_stopping_patience, now.step == now.total_steps
    stop_early, started = False, time.perf_counter()
    score = evaluate(training, config.evaluate_documents)
    if score is not None:
        if best_loss is None or score.nats_per_token < best_loss:
            best_loss, best_step, without_better = score.nats_per_token, now.step, 0
        stop_early = patience is not None and without_better >= patience
        if (stop_early or last) and config.evaluate_documents is not None:
            score = evaluate(training, None) or score  # the figure to report; the best one is chosen by like measures
    if score is not None and not math.isfinite(score.nats):
        raise TrainingError(f"the validation loss turned to {score.nats_per_token} by step {now.step}; it is not saved")
    samples = write_samples(training) if accelerator.is_main_process else []
    bar.sample("".join(samples[0][1:]) if samples else "")
    launch.raise_if_stopped(accelerator, training.stop)
    now.best_loss, now.best_step, now.evaluations_without_better = best_loss, best_step, without_better
    now.evaluated_step, now.finished = now.step, stop_early or last
    values: dict[str, float] = {"tokens": now.step * config.batch_size * config.seq_len}
    if score is not None:
        lossless = training.store.tokenizer.is_lossless
        values |= {"valid/loss": score.nats_per_token}
        values |= {"valid/perplexity": score.perplexity} if math.isfinite(score.perplexity) else {}
        values |= {"valid/bits_per_byte": score.bits_per_byte} if lossless else {}
        bar.show(values)
        say(
            accelerator,
            f"step {now.step}: valid loss {score.nats_per_token:.4f}"
            + (f", {score.bits_per_byte:.4f} bits per byte" if lossless else "")
            + f" ({score.documents} documents, {score.seconds:.0f} s)",
        )
    if values.keys() - {"tokens"} or samples:
        tracker.log(now.step, values, samples)
    if stop_early:
        say(accelerator, f"stopping early: no better validation loss in {patience} evaluations")
    pause = save(training)
    meter.paused += pause
    if accelerator.is_main_process:
        try:
            draw_loss_curve({"": run.path}, run.path / "loss.png")
        except Exception as error:  # a picture is no reason to end a training
            log.warning("no loss.png: %s", error)
    meter.evaluated += time.perf_counter() - started - pause


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


def write_samples(training: Training) -> list[SampledText]:
    """Write samples at every temperature into samples.md, in place of those of this step and later ones.

    Leaves the file as it is where a signal comes in between.

    Returns:
        Temperature, prompt and text of each.
    """
    config, model, step = training.config, training.best_weights, training.progression.step
    if not config.sample_prompts:
        return []
    model.eval()
    prompts = [normalize(prompt, model.text["normalization"]) for prompt in config.sample_prompts]
    written: list[SampledText] = []
    for temperature in config.sample_temperatures:
        sampling = SamplingConfig(temperature=temperature, max_new_tokens=config.sample_tokens, seed=config.seed)
        samples: dict[int, Sample] = {}
        for row, event in generate(model, training.store.tokenizer, prompts, sampling):
            if training.stop.number is not None:
                model.train()
                return []
            if isinstance(event, Sample):
                samples[row] = event
        written += [(temperature, samples[i].prompt, samples[i].text) for i in sorted(samples)]
    model.train()
    path = Path(config.run_dir) / SAMPLES_NAME
    earlier = re.split(r"(?m)^(?=## step \d+$)", path.read_text(encoding="utf-8")) if path.exists() else []
    kept = [part for part in earlier if (found := re.match(r"## step (\d+)\n", part)) and int(found[1]) < step]
    lines = [f"## step {step}\n", *(f"- temperature {t}: **{prompt}**{text}" for t, prompt, text in written)]
    write_whole(path, "".join(kept) + "\n".join(lines) + "\n\n")  # samples of earlier steps are made only once
    return written


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
    """Write what the run is made of, before its first step."""
    run_dir = Path(training.config.run_dir)
    settings = json.loads(json.dumps(asdict(training.config)))  # tuples become lists, as the parser wants them
    write_whole(run_dir / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    write_whole(run_dir / "data.json", json.dumps(training.store.record, indent=2) + "\n")
    write_whole(run_dir / ENVIRONMENT_NAME, json.dumps(describe_environment(), indent=2) + "\n")
