"""What people see: a calm display in a real terminal, and whole lines of text everywhere else."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pyte
import pytest
from accelerate.state import AcceleratorState

from textgen import console as progress
from textgen.cli import main
from textgen.console import Progress

ROOT = Path(__file__).parents[1]

START = """
import logging, os, signal, sys
from types import SimpleNamespace
from textgen import console as progress
from textgen.console import Progress, say, setup_logging

log, process = logging.getLogger("textgen"), SimpleNamespace(is_main_process=True)
setup_logging(main=True)
"""
WORK = (
    START
    + """
progress.DRAW_SECONDS = 0
with Progress("step", 400, done=100, per_epoch=200) as bar:
    log.info("a first line that is " + "long " * 30 + "to the end")
    for step in range(101, 301):
        if step % 10 == 0:
            bar.show({"train/loss": step / 100, "train/bits_per_byte": 1.5, "train/tokens_per_second": 28614.2})
        bar.update(step)
    with Progress("scored batch", 8) as scoring:
        for batch in range(8):
            scoring.update(batch + 1)
    bar.show({"valid/loss": 4.25, "valid/bits_per_byte": 1.6858})
    say(process, "step 300: valid loss 4.2500")
    bar.sample("i love this\\x1b[31m film.<br />\\nÇa va, \U0001f3ac " + "très café 電影 " * 30)
    print("a warning of a library", file=sys.stderr)
    bar.update(300)
say(process, "trained")
"""
)
PRINTED = (
    "a first line that is " + "long " * 30 + "to the end",
    "step 300: valid loss 4.2500",
    "a warning of a library",
    "trained",
)


@dataclass
class Shown:
    """What a terminal has shown."""

    raw: bytes
    pictures: list[list[str]]
    """every picture of it: lines, without the empty ones"""

    @property
    def finally_(self) -> list[str]:
        return self.pictures[-1]


def terminal(
    argv: Sequence[str], *, columns: int = 80, stdout: int | None = None, variables: dict[str, str] | None = None
) -> Shown:
    """Run Python in a terminal of 60 rows.

    Args:
        argv: of Python.
        columns: of the terminal.
        stdout: of the program, if it is not the terminal.
        variables: of the environment, beside TERM.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, columns, 0, 0))
    around = {n: v for n, v in os.environ.items() if n not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, *argv], stdin=theirs, stdout=stdout or theirs, stderr=theirs, cwd=ROOT,
        env=around | {"TERM": "xterm-256color"} | (variables or {}),
    )  # fmt: skip
    os.close(theirs)
    raw = b""
    try:
        while data := os.read(ours, 1 << 16):
            raw += data
    except OSError:  # nobody holds the other side any more
        pass
    os.close(ours)
    assert process.wait() == 0, raw.decode()
    screen = pyte.Screen(columns, 60)
    stream = pyte.ByteStream(screen)
    pictures = []
    for piece in re.split(rb"(?=\r\x1b\[2K)", raw):  # each begins by erasing the one before
        stream.feed(piece)
        pictures.append([line.rstrip() for line in screen.display if line.strip()])
    return Shown(raw, pictures)


def piped(source: str, **variables: str) -> tuple[str, str]:
    """Run a program and return what it writes into two pipes."""
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, cwd=ROOT, check=True, env=os.environ | variables
    )
    return done.stdout.decode(), done.stderr.decode()


# --- a terminal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [24, 80, 200])
def test_a_terminal_shows_the_work_and_finally_only_what_was_printed(columns: int) -> None:
    shown = terminal(["-c", WORK], columns=columns)
    texts = [" ".join(picture) for picture in shown.pictures]
    figures = ("step 300/400", "left", "epoch 2/2", "3.0000", "1.500", "28,614", "valid 1.6858", "i love this")
    last = [text for text in texts if "i love this" in text][-1]
    assert [figure for figure in figures if figure not in last] == []
    assert any("step 300/400" in text and "scored batch 8/8" in text for text in texts), "both are to be seen"
    wrapped = [line[at : at + columns].rstrip() for line in PRINTED for at in range(0, len(line), columns)]
    assert [line.strip() for line in shown.finally_] == [line.strip() for line in wrapped]
    # 4 lines of figures at most, 1 of the sample, whatever its length
    assert max(len(picture) for picture in shown.pictures) <= len(wrapped) + 6


