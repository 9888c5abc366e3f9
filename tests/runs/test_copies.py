"""Copies of checkpoints at an address: whole or not there, the newest first, pruned, checked when they are fetched."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.object_storage import Faults, ObjectStorage
from textgen.errors import CheckpointError, UnreadableError
from textgen.runs.checkpoint import checkpoint_path, checkpoints, prune, verify, write_checkpoint
from textgen.runs.copies import Copier, digest_of, fetch_copy, fetch_newest, find_copies, folder_of
from textgen.storage import remote_folder
from textgen.storage.remote_folder import RemoteFolder

Make = Callable[..., Copier]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_folder, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def remote(tmp_path: Path) -> RemoteFolder:
    return RemoteFolder(f"file://{tmp_path}/far/away", patience=0.2)


@pytest.fixture
def told() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def make(tmp_path: Path, told: list[dict[str, Any]]) -> Iterator[Make]:
    """Return a function that makes a copier of the run `run`."""

    def copier(remote: RemoteFolder, keep_last: int = 2) -> Copier:
        return Copier(tmp_path / "run", remote, keep_last=keep_last, tell=told.append, require=lambda: None)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    return copier  # type: ignore[return-value]


@pytest.fixture
def bucket(object_storage: ObjectStorage, tmp_path: Path) -> str:
    """Return the address of an empty folder of a new bucket."""
    bucket = re.sub("[^a-z0-9]", "-", tmp_path.name.lower())[:50].strip("-")
    object_storage.send(tmp_path / "nothing", f"s3://{bucket}/x")
    return f"s3://{bucket}/runs/x"


def save(run_dir: Path, step: int, content: bytes = b"weights") -> Path:
    directory = checkpoint_path(run_dir, step)
    files = {"model.safetensors": [content], "trainer.json": [b"{}"], "tokenizer.model": [b"pieces"]}
    write_checkpoint(directory, files, step=step)
    return directory


def copied_steps(remote: RemoteFolder) -> list[int]:
    return [copy.step for copy in find_copies(remote)]


def far(remote: RemoteFolder, step: int) -> Path:
    """Return the local folder of a copy at a `file` address."""
    (copy,) = [copy for copy in find_copies(remote) if copy.step == step]
    return Path(remote.address.removeprefix("file://"), copy.folder)


def copy_steps(copier: Copier, run_dir: Path, *steps: int, best_step: int | None = None) -> None:
    for step in steps:
        save(run_dir, step)
        copier.offer(step, best_step=best_step)
        copier.finish(stopped=False)


def test_a_copy_is_fetched_as_it_was(remote: RemoteFolder, make: Make, tmp_path: Path, told: list[Any]) -> None:
    copy_steps(make(remote), tmp_path / "run", 5)
    (tmp_path / "other").mkdir()
    assert fetch_newest(remote, find_copies(remote), tmp_path / "other", after=-1) == (5, set())
    ours, theirs = checkpoint_path(tmp_path / "run", 5), checkpoint_path(tmp_path / "other", 5)
    assert {path.name: path.read_bytes() for path in theirs.iterdir()} == {
        path.name: path.read_bytes() for path in ours.iterdir()
    }
    assert fetch_newest(remote, find_copies(remote), tmp_path / "other", after=5) == (None, set())
    assert remote.read("metrics.jsonl", limit=99) == b'{"step": 1}\n'
    assert told == [{"address": str(remote), "step": 5, "problem": None}]


def test_the_newest_copies_and_the_best_are_kept(remote: RemoteFolder, make: Make, tmp_path: Path) -> None:
    copier = make(remote)
    for step in range(1, 6):
        copy_steps(copier, tmp_path / "run", step, best_step=min(step, 2))
        assert copied_steps(remote)[0] == step
    assert copied_steps(remote) == [5, 4, 2]
    left = {Path(name).parts[1] for name in remote.names("checkpoints")}
    assert len(left) == 3, "files of deleted copies are left"
    assert {path.name for path in (tmp_path / "far" / "away" / "checkpoints").iterdir()} == left


def test_a_checkpoint_that_was_made_again_never_mixes_with_the_one_before(
    remote: RemoteFolder, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copier = make(remote, keep_last=1)
    copy_steps(copier, tmp_path / "run", 5)
    (before,) = find_copies(remote)
    save(tmp_path / "run", 5, b"changed")
    sends: list[str] = []
    send = RemoteFolder.send

    def watched(folder: RemoteFolder, path: Path, name: str) -> None:
        sends.append(name)
        assert before in find_copies(remote), "the only whole copy was given up"
        send(folder, path, name)

    monkeypatch.setattr(RemoteFolder, "send", watched)
    copier.offer(5, best_step=None)
    copier.finish(stopped=False)
    (after,) = find_copies(remote)
    assert after != before
    assert sends[-1] == f"{after.folder}/manifest.json"
    fetch_copy(remote, after, tmp_path / "run")
    assert (checkpoint_path(tmp_path / "run", 5) / "model.safetensors").read_bytes() == b"changed"


def test_of_those_that_wait_the_newest_is_copied_and_what_is_copied_is_not_deleted(
    object_storage: ObjectStorage, bucket: str, make: Make, tmp_path: Path
) -> None:
    remote, run_dir = RemoteFolder(bucket, patience=20), tmp_path / "run"
    copier = make(remote)
    object_storage.faults = slow = Faults(silent=True, only="step-000001", count=1)
    save(run_dir, 1)
    copier.offer(1, best_step=None)
    while slow.count:
        time.sleep(0.01)
    for step in (2, 3, 4):
        save(run_dir, step)
        copier.offer(step, best_step=None)
        prune(run_dir, keep_last=1, best_step=None, in_use=copier.copying)
        assert [number for number, _ in checkpoints(run_dir)] == [step, 1]
    object_storage.faults = Faults()
    copier.finish(stopped=False)
    assert copied_steps(remote) == [4, 1]
    assert copier.copying == set()


def test_the_best_checkpoint_follows_when_nothing_waits(remote: RemoteFolder, make: Make, tmp_path: Path) -> None:
    copier = make(remote)
    for step in (3, 4):
        save(tmp_path / "run", step)
    copier.offer(4, best_step=3)
    copier.finish(stopped=False)
    assert copied_steps(remote) == [4, 3]


@pytest.mark.parametrize("faults", [Faults(refused=True), Faults(status=503), Faults(status=403)], ids=str)
def test_storage_that_fails_is_logged_once_for_a_checkpoint_and_copied_to_when_it_is_back(
    object_storage: ObjectStorage,
    bucket: str,
    make: Make,
    tmp_path: Path,
    told: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    faults: Faults,
) -> None:
    remote, run_dir = RemoteFolder(bucket, patience=0.1), tmp_path / "run"
    copier = make(remote)
    object_storage.faults = faults
    with caplog.at_level(logging.WARNING):
        save(run_dir, 1)
        copier.offer(1, best_step=None)
        copier.finish(stopped=True)
    lines = [record.message for record in caplog.records if record.message.startswith("step 1: ")]
    assert len(lines) == 1
    assert lines[0].endswith("; the training continues")
    assert caplog.messages[-1].startswith(f"THE COPY IS BEHIND: `{bucket}` lacks step 1")
    assert told[-1]["step"] is None
    assert told[-1]["problem"] in lines[0]
    object_storage.faults = Faults()
    copier.offer(1, best_step=None)
    copier.finish(stopped=False)
    assert copied_steps(remote) == [1]
    assert told[-1] == {"address": bucket, "step": 1, "problem": None}
    caplog.clear()
    object_storage.faults = faults
    save(run_dir, 1, b"made again")
    copier.offer(1, best_step=None)
    copier.finish(stopped=True)
    assert "THE COPY IS BEHIND" in caplog.text


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Give a copy another manifest, and the folder the name that fits it."""
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    content = json.dumps(values).encode()
    (folder / "manifest.json").write_bytes(content)
    folder.rename(folder.parent / Path(folder_of(9, digest_of(content))).name)


