"""The command line: training and the verbs prepare, evaluate, sample and verify, and the exit codes they end with.

What is heavy (torch, accelerate, datasets) is imported once the flags are known to be right: `--help` and a wrong flag
are answered in 0.3 s, not in 1.7 s.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from textgen.config import Precision, SamplingConfig, TrainConfig
from textgen.parsing import PATIENCE_SECONDS, Parser, build_settings, config_file, fail, parse_train_config
from textgen.processes import Interrupted, end_siblings, end_with_launcher
from textgen.world import LaunchError, slurm_variables

DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR,
    errno.EIO, errno.ESTALE,
)  # fmt: skip

SPLITS = ("train", "validation", "test")

VERBS = """usage: textgen {prepare,evaluate,sample,verify,compare,doctor,submit} ... (each with --help)

  prepare    encode the training text ahead of time; takes the flags of train_distributed.py
  evaluate   bits per byte of a checkpoint on a file or a split
  sample     continue prompts
  verify     check every byte of a checkpoint and say what it holds
  compare    a table of runs: bits per byte, tokens per second, the settings that differ
  doctor     check a machine, or all machines of an allocation, before hours are spent
  submit     hand a training to Slurm

Training itself is `train_distributed.py`, alone or under `accelerate launch`.
"""


def run(action: Callable[[], None]) -> None:
    """Run a verb and end with the exit code that says how it went.

    One of several processes ends without tearing its process group down, which may wait for a lost peer; and gloo's
    threads abort a process now and then that the interpreter takes apart around them.
    """
    code: object = 0
    try:
        _try(action)
    except SystemExit as end:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        code = end.code or 0
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _try(action: Callable[[], None]) -> None:
    """Run a verb; turn what is the user's to mend into one line and exit code 2."""
    try:
        os.environ.update(slurm_variables(os.environ))
        action()
    except (Interrupted, KeyboardInterrupt) as interrupted:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        raise SystemExit(interrupted.exit_code if isinstance(interrupted, Interrupted) else 130) from None
    except BrokenPipeError:  # who reads has had enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # 128 + SIGPIPE, as of a program that knows nothing of it
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            _crash()
        fail(f"{error.strerror or error}" + (f": `{error.filename}`" if error.filename else ""))
    except Exception as error:
        if not isinstance(error, _user_errors()):
            _crash()
        fail(str(error))


def _crash() -> NoReturn:
    """End with the traceback of a fault that is not the user's, and the other processes with it."""
    if os.environ.get("RANK", "0") != "0":
        # When the first process ends, the others fail in their next collective: leave the word to it.
        time.sleep(PATIENCE_SECONDS)
    traceback.print_exc()
    sys.stderr.flush()
    end_siblings()
    raise SystemExit(1)


def _user_errors() -> tuple[type[ValueError], ...]:
    from textgen.checkpoint import CheckpointError
    from textgen.data import DataError
    from textgen.documents import CorpusError
    from textgen.model import ModelFileError
    from textgen.run_directory import RunDirectoryError
    from textgen.steps import TrainingError
    from tokenizer import TokenizerError

    return (
        CheckpointError, CorpusError, DataError, LaunchError, ModelFileError, RunDirectoryError, TokenizerError,
        TrainingError,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb of the console script `textgen`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    verbs: dict[str, Callable[[Sequence[str]], None]] = {
        "prepare": prepare, "evaluate": evaluate, "sample": sample, "verify": verify, "compare": compare,
        "doctor": doctor, "submit": submit,
    }  # fmt: skip
    if argv and argv[0] in verbs:
        run(lambda: verbs[argv[0]](argv[1:]))
    elif argv in (["--help"], ["-h"]):
        print(VERBS, end="")
    else:
        fail(f"`textgen` wants one of {', '.join(f'`{verb}`' for verb in verbs)}" + (f": {argv[0]}" if argv else ""))


def train_main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    end_with_launcher()
    run(lambda: _train(argv))


def _train(argv: Sequence[str] | None) -> None:
    config = parse_train_config(argv)
    _start_log()
    from textgen.training import train

    train(config, config_file=config_file(argv))


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
    parser.add_argument("--best", action="store_true", help="of a run, the best checkpoint instead of the newest")
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
    from textgen.checkpoint import find_checkpoint, load_model
    from textgen.data import DataError, encode_documents
    from textgen.evaluation import score

    accelerator = launch.start(args.mixed_precision)
    directory = find_checkpoint(args.checkpoint, best=args.best)
    launch.assert_same(accelerator, directory, "the checkpoint")  # of a run that goes on, it may be another one soon
    model, tokenizer = load_model(directory or args.checkpoint, accelerator.device)
    if not tokenizer.is_lossless:
        raise DataError(f"`{args.checkpoint}` has a word tokenizer, which loses text: it has no bits per byte")
    if directory is None and args.data in SPLITS:
        raise DataError(
            f"`{args.checkpoint}` does not say what it was trained on: give `--data` a file, not `{args.data}`"
        )
    texts = _texts(directory, args.data, args.text_column, args.limit, model.text.get("normalization", "none"))
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


def _texts(directory: Path | None, data: str, text_column: str, limit: int | None, normalization: str) -> list[str]:
    """Return the documents to score: of files, or of a split of the data that the checkpoint was trained on."""
    from textgen.checkpoint import TRAINER_NAME, CheckpointError, read_json
    from textgen.corpus import normalize
    from textgen.data import DataError, prepare_store
    from textgen.documents import read_documents

    if directory is not None and data in SPLITS:
        try:
            settings = read_json(directory / TRAINER_NAME)["config"]
            config = build_settings(TrainConfig, {"data": settings["data"], "tokenizer": settings["tokenizer"]})
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"`{directory / TRAINER_NAME}` has no settings of data: {error}") from error
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
    parser.add_argument("--best", action="store_true", help="of a run, the best checkpoint instead of the newest")
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

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(args.checkpoint, device, best=args.best)
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


def verify(argv: Sequence[str]) -> None:
    """Check a checkpoint, or all of a run, and print what is in it; exit code 2 where one is not valid."""
    parser = Parser(prog="textgen verify", description="Check every byte of a checkpoint and say what it holds.")
    parser.add_argument("checkpoint", help="checkpoint or run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object per checkpoint")
    args = parser.parse_args(list(argv))

    from textgen.checkpoint import CheckpointError, checkpoints
    from textgen.resume import describe_checkpoint

    invalid = 0
    for directory in [path for _, path in checkpoints(Path(args.checkpoint))] or [Path(args.checkpoint)]:
        try:
            contents = describe_checkpoint(directory)
        except CheckpointError as error:
            invalid += 1
            contents = {"checkpoint": str(directory), "valid": False, "problem": str(error)}
        if args.json:
            print(json.dumps(contents))
        elif contents["valid"]:
            print("\n".join(f"{name:16} {value}" for name, value in contents.items()), end="\n\n")
        else:
            print(f"{'checkpoint':16} {directory}\n{'valid':16} False\n{'problem':16} {contents['problem']}\n")
    if invalid:
        fail(f"{invalid} invalid checkpoint{'s' if invalid > 1 else ''} in `{args.checkpoint}`")


def compare(argv: Sequence[str]) -> None:
    """Print a table of runs."""
    from textgen.compare import compare_command

    compare_command(argv)


def doctor(argv: Sequence[str]) -> None:
    """Check the machines that a training would run on."""
    from textgen.doctor import doctor_command

    doctor_command(argv)


def submit(argv: Sequence[str]) -> None:
    """Hand a training to Slurm."""
    from textgen.submit import submit_command

    submit_command(argv)
