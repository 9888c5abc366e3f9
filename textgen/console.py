"""The log, the results, and the progress of counted work.

In a terminal, progress is a few lines below all other text, and they disappear at the end of the work. Elsewhere (a
pipe, a file, a Slurm log, a dumb terminal) progress is an occasional line of the log, without carriage returns or
escape codes.

The Python API calls `as_library`: results go to the log then, and nothing is shown unless the user asks for it.
"""

from __future__ import annotations

import io
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import RenderableType
    from rich.live import Live


log = logging.getLogger("textgen")

# Time to the first line of progress in a log; then the interval doubles from line to line, up to LINE_SECONDS.
FIRST_LINE_SECONDS = 5.0
LINE_SECONDS = 60.0
DRAW_SECONDS = 0.5  # interval between two updates of a terminal

BAR_WIDTH = 40  # columns, at most
SAMPLE_WIDTH = 120  # characters of a sample in a line of the log, at most

FIGURES = {
    "train/loss": "loss {:.4f}",
    "train/bits_per_byte": "{:.3f} bits per byte",
    "train/tokens_per_second": "{:,.0f} tokens/s",
    "valid/bits_per_byte": "valid {:.4f}",
}
"""formats of the metrics that are shown, in this order"""


def use_utf8() -> None:
    """Read the arguments and write standard output as UTF-8, whatever the locale. Run before anything is read.

    In a locale of another encoding this starts the interpreter again, in Python's UTF-8 mode (PEP 540): arguments and
    file names were decoded when it started. From Python 3.15 that mode is the default. Standard error has the handler
    `backslashreplace`: it escapes what its encoding lacks.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    if isinstance(sys.stdout, io.TextIOWrapper):  # PYTHONIOENCODING overrides the mode
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # a file name is printed byte by byte


def escape_controls(text: str) -> str:
    """Return a text whose control characters, except line breaks and tabs, are written as hexadecimal codes."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def quoted(text: str) -> str:
    """Return a text on one line in quotes, for a terminal; its control characters are codes."""
    return '"' + escape_controls(text.replace("\n", "\\n").replace("\t", "\\t")) + '"'


def start_log() -> None:
    """Send textgen's log to standard error from process 0; other processes log errors only."""
    setup_logging(main=os.environ.get("RANK", "0") == "0")


def setup_logging(*, main: bool) -> None:
    """Send textgen's log to standard error, from the main process; other processes log errors only."""
    logging.basicConfig(handlers=[_Handler()], format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO if main else logging.ERROR)


# Whether this process is somebody else's program, whose standard output and terminal are not for textgen.
_is_library = False
_draws_as_library = False


@contextmanager
def as_library(*, progress: bool) -> Iterator[None]:
    """Leave standard output and terminal alone: results are lines of the log.

    Args:
        progress: send the log to standard error, and draw progress if that is a terminal.
    """
    global _is_library, _draws_as_library
    before, level, handler = (_is_library, _draws_as_library), log.level, _Handler()
    if progress:
        log.setLevel(logging.INFO)
        shown = (one for one in logging.getLogger().handlers if isinstance(one, logging.StreamHandler))
        if not any(one.stream in (sys.stdout, sys.stderr) for one in shown):  # else the program shows the log itself
            log.addHandler(handler)
    _is_library, _draws_as_library = True, progress
    try:
        yield
    finally:
        _is_library, _draws_as_library = before
        log.setLevel(level)
        log.removeHandler(handler)


def say(accelerator: Accelerator, message: str) -> None:
    """Print a line of results to standard output, in the main process only; as a library, log it."""
    if not accelerator.is_main_process:
        return
    if _is_library:
        log.info("%s", message)
    else:
        _print(message, sys.stdout)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            _print(self.format(record), sys.stderr)
        except Exception:
            self.handleError(record)


def _print(text: str, file: TextIO | None) -> None:
    """Print a line; in a terminal with progress bars, above the bars."""
    if file is None:  # Python's value for a closed stream
        return
    if _live is not None and file.isatty():
        _live.console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)
    else:
        print(text, file=file, flush=True)


# --- counted work ----------------------------------------------------------------------------------------------------

# The bars in the terminal, outer ones first, and rich's display of them; None if there are no bars.
_bars: list[Progress] = []
_live: Live | None = None


