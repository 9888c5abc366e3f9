"""`textgen compare` on real runs, and on what is left of broken ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.forking import run_script
from textgen.cli import main

ROOT = Path(__file__).parents[2]

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="session")
def worse_run(tiny_flags: list[str], share: Callable[..., Path]) -> Path:
    """Return the directory of a tiny training that four steps at a high learning rate have spoilt."""
    flags = [*tiny_flags, "--learning_rate", "0.3", "--model.dropout", "0.1", "--log_every", "1"]

    def train(directory: Path) -> None:
        run_script("train_distributed.py", *flags, "--run_dir", str(directory / "worse"))

    return share("worse-run", train) / "worse"


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies the tiny run under a name."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(tiny_run, tmp_path / name))

    return make


def compare(capsys: Capture, *runs: Path) -> list[dict[str, Any]]:
    main(["compare", *map(str, runs), "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def write_rows(run_dir: Path, *values: dict[str, float]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))


# --- what it tells ---------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_files(tiny_run: Path, worse_run: Path, capsys: Capture) -> None:
    _, worse = compare(capsys, worse_run, tiny_run)
    made = rows(worse_run)
    assert worse["run"] == str(worse_run)
    assert (worse["state"], worse["step"], worse["total_steps"], worse["processes"]) == ("finished", 4, 4, 1)
    assert worse["bits_per_byte"] == worse["best_bits_per_byte"] == made[-1]["valid/bits_per_byte"]
    assert worse["valid_loss"] == made[-1]["valid/loss"]
    assert worse["train_loss"] == made[-2]["train/loss"]
    speeds = [row["train/tokens_per_second"] for row in made[:-1]]
    assert len(speeds) == 4
    assert worse["tokens_per_second"] == median(speeds)


def test_settings_are_those_that_differ(tiny_run: Path, worse_run: Path, capsys: Capture) -> None:
    better, worse = compare(capsys, tiny_run, worse_run)
    assert better["settings"] == {"learning_rate": 0.001, "log_every": 10, "model.dropout": 0.0}
    assert worse["settings"] == {"learning_rate": 0.3, "log_every": 1, "model.dropout": 0.1}
    (alone,) = compare(capsys, tiny_run)
    assert alone["settings"] == {}


def test_table_has_a_line_for_each_run_the_best_first(
    tiny_run: Path, worse_run: Path, copy: Callable[[str], Path], capsys: Capture
) -> None:
    begun = copy("begun")
    (begun / "metrics.jsonl").unlink()
    main(["compare", str(begun), str(worse_run), str(tiny_run)])
    out, err = capsys.readouterr()
    assert err == ""
    header, *lines = out.splitlines()
    assert [line.split()[0] for line in lines] == [str(tiny_run), str(worse_run), str(begun)]
    start = header.index("learning_rate")
    assert [line[start:].split()[0] for line in lines] == ["0.001", "0.3", "0.001"]
    start = header.index("bits/byte")
    final = f"{rows(tiny_run)[-1]['valid/bits_per_byte']:.4f}"
    assert [line[start:].split()[0] for line in (lines[0], lines[2])] == [final, "-"]


def test_narrow_terminal_gets_a_column_for_each_run(
    tiny_run: Path, worse_run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    main(["compare", str(worse_run), str(tiny_run)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", str(tiny_run), str(worse_run)]
    assert ["learning_rate", "0.001", "0.3"] in [line.split() for line in lines]


def test_best_is_the_lowest_and_order_that_of_the_last(copy: Callable[[str], Path], capsys: Capture) -> None:
    overfitted, steady = copy("overfitted"), copy("steady")
    write_rows(overfitted, {"step": 1, "valid/bits_per_byte": 1.0}, {"step": 2, "valid/bits_per_byte": 3.0})
    write_rows(steady, {"step": 1, "valid/bits_per_byte": 2.5}, {"step": 2, "valid/bits_per_byte": 2.0})
    told = [(run["bits_per_byte"], run["best_bits_per_byte"]) for run in compare(capsys, overfitted, steady)]
    assert told == [(2.0, 2.0), (3.0, 1.0)]


def test_minutes_add_up_over_all_rows(copy: Callable[[str], Path], capsys: Capture) -> None:
    """Ten seconds for the first 600 tokens, fifty for the other 1,000; evaluations have no speed."""
    run = copy("run")
    write_rows(
        run, {"step": 1, "tokens": 600, "train/tokens_per_second": 60.0}, {"step": 1, "valid/loss": 1.0},
        {"step": 2, "tokens": 1600, "train/tokens_per_second": 20.0},
    )  # fmt: skip
    assert compare(capsys, run)[0]["minutes"] == pytest.approx(1.0)


def test_shares_of_time_are_of_all_rows(copy: Callable[[str], Path], capsys: Capture) -> None:
    """100 s: steps of 60 s and 20 s, of which 4 s and 8 s waited; 15 s of evaluations, 5 s of saves."""
    run = copy("run")
    first = {"step": 1, "tokens": 600, "train/tokens_per_second": 10.0, "train/data_share": 0.05}
    second = {"step": 2, "tokens": 800, "train/tokens_per_second": 10.0, "train/data_share": 0.2}
    first |= {"train/evaluate_share": 0.2, "train/save_share": 0.05, "train/exchange_share": 0.25}
    second |= {"train/evaluate_share": 0.45, "train/save_share": 0.05, "train/exchange_share": 0.1}
    pauses = {"step": 2, "evaluate/pause_seconds": 15.0}, {"step": 2, "checkpoint/pause_seconds": 5.0}
    write_rows(run, first, second, *pauses)
    (told,) = compare(capsys, run)
    assert told["data_share"] == pytest.approx((60 / 0.75 * 0.05 + 20 / 0.5 * 0.2) / 100)
    assert told["exchange_share"] == pytest.approx((60 / 0.75 * 0.25 + 20 / 0.5 * 0.1) / 100)
    assert (told["evaluate_share"], told["save_share"]) == pytest.approx((0.15, 0.05))
    main(["compare", str(run)])
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[-4:] == ["data", "exchange", "evaluate", "save"]
    assert line.split()[-4:] == ["12.0%", "24.0%", "15.0%", "5.0%"]


def test_precision_that_hardware_decided_is_told(copy: Callable[[str], Path], capsys: Capture) -> None:
    """config.yaml has the same null in both."""
    for name in ("one", "other"):
        run = copy(name)
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("mixed_precision: 'no'", "mixed_precision: null"))
    trainer = run / "checkpoints" / "step-000004" / "trainer.json"
    trainer.write_text(json.dumps(json.loads(trainer.read_text()) | {"mixed_precision": "bf16"}))
    told = {Path(row["run"]).name: row["settings"] for row in compare(capsys, run.with_name("one"), run)}
    assert told == {"one": {"mixed_precision": "no"}, "other": {"mixed_precision": "bf16"}}


def test_setting_younger_than_a_run_had_its_default(copy: Callable[[str], Path], capsys: Capture) -> None:
    old, new = copy("old"), copy("new")
    lines = (old / "config.yaml").read_text().splitlines()
    (old / "config.yaml").write_text("\n".join(line for line in lines if not line.startswith("keep_last:")))
    assert [run["settings"] for run in compare(capsys, old, new)] == [{}, {}]


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, textgen.reporting.compare; sys.exit(len({'torch', 'accelerate', 'numpy'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# --- what is broken --------------------------------------------------------------------------------------------------


def spoil(run: Path, damage: str) -> None:
    """Break a copy of a run."""
    match damage:
        case "missing":
            shutil.rmtree(run)
        case "a file":
            shutil.rmtree(run)
            run.write_text("notes")
        case "no config":
            (run / "config.yaml").unlink()
        case "config is no YAML":
            (run / "config.yaml").write_text("a: [")
        case "config is no mapping":
            (run / "config.yaml").write_text("- 1\n")
        case "metrics are no text":
            (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n{}\n")
        case "metrics are no rows":
            (run / "metrics.jsonl").write_text("1\n2\n")


DAMAGES = {
    "missing": "does not exist",
    "a file": "is not a run folder",
    "no config": "config.yaml` cannot be read: No such file",
    "config is no YAML": "config.yaml` is not YAML",
    "config is no mapping": "config.yaml` holds no settings",
    "metrics are no text": "metrics.jsonl` line 1 is not JSON",
    "metrics are no rows": "metrics.jsonl` line 1 is not a row of metrics",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_run_is_told_in_a_line_and_the_others_are_compared(
    damage: str, copy: Callable[[str], Path], tiny_run: Path, capsys: Capture
) -> None:
    broken = copy("broken")
    spoil(broken, damage)
    main(["compare", str(broken), str(tiny_run)])
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["run", str(tiny_run)]
    assert len(err.splitlines()) == 1
    assert f"`{broken}" in err
    assert DAMAGES[damage] in err


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_to_compare_is_an_error(damage: str, copy: Callable[[str], Path], capsys: Capture) -> None:
    broken = copy("broken")
    spoil(broken, damage)
    with pytest.raises(SystemExit) as end:
        main(["compare", str(broken)])
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert DAMAGES[damage] in err


def test_last_row_cut_off_by_a_kill_is_left_out(copy: Callable[[str], Path], capsys: Capture) -> None:
    run = copy("run")
    whole = compare(capsys, run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')
    assert compare(capsys, run) == whole


def test_figures_that_are_none_are_left_out(copy: Callable[[str], Path], capsys: Capture) -> None:
    """A run whose other files are damaged or gone is still told of, and stands behind one with figures."""
    whole, odd = copy("whole"), copy("odd")
    shutil.rmtree(odd / "checkpoints")
    (odd / "status.json").write_text("not JSON")
    (odd / "metrics.jsonl").write_text(
        '{"step": 3, "tokens": 0, "train/loss": "low", "train/tokens_per_second": 0}\n'
        f'{{"step": 3, "train/loss": true, "valid/loss": {"9" * 400}}}\n'
        '{"step": 4, "valid/loss": NaN, "valid/bits_per_byte": NaN}\n'
    )
    last = compare(capsys, odd, whole)[1]
    assert last.pop("run") == str(odd)
    assert last.pop("step") == 4
    assert set(map(str, last.values())) <= {"None", "{}", "0.0", "0"}, last
