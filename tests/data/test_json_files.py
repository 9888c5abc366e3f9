"""Objects of jsonl and json files: a line each, in an array, or over several lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.files import read, refusal
from textgen.config import DataConfig
from textgen.data import json_files
from textgen.data.tally import Tally
from textgen.errors import TextgenError


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_of_objects_is_read(tmp_path: Path, name: str, indent: int | None) -> None:
    path = tmp_path / name
    path.write_text("\n " + json.dumps([{"id": 1, "text": "one"}, {"text": "é"}], indent=indent) + "\n")
    assert read(path) == ["one", "é"]
    path.write_text("[ ]")
    assert read(path) == []


def test_objects_over_several_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [{"id": 1, "text": "one", "more": {"a": [1, 2]}}, {"text": "two"}]
    for number in (1, 2):
        path.write_text("\n".join(json.dumps(row, indent=2) for row in rows[:number]))
        assert read(path) == ["one", "two"][:number]
    path.write_text('{"text": "one",\n"id": 1}\n{"text": "two",\n"id": 2}')
    assert read(path) == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"text": "a"},\n{"text": "b"}',
            "line 2 is not valid JSON: wanted `,` or `]` after a value of the array: ",
        ),
        ('[{"text": "a"}\n{"text": "b"}]', "line 2 is not valid JSON: wanted `,` or `]` after a value of the array: {"),
        ('[{"text": "a"},\n]', "line 2 is not valid JSON: wanted a value after `,`: ]"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "line 2 is not valid JSON: wanted the end of the file after the array: ["),
        ('[{"text": "a"},\n{"text": }]', "line 2 is not valid JSON: Expecting value"),
        ('[{"text": "a"},\n{"text": "b', "line 2 is not valid JSON: Unterminated string"),
        ('[\n{"text": "a"},\n"b"]', "line 3 is not a JSON object with a key `text`: 'b'"),
        ('["a", "b"]', "line 1 is not a JSON object with a key `text`: 'a'"),
        (
            '{"data": [{"text": "a"}]}',
            "line 1 has no column `text`; it has `data`; wanted the array without an object around it",
        ),
        (
            '{\n"data": [{"text": "a"}]\n}',
            "line 1 has no column `text`; it has `data`; wanted the array without an object around it",
        ),
        (
            '{"a": 1,\n"data": [{"text": "a"}]}',
            "line 1 has no column `text`; it has `a`, `data`; wanted the array without an object around it",
        ),
        ('{"a\\nb": 1}', "line 1 has no column `text`; it has `a b`"),
        ('["a\\nb"]', "line 1 is not a JSON object with a key `text`: 'a\\nb'"),
        ('{"text": ["a", "b"]}', "line 1: `text` is not a string: ['a', 'b']"),
        (
            '[{"text": "a"},\n{"text": "\\ud800"}]',
            "line 2: `text` holds a lone surrogate, which is not valid text: `\\ud800`",
        ),
        ('[{"text": 5}]', "line 1: `text` is not a string: 5"),
        ("[1, 22", "line 1 is not a JSON object with a key `text`: 1"),
        ("[" * 100_000, "line 1 is not valid JSON"),
    ],
)
def test_what_is_no_array_of_texts_is_refused_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    assert refusal(path).startswith(f"`{path}` {message}")


def test_faults_in_an_array_are_skipped_on_request(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(
        b'[{"text": "one"},\n{"text": "caf\xe9"},\n{"id": 1},\n{"text": "two"},\n{"text": "three"}, {"text": null}]'
    )
    assert refusal(path).startswith(f"`{path}` line 2 is not UTF-8: byte 0xe9; ")
    assert read(path, on_error="skip") == ["one", "two", "three", ""]


def test_numbers_in_an_array_are_skipped_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text('[12345, {"text": "a"}]')
    monkeypatch.setattr(json_files, "READ_BYTES", 1)
    assert read(path, on_error="skip") == ["a"]


def test_a_fault_is_found_without_reading_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": oops},\n' + '{"text": "a"},\n' * 200_000)
    with path.open("rb") as file:
        with pytest.raises(TextgenError, match="line 1 is not valid JSON"):
            list(json_files.read_json(file, str(path), DataConfig(), Tally()))
        assert file.tell() < 10 * json_files.READ_BYTES


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.lists(st.tuples(st.text(), JSON), max_size=8), st.sampled_from([None, 0, 3]), st.booleans(), st.integers(1, 40)
)
def test_what_the_standard_library_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, Any]], indent: int | None, ascii: bool, block: int
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    objects = [{"more": more, "text": text} for text, more in rows]
    path.write_text(json.dumps(objects, indent=indent, ensure_ascii=ascii), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "READ_BYTES", block)  # values end anywhere in what has been read
        assert read(path) == [text for text, _ in rows]
