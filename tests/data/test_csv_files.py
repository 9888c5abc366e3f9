"""Tables of csv and tsv files: delimiters, quotation, and what is said of rows that swallow others."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.files import read, refusal
from textgen.config import DataConfig
from textgen.data.documents import read_files
from textgen.data.tally import Tally


def test_rows_that_an_open_quotation_mark_swallows_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.tsv"
    rows = [f"{i}\ttext {i}" for i in range(400)]
    rows[100] = '100\t"quote without an end'
    rows[140] = '140\tthe next quotation mark ends it"'
    path.write_text("id\ttext\n" + "".join(f"{row}\n" for row in rows))
    assert len(read(path)) == 360
    assert (
        f"`{path}`: 1 of 360 rows span several lines, the one at line 102 spans 41; if quotation marks are part of the "
        "text, set `--data.csv_quoting none`" in caplog.text
    )
    caplog.clear()
    texts = read(path, csv_quoting="none")
    assert (len(texts), texts[100], texts[140]) == (400, '"quote without an end', 'the next quotation mark ends it"')
    assert not caplog.records


@pytest.mark.parametrize(("lines", "is_named"), [(2, False), (99, False), (100, True)])
def test_a_row_of_many_lines_is_named_in_a_csv_file_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lines: int, is_named: bool
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + "1,a\n" * 200 + '2,"' + "\n".join("b" * lines) + '"\n')
    assert len(read(path)) == 201
    assert (f"the one at line 202 spans {lines}" in caplog.text) == is_named


@pytest.mark.parametrize(("inner", "is_named"), [("3,c\n4,d\n5,e", True), ("a poem,\nof lines\nand words", False)])
def test_lines_that_look_like_rows_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, inner: str, is_named: bool
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + "1,a\n" * 9 + f'2,"b\n{inner}\n6,f"\n')
    assert read(path)[-1] == f"b\n{inner}\n6,f"
    assert ("1 of 10 rows span several lines, the one at line 11 spans 5" in caplog.text) == is_named


def test_every_row_of_a_tsv_file_that_spans_lines_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("id\ttext\n" + "1\ta\n" * 9 + '2\t"b\nc"\n')
    assert read(path)[-1] == "b\nc"
    assert f"`{path}`: 1 of 10 rows span several lines, the one at line 11 spans 2; " in caplog.text


def test_a_skipped_row_says_how_far_it_reaches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("id\ttext\n" + "1\ta\n" * 9 + '2\t"b\n' + "3\tc\n" * 5)
    assert read(path, on_error="skip") == ["a"] * 9
    assert f"skipped: `{path}` line 11 is not valid CSV: unexpected end of data at line 16" in caplog.text


@pytest.mark.parametrize(
    ("content", "texts", "settings"),
    [
        ("id;text\n1;a, b\n2;c\n", ["a, b", "c"], {}),
        ("id|text\n1|a, b; c\n", ["a, b; c"], {}),
        ("id\ttext\n1\ta, b\n", ["a, b"], {}),
        ('id, text\n1, "x, y"\n2, z\n', ["x, y", "z"], {}),
        ('id; text\n1; "x; y"\n', ["x; y"], {}),
        ("sep=;\r\nid;text\r\n1;a, b\r\n", ["a, b"], {}),
        ("sep=;\nid;text\n1;a\n", ["a"], {"csv_delimiter": ";"}),
        ('sep=,\nid,text\n1,"a\nb"\n', ["a\nb"], {}),
        ("id:text\n1:a, b\n", ["a, b"], {"csv_delimiter": ":"}),
        ('id,text\n1, "x, y"\n', ["x, y"], {"csv_delimiter": ", "}),
        ("id\ttext\n1\t x\n", ["x"], {"csv_delimiter": "\\t "}),
        ('id,text\n1,"x \\"y\\", z"\n', ['x "y", z'], {"csv_escape": "\\"}),
        ('id,text\n1,"x ""y"", z"\n', ['x "y", z'], {"csv_escape": "\\"}),
        ('id,text\n1,"x\\, y\n', ['"x, y'], {"csv_quoting": "none", "csv_escape": "\\"}),
    ],
)
def test_tables_of_other_formats_are_read(
    tmp_path: Path, content: str, texts: list[str], settings: dict[str, Any]
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content, newline="")
    assert read(path, **settings) == texts


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('id,text\n1, "x"\n', [' "x"']),
        ("text\na;b\nc|d\n", ["a;b", "c|d"]),
        ("id;n,text\n1;2,a\n", ["a"]),
        ('text,id\n"a;b",1\n', ["a;b"]),
    ],
)
def test_a_table_with_commas_reads_as_before(tmp_path: Path, content: str, texts: list[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    assert read(path) == texts


def test_a_delimiter_that_was_found_is_in_the_log_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id; text\n1; a\n")
    tally = Tally()
    for _ in range(2):
        assert list(read_files([str(path)], DataConfig(), tally)) == ["a"]
    assert [record.message for record in caplog.records] == [f"`{path}` is read with `--data.csv_delimiter '; '`"]


def test_a_table_that_no_format_fits_is_refused_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id;review\n1;a\n")
    assert refusal(path) == f"`{path}` has no column `text`; it has `id;review`"
    path.write_text("text\nhello, world\n")
    hint = "see `--data.csv_delimiter` and `--data.csv_quoting`"
    assert refusal(path) == f"`{path}` line 2 has 2 fields; its header has 1; {hint}"
    path.write_text('id,text\n1,"a \\"b\\" c"\n')
    assert refusal(path).endswith("; see `--data.csv_quoting` and `--data.csv_escape`")


def test_rows_that_cannot_be_read_are_skipped_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,a\n2,b,c\n3,"d"e\n4,f\n5,"g\nh"\n6,i\n')
    assert refusal(path).startswith(f"`{path}` line 3 has 3 fields; its header has 2; ")
    assert read(path, on_error="skip") == ["a", "f", "g\nh", "i"]
    assert f"`{path}`: skipped 2 of 6 documents" in caplog.text


@given(
    st.lists(st.text(st.sampled_from('a,;|\t" \n\\é'), max_size=12).filter(lambda text: "\r" not in text), min_size=1),
    st.sampled_from([",", ";", "|", "\t"]),
)
def test_what_the_standard_library_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], delimiter: str
) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, lineterminator="\n").writerows([("id", "text"), *enumerate(texts)])
    path.write_text(out.getvalue(), newline="")
    assert read(path, csv_delimiter=delimiter) == texts
    if delimiter == ",":
        assert read(path) == texts


@pytest.mark.parametrize("value", ["", "ab", '"', "\n", ",,", "  \n"])
def test_delimiters_and_escapes_are_one_character(value: str) -> None:
    for name in ("csv_delimiter", "csv_escape"):
        with pytest.raises(ValueError, match=f"`{name}` must be one character, no quotation mark and no line end"):
            DataConfig(**{name: value})  # type: ignore[arg-type]


def test_a_delimiter_is_no_escape() -> None:
    with pytest.raises(ValueError, match="`csv_escape` and `csv_delimiter` are the same"):
        DataConfig(csv_delimiter=";", csv_escape=";")
