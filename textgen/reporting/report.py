"""The report of a run or several: report.html, one file without links, and loss.png. This module imports no torch.

`report_page.html` is the template, which escapes all text. What a run lacks is left out of its report, so a run that is
running, failed or damaged has a report too.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from textgen.config import IMDB, TrainConfig
from textgen.files import write_atomic
from textgen.reporting.card import HUB
from textgen.reporting.charts import Chart, Curve, Point, ReferenceLine, make_chart
from textgen.reporting.compare import RunSummary, keep_differences, read_settings, summarize
from textgen.reporting.profile import find_traces
from textgen.runs.directory import DATA_NAME, SETTINGS_NAME, read_status
from textgen.runs.environment import ENVIRONMENT_NAME
from textgen.runs.metrics_file import METRICS_NAME, MetricsRow, is_number, read_metrics_lenient
from textgen.runs.samples import SavedSample, read_samples
from textgen.settings import COMMAND_SETTINGS, flatten

log = logging.getLogger("textgen")

REPORT_NAME = "report.html"
CURVE_NAME = "loss.png"
MEASURES_NAME = "measures.json"
MEASURES_FORMAT = "textgen.measures.1"

# Bits per byte of IMDB reviews that other models reach, each with its explanation.
REFERENCES = (
    (ReferenceLine(2.09, "xz 2.09"), "the compressor xz -9e, primed with the training text"),
    (
        ReferenceLine(1.776, "origin 1.776"),
        "the origin of this project, a character LSTM: the average of its training, not of a test",
    ),
    (
        ReferenceLine(1.626, "5-gram 1.626"),
        "a Kneser-Ney 5-gram over word pieces, of the same training reviews (`python -m benchmarks.references`)",
    ),
)

# Charts beside those of the losses, of the metrics that a run has: metric, title, unit.
SMALL_CHARTS = (
    ("train/learning_rate", "Learning rate", ""),
    ("train/tokens_per_second", "Throughput", "tokens per second"),
    ("train/gradient_norm", "Gradient norm", "before clipping"),
    ("train/flops_share", "Use of the device", "share of its peak"),
    ("train/data_share", "Waiting for data", "share of time"),
    ("train/exchange_share", "Exchanging gradients", "share of time"),
)

# Measures of texts: title and unit.
MEASURES = {
    "distinct_1": ("Distinct words", "distinct-1"),
    "distinct_2": ("Distinct pairs", "distinct-2"),
    "distinct_3": ("Distinct 3-grams", "distinct-3"),
    "distinct_4": ("Distinct 4-grams", "distinct-4"),
    "repetition_4": ("Repeated in a text", "4-grams"),
    "self_bleu_4": ("Like each other", "self-BLEU-4"),
    "zipf_slope": ("Rare words", "Zipf slope"),
    "copied_4": ("Copied 4-grams", "share of them"),
    "copied_12": ("Copied 12-grams", "memorised"),
    "length": ("Length", "words, mean"),
}

MISSING = "–"  # in place of a figure that a run lacks

MAX_SAMPLED_STEPS = 6  # whose samples are shown


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The files of a run; empty for a file that is missing or damaged."""

    name: str
    path: Path
    summary: RunSummary
    rows: Sequence[MetricsRow]
    num_damaged: int
    """lines of metrics that are not rows"""
    status: Mapping[str, Any]
    samples: Sequence[SavedSample]
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    measures: Mapping[str, Any]
    traces: Sequence[Path]
    """of `--profile`, by process"""


def leave_report(run_dir: Path) -> None:
    """Write the report of a run into its folder; log a warning if that fails."""
    try:
        write_report([run_dir], run_dir / REPORT_NAME)
    except Exception as error:  # a training must not fail because of its report
        log.warning("no %s: %s", REPORT_NAME, error)


