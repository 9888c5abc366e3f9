"""Long documents are cut into parts that joined are the document, in bounded memory."""

from __future__ import annotations

import gzip
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from textgen.config import MAX_DOCUMENT_BYTES, DataConfig
from textgen.data.cutting import PART_BYTES, cut_blocks
from textgen.data.documents import read_documents, read_files
from textgen.data.tally import Tally
from textgen.errors import TextgenError

LONG = "the cat sat on the mat, " * (17 * 10**6 // 24)  # 17 MB in one line


def read(path: Path, **settings: Any) -> list[str]:
    """Return all documents of a file, those without text too."""
    return list(read_files([str(path)], DataConfig(**settings), Tally()))


@pytest.mark.parametrize("unit", ["file", "line", "paragraph"])
def test_a_text_of_one_long_line_is_cut_at_white_space(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, unit: str
) -> None:
    path = tmp_path / "text8.txt"
    path.write_text(LONG)
    with caplog.at_level(logging.INFO, "textgen"):
        parts = read(path, txt_documents=unit)
    assert "".join(parts) == LONG
    assert len(parts) == -(-len(LONG) // PART_BYTES)
    assert all(part.endswith(" ") for part in parts)
    assert parts == read(path, txt_documents=unit)
    assert f"cut 1 of its documents, of more than 16,777,216 bytes, at white space into {len(parts)} of" in caplog.text


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt.gz"])
def test_every_format_cuts_a_long_document_alike(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": [LONG]}), path)
    else:
        rows = {
            "a.jsonl": json.dumps({"text": LONG}),
            "a.json": json.dumps([{"text": LONG}]),
            "a.csv": f'text\n"{LONG}"',
        }
        raw = rows.get(name, LONG).encode()
        path.write_bytes(gzip.compress(raw, 1) if name.endswith(".gz") else raw)
    (tmp_path / "b.txt").write_text(LONG)
    assert read(path) == read(tmp_path / "b.txt")


def test_a_document_of_the_largest_size_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("é " * (MAX_DOCUMENT_BYTES // 3) + "x")
    assert len(read(path)) == 1
    path.write_text("a b\n" * 256 + "\n" + "c d\n" * 257)
    assert [len(text) for text in read(path, txt_documents="paragraph", max_document_bytes=1024)] == [1023, 1024, 3]


def test_a_line_end_of_two_characters_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 1023 + b"\r\n" + b"y" * 10)
    assert read(path, max_document_bytes=1024) == ["x" * 1023, "\r\n" + "y" * 10]


def test_a_cut_paragraph_keeps_a_stretch_of_white_space(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "a" * 1000 + " " * 5000 + "b"
    path.write_text(f"first\n\n{text}\nlast\n\nend\n")
    parts = read(path, txt_documents="paragraph", max_document_bytes=1024)
    assert (parts[0], "".join(parts[1:-1]), parts[-1]) == ("first", f"{text}\nlast", "end")


@example(["語"] * 9, 8, 3)
@given(
    st.lists(st.sampled_from(["a", "é", "語", "😀", " ", "\n", "\r\n", "\u3000", "\u2028", "b" * 40]), max_size=300),
    st.integers(8, 64),
    st.integers(1, 50),
)
def test_parts_joined_are_the_document(pieces: list[str], size: int, block: int) -> None:
    text = "".join(pieces)
    raw = text.encode()
    parts = [part for part, _ in cut_blocks((raw[i : i + block] for i in range(0, len(raw), block)), size, size)]
    whole = [part for part, _ in cut_blocks([raw], size, size)]
    assert b"".join(parts) == raw
    assert parts == whole  # whatever blocks the bytes come in
    assert len(parts) == 1 or max(map(len, parts)) <= size
    for part in parts[:-1]:
        decoded = part.decode()  # no character is cut
        assert decoded[-1].isspace() or not any(map(str.isspace, decoded[:-1]))


PEAK = """
import sys
from textgen.config import DataConfig
from textgen.data.documents import read_files
from textgen.data.tally import Tally
peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024
before = peak()
try: print(sum(len(text) for text in read_files([sys.argv[1]], DataConfig(txt_documents=sys.argv[2]), Tally())))
except ValueError as error: print(error)
print(peak() - before)
"""


def read_in_a_process(path: Path, unit: str = "file") -> tuple[str, int]:
    """Return the number of characters or the error, and the growth of memory in MB."""
    command = [sys.executable, "-c", PEAK, str(path), unit]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    said, growth = result.stdout.splitlines()
    return said, int(growth)


@pytest.mark.parametrize(("unit", "end"), [("file", b""), ("line", b""), ("paragraph", b"\n")])
def test_a_100_mb_text_is_read_in_bounded_memory(tmp_path: Path, unit: str, end: bytes) -> None:
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b"x" * (10**6 - len(end)) + end)
    said, growth = read_in_a_process(path, unit)
    assert int(said) == 100 * 10**6 - len(end)  # less the last line end
    assert growth < 80


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [("a.jsonl", b'{"text": "a"}\n{"text": "', b""), ("a.json", b'[\n{"text": "', b""), ("a.csv", b'text\n"', b""),
     ("a.csv", b'text\n"', b"\n")],
)  # fmt: skip
def test_a_row_of_100_mb_is_refused_in_bounded_memory(tmp_path: Path, name: str, begin: bytes, end: bytes) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(begin)
        for _ in range(100):
            file.write(b"x" * 10**6 + end)
    said, growth = read_in_a_process(path)
    assert said == f"`{path}` line 2 is longer than the limit of a row, 32 MiB; a longer text can be a .txt file"
    assert growth < 250


def test_a_json_array_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    row = json.dumps({"text": "word " * 2000})
    with path.open("w") as file:
        file.write("[" + row)
        for _ in range(5000):
            file.write(", " + row)
        file.write("]")
    said, growth = read_in_a_process(path)
    assert int(said) == 5001 * 10_000
    assert growth < 30


def test_sizes_of_documents_are_checked() -> None:
    for size in (1023, MAX_DOCUMENT_BYTES + 1):
        with pytest.raises(ValueError, match="`max_document_bytes` must be at least 1024 and at most 16777216"):
            DataConfig(max_document_bytes=size)


def test_a_text_of_white_space_alone_is_no_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" " * 17 * 2**20)
    with pytest.raises(TextgenError, match="no documents in"):
        list(read_documents([str(path)]))
