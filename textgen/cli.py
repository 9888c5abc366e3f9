"""The command line: YAML and flags to a frozen config; the verbs prepare, evaluate and sample.

What is heavy (torch, accelerate, datasets) is imported once the flags are known to be right: `--help` and a wrong flag
are answered in 0.3 s, not in 1.7 s.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import json
import math
import os
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from textgen.config import Precision, SamplingConfig, TrainConfig

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)

# A launcher ends all processes once one has ended. The first process says what is wrong with all of them; another one
# waits this long to be ended, and speaks only if nobody did.
PATIENCE_SECONDS = 15

VERBS = """usage: textgen {prepare,evaluate,sample} ... (each with --help)

  prepare    encode the training text ahead of time; takes the flags of train_distributed.py
  evaluate   bits per byte of a checkpoint on a file or a split
  sample     continue prompts

Training itself is `train_distributed.py`, alone or under `accelerate launch`.
"""

TRAINING = """Train an LSTM language model, alone or under `accelerate launch`.
Flags override the file of `--config`, which overrides the defaults; of a flag given twice the last counts.
A list is written `--data.files a.txt b.txt`, a switch `--dry_run`."""

Settings = TypeVar("Settings")


# --- errors ----------------------------------------------------------------------------------------------------------


def fail(message: str) -> NoReturn:
    """End this process with exit code 2; the first one says why."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(PATIENCE_SECONDS)
        message = f"process {rank}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def run(action: Callable[[], None]) -> None:
    """Run a verb; turn what is the user's to mend into one line and exit code 2."""
    try:
        action()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # who reads has had enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # 128 + SIGPIPE, as of a program that knows nothing of it
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        fail(f"{error.strerror or error}" + (f": `{error.filename}`" if error.filename else ""))
    except ValueError as error:
        if not isinstance(error, _user_errors()):
            raise
        fail(str(error))
    except Exception:
        # When the first process ends, the others fail in their next collective: leave the word to it.
        if os.environ.get("RANK", "0") != "0":
            time.sleep(PATIENCE_SECONDS)
        raise


def _user_errors() -> tuple[type[ValueError], ...]:
    from textgen.checkpoint import CheckpointError
    from textgen.data import DataError
    from textgen.documents import CorpusError
    from textgen.launch import LaunchError
    from textgen.model import ModelFileError
    from textgen.training import TrainingError
    from tokenizer import TokenizerError

    return CheckpointError, CorpusError, DataError, LaunchError, ModelFileError, TokenizerError, TrainingError


# --- parsing ---------------------------------------------------------------------------------------------------------


class Parser(ArgumentParser):
    """jsonargparse's parser with one-line errors that say what is wanted."""

    def __init__(self, **kwargs: Any) -> None:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line from the first process and end with exit code 2."""
        fail(self._in_one_line(message))

    def _in_one_line(self, message: str) -> str:
        options = {name.removeprefix("--"): action for action in self._actions for name in action.option_strings}
        if wrong := re.match(r"unrecognized arguments: (\S+)", message):
            if not wrong[1].startswith("-"):
                return f"unexpected argument `{wrong[1]}`"
            return unknown_setting(wrong[1].split("=")[0].lstrip("-"), options)
        if wrong := re.match(r"argument (--\S+): expected one argument", message):
            return f"`{wrong[1]}` wants a value; one that begins with a dash is written `{wrong[1]}=-...`"
        if wrong := re.match(r"the following arguments are required: (.+)", message):
            return f"an argument is missing: `{wrong[1]}`"
        if wrong := re.match(r'Parser key "([^"]+)":.*?(?:Got value|Given value): (.*)', message, re.DOTALL):
            key, value = wrong.groups()
            kind = getattr(options.get(key), "_typehint", getattr(options.get(key), "type", None))
            quote = (
                " (YAML reads a bare `no` as false: put it in quotes)"
                if value == "False" and "`no`" in in_words(kind)
                else ""
            )
            return f"`{key}` must be {in_words(kind)}: {' '.join(value.split())}{quote}"
        if wrong := re.match(r'Parser key "([^"]+)":\s+Unable to load config \'(.*?)\'', message):
            return f"`{wrong[1]}` must be a YAML file of settings: {wrong[2]}"
        return " ".join(message.split())


def unknown_setting(name: str, known: Iterable[str], where: str = "") -> str:
    """Return the error that names an unknown setting and the nearest one."""
    nearest = [option for option in known if option.endswith(f".{name}")]  # `vocab_size` without its `tokenizer.`
    nearest = nearest or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown setting `{name}`{where}" + (f"; the nearest is `{nearest[0]}`" if nearest else "")


def in_words(kind: Any) -> str:
    """Return what a value of a type looks like to a user."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else in_words(part) for part in parts)
    if origin is Literal:
        return "one of " + ", ".join(f"`{value}`" for value in parts)
    if origin is tuple:
        items = {int: "integers", float: "numbers", str: "texts"}.get(parts[0], "values")
        return f"a list of {items}" if parts[-1] is ... else f"a list of {len(parts)} {items}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text"}.get(kind, str(kind))


