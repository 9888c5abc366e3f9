"""The command line: a table of commands, and the exit codes they end with.

torch, accelerate and datasets are imported after the flags have been checked: `--help` and a wrong flag are answered in
0.3 s instead of 1.7 s.

Exit codes: 0 done, 1 a fault of the program, 2 wrong input, 130 Ctrl-C, 141 the reader of the output has closed it;
128 + N after signal N.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

import textgen
from textgen.commands.parsing import PEER_WAIT_SECONDS, fail
from textgen.commands.train import train_command
from textgen.console import use_utf8
from textgen.distributed.signals import Interrupted, end_siblings, end_with_launcher
from textgen.distributed.world import slurm_variables
from textgen.errors import TextgenError, is_lack_of_memory, user_error

# Command NAME is the function NAME_command of textgen/commands/NAME.py.
COMMAND_GROUPS = {
    "train a model": {
        "train": "train; the same as train_distributed.py",
        "prepare": "encode the training text ahead of time; takes the flags of `train`",
        "tune": "find a learning rate by short trainings on this machine; takes the flags of `train`, too",
        "submit": "submit a training, or a sweep of trainings, to Slurm",
        "doctor": "check this machine, or all machines of an allocation, before a training; read a profile",
    },
    "use a model": {
        "sample": "continue prompts",
        "play": "write a text in the terminal, in turns with a model",
        "serve": "continue prompts over HTTP, with OpenAI's API and a page for a browser",
        "classify": "find the labels of texts, by bits or by a head; trains a head",
        "export": "write a checkpoint as a quantised or ONNX decoder, with its cost",
        "publish": "write a model and its card to a folder, or to the Hugging Face hub",
    },
    "judge a run": {
        "score": "print what each token of a text costs, as lines, JSON, CSV or a page",
        "tokenize": "print the tokens of a text, or the text of tokens",
        "evaluate": "print the bits per byte of a checkpoint on a file or a split",
        "measure": "compare generated texts with human ones: variety, repetition, copied text",
        "compare": "print a table of runs: bits per byte, speed, where time goes, different settings",
        "report": "write a page of one run or several: curves, samples, settings",
        "dashboard": "create a W&B workspace for the runs of a project",
        "verify": "check every byte of a checkpoint and print its content",
    },
}
COMMANDS = {name: text for group in COMMAND_GROUPS.values() for name, text in group.items()}


def run(action: Callable[[], None]) -> None:
    """Run a command and end with its exit code.

    One of several processes ends by `os._exit`. A normal exit would close the process group, which may wait for a lost
    peer, and gloo's threads sometimes abort a process during the interpreter's shutdown.
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
    """Run a command; an error that the user can correct becomes one line and exit code 2."""
    try:
        _require_current_folder()
        os.environ.update(slurm_variables(os.environ))
        action()
    except (Interrupted, KeyboardInterrupt) as interrupted:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        raise SystemExit(interrupted.exit_code if isinstance(interrupted, Interrupted) else 130) from None
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not fail
        raise SystemExit(141) from None  # 128 + SIGPIPE: the code of a program that does not catch the signal
    except Exception as error:
        if (line := user_error(error)) is None:
            _crash()
        try:
            fail(line)
        finally:
            if is_lack_of_memory(error):  # perhaps of this process alone, and the others wait for it
                end_siblings()


def _require_current_folder() -> None:
    """Raise TextgenError if the current folder was deleted: torch would end the process while it is imported."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise TextgenError("the current folder was deleted: change to another one") from error


def _crash() -> NoReturn:
    """Print the traceback of a fault of the program; end this process and its siblings."""
    if os.environ.get("RANK", "0") != "0":
        # When process 0 ends, the others fail in their next collective. Wait, so that its traceback is the only one.
        time.sleep(PEER_WAIT_SECONDS)
    traceback.print_exc()
    sys.stderr.flush()
    end_siblings()
    raise SystemExit(1)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script `textgen`.

    Args:
        argv: the command and its flags; None for those of this process.
    """
    if is_process := argv is None:
        _prepare_process()
    argv = sys.argv[1:] if argv is None else list(argv)
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name == "train":
        train_main(rest, prog="textgen train")
    elif name in COMMANDS:
        if is_process and name in ("sample", "score"):
            # An import of torch leaves 275,000 objects. To look through them for garbage at every 700 new ones takes
            # 0.15 of the 1.7 s of a short command. Those that train keep that number: garbage may hold memory of a GPU.
            gc.set_threshold(10_000)
        run(lambda: getattr(import_module(f"textgen.commands.{name}"), f"{name}_command")(rest))
    elif argv in (["--help"], ["-h"]):
        print(_usage(), end="")
    elif argv == ["--version"]:
        print(f"textgen {textgen.__version__}")
    else:
        known = ", ".join(f"`{command}`" for command in COMMANDS)
        fail(f"`textgen` wants one of {known}" + (f": {name}" if argv else ""))


def _prepare_process() -> None:
    """Do what only a process of its own may do: a caller of `main` or `train_main` keeps its streams and objects."""
    use_utf8()
    # At exit the interpreter looks for garbage among all of torch's objects, 0.5 s after the last output, but not among
    # frozen ones. The first handler is the last one to run.
    atexit.register(gc.freeze)


def _usage() -> str:
    groups = (
        f"{title}:\n" + "".join(f"  {name:9}  {text}\n" for name, text in commands.items())
        for title, commands in COMMAND_GROUPS.items()
    )
    return (
        "usage: textgen COMMAND ... (`textgen COMMAND --help` lists its flags)\n\n"
        + "\n".join(groups)
        + "\nTo train with several processes, run `accelerate launch --module textgen train` or\n"
        "`accelerate launch train_distributed.py`.\n"
    )


def train_main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Run the command `train`, and end with its launcher.

    Args:
        argv: the flags; None for those of this process.
        prog: the name of the program in `--help`.
    """
    if argv is None:
        _prepare_process()
    end_with_launcher()
    run(lambda: train_command(argv, prog=prog))
