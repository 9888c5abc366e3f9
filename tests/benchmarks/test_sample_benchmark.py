"""What `python -m benchmarks.sample` runs, with a tiny model."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import machine, sample


def measure(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sample", str(checkpoint), "--rounds", "1", *flags])
    sample.main()


def test_whole_commands_are_measured_to_their_first_text_and_to_their_end(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    measure(tiny_run, monkeypatch, "--whole", "--cases", "one token", "--threads", "1")
    figures = json.loads((tmp_path / "sample_whole.json").read_text())["figures"][f"{tiny_run.name}, whole, 1 threads"]
    one, imports = figures["one token"]["textgen"], figures["import torch"]["textgen"]
    for part in (one, imports):
        assert 0 < part["first"]["median"] <= part["end"]["median"]
        assert part["processor"]["median"] > 0
    beyond = one["first"]["median"] - imports["first"]["median"]
    assert one["first, beyond torch"]["median"] == pytest.approx(beyond, abs=0.002)


def test_the_commands_of_whole_draw_what_their_names_say(tiny_run: Path, tmp_path: Path) -> None:
    commands = sample.whole_commands(str(tiny_run), tmp_path, 5)
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    assert len({json.loads(line)["prompt"] for line in lines}) == len(lines) == 5
    seconds = sample.time_command(commands["prompts"], sample.HERE, 1)
    assert 0 < seconds["first"] <= seconds["end"]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [drawn["num_tokens"] for drawn in samples] == [20] * 5


def test_a_command_that_fails_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="the reason"):
        sample.time_command([sys.executable, "-c", "raise SystemExit('the reason')"], sample.HERE, 1)


def test_every_kind_draws_as_many_tokens_as_are_counted(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "LENGTHS", {2: 60})
    monkeypatch.setattr(sample, "PLAIN_LENGTHS", {2: 60})
    drawn: list[int] = []

    def note(draw: Callable[..., None]) -> Callable[..., None]:
        def noted(kind: str, checkpoint: str, rows: int, length: int) -> None:
            draw(kind, checkpoint, rows, length)
            drawn.append(length)

        return noted

    for name in ("draw_by_textgen", "draw_plainly"):
        monkeypatch.setattr(sample, name, note(getattr(sample, name)))
    for kind in ("textgen", "plain"):
        sample.seconds_per_token(kind, str(tiny_run), 2, time.perf_counter)
    assert drawn == [40, 1, 60] * 2


def test_figures_of_other_models_stay_if_machine_and_commit_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    for model in ("a", "b"):
        machine.save("sample", {model: 1}, beside=True)
    assert machine.load("sample") == {"a": 1, "b": 1}
    monkeypatch.setattr(machine, "describe", lambda: {"commit": "another"})
    machine.save("sample", {"c": 1}, beside=True)
    assert machine.load("sample") == {"c": 1}
