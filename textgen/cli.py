"""The command line: YAML and flags to a frozen config; the verbs prepare, evaluate and sample."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import json
import logging
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from textgen.checkpoint import TRAINER_NAME, CheckpointError, checkpoints, load_model, read_trainer
from textgen.config import DataConfig, Precision, TokenizerConfig, TrainConfig
from textgen.corpus import CorpusError, normalize, read_documents
from textgen.data import DataError, encode_documents, prepare_store
from textgen.launch import LaunchError
from textgen.model import ModelFileError
from textgen.sampling import SamplingConfig
from textgen.tracking import setup_logging
from textgen.training import TrainingError, train
from tokenizer import TokenizerError

log = logging.getLogger("textgen")

USER_ERRORS = (
    CheckpointError, CorpusError, DataError, LaunchError, ModelFileError, TokenizerError, TrainingError,
)  # fmt: skip
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)

VERBS = """usage: textgen {prepare,evaluate,sample} ... (each with --help)

  prepare    encode the training text ahead of time; takes the flags of train_distributed.py
  evaluate   bits per byte of a checkpoint on a file or a split
  sample     continue prompts

Training itself is `train_distributed.py`, alone or under `accelerate launch`.
"""


class Parser(ArgumentParser):
    """jsonargparse's parser with one-line errors that name the nearest option."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line from the first process and end with exit code 2."""
        fail(self._in_one_line(message))

    def _in_one_line(self, message: str) -> str:
        options = [name.lstrip("-") for action in self._actions for name in action.option_strings]
        if wrong := re.search(
            r"[Uu]nrecognized arguments: (\S+)|Option '(\S+)' is not accepted|Key '(\S+)' is not", message
        ):
            name = next(group for group in wrong.groups() if group).split("=")[0].lstrip("-")
            nearest = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
            return f"unknown setting `{name}`" + (f"; the nearest is `{nearest[0]}`" if nearest else "")
        if wrong := re.search(r'Parser key "([^"]+)":\s+Expected an? (.+?)\. Got value: (.*)', message, re.DOTALL):
            key, kind, value = wrong.groups()
            kind = re.sub(r"<class '(\w+)'>|typing\.", lambda m: m.group(1) or "", kind)
            return f"`{key}` must be {' '.join(kind.split())}: {' '.join(value.split())}"
        return " ".join(message.split())


def fail(message: str) -> NoReturn:
    """End this process with exit code 2; the first one says why."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # the launcher ends all processes with the first that ends: leave the word to the first process
    raise SystemExit(2)


def run(action: Callable[[], None]) -> None:
    """Run a verb; turn what is the user's to mend into one line and exit code 2."""
    try:
        action()
    except USER_ERRORS as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        fail(f"{error.strerror or error}" + (f": `{error.filename}`" if error.filename else ""))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        raise SystemExit(130) from None


# --- parsing ---------------------------------------------------------------------------------------------------------