def write_report(run_dirs: Sequence[Path], path: Path) -> None:
    """Write one page about a run, or about several runs with their curves in the same charts.

    Raises:
        OSError: the page cannot be written.
    """
    import jinja2

    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page.filters["number"] = _number
    page.filters["link"] = lambda file: quote(os.path.relpath(file, path.parent))
    template = Path(__file__).with_name("report_page.html").read_text(encoding="utf-8")
    names = [str(path) for path in run_dirs] if len(run_dirs) > 1 else [run_dirs[0].resolve().name]
    runs = [read_run_files(path, name) for path, name in zip(run_dirs, names, strict=True)]
    text = page.from_string(template).render(page_values(runs))
    write_atomic(path, text.encode(errors="replace").decode())  # the name of a folder need not be UTF-8


def report_summary(run_dir: Path) -> str:
    """Return state, figures and loss curve of a run as a piece of HTML without style or script, for a notebook."""
    run = read_run_files(run_dir, run_dir.resolve().name)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(figure)}</td></tr>"
        for name, figure in _figures(run.summary).items()
        if figure != MISSING
    )
    picture = ""
    if (curve := run_dir / CURVE_NAME).exists():
        encoded = base64.b64encode(curve.read_bytes()).decode()
        picture = f'<img alt="losses" width="560" src="data:image/png;base64,{encoded}">'
    title = f"<b>{html.escape(run.name)}</b>: {html.escape(_describe_state(run))}"
    return f"<div><p>{title}</p><table>{rows}</table>{picture}</div>"


# --- reading ---------------------------------------------------------------------------------------------------------


def read_run_files(run_dir: Path, name: str) -> RunFiles:
    """Read the files of a run; what is missing or damaged is empty.

    Args:
        run_dir: the run's folder.
        name: the name of the run on the page.
    """
    try:
        settings = read_settings(run_dir / SETTINGS_NAME)
    except (OSError, ValueError):
        settings = {}
    rows, num_damaged = read_metrics_lenient(run_dir)
    return RunFiles(
        name=name,
        path=run_dir,
        summary=summarize(run_dir, settings, rows),
        rows=rows,
        num_damaged=num_damaged,
        status=read_status(run_dir),
        samples=read_samples(run_dir),
        data=_read_object(run_dir / DATA_NAME),
        environment=_read_object(run_dir / ENVIRONMENT_NAME),
        measures=_read_measures(run_dir / MEASURES_NAME),
        traces=find_traces(run_dir),
    )


def _read_measures(path: Path) -> dict[str, Any]:
    """Return the result of `textgen measure`, its figures without what is not a number; empty for another format."""
    measures = _read_object(path)
    human, generated = measures.get("human"), measures.get("generated")
    if measures.get("format") != MEASURES_FORMAT or not isinstance(human, dict) or not isinstance(generated, list):
        return {}
    figures = [{n: v for n, v in one.items() if is_number(v)} for one in (human, *generated) if isinstance(one, dict)]
    return measures | {"human": figures[0], "generated": [one for one in figures[1:] if "temperature" in one]}


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file; empty if the file has none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# --- values of the template ------------------------------------------------------------------------------------------


