"""Train a tokenizer on files.

python -m tokenizer.train --input reviews.csv --vocab_size 8192 --model_type unigram --output DIR

The package knows nothing of textgen; this command alone borrows its readers of files, when it runs.
"""

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from .tokenizer import MODEL_NAME, Tokenizer
from .trainer import take_training_texts, train_tokenizer

__all__ = ["main", "train_tokenizer"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, write `DIR/tokenizer.model` and print its vocabulary size and bytes per token.

    An error is one line on standard error, exit code 2, and nothing written.
    """
    from textgen.config import READING_SETTINGS, DataConfig
    from textgen.console import start_log, use_utf8
    from textgen.data.documents import has_text, read_files
    from textgen.data.sources import list_files
    from textgen.data.tally import Tally
    from textgen.errors import TextgenError, in_backticks
    from textgen.settings import settings_of

    if arguments is None:
        use_utf8()
    parser = _build_parser()
    kinds, defaults = settings_of(DataConfig), DataConfig()
    for name in READING_SETTINGS:
        _add_flag(parser, name, kinds[name], getattr(defaults, name))
    args = parser.parse_args(arguments)
    start_log()

    tally = Tally()

    def read_texts() -> Iterator[str]:
        return filter(has_text, read_files(files, settings, tally))

    try:
        settings = DataConfig(**{name: getattr(args, name) for name in READING_SETTINGS})
        files = _choose_files(list_files(args.input, rules=settings.reading_rules))
        if next(read_texts(), None) is None:
            raise TextgenError(f"no documents in {in_backticks(args.input)}")
        model_proto = train_tokenizer(read_texts(), vocab_size=args.vocab_size, model_type=args.model_type)
        tokenizer = Tokenizer(model_proto)
        bytes_per_token = _measure_bytes_per_token(tokenizer, read_texts())
        args.output.mkdir(parents=True, exist_ok=True)
        tokenizer.save(args.output / MODEL_NAME)
    except ValueError as error:  # of the settings, the files, the texts or the trainer
        parser.error(str(error))
    except OSError as error:
        parser.error(f"`{error.filename}`: {error.strerror}")
    model_path = args.output / MODEL_NAME
    print(f"{model_path}: vocab_size {tokenizer.vocab_size}, {bytes_per_token:.3f} bytes per token")


def _choose_files(splits: Mapping[str, str]) -> list[str]:
    """Return the files that a training on the same paths would train on, or all of them if it would find none."""
    files = [path for path, split in splits.items() if split not in ("validation", "test")]
    if files and len(files) < len(splits):
        log = logging.getLogger("textgen")
        log.info("not read, as a training holds them out: %d of %d files", len(splits) - len(files), len(splits))
    return files or list(splits)


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
    parser.add_argument(
        "--input", nargs="+", required=True, help="files, folders or globs, as for `--data.files` of a training"
    )
    parser.add_argument("--vocab_size", type=int, default=8192, help="number of token ids (default: 8192)")
    parser.add_argument("--model_type", choices=["unigram", "bpe", "char", "word"], default="unigram")
    parser.add_argument("--output", type=Path, required=True, help="directory for tokenizer.model")
    return parser


def _add_flag(parser: argparse.ArgumentParser, name: str, kind: Any, default: object) -> None:
    """Add a flag of a training's setting: a text, an integer, or one of some values."""
    values = get_args(kind)
    is_choice = get_origin(kind) is Literal
    parser.add_argument(
        f"--{name}",
        type=int if int in values else str,
        choices=values if is_choice else None,
        default=default,
        help=f"as `--data.{name}` of a training (default: %(default)s)",
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with one line, without the usage that argparse puts before it."""
        self.exit(2, f"{self.prog}: error: {message}\n")


if __name__ == "__main__":
    main()