def parse_train_config(argv: Sequence[str] | None = None, *, prog: str | None = None) -> TrainConfig:
    """Parse defaults < `--config FILE` < flags; end with one line and exit code 2 where something is wrong."""
    parser = build_train_parser(prog)
    flags = _plain_flags(sys.argv[1:] if argv is None else argv, settings_of(TrainConfig))
    files = [flag for flag in flags if flag.startswith("--config=")]
    files = [flag for flag in files if _check_config_file(flag.partition("=")[2])]
    # a file stands before all flags, wherever it was named
    parsed = parser.parse_args(files + [flag for flag in flags if not flag.startswith("--config=")])
    try:
        return build_settings(TrainConfig, parsed.as_dict())
    except ValueError as error:
        parser.error(str(error))


def build_train_parser(prog: str | None = None) -> Parser:
    """Return the parser of a training's settings."""
    parser = Parser(prog=prog, description=TRAINING, usage="%(prog)s [--config FILE] [--SETTING VALUE] ...")
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="YAML file of settings, such as launch/presets/quick.yaml"
    )
    parser.add_class_arguments(TrainConfig, None, fail_untyped=True)
    kinds = settings_of(TrainConfig)
    for action in parser._actions:
        kind = kinds.get(action.dest)
        if typing.get_origin(kind) is tuple:
            action.metavar = "ITEM ..."
        elif kind is bool:
            action.metavar = "[true|false]"
    return parser


