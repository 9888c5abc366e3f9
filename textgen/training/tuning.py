"""A search of the learning rate and the batch size by short trainings: what `textgen tune` computes.

Optuna proposes the rates. Successive halving decides which trial goes on: those in the best half of all that were tried
at a length (Li et al. 2020, "A system for massively parallel hyperparameter tuning", section 3.2). A trial goes on as a
new, longer training: its schedule ends with its last step, so rates are judged by whole schedules.

Every training leaves a run folder with a record, `trial.json`. The study is made of these records at each start, and a
proposal depends on the records and the seed alone. So a search of `--steps` that was killed goes on as if it had not
been. One of `--minutes` goes on too, and the seconds of its trainings decide how many there are.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textgen.config import TrackingConfig, TrainConfig
from textgen.console import as_library
from textgen.data.store import TokenStore, prepare_store
from textgen.distributed.process import process_as_before
from textgen.distributed.signals import StopSignals
from textgen.errors import DivergedError, TextgenError
from textgen.files import make_directory, write_atomic
from textgen.runs.lock import FileLock
from textgen.runs.metrics_file import read_metrics
from textgen.settings import COMMAND_SETTINGS, flatten
from textgen.training.budget import time_steps
from textgen.training.loop import start_processes, train
from textgen.training.setup import build
from textgen.training.step import steps_per_epoch

if TYPE_CHECKING:
    import optuna

log = logging.getLogger("textgen")

TUNE_NAME, TRIAL_NAME = "tune.json", "trial.json"

RUNGS = 3
"""lengths of trainings"""
GROWTH = 3
"""of a length over the one before"""
KEPT = 2
"""one in so many trials goes on. Short trainings favour high rates, so this is less strict than `GROWTH`: of the first
six rates of a search, the best one was second at a ninth of the steps (docs/evidence/experiments.md, 2026-11-29)"""
LONGEST_SHARE = 0.15
"""of the budget for a longest training: room for about 12 trials"""
FIRST_RATES = 5
"""evenly spaced on a log scale, that are tried before Optuna proposes others"""
LEAST_STEPS = 10
"""of the shortest training"""
DOCUMENTS = 100
"""of validation that score a training if `evaluate_documents` is not given"""
TIMING_SECONDS = 5.0
REPLACED = {
    "tracking", "evaluate_every", "early_stopping_patience", "save_every", "keep_last", "sample_prompts",
    "sample_temperatures", "sample_tokens",
}  # fmt: skip
"""settings of the config that no trial has, see `_settings`"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is searched, and how much work it may take."""

    config: TrainConfig
    """of the training that the rate is for; its own rate and batch size are the first trial"""
    directory: Path
    minutes: float | None
    """of all trainings; None if `steps` is given"""
    steps: int | None
    """of all trainings, in steps of the config's batch size"""
    learning_rates: tuple[float, float]
    """lowest and highest rate"""
    batch_sizes: tuple[int, ...]
    """with that of the config"""

    @property
    def budget(self) -> float:
        """Seconds, or steps of the config's batch size."""
        return float(self.steps or 0) if self.minutes is None else self.minutes * 60

    def record(self, store: TokenStore) -> dict[str, Any]:
        """Return what a search that goes on must have in common with its first start, by name."""
        settings = flatten(json.loads(json.dumps(asdict(self.config))))
        searched: dict[str, Any] = {"minutes": self.minutes, "steps": self.steps}
        searched |= {"learning_rates": list(self.learning_rates), "batch_sizes": list(self.batch_sizes)}
        without = COMMAND_SETTINGS | REPLACED
        kept = {name: value for name, value in settings.items() if not {name, name.partition(".")[0]} & without}
        return searched | kept | {"the training text": store.training_key}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The lengths of the trainings."""

    rungs: dict[str, list[int]]
    """steps of each rung, by batch size"""
    costs: list[float]
    """seconds of each rung, or steps of the config's batch size"""
    total_steps: int
    """of the training that the rate is for"""
    documents: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished training of a trial: its record."""

    trial: int
    rung: int
    steps: int
    learning_rate: float
    batch_size: int
    valid_loss: float | None
    """nats per token; None if the training diverged"""
    bits_per_byte: float | None
    """None also if the tokenizer is not lossless"""
    diverged: str | None
    seconds: float
    suggested: dict[str, float]
    """learning rate and batch size as Optuna proposed them: the rate is not rounded"""

    @property
    def loss(self) -> float:
        """Nats per token; infinite if the training diverged."""
        return math.inf if self.valid_loss is None else self.valid_loss


@dataclass(frozen=True)
class Outcome:
    """A finished search."""

    plan: Plan
    results: list[Result]

    def best(self, rung: int) -> Result | None:
        """Return the training of a rung with the lowest loss; None if there is none that did not diverge."""
        finished = [result for result in self.results if result.valid_loss is not None and result.rung == rung]
        return min(finished, key=lambda result: result.loss, default=None)

    @property
    def found(self) -> Result | None:
        """The best of the longest trainings; None if all trainings diverged."""
        bests = [self.best(rung) for rung in reversed(range(RUNGS))]
        return next((best for best in bests if best is not None), None)


def tune(request: Request) -> Outcome:
    """Search, or go on with a search that was stopped; write `tune.json` into its folder.

    Raises:
        TextgenError: the folder holds another search or is in use, the budget is too small, or a training cannot run.
        Interrupted: a signal asked a training to stop; it is saved.
    """
    store = prepare_store(request.config.data, request.config.tokenizer)
    if "validation" not in store.record["splits"]:
        raise TextgenError("a trial is scored on the validation split, and the data has none")
    path, record = request.directory / TUNE_NAME, request.record(store)
    plan = _read_plan(path, record) or _plan(request, store)
    make_directory(request.directory)
    lock = FileLock(request.directory / ".lock")
    if not lock.acquire(seconds=2.0):
        raise TextgenError(f"`{request.directory}` is in use by {lock.describe_holder() or 'another process'}")
    with lock.hold():
        _write(path, {"request": record, "plan": asdict(plan)})
        log.info("%s", _describe(request, plan))
        outcome = Outcome(plan, list(_search(request, plan, store)))
        results = {
            "best": outcome.found and asdict(outcome.found),
            "trainings": [asdict(result) for result in outcome.results],
        }
        _write(path, {"request": record, "plan": asdict(plan)} | results)
    return outcome


# --- the plan --------------------------------------------------------------------------------------------------------


def _plan(request: Request, store: TokenStore) -> Plan:
    """Return the lengths of the trainings: equal tokens for all batch sizes, or equal seconds if the budget is a time.

    Raises:
        TextgenError: the shortest training would have fewer than `LEAST_STEPS` steps.
    """
    config, own = request.config, str(request.config.batch_size)
    costs = {str(size): float(size) / config.batch_size for size in request.batch_sizes}  # of a step
    if request.minutes is not None:
        costs = {str(size): _time(replace(config, batch_size=size), store) for size in request.batch_sizes}
    total = config.max_epochs * steps_per_epoch(config, store)
    total = min(total, config.max_steps or total)
    if config.max_minutes is not None:
        seconds = costs[own] if request.minutes is not None else _time(config, store)
        total = min(total, max(int(config.max_minutes * 60 / seconds), 1))
    longest = min(request.budget / costs[own] * LONGEST_SHARE, total)
    rungs = {
        size: [round(longest * costs[own] / cost / GROWTH**shorter) for shorter in reversed(range(RUNGS))]
        for size, cost in costs.items()
    }
    shortest, size = min((steps[0], size) for size, steps in rungs.items())
    if shortest < LEAST_STEPS:
        name = "steps" if request.minutes is None else "minutes"
        raise TextgenError(
            f"`{name}` {getattr(request, name):g} and a training of {total} steps leave {shortest} steps of "
            f"batch_size {size} for the shortest trial, which needs {LEAST_STEPS}"
        )
    return Plan(
        rungs=rungs,
        costs=[steps * costs[own] for steps in rungs[own]],
        total_steps=total,
        documents=config.evaluate_documents or DOCUMENTS,
    )


def _time(config: TrainConfig, store: TokenStore) -> float:
    """Return the seconds of a step."""
    with _in_silence(), StopSignals() as stop:
        training = build(config, start_processes(config), store, stop)
        return time_steps(training.learner, training.loader, budget_seconds=TIMING_SECONDS)


def _read_plan(path: Path, record: Mapping[str, Any]) -> Plan | None:
    """Return the plan of a search that was stopped; None if there is none.

    Raises:
        TextgenError: the file is damaged, or the search is another one.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before, plan = dict(found["request"]), Plan(**found["plan"])
    except (ValueError, KeyError, TypeError) as error:
        raise TextgenError(f"`{path}` is damaged: delete `{path.parent}` to search again") from error
    for name in [*record, *before]:
        if before.get(name) != record.get(name):
            values = "" if name not in record or " " in name else f": {before.get(name)}, now {record.get(name)}"
            raise TextgenError(f"`{path.parent}` holds a search with another {name}{values}; give another `--tune_dir`")
    return plan


