"""A run that textgen 0.1.0 left half done: today's code verifies, loads, evaluates, shows and resumes it."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from textgen.cli import main
from textgen.model.files import load_model
from textgen.reporting.compare import read_settings
from textgen.reporting.report import read_run_files
from textgen.runs.checkpoint import checkpoints
from textgen.runs.metrics_file import read_metrics

pytestmark = pytest.mark.usefixtures("any_precision")

Capture = pytest.CaptureFixture[str]

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0_1"
EXPECTED = json.loads((OLD_RUN / "expected.json").read_text())

# Float32 sums depend on the processor in the last bits; a state that is not restored changes losses far more.
TOLERANCE = 1e-5


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the run in the current folder, as it was when the run was made: its paths are relative."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(OLD_RUN, Path("run_of_0_1"))


def losses(run_dir: Path, name: str, after: int) -> dict[int, float]:
    return {row["step"]: row[name] for row in read_metrics(run_dir) if name in row and row["step"] > after}


def expected(name: str, after: int) -> dict[int, float]:
    return {int(step): loss for step, loss in EXPECTED[name].items() if int(step) > after}


def test_checkpoints_of_0_1_are_valid(old_run: Path, capsys: Capture) -> None:
    main(["verify", str(old_run), "--json"])
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["step"], one["valid"], one["best_step"], one["finished"]) for one in told] == [
        (4, True, 3, False),
        (3, True, 3, False),
    ]
    assert [path.name for _, path in checkpoints(old_run)] == ["step-000004", "step-000003"]


def test_a_model_of_0_1_continues_a_prompt_as_then(old_run: Path, capsys: Capture) -> None:
    model, tokenizer = load_model(old_run / "checkpoints" / "step-000004", "cpu")
    assert tokenizer.decode(tokenizer.encode("The plot")) == "The plot"
    assert (model.config.num_layers, model.config.hidden_size, model.config.weight_drop) == (2, 16, 0.1)
    main(["sample", str(old_run), *EXPECTED["sample"]])
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == EXPECTED["samples"]


def test_a_model_of_0_1_is_evaluated_on_the_split_it_names(old_run: Path, reviews_file: Path, capsys: Capture) -> None:
    shutil.copy(reviews_file, "reviews.jsonl")
    main(["evaluate", str(old_run), "--data", "validation", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert {name: told[name] for name in EXPECTED["evaluation"]} == pytest.approx(EXPECTED["evaluation"], rel=TOLERANCE)


def test_a_training_of_0_1_resumes_as_if_never_stopped(old_run: Path, reviews_file: Path) -> None:
    """The text has another path now: a resume compares what is in it. Step 4 was not in a row of metrics yet."""
    main([
        "train", "--config", str(old_run / "config.yaml"), "--data.files", str(reviews_file),
        "--log_every", "1",
    ])  # fmt: skip
    wanted: dict[int, Any] = expected("train/loss", after=4)
    wanted[5] = (EXPECTED["train/loss"]["4"] + EXPECTED["train/loss"]["5"]) / 2
    assert list(wanted) == [5, 6, 7, 8]
    assert losses(old_run, "train/loss", after=3) == pytest.approx(wanted, rel=TOLERANCE)
    assert losses(old_run, "valid/loss", after=3) == pytest.approx(expected("valid/loss", after=4), rel=TOLERANCE)
    assert json.loads((old_run / "status.json").read_text())["state"] == "finished"
    assert checkpoints(old_run)[0][0] == 8


@pytest.mark.parametrize("in_another_run", [False, True])
def test_a_training_of_0_1_goes_on_by_the_reading_rules_of_then(
    old_run: Path, reviews_file: Path, in_another_run: bool
) -> None:
    """0.1 took `Test Pilot.txt` for the test split, and read no compressed file."""
    Path("texts").mkdir()
    shutil.copy(reviews_file, "texts/reviews.jsonl")
    Path("texts/Test Pilot.txt").write_text("A test pilot flies.")
    Path("texts/more.txt.gz").write_bytes(gzip.compress(b"More text."))
    flags = ["--config", str(old_run / "config.yaml"), "--data.files", "texts", "--max_steps", "5"]
    flags += ["--lr_schedule", "constant", "--warmup_steps", "0", "--resume_override"] if not in_another_run else []
    flags += ["--max_steps", "8", "--run_dir", "other", "--resume", str(old_run)] if in_another_run else []
    main(["train", *flags])
    run = Path("other") if in_another_run else old_run
    trainer = json.loads((checkpoints(run)[0][1] / "trainer.json").read_text())
    assert trainer["data"] == json.loads((OLD_RUN / "checkpoints/step-000004/trainer.json").read_text())["data"]
    assert trainer["config"]["data"]["reading_rules"] == 1
    assert json.loads((run / "data.json").read_text())["counts"]["test_documents"] == 1


def test_settings_of_0_1_are_shown_with_the_reading_rules_of_then(old_run: Path) -> None:
    assert read_settings(old_run / "config.yaml")["data.reading_rules"] == 1
    assert read_run_files(old_run, "old").summary.settings["data.reading_rules"] == 1


def test_a_run_of_0_1_is_read_by_the_report(old_run: Path) -> None:
    run = read_run_files(old_run, "old")
    assert (run.summary.state, run.summary.reason, run.summary.step) == ("preempted", "SIGTERM", 3)
    assert run.summary.valid_loss == pytest.approx(EXPECTED["valid/loss"]["3"], rel=TOLERANCE)
    assert {sample.step for sample in run.samples} == {3}
    assert run.num_damaged == 0
    assert run.summary.settings["model.hidden_size"] == 16