@pytest.fixture(scope="module")
def usual() -> Shown:
    """What a usual terminal has shown."""
    return terminal(["-c", WORK])


def test_a_terminal_shows_a_bar_where_there_is_room(usual: Shown) -> None:
    assert not any("━" in line for picture in terminal(["-c", WORK], columns=24).pictures for line in picture)
    (half,) = {line for picture in usual.pictures for line in picture if "step 200/400" in line}
    assert half.count("━") == 39, "of 40 columns, a joint between two halves"


def test_a_terminal_is_not_drawn_at_every_step(usual: Shown) -> None:
    calm = terminal(["-c", WORK.replace("progress.DRAW_SECONDS = 0", "")])
    assert len(usual.pictures) > 200
    assert len(calm.pictures) < 20, "where something is printed, begins or ends, and twice a second"
    assert calm.finally_ == usual.finally_


def test_nothing_but_colours_and_movements_reaches_a_terminal(usual: Shown) -> None:
    raw = usual.raw
    assert b"\x1b[31m" not in raw, "the model has drawn an escape code, and the terminal obeyed it"
    assert b"\x1b[?25l" not in raw.replace(b"\x1b[?25l\x1b[?25h", b""), "killed, it would leave no cursor"


def test_no_color_means_none(usual: Shown) -> None:
    coloured = re.compile(rb"\x1b\[(3[0-9]|4[0-9])[;m]")
    assert coloured.search(usual.raw)
    assert not coloured.search(terminal(["-c", WORK], variables={"NO_COLOR": "1"}).raw)


def test_a_dumb_terminal_gets_lines() -> None:
    shown = terminal(["-c", "import textgen.console as p; p.FIRST_LINE_SECONDS = 0" + WORK], variables={"TERM": "dumb"})
    assert b"\x1b" not in shown.raw
    assert b"\r" not in shown.raw.replace(b"\r\n", b"")
    assert b"\nstep 101/400, epoch 1/2" in shown.raw


def test_results_go_where_standard_output_goes(tmp_path: Path) -> None:
    with (tmp_path / "results").open("wb") as file:
        shown = terminal(["-c", WORK], stdout=file.fileno())
    assert (tmp_path / "results").read_text() == "step 300: valid loss 4.2500\ntrained\n"
    assert "trained" not in shown.finally_


def test_work_outlives_its_terminal(tmp_path: Path) -> None:
    path = tmp_path / "done"
    source = f"""{START}
progress.DRAW_SECONDS = 0
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with Progress("step", 2) as bar:
    bar.update(1)
    sys.stdin.read()  # until the terminal is closed
    log.info("a line that nobody sees")
    bar.update(2)
open({str(path)!r}, "w").write("done")
"""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, cwd=ROOT,
        env=os.environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    raw = b""
    while b"step 1/2" not in raw:
        raw += os.read(ours, 1 << 16)
    os.close(ours)
    process.communicate()
    assert path.read_text() == "done"


