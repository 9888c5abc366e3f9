"""Kills a process at every instrumented point of saving and pruning, and cuts the power there too.

`python -m tests.faults.save_points`: a forked child saves and prunes with `os.fsync`, renames, directories, deletions,
files and their writes wrapped, and kills itself before, after and, in a write, in the middle of the k-th of them, for
every k. What is left must be the state before or the state after, and the next save must work and leave nothing else.

Then the power fails at each of these points: what was written and not synced is lost in whole, by half or with its
name, and of the renames whose directory was not synced any number of the last ones did not take place.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tests.faults.report import write_result
from textgen.errors import CheckpointError
from textgen.runs import checkpoint
from textgen.runs.checkpoint import Saver, checkpoint_path, newest_valid, prune, remove_leftovers, verify

KEEP_LAST = 2
NEXT_STEP = 9

Content = Mapping[str, bytes]


def files_of(step: int, version: int = 0) -> dict[str, list[bytes]]:
    """Return the files of a small checkpoint, in pieces."""
    return {
        "trainer.json": [json.dumps({"step": step, "version": version}).encode()],
        "model.safetensors": [b"header of %d" % step, bytes([step, version]) * 500],
        "optimizer.safetensors": [b"header of %d" % step, bytes([version, step]) * 900],
    }


def save(run_dir: Path, step: int, version: int = 0) -> None:
    """Write a small checkpoint."""
    checkpoint.write_checkpoint(checkpoint_path(run_dir, step), files_of(step, version), step=step)


# --- scenarios -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """What lies in a run, and what is then done to it; `returned` is called once a save is said to be on disk."""

    name: str
    prepare: Callable[[Path], None]
    act: Callable[[Path, Callable[[], None]], None]
    best: int | None = None


def _save_all(*steps: int) -> Callable[[Path], None]:
    def prepare(run_dir: Path) -> None:
        for step in steps:
            save(run_dir, step)

    return prepare


def _save_and_prune(step: int, *, version: int = 0, best: int | None = None) -> Callable[..., None]:
    def act(run_dir: Path, returned: Callable[[], None]) -> None:
        save(run_dir, step, version)
        returned()
        prune(run_dir, keep_last=KEEP_LAST, best_step=best)

    return act


def _leave_over(run_dir: Path) -> None:
    """Leave what four kills would: in a save, a removal, a replacement and the removal of what was replaced."""
    _save_all(1, 2)(run_dir)
    folder = run_dir / "checkpoints"
    for name in (".step-000003.tmp", ".step-000001.removed.tmp", ".step-000002.old.removed.tmp"):
        shutil.copytree(folder / "step-000001", folder / name)
        (folder / name / "manifest.json").unlink()
    shutil.copytree(folder / "step-000002", folder / "step-000002.old")


def _restart_and_save(run_dir: Path, returned: Callable[[], None]) -> None:
    remove_leftovers(run_dir)
    _save_and_prune(3)(run_dir, returned)


def _save_in_background(run_dir: Path, returned: Callable[[], None]) -> None:
    saver = Saver(run_dir, keep_last=KEEP_LAST)
    tensors = {"model": {"weight": torch.arange(6.0)}, "optimizer": {"step": torch.ones(())}}
    saver.save(3, tensors, {"trainer.json": b"{}"}, best_step=None, since=0.0)
    saver.wait()
    returned()


SCENARIOS = (
    Scenario("first save", lambda run_dir: None, _save_and_prune(1)),
    Scenario("third save, one is pruned", _save_all(1, 2), _save_and_prune(3)),
    Scenario("save in the background", _save_all(1, 2), _save_in_background),
    Scenario("save of a step anew", _save_all(1, 2), _save_and_prune(2, version=1)),
    Scenario("the best one is old", _save_all(1, 2, 3), _save_and_prune(4, best=1), best=1),
    Scenario("the best one is saved anew", _save_all(1, 2), _save_and_prune(2, version=1, best=2), best=2),
    Scenario("after four kills", _leave_over, _restart_and_save),
)


# --- the child -------------------------------------------------------------------------------------------------------

Ignored = Literal["files", "directories"]


class Tape:
    """Counts the points of a child, kills it at one of them, and notes outside it what a power failure would spare.

    Args:
        notes: file descriptor that outlives the child.
        kill_at: the point; None for none.
        ignore: syncs that are taken for not made, to see that they are missed.
    """

    def __init__(self, notes: int, kill_at: int | None, ignore: Ignored | None) -> None:
        self._notes, self._kill_at, self._ignore = notes, kill_at, ignore
        self._points = 0
        self._write = os.write

    def point(self) -> None:
        if self._points == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self._points += 1

    def note(self, *event: Any) -> None:
        self._write(self._notes, json.dumps(event).encode() + b"\n")

    def wrap(self) -> None:
        """Replace what saving and pruning call."""
        mkdir, open_file, fstat, stat = os.mkdir, io.open, os.fstat, os.stat

        def note_entry(kind: str, path: Path, *more: Any) -> None:
            self.note(kind, stat(path.parent).st_ino, *more)

        def renaming(original: Callable[..., None]) -> Callable[..., None]:
            def rename(source: Any, target: Any, **options: Any) -> None:
                self.point()
                original(source, target, **options)
                note_entry("rename", Path(target), str(source), str(target))
                self.point()

            return rename

        def counted(original: Callable[..., None]) -> Callable[..., None]:
            def remove(*args: Any, **options: Any) -> None:
                self.point()
                original(*args, **options)
                self.point()

            return remove

        def fsync(descriptor: int) -> None:
            self.point()
            status = fstat(descriptor)
            if self._ignore != ("directories" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "files"):
                self.note("fsync", status.st_ino)
            self.point()

        def make(path: Any, *args: Any, **options: Any) -> None:
            self.point()
            mkdir(path, *args, **options)
            note_entry("create", Path(path), stat(path).st_ino)
            self.point()

        def open_noted(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if not set(mode) & set("wax+"):
                return open_file(path, mode, *args, **options)
            self.point()
            file = open_file(path, mode, buffering=0)
            inode = fstat(file.fileno()).st_ino
            note_entry("create", Path(path), inode)
            self.note("write", inode)
            self.point()
            return _NotedFile(file, inode, self)

        os.rename, os.replace = renaming(os.rename), renaming(os.replace)
        os.unlink, os.remove, os.rmdir = counted(os.unlink), counted(os.remove), counted(os.rmdir)
        os.fsync, os.mkdir, io.open = fsync, make, open_noted  # type: ignore[assignment]


class _NotedFile:
    """A file whose writes happen in two halves."""

    def __init__(self, file: Any, inode: int, tape: Tape) -> None:
        self._file, self._inode, self._tape = file, inode, tape

    def write(self, piece: Any) -> int:
        whole = bytes(piece)
        self._tape.point()
        for part in (whole[: len(whole) // 2], whole[len(whole) // 2 :]):
            self._file.write(part)
            self._tape.note("write", self._inode)
            self._tape.point()
        return len(whole)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _NotedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def run_child(scenario: Scenario, run_dir: Path, kill_at: int | None, ignore: Ignored | None) -> tuple[bool, list[Any]]:
    """Act in a forked child; return whether it was killed, and what it noted."""
    with tempfile.TemporaryFile() as notes:
        child = os.fork()
        if child == 0:
            tape = Tape(notes.fileno(), kill_at, ignore)
            status = 1
            try:
                tape.wrap()
                scenario.act(run_dir, lambda: tape.note("returned"))
                tape.point()
                status = 0
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        notes.seek(0)
        events = [json.loads(line) for line in notes.read().splitlines()]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"the child of `{scenario.name}` failed at point {kill_at}")
    return os.WIFSIGNALED(status), events


# --- power -----------------------------------------------------------------------------------------------------------


@dataclass
class Unsynced:
    """What a power failure may take."""

    dirty: set[int]
    """inodes of files written since they were synced"""
    created: set[int]
    """inodes whose directory was not synced since"""
    renames: list[tuple[str, str]]
    returned: bool
    """whether a save was said to be on disk"""


def unsynced(events: Sequence[Sequence[Any]]) -> Unsynced:
    """Return what is not on disk after these events."""
    dirty: set[int] = set()
    created: dict[int, int] = {}
    renames: list[tuple[int, str, str]] = []
    returned = False
    for kind, *values in events:
        if kind == "write":
            dirty.add(values[0])
        elif kind == "create":
            created[values[1]] = values[0]
        elif kind == "rename":
            renames.append((values[0], values[1], values[2]))
        elif kind == "fsync":
            dirty.discard(values[0])
            created = {inode: parent for inode, parent in created.items() if parent != values[0]}
            renames = [rename for rename in renames if rename[0] != values[0]]
        else:
            returned = True
    return Unsynced(dirty, set(created), [(source, target) for _, source, target in renames], returned)


def failures(run_dir: Path, scratch: Path, lost: Unsynced) -> Iterator[tuple[str, Path]]:
    """Yield, one after another in the same place, copies of a run as a power failure may leave it."""
    paths = {path.stat().st_ino: path.relative_to(run_dir) for path in run_dir.rglob("*")}
    dirty = [paths[inode] for inode in lost.dirty if inode in paths]
    created = [paths[inode] for inode in lost.created if inode in paths]
    kinds = ["kept"] + (["empty", "half"] if dirty else []) + (["gone"] if created else [])
    for kind, undone in itertools.product(kinds, range(len(lost.renames) + 1)):
        if kind == "kept" and not undone:
            continue  # that is the kill alone
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(run_dir, scratch)
        for path in dirty:
            size = (scratch / path).stat().st_size
            os.truncate(scratch / path, {"empty": 0, "half": size // 2}.get(kind, size))
        for path in created if kind == "gone" else []:
            if (scratch / path).is_dir():
                shutil.rmtree(scratch / path)
            else:
                (scratch / path).unlink(missing_ok=True)
        for source, target in reversed(lost.renames[len(lost.renames) - undone :]):
            before, after = (scratch / Path(name).relative_to(run_dir) for name in (source, target))
            if after.exists():
                after.rename(before)
            elif before.parent.exists():  # it was deleted since, and its name comes back empty
                before.mkdir()
        yield f"unsynced files {kind}, {undone} renames undone", scratch


# --- checks ----------------------------------------------------------------------------------------------------------


def content(directory: Path | None) -> Content | None:
    """Return the files of a checkpoint."""
    return None if directory is None else {path.name: path.read_bytes() for path in directory.iterdir()}


def check(
    run_dir: Path, *, before: Content | None, after: Content | None, returned: bool, best: int | None
) -> str | None:  # fmt: skip
    """Return what is wrong with a run that was killed, and then with the save that follows; None for nothing."""
    newest, problems = newest_valid(run_dir)
    if problems:
        return f"the newest is not valid: {problems[0]}"
    if content(newest) not in ([after] if returned else [before, after]):
        return f"neither the state before nor after: {newest}" if not returned else f"a save is lost: {newest}"
    remove_leftovers(run_dir)
    save(run_dir, NEXT_STEP)
    prune(run_dir, keep_last=KEEP_LAST, best_step=best)
    found, problems = newest_valid(run_dir)
    if problems or found != checkpoint_path(run_dir, NEXT_STEP):
        return f"the next save: {problems}"
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    strangers = [name for name in kept if not name.removeprefix("step-").isdigit()]
    if strangers or len(kept) > KEEP_LAST + (best is not None):
        return f"left over: {kept}"
    try:
        for name in kept:
            verify(run_dir / "checkpoints" / name)
        if best is not None:
            verify(checkpoint_path(run_dir, best))
    except CheckpointError as error:
        return str(error)
    return None


@dataclass
class Result:
    """What came of a scenario."""

    name: str
    kills: int = 0
    recovered: int = 0
    power_failures: int = 0
    power_recovered: int = 0
    problems: list[str] | None = None


def run_scenario(scenario: Scenario, home: Path, *, ignore: Ignored | None = None) -> Result:
    """Kill at every point of a scenario.

    Args:
        scenario: what is done.
        home: a directory for it.
        ignore: syncs that are taken for not made.
    """
    template, run_dir, scratch = home / "template", home / "run", home / "scratch"
    template.mkdir(parents=True)
    scenario.prepare(template)
    shutil.copytree(template, run_dir)
    run_child(scenario, run_dir, None, None)
    before, after = content(newest_valid(template)[0]), content(newest_valid(run_dir)[0])
    assert after is not None
    assert after != before
    result, problems = Result(scenario.name), []
    for point in itertools.count():
        shutil.rmtree(run_dir)
        shutil.copytree(template, run_dir)
        killed, events = run_child(scenario, run_dir, point, ignore)
        if not killed:
            break
        lost = unsynced(events)
        result.kills += 1
        for how, left in failures(run_dir, scratch, lost):
            wrong = check(left, before=before, after=after, returned=lost.returned, best=scenario.best)
            result.power_failures += 1
            result.power_recovered += wrong is None
            if wrong is not None:
                problems.append(f"{scenario.name}, point {point}, power, {how}: {wrong}")
        wrong = check(run_dir, before=before, after=after, returned=lost.returned, best=scenario.best)
        result.recovered += wrong is None
        if wrong is not None:
            problems.append(f"{scenario.name}, point {point}: {wrong}")
    shutil.rmtree(home)
    result.problems = problems
    return result


def run(home: Path, names: Sequence[str], *, ignore: Ignored | None = None) -> list[Result]:
    """Kill at every point of these scenarios. Nothing waits for the disk: a power failure is made up, not had."""
    fsync, os.fsync = os.fsync, lambda descriptor: None
    try:
        return [
            run_scenario(scenario, home / f"{ignore}-{number}", ignore=ignore)
            for number, scenario in enumerate(SCENARIOS)
            if scenario.name in names
        ]
    finally:
        os.fsync = fsync


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all there instead of the table")
    parser.add_argument("--ignore", choices=["files", "directories"], help="take these syncs for not made")
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--scenario", choices=names, nargs="+", default=names, help="only these")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as home:
        results = run(Path(home), args.scenario, ignore=args.ignore)
    problems = [problem for result in results for problem in result.problems or []]
    if args.json is not None:
        args.json.write_text(json.dumps([vars(result) for result in results], indent=2))
        return
    columns = ["scenario", "kills", "recoverable", "power failures", "recoverable"]
    rows = [[r.name, r.kills, r.recovered, r.power_failures, r.power_recovered] for r in results]
    rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, 5))])
    write_result("save_points", columns, rows, seconds=time.monotonic() - started)
    if problems:
        raise SystemExit("\n".join(problems[:20]))


if __name__ == "__main__":
    main()