def rename(name: str) -> Callable[[Path], None]:
    """Return a function that gives a file of a manifest another name, under which its bytes can be fetched."""

    def change(folder: Path) -> None:
        place = Path(f"{folder}/{name}")
        place.parent.mkdir(parents=True, exist_ok=True)
        if "/" not in name:
            shutil.copyfile(folder / "model.safetensors", place)
        rewrite(folder, lambda values: values["files"].update({name: values["files"].pop("model.safetensors")}))

    return change


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a byte": lambda folder: flip(folder / "model.safetensors"),
    "longer": lambda folder: (folder / "model.safetensors").write_bytes(b"weights" * 1000),
    "shorter": lambda folder: (folder / "model.safetensors").write_bytes(b"w"),
    "missing": lambda folder: (folder / "model.safetensors").unlink(),
    "manifest": lambda folder: flip(folder / "manifest.json"),
    "no json": lambda folder: (folder / "manifest.json").write_bytes(b"{"),
    "another step": lambda folder: rewrite(folder, lambda values: values.update(step=8)),
    "no digest": lambda folder: rewrite(folder, lambda values: values["files"]["trainer.json"].pop("sha256")),
    "above": rename("../x.json"),
    "absolute": rename("/tmp/x.json"),
    "nested": rename("a/x.json"),
    "hidden": rename(".x.json"),
    "pickle": rename("x.pt"),
    "null": lambda folder: rewrite(folder, lambda v: v["files"].update({"x\0.json": v["files"].pop("trainer.json")})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_hostile_copy_is_named_in_a_line_and_the_one_before_is_taken(
    remote: RemoteFolder, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    copy_steps(make(remote), tmp_path / "run", 7, 9)
    DAMAGE[damage](far(remote, 9))
    other = tmp_path / "deep" / "er" / "other"
    other.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with caplog.at_level(logging.WARNING):
        fetched, damaged = fetch_newest(remote, find_copies(remote), other, after=-1)
    assert fetched == 7
    assert len(damaged) == 1
    assert len([line for line in caplog.messages if line.startswith("INVALID COPY skipped: ")]) == 1
    assert verify(checkpoint_path(other, 7)).step == 7
    assert [number for number, _ in checkpoints(other)] == [7]
    new = [path for path in sorted(tmp_path.rglob("*")) if path not in before and not path.is_relative_to(other)]
    assert new == [], "something was written elsewhere"


def test_only_what_the_manifest_lists_is_fetched(remote: RemoteFolder, make: Make, tmp_path: Path) -> None:
    copy_steps(make(remote), tmp_path / "run", 5)
    (far(remote, 5) / "more.json").write_text("{}")
    (far(remote, 5) / "deep").mkdir()
    (far(remote, 5) / "deep" / "model.safetensors").write_text("{}")
    (tmp_path / "other").mkdir()
    fetch_newest(remote, find_copies(remote), tmp_path / "other", after=-1)
    names = {path.name for path in checkpoint_path(tmp_path / "other", 5).iterdir()}
    assert names == {"model.safetensors", "trainer.json", "tokenizer.model", "manifest.json"}


def test_a_copy_without_a_manifest_is_not_there_and_is_deleted_later(
    remote: RemoteFolder, make: Make, tmp_path: Path
) -> None:
    copier = make(remote)
    copy_steps(copier, tmp_path / "run", 5, 6)
    half = far(remote, 6)
    (half / "manifest.json").unlink()
    assert copied_steps(remote) == [5]
    copy_steps(copier, tmp_path / "run", 7)
    assert copied_steps(remote) == [7, 5]
    assert not list(half.glob("*"))


def test_a_damaged_copy_is_made_again(remote: RemoteFolder, make: Make, tmp_path: Path) -> None:
    """The same step of the same training has the same bytes, so its copy has the same name."""
    copier = make(remote)
    copy_steps(copier, tmp_path / "run", 5)
    flip(far(remote, 5) / "model.safetensors")
    (tmp_path / "other").mkdir()
    fetched, copier.damaged = fetch_newest(remote, find_copies(remote), tmp_path / "other", after=-1)
    assert fetched is None
    copier.offer(5, best_step=None)
    copier.finish(stopped=False)
    assert fetch_newest(remote, find_copies(remote), tmp_path / "other", after=-1) == (5, set())


def test_a_copy_that_cannot_be_read_now_or_does_not_fit_is_not_skipped(
    object_storage: ObjectStorage, bucket: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = RemoteFolder(bucket, patience=0.1)
    copy_steps(make(remote), tmp_path / "run", 5, 6)
    copies = find_copies(remote)
    (tmp_path / "other").mkdir()
    for faults in (Faults(status=503, only="model"), Faults(refused=True, only="manifest"), Faults(cut=True)):
        object_storage.faults = faults
        with pytest.raises(UnreadableError):
            fetch_newest(remote, copies, tmp_path / "other", after=-1)
    object_storage.faults = Faults()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))  # type: ignore[attr-defined]
    with pytest.raises(UnreadableError, match="MB free"):
        fetch_newest(remote, copies, tmp_path / "other", after=-1)
    assert not list((tmp_path / "other").rglob("step-*"))


def test_a_server_that_lies_is_found_out(
    object_storage: ObjectStorage, bucket: str, make: Make, tmp_path: Path
) -> None:
    remote = RemoteFolder(bucket)
    copy_steps(make(remote), tmp_path / "run", 5)
    object_storage.faults = Faults(lies=True, only="model.safetensors")
    with pytest.raises(CheckpointError, match="is damaged: "):
        fetch_copy(remote, find_copies(remote)[0], tmp_path / "run")
    assert (
        hashlib.sha256(b"weights").hexdigest() in (checkpoint_path(tmp_path / "run", 5) / "manifest.json").read_text()
    )
