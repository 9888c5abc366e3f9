"""`textgen tokenize`: the ids that the model reads, their places in the text, and the text of ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import textgen
from textgen.cli import main

Capture = pytest.CaptureFixture[str]
TEXT = "The plot: Ça va 🙂\u2581</s> <br /><br />\n"


def tokenize(capsys: Capture, *argv: str) -> str:
    capsys.readouterr()
    main(["tokenize", *argv])
    return capsys.readouterr().out


def test_ids_pieces_and_places_are_those_of_the_text(tiny_run: Path, capsys: Capture) -> None:
    found: dict[str, Any] = json.loads(tokenize(capsys, str(tiny_run), "--text", TEXT, "--json"))
    tokenizer = textgen.load(tiny_run)._tokenizer
    assert (found["text"], found["ids"]) == (TEXT, tokenizer.encode(TEXT))
    for token, piece, (start, end) in zip(found["ids"], found["pieces"], found["offsets"], strict=True):
        raw = tokenizer.token_bytes(token)
        assert raw in TEXT[start:end].encode()
        assert piece == (TEXT[start:end] if len(raw) == len(TEXT[start:end].encode()) else f"\\x{raw.hex()}")
    assert "\\xf0" in found["pieces"]  # the emoji is unknown: bytes
    assert [start for start, _ in found["offsets"]] == sorted(start for start, _ in found["offsets"])
    assert found["offsets"][-1][1] == len(TEXT)


def test_decode_gives_the_text_back(tiny_run: Path, capsys: Capture) -> None:
    ids = json.loads(tokenize(capsys, str(tiny_run), "--text", TEXT, "--json"))["ids"]
    assert tokenize(capsys, str(tiny_run), "--decode", *map(str, ids)) == TEXT + "\n"
    assert json.loads(tokenize(capsys, str(tiny_run), "--json", "--decode", *map(str, ids)))["text"] == TEXT


def test_a_line_shows_a_token_on_one_line(tiny_run: Path, capsys: Capture) -> None:
    ids = json.loads(tokenize(capsys, str(tiny_run), "--text", TEXT, "--json"))["ids"]
    lines = tokenize(capsys, str(tiny_run), "--text", TEXT).splitlines()
    assert [int(line.split()[0]) for line in lines] == ids
    assert lines[-1].endswith('"\\n"')


def test_documents_are_read_by_the_flags_of_a_training(tiny_run: Path, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    flags = [str(tiny_run), "--data", str(tmp_path / "a.txt"), "--txt_documents", "line", "--limit", "2", "--json"]
    assert [json.loads(line)["text"] for line in tokenize(capsys, *flags).splitlines()] == ["one", "two"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--decode", "340"], "`decode` must be ids below the vocabulary's size 340: 340"),
        (["--decode", "-1"], "`decode` must be ids below the vocabulary's size 340: -1"),
        (["--decode", "1", "--text", "a"], "`decode` cannot be combined with `text`"),
        (["--decode", "1", "--encoding", "latin-1"], "`decode` cannot be combined with `encoding`"),
        (["--decode", "1", "x"], "`decode` must be ids below the vocabulary's size 340: x"),
        (["--text", ""], "`--text` is empty"),
    ],
)
def test_wrong_flags_are_one_line(flags: list[str], line: str, tiny_run: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["tokenize", str(tiny_run), *flags])
    said = capsys.readouterr()
    assert (end.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err.startswith(f"error: {line}")