def settings_of(settings: type, prefix: str = "") -> dict[str, Any]:
    """Return the types of all settings by dotted name."""
    kinds: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(settings).items():
        if dataclasses.is_dataclass(kind):
            kinds |= settings_of(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            kinds[prefix + name] = kind
    return kinds


def build_settings(settings: type[Settings], values: Mapping[str, Any], prefix: str = "") -> Settings:
    """Build a dataclass of settings and those in it from plain values, such as JSON holds.

    Raises:
        ValueError: a setting is unknown, or its value not allowed; the message has its dotted name.
    """
    kinds = typing.get_type_hints(settings)
    built: dict[str, Any] = {}
    for name, value in values.items():
        if name == "__path__" or (name == "config" and not prefix):  # jsonargparse notes where values came from
            continue
        if name not in kinds:
            raise ValueError(f"unknown setting `{prefix}{name}`")
        kind = kinds[name]
        if dataclasses.is_dataclass(kind):
            built[name] = build_settings(typing.cast(type, kind), value, f"{prefix}{name}.")
        elif value is None and type(None) not in typing.get_args(kind):
            raise ValueError(f"`{prefix}{name}` must be {in_words(kind)}: null")
        else:
            built[name] = tuple(value) if typing.get_origin(kind) is tuple else value
    try:
        return settings(**built)
    except ValueError as error:
        own = "|".join(kinds)
        raise ValueError(re.sub(f"`({own})`", rf"`{prefix}\1`", str(error)) if prefix else str(error)) from None


def _plain_flags(argv: Sequence[str], kinds: Mapping[str, Any]) -> list[str]:
    """Spell flags as jsonargparse wants them: `--files a b` as `--files=["a", "b"]`, a bare `--dry_run` as true."""
    out: list[str] = []
    rest = list(argv)
    while rest:
        flag, equals, first = rest.pop(0).partition("=")
        kind = kinds.get(flag.removeprefix("--"))
        values = [first] if equals else []
        several = typing.get_origin(kind) is tuple
        while not equals and rest and not rest[0].startswith("--") and (several or (kind is bool and not values)):
            values.append(rest.pop(0))
        if flag == "--config" and not equals and rest and not rest[0].startswith("--"):
            values = [rest.pop(0)]
        if kind is bool and not values:
            values = ["true"]
        if several and not (len(values) == 1 and re.fullmatch(r"\[.*\]", values[0])):
            values = [json.dumps([_number(v) for v in values] if typing.get_args(kind)[0] is float else values)]
        out.append(f"{flag}={values[0]}" if values else flag)
    return out


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _check_config_file(path: str) -> bool:
    """Tell whether a YAML file holds settings; fail where it is not to be read or a name in it is unknown."""
    try:
        # for its names only: PyYAML reads 1e-4 as text, jsonargparse as a number
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"`{path}` cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"`{path}` is not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        fail(f"`{path}`{line} is not YAML: {getattr(error, 'problem', None) or ' '.join(str(error).split())}")
    if content is None:
        return False
    if not isinstance(content, dict):
        fail(f"`{path}` is not a mapping of settings such as `batch_size: 128`: {str(content)[:40]}")
    kinds = settings_of(TrainConfig)
    for name, value in content.items():
        group = {kind for kind in kinds if kind.startswith(f"{name}.")}
        if group and not isinstance(value, dict):
            fail(f"`{name}` in `{path}` must be a group of settings: {'null' if value is None else value}")
        for full in [f"{name}.{key}" for key in value] if group else [str(name)]:
            if full not in kinds:
                groups = {kind.split(".")[0] for kind in kinds}
                fail(unknown_setting(full, [*kinds, *groups], f" in `{path}`"))
    return True


# --- verbs -----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb of the console script `textgen`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    verbs: dict[str, Callable[[Sequence[str]], None]] = {"prepare": prepare, "evaluate": evaluate, "sample": sample}
    if argv and argv[0] in verbs:
        run(lambda: verbs[argv[0]](argv[1:]))
    elif argv in (["--help"], ["-h"]):
        print(VERBS, end="")
    else:
        fail(f"`textgen` wants one of {', '.join(f'`{verb}`' for verb in verbs)}" + (f": {argv[0]}" if argv else ""))


def train_main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    run(lambda: _train(argv))


def _train(argv: Sequence[str] | None) -> None:
    config = parse_train_config(argv)
    _start_log()
    from textgen.training import train

    train(config)


def _start_log() -> None:
    """Send the log of the first process to standard error."""
    from textgen.tracking import setup_logging

    setup_logging(main=os.environ.get("RANK", "0") == "0")


def prepare(argv: Sequence[str]) -> None:
    """Encode the text of a training ahead of time and print where the store lies."""
    config = parse_train_config(argv, prog="textgen prepare")
    _start_log()
    from textgen.data import prepare_store

    print(prepare_store(config.data, config.tokenizer).directory)


def evaluate(argv: Sequence[str]) -> None:
    """Score a checkpoint on whole documents and print the figures."""
    parser = Parser(prog="textgen evaluate", description="Score whole documents. Runs under `accelerate launch` too.")
    parser.add_argument("checkpoint", help="checkpoint, run folder or hub repository")
    parser.add_argument(
        "--data",
        default="validation",
        help="a file, folder or glob, or a split of the training's data: train, validation, test",
    )
    parser.add_argument("--text_column", default="text", help="column of the text in csv, jsonl and parquet files")
    parser.add_argument("--limit", type=int | None, default=None, help="score the first N documents only")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="documents read side by side; no influence on the figures"
    )
    parser.add_argument("--mixed_precision", type=Precision, default="no", help="precision of matrix products")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args(list(argv))
    for name in ("limit", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"`{name}` must be at least 1: {getattr(args, name)}")

    _start_log()
    from textgen import launch
    from textgen.checkpoint import load_model
    from textgen.data import DataError, encode_documents
    from textgen.evaluation import score

    accelerator = launch.start(args.mixed_precision)
    model, tokenizer = load_model(args.checkpoint, accelerator.device)
    if not tokenizer.is_lossless:
        raise DataError(f"`{args.checkpoint}` has a word tokenizer, which loses text: it has no bits per byte")
    texts = _texts(args.checkpoint, args.data, args.text_column, args.limit, model.text.get("normalization", "none"))
    documents = encode_documents(tokenizer, texts)
    num_bytes, words = sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts)
    result = score(
        accelerator, model, documents, num_bytes, bos_id=tokenizer.bos_id, batch_size=args.batch_size, progress=True
    )
    figures = {
        "bits_per_byte": result.bits_per_byte, "nats_per_token": result.nats_per_token,
        "perplexity": result.perplexity, "word_perplexity": result.word_perplexity(words),
        "tokens": result.tokens, "bytes": result.bytes, "documents": result.documents,
        "seconds": round(result.seconds, 3),
    }  # fmt: skip
    if accelerator.is_main_process:
        if args.json:  # JSON knows no infinity
            print(json.dumps({name: value if math.isfinite(value) else None for name, value in figures.items()}))
        else:
            print(
                "\n".join(
                    f"{name:16} {value:,.6g}" if isinstance(value, float) else f"{name:16} {value:,}"
                    for name, value in figures.items()
                )
            )
    accelerator.end_training()


