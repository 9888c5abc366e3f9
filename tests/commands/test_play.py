"""The verb `play` as a user meets it: through a pipe, in a real terminal, and the draft without either."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest

from textgen.cli import main
from textgen.commands.model_argument import OpenModel, open_decoder
from textgen.commands.play import _terminal_lines
from textgen.commands.sample import stream_samples
from textgen.config import SamplingConfig
from textgen.decoding.decoders import Decoder
from textgen.decoding.draft import Draft
from textgen.errors import TextgenError

Capture = pytest.CaptureFixture[str]
Play = Callable[..., tuple[str, str]]
SHORT = ["--max_new_tokens", "12"]


@pytest.fixture
def play(tiny_run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Return a function that sends lines to `textgen play` and returns standard output and error."""

    def call(*lines: str | bytes, expect: int | None = None) -> tuple[str, str]:
        raw = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        capsys.readouterr()
        if expect is None:
            main(["play", str(tiny_run), *SHORT])
        else:
            with pytest.raises(SystemExit) as ended:
                main(["play", str(tiny_run), *SHORT])
            assert ended.value.code == expect
        out, err = capsys.readouterr()
        return out, err

    return call


@pytest.fixture
def samples(tiny_run: Path, capsys: Capture) -> Callable[..., list[str]]:
    """Return a function that returns the texts of `textgen sample`."""

    def call(prompt: str, n: int, *flags: str) -> list[str]:
        capsys.readouterr()
        main(["sample", str(tiny_run), "--prompt", prompt, "--num_samples", str(n), "--json", *SHORT, *flags])
        return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]

    return call


# --- a pipe ----------------------------------------------------------------------------------------------------------


def test_play_draws_the_samples_of_sample_with_the_same_seed(play: Play, samples: Callable[..., list[str]]) -> None:
    three = samples("The plot was", 3)
    assert len(set(three)) == 3
    assert play("The plot was")[0] == f"{three[0]}\n"
    assert play("The plot was", ":again", ":again")[0] == "".join(f"{text}\n" for text in three)
    numbered = "\n".join(f"{number}: {text}\n" for number, text in enumerate(three, 1))
    assert play(":n 3", "The plot was")[0] == numbered
    assert play("", ":again")[0] == "".join(f"{text}\n" for text in samples("", 2)), "an empty line begins a text"


def test_commands_set_what_the_flags_of_sample_set(play: Play, samples: Callable[..., list[str]]) -> None:
    flags = ["--temperature", "0.5", "--top_p", "0.9", "--top_k", "20", "--seed", "7"]
    out, _ = play(":t 0.5", ":p 0.9", ":k 20", ":seed 7", "I", ":temperature", ":p none", ":p")
    assert out == f"{samples('I', 1, *flags)[0]}\ntemperature 0.5\ntop_p none\n"


def test_the_text_is_the_lines_and_the_continuations_that_were_kept(
    play: Play, samples: Callable[..., list[str]], tmp_path: Path
) -> None:
    _, second, _ = samples("I", 3)
    path = tmp_path / "story.txt"
    out, err = play(":n 3", "I", ":pick 3", ":pick 2", ":n 1", "::-) Ça", ":undo", f":save {path}", ":text")
    assert path.read_text() == f"I{second}:-) Ça"
    assert out.endswith(f"I{second}:-) Ça\n")
    assert err.endswith(f"saved `{path}`\n")


def test_undo_is_as_if_the_line_had_never_come(play: Play, tmp_path: Path) -> None:
    kept, other = tmp_path / "kept", tmp_path / "other"
    without, _ = play("The plot", " was", f":save {kept}")
    out, _ = play("The plot", "!!", ":again", ":undo", ":undo", " was", f":save {other}")
    assert other.read_bytes() == kept.read_bytes()
    assert out.splitlines()[-1] == without.splitlines()[-1]
    assert play("I", ":undo", ":undo", ":text")[0].endswith("\n\n"), "back to the empty text"


WRONG = {
    ":wat": "`:wat` is not a command; `:help` lists them, and `::` begins a text with a colon",
    ":stop x": "`:stop` is not a command",
    ":t 0,8": "`temperature` must be a number: 0,8",
    ":t -1": "`temperature` must be finite and at least 0: -1",
    ":t nan": "`temperature` must be finite and at least 0: nan",
    ":k 2.5": "`top_k` must be an integer or null: 2.5",
    ":n 0": "`:n` wants an integer from 1 to 64: 0",
    ":n 1e3": "`:n` wants an integer from 1 to 64: 1e3",
    ":pick": "`:pick` wants an integer from 1 to 64: ",
    ":pick 1": "there are no alternatives to pick from: 1",
    ":regex a(": "`regex` cannot be used: unclosed group",
    ":again": "there is no continuation to draw again",
    ":again 2": "`:again` takes no value: 2",
    ":undo": "there is nothing to undo",
    ":save": "`:save` wants a file: `:save story.txt`",
    ":save story.txt": "there is no text to save",
    "   ": "the line is only spaces; an empty line continues the text",
    b"\xff": "is not UTF-8: byte 0xff at position 0",
}


