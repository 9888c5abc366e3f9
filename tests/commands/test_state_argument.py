"""`textgen sample --save_state` and `--state`: a long prompt is read once, and the texts are those of the whole."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from tests.forking import run_script
from textgen.cli import main

FIRST = "Nobody warned me: the plot was honest and the hero " * 50 + "wa"
SECOND = "s boring, really"
SETTINGS = ["--num_samples", "2", "--repetition_penalty", "1.3", "--no_repeat_ngram", "3", "--max_new_tokens", "25"]
EXACT = [*SETTINGS, "--json", "--logprobs", "1"]  # the model is so young that a wrong state seldom changes a text


def out(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    main(["sample", *argv])
    return capsys.readouterr().out


@pytest.mark.parametrize("decoder", ["plain", "int8"])
def test_halves_in_two_processes_equal_the_whole(tiny_run: Path, tmp_path: Path, decoder: str) -> None:
    """The cut is inside a token, the penalties count tokens of both halves."""
    (tmp_path / "long.txt").write_text(FIRST)
    state = str(tmp_path / "s.safetensors")
    command = ["-m", "textgen", "sample", str(tiny_run), "--decoder", decoder]
    kept = ["--save_state", state, "--num_samples", "0"]
    run_script(*command, "--prompt_file", str(tmp_path / "long.txt"), *kept)
    second = run_script(*command, "--state", state, "--prompt", SECOND, *EXACT)
    whole = run_script(*command, "--prompt", FIRST + SECOND, *EXACT)
    assert "reused 1,536 tokens\n" in second.stderr
    assert second.stdout == whole.stdout.replace(FIRST, "")
    assert second.stdout.count(f'"prompt": "{SECOND}"') == 2


def test_a_command_samples_the_prompt_whose_state_it_keeps(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Also after a state; the kept one is that of both texts."""
    run, one, two = str(tiny_run), str(tmp_path / "one"), str(tmp_path / "two")
    with caplog.at_level(logging.INFO):
        assert out(capsys, run, "--prompt", FIRST, "--save_state", one) == out(capsys, run, "--prompt", FIRST)
    assert f"`{one}` saves the reading of 1,536 of " in caplog.text
    whole = out(capsys, run, "--prompt", FIRST + SECOND, *SETTINGS)
    exact = out(capsys, run, "--prompt", FIRST + SECOND, *EXACT)
    both = out(capsys, run, "--state", one, "--prompt", SECOND, "--save_state", two, *SETTINGS)
    assert both == whole.replace(FIRST, "")
    assert out(capsys, run, "--state", two, "--prompt", "", *SETTINGS) == whole.replace(FIRST + SECOND, "")
    assert out(capsys, run, "--state", two, "--prompt", "", *EXACT) == exact.replace(FIRST + SECOND, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_batch_file_continues_a_state(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal prompts are counted, and a file that was begun without the state is not continued with it."""
    run, state, samples = str(tiny_run), str(tmp_path / "s"), tmp_path / "samples.jsonl"
    out(capsys, run, "--prompt", FIRST, "--save_state", state, "--num_samples", "0")
    (tmp_path / "prompts").write_text(f'{{"prompt": "{SECOND}"}}\n{{"prompt": " "}}\n{{"prompt": "{SECOND}"}}\n')
    batch = ["--batch_file", str(tmp_path / "prompts"), "--out", str(samples), "--max_new_tokens", "12"]
    out(capsys, run, "--state", state, *batch)
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [SECOND, " ", SECOND]
    printed = out(capsys, run, "--prompt", FIRST + SECOND, "--num_samples", "2", "--max_new_tokens", "12", "--json")
    assert [rows[i]["text"] for i in (0, 2)] == [json.loads(line)["text"] for line in printed.splitlines()]
    (tmp_path / "prompts").write_text(f'{{"prompt": "{SECOND}"}}\n')
    samples.unlink()
    out(capsys, run, "--state", state, *batch)
    with pytest.raises(SystemExit):
        out(capsys, run, *batch)
    assert "was started with other settings: name another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "a", "--prompt", "b", "--save_state", "s"], "`save_state` needs a single prompt: 2"),
        (["--prompt", "", "--save_state", "s"], "`--prompt` is empty: there is nothing to read for `save_state`"),
        (["--batch_file", "b", "--out", "o", "--save_state", "s"], "`save_state` cannot be combined with `batch_file`"),
        (["--prompt", "a", "--save_state", "nowhere/s"], "`nowhere/s` cannot be written: it is a folder, or its"),
        (["--prompt", "a", "--save_state", "."], "`.` cannot be written: it is a folder, or its folder does not"),
        (["--prompt", "a", "--save_state", "pipe"], "`pipe` is not a file"),
        (["--prompt", "a", "--num_samples", "0"], "`num_samples` must be at least 1: 0"),
        (
            ["--prompt", "a", "--save_state", "s", "--num_samples", "0", "--best_of", "2"],
            "`best_of` cannot be combined",
        ),
        (["--prompt", "a", "--state", "nowhere"], "`nowhere` cannot be read: No such file or directory"),
        (["--prompt", "a", "--state", "b"], "`b` is not a tensor file of textgen"),
    ],
)
def test_wrong_flags_are_refused_in_a_line(
    tiny_run: Path,
    tmp_path: Path,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "b").write_text('{"prompt": "a"}\n')
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")  # as a device, nothing that a file may replace
    with pytest.raises(SystemExit) as ended:
        out(capsys, str(tiny_run.resolve()), *flags)
    assert Path("pipe").is_fifo()
    assert ended.value.code == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith(f"error: {message}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "pipe"]
