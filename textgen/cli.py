"""The command line: a table of commands, and the exit codes they end with.

Heavy packages (torch, accelerate, datasets) are imported once the flags are known to be right: `--help` and a wrong
flag are answered in 0.3 s, not in 1.7 s.
"""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from textgen.commands.parsing import PATIENCE_SECONDS, fail
from textgen.commands.train import train_command
from textgen.distributed.signals import Interrupted, end_siblings, end_with_launcher
from textgen.distributed.world import slurm_variables
from textgen.errors import TextgenError

DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR,
    errno.EIO, errno.ESTALE,
)  # fmt: skip

COMMANDS = {
    "train": "train; the same as train_distributed.py",
    "prepare": "encode the training text ahead of time; takes the flags of train_distributed.py",
    "evaluate": "bits per byte of a checkpoint on a file or a split",
    "sample": "continue prompts",
    "serve": "continue prompts over HTTP, as OpenAI's API does, with a page to play with",
    "export": "a checkpoint as a quantised or ONNX decoder, with what that costs",
    "publish": "a model and its card as a folder, or on the Hugging Face hub",
    "verify": "check every byte of a checkpoint and say what it holds",
    "compare": "a table of runs: bits per byte, tokens per second, the settings that differ",
    "report": "a page of a run, or of several over each other: curves, samples, settings, how to make it again",
    "measure": "texts of a run at several temperatures beside human ones: variety, repetition, what is copied",
    "dashboard": "a W&B workspace for the runs of a project",
    "doctor": "check a machine, or all machines of an allocation, before hours are spent",
    "submit": "hand a training to Slurm",
}
"""of `textgen`, each in the module of its name in textgen/commands/, as the function NAME_command"""


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
        from textgen.tokenizer import TokenizerError  # which knows nothing of textgen's errors

        if not isinstance(error, TextgenError | TokenizerError):
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


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command of the console script `textgen`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name == "train":
        train_main(rest, prog="textgen train")
    elif name in COMMANDS:
        run(lambda: getattr(import_module(f"textgen.commands.{name}"), f"{name}_command")(rest))
    elif argv in (["--help"], ["-h"]):
        print(_usage(), end="")
    else:
        fail(f"`textgen` wants one of {', '.join(f'`{known}`' for known in COMMANDS)}" + (f": {name}" if argv else ""))


def _usage() -> str:
    rows = "".join(f"  {name:9}  {what}\n" for name, what in COMMANDS.items())
    return (
        f"usage: textgen VERB ... (each with --help)\n\n{rows}\n"
        "Several processes train under `accelerate launch --module textgen train`, or with train_distributed.py in its "
        "place.\n"
    )


def train_main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Train as the command line says."""
    end_with_launcher()
    run(lambda: train_command(argv, prog=prog))
