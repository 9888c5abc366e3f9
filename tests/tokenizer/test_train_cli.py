import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from textgen.config import READING_SETTINGS, DataConfig
from textgen.data.corpus import open_corpus
from textgen.settings import settings_of
from tokenizer import Tokenizer, train_tokenizer
from tokenizer.train import main

TEXTS = ["a good film", "caf\u00e9, a <br /><br />bad one", 'so "good"']


def _write_txt(path: Path) -> None:
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")


def _write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS), encoding="utf-8")


def _write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *((1, text) for text in TEXTS)])


def _write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": TEXTS}), path)


WRITERS = {".txt": _write_txt, ".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
def test_each_format_gives_the_same_tokenizer(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"reviews{suffix}"
    WRITERS[suffix](path)
    assert _train(path, "--txt_documents", "line") == train_tokenizer(TEXTS, model_type="char")


def _train(path: Path, *flags: str) -> bytes:
    output = path.parent / "out"
    main(["--input", str(path), "--model_type", "char", "--output", str(output), *flags])
    return (output / "tokenizer.model").read_bytes()


def _fill(folder: Path) -> None:
    """Write files of every kind that a training reads, and some of test."""
    from datasets import Dataset

    (folder / "test").mkdir(parents=True)
    (folder / "test" / "a.txt").write_text("ΑΒΓΔ")
    (folder / "book.txt").write_text("one\n\ntwo\n")
    (folder / "a.json").write_text('{"text": "japanese 日本"}\n\n')
    (folder / "b.tsv").write_text("id\ttext\n1\tnorsk æøå\n")
    (folder / "C.JSONL").write_text('{"text": "upper"}\n{"text": " "}\n')
    Dataset.from_dict({"text": ["saved §"]}).save_to_disk(folder / "saved")


def test_a_folder_gives_the_tokenizer_of_the_documents_that_a_training_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _fill(tmp_path / "corpus")
    config = DataConfig(source="files", files=(str(tmp_path / "corpus"),))
    texts = [text for text in open_corpus(config).splits["train"]() if text.strip()]
    assert sorted(texts) == [
        "japanese 日本", "norsk æøå", "one\n\ntwo\n", "saved §", "upper",
    ]  # fmt: skip
    assert _train(tmp_path / "corpus") == train_tokenizer(texts, model_type="char")
    assert "not read, as a training holds them out: 1 of 6 files" in caplog.messages
    assert _train(tmp_path / "corpus" / "saved") == train_tokenizer(["saved §"], model_type="char")
    assert _train(tmp_path / "corpus" / "test") == train_tokenizer(["ΑΒΓΔ"], model_type="char")


def test_flags_of_reading_are_those_of_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert {name for name in settings_of(DataConfig) if f"--{name} " in shown} == set(READING_SETTINGS)
    for flags, message in {
        ("--txt_documents", "word"): "invalid choice: 'word' (choose from 'file', 'line', 'paragraph')",
        ("--max_document_bytes", "0"): "`max_document_bytes` must be",
        ("--csv_delimiter", "ab"): "`csv_delimiter` must be one character",
    }.items():
        with pytest.raises(SystemExit):
            main(["--input", str(tmp_path), "--output", str(tmp_path / "out"), *flags])
        assert message in capsys.readouterr().err


def test_command_writes_a_model_and_prints_one_line(tmp_path: Path) -> None:
    _write_txt(tmp_path / "a.txt")
    _write_csv(tmp_path / "b.csv")
    inputs = [str(tmp_path / "a.txt"), str(tmp_path / "b.csv")]
    arguments = [
        "--input",
        *inputs,
        "--vocab_size",
        "280",
        "--model_type",
        "bpe",
        "--output",
        str(tmp_path / "new" / "dir"),
    ]
    result = subprocess.run([sys.executable, "-m", "tokenizer.train", *arguments], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    path = tmp_path / "new" / "dir" / "tokenizer.model"
    assert result.stdout.startswith(f"{path}: vocab_size 280, ")
    assert result.stdout.endswith(" bytes per token\n")
    assert result.stdout.count("\n") == 1
    assert Tokenizer.from_file(path).vocab_size == 280


def _write(name: str, content: bytes) -> Callable[[Path], list[str]]:
    def write(directory: Path) -> list[str]:
        (directory / name).write_bytes(content)
        return ["--input", str(directory / name)]

    return write


def _missing_parquet_column(directory: Path) -> list[str]:
    pyarrow.parquet.write_table(pyarrow.table({"review": TEXTS}), directory / "a.parquet")
    return ["--input", str(directory / "a.parquet")]


BAD_INPUTS: list[tuple[Callable[[Path], list[str]], str]] = [
    (lambda directory: ["--input", str(directory / "missing.txt")], "missing.txt` does not exist"),
    (lambda directory: ["--input", str(directory)], "holds no file of `.txt`, `.jsonl`"),
    (_write("a.txt", b""), "a.txt` is empty"),
    (_write("a.txt", b"\n \n"), "no documents in `"),
    (_write("a.csv", b"\n"), "a.csv` has no column `text`; it has none"),
    (_write("a.txt", b"one\ntwo\n\xff\n"), "a.txt` line 3 is not UTF-8: byte 0xff"),
    (_write("a.csv", b"id,review\n1,good\n"), "a.csv` has no column `text`; it has `id`, `review`"),
    (_write("a.csv", b"id,text\n1\n"), "a.csv` line 2 has 1 fields; its header has 2"),
    (_write("a.csv", b'text\n"open\n'), "a.csv` line 2 is not valid CSV: unexpected end of data"),
    (_write("a.jsonl", b'{"text": "a"}\n{"body": 1}\n'), "a.jsonl` line 2 has no column `text`; it has `body`"),
    (_write("a.jsonl", b'{"text": 3}\n'), "a.jsonl` line 1: `text` is not a string: 3"),
    (_write("a.jsonl", b"{\n"), "a.jsonl` line 2 is not valid JSON"),
    (_write("a.jsonl", b"[1]\n"), "a.jsonl` line 1 is not a JSON object"),
    (_write("a.jsonl", b'{"text": "\\ud800"}\n'), "a.jsonl` line 1: `text` holds a lone surrogate"),
    (_write("a.parquet", b"no"), "a.parquet` is not valid parquet"),
    (_missing_parquet_column, "a.parquet` has no column `text`; it has `review`"),
    (lambda directory: [*_write("a.txt", b"few words\n")(directory), "--vocab_size", "9000"], "is too large"),
    (lambda directory: [*_write("a.txt", b"few words\n")(directory), "--vocab_size", "-3"], "vocab_size -3 is too"),
    (lambda directory: [*_write("a.txt", b"few words\n")(directory), "--vocab", "300"], "unrecognized arguments"),
    (lambda directory: [*_write("a.txt", b"few words\n")(directory), "--model_type", "x"], "invalid choice"),
]


@pytest.mark.parametrize(("write", "message"), BAD_INPUTS)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Callable[[Path], list[str]], message: str
) -> None:
    output = tmp_path / "output"
    with pytest.raises(SystemExit) as error:
        main([*write(tmp_path), "--output", str(output)])
    captured = capsys.readouterr()
    assert error.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not output.exists()


def test_output_that_is_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_txt(tmp_path / "a.txt")
    with pytest.raises(SystemExit):
        main(["--input", str(tmp_path / "a.txt"), "--model_type", "char", "--output", str(tmp_path / "a.txt")])
    assert f"`{tmp_path}{os.sep}a.txt`: File exists" in capsys.readouterr().err
