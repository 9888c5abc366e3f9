"""Validation: score the validation split, write samples, choose the best checkpoint."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from textgen.config import SamplingConfig
from textgen.console import Progress, say
from textgen.data.corpus import normalize
from textgen.data.split import Split
from textgen.decoding.export import measure_int8
from textgen.decoding.generation import generate
from textgen.decoding.samples import Sample
from textgen.distributed import launch
from textgen.errors import DivergedError
from textgen.evaluation import Score, mix_scores, score, split_documents
from textgen.reporting.report import CURVE_NAME, draw_loss_curve
from textgen.runs.checkpoint import checkpoint_path
from textgen.runs.directory import RunDirectory
from textgen.runs.samples import SampledText, save_samples
from textgen.tracking.tracker import Tracker
from textgen.training.setup import Training
from textgen.training.step import Progression

log = logging.getLogger("textgen")


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The result of an evaluation, before it changes anything of the training."""

    score: Score | None
    """to report; None without a validation split. Of several sources: with tokens in the shares of the weights"""
    by_source: dict[str, Score]
    """of each of several sources that has a validation split"""
    is_better: bool
    compared_loss: float | None
    """nats per token of `evaluate_documents` documents, which the best checkpoint is chosen by"""
    evaluations_without_better: int
    stop_early: bool
    samples: list[SampledText]
    """on the main process"""


def validate(training: Training, run: RunDirectory) -> Validation:
    """Score the validation split and write samples. Collective.

    Raises:
        Interrupted: a signal came before score and samples were done. A resumed run repeats the evaluation.
        DivergedError: the score is nan or infinite.
        TextgenError: another training has taken the run over.
    """
    learner = training.learner
    config, progress = learner.config, learner.progression
    reported, by_source = evaluate(training, config.evaluate_documents)
    compared = reported
    best = progress.best_loss
    is_better = compared is not None and (best is None or compared.nats_per_token < best)
    without_better = 0 if is_better else progress.evaluations_without_better + 1
    patience = config.early_stopping_patience
    stop_early = compared is not None and patience is not None and without_better >= patience
    ends = stop_early or progress.step == progress.total_steps
    if ends and not training.is_trial and config.evaluate_documents is not None:
        # The last score is the figure to report, so it is of all documents. The best checkpoint is still chosen by
        # scores of the same documents.
        reported, by_source = evaluate(training, None)
    if reported is not None and not math.isfinite(reported.nats):
        raise DivergedError(
            f"the validation loss turned to {reported.nats_per_token} by step {progress.step}; it is not saved"
        )
    samples = write_samples(training, run) if learner.accelerator.is_main_process else []
    launch.raise_if_stopped(learner.accelerator, training.stop)
    return Validation(
        score=reported,
        by_source=by_source,
        is_better=is_better,
        compared_loss=None if compared is None else compared.nats_per_token,
        evaluations_without_better=without_better,
        stop_early=stop_early,
        samples=samples,
    )


def update_best(progress: Progression, validation: Validation) -> None:
    """Note the evaluation in the progression: the best loss so far, and whether the training is finished."""
    if validation.is_better:
        progress.best_loss, progress.best_step = validation.compared_loss, progress.step
    progress.evaluations_without_better = validation.evaluations_without_better
    progress.evaluated_step = progress.step
    progress.finished = validation.stop_early or progress.step == progress.total_steps