def _describe(request: Request, plan: Plan) -> str:
    """Return one line about a search."""
    low, high = request.learning_rates
    lengths = "; ".join(
        f"batch_size {size}: {', '.join(f'{steps:,}' for steps in rungs[:-1])} or {rungs[-1]:,} steps"
        for size, rungs in plan.rungs.items()
    )
    return (
        f"searching learning_rate from {low:g} to {high:g} in `{request.directory}`; trainings of {lengths}, each "
        f"scored on {plan.documents} validation documents"
    )


# --- the search ------------------------------------------------------------------------------------------------------


def _search(request: Request, plan: Plan, store: TokenStore) -> Iterator[Result]:
    """Yield the result of every training, in order, until the budget is spent."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would log every trial in its own words
    study = optuna.create_study()
    first = _first_values(request)
    # The first trials are judged together; else one would go on if it is better than those before it, also if all of
    # them are bad. Optuna proposes each later trial by the results of all before it.
    rounds = chain([range(len(first))], ([number] for number in count(len(first))))
    losses: list[list[float]] = [[] for _ in range(RUNGS)]
    spent = 0.0
    for numbers in rounds:
        if spent + sum(plan.costs) > request.budget:  # a good trial could not go on
            return
        trials: list[optuna.Trial] = []
        for number in numbers:
            study.sampler = optuna.samplers.TPESampler(seed=request.config.seed + number, n_startup_trials=len(first))
            trials.append(_ask(study, request, first, number))
        for rung, cost in enumerate(plan.costs):
            results = [_result(request, plan, store, trial, rung=rung) for trial in trials]
            yield from results
            spent += sum(cost if request.minutes is None else result.seconds for result in results)
            losses[rung] += [result.loss for result in results]
            worst = sorted(losses[rung])[max(len(losses[rung]) // KEPT, 1) - 1]
            going_on = []
            for trial, result in zip(trials, results, strict=True):
                trial.report(math.nan if result.valid_loss is None else result.valid_loss, GROWTH**rung)
                if rung < RUNGS - 1 and result.valid_loss is not None and result.loss <= worst:
                    going_on.append(trial)
                elif rung < RUNGS - 1 or result.valid_loss is None:
                    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                else:
                    study.tell(trial, result.loss)
            trials = going_on


def _first_values(request: Request) -> list[dict[str, float]]:
    """Return the values that are tried first: those of the config, then rates over the whole range."""
    low, high = request.learning_rates
    spread = [low * (high / low) ** ((place + 0.5) / FIRST_RATES) for place in range(FIRST_RATES)]
    size = request.config.batch_size
    return [{"learning_rate": rate, "batch_size": size} for rate in [request.config.learning_rate, *spread]]


def _ask(study: optuna.Study, request: Request, first: Sequence[dict[str, float]], number: int) -> optuna.Trial:
    """Return the trial of a number: with the values of its record, with first values, or as Optuna proposes."""
    if (recorded := _recorded_values(request.directory, number)) is not None or number < len(first):
        study.enqueue_trial(recorded or first[number])
    trial = study.ask()
    low, high = request.learning_rates
    trial.suggest_float("learning_rate", low, high, log=True)
    trial.suggest_categorical("batch_size", request.batch_sizes)
    return trial


def _recorded_values(directory: Path, number: int) -> dict[str, float] | None:
    """Return the values of a trial from the record of its first training; None if it has none."""
    for path in directory.glob(f"trial-{number:02d}-steps-*/{TRIAL_NAME}"):
        return _read_result(path).suggested
    return None


# --- one training ----------------------------------------------------------------------------------------------------


def _result(request: Request, plan: Plan, store: TokenStore, trial: optuna.Trial, *, rung: int) -> Result:
    """Return the result of a trial's training, which is taken if it has no record yet."""
    rate, batch_size = float(f"{trial.params['learning_rate']:.3g}"), int(trial.params["batch_size"])
    steps = plan.rungs[str(batch_size)][rung]
    directory = request.directory / f"trial-{trial.number:02d}-steps-{steps}"
    path = directory / TRIAL_NAME
    if path.exists():
        result = _read_result(path)
    else:
        config = _settings(request.config, store, directory, steps, plan.documents)
        diverged, started = None, time.monotonic()
        try:
            with _in_silence():
                train(replace(config, learning_rate=rate, batch_size=batch_size), is_trial=True)
        except DivergedError as error:
            diverged = str(error)
        scored = [row for row in read_metrics(directory) if "valid/loss" in row and diverged is None]
        result = Result(
            trial=trial.number, rung=rung, steps=steps, learning_rate=rate, batch_size=batch_size, diverged=diverged,
            valid_loss=scored[-1]["valid/loss"] if scored else None,
            bits_per_byte=scored[-1].get("valid/bits_per_byte") if scored else None,
            seconds=round(time.monotonic() - started, 3), suggested=trial.params,
        )  # fmt: skip
        _write(path, asdict(result))
        log.info("%s", _describe_result(result))
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)  # of many trainings, and no one asked for a model
    return result


