"""Files that a user writes with an editor of another system: byte order marks, line ends, UTF-16."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forking import run_script
from textgen.commands.parsing import parse_train_config
from textgen.commands.prompts import parse_batch, read_bytes, read_prompts
from textgen.commands.serve import _model_name, _read_token
from textgen.commands.submit import read_site, read_sweep
from textgen.config import SamplingConfig
from textgen.errors import TextgenError

CONFIG = SamplingConfig()
# What is written, how it is read, and what is read.
FILES: list[tuple[str, Callable[[str], object], object]] = [
    ("i love\r\n", lambda path: read_prompts((), path, CONFIG)[0].text, "i love"),
    (
        '{"prompt": "a"}\r\n{"prompt": "b"}\r\n',
        lambda path: [prompt.text for prompt in parse_batch(read_bytes(path), path, CONFIG)],
        ["a", "b"],
    ),
    ("seq_len: 7\r\nmax_steps: 3\r\n", lambda path: parse_train_config(["--config", path]).seq_len, 7),
    ("--seq_len 7\r\n--seq_len 8\r\n", read_sweep, [["--seq_len", "7"], ["--seq_len", "8"]]),
    ("0123456789abcdef\r\n", _read_token, "0123456789abcdef"),
]
NAMES = ["prompt", "batch", "settings", "sweep", "token"]


@pytest.mark.parametrize(("written", "read", "value"), FILES, ids=NAMES)
def test_a_byte_order_mark_and_line_ends_of_windows_are_no_content(
    written: str, read: Callable[[str], object], value: object, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(("\ufeff" + written).encode())
    assert read(str(tmp_path / "file")) == value


@pytest.mark.parametrize(("written", "read", "value"), FILES, ids=NAMES)
def test_utf_16_is_named(
    written: str, read: Callable[[str], object], value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(("\ufeff" + written).encode("utf-16-le"))
    with pytest.raises((TextgenError, SystemExit)) as refused:
        read(str(tmp_path / "file"))
    message = f"{refused.value}{capsys.readouterr().err}"
    assert " is UTF-16 (it begins with ff fe): wanted UTF-8" in message


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("\ufeffexport A=b\n".encode(), "begins with a byte order mark, which bash takes as part of a command"),
        (b"export A=b\r\n", "has Windows line ends, which bash takes as part of a command"),
        ("\ufeffexport A=b\n".encode("utf-16-be"), "is UTF-16 (it begins with fe ff): wanted UTF-8"),
    ],
)
def test_a_site_that_bash_would_misread_is_refused(
    written: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "site.sh").write_bytes(written)
    with pytest.raises((TextgenError, SystemExit)) as refused:
        read_site(tmp_path / "site.sh")
    assert f"`{tmp_path / 'site.sh'}` {message}" in f"{refused.value}{capsys.readouterr().err}"


def test_the_name_of_a_served_model_is_text() -> None:
    named = Namespace(name=None, checkpoint=os.fsdecode(b"runs/\xe9t\xc3\xa9"))
    assert _model_name(named) == "\ufffdté"


def test_a_wrong_sweep_is_one_line_in_the_job_too(tmp_path: Path) -> None:
    (tmp_path / "sweep").write_bytes("--seq_len 7\n".encode("utf-16"))
    done = run_script("-m", "textgen.commands.submit", "1", str(tmp_path / "sweep"), expect=2)
    assert done.stderr == f"error: `{tmp_path / 'sweep'}` is UTF-16 (it begins with ff fe): wanted UTF-8\n"
