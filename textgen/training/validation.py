"""Validation: score the validation split, sample texts, keep the best checkpoint."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

from textgen.config import SamplingConfig
from textgen.console import Progress, say
from textgen.data.corpus import normalize
from textgen.decoding.generation import Sample, generate
from textgen.distributed import launch
from textgen.errors import TextgenError
from textgen.evaluation import Score, score, split_documents
from textgen.reporting.report import draw_loss_curve
from textgen.runs.directory import RunDirectory
from textgen.runs.samples import SampledText, save_samples
from textgen.tracking.tracker import Tracker
from textgen.training.metrics import Meter
from textgen.training.resume import save
from textgen.training.step import Training

log = logging.getLogger("textgen")


def evaluate_and_save(training: Training, tracker: Tracker, run: RunDirectory, bar: Progress, meter: Meter) -> None:
    """Score the validation split, sample, write a checkpoint; mark the training finished where it is. Collective.

    Raises:
        Interrupted: a signal came before score and samples were done; the evaluation will be made anew.
    """
    config, accelerator, progress = training.config, training.accelerator, training.progression
    best_loss, best_step, without_better = (
        progress.best_loss,
        progress.best_step,
        progress.evaluations_without_better + 1,
    )
    patience, last = config.early_stopping_patience, progress.step == progress.total_steps
    stop_early, started = False, time.perf_counter()
    score = evaluate(training, config.evaluate_documents)
    if score is not None:
        if best_loss is None or score.nats_per_token < best_loss:
            best_loss, best_step, without_better = score.nats_per_token, progress.step, 0
        stop_early = patience is not None and without_better >= patience
        if (stop_early or last) and config.evaluate_documents is not None:
            score = evaluate(training, None) or score  # the figure to report; the best one is chosen by like measures
    if score is not None and not math.isfinite(score.nats):
        raise TextgenError(
            f"the validation loss turned to {score.nats_per_token} by step {progress.step}; it is not saved"
        )
    samples = write_samples(training) if accelerator.is_main_process else []
    bar.sample("".join(samples[0][1:]) if samples else "")
    launch.raise_if_stopped(accelerator, training.stop)
    progress.best_loss, progress.best_step, progress.evaluations_without_better = best_loss, best_step, without_better
    progress.evaluated_step, progress.finished = progress.step, stop_early or last
    values: dict[str, float] = {"tokens": progress.step * config.batch_size * config.seq_len}
    if score is not None:
        lossless = training.store.tokenizer.is_lossless
        values |= {"valid/loss": score.nats_per_token}
        values |= {"valid/perplexity": score.perplexity} if math.isfinite(score.perplexity) else {}
        values |= {"valid/bits_per_byte": score.bits_per_byte} if lossless else {}
        bar.show(values)
        say(
            accelerator,
            f"step {progress.step}: valid loss {score.nats_per_token:.4f}"
            + (f", {score.bits_per_byte:.4f} bits per byte" if lossless else "")
            + f" ({score.documents} documents, {score.seconds:.0f} s)",
        )
    if values.keys() - {"tokens"} or samples:
        tracker.log(progress.step, values, samples)
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
        training.accelerator, training.eval_model, documents, num_bytes,
        bos_id=training.store.tokenizer.bos_id, progress=True, poll=poll,
    )  # fmt: skip


def write_samples(training: Training) -> list[SampledText]:
    """Write samples at every temperature into samples.md, in place of those of this step and later ones.

    Leaves the file as it is where a signal comes in between.

    Returns:
        Temperature, prompt and text of each.
    """
    config, model = training.config, training.eval_model
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
        written += [SampledText(temperature, samples[i].prompt, samples[i].text) for i in sorted(samples)]
    model.train()
    save_samples(Path(config.run_dir), training.progression.step, written)
    return written