def _settings(config: TrainConfig, store: TokenStore, directory: Path, steps: int, documents: int) -> TrainConfig:
    """Return the settings of a training: those of the config over other steps, scored once, without samples."""
    return replace(
        config,
        run_dir=str(directory),
        data=replace(config.data, store=store.location),
        tracking=TrackingConfig(mode="disabled"),
        max_steps=steps,
        max_epochs=steps,  # an epoch has one step or more
        max_minutes=None,
        # A warm-up for thousands of steps would be all that a short training sees.
        warmup_steps=min(config.warmup_steps, steps // 10),
        evaluate_every=steps,
        evaluate_documents=documents,
        early_stopping_patience=None,
        save_every=max(steps // 4, 1),
        keep_last=1,
        checkpoint_copy=None,
        sample_prompts=(),
    )


def _describe_result(result: Result) -> str:
    """Return one line about a training."""
    figure = result.diverged
    if result.valid_loss is not None:
        bits = result.bits_per_byte
        figure = f"loss {result.valid_loss:.4f}" if bits is None else f"{bits:.4f} bits per byte"
    return (
        f"trial {result.trial}: learning_rate {result.learning_rate:g}, batch_size {result.batch_size}, "
        f"{result.steps:,} steps: {figure} ({result.seconds:.0f} s)"
    )


def _read_result(path: Path) -> Result:
    try:
        return Result(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise TextgenError(f"`{path}` is damaged: delete `{path.parent}` to train it again") from error


def _write(path: Path, values: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(values, indent=2) + "\n")


@contextmanager
def _in_silence() -> Iterator[None]:
    """Run a training as one of many: nothing is printed, and the process is as before."""
    level = log.level
    with process_as_before(), as_library(progress=False):
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)
