"""A byte order mark is no part of a text, other encodings are read or named, and bad bytes are refused or skipped."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textgen.config import DataConfig
from textgen.data.documents import read_files
from textgen.data.tally import Tally
from textgen.errors import TextgenError

NAMES = ["a.txt", "a.jsonl", "a.json", "a.csv", "a.tsv"]
CONTENT = {
    "a.txt": "{}\n{}\n", "a.jsonl": '{{"text": "{}"}}\n{{"text": "{}"}}\n',
    "a.json": '[{{"text": "{}"}},\n {{"text": "{}"}}]',
    "a.csv": "text\n{}\n{}\n", "a.tsv": "text\n{}\n{}\n",
}  # fmt: skip
TEXTS = {
    "latin-1": ["caf\xe9", "\xfcber"], "cp1252": ["“caf\xe9”", "1 €"], "utf-16": ["語 caf\xe9", "😀"],
    "utf-16-be": ["語 caf\xe9", "😀"], "utf-32": ["語 caf\xe9", "😀"], "shift_jis": ["表ソ語", "日本"],
    "ascii": ["a", "b"],
    "gb18030": ["語言", "😀"], "utf-8-sig": ["caf\xe9", "語"],
}  # fmt: skip


def read(path: Path, **settings: Any) -> list[str]:
    settings = {"txt_documents": "line"} | settings
    return list(read_files([str(path)], DataConfig(**settings), Tally()))


def refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(TextgenError) as caught:
        read(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unit", ["file", "line", "paragraph"])
def test_a_byte_order_mark_is_no_part_of_a_document(tmp_path: Path, name: str, unit: str) -> None:
    path = tmp_path / name
    path.write_text(CONTENT[name].format("one", "two"))
    plain = read(path, txt_documents=unit)
    raw = b"\xef\xbb\xbf" + path.read_bytes()
    path.write_bytes(raw)
    assert read(path, txt_documents=unit) == plain
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(raw))
    assert read(packed, txt_documents=unit) == plain


def test_by_the_rules_of_0_1_a_mark_stays_in_a_file_that_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\ufeffone\n")
    assert read(path, txt_documents="file", reading_rules=1) == ["\ufeffone\n"]
    assert read(path, txt_documents="line", reading_rules=1) == ["one"]


@pytest.mark.parametrize("encoding", TEXTS)
@pytest.mark.parametrize("name", NAMES)
def test_other_encodings_are_read(tmp_path: Path, name: str, encoding: str) -> None:
    path = tmp_path / name
    path.write_bytes(CONTENT[name].format(*TEXTS[encoding]).encode(encoding))
    assert read(path, encoding=encoding) == TEXTS[encoding]


@pytest.mark.parametrize(
    ("encoding", "seen"),
    [("utf-16-le", "ff fe"), ("utf-16-be", "fe ff"), ("utf-32-le", "ff fe 00 00"), ("utf-32-be", "00 00 fe ff")],
)
@pytest.mark.parametrize("name", NAMES)
def test_utf_16_and_32_are_named(tmp_path: Path, name: str, encoding: str, seen: str) -> None:
    path = tmp_path / name
    path.write_bytes(("\ufeff" + CONTENT[name].format("one", "two")).encode(encoding))
    wide = encoding[:6]
    expected = f"`{path}` is {wide.upper()} (it begins with {seen}): set `--data.encoding {wide}`"
    assert refusal(path) == refusal(path, on_error="skip") == refusal(path, encoding="latin-1") == expected
    assert read(path, encoding=wide) == ["one", "two"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_recognized(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("a text in ASCII, or nearly\n".encode(encoding))
    assert refusal(path).endswith(f"looks like UTF-16 (every second byte is 0): set `--data.encoding {encoding}`")
    assert "a\0" in "".join(read(path, reading_rules=1))  # a run of 0.1 goes on with what it was begun with
    path.write_text("one \0 in a text\n")
    assert read(path) == ["one \0 in a text"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_file_without_the_mark_of_its_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a text in UTF-8\n")
    name, setting = encoding.upper(), f"`--data.encoding {encoding}-le` or `{encoding}-be`"
    message = f"`{path}` does not begin with a byte order mark of {name}: if it is {name}, set {setting}"
    assert refusal(path, encoding=encoding) == message
    path.write_text("\ufeffa text in UTF-8\n")
    assert read(path, encoding=encoding) == ["a text in UTF-8"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("encoding", "bad"), [("utf-8", b"\xe9"), ("utf-8", b"\xff"), ("cp1252", b"\x81"), ("ascii", b"\xe9")]
)
def test_bytes_of_another_encoding_are_refused_or_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, encoding: str, bad: bytes
) -> None:
    path = tmp_path / name
    content = CONTENT[name].replace("{}", "one", 1).format("@").replace("one", "zero", 1)
    lines = content.encode().replace(b"@", b"caf" + bad)
    lines = lines.replace(b"]", b', {"text": "three"}]') if name == "a.json" else lines + lines.splitlines(True)[-2]
    path.write_bytes(lines)
    number = 3 if name in ("a.csv", "a.tsv") else 2
    shown = "UTF-8" if encoding == "utf-8" else encoding
    message = f"`{path}` line {number} is not {shown}: byte 0x{bad.hex()}; see `--data.encoding` and `--data.on_error`"
    assert refusal(path, encoding=encoding) == message
    assert len(read(path, encoding=encoding, on_error="skip")) == 2
    assert f"skipped: {message}" in caplog.text
    assert f"`{path}`: skipped 1 of 3 documents, which cannot be read" in caplog.text


def test_a_wrong_encoding_is_refused_even_if_faults_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("caf\xe9\n".encode("latin-1") * 40 + b"one\n" * 30)
    message = refusal(path, on_error="skip")
    fault = f"`{path}` line 1 is not UTF-8: byte 0xe9; see `--data.encoding` and `--data.on_error`"
    assert message == f"`{path}`: 40 of 70 documents cannot be read, the first: {fault}"
    assert len(read(path, encoding="latin-1")) == 70


def test_the_log_names_the_first_three_faults_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    bad = ['{"text": "a"', '{"text": "\\ud800"}', "5", '{"review": "a"}', '{"text": [1]}']
    path.write_text("".join(f"{line}\n" for line in bad) + '{"text": "a"}\n' * 10)
    tally = Tally()
    settings = DataConfig(on_error="skip")
    with caplog.at_level(logging.INFO, "textgen"):
        passes = [list(read_files([str(path)], settings, tally)) for _ in range(2)]
    assert passes == [["a"] * 10] * 2
    assert [record.message.split("`")[2][:8] for record in caplog.records[:3]] == [" line 1 ", " line 2:", " line 3 "]
    assert [record.message for record in caplog.records[3:]] == [
        f"`{path}`: skipped 5 of 15 documents, which cannot be read"
    ]


def test_a_null_is_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": f"text {i}"} for i in range(400)]
    rows[7] = {"text": None}  # type: ignore[dict-item]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.parquet", "a.jsonl", "a.json"):
        texts = read(tmp_path / name)
        assert (len(texts), texts[7]) == (400, ""), name  # a corpus drops it with those without text
        assert f"`{tmp_path / name}`: dropped 1 of 400 rows, as `text` is null" in caplog.text
    rows[:300] = [{"text": None}] * 300  # type: ignore[list-item]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.parquet", "a.jsonl"):
        assert refusal(tmp_path / name).startswith(f"`{tmp_path / name}`: `text` is null in 300 of 400 rows; ")


def test_parquet_texts_that_are_not_utf8_are_refused_or_skipped(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    texts = pa.array([b"one", b"caf\xe9", None, b"two"]).view(pa.string())
    pq.write_table(pa.table({"text": texts}), path)
    assert refusal(path) == f"`{path}` row 2: `text` is not a string: b'caf\\xe9'"
    assert read(path, on_error="skip") == ["one", "", "two"]


@pytest.mark.parametrize("encoding", ["nonsense", "base64", "rot13", "idna", "unicode_escape", "utf-8\0", ""])
def test_names_that_are_no_encoding_of_text_are_refused(encoding: str) -> None:
    with pytest.raises(ValueError, match="`encoding` must name an encoding of text, such as utf-8 or latin-1"):
        DataConfig(encoding=encoding)


@given(st.text(st.characters(codec="utf-16", exclude_characters="\r\n\ufeff"), min_size=1), st.integers(0, 3))
def test_a_text_is_the_same_in_every_encoding(tmp_path_factory: pytest.TempPathFactory, text: str, place: int) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    encoding = ("utf-16", "utf-32-be", "utf-7", "gb18030")[place]
    path.write_bytes(text.encode(encoding))
    assert read(path, encoding=encoding) == [text]