def test_a_regex_leads_a_continuation_from_its_first_space(
    play: Play, samples: Callable[..., list[str]], tiny_run: Path, capsys: Capture
) -> None:
    wanted = samples("The plot", 1, "--regex", " (good|bad)")
    assert wanted[0] in (" good", " bad")
    assert play(":regex  (good|bad)", "The plot")[0] == f"{wanted[0]}\n"
    assert play(":regex  (good|bad)", ":regex none", "The plot")[0] == f"{samples('The plot', 1)[0]}\n"
    assert play(":regex 17", "The plot")[0] == "17\n"
    with pytest.raises(SystemExit) as ended:
        main(["play", str(tiny_run), "--regex", "a("])
    assert (ended.value.code, capsys.readouterr().err) == (2, "error: `regex` cannot be used: unclosed group\n")


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_line_of_a_pipe_is_named_and_ends_the_command(line: str | bytes, play: Play) -> None:
    out, said = play(":n 2", line, "I", expect=2)
    assert (out, said.count("\n")) == ("", 1)
    assert said.startswith("error: standard input line 2")
    assert WRONG[line] in said


def test_alternatives_are_picked_before_the_text_goes_on(play: Play) -> None:
    _, err = play(":n 2", "I", " go", expect=2)
    assert "line 3: pick one of the alternatives first, as `:pick 1`, or leave them by `:undo`" in err
    assert "alternatives to pick from: 3" in play(":n 2", "I", ":pick 3", expect=2)[1]
    play(":n 2", "I", ":undo", " go")


def test_save_overwrites_only_when_asked_to(play: Play, tmp_path: Path) -> None:
    path = tmp_path / "my story.txt"
    path.write_text("mine")
    assert f"`{path}` exists: `:save! {path}` replaces it" in play("I", f":save {path}", expect=2)[1]
    assert path.read_text() == "mine"
    play("I", ":undo", f":save! {path}")
    assert path.read_text() == "I"
    for wrong, why in (
        (tmp_path, "is not a file"),
        (tmp_path / "no" / "x", "No such file"),
        (Path("a\0b"), "null byte"),
    ):
        assert why in play("I", f":save! {wrong}", expect=2)[1]
    assert [one.name for one in tmp_path.iterdir()] == ["my story.txt"]