def page_values(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Return the variables of the template."""
    references = REFERENCES if all(map(_reads_imdb, runs)) else ()
    figures = [_figures(run.summary) for run in runs]
    return {
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        "now": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "runs": runs,
        "figures": figures,
        "figure_names": [name for name in figures[0] if any(one[name] != MISSING for one in figures)],
        "states": [_describe_state(run) for run in runs],
        "charts": metric_charts(runs, [reference for reference, _ in references]),
        "references": references,
        "samples": [_samples_by_step(run) for run in runs],
        "measured": compare_measures(runs),
        "settings": settings_table(runs),
        "commands": [_training_commands(run) for run in runs],
        "inputs": [_training_inputs(run) for run in runs],
    }


def _figures(run: RunSummary) -> dict[str, str]:
    """Return the figures of a run as text, the most important first."""
    return {
        "validation, bits per byte": _number(run.bits_per_byte, ".4f"),
        "best of all validations": _number(
            run.best_bits_per_byte if run.best_bits_per_byte != run.bits_per_byte else None, ".4f"
        ),
        "validation loss, nats per token": _number(run.valid_loss, ".4f"),
        "perplexity per token": _number(_exp(run.valid_loss), ".4g"),
        "training loss, last row": _number(run.train_loss, ".4f"),
        "tokens per second, median": _number(run.tokens_per_second, ",.0f"),
        "minutes of steps": _number(run.minutes, ",.1f"),
        "processes": _number(run.processes, ","),
    }


def _exp(nats: float | None) -> float | None:
    """Return e to the power of a loss; None if there is no loss or the result overflows."""
    return math.exp(nats) if nats is not None and nats < 690 else None


def _describe_state(run: RunFiles) -> str:
    """Return the state of a run in a sentence."""
    state, step, total = run.summary.state, run.summary.step, run.summary.total_steps
    reason, time = run.summary.reason, run.status.get("time")
    place = "before the first step" if step is None else f"at step {step:,}" + (f" of {total:,}" if total else "")
    words = [f"{state or 'state unknown: no status.json'}, {place}"]
    words += [f"because: {reason}"] if reason else []
    words += [f"last change {time.replace('T', ' ').replace('+00:00', ' UTC')}"] if isinstance(time, str) else []
    words += ["a killed run stays in this state"] if state == "running" else []
    words += [f"lines of {METRICS_NAME} that could not be read: {run.num_damaged}"] if run.num_damaged else []
    return "; ".join(words)


def _reads_imdb(run: RunFiles) -> bool:
    """Return whether a run was trained on the text of the reference lines."""
    settings = run.summary.settings
    source, dataset = settings.get("data.source"), settings.get("data.dataset")
    imdb = source in ("imdb", "package") if dataset is None else dataset == IMDB
    return imdb and not settings.get("data.sources") and settings.get("data.normalization") == "none"


def metric_charts(runs: Sequence[RunFiles], references: Sequence[ReferenceLine]) -> list[Chart]:
    """Return the charts of the metrics, the losses first: training as thin lines, validations as dots."""
    scales = _step_scales(runs)

    def chart(title: str, unit: str, *metrics: str, **options: Any) -> Chart | None:
        curves = [
            Curve(run=index, points=metric_points(run, metric, scale), dots=metric.startswith("valid/"))
            for metric in metrics
            for index, (run, scale) in enumerate(zip(runs, scales, strict=True))
        ]
        return make_chart(title, unit, _x_name(runs), curves, **options)

    charts = [
        chart(
            "Bits per byte",
            "lower is better",
            "train/bits_per_byte",
            "valid/bits_per_byte",
            references=references,
            y_span=1.5,
        ),
        *(
            chart(f"Bits per byte of {name.rpartition('/')[2]}", "lower is better", name, y_span=1.5)
            for name in dict.fromkeys(name for run in runs for row in run.rows for name in row)
            if name.startswith("valid/bits_per_byte/")
        ),
        chart("Loss", "nats per token", "train/loss", "valid/loss", y_span=2.0),
        *(chart(title, unit, metric, y_min=0.0) for metric, title, unit in SMALL_CHARTS),
    ]
    return [chart for chart in charts if chart is not None]


def metric_points(run: RunFiles, metric: str, scale: float = 1.0) -> list[Point]:
    """Return the points (step x scale, value) of the rows whose metric is a number."""
    return [(row["step"] * scale, row[metric]) for row in run.rows if is_number(row.get(metric))]


def _step_scales(runs: Sequence[RunFiles]) -> list[float]:
    """Return for each run the x value of one step: 1 for a single run, else million tokens.

    Runs may differ in their batch sizes, so only tokens compare them.
    """
    if len(runs) == 1:
        return [1.0]
    scales = []
    for run in runs:
        pairs = [(row["tokens"], row["step"]) for row in run.rows if is_number(row.get("tokens")) and row["step"]]
        scales.append(pairs[0][0] / pairs[0][1] / 1e6 if pairs else 1e-6)
    return scales


def _x_name(runs: Sequence[RunFiles]) -> str:
    return "optimizer steps" if len(runs) == 1 else "million tokens"


def _samples_by_step(run: RunFiles) -> list[tuple[int, dict[str, list[SavedSample]]]]:
    """Return samples by step, the newest first, and by prompt. Of many steps, evenly spaced ones are chosen."""
    steps = sorted({sample.step for sample in run.samples}, reverse=True)
    if len(steps) > MAX_SAMPLED_STEPS:
        steps = [steps[i * (len(steps) - 1) // (MAX_SAMPLED_STEPS - 1)] for i in range(MAX_SAMPLED_STEPS)]
    by_step = []
    for step in steps:
        prompts: dict[str, list[SavedSample]] = {}
        for sample in run.samples:
            if sample.step == step:
                prompts.setdefault(sample.prompt, []).append(sample)
        by_step.append((step, prompts))
    return by_step


def compare_measures(runs: Sequence[RunFiles]) -> dict[str, Any] | None:
    """Return charts and a table of the measures of generated texts, with those of human texts; None without measures.

    The human texts are those of the first measured run. A run that was measured on texts of another length or number
    is left out, since its figures are not comparable.
    """
    measured = [(index, run.measures) for index, run in enumerate(runs) if run.measures]
    if not measured:
        return None
    first = measured[0][1]
    comparable = [(i, one) for i, one in measured if all(one.get(n) == first.get(n) for n in ("texts", "words"))]
    human = first["human"]
    charts, table = [], []
    for name, (title, unit) in MEASURES.items():
        curves = [
            Curve(
                run=index,
                dots=True,
                points=[(one["temperature"], one[name]) for one in measures["generated"] if name in one],
            )
            for index, measures in comparable
        ]
        references = [ReferenceLine(human[name], f"human {human[name]:.3g}")] if name in human else []
        chart = make_chart(title, unit, "temperature", curves, references=references)
        if chart is not None:
            charts.append(chart)
            table.append(
                (title, unit, human.get(name), [_at_temperature_one(measures, name) for _, measures in comparable])
            )
    return {
        "charts": charts,
        "table": table,
        "texts": first.get("texts"),
        "words": first.get("words"),
        "data": first.get("data"),
        "names": [runs[index].name for index, _ in comparable],
        "left_out": [runs[index].name for index, measures in measured if (index, measures) not in comparable],
    }


def _at_temperature_one(measures: Mapping[str, Any], name: str) -> float | None:
    """Return a measure at temperature 1, which samples from the model's distribution unchanged; None if missing."""
    return next((one.get(name) for one in measures["generated"] if one["temperature"] == 1), None)


def settings_table(runs: Sequence[RunFiles]) -> list[tuple[str, list[str], bool]]:
    """Return the name of each setting, its value in each run, and whether it is highlighted; highlighted ones first.

    One run: settings that are not the default are highlighted. Several runs: settings that differ between them.
    """
    defaults = flatten(json.loads(json.dumps(asdict(TrainConfig()))))
    different = keep_differences([run.summary for run in runs])[0].settings
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.summary.settings):
        values = [run.summary.settings.get(name) for run in runs]
        changed = len(runs) == 1 and values[0] != defaults.get(name) and name not in COMMAND_SETTINGS
        rows.append((name, [_format_setting(value) for value in values], name in different or changed))
    return sorted(rows, key=lambda row: not row[2])


