"""A training on a store in shards: resumed bit for bit, read by every command, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.test_training import (
    RESUMABLE,
    assert_same_bits,
    flags_for,
    newest,
    refusal,
    steps_and_losses,
)
from textgen.cli import main, train_main


@pytest.fixture
def in_shards(tiny_flags: list[str]) -> list[str]:
    return [*tiny_flags, "--data.shards", "5"]


def test_resume_in_a_shard_equals_the_uninterrupted_run(in_shards: list[str], tmp_path: Path) -> None:
    """Stops inside of shards, and the run crosses the end of an epoch."""
    flags = [*RESUMABLE, "--seq_len", "32", "--batch_size", "16"]
    train_main(flags_for(in_shards, tmp_path / "whole", *flags, "--max_steps", "80"))
    for stop in ("5", "23", "80"):
        train_main(flags_for(in_shards, tmp_path / "parts", *flags, "--max_steps", stop))
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    assert steps_and_losses(tmp_path / "whole") == steps_and_losses(tmp_path / "parts")
    trainer = json.loads((newest(tmp_path / "whole") / "trainer.json").read_text())
    assert trainer["order"] == "shards"
    assert trainer["progression"]["epoch_tokens"] != 80 * 32 * 16, "the run should cross an epoch's end"


def test_another_order_is_not_resumed(
    tiny_flags: list[str], in_shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_main(flags_for(in_shards, tmp_path / "run", "--max_steps", "2"))
    assert "`data.shards` is None" in refusal(flags_for(tiny_flags, tmp_path / "run", "--max_steps", "4"), capsys)
    other = flags_for([*tiny_flags, "--data.shards", "4"], tmp_path / "run", "--max_steps", "4")
    assert "`data.shards` is 4" in refusal(other, capsys)


def test_commands_read_a_store_in_shards(
    in_shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train_main(flags_for(in_shards, run, "--max_steps", "2"))
    data = [*in_shards[: in_shards.index("--data.shards")]]
    capsys.readouterr()
    main(["prepare", *data, "--shards", "5"])
    store = capsys.readouterr().out.strip()
    assert json.loads((Path(store) / "store.json").read_text())["order"] == "shards"
    main(["evaluate", str(run), "--data", "train", "--limit", "7"])
    assert ["documents", "7"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    main(["measure", str(run), "--texts", "4", "--words", "8", "--max_new_tokens", "60", "--temperatures", "1"])
    assert "copied" in capsys.readouterr().out
    main(["doctor", *in_shards])
    assert store in capsys.readouterr().out
    train_main(flags_for(data, tmp_path / "by-name", "--max_steps", "2", "--data.store", store))
    assert_same_bits(run, tmp_path / "by-name")


@pytest.mark.parametrize("shards", ["0", "-3", "many", "1.5", "100000"])
def test_a_wrong_number_of_shards_is_refused_in_one_line(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str], shards: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["prepare", *tiny_flags, f"--shards={shards}"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "shards" in line
    assert shards in line
