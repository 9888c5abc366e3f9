"""`textgen tune`: searches of a few seconds, one that is killed, and what is refused."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Share
from tests.forking import server
from textgen.cli import main
from textgen.commands.parsing import parse_train_config
from textgen.commands.tune import build_tune_parser, describe, found_flags, split_flags
from textgen.config import TrainConfig
from textgen.data.store import prepare_store
from textgen.runs.lock import FileLock
from textgen.training import tuning
from textgen.training.tuning import Outcome, Plan, Request, Result

SEARCH = ["--steps", "600", "--learning_rate", "3e-4", "--max_steps", "400"]


def flags_of(tiny_flags: list[str], directory: Path, *more: str) -> list[str]:
    """Return the flags of a search of 10, 30 and 90 steps."""
    return [*tiny_flags, *SEARCH, "--tune_dir", str(directory), *more]


def content(directory: Path) -> dict[str, Any]:
    """Return tune.json without what differs from one time to the next."""
    found: dict[str, Any] = json.loads((directory / "tune.json").read_text())
    for training in [found["best"], *found["trainings"]]:
        del training["seconds"]
    return found


@pytest.fixture
def searched(tiny_flags: list[str], share: Share) -> Path:
    """Return the folder of a finished search; do not change what is in it."""
    return share("tune", lambda directory: main(["tune", *flags_of(tiny_flags, directory)]))


def test_a_search_finds_a_rate_that_learns_more(searched: Path) -> None:
    found = content(searched)
    assert found["plan"]["rungs"] == {"8": [10, 30, 90]}
    own, best = found["trainings"][0], found["best"]
    assert (own["learning_rate"], own["steps"]) == (3e-4, 10)
    assert best["steps"] == 90
    assert best["learning_rate"] > 3e-3
    at = {
        steps: {
            training["trial"]: training["valid_loss"] for training in found["trainings"] if training["steps"] == steps
        }
        for steps in (10, 30, 90)
    }
    assert len(at[10]) > 6, "Optuna proposes others after the first ones"
    assert at[10][best["trial"]] < at[10][0]
    first = range(6)
    assert set(first) & set(at[30]) == set(sorted(first, key=at[10].__getitem__)[:3]), "the best half goes on"
    assert set(first) & set(at[90]) == {min(set(first) & set(at[30]), key=at[30].__getitem__)}
    assert best["valid_loss"] == min(at[90].values())
    assert sum(training["steps"] for training in found["trainings"]) <= 600


def test_a_killed_search_goes_on_as_if_it_had_not_been(tiny_flags: list[str], searched: Path, tmp_path: Path) -> None:
    directory, output = tmp_path / "tune", tmp_path / "output"
    argv = ["-m", "textgen", "tune", *flags_of(tiny_flags, directory)]
    running = server().start(argv, output=output, error=output)
    while not (directory / "trial-04-steps-10").exists():
        assert running.poll() is None, output.read_text()
        time.sleep(0.01)
    running.kill()
    running.wait()
    done = {path: path.stat().st_mtime_ns for path in directory.glob("trial-*/trial.json")}
    assert len(done) >= 4
    main(["tune", *flags_of(tiny_flags, directory)])
    assert {path: path.stat().st_mtime_ns for path in done} == done, "nothing is trained twice"
    assert content(directory) == content(searched)
    assert not list(directory.glob("*/checkpoints"))


def test_a_finished_search_prints_its_table_again(
    tiny_flags: list[str], searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(searched)
    main(["tune", *flags_of(tiny_flags, searched)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "trial", "learning_rate", "batch_size", "10", "steps", "30", "steps", "90", "steps", "seconds",
    ]  # fmt: skip
    assert lines[1].split()[:2] == [str(before["best"]["trial"]), f"{before['best']['learning_rate']:g}"]
    assert any(line.startswith("The planned training has 400 steps, and these had 22% of them.") for line in lines)
    command = shlex.split(lines[-1])
    assert command[:2] == ["textgen", "train"]
    assert parse_train_config(command[2:]).learning_rate == before["best"]["learning_rate"]
    main(["tune", *flags_of(tiny_flags, searched, "--json")])
    assert json.loads(capsys.readouterr().out)["best"]["trial"] == before["best"]["trial"]
    assert content(searched) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps", "900"], "another steps: 600, now 900"),
        (["--seed", "7"], "another seed: 42, now 7"),
        (["--learning_rates", "1e-4", "1"], "another learning_rates: [0.0001, 0.1], now [0.0001, 1.0]"),
        (["--data.validation_fraction", "0.2"], "another data.validation_fraction: 0.1, now 0.2"),
    ],
)
def test_another_search_does_not_go_on_in_the_same_folder(
    more: list[str], said: str, tiny_flags: list[str], searched: Path, refused: Callable[..., str]
) -> None:
    line = refused(*flags_of(tiny_flags, searched, *more))
    assert line == f"`{searched}` holds a search with {said}; give another `--tune_dir`"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that returns the line that refuses a search."""

    def run(*flags: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["tune", *flags])
        said = capsys.readouterr()
        assert (end.value.code, said.out) == (2, "")
        (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert said.err.endswith(f"{line}\n")
        return line.removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "`textgen tune` wants a budget: either `--minutes` or `--steps`"),
        (["--minutes", "1", "--steps", "9"], "`textgen tune` wants a budget: either `--minutes` or `--steps`"),
        (["--minutes", "0"], "`minutes` must be a finite number above 0: 0.0"),
        (["--steps", "ten"], "`steps` must be an integer or null: ten"),
        (["--steps", "9", "--learning_rates", "0.1", "0.01"], "`learning_rates` must be a lower and a higher rate, "
         "both above 0: 0.1 0.01"),
        (["--steps", "9", "--learning_rate", "0.5"], "`learning_rate` 0.5 is outside of `--learning_rates 0.0001 0.1`: "
         "it is the first that is tried"),
        (["--steps", "9", "--batch_sizes", "6", "--gradient_accumulation_steps", "4"], "`batch_sizes` must be above 0 "
         "and divisible by 4 gradient_accumulation_steps: 6"),
        (["--steps", "9", "--dry_run"], "`dry_run` is for a training; `textgen tune` takes many"),
        (["--steps", "9", "--resume", "never"], "`resume` is for a training; `textgen tune` starts each at step 0: "
         "never"),
        (["--steps", "9", "--lerning_rate", "1"], "unknown setting `lerning_rate`; the nearest is `learning_rate`"),
        (["--steps", "9", "quick"], "unexpected argument `quick`"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_refused_in_a_line(flags: list[str], said: str, refused: Callable[..., str]) -> None:
    assert refused(*flags) == said


def test_a_launcher_of_several_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    assert refused("--steps", "9") == (
        "`textgen tune` runs in one process, and a launcher started 2: a rate holds for any number of processes, as "
        "the batch is global"
    )


def test_a_budget_that_is_too_small_leaves_nothing(
    tiny_flags: list[str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    line = refused(*flags_of(tiny_flags, tmp_path / "tune", "--steps", "599", "--batch_sizes", "16"))
    assert line == (
        "`steps` 599 and a training of 400 steps leave 5 steps of batch_size 16 for the shortest trial, which needs 10"
    )
    assert list(tmp_path.iterdir()) == []


def test_text_without_validation_is_refused(tiny_flags: list[str], tmp_path: Path, refused: Callable[..., str]) -> None:
    line = refused(*flags_of(tiny_flags, tmp_path / "tune", "--data.validation_fraction", "0"))
    assert line == "a trial is scored on the validation split, and the data has none"


def test_a_search_from_the_weights_of_a_model_has_its_shape(
    tiny_flags: list[str], tiny_run: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """Also if `run_dir` holds another run, whose shape counts for a training that goes on."""
    base = ["--init_from", str(tiny_run), "--run_dir", str(tiny_run)]
    line = refused(*flags_of(tiny_flags, tmp_path, *base, "--model.hidden_size", "48"))
    assert line.startswith(f"`model.hidden_size` 48 differs from 32 of `{tiny_run}`")


def test_a_folder_in_use_is_refused(tiny_flags: list[str], tmp_path: Path, refused: Callable[..., str]) -> None:
    lock = FileLock(tmp_path / ".lock")
    assert lock.acquire(seconds=0)
    with lock.hold():
        assert refused(*flags_of(tiny_flags, tmp_path)) == f"`{tmp_path}` is in use by another process"


def test_rates_that_diverge_are_results(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--learning_rates", "1e-3", "1e38", "--learning_rate", "0.01"]
    main(["tune", *flags_of(tiny_flags, tmp_path, *flags)])
    found = content(tmp_path)
    diverged = [training for training in found["trainings"] if training["diverged"] is not None]
    assert diverged
    assert all("turned to nan or infinity" in training["diverged"] for training in diverged)
    assert {training["steps"] for training in diverged} == {10}, "none of them goes on"
    assert found["best"]["diverged"] is None
    assert "diverged" in capsys.readouterr().out


# --- parts -----------------------------------------------------------------------------------------------------------


def test_flags_of_search_and_training_may_be_mixed() -> None:
    argv = ["--config", "quick", "--learning_rates", "1e-4", "1", "--data.files", "a", "b", "--json", "--minutes=3"]
    own, others = split_flags(argv, build_tune_parser())
    assert own == ["--learning_rates", "1e-4", "1", "--json", "--minutes=3"]
    assert others == ["--config", "quick", "--data.files", "a", "b"]


def result(trial: int, rung: int, loss: float | None, rate: float = 0.01, batch_size: int = 8) -> Result:
    return Result(
        trial=trial, rung=rung, steps=10 * 3**rung, learning_rate=rate, batch_size=batch_size, valid_loss=loss,
        bits_per_byte=None, diverged=None if loss else "the loss turned to nan", seconds=1.0, suggested={},
    )  # fmt: skip


def outcome(*results: Result, total: int = 90, sizes: tuple[str, ...] = ("8",)) -> Outcome:
    rungs = {size: [10, 30, 90] for size in sizes}
    return Outcome(Plan(rungs=rungs, costs=[10, 30, 90], total_steps=total, documents=3), list(results))


def test_the_best_is_of_the_longest_trainings() -> None:
    made = outcome(result(0, 0, 3.0), result(1, 0, 2.5), result(1, 1, 2.4), result(2, 1, 2.2), result(1, 2, 2.3))
    assert made.found == result(1, 2, 2.3)
    assert outcome(result(0, 0, 3.0), result(0, 1, None)).found == result(0, 0, 3.0)
    assert outcome(result(0, 0, None)).found is None


def test_found_values_take_the_place_of_given_ones() -> None:
    flags = ["--learning_rate", "1", "--data.files", "a b", "--learning_rate=2", "--batch_size", "8", "--seed", "3"]
    one = outcome(result(0, 0, 2.0, rate=0.00123, batch_size=16))
    assert found_flags(one, flags) == [
        "--data.files", "a b", "--batch_size", "8", "--seed", "3", "--learning_rate", "0.00123",
    ]  # fmt: skip
    both = outcome(result(0, 0, 2.0, rate=0.00123, batch_size=16), sizes=("8", "16"))
    assert found_flags(both, flags)[-4:] == ["--learning_rate", "0.00123", "--batch_size", "16"]


def test_settings_that_no_trial_has_do_not_make_another_search(tiny_flags: list[str], tmp_path: Path) -> None:
    def record(*flags: str) -> dict[str, Any]:
        config = parse_train_config([*tiny_flags, *flags])
        request = Request(
            config=config, directory=tmp_path, minutes=None, steps=600, learning_rates=(1e-4, 0.1), batch_sizes=(8,)
        )
        return request.record(prepare_store(config.data, config.tokenizer))

    replaced = ["--tracking.mode", "offline", "--sample_prompts", "The", "--save_every", "3", "--keep_last", "7"]
    assert record(*replaced, "--evaluate_every", "9", "--early_stopping_patience", "2") == record()
    assert record("--evaluate_documents", "9") != record()
    assert record("--warmup_steps", "9") != record()


def test_a_search_over_whole_trainings_warns_of_nothing() -> None:
    said = "\n".join(describe(outcome(result(0, 0, 3.0), result(0, 1, 2.9), result(0, 2, 2.8)), "COMMAND"))
    assert "planned training" not in said
    assert said.endswith("COMMAND")
    assert "all trainings diverged" in "\n".join(describe(outcome(result(0, 0, None)), "COMMAND"))


def test_batch_sizes_get_equal_tokens_or_equal_seconds(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_train_config([*tiny_flags, "--max_steps", "1000000", "--max_epochs", "100000"])
    store = prepare_store(config.data, config.tokenizer)
    same: dict[str, Any] = {"config": config, "directory": tmp_path, "learning_rates": (1e-4, 0.1)}
    steps = Request(minutes=None, steps=6000, batch_sizes=(4, 8), **same)
    assert tuning._plan(steps, store).rungs == {"4": [200, 600, 1800], "8": [100, 300, 900]}

    def time_of(config: TrainConfig, _: object) -> float:
        return {4: 0.01, 8: 0.015}[config.batch_size]

    monkeypatch.setattr(tuning, "_time", time_of)
    minutes = Request(minutes=1.0, steps=None, batch_sizes=(4, 8), **same)
    plan = tuning._plan(minutes, store)
    assert plan.rungs == {"4": [100, 300, 900], "8": [67, 200, 600]}
    assert sum(plan.costs) == pytest.approx(13, rel=0.01)  # of 60 seconds: 20 first rungs take a third


def test_steps_are_timed_without_a_trace(tiny_flags: list[str], tmp_path: Path) -> None:
    config = parse_train_config([*tiny_flags, "--run_dir", str(tmp_path / "run")])
    before = torch.random.get_rng_state()
    assert tuning._time(config, prepare_store(config.data, config.tokenizer)) > 0
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(tmp_path.iterdir()) == []


def test_the_horizon_is_that_of_the_training(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_time", lambda *_: 0.01)

    def total(*flags: str) -> int:
        config = parse_train_config([*tiny_flags, *flags])
        request = Request(
            config=config, directory=tmp_path, minutes=5.0, steps=None, learning_rates=(1e-4, 0.1), batch_sizes=(8,)
        )
        plan = tuning._plan(request, prepare_store(config.data, config.tokenizer))
        assert plan.rungs["8"][-1] == min(plan.total_steps, 4500)
        return plan.total_steps

    assert total("--max_steps", "100") == 100
    assert total("--max_steps", "90000", "--max_epochs", "90000", "--max_minutes", "1") == 6000
    assert total("--max_steps", "null", "--max_epochs", "4") == 4 * total("--max_steps", "null", "--max_epochs", "1")