class Progress:
    """Shows the progress of counted work, in a `with` statement; it can be nested.

    Args:
        what: the unit of the work, such as `step`.
        total: the number of units; None if it is unknown.
        done: the number of units that are done at the start.
        show: whether to show progress; a process that logs errors only never does.
        per_epoch: units per epoch, to show the epoch; None to show none.
    """

    def __init__(
        self, what: str, total: int | None, *, done: int = 0, show: bool = True, per_epoch: int | None = None
    ) -> None:
        self._what, self._total, self._done, self._per_epoch = what, total, done, per_epoch
        self._show, self._pinned = show and log.isEnabledFor(logging.INFO), False
        self._values: dict[str, float] = {}
        self._sample = ""
        # The units done at the first update. The time left is computed from there, since the first unit is slower.
        self._first: int | None = None
        self._started = time.monotonic()
        self._gap = FIRST_LINE_SECONDS
        self._due = self._started + self._gap

    def __enter__(self) -> Self:
        if self._show and has_terminal():
            self._pinned, self._due = True, self._started
            _bars.append(self)
            _draw()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pinned:
            if self in _bars:
                _bars.remove(self)
            _draw()

    def update(self, done: int) -> None:
        """Set the number of units done; cheap enough to call after each unit."""
        self._done = done
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = done, now
        if not self._show or now < self._due:
            return
        if self._pinned:
            self._due = now + DRAW_SECONDS
            _draw()
        else:
            self._gap = min(2 * self._gap, LINE_SECONDS)
            self._due = now + self._gap
            log.info("%s", ", ".join(filter(None, (self._place(), self._figures(), self._left(now)))))

    def show(self, values: Mapping[str, float]) -> None:
        """Set metrics, named as in metrics.jsonl, for the next update."""
        self._values.update(values)

    def sample(self, text: str) -> None:
        """Show the beginning of a text, unless it is empty."""
        if not text:
            return
        self._sample = "".join(letter if letter.isprintable() else " " for letter in text)  # no escape codes
        if self._pinned:
            _draw()
        elif self._show:
            log.info("sample: %s", self._sample[:SAMPLE_WIDTH])

    def _place(self) -> str:
        return f"{self._what} {self._done}" + (f"/{self._total}" if self._total is not None else "")

    def _figures(self) -> str:
        figures = [text.format(self._values[name]) for name, text in FIGURES.items() if name in self._values]
        if self._per_epoch is not None and self._total is not None:
            epoch, epochs = (max(1, math.ceil(count / self._per_epoch)) for count in (self._done, self._total))
            figures.insert(0, f"epoch {epoch}/{epochs}")
        return ", ".join(figures)

    def _left(self, now: float) -> str:
        if self._total is None or self._first is None or self._done == self._first:
            return ""
        seconds = (now - self._started) / (self._done - self._first) * (self._total - self._done)
        return f"{timedelta(seconds=round(seconds))} left"

    def lines(self, width: int) -> list[RenderableType]:
        """Return the lines for a terminal of `width` columns."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = time.monotonic()
        place, left = self._place(), self._left(now) or f"{timedelta(seconds=int(now - self._started))}"
        room = width - len(place) - len(left) - 2
        head = Table.grid(padding=(0, 1, 0, 0))
        if self._total is not None and room >= 10:
            bar = ProgressBar(
                self._total, self._done, width=min(room, BAR_WIDTH), complete_style="cyan", finished_style="cyan"
            )
            head.add_row(Text(place), bar, Text(left))
        else:
            head.add_row(Text(f"{place} {left}"))
        lines: list[RenderableType] = [head]
        if figures := self._figures():
            lines.append(Text(figures))
        if self._sample:
            lines.append(Text(self._sample, style="dim", no_wrap=True, overflow="ellipsis"))
        return lines


def has_terminal() -> bool:
    """Return whether standard error is a terminal that can move its cursor, and that textgen may use."""
    if _is_library and not _draws_as_library:
        return False
    able = os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    return able and sys.stderr is not None and sys.stderr.isatty()


def _draw() -> None:
    """Draw all bars below all other text, or remove the display if there are no bars."""
    global _live
    if _live is None and not _bars:  # the terminal was closed
        return
    from rich.console import Console, Group
    from rich.live import Live

    try:
        if _live is None:
            console = Console(stderr=True, force_terminal=True, force_interactive=True)

            def picture() -> RenderableType:
                return Group(*(line for bar in _bars for line in bar.lines(console.width)))

            # Standard output stays as it is, since it may go elsewhere. No thread draws, since it would take time from
            # the thread that trains.
            _live = Live(
                get_renderable=picture, console=console, auto_refresh=False, transient=True, redirect_stdout=False
            )
            _live.start()
            console.show_cursor(True)  # rich hides the cursor, and a killed process could not restore it
        if _bars:
            _live.refresh()
        else:
            stopping, _live = _live, None
            stopping.stop()
    except OSError:  # the terminal was closed; the work continues
        _bars.clear()
        _live = None
