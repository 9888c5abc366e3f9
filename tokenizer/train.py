"""Train a tokenizer on files.

python -m tokenizer.train --input reviews.csv --vocab_size 8192 --model_type unigram --output DIR
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .tokenizer import MODEL_NAME, Tokenizer, TokenizerError
from .trainer import take_training_texts, train_tokenizer

__all__ = ["main", "read_texts", "train_tokenizer"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, write `DIR/tokenizer.model` and print its vocabulary size and bytes per token.

    An error is one line on standard error, exit code 2, and nothing written.
    """
    parser = _build_parser()
    args = parser.parse_args(arguments)
    try:
        model_proto = train_tokenizer(
            _read_all(args.input, args.text_column), vocab_size=args.vocab_size, model_type=args.model_type
        )
        tokenizer = Tokenizer(model_proto)
        bytes_per_token = _measure_bytes_per_token(tokenizer, _read_all(args.input, args.text_column))
        args.output.mkdir(parents=True, exist_ok=True)
        tokenizer.save(args.output / MODEL_NAME)
    except TokenizerError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"`{error.filename}`: {error.strerror}")
    model_path = args.output / MODEL_NAME
    print(f"{model_path}: vocab_size {tokenizer.vocab_size}, {bytes_per_token:.3f} bytes per token")


def read_texts(path: Path, text_column: str) -> Iterator[str]:
    """Yield the documents of a txt (one per line), jsonl, csv or parquet file.

    Raises:
        TokenizerError: Unreadable content or a missing column; says where.
        OSError: The file cannot be opened.
    """
    match path.suffix:
        case ".txt":
            return (line.rstrip("\r\n") for _, line in _numbered_lines(path))
        case ".jsonl":
            return _jsonl_texts(path, text_column)
        case ".csv":
            return _csv_texts(path, text_column)
        case ".parquet":
            return _parquet_texts(path, text_column)
    raise TokenizerError(f"`{path}` is not a txt, jsonl, csv or parquet file")


def _read_all(paths: Sequence[Path], text_column: str) -> Iterator[str]:
    return (text for path in paths for text in read_texts(path, text_column))


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise TokenizerError(f"`{path}` line {number} is not UTF-8: byte {error.start}") from None


def _jsonl_texts(path: Path, text_column: str) -> Iterator[str]:
    for number, line in _numbered_lines(path):
        where = f"`{path}` line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TokenizerError(f"{where} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise TokenizerError(f"{where} is not a JSON object")
        _check_column(where, text_column, row)
        yield _as_text(where, row[text_column])


def _csv_texts(path: Path, text_column: str) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)  # the default, 131,072 characters, is less than a long document
    rows = csv.DictReader((line for _, line in _numbered_lines(path)), strict=True)
    try:
        _check_column(f"`{path}`", text_column, rows.fieldnames or [])
        for row in rows:
            yield _as_text(f"`{path}` line {rows.line_num}", row[text_column])
    except csv.Error as error:
        raise TokenizerError(f"`{path}` line {rows.reader.line_num} is not csv: {error}") from None


def _parquet_texts(path: Path, text_column: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise TokenizerError(f"`{path}` needs pyarrow: pip install pyarrow") from None
    with path.open("rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            _check_column(f"`{path}`", text_column, table.schema_arrow.names)
            for batch in table.iter_batches(columns=[text_column], batch_size=1000):
                yield from (_as_text(f"`{path}`", value) for value in batch.column(0).to_pylist())
        except pyarrow.ArrowException as error:
            raise TokenizerError(f"`{path}` is not parquet: {str(error).splitlines()[0]}") from None


def _check_column(where: str, text_column: str, columns: Any) -> None:
    if text_column not in columns:
        names = ", ".join(f"`{name}`" for name in columns) or "none"
        raise TokenizerError(f"{where} has no column `{text_column}`; it has {names}")


def _as_text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise TokenizerError(f"{where} holds no text but {value!r:.40}")
    return value


def _measure_bytes_per_token(tokenizer: Tokenizer, texts: Iterator[str]) -> float:
    num_bytes = num_tokens = 0
    for text in take_training_texts(texts):
        num_bytes += len(text.encode())
        num_tokens += len(tokenizer.encode(text))
    return num_bytes / num_tokens


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"python -m {__package__}.train", description="Train a tokenizer on files.", allow_abbrev=False
    )
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="txt, jsonl, csv or parquet files")
    parser.add_argument("--text_column", default="text", help="column of jsonl, csv and parquet (default: text)")
    parser.add_argument("--vocab_size", type=int, default=8192, help="number of token ids (default: 8192)")
    parser.add_argument("--model_type", choices=["unigram", "bpe", "char", "word"], default="unigram")
    parser.add_argument("--output", type=Path, required=True, help="directory for tokenizer.model")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with one line, without the usage that argparse puts before it."""
        self.exit(2, f"{self.prog}: error: {message}\n")


if __name__ == "__main__":
    main()
