"""Lets one process of several fail, and measures how long the others stay: `python -m tests.faults.ranks`.

A chosen process of a training on 2 and 3 processes is killed, raises, leaves, sleeps for good or is stopped in the
middle of an epoch; or the launcher is killed or asked to end. A launch must end by itself, not with success, within
LIMIT seconds, those after the time-out of a collective where a process only sleeps; and leave no process behind.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.faults.jobs import Job, fault
from tests.faults.kills import write_reviews
from tests.faults.report import write_result

LIMIT = 10.0
TIMEOUT = 10.0
STEP = 6

FAULTS = {
    "SIGKILL": "signal 9",
    "raises": "raise",
    "exits with 0": "exit",
    "sleeps": "sleep",
    "SIGSTOP": "signal 19",
}
SILENT = {"sleeps", "SIGSTOP"}
LAUNCHER = {"launcher: SIGKILL": "signal launcher 9", "launcher: SIGTERM": "signal launcher 15"}
COLUMNS = [
    "what", "processes", "which", "seconds until the launcher has ended", "allowed", "its exit code",
    "processes 2 s later", "status.json", "reason there",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a launch ended."""

    seconds: float
    limit: float
    exit_code: int
    left: int
    state: str
    reason: str
    output: str

    @property
    def holds(self) -> bool:
        """Whether it ended as it must."""
        return self.seconds <= self.limit and self.exit_code != 0 and self.left == 0


def training_flags(home: Path) -> list[str]:
    """Return the flags of a small training that goes on until it is ended."""
    reviews = write_reviews(home / "reviews.jsonl")
    return [
        "--data.source", "files", "--data.files", str(reviews), "--data.cache_dir", str(home / "cache"),
        "--tokenizer.vocab_size", "340", "--model.embedding_dim", "16", "--model.hidden_size", "32",
        "--batch_size", "12", "--seq_len", "16", "--max_steps", "1000000", "--max_epochs", "1000000",
        "--mixed_precision", "no", "--tracking.mode", "disabled", "--log_every", "1", "--evaluate_every", "1000000",
        "--save_every", "5", "--distributed_timeout", str(TIMEOUT),
    ]  # fmt: skip


def measure(what: str, rank: int, processes: int, flags: list[str], run_dir: Path) -> Outcome:
    """Let a process, or the launcher, fail once and watch the end."""
    action = (FAULTS | LAUNCHER)[what]
    job = Job(flags, run_dir, fault(action, at="stepping", call=STEP, rank=rank), processes=processes)
    limit = LIMIT + (TIMEOUT if what in SILENT else 0.0)
    try:
        job.wait_for(f"fault: {action}")
        started = time.monotonic()
        exit_code = job.end(timeout=limit + 60)
        seconds = time.monotonic() - started
        time.sleep(2)
        left = len(job.left())
    finally:
        job.kill()
    status = job.status
    return Outcome(
        seconds=seconds, limit=limit, exit_code=exit_code, left=left, state=str(status.get("state")),
        reason=str(status.get("reason")), output=job.output,
    )  # fmt: skip


def cases(counts: tuple[int, ...] = (2, 3)) -> list[tuple[str, int, int]]:
    """Return (what, rank, processes) of every case."""
    ranks = [(what, rank, count) for count in counts for what in FAULTS for rank in (0, count - 1)]
    return ranks + [(what, 0, count) for count in counts for what in LAUNCHER]


def main() -> None:
    """Measure all cases and write the table; fail if one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="cases whose name holds this, printed and not kept")
    only = parser.parse_args().only
    started, table, broken = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        flags = training_flags(home)
        for number, (what, rank, count) in enumerate(cases()):
            if only and only not in what:
                continue
            outcome = measure(what, rank, count, flags, home / f"run-{number}")
            broken += not outcome.holds
            which = "" if what in LAUNCHER else str(rank)
            row = [
                what, count, which, f"{outcome.seconds:.1f}", f"{outcome.limit:.0f}", outcome.exit_code, outcome.left,
                outcome.state, outcome.reason,
            ]  # fmt: skip
            print(*row, sep=" | ", flush=True)
            if not outcome.holds:
                print(outcome.output, flush=True)
            table.append(row)
    if not only:
        write_result("ranks", COLUMNS, table, seconds=time.monotonic() - started)
    if broken:
        raise SystemExit(f"{broken} of {len(table)} cases do not hold")


if __name__ == "__main__":
    main()