def test_control_characters_of_a_text_do_not_drive_a_terminal(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[2J\r\x9b\x07\tb\nÇa 🎬"
    events: list[tuple[int, Any]] = [(0, text), (0, None)]
    stream_samples(iter(events), lambda index: "")
    assert capsys.readouterr().out == f"{text}\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    stream_samples(iter(events), lambda index: "")
    assert capsys.readouterr().out == "a\\x1b[2J\\x0d\\x9b\\x07\tb\nÇa 🎬\n"


# --- the draft -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(tiny_run: Path) -> tuple[OpenModel, Decoder]:
    return open_decoder(tiny_run, "plain", best=False)


def continuation(draft: Draft, config: SamplingConfig) -> str:
    return "".join(event for _, event in draft.draw(config, 1) if isinstance(event, str))


def test_undo_reads_nothing_again_and_changes_no_character(
    opened: tuple[OpenModel, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, decoder = opened
    config, prompt = SamplingConfig(max_new_tokens=40), "The plot was hollow. " * 120
    alone, draft = Draft(decoder, model.tokenizer), Draft(decoder, model.tokenizer)
    alone.write(prompt)
    wanted = continuation(alone, config)
    draft.write(prompt)
    draft.write(" Not so.")
    continuation(draft, config)
    given = []
    prefill = decoder.prefill

    def spy(ids, *, read=None):  # type: ignore[no-untyped-def]
        given.append(len(ids) - (read.num_read if read is not None else 0))
        return prefill(ids, read=read)

    monkeypatch.setattr(decoder, "prefill", spy)
    draft.undo()
    draft.undo()
    assert given == []
    assert continuation(draft, config) == wanted
    assert len(model.tokenizer.encode(prompt)) > 2 * 512
    assert max(given) <= 513, "what follows the last border of a window"
    assert draft.text == prompt + wanted


def test_a_draw_that_fails_or_is_left_changes_nothing(opened: tuple[OpenModel, Decoder]) -> None:
    model, decoder = opened
    draft = Draft(decoder, model.tokenizer)
    draft.write("I")
    first = continuation(draft, SamplingConfig(max_new_tokens=5))
    events = draft.draw(SamplingConfig(max_new_tokens=50, min_new_tokens=50), 1, again=True)
    next(events)
    events.close()
    assert draft.text == "I" + first
    stopped = draft.draw(SamplingConfig(), 1, again=True, interrupted=lambda: True)
    assert not [event for _, event in stopped if isinstance(event, str)]
    assert draft.text == "I" + first
    with pytest.raises(TextgenError, match="there are 1 alternatives"):
        draft.pick(2)


# --- a terminal ------------------------------------------------------------------------------------------------------


def take_terminal() -> None:
    """Make standard input the terminal of this process, and heed Ctrl-C, which a shell's background job ignores."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Terminal:
    """`textgen play` in a terminal, and what the user sees of it."""

    def __init__(self, run: Path, *flags: str, term: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "textgen", "play", str(run), "--decoder", "plain", *flags],
            stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": term},
            start_new_session=True, preexec_fn=take_terminal,
        )  # fmt: skip
        os.close(theirs)
        self.is_dumb, self.raw = term == "dumb", b""
        self._screen = pyte.Screen(100, 40)
        # prompt_toolkit asks where the cursor is
        self._screen.write_process_input = lambda answer: self.type(answer)
        self._stream = pyte.ByteStream(self._screen)

    @property
    def lines(self) -> list[str]:
        """What the terminal shows."""
        return [line.rstrip() for line in self._screen.display if line.strip()]

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, seen: Callable[[], bool]) -> None:
        """Read until something is seen."""
        deadline = time.monotonic() + 60
        while not seen():
            assert select.select([self._ours], [], [], deadline - time.monotonic())[0], self.lines
            data = os.read(self._ours, 1 << 16)
            self.raw += data
            self._stream.feed(data)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture(params=["xterm-256color", "dumb"])
def terminal(request: pytest.FixtureRequest, tiny_run: Path) -> Iterator[Terminal]:
    """Start a text that does not end before Ctrl-C; yield the terminal that waits for a line."""
    endless = ["--max_new_tokens", "1000000", "--min_new_tokens", "1000000", "--top_k", "5"]
    one = Terminal(tiny_run, *endless, term=request.param)
    try:
        one.wait_for(lambda: bool(one.lines) and one.lines[-1] == ">")
        yield one
    finally:
        one.close()


def test_a_text_is_written_in_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    terminal.type("The plot was\r")
    length = len(terminal.raw)
    terminal.wait_for(lambda: len(terminal.raw) > length + 600)
    terminal.type("\x03")  # Ctrl-C stops the continuation, not the program
    terminal.wait_for(lambda: terminal.lines[-1].startswith("…"))
    terminal.type(f":save {tmp_path / 'story.txt'}\r")
    terminal.wait_for(lambda: any(line.startswith("saved `") for line in terminal.lines))
    text = (tmp_path / "story.txt").read_text()
    assert len(text) > 100
    terminal.wait_for(lambda: terminal.lines[-1].endswith("|"))
    assert terminal.lines[-1] == f"…{text.splitlines()[-1][-20:]}|", "the end of the text shows where a line goes on"

    terminal.type(":undo\r")
    terminal.wait_for(lambda: terminal.lines[-1] == "…The plot was|")
    terminal.type(":max_new_tokens 1\r")
    terminal.wait_for(lambda: "error: `min_new_tokens` must be" in terminal.lines[-2])
    for line in (":min_new_tokens 3", ":max_new_tokens 3", ":t 0", ":n 2"):
        terminal.type(f"{line}\r")
        terminal.wait_for(lambda line=line: terminal.lines[-2:] == [f"…The plot was|{line}", "…The plot was|"])
    if not terminal.is_dumb:
        terminal.type("\x1b[A\x1b[A\x7f1\r")  # the history: `:t 0`, of which the 0 becomes a 1
        terminal.wait_for(lambda: terminal.lines[-2:] == ["…The plot was|:t 1", "…The plot was|"])
    terminal.type("half")
    terminal.wait_for(lambda: terminal.lines[-1] == "…The plot was|half")
    terminal.type("\x03")  # Ctrl-C leaves a line that is being typed
    terminal.wait_for(
        lambda: terminal.lines[-1] == "…The plot was|" and terminal.lines[-2].startswith("…The plot was|half")
    )
    terminal.type("\r")
    terminal.wait_for(lambda: terminal.lines[-1] == "…The plot was|" and "2: " in " ".join(terminal.lines[-3:]))
    terminal.type(":pick 2\r")
    terminal.wait_for(lambda: terminal.lines[-1].endswith("|") and terminal.lines[-1] != "…The plot was|")
    terminal.type(":text\r")
    terminal.wait_for(lambda: terminal.lines[-2].startswith("The plot was") and terminal.lines[-1].endswith("|"))
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0
    assert not (terminal.is_dumb and b"\x1b" in terminal.raw), "a dumb terminal gets plain lines"


def test_a_terminal_without_prompt_toolkit_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Ça\n".encode())))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    read_line = _terminal_lines()
    assert [read_line("> "), read_line("> ")] == ["Ça", None]
    assert capsys.readouterr().err == "no editing keys: prompt_toolkit is not installed\n> > "
