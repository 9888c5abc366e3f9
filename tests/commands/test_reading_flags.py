"""Commands that read texts from files read them as a training does, by the same flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from textgen.cli import main
from textgen.commands.parsing import Parser, add_reading_flags, reading_settings
from textgen.config import READING_SETTINGS, DataConfig
from textgen.errors import TextgenError

Capture = pytest.CaptureFixture[str]


def test_evaluate_reads_files_by_the_flags_of_a_training(tiny_run: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "a.txt").write_text("one film\n\ntwo films\nthree\n")
    for flags, documents in ((), 1), (("--txt_documents", "line"), 3), (("--txt_documents", "paragraph"), 2):
        main(["evaluate", str(tiny_run), "--data", str(tmp_path / "a.txt"), "--json", *flags])
        assert json.loads(capsys.readouterr().out)["documents"] == documents


@pytest.mark.parametrize("verb", ["evaluate", "export", "measure"])
def test_flags_for_files_are_refused_for_a_split(verb: str, tiny_run: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as refused:
        main([verb, str(tiny_run), "--txt_documents", "line"])
    assert refused.value.code == 2
    wanted = "`txt_documents` line is for files; the split `validation` is read as the training read it"
    assert capsys.readouterr().err == f"error: {wanted}\n"


def test_flags_for_files_give_the_settings_of_a_training() -> None:
    parser = Parser()
    parser.add_argument("--data", default="a.txt")
    add_reading_flags(parser)
    assert reading_settings(parser.parse_args([])) == DataConfig()
    values = {
        "text_column": "review", "txt_documents": "line", "encoding": "latin-1", "on_error": "skip",
        "max_document_bytes": 4096, "csv_delimiter": ";", "csv_quoting": "none", "csv_escape": "\\",
    }  # fmt: skip
    assert set(values) == set(READING_SETTINGS)
    args = parser.parse_args([f"--{name}={value}" for name, value in values.items()])
    assert reading_settings(args) == DataConfig(**values)  # type: ignore[arg-type]
    with pytest.raises(TextgenError, match="`csv_delimiter` must be one character"):
        reading_settings(parser.parse_args(["--csv_delimiter", "ab"]))
