"""What a run shows: loss.png, and report.html, one file that opens anywhere. No torch here.

The page is `report_page.html`, a template that escapes every text it is given. Whatever a run lacks is left out of its
report: one that goes on, has failed or was damaged has a report too.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from textgen.config import TrainConfig
from textgen.files import write_atomic
from textgen.reporting.charts import Chart, Curve, Point, Rung, make_chart
from textgen.reporting.compare import Run, keep_differences, read_settings, summarize
from textgen.runs.directory import DATA_NAME, SETTINGS_NAME, read_status
from textgen.runs.environment import ENVIRONMENT_NAME
from textgen.runs.metrics_file import METRICS_NAME, MetricsRow, is_number, read_metrics_lenient
from textgen.runs.samples import SavedSample, read_samples
from textgen.settings import COMMAND_SETTINGS, flatten

log = logging.getLogger("textgen")

REPORT_NAME = "report.html"
MEASURES_NAME = "measures.json"
MEASURES_FORMAT = "textgen.measures.1"

# Bits per byte of IMDB reviews, as known from elsewhere; in the order of a ladder.
LADDER = (
    (Rung(2.09, "xz 2.09"), "the compressor xz -9e, primed with the training text"),
    (
        Rung(1.776, "origin 1.776"),
        "the origin of this project, a character LSTM: the average of its training, not of a test",
    ),
    (Rung(1.635, "5-gram 1.635"), "Kneser-Ney 5-gram over word pieces, of 22,500 reviews, on reviews of other films"),
)

# What is drawn beside the losses, if a run has it: metric, title, unit.
SMALL_CHARTS = (
    ("train/learning_rate", "Learning rate", ""),
    ("train/tokens_per_second", "Throughput", "tokens per second"),
    ("train/gradient_norm", "Gradient norm", "before clipping"),
    ("train/flops_share", "Use of the device", "share of its peak"),
    ("train/data_share", "Waiting for data", "share of time"),
)

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

NONE = "–"  # where a run has no such figure

MOST_STEPS = 6  # whose samples are shown


@dataclass(frozen=True, kw_only=True)
class Record:
    """All that is left of a run, as far as it can be read."""

    name: str
    path: Path
    figures: Run
    rows: Sequence[MetricsRow]
    torn: int
    """lines of metrics that are none"""
    status: Mapping[str, Any]
    samples: Sequence[SavedSample]
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    measures: Mapping[str, Any]


def leave_report(run_dir: Path) -> None:
    """Write a run's report beside it; where that fails, say so and go on."""
    try:
        write_report([run_dir], run_dir / REPORT_NAME)
    except Exception as error:  # a page is no reason to end a training
        log.warning("no %s: %s", REPORT_NAME, error)


def write_report(run_dirs: Sequence[Path], path: Path) -> None:
    """Write one page about runs, laid over each other where they are several.

    Raises:
        OSError: it cannot be written.
    """
    import jinja2

    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page.filters["number"] = _number
    template = Path(__file__).with_name("report_page.html").read_text(encoding="utf-8")
    names = [str(path) for path in run_dirs] if len(run_dirs) > 1 else [run_dirs[0].resolve().name]
    records = [read_record(path, name) for path, name in zip(run_dirs, names, strict=True)]
    text = page.from_string(template).render(contents(records))
    write_atomic(path, text.encode(errors="replace").decode())  # names of files need not be UTF-8


# --- reading ---------------------------------------------------------------------------------------------------------


def read_record(run_dir: Path, name: str) -> Record:
    """Read what there is of a run; what is missing or damaged is empty."""
    try:
        settings = read_settings(run_dir / SETTINGS_NAME)
    except (OSError, ValueError):
        settings = {}
    rows, torn = read_metrics_lenient(run_dir)
    return Record(
        name=name, path=run_dir, figures=summarize(run_dir, settings, rows), rows=rows, torn=torn,
        status=read_status(run_dir), samples=read_samples(run_dir), data=_read_object(run_dir / DATA_NAME),
        environment=_read_object(run_dir / ENVIRONMENT_NAME),
        measures=_read_measures(run_dir / MEASURES_NAME),
    )  # fmt: skip


def _read_measures(path: Path) -> dict[str, Any]:
    """Return what `textgen measure` left, with numbers alone among its figures; nothing where it is of another kind."""
    told = _read_object(path)
    human, generated = told.get("human"), told.get("generated")
    if told.get("format") != MEASURES_FORMAT or not isinstance(human, dict) or not isinstance(generated, list):
        return {}
    figures = [{n: v for n, v in one.items() if is_number(v)} for one in (human, *generated) if isinstance(one, dict)]
    return told | {"human": figures[0], "generated": [one for one in figures[1:] if "temperature" in one]}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# --- what the page tells ---------------------------------------------------------------------------------------------


