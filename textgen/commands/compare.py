"""The command `compare`: a table of runs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from textgen.commands.parsing import Parser, fail
from textgen.reporting.compare import format_table, keep_differences, read_run


def compare_command(argv: Sequence[str]) -> None:
    """Print a table of runs, the best one first; end with exit code 2 if no run can be read."""
    parser = Parser(prog="textgen compare", description="Compare runs: figures, and different settings.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; `runs/*` names all")
    parser.add_argument("--json", action="store_true", help="print one JSON object per run")
    args = parser.parse_args(list(argv))
    runs, problems = [], []
    for path in args.runs:
        try:
            runs.append(read_run(Path(path)))
        except OSError as error:
            problems.append(f"`{error.filename or path}` cannot be read: {error.strerror}")
        except ValueError as error:
            problems.append(str(error))
    if not runs:
        fail("; ".join(problems))
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    runs = sorted(keep_differences(runs), key=lambda run: (run.bits_per_byte is None, run.bits_per_byte, run.run))
    if args.json:
        print("\n".join(json.dumps(asdict(run), default=str) for run in runs))
    else:
        print(format_table(runs, width=shutil.get_terminal_size(fallback=(sys.maxsize, 0)).columns))