def test_a_training_in_a_terminal_shows_how_it_goes(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--run_dir", str(tmp_path / "run"), "--log_every", "1", "--max_steps", "12", "--evaluate_every", "6"]
    shown = terminal(["train_distributed.py", *tiny_flags, *flags], columns=100)
    texts = [" ".join(picture) for picture in shown.pictures]
    live = [
        text for text in texts if re.search(r"step 6/12 \S+ 0:00:\d\d left epoch 1/1, loss \d\.\d+, .* tokens/s", text)
    ]
    assert live, texts[-3:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (bits,) = [row["valid/bits_per_byte"] for row in rows if row["step"] == 6 and "valid/loss" in row]
    prompt = "i love this movie because"
    assert any(f"valid {bits:.4f} {prompt}" in text for text in texts), "the validation, and the beginning of a sample"
    assert not any(" left" in line or line.startswith(prompt) for line in shown.finally_)
    assert any(line.startswith("step 12: valid loss") for line in shown.finally_[-6:])


# --- elsewhere -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "TERM": "xterm"}])
def test_a_pipe_gets_whole_lines_without_escape_codes(variables: dict[str, str]) -> None:
    results, told = piped("import textgen.console as p; p.FIRST_LINE_SECONDS = 0" + WORK, **variables)
    assert results == "step 300: valid loss 4.2500\ntrained\n"
    for character in "\r\x1b":
        assert character not in results + told
    lines = told.splitlines()
    assert told.endswith("\n")
    assert lines[0] == PRINTED[0]
    assert "step 110/400, epoch 1/2, loss 1.1000, 1.500 bits per byte, 28,614 tokens/s, 0:00:00 left" in lines
    assert [line for line in lines if line.startswith("scored batch")] == [
        "scored batch 1/8", *(f"scored batch {count}/8, 0:00:00 left" for count in range(2, 9))
    ]  # fmt: skip
    (sample,) = [line for line in lines if line.startswith("sample: ")]
    assert sample.startswith("sample: i love this [31m film.<br /> Ça va, ")
    assert len(sample) <= len("sample: ") + progress.SAMPLE_WIDTH


def test_lines_come_soon_and_then_less_often(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    caplog.set_level(logging.INFO, logger="textgen")
    said = []
    with Progress("step", 1000) as bar:
        for second in range(1, 301):
            clock.now += 1
            bar.update(second)
            said += [second] * len(caplog.records)
            caplog.clear()
    assert said == [5, 15, 35, 75, 135, 195, 255]


def test_time_left_is_reckoned_without_what_the_first_one_takes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    caplog.set_level(logging.INFO, logger="textgen")
    with Progress("step", 10, done=4) as bar:
        for step, seconds in ((5, 600), (6, 10)):  # the first one has compiled, or evaluated before it
            clock.now += seconds
            bar.update(step)
    assert caplog.messages == ["step 5/10", "step 6/10, 0:00:40 left"]


def test_a_process_whose_log_is_silent_shows_nothing() -> None:
    quiet = WORK.replace("main=True", "main=False")
    _, told = piped("import textgen.console as p; p.FIRST_LINE_SECONDS = 0" + quiet)
    assert told == "a warning of a library\n"


def test_a_line_can_be_read_while_the_work_goes_on() -> None:
    source = f"{START}\nprogress.FIRST_LINE_SECONDS = 0\n" + (
        "with Progress('step', 2) as bar:\n    bar.update(1)\n    say(process, 'a result')\n    sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    for pipe, line in ((process.stderr, b"step 1/2\n"), (process.stdout, b"a result\n")):
        assert pipe is not None
        assert select.select([pipe], [], [], 60)[0], "nothing was flushed"
        assert pipe.readline() == line
    process.communicate()
    assert process.returncode == 0


def test_encoding_evaluating_and_sampling_say_how_far_they_are(
    tiny_flags: list[str],
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_SECONDS", 0)
    caplog.set_level(logging.INFO, logger="textgen")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "i love"}\n' * 3)
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of the test before
    main(["prepare", *tiny_flags, "--data.cache_dir", str(tmp_path)])
    main(["evaluate", str(tiny_run), "--batch_size", "8"])
    files = ["--batch_file", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    main(["sample", str(tiny_run), *files, "--max_new_tokens", "4"])
    for line in (r"encoded train document (\d+)/\1$", r"scored batch 2/\d+, .* left", r"sample 3/3, "):
        assert any(re.match(line, message) for message in caplog.messages), line
