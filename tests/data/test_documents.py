"""Files: found, read or refused as promised."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from tests.data.files import write_parquet
from textgen.config import DataConfig
from textgen.data.documents import read_documents
from textgen.errors import TextgenError


def read(*paths: Path | str, **settings: Any) -> list[str]:
    return list(read_documents([str(path) for path in paths], DataConfig(**settings)))


def refusal(*paths: Path | str, **settings: Any) -> str:
    """Return the message that reading is refused with: always one line."""
    with pytest.raises(TextgenError) as caught:
        read(*paths, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reading files


def test_a_txt_file_is_kept_byte_for_byte(folder: Path) -> None:
    raw = " one\r\ntwo\rthree<br /> \x00\u2581\n\n".encode()
    (folder / "a.txt").write_bytes(raw)
    assert [text.encode() for text in read(folder)] == [raw]


def test_txt_lines_and_paragraphs_lose_their_line_ends_only(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"\n one \r\ntwo\rmore\n \t\n\nthree\n\nfour ")
    assert read(folder, txt_documents="line") == [" one ", "two\rmore", "three", "four "]
    assert read(folder, txt_documents="paragraph") == [" one \r\ntwo\rmore", "three", "four "]


def test_csv_texts_may_hold_line_ends_quotes_and_more_than_128_kib(folder: Path) -> None:
    long = "x" * 200_000
    (folder / "a.csv").write_bytes(f'\ufeffid,text\r\n1,"a, ""b""\r\nc\n"\r\n\r\n2,{long}\r\n'.encode())
    assert read(folder) == ['a, "b"\r\nc\n', long]


def test_another_column_can_hold_the_text(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"text": 1, "review": "a"}\n\n')
    (folder / "b.csv").write_text("text,review\n1,b\n")
    write_parquet(folder / "c.parquet", {"text": [1], "review": ["c"]})
    assert read(folder, text_column="review") == ["a", "b", "c"]


def test_a_missing_column_is_named_with_those_that_are_there(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"text": "a"}\n{"id": 1, "review": "a"}\n')
    (folder / "b.csv").write_text("id,review\n1,b\n")
    write_parquet(folder / "c.parquet", {"id": [1], "review": ["c"]})
    assert refusal(folder / "a.jsonl") == f"`{folder}/a.jsonl` line 2 has no column `text`; it has `id`, `review`"
    assert refusal(folder / "b.csv") == f"`{folder}/b.csv` has no column `text`; it has `id`, `review`"
    assert refusal(folder / "c.parquet") == f"`{folder}/c.parquet` has no column `text`; it has `id`, `review`"


def test_two_columns_of_the_text_are_refused_and_one_is_read_as_by_textgen_0_1(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table([pa.array(["a"]), pa.array([1]), pa.array(["b"])], names=["text", "id", "text"])
    pq.write_table(table, folder / "a.parquet")
    with pa.OSFile(f"{folder}/b.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    (folder / "c.csv").write_text("text,id,text\na,1,b\n")
    (folder / "d.tsv").write_text("text\tid\ttext\na\t1\tb\n")
    (folder / "e.csv").write_text("text;text;id\na;b;1\n")
    (folder / "f.csv").write_text("text,id,id\na,1,2\n")
    for name in ("a.parquet", "b.arrow", "c.csv", "d.tsv", "e.csv"):
        assert refusal(folder / name) == f"`{folder}/{name}` has 2 columns `text`: rename all but that of the text"
    assert read(folder / "f.csv") == ["a"]
    for name in ("a.parquet", "c.csv", "d.tsv"):
        assert read(folder / name, reading_rules=1) == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": \n',
            "line 2 is not valid JSON: Expecting value: line 2 column 1 (char 10)",
        ),
        ("a.json", '[\n{"text": "a"}\n', "line 3 is not valid JSON: wanted `,` or `]` after a value of the array"),
        ("a.jsonl", "[" * 100_000, "line 1 is not valid JSON"),
        ("a.jsonl", '"a"\n', "line 1 is not a JSON object with a key `text`"),
        ("a.jsonl", '{"text": null}\n', "`text` is null in 1 of 1 rows"),
        ("a.jsonl", '{"text": 5}\n', "line 1: `text` is not a string: 5"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "b\\ud800"}\n',
            "holds a lone surrogate, which is not valid text: `\\ud800`",
        ),
        ("a.csv", 'text\n"a"\n"b\n"c', "line 3 is not valid CSV"),
        ("a.csv", 'text\na\n"b\n', "line 3 is not valid CSV: unexpected end of data"),
        ("a.csv", "text,id\ra,1\r", "line 1 holds a carriage return that ends a line alone: convert the line ends"),
        ("a.csv", "text,id\na,1\nb\rc,2\n", "line 3 holds a carriage return that ends a line alone"),
        ("a.csv", "id,text\n1,a\n2,b, c\n", "line 3 has 3 fields; its header has 2"),
        ("a.parquet", "text\na\n", "is not valid parquet: "),
    ],
)
def test_malformed_files_are_refused_with_their_line(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content, newline="")
    assert message in refusal(folder / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("txt_documents", ["file", "line", "paragraph"])
def test_bytes_that_are_not_utf8_are_refused_with_file_and_line(folder: Path, name: str, txt_documents: str) -> None:
    (folder / name).write_bytes(b'{"text": "a"}\n' * 2 if name == "a.jsonl" else b"text\na\n")
    with (folder / name).open("ab") as file:
        file.write(b"caf\xe9\n")
    assert refusal(folder, txt_documents=txt_documents).startswith(f"`{folder}/{name}` line 3 is not UTF-8: byte 0xe9;")


def test_parquet_values_that_are_no_text_are_refused_with_their_row(folder: Path) -> None:
    path = write_parquet(folder / "a.parquet", {"text": [["a"]] * 300})
    assert refusal(path) == f"`{path}` row 1: `text` is not a string: ['a']"


def test_settings_that_fit_none_of_the_files_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def named(**settings: Any) -> list[str]:
        caplog.clear()
        read(folder, **settings)
        return [message.split()[0].strip("`") for message in caplog.messages if "has no effect" in message]

    (folder / "a.txt").write_text("one\n")
    assert named(text_column="review", csv_quoting="none", encoding="latin-1") == ["text_column", "csv_quoting"]
    assert named(txt_documents="line") == []
    (folder / "a.txt").unlink()
    (folder / "b.csv.gz").write_bytes(gzip.compress(b"text\ntwo\n"))
    assert named(csv_quoting="none", txt_documents="line") == ["txt_documents"]
    (folder / "b.csv.gz").unlink()
    write_parquet(folder / "c.parquet", {"text": ["three"]})
    assert named(encoding="latin-1") == ["encoding"]
    assert named() == []
