"""The command `report`: a page of one run or of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from textgen.commands.parsing import Parser, fail
from textgen.reporting.report import REPORT_NAME, write_report
from textgen.runs.directory import SETTINGS_NAME, STATUS_NAME
from textgen.runs.metrics_file import METRICS_NAME


def report_command(argv: Sequence[str]) -> None:
    """Write the report of one run or several and print its path."""
    parser = Parser(
        prog="textgen report",
        description="Write a page of one run, or of several runs with their curves in the same charts.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; `runs/*` names all")
    parser.add_argument(
        "--out", help=f"html file; default: `{REPORT_NAME}` in the run folder, or in this folder for several runs"
    )
    args = parser.parse_args(list(argv))
    runs = [Path(run) for run in args.runs]
    for run in runs:
        if not run.is_dir():
            fail(f"`{run}` is not a run folder" if run.exists() else f"`{run}` does not exist")
        if not any((run / name).exists() for name in (SETTINGS_NAME, METRICS_NAME, STATUS_NAME)):
            fail(f"`{run}` is not a run folder: it has no `{SETTINGS_NAME}`, `{METRICS_NAME}` or `{STATUS_NAME}`")
    out = Path(args.out or (runs[0] / REPORT_NAME if len(runs) == 1 else REPORT_NAME))
    if out.suffix != ".html":  # a typing error must not replace another file of a run
        parser.error(f"`out` must end in `.html`: {out}")
    if not out.parent.is_dir():
        fail(f"`{out.parent}` is not a folder")
    write_report(runs, out)
    print(out)