def _texts(checkpoint: str, data: str, text_column: str, limit: int | None, normalization: str) -> list[str]:
    """Return the documents to score: of files, or of a split of the data that the checkpoint was trained on."""
    from textgen.checkpoint import TRAINER_NAME, CheckpointError, checkpoints, read_trainer
    from textgen.corpus import normalize
    from textgen.data import DataError, prepare_store
    from textgen.documents import read_documents

    if data in ("train", "validation", "test"):
        directory = next((path for _, path in checkpoints(Path(checkpoint))), Path(checkpoint))
        if not (directory / TRAINER_NAME).exists():
            raise DataError(f"`{checkpoint}` does not say what it was trained on: give `--data` a file, not `{data}`")
        settings = read_trainer(directory)["config"]
        try:
            config = build_settings(TrainConfig, {k: settings[k] for k in ("data", "tokenizer") if k in settings})
        except ValueError as error:
            raise CheckpointError(f"`{directory / TRAINER_NAME}`: {error}") from error
        store = prepare_store(config.data, config.tokenizer)
        split = store.split(data)
        count = split.num_documents if limit is None else min(limit, split.num_documents)
        # documents end with the end-of-text token, which decodes to nothing
        texts = [store.tokenizer.decode(split.document(i).tolist()) for i in range(count)]
    else:
        documents = (text for text in read_documents([data], text_column=text_column) if text.strip())
        texts = [
            normalize(text, normalization) for text, _ in zip(documents, range(limit or sys.maxsize), strict=False)
        ]
    if not texts:
        raise DataError(f"`{data}` holds no documents")
    return texts


def sample(argv: Sequence[str]) -> None:
    """Continue prompts; only text goes to standard output."""
    parser = Parser(prog="textgen sample", description="Continue prompts with a trained model.")
    parser.add_argument("checkpoint", help="checkpoint, run folder or hub repository")
    parser.add_argument(
        "--prompt",
        action="append",
        help="text to continue; may be given several times; '' starts a review. Without any, standard input is read, "
        "unless it is a terminal",
    )
    parser.add_argument(
        "--prompt_file", help="file whose text, but for a last line break, is a prompt; - is standard input"
    )
    parser.add_argument("--num_samples", type=int, default=1, help="samples of each prompt")
    parser.add_argument("--json", action="store_true", help="print one JSON object per sample")
    parser.add_class_arguments(SamplingConfig, None, fail_untyped=True)
    args = parser.parse_args(list(argv))
    try:
        config = build_settings(SamplingConfig, {f.name: args[f.name] for f in dataclasses.fields(SamplingConfig)})
    except ValueError as error:
        parser.error(str(error))
    if args.num_samples < 1:
        parser.error(f"`num_samples` must be at least 1: {args.num_samples}")
    prompts = [_decode(os.fsencode(prompt), "`--prompt`") for prompt in args.prompt or []]
    if args.prompt_file is not None:
        prompts.append(_read_prompt(args.prompt_file))
    if not prompts:
        from_terminal = sys.stdin is None or sys.stdin.isatty()  # None: it is closed
        prompts = [""] if from_terminal else [_read_prompt("-")]

    _start_log()
    import torch

    from textgen.checkpoint import load_model
    from textgen.corpus import normalize
    from textgen.generation import generate, sample_all

    model, tokenizer = load_model(args.checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    prompts = [normalize(prompt, model.text.get("normalization", "none")) for prompt in prompts]
    if args.json:
        for result in sample_all(model, tokenizer, prompts, config, num_samples=args.num_samples):
            print(json.dumps(dataclasses.asdict(result), ensure_ascii=False), flush=True)
        return
    _stream(generate(model, tokenizer, prompts, config, num_samples=args.num_samples), prompts, args.num_samples)


def _stream(events: Any, prompts: Sequence[str], num_samples: int) -> None:
    """Print samples in order, the first unfinished one as it is drawn; a blank line stands between two."""
    waiting: dict[int, str] = {row: prompts[row // num_samples] for row in range(len(prompts) * num_samples)}
    ended: set[int] = set()
    current = 0
    for row, event in events:
        if isinstance(event, str):
            waiting[row] += event
        else:
            ended.add(row)
        while current in waiting:
            print(waiting.pop(current), end="", flush=True)
            if current not in ended:
                waiting[current] = ""
                break
            print("\n" if current + 1 < len(prompts) * num_samples else "", flush=True)
            current += 1


def _read_prompt(path: str) -> str:
    """Return a prompt from a file, or standard input, without the line break that editors and `echo` end it with."""
    where = "standard input" if path == "-" else f"`{path}`"
    if path == "-" and sys.stdin is None:
        fail("standard input is closed")
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        fail(f"{where} cannot be read: {error.strerror}")
    text = _decode(raw, where)
    return text.removesuffix("\n").removesuffix("\r")


def _decode(raw: bytes, where: str) -> str:
    """Return UTF-8 bytes as text, whatever the locale."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        fail(f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}")
