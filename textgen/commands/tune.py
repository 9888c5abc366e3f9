"""The command `tune`: find a learning rate, and a batch size, by short trainings on this machine."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textgen.commands.parsing import Parser, parse_train_config, take_base
from textgen.config import TrainConfig
from textgen.console import start_log
from textgen.errors import TextgenError
from textgen.packages import require_packages
from textgen.reporting.compare import align

if TYPE_CHECKING:
    from textgen.training.tuning import Outcome, Result

DESCRIPTION = """Find a learning rate, and a batch size, by short trainings on this machine. The other flags are those
of `textgen train`, for the training that you plan. Run the same command again to go on after an interruption."""

LEARNING_RATES = (1e-4, 0.1)

log = logging.getLogger("textgen")


def tune_command(argv: Sequence[str]) -> None:
    """Search, and print a table of the trials and the flags to type."""
    parser = build_tune_parser()
    own, flags = split_flags(argv, parser)
    args = parser.parse_args(own)
    config = parse_train_config(flags, prog="textgen tune")
    _check(args, config)
    require_packages("`textgen tune`", "optuna", extra="tune")
    start_log()
    from textgen.distributed.signals import Interrupted
    from textgen.training.tuning import Request, tune

    request = Request(
        config=take_base(replace(config, run_dir=os.devnull), flags),  # each trial has its own
        directory=Path(args.tune_dir),
        minutes=args.minutes,
        steps=args.steps,
        learning_rates=tuple(args.learning_rates),
        batch_sizes=tuple(sorted({config.batch_size, *args.batch_sizes})),
    )
    try:
        outcome = tune(request)
    except (Interrupted, KeyboardInterrupt):
        log.info("run the same command again to go on")
        raise
    command = shlex.join(["textgen", "train", *found_flags(outcome, flags)])
    print(as_json(outcome, command) if args.json else "\n".join(describe(outcome, command)))


def build_tune_parser() -> Parser:
    """Return the parser of the flags that `train` does not have."""
    parser = Parser(prog="textgen tune", usage="%(prog)s --minutes X [FLAG OF train ...]", description=DESCRIPTION)
    parser.add_argument("--minutes", type=float | None, default=None, help="minutes of all trainings together")
    parser.add_argument(
        "--steps", type=int | None, default=None, help="steps of all trainings together, in place of `--minutes`"
    )
    parser.add_argument(
        "--learning_rates",
        type=float,
        nargs=2,
        default=list(LEARNING_RATES),
        metavar=("LOW", "HIGH"),
        help="range of the rates",
    )
    parser.add_argument(
        "--batch_sizes",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="batch sizes to try beside that of the training",
    )
    parser.add_argument("--tune_dir", type=str, default="runs/tune", help="folder of the trials, for this search alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def split_flags(argv: Sequence[str], parser: Parser) -> tuple[list[str], list[str]]:
    """Return the flags of the parser, and the others; each with its values."""
    own: list[str] = []
    others: list[str] = []
    taking = others
    for word in argv:
        if word.startswith("-"):
            taking = own if word.partition("=")[0] in parser._option_string_actions else others
        taking.append(word)
    return own, others


def _check(args: Any, config: TrainConfig) -> None:
    """Raise TextgenError if a flag is wrong, or a setting of the training has no meaning for a search."""
    if (args.minutes is None) == (args.steps is None):
        raise TextgenError("`textgen tune` wants a budget: either `--minutes` or `--steps`")
    for name in ("minutes", "steps"):
        if (value := getattr(args, name)) is not None and not (math.isfinite(value) and value > 0):
            raise TextgenError(f"`{name}` must be a finite number above 0: {value}")
    low, high = args.learning_rates
    if not 0 < low < high < math.inf:
        raise TextgenError(f"`learning_rates` must be a lower and a higher rate, both above 0: {low:g} {high:g}")
    if not low <= config.learning_rate <= high:
        raise TextgenError(
            f"`learning_rate` {config.learning_rate:g} is outside of `--learning_rates {low:g} {high:g}`: it is the "
            "first that is tried"
        )
    for size in args.batch_sizes:
        if size < 1 or size % config.gradient_accumulation_steps:
            raise TextgenError(
                f"`batch_sizes` must be above 0 and divisible by {config.gradient_accumulation_steps} "
                f"gradient_accumulation_steps: {size}"
            )
    for name in ("dry_run", "resume_override"):
        if getattr(config, name):
            raise TextgenError(f"`{name}` is for a training; `textgen tune` takes many")
    if config.resume != "auto":
        raise TextgenError(f"`resume` is for a training; `textgen tune` starts each at step 0: {config.resume}")
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise TextgenError(
            f"`textgen tune` runs in one process, and a launcher started {processes}: a rate holds for any number of "
            "processes, as the batch is global"
        )


# --- the result ------------------------------------------------------------------------------------------------------


def found_flags(outcome: Outcome, flags: Sequence[str]) -> list[str]:
    """Return the flags of the training, with the values that were found."""
    if (best := outcome.found) is None:
        return list(flags)
    found = {"--learning_rate": f"{best.learning_rate:g}"}
    if len(outcome.plan.rungs) > 1:
        found["--batch_size"] = str(best.batch_size)
    kept: list[str] = []
    taking = True
    for word in flags:
        if word.startswith("--"):
            taking = word.partition("=")[0] not in found
        if taking:
            kept.append(word)
    return [*kept, *(word for flag in found.items() for word in flag)]


def as_json(outcome: Outcome, command: str) -> str:
    """Return the outcome as a line of JSON."""
    best = outcome.found
    trainings = [asdict(result) for result in outcome.results]
    values = {"command": command, "best": best and asdict(best), "plan": asdict(outcome.plan)}
    return json.dumps(values | {"trainings": trainings})


def describe(outcome: Outcome, command: str) -> Iterator[str]:
    """Yield the lines of the table, what it says, and the command to type."""
    yield align(list(_rows(outcome)))
    yield ""
    if (best := outcome.found) is None:
        yield "all trainings diverged: try lower `--learning_rates`, or `--max_grad_norm 1`"
        return
    yield f"best: trial {best.trial}, learning_rate {best.learning_rate:g}, {_figure(best)} after {best.steps:,} steps"
    own = [result for result in outcome.results if result.trial == 0 and result.rung <= best.rung][-1]
    if own.trial != best.trial:
        same = next(result for result in outcome.results if (result.trial, result.rung) == (best.trial, own.rung))
        yield (
            f"learning_rate {own.learning_rate:g} of the settings: {_figure(own)} after {own.steps:,} steps, where "
            f"trial {best.trial} has {_figure(same)}"
        )
    longest, total = outcome.plan.rungs[str(outcome.results[0].batch_size)][best.rung], outcome.plan.total_steps
    if longest < total:
        yield (
            f"The planned training has {total:,} steps, and these had {longest / total:.0%} of them. The best rate of "
            "a longer training is mostly lower: a larger budget tries longer ones."
        )
    bests = [outcome.best(rung) for rung in range(best.rung + 1)]
    rates = ", ".join(f"{found.learning_rate:g} ({found.steps:,} steps)" for found in bests if found is not None)
    yield f"best rate by length: {rates}"
    yield command


def _rows(outcome: Outcome) -> Iterator[list[str]]:
    """Yield the cells of the table: a trial a line, those that went on first, and by loss."""
    trials: dict[int, list[Result]] = {}
    for result in outcome.results:
        trials.setdefault(result.trial, []).append(result)
    own = outcome.plan.rungs[str(outcome.results[0].batch_size)] if outcome.results else []
    yield ["trial", "learning_rate", "batch_size", *(f"{steps:,} steps" for steps in own), "seconds"]
    for trial in sorted(trials.values(), key=lambda trial: (-trial[-1].rung, trial[-1].loss)):
        figures = [_figure(result, unit="") for result in trial] + ["-"] * (len(own) - len(trial))
        seconds = f"{sum(result.seconds for result in trial):.0f}"
        yield [str(trial[0].trial), f"{trial[0].learning_rate:g}", str(trial[0].batch_size), *figures, seconds]


def _figure(result: Result, unit: str = " bits per byte") -> str:
    """Return bits per byte; nats per token if the tokenizer loses text."""
    if result.valid_loss is None:
        return "diverged"
    if result.bits_per_byte is None:
        return f"{result.valid_loss:.4f}{unit and ' nats per token'}"
    return f"{result.bits_per_byte:.4f}{unit}"