def parse_train_config(argv: Sequence[str] | None = None, *, prog: str | None = None) -> TrainConfig:
    """Parse defaults < `--config FILE` < flags; end with one line and exit code 2 where something is wrong."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog=prog, description="Train an LSTM language model, alone or under `accelerate launch`.")
    parser.add_argument("--config", action="config", help="YAML file of settings, such as launch/presets/quick.yaml")
    parser.add_class_arguments(TrainConfig, None, fail_untyped=True)
    try:
        parsed = parser.instantiate(
            parser.parse_args(_plain_flags(sys.argv[1:] if argv is None else argv, TrainConfig))
        )
        # jsonargparse builds the groups; a class whose flags are not grouped it leaves to us
        return TrainConfig(**{f.name: parsed[f.name] for f in dataclasses.fields(TrainConfig)})
    except ValueError as error:
        parser.error(str(error))


def _plain_flags(argv: Sequence[str], settings: type) -> list[str]:
    """Spell flags as jsonargparse wants them: `--files a b` as a JSON list, a bare `--dry_run` as true."""
    kinds = _flag_types(settings)
    out: list[str] = []
    rest = list(argv)
    while rest:
        flag, equals, first = rest.pop(0).partition("=")
        kind = kinds.get(flag)
        values = [first] if equals else []
        while kind in (tuple, bool) and not equals and rest and not rest[0].startswith("--"):
            if kind is bool and (values or rest[0] not in ("true", "false")):
                break
            values.append(rest.pop(0))
        if kind is bool and not values:
            values = ["true"]
        if kind is tuple and not (len(values) == 1 and values[0].startswith("[")):
            values = [json.dumps([_number(v) for v in values])]
        out.append(f"{flag}={values[0]}" if values else flag)
    return out


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _flag_types(settings: type, prefix: str = "--") -> dict[str, type | None]:
    """Return tuple or bool for the flags of that type."""
    kinds: dict[str, type | None] = {}
    for name, hint in typing.get_type_hints(settings).items():
        if dataclasses.is_dataclass(hint):
            kinds |= _flag_types(typing.cast(type, hint), f"{prefix}{name}.")
        elif hint is bool or typing.get_origin(hint) is tuple:
            kinds[prefix + name] = bool if hint is bool else tuple
    return kinds


# --- verbs -----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb of the console script `textgen`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    setup_logging(main=int(os.environ.get("RANK", "0")) == 0)
    verbs: dict[str, Callable[[Sequence[str]], None]] = {"prepare": prepare, "evaluate": evaluate, "sample": sample}
    if argv and argv[0] in verbs:
        run(lambda: verbs[argv[0]](argv[1:]))
    elif argv in (["--help"], ["-h"]):
        print(VERBS, end="")
    else:
        fail(f"`textgen` wants one of {', '.join(f'`{verb}`' for verb in verbs)}" + (f": {argv[0]}" if argv else ""))


def train_main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    setup_logging(main=int(os.environ.get("RANK", "0")) == 0)
    config = parse_train_config(argv)
    run(lambda: train(config))


def prepare(argv: Sequence[str]) -> None:
    """Encode the text of a training ahead of time and print where the store lies."""
    config = parse_train_config(argv, prog="textgen prepare")
    print(prepare_store(config.data, config.tokenizer).directory)


def evaluate(argv: Sequence[str]) -> None:
    """Score a checkpoint on whole documents and print the figures."""
    parser = Parser(prog="textgen evaluate", description="Score whole documents. Runs under `accelerate launch` too.")
    parser.add_argument("checkpoint", help="checkpoint, run folder or hub repository")
    parser.add_argument(
        "--data", default="validation", help="a file, folder or glob, or a split of the training's data"
    )
    parser.add_argument("--text_column", default="text", help="column of the text in csv, jsonl and parquet files")
    parser.add_argument("--limit", type=int, default=None, help="score the first N documents only")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="documents read side by side; no influence on the figures"
    )
    parser.add_argument("--mixed_precision", type=Precision, default="no", help="precision of matrix products")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args(list(argv))
    for name in ("limit", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"`{name}` must be at least 1: {getattr(args, name)}")

    from textgen import launch
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
        print(
            json.dumps(figures) if args.json else "\n".join(f"{name:16} {value:.6g}" for name, value in figures.items())
        )
    accelerator.end_training()


def _texts(checkpoint: str, data: str, text_column: str, limit: int | None, normalization: str) -> list[str]:
    """Return the documents to score: of files, or of a split of the data that the checkpoint was trained on."""
    if data in ("train", "validation", "test"):
        directory = next((path for _, path in checkpoints(Path(checkpoint))), Path(checkpoint))
        settings = read_trainer(directory)["config"] if (directory / TRAINER_NAME).exists() else {}
        store = prepare_store(DataConfig(**settings.get("data", {})), TokenizerConfig(**settings.get("tokenizer", {})))
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
        "--prompt", action="append", help="text to continue; may be given several times; '' starts a review"
    )
    parser.add_argument("--prompt_file", default=None, help="file whose whole text is a prompt; - is standard input")
    parser.add_argument("--num_samples", type=int, default=1, help="samples of each prompt")
    parser.add_argument("--json", action="store_true", help="print one JSON object per sample")
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser.add_class_arguments(SamplingConfig, None, fail_untyped=True)
    args = parser.parse_args(list(argv))
    try:
        config = SamplingConfig(**{f.name: args[f.name] for f in dataclasses.fields(SamplingConfig)})
    except ValueError as error:
        parser.error(str(error))
    if args.num_samples < 1:
        parser.error(f"`num_samples` must be at least 1: {args.num_samples}")
    prompts = list(args.prompt or [])
    if args.prompt_file is not None:
        prompts.append(_read_prompt(args.prompt_file))
    prompts = prompts or ([sys.stdin.read()] if not sys.stdin.isatty() else [""])

    import torch

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
    """Return a prompt from a file, or standard input."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"`{path}` does not exist") from None
    except UnicodeDecodeError as error:
        raise DataError(f"`{path}` is not UTF-8: byte {error.start}") from None
