"""Disks that fail under a training: full, read-only, unwritable, unreadable, and without power.

Real file systems, which takes root: a tmpfs that something else fills, and an ext4 in a file, which the kernel is asked
to take for faulty (read-only from then on, as after an error), or to shut down (EIO for everything, and what was not
synced is lost, as without power).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.jobs import Job, assert_as_if_nothing_had_happened, fault, finish, newest, rows
from textgen.cli import train_main
from textgen.runs.directory import read_status

slow = pytest.mark.slow

STEPS = 12
FLAGS = [
    "--max_steps", str(STEPS), "--evaluate_every", "5", "--log_every", "1", "--model.dropout", "0.2",
    "--sample_tokens", "12", "--keep_last", "1",
]  # fmt: skip
CHECKPOINT_FILES = 7  # written one after the other, the manifest last

Disk = Callable[[str], Path]


class Ext4:
    """An ext4 in a file."""

    def __init__(self, image: Path, place: Path) -> None:
        self._image, self.place = image, place
        place.mkdir()
        self._run("truncate", "-s", "40M", str(image))
        self._run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", str(image))
        self.mount()

    def _run(self, *argv: str) -> str:
        tried = subprocess.run(argv, capture_output=True, text=True) if shutil.which(argv[0]) else None
        if tried is None or tried.returncode != 0:
            pytest.skip(f"an ext4 cannot be mounted here, which takes root: {tried and tried.stderr}")
        return tried.stdout.strip()

    def mount(self) -> None:
        self._run("mount", "-o", "loop,errors=remount-ro", str(self._image), str(self.place))

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.place)], check=False, capture_output=True)

    @property
    def error(self) -> str:
        """A command after which the kernel takes it for faulty, and allows reading only."""
        device = Path(self._run("findmnt", "-no", "SOURCE", str(self.place))).name
        return f"echo 1 > /sys/fs/ext4/{device}/trigger_fs_error"

    @property
    def shutdown(self) -> str:
        """A command after which nothing works, and only what was synced is there once it is mounted again."""
        ioctl = "EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH = 0x8004587D, struct.pack('I', 2)"
        code = (
            f"import fcntl, os, struct; {ioctl}; "
            f"fcntl.ioctl(os.open('{self.place}', os.O_RDONLY), EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH)"
        )
        return f'{sys.executable} -c "{code}"'


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Ext4]:
    """Yield a mounted ext4 of 40 MB."""
    disk = Ext4(tmp_path / "image", tmp_path / "ext4")
    yield disk
    disk.unmount()


def fill(disk: Path) -> str:
    """Return an action after which a disk has not a byte left."""
    return f"run cat /dev/zero > {disk / 'filler'} 2> /dev/null"


def only_error(job: Job) -> str:
    """Return the one line with which a training must have ended, with exit code 2."""
    assert job.end() == 2, job.output
    assert "Traceback" not in job.output
    (line,) = job.errors()
    assert job.output.rstrip().endswith(line)
    return line


# --- full ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", [pytest.param(1, marks=slow), 3, pytest.param(CHECKPOINT_FILES, marks=slow)],
    ids=["before its first file", "in the middle", "before its manifest"],
)  # fmt: skip
def test_disk_that_fills_during_a_save_ends_the_training_and_space_lets_it_go_on(
    file: int, small_disk: Disk, flags: list[str], whole: Path
) -> None:
    disk = small_disk("4M")
    job = Job(flags, disk / "run", fault(fill(disk), at="saving", call=CHECKPOINT_FILES + file))
    assert only_error(job) == f"No space left on device: `{disk}/run/checkpoints/step-000010`"
    assert newest(job.run_dir).name == "step-000005"
    assert [path.name for path in (job.run_dir / "checkpoints").iterdir()] == ["step-000005"]
    assert job.status["state"] == "failed"
    assert "No space left on device" in job.status["reason"]
    (disk / "filler").unlink()
    finish(flags, job.run_dir)
    assert_as_if_nothing_had_happened(job.run_dir, whole)


@slow
def test_metrics_on_a_full_disk_end_the_training_and_space_lets_it_go_on(
    small_disk: Disk, flags: list[str], tmp_path: Path
) -> None:
    """Rows go on into the last block of the file; the first one after it ends the training, before the next save."""
    disk = small_disk("4M")
    flags = [*flags, "--max_steps", "80", "--evaluate_every", "40"]
    job = Job(flags, disk / "run", fault(fill(disk), at="stepping", call=42))
    assert only_error(job) == f"No space left on device: `{disk}/run`"
    assert newest(job.run_dir).name == "step-000040"
    assert 42 <= rows(job.run_dir)[-1]["step"] < 79
    assert job.status["state"] == "failed"
    (disk / "filler").unlink()
    finish(flags, job.run_dir)
    assert_as_if_nothing_had_happened(job.run_dir, finish(flags, tmp_path / "whole").run_dir)


@slow
def test_samples_on_a_full_disk_are_not_lost(small_disk: Disk, flags: list[str], whole: Path) -> None:
    disk = small_disk("4M")
    job = Job(flags, disk / "run", fault(fill(disk), at="evaluating", call=2))
    assert only_error(job).startswith(f"No space left on device: `{disk}/run")
    assert "## step 5\n" in (job.run_dir / "samples.md").read_text()
    (disk / "filler").unlink()
    finish(flags, job.run_dir)
    assert_as_if_nothing_had_happened(job.run_dir, whole)


@slow
def test_disk_that_fills_ends_both_processes_at_the_next_step(small_disk: Disk, flags: list[str]) -> None:
    """The step after the save waits until the writing thread has failed; evaluations and other saves are far away."""
    disk = small_disk("4M")
    faults = [
        fault(fill(disk), at="saving", call=CHECKPOINT_FILES + 3, rank=0),
        fault("sleep 2", at="stepping", call=11, rank=0),
        fault("exit", at="stepping", call=12),
    ]
    flags = [*flags, "--max_steps", "100", "--save_every", "5", "--evaluate_every", "50"]
    job = Job(flags, disk / "run", *faults, processes=2)
    assert job.end() != 0
    assert job.left() == []
    assert "fault: exit" not in job.output
    assert job.errors() == [f"No space left on device: `{disk}/run/checkpoints/step-000010`"]
    assert newest(job.run_dir).name == "step-000005"
    assert job.status["state"] == "failed"


def test_disk_that_is_full_from_the_start_is_told_and_nothing_is_left(
    small_disk: Disk, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk("1M")
    subprocess.run(f"cat /dev/zero > {disk / 'filler'}", shell=True, check=False, stderr=subprocess.DEVNULL)
    with pytest.raises(SystemExit) as ended:
        train_main([*flags, "--run_dir", str(disk / "run")])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: No space left on device: `{disk}/run/status.json`\n"
    assert not (disk / "run").exists()


# --- not to be written or read ---------------------------------------------------------------------------------------


@slow
def test_disk_that_turns_read_only_ends_the_training_and_is_gone_on_from(
    ext4: Ext4, flags: list[str], whole: Path
) -> None:
    job = Job(flags, ext4.place / "run", fault(f"run {ext4.error}", at="stepping", call=7))
    assert only_error(job).startswith(f"Read-only file system: `{job.run_dir}")
    assert newest(job.run_dir).name == "step-000005"
    assert job.status["state"] == "running", "it could not be written"
    ext4.unmount()
    ext4.mount()
    finish(flags, job.run_dir)
    assert_as_if_nothing_had_happened(job.run_dir, whole)


@slow
@pytest.mark.parametrize("place", ["stepping", "saving"])
def test_disk_that_gives_errors_ends_the_training_and_is_gone_on_from(
    place: str, ext4: Ext4, flags: list[str], whole: Path
) -> None:
    call = 7 if place == "stepping" else CHECKPOINT_FILES + 3
    job = Job(flags, ext4.place / "run", fault(f"run {ext4.shutdown}", at=place, call=call))
    assert only_error(job).startswith(f"Input/output error: `{job.run_dir}")
    ext4.unmount()
    ext4.mount()
    assert newest(job.run_dir).name == "step-000005"
    finish(flags, job.run_dir)
    assert_as_if_nothing_had_happened(job.run_dir, whole)


@slow
@pytest.mark.parametrize("step", [6, 8, 11])
def test_run_without_power_goes_on_as_if_nothing_had_happened(
    step: int, ext4: Ext4, flags: list[str], whole: Path
) -> None:
    """Whatever was not synced is gone: rows and samples of a checkpoint must not be."""
    faults = [fault(f"run {ext4.shutdown}; kill -9 $PPID", at="stepping", call=step)]
    faults.append(fault("sleep 1", at="stepping", call=step - 1))  # a save before it is done
    job = Job(flags, ext4.place / "run", *faults)
    assert job.end() == -9, job.output
    ext4.unmount()
    ext4.mount()
    assert newest(job.run_dir).name == f"step-{(step - 1) // 5 * 5:06d}"
    finish(flags, job.run_dir)
    assert_as_if_nothing_had_happened(job.run_dir, whole)


@pytest.fixture
def unchangeable(tmp_path: Path) -> Iterator[Callable[[Path, bool], None]]:
    """Yield a function that forbids, or allows again, all changes to a directory: root obeys no modes."""
    forbidden = set()

    def forbid(directory: Path, yes: bool) -> None:
        tried = subprocess.run(["chattr", "+i" if yes else "-i", str(directory)], capture_output=True, text=True)
        if tried.returncode != 0:
            pytest.skip(f"chattr +i is not to be had here: {tried.stderr}")
        (forbidden.add if yes else forbidden.discard)(directory)

    yield forbid
    for directory in forbidden:
        subprocess.run(["chattr", "-i", str(directory)], check=True)


@slow
def test_checkpoints_that_may_not_be_written_end_the_training_and_permission_lets_it_go_on(
    unchangeable: Callable[[Path, bool], None], flags: list[str], whole: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run_dir = tmp_path / "run"
    command = [*flags, "--run_dir", str(run_dir)]
    (run_dir / "checkpoints").mkdir(parents=True)
    unchangeable(run_dir / "checkpoints", True)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train_main(command)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: Operation not permitted: `{run_dir}/checkpoints/step-000005`"
    assert read_status(run_dir)["state"] == "failed"
    unchangeable(run_dir / "checkpoints", False)
    finish(flags, run_dir)
    assert_as_if_nothing_had_happened(run_dir, whole)


def test_run_directory_that_may_not_be_written_is_told(
    unchangeable: Callable[[Path, bool], None], flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    unchangeable(run_dir, True)
    for directory in (run_dir, run_dir / "below"):
        with pytest.raises(SystemExit) as ended:
            train_main([*flags, "--run_dir", str(directory)])
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: Operation not permitted: `{directory}")
    assert os.listdir(run_dir) == []
