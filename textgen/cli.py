"""The command line: training and the verbs prepare, evaluate, sample and verify, and the exit codes they end with.

What is heavy (torch, accelerate, datasets) is imported once the flags are known to be right: `--help` and a wrong flag
are answered in 0.3 s, not in 1.7 s.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from textgen.config import Precision
from textgen.parsing import PATIENCE_SECONDS, Parser, config_file, fail, parse_train_config
from textgen.processes import Interrupted, end_siblings, end_with_launcher
from textgen.world import LaunchError, slurm_variables

DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR,
    errno.EIO, errno.ESTALE,
)  # fmt: skip

VERBS = """usage: textgen VERB ... (each with --help)

  train      train; the same as train_distributed.py
  prepare    encode the training text ahead of time; takes the flags of train_distributed.py
  evaluate   bits per byte of a checkpoint on a file or a split
  sample     continue prompts
  serve      continue prompts over HTTP, as OpenAI's API does, with a page to play with
  export     a checkpoint as a quantised or ONNX decoder, with what that costs
  publish    a model and its card as a folder, or on the Hugging Face hub
  verify     check every byte of a checkpoint and say what it holds
  compare    a table of runs: bits per byte, tokens per second, the settings that differ
  report     a page of a run, or of several over each other: curves, samples, settings, how to make it again
  measure    texts of a run at several temperatures beside human ones: variety, repetition, what is copied
  dashboard  a W&B workspace for the runs of a project
  doctor     check a machine, or all machines of an allocation, before hours are spent
  submit     hand a training to Slurm

Several processes train under `accelerate launch --module textgen train`, or with train_distributed.py in its place.
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
    from textgen.tokenizer import TokenizerError
    from textgen.tracking import TrackingError

    return (
        CheckpointError, CorpusError, DataError, LaunchError, ModelFileError, RunDirectoryError, TokenizerError,
        TrackingError, TrainingError,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb of the console script `textgen`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    here: dict[str, Callable[[Sequence[str]], None]] = {"prepare": prepare, "evaluate": evaluate, "verify": verify}
    verbs = re.findall(r"^  (\w+)  ", VERBS, re.MULTILINE)
    if argv and argv[0] == "train":
        train_main(argv[1:], prog="textgen train")
    elif argv and argv[0] in here:
        run(lambda: here[argv[0]](argv[1:]))
    elif argv and argv[0] in verbs:
        run(lambda: getattr(import_module(f"textgen.{argv[0]}"), f"{argv[0]}_command")(argv[1:]))
    elif argv in (["--help"], ["-h"]):
        print(VERBS, end="")
    else:
        fail(f"`textgen` wants one of {', '.join(f'`{verb}`' for verb in verbs)}" + (f": {argv[0]}" if argv else ""))


def train_main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Train as the command line says."""
    end_with_launcher()
    run(lambda: _train(argv, prog))


def _train(argv: Sequence[str] | None, prog: str | None) -> None:
    config = parse_train_config(argv, prog=prog)
    _start_log()
    from textgen.training import train

    train(config, config_file=config_file(argv))


def _start_log() -> None:
    """Send the log of the first process to standard error."""
    from textgen.console import setup_logging

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
    parser.add_argument(
        "--mixed_precision",
        type=Precision,
        default="no",
        help="precision of matrix products; auto: what the hardware is fast in",
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args(list(argv))
    for name in ("limit", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"`{name}` must be at least 1: {getattr(args, name)}")

    _start_log()
    from textgen import launch
    from textgen.checkpoint import find_checkpoint, load_model
    from textgen.data import DataError, encode_documents
    from textgen.evaluation import score, texts_to_score

    accelerator = launch.start(args.mixed_precision)
    directory = find_checkpoint(args.checkpoint, best=args.best)
    launch.assert_same(accelerator, directory, "the checkpoint")  # of a run that goes on, it may be another one soon
    model, tokenizer = load_model(directory or args.checkpoint, accelerator.device)
    if not tokenizer.is_lossless:
        raise DataError(f"`{args.checkpoint}` has a word tokenizer, which loses text: it has no bits per byte")
    normalization = model.text.get("normalization", "none")
    texts = texts_to_score(directory, args.data, args.text_column, limit=args.limit, normalization=normalization)
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