def log_validation(
    training: Training, validation: Validation, tracker: Tracker, bar: Progress, *, seconds: float
) -> None:
    """Print the score, and write a row of metrics with the samples and the seconds that both took."""
    learner, score, samples = training.learner, validation.score, validation.samples
    config, step = learner.config, learner.progression.step
    bar.sample(samples[0].prompt + samples[0].text if samples else "")
    values: dict[str, float] = {
        "tokens": step * config.batch_size * config.seq_len,
        "evaluate/pause_seconds": seconds,
    }
    if score is not None:
        lossless = training.store.tokenizer.is_lossless
        values |= {"valid/loss": score.nats_per_token}
        values |= {"valid/perplexity": score.perplexity} if math.isfinite(score.perplexity) else {}
        values |= {"valid/bits_per_byte": score.bits_per_byte} if lossless else {}
        for name, of_source in validation.by_source.items():
            values |= {f"valid/loss/{name}": of_source.nats_per_token}
            values |= {f"valid/bits_per_byte/{name}": of_source.bits_per_byte} if lossless else {}
        bar.show(values)
        say(
            learner.accelerator,
            f"step {step}: valid loss {score.nats_per_token:.4f}"
            + (f", {score.bits_per_byte:.4f} bits per byte" if lossless else "")
            + f" ({score.documents} documents, {score.seconds:.0f} s)"
            + _describe_sources(validation.by_source, lossless=lossless),
        )
    if score is not None or samples:
        tracker.log(step, values, samples)
    if validation.stop_early:
        say(
            learner.accelerator,
            f"stopping early: no better validation loss in {config.early_stopping_patience} evaluations",
        )


def draw_curve(run: RunDirectory) -> None:
    """Draw loss.png; log an error and continue, since a picture must not end a training."""
    try:
        draw_loss_curve({"": run.path}, run.path / CURVE_NAME)
    except Exception as error:
        log.warning("no loss.png: %s", error)


def measure_decoder(training: Training, run: RunDirectory) -> None:
    """Measure what int8 costs the newest and the best checkpoint, for `--decoder auto`; an error ends no training."""
    last, best = training.learner.progression.step, training.learner.progression.best_step
    for step in {last, last if best is None else best}:
        started = time.perf_counter()
        try:
            cost = measure_int8(checkpoint_path(run.path, step), training.store)
        except Exception as error:
            log.warning("what int8 costs step %d is not measured: %s", step, error)
            continue
        if cost is not None:
            seconds = time.perf_counter() - started
            log.info("step %d: int8 costs %+.5f bits per byte, measured in %.1f s", step, cost, seconds)


def _describe_sources(scores: Mapping[str, Score], *, lossless: bool) -> str:
    figures = (f"{name} {its.bits_per_byte if lossless else its.nats_per_token:.4f}" for name, its in scores.items())
    return f": {', '.join(figures)}" if scores else ""


def evaluate(training: Training, limit: int | None) -> tuple[Score | None, dict[str, Score]]:
    """Score the validation split; None if there is none. Collective.

    Args:
        training: its averaged weights are scored, if there are any.
        limit: documents to score, of each source, evenly spaced; None for all.

    Returns:
        The score, and that of each of several sources.

    Raises:
        Interrupted: a signal came; there is no score.
    """
    store, data = training.store, training.learner.config.data
    if "validation" not in store.record["splits"]:
        return None, {}
    if not data.sources:
        return _score(training, store.split("validation"), limit), {}
    scores = {name: _score(training, split, limit) for name, split in store.split_by_source("validation").items()}
    return mix_scores(scores, {source.name: source.weight for source in data.sources}), scores


def _score(training: Training, split: Split, limit: int | None) -> Score:
    learner = training.learner
    documents, num_bytes = split_documents(split, limit)

    def poll() -> None:
        launch.raise_if_stopped(learner.accelerator, training.stop)

    return score(
        learner.accelerator,
        learner.eval_model,
        documents,
        num_bytes,
        bos_id=training.store.tokenizer.bos_id,
        progress=True,
        poll=poll,
    )


def write_samples(training: Training, run: RunDirectory) -> list[SampledText]:
    """Sample at every temperature, and write the texts into samples.md.

    Sections of earlier steps are kept; those of this step and later ones, from before a resume, are replaced. If a
    signal comes, the file stays as it is.

    Returns:
        Temperature, prompt and text of each sample.
    """
    config, model = training.learner.config, training.learner.eval_model
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
    run.require_lock()
    save_samples(run.path, training.learner.progression.step, written)
    return written
