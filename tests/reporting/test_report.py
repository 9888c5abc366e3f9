"""report.html of real runs, of broken ones, and of runs whose texts would like to be more than texts."""

from __future__ import annotations

import json
import logging
import math
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.forking import run_script
from textgen.cli import main
from textgen.commands.parsing import parse_train_config, take_base
from textgen.config import TokenizerConfig, TrainConfig
from textgen.reporting.charts import MOST_POINTS, make_chart, thin, ticks
from textgen.reporting.charts import Curve as ChartCurve
from textgen.reporting.report import leave_report, write_report
from textgen.runs.checkpoint import checkpoints

ROOT = Path(__file__).parents[2]

Capture = pytest.CaptureFixture[str]
Copy = Callable[[str], Path]

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """What a page holds, by a parser of its own; it must be well nested."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.style = ""
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.style += data
        else:
            self.text += data

    def curves(self, title: str) -> list[list[tuple[float, float]]]:
        """Return the points of a chart's lines, read back from where they are drawn."""
        lines, inside = [], False
        for tag, attributes in self.tags:
            if tag == "svg":
                inside = attributes["data-title"] == title
                x_low, x_high = map(float, attributes["data-x-range"].split())
                y_low, y_high = map(float, attributes["data-y-range"].split())
            elif tag == "polyline" and inside:
                points = (map(float, point.split(",")) for point in attributes["points"].split())
                lines.append(
                    [(x_low + x / 1000 * (x_high - x_low), y_high - y / 1000 * (y_high - y_low)) for x, y in points]
                )
        return lines


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Copy:
    """Return a function that copies the tiny run under a name."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(tiny_run, tmp_path / name))

    return make


def report(*runs: Path) -> Page:
    out = runs[0].parent / "page.html"
    write_report(runs, out)
    return Page(out)


def write_rows(run: Path, *rows: dict[str, Any]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def near(points: list[tuple[float, float]]) -> Any:
    """Compare within a hundredth of a thousandth of the axes, which is what is written of a place."""
    most = [max(map(abs, values)) for values in zip(*points, strict=True)]
    return [tuple(pytest.approx(v, rel=0, abs=1e-5 * m) for v, m in zip(point, most, strict=True)) for point in points]


# --- what it shows ---------------------------------------------------------------------------------------------------


def test_training_leaves_a_report_of_its_end(tiny_run: Path) -> None:
    page = Page(tiny_run / "report.html")
    assert "finished, at step 4 of 4" in page.text
    rows = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert format(rows[-1]["valid/bits_per_byte"], ".4f") in page.text
    assert "torch" in page.text
    assert json.loads((tiny_run / "environment.json").read_text())["commit"][:40] in page.text


def test_training_that_fails_leaves_a_report_too(tiny_flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ["--learning_rate", "1e30", "--max_steps", "40", "--log_every", "1"]
    run_script("train_distributed.py", *tiny_flags, *flags, "--run_dir", str(run), expect=2)
    text = Page(run / "report.html").text
    assert "failed, at step" in text
    assert "because: the " in text
    assert "turned to nan or infinity" in text


def test_points_of_curves_are_those_of_the_metrics(copy: Copy) -> None:
    run, draw = copy("run"), random.Random(0)
    train = [
        {"step": step, "tokens": step * 128, "train/loss": 3 + draw.random(), "train/bits_per_byte": 1 + draw.random(),
         "train/learning_rate": 0.001 * draw.random(), "train/tokens_per_second": 1e5 * draw.random()}
        for step in range(10, 2000, 10)
    ]  # fmt: skip
    valid = [{"step": step, "valid/loss": 2.5, "valid/bits_per_byte": 2 - step / 2000} for step in (500, 1000, 1990)]
    write_rows(run, *train, *valid)
    page = report(run)
    for title, metric in (("Bits per byte", "bits_per_byte"), ("Loss", "loss")):
        drawn = page.curves(title)
        assert drawn[0] == near([(row["step"], row[f"train/{metric}"]) for row in train])
        assert drawn[1] == near([(row["step"], row[f"valid/{metric}"]) for row in valid])
    for title, metric in (("Learning rate", "learning_rate"), ("Throughput", "tokens_per_second")):
        assert page.curves(title) == [near([(row["step"], row[f"train/{metric}"]) for row in train])]
    assert "optimizer steps 1000: 1.5" in page.text  # a dot tells its value


def test_runs_are_laid_over_each_other_by_tokens(copy: Copy) -> None:
    one, other = copy("one"), copy("other")
    write_rows(one, *({"step": s, "tokens": s * 1e6, "train/bits_per_byte": 2.0} for s in (1, 2)))
    write_rows(other, *({"step": s, "tokens": s * 5e5, "train/bits_per_byte": 3.0} for s in (1, 2)))
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("batch_size: 8", "batch_size: 4"))
    page = report(one, other)
    assert page.curves("Bits per byte") == [near([(1, 2), (2, 2)]), near([(0.5, 3), (1, 3)])]
    assert page.text.index("batch_size84") < page.text.index("seq_len1616")
    classes = [attributes.get("class") for tag, attributes in page.tags if tag == "tr"]
    assert classes.count("different") == 1


def test_settings_that_are_not_the_default_come_first(tiny_run: Path) -> None:
    page = Page(tiny_run / "report.html")
    classes = [attributes["class"] for tag, attributes in page.tags if tag == "tr" and "class" in attributes]
    assert classes == sorted(classes)
    assert classes.count("different") >= 8
    assert page.text.index("batch_size") < page.text.index("max_epochs")


def test_reference_lines_are_drawn_for_imdb_only(copy: Copy) -> None:
    run = copy("run")
    assert "xz 2.09" not in report(run).text
    config = run / "config.yaml"
    config.write_text(re.sub(r"source: files", "source: package", config.read_text()))
    text = report(run).text
    for name in ("xz 2.09", "origin 1.776", "5-gram 1.626"):
        assert name in text
    config.write_text(re.sub(r"normalization: none", "normalization: lowercase", config.read_text()))
    assert "xz 2.09" not in report(run).text


def test_samples_of_many_steps_are_spaced_evenly_the_newest_first(copy: Copy) -> None:
    run = copy("run")
    (run / "samples.md").write_text(
        "".join(
            f"## step {step}\n\n- temperature 0.8: **i love** two\nlines {step}\n- temperature 1.0: **i love** it\n\n"
            for step in range(100, 2600, 100)
        )
    )
    text = report(run).text
    assert [int(step.replace(",", "")) for step in re.findall(r"step ([\d,]+)\n", text)] == [
        2500, 2100, 1600, 1100, 600, 100,
    ]  # fmt: skip
    assert "two\nlines 1600" in text


def test_command_makes_the_same_run_again(copy: Copy, tmp_path: Path) -> None:
    run = copy("a run's")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("max_minutes: null", "max_minutes: 0.5"))
    (command,) = re.findall(r"train_distributed.py (.*)", report(run).text)
    again = parse_train_config(shlex.split(command))
    made = parse_train_config(["--config", str(config)])
    assert again.run_dir == "runs/again"
    assert (again.max_minutes, again.max_steps) == (None, 4)
    same = {"run_dir": "", "max_minutes": None, "max_steps": None}
    assert TrainConfig(**vars(again) | same | {"run_dir": "x"}) == TrainConfig(**vars(made) | same | {"run_dir": "x"})


def test_command_of_a_run_with_a_base_keeps_its_own_tokenizer(copy: Copy, tiny_run: Path) -> None:
    run = copy("run")
    config = run / "config.yaml"
    text = config.read_text().replace("init_from: null", f"init_from: {tiny_run}")
    config.write_text(text.replace("vocab_size: 340", "vocab_size: 400"))
    (command,) = re.findall(r"train_distributed.py (.*)", report(run).text)
    argv = shlex.split(command)
    assert take_base(parse_train_config(argv), argv).tokenizer == TokenizerConfig(vocab_size=400)


@pytest.mark.parametrize("whose", ["its own", "the base's", "its checkpoint's"])
def test_command_of_a_run_with_a_base_keeps_the_file_of_its_own_tokenizer(
    copy: Copy, tiny_run: Path, tmp_path: Path, whose: str
) -> None:
    """The file of a base is not named: after a resume it is in a checkpoint, which is deleted."""
    run, is_own = copy("run"), whose == "its own"
    config = run / "config.yaml"
    text = config.read_text().replace("init_from: null", f"init_from: {tiny_run}")
    text = re.sub("run_dir: .*", f"run_dir: {run}", text)
    own = {"its own": tmp_path / "mine", "the base's": tiny_run}.get(whose, run / "checkpoints" / "step-000001")
    config.write_text(text.replace("  path: null", f"  path: {own}"))
    (command,) = re.findall(r"train_distributed.py (.*)", report(run).text)
    argv = shlex.split(command)
    assert ("--tokenizer.path" in argv) == is_own
    wanted = own if is_own else checkpoints(tiny_run)[0][1]
    assert take_base(parse_train_config(argv), argv).tokenizer.path == str(wanted)


def test_command_of_a_run_with_a_base_of_the_hub_names_no_file_of_this_machine(copy: Copy) -> None:
    run = copy("run")
    config = run / "config.yaml"
    text = config.read_text().replace("init_from: null", "init_from: hub:them/films")
    config.write_text(text.replace("  path: null", "  path: /cache/models--them--films/snapshots/1a2b"))
    (command,) = re.findall(r"train_distributed.py (.*)", report(run).text)
    assert "--tokenizer.path" not in shlex.split(command)


# --- texts are texts -------------------------------------------------------------------------------------------------

HOSTILE = "</p></script><img src=x onerror=alert(1)><script>alert(2)</script>&lt;\"'`{{ 7 * 7 }}{% raw %}\u202e"


def test_whatever_a_run_says_is_shown_as_text(copy: Copy, tmp_path: Path) -> None:
    plain = {tag for tag, _ in Page(copy("plain") / "report.html").tags}
    run = Path(shutil.copytree(tmp_path / "plain", tmp_path / HOSTILE.replace("/", "")))
    (run / "samples.md").write_text(f"## step 4\n\n- temperature 0.8: **{HOSTILE}1**{HOSTILE}2\n\n")
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "failed", "reason": f"{HOSTILE}3"}))
    (run / "environment.json").write_text(json.dumps({f"{HOSTILE}4": f"{HOSTILE}5"}))
    (run / "data.json").write_text(json.dumps({"source": f"{HOSTILE}6", "digests": {f"{HOSTILE}7": [HOSTILE]}}))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("project: null", f"project: {json.dumps(f'{HOSTILE}8')}"))
    for page in (report(run), report(run, tmp_path / "plain")):
        for number in range(1, 9):
            assert f"{HOSTILE}{number}" in page.text
        assert {tag for tag, _ in page.tags} <= plain | {"h3", "th", "i"}
        assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_page_asks_for_nothing_and_runs_nothing(tiny_run: Path) -> None:
    page = Page(tiny_run / "report.html")
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "a",
        "form",
    }
    assert not {name for _, attributes in page.tags for name in attributes} & {"src", "href", "srcset", "xlink:href"}
    assert not re.search(r"url\(|@import", page.style)
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"  # and a browser would not let it


# --- what is broken --------------------------------------------------------------------------------------------------


def spoil(run: Path, damage: str) -> None:
    """Break a copy of a run."""
    metrics, status = run / "metrics.jsonl", json.loads((run / "status.json").read_text())
    match damage:
        case "torn in the middle":
            lines = metrics.read_text().splitlines()
            metrics.write_text("\n".join(['{"step": 1, "train/lo', "[1]", '{"step": NaN}', *lines, '{"step": 9, "val']))
        case "no metrics":
            metrics.unlink()
        case "no validation":
            metrics.write_text('{"step": 4, "tokens": 512, "train/loss": 5.5, "train/tokens_per_second": 10}\n')
        case "odd figures":
            write_rows(
                run,
                {"step": 0, "tokens": 0, "train/loss": math.nan},
                {"step": 5, "train/loss": "low"},
                {"step": 5, "valid/loss": 1e308, "train/gradient_norm": 1e299},
                {"step": 10**400},
            )
            (run / "measures.json").write_text(
                '{"format": "textgen.measures.1", "human": {"length": 1' + "0" * 400 + '}, "generated": [1, {}]}'
            )
        case "running":
            (run / "status.json").write_text(json.dumps(status | {"state": "running", "step": 2}))
        case "failed":
            (run / "status.json").write_text(json.dumps(status | {"state": "failed", "reason": "the disk is full"}))
        case "only a status":
            for path in run.iterdir():
                if path.name != "status.json":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        case "no text":
            for name in ("config.yaml", "samples.md", "data.json", "environment.json", "status.json"):
                (run / name).write_bytes(b"\xff\xfe\x00{[")


DAMAGES = {
    "torn in the middle": "lines of metrics.jsonl that could not be read: 4",
    "no metrics": "There are no metrics.",
    "no validation": "5.5",
    "odd figures": "finished, at step 5",
    "running": "running, at step 4 of 4; last change 2",
    "failed": "failed, at step 4 of 4; because: the disk is full",
    "only a status": "There is no readable config.yaml.",
    "no text": "state unknown: no status.json, at step 4",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_run_has_a_report(damage: str, copy: Copy, tiny_run: Path) -> None:
    run = copy("run")
    spoil(run, damage)
    assert DAMAGES[damage] in report(run).text
    assert f"{run}: " in report(run, tiny_run).text


def test_report_that_cannot_be_written_is_a_warning(copy: Copy, caplog: pytest.LogCaptureFixture) -> None:
    run = copy("run")
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    with caplog.at_level(logging.WARNING, logger="textgen"):
        leave_report(run)
    assert [record.getMessage()[:16] for record in caplog.records] == ["no report.html: "]


WRONG = {
    "missing": (["nowhere"], "`nowhere` does not exist"),
    "a file": (["run/config.yaml"], "`run/config.yaml` is not a run folder"),
    "an empty folder": (
        ["empty"],
        "`empty` is not a run folder: it has no `config.yaml`, `metrics.jsonl` or `status.json`",
    ),
    "one of two": (["run", "nowhere"], "`nowhere` does not exist"),
    "another file": (["run", "--out", "run/config.yaml"], "`out` must end in `.html`: run/config.yaml"),
    "no such folder": (["run", "--out", "nowhere/page.html"], "`nowhere` is not a folder"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_ends_in_one_line(
    wrong: str, copy: Copy, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy("run")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    argv, message = WRONG[wrong]
    with pytest.raises(SystemExit) as end:
        main(["report", *argv])
    assert end.value.code == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_verb_says_where_the_report_is(copy: Copy, tmp_path: Path, capsys: Capture, monkeypatch: Any) -> None:
    copy("run"), copy("other")
    monkeypatch.chdir(tmp_path)
    for argv, path in (
        (["run"], "run/report.html"),
        (["run", "other"], "report.html"),
        (["run", "--out", "x.html"], "x.html"),
    ):
        Path(path).unlink(missing_ok=True)
        main(["report", *argv])
        assert capsys.readouterr().out == f"{path}\n"
        Page(Path(path))


def test_nothing_heavy_is_imported() -> None:
    heavy = ["torch", "accelerate", "numpy", "jinja2"]
    code = f"import sys, textgen.reporting.report; sys.exit(len({{*{heavy}}} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# --- charts ----------------------------------------------------------------------------------------------------------


def test_many_points_are_thinned_and_none_is_made_up() -> None:
    draw = random.Random(0)
    points = [(float(x), draw.random()) for x in range(100_000)]
    points[31_415] = (31_415.0, 7.0)
    kept = thin(points)
    assert len(kept) <= MOST_POINTS + 2
    assert set(kept) <= set(points)
    assert kept == sorted(kept)
    assert {points[0], points[-1], (31_415.0, 7.0), min(points, key=lambda point: point[1])} <= set(kept)
    assert thin(points[:MOST_POINTS]) == points[:MOST_POINTS]


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0, 8416, ["0", "2,000", "4,000", "6,000", "8,000"]),
        (1.58, 2.65, ["1.6", "1.8", "2.0", "2.2", "2.4", "2.6"]),
        (0, 0.003, ["0", "0.0005", "0.0010", "0.0015", "0.0020", "0.0025", "0.0030"]),
        (0, 32_000, ["0", "5k", "10k", "15k", "20k", "25k", "30k"]),
        (0, 2_500_000, ["0", "0.5M", "1.0M", "1.5M", "2.0M", "2.5M"]),
        (-1, 1, ["-1.0", "-0.5", "0", "0.5", "1.0"]),
        (0, 2e-6, ["0", "5e-07", "1e-06", "1.5e-06", "2e-06"]),
    ],
)
def test_ticks_are_round_and_short(low: float, high: float, texts: list[str]) -> None:
    found = ticks(low, high)
    assert [text for _, text in found] == texts
    assert all(low <= value <= high * (1 + 1e-9) for value, _ in found)


@pytest.mark.parametrize("points", [[(5.0, 2.0)], [(5.0, 0.0), (6.0, 0.0)], [(1.0, -1e9), (2.0, 1e-9)], [(1, 1e308)]])
def test_any_points_make_a_chart(points: list[tuple[float, float]]) -> None:
    chart = make_chart("", "", "", [ChartCurve(run=0, points=points)])
    assert chart is not None
    for place, _ in chart.x_ticks + chart.y_ticks:
        assert 0 <= place <= 1000
    assert all(0 <= chart.x(x) <= 1000 and 0 <= chart.y(y) <= 1000 for x, y in points)
    assert make_chart("", "", "", [ChartCurve(run=0, points=[])]) is None