def contents(records: Sequence[Record]) -> dict[str, Any]:
    """Return what the template shows."""
    ladder = LADDER if all(map(_reads_imdb, records)) else ()
    facts = [_facts(record) for record in records]
    return {
        "title": records[0].name if len(records) == 1 else f"{len(records)} runs",
        "now": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "records": records,
        "facts": facts,
        "fact_names": [name for name in facts[0] if any(told[name] != NONE for told in facts)],
        "states": [_state(record) for record in records],
        "charts": charts_of(records, [rung for rung, _ in ladder]),
        "ladder": ladder,
        "samples": [_samples_by_step(record) for record in records],
        "measured": measures_of(records),
        "settings": settings_of(records),
        "again": [_again(record) for record in records],
        "made_of": [_made_of(record) for record in records],
    }


def _facts(record: Record) -> dict[str, str]:
    """Return the figures of a run, the most wanted first, as they are written."""
    run = record.figures
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
    return math.exp(nats) if nats is not None and nats < 690 else None


def _state(record: Record) -> str:
    """Return how a run stands, in a sentence."""
    state, step, total = record.figures.state, record.figures.step, record.figures.total_steps
    reason, time = record.figures.reason, record.status.get("time")
    place = "before the first step" if step is None else f"at step {step:,}" + (f" of {total:,}" if total else "")
    words = [f"{state or 'of unknown state: no status.json'}, {place}"]
    words += [f"because: {reason}"] if reason else []
    words += [f"last heard of {time.replace('T', ' ').replace('+00:00', ' UTC')}"] if isinstance(time, str) else []
    words += ["if it was killed it still says so"] if state == "running" else []
    words += [f"lines of {METRICS_NAME} that could not be read: {record.torn}"] if record.torn else []
    return "; ".join(words)


def _reads_imdb(record: Record) -> bool:
    """Tell whether a run's text is what the ladder was measured on."""
    settings = record.figures.settings
    source, dataset = settings.get("data.source"), settings.get("data.dataset")
    imdb = source in ("imdb", "package") if dataset is None else dataset == "stanfordnlp/imdb"
    return imdb and settings.get("data.normalization") == "none"


def charts_of(records: Sequence[Record], ladder: Sequence[Rung]) -> list[Chart]:
    """Return the charts of what was logged, the losses first: training as thin lines, validations as dots."""
    scales = _scales(records)

    def chart(title: str, unit: str, *metrics: str, **look: Any) -> Chart | None:
        curves = [
            Curve(run=place, points=curve(record, metric, scale), dots=metric.startswith("valid/"))
            for metric in metrics
            for place, (record, scale) in enumerate(zip(records, scales, strict=True))
        ]
        return make_chart(title, unit, _x_name(records), curves, **look)

    charts = [
        chart("Bits per byte", "lower is better", "train/bits_per_byte", "valid/bits_per_byte", rungs=ladder, most=1.5),
        chart("Loss", "nats per token", "train/loss", "valid/loss", most=2.0),
        *(chart(title, unit, metric, least=0.0) for metric, title, unit in SMALL_CHARTS),
    ]
    return [chart for chart in charts if chart is not None]


def curve(record: Record, metric: str, scale: float = 1.0) -> list[Point]:
    """Return the points (step x scale, value) of a metric, where it is a number."""
    return [(row["step"] * scale, row[metric]) for row in record.rows if is_number(row.get(metric))]


def _scales(records: Sequence[Record]) -> list[float]:
    """Return what turns steps into the unit of the axis: runs of other batch sizes are compared by million tokens."""
    if len(records) == 1:
        return [1.0]
    found = []
    for record in records:
        pairs = [(row["tokens"], row["step"]) for row in record.rows if is_number(row.get("tokens")) and row["step"]]
        found.append(pairs[0][0] / pairs[0][1] / 1e6 if pairs else 1e-6)
    return found


def _x_name(records: Sequence[Record]) -> str:
    return "optimizer steps" if len(records) == 1 else "million tokens"