def _format_setting(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _training_commands(run: RunFiles) -> str:
    """Return the commands that repeat a training, from what is recorded of it."""
    summary, lines = run.summary, []
    commit = str(run.environment.get("commit", "unknown"))
    if re.match(r"[0-9a-f]{40}", commit):
        lines.append(
            f"git checkout {commit[:40]}" + ("  # plus changes that were not committed" if commit[40:] else "")
        )
    launcher = "python"
    if (summary.processes or 1) > 1:
        launcher = f"accelerate launch --config_file accelerate_config.yaml --num_processes {summary.processes}"
    command = f"{launcher} train_distributed.py --config {shlex.quote(str(run.path / SETTINGS_NAME))}"
    if summary.settings.get("mixed_precision") is not None:
        command += f" --mixed_precision {shlex.quote(str(summary.settings['mixed_precision']))}"
    for name in _settings_beside_base(summary.settings):
        command += f" --{name} {shlex.quote(str(summary.settings[name]))}"
    # With `max_minutes` the number of steps depends on the clock.
    if summary.settings.get("max_minutes") is not None and summary.total_steps:
        command += f" --max_minutes null --max_steps {summary.total_steps}"
    return "\n".join([*lines, f"{command} --run_dir runs/again"])


def _settings_beside_base(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the settings that a base would decide if they were in a config file alone."""
    if (base := settings.get("init_from")) is None:
        return ()
    if (path := settings.get("tokenizer.path")) is None:
        return "data.normalization", "tokenizer.vocab_size", "tokenizer.model_type"
    # The base's tokenizer is read from the base, and after a resume from a checkpoint of the run.
    path, cached = Path(str(path)), f"models--{str(base).removeprefix(HUB).replace('/', '--')}"
    of_base = cached in path.parts or any(path.is_relative_to(str(x)) for x in (base, settings.get("run_dir")))
    return ("data.normalization",) if of_base else ("data.normalization", "tokenizer.path")


def _training_inputs(run: RunFiles) -> dict[str, str]:
    """Return the source and digests of a run's text, and its environment."""
    digests = run.data.get("digests")
    inputs = {"text": run.data["source"]} if "source" in run.data else {}
    inputs |= {f"sha256 of {split}": digest for split, digest in digests.items()} if isinstance(digests, dict) else {}
    return {name: str(value) for name, value in (inputs | dict(run.environment)).items()}


def _number(value: object, form: str = ".4g") -> str:
    return format(value, form) if is_number(value) else MISSING


# --- loss.png --------------------------------------------------------------------------------------------------------


def draw_loss_curve(run_dirs: Mapping[str, Path], path: Path) -> None:
    """Draw the curves of training and validation into a PNG file, one colour for each run.

    The unit is bits per byte, or nats per token if the tokenizer is not lossless.

    Args:
        run_dirs: folders of runs by their names in the legend.
        path: of the PNG file.
    """
    from matplotlib.figure import Figure  # not pyplot, whose figures and backend are a notebook's

    runs = [read_run_files(run_dir, name) for name, run_dir in run_dirs.items()]
    lossless = any("train/bits_per_byte" in row for run in runs for row in run.rows)
    unit = "bits_per_byte" if lossless else "loss"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    for index, (run, scale) in enumerate(zip(runs, _step_scales(runs), strict=True)):
        for part, style, width in (("train", "-", 1.0), ("valid", "o-", 2.0)):
            points = metric_points(run, f"{part}/{unit}", scale)
            if points:
                color, alpha = f"C{index}", 0.45 if part == "train" else 1.0
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    color=color,
                    alpha=alpha,
                    linewidth=width,
                    markersize=4,
                    label=f"{run.name} {part}".strip(),
                )
    axes.set(xlabel=_x_name(runs), ylabel="bits per byte" if lossless else "nats per token")
    axes.grid(alpha=0.3)
    last = [line.get_ydata()[-1] for line in axes.lines]
    if last:  # the first losses are cut off, else the rest would be flat
        highest = max(max(line.get_ydata()) for line in axes.lines)
        axes.set_ylim(min(last) - 0.1, min(highest, min(last) + 2.0) + 0.1)
        axes.legend()
    figure.savefig(path, dpi=120)