def _samples_by_step(record: Record) -> list[tuple[int, dict[str, list[SavedSample]]]]:
    """Return samples by step, the newest first, and by prompt; of many steps evenly spaced ones."""
    steps = sorted({sample.step for sample in record.samples}, reverse=True)
    if len(steps) > MOST_STEPS:
        steps = [steps[i * (len(steps) - 1) // (MOST_STEPS - 1)] for i in range(MOST_STEPS)]
    told = []
    for step in steps:
        prompts: dict[str, list[SavedSample]] = {}
        for sample in record.samples:
            if sample.step == step:
                prompts.setdefault(sample.prompt, []).append(sample)
        told.append((step, prompts))
    return told


def measures_of(records: Sequence[Record]) -> dict[str, Any] | None:
    """Return charts and a table of measured texts, beside the first run's human ones; None where nothing is measured.

    Runs that were measured on other lengths or numbers of texts are left out: they do not compare.
    """
    measured = [(place, record.measures) for place, record in enumerate(records) if record.measures]
    if not measured:
        return None
    first = measured[0][1]
    alike = [(place, told) for place, told in measured if all(told.get(n) == first.get(n) for n in ("texts", "words"))]
    human = first["human"]
    charts, table = [], []
    for name, (title, unit) in MEASURES.items():
        curves = [
            Curve(run=place, dots=True, points=[
                (one["temperature"], one[name]) for one in told["generated"] if name in one
            ])
            for place, told in alike
        ]  # fmt: skip
        rungs = [Rung(human[name], f"human {human[name]:.3g}")] if name in human else []
        chart = make_chart(title, unit, "temperature", curves, rungs=rungs)
        if chart is not None:
            charts.append(chart)
            table.append((title, unit, human.get(name), [_at_one(told, name) for _, told in alike]))
    left_out = [records[place].name for place, told in measured if (place, told) not in alike]
    return {
        "charts": charts, "table": table, "texts": first.get("texts"), "words": first.get("words"),
        "data": first.get("data"), "names": [records[place].name for place, _ in alike],
        "left_out": left_out,
    }  # fmt: skip


def _at_one(measures: Mapping[str, Any], name: str) -> float | None:
    """Return a measure at temperature 1, where the model says what it has learnt."""
    return next((one.get(name) for one in measures["generated"] if one["temperature"] == 1), None)


def settings_of(records: Sequence[Record]) -> list[tuple[str, list[str], bool]]:
    """Return name, value in each run, and whether it stands out; those that do come first.

    Of several runs those stand out that are not the same in all, of one run those that are not the default.
    """
    defaults = flatten(json.loads(json.dumps(asdict(TrainConfig()))))
    different = keep_differences([record.figures for record in records])[0].settings
    rows = []
    for name in dict.fromkeys(name for record in records for name in record.figures.settings):
        values = [record.figures.settings.get(name) for record in records]
        alone = len(records) == 1 and values[0] != defaults.get(name) and name not in COMMAND_SETTINGS
        rows.append((name, [_setting(value) for value in values], name in different or alone))
    return sorted(rows, key=lambda row: not row[2])


def _setting(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _again(record: Record) -> str:
    """Return the commands that make the run anew, as far as it is known how it was made."""
    run, lines = record.figures, []
    commit = str(record.environment.get("commit", "unknown"))
    if re.match(r"[0-9a-f]{40}", commit):
        lines.append(f"git checkout {commit[:40]}" + ("  # and what was changed since" if commit[40:] else ""))
    start = "python" if (run.processes or 1) == 1 else (
        f"accelerate launch --config_file accelerate_config.yaml --num_processes {run.processes}"
    )  # fmt: skip
    command = f"{start} train_distributed.py --config {shlex.quote(str(record.path / SETTINGS_NAME))}"
    if run.settings.get("mixed_precision") is not None:
        command += f" --mixed_precision {shlex.quote(str(run.settings['mixed_precision']))}"
    if run.settings.get("max_minutes") is not None and run.total_steps:  # how many steps fit is timed
        command += f" --max_minutes null --max_steps {run.total_steps}"
    return "\n".join([*lines, f"{command} --run_dir runs/again"])


def _made_of(record: Record) -> dict[str, str]:
    """Return the text of a run and what it was trained on and with."""
    digests = record.data.get("digests")
    told = {"text": record.data["source"]} if "source" in record.data else {}
    told |= {f"sha256 of {split}": digest for split, digest in digests.items()} if isinstance(digests, dict) else {}
    return {name: str(value) for name, value in (told | dict(record.environment)).items()}


def _number(value: object, form: str = ".4g") -> str:
    return format(value, form) if is_number(value) else NONE


# --- loss.png --------------------------------------------------------------------------------------------------------


def draw_loss_curve(run_dirs: Mapping[str, Path], path: Path) -> None:
    """Draw training and validation bits per byte over steps, one colour a run, into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [read_record(run_dir, name) for name, run_dir in run_dirs.items()]
    lossless = any("train/bits_per_byte" in row for record in records for row in record.rows)
    unit = "bits_per_byte" if lossless else "loss"
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for place, (record, scale) in enumerate(zip(records, _scales(records), strict=True)):
        for part, style, width in (("train", "-", 1.0), ("valid", "o-", 2.0)):
            points = curve(record, f"{part}/{unit}", scale)
            if points:
                color, alpha = f"C{place}", 0.45 if part == "train" else 1.0
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    color=color,
                    alpha=alpha,
                    linewidth=width,
                    markersize=4,
                    label=f"{record.name} {part}".strip(),
                )
    axes.set(xlabel=_x_name(records), ylabel="bits per byte" if lossless else "nats per token")
    axes.grid(alpha=0.3)
    bottom = [line.get_ydata()[-1] for line in axes.lines]
    if bottom:
        top = max(max(line.get_ydata()) for line in axes.lines)
        axes.set_ylim(min(bottom) - 0.1, min(top, min(bottom) + 2.0) + 0.1)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
