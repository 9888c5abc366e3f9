"""Trainings with `--checkpoint_copy`: continued from it on an empty disk, bit for bit; and storage that fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.faults.jobs import Job, assert_as_if_nothing_had_happened, finish, newest, rows
from tests.forking import free_port, server
from tests.object_storage import SECRET, Faults, ObjectStorage
from tests.training.test_resume import assert_same_end, flags_for, steps_of
from textgen.cli import main, train_main
from textgen.runs.copies import find_copies
from textgen.runs.directory import read_status
from textgen.storage import remote_folder
from textgen.storage.remote_folder import RemoteFolder
from textgen.training import copying, resume

Capture = pytest.CaptureFixture[str]
STEPS = ["--max_steps", "8", "--log_every", "1", "--evaluate_every", "4", "--save_every", "2", "--sample_tokens", "4"]
SHORT = ["--sample_tokens", "4"]
DROPS = ["--model.dropout", "0.2", "--ema_decay", "0.9"]


@pytest.fixture(autouse=True)
def _any_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate fixes the precision of a process with its first Accelerator; storage that fails is given up soon.

    One thread computes, as in the processes that tests start.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for module, name in ((remote_folder, "FIRST_WAIT_SECONDS"), (copying, "LOOK_SECONDS")):
        monkeypatch.setattr(module, name, 0.1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def bucket(object_storage: ObjectStorage, tmp_path: Path) -> str:
    """Return the address of an empty folder of a new bucket."""
    bucket = re.sub("[^a-z0-9]", "-", tmp_path.name.lower())[:50].strip("-")
    object_storage.send(tmp_path / "nothing", f"s3://{bucket}/x")
    return f"s3://{bucket}/runs/x"


@pytest.fixture(scope="module")
def whole(tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of a training that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("copying") / "whole"
    finish([*tiny_flags, *STEPS, *DROPS], run_dir)
    return run_dir


def copied(address: str) -> list[int]:
    return [copy.step for copy in find_copies(RemoteFolder(address))]


def files_of(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def run_id_of(checkpoint: Path) -> str:
    return str(json.loads((checkpoint / "trainer.json").read_text())["run_id"])


def refusal(capsys: Capture, *argv: str) -> str:
    """Return the line with which a training is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train_main(list(argv))
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_a_training_goes_on_from_its_copy_on_an_empty_disk_bit_for_bit(
    tiny_flags: list[str], tmp_path: Path, bucket: str, stop_at: Callable[[int | None], None], whole: Path
) -> None:
    flags = [*STEPS, *DROPS, "--keep_last", "1", "--checkpoint_copy", bucket]
    stop_at(7)
    with pytest.raises(SystemExit) as stopped:
        train_main(flags_for(tiny_flags, tmp_path / "one", *flags))
    assert stopped.value.code == 128 + 15
    assert copied(bucket) == steps_of(tmp_path / "one")
    assert copied(bucket)[0] == 7
    status = read_status(tmp_path / "one")
    assert (status["state"], status["copy"]) == ("preempted", {"address": bucket, "step": 7, "problem": None})
    for name in ("config.yaml", "data.json", "environment.json", "metrics.jsonl", "samples.md"):
        assert RemoteFolder(bucket).read(name, limit=1 << 20) == (tmp_path / "one" / name).read_bytes()
    stop_at(None)
    train_main(flags_for(tiny_flags, tmp_path / "two", *flags))
    assert_same_end(whole, tmp_path / "two")
    assert (tmp_path / "two" / "samples.md").read_bytes() == (whole / "samples.md").read_bytes()
    ids = {run_id_of(path) for name in ("one", "two") for path in (tmp_path / name / "checkpoints").iterdir()}
    assert len(ids) == 1
    assert ids != {run_id_of(newest(whole))}
    assert copied(bucket) == steps_of(tmp_path / "two")
    assert copied(bucket)[0] == 8
    written = [path for name in ("one", "two") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []


def test_a_training_killed_while_it_copies_goes_on_elsewhere(
    tiny_flags: list[str], tmp_path: Path, bucket: str, object_storage: ObjectStorage, whole: Path,
    stop_at: Callable[[int | None], None],
) -> None:  # fmt: skip
    """Step 3 is copied, a later one half, and the disk is lost."""
    flags = [*tiny_flags, *STEPS, *DROPS, "--checkpoint_copy", bucket]
    stop_at(3)
    with pytest.raises(SystemExit):
        train_main(flags_for(flags, tmp_path / "one"))
    assert copied(bucket)[0] == 3
    object_storage.faults, started = Faults(silent=True, only="/model.safetensors"), len(object_storage.requests)
    job = Job(flags, tmp_path / "one")
    deadline = time.monotonic() + 60
    while not any(line.startswith("PUT") and "/model" in line for line in object_storage.requests[started:]):
        assert time.monotonic() < deadline, job.output
        time.sleep(0.01)
    job.kill()
    object_storage.faults = Faults()
    assert copied(bucket)[0] == 3
    assert len({Path(name).parts[1] for name in RemoteFolder(bucket).names("checkpoints")}) > len(copied(bucket))
    shutil.rmtree(tmp_path / "one")
    job = finish(flags, tmp_path / "two")
    assert "resuming at step 3" in job.output
    assert_as_if_nothing_had_happened(tmp_path / "two", whole)
    assert copied(bucket)[0] == 8
    assert len({Path(name).parts[1] for name in RemoteFolder(bucket).names("checkpoints")}) == len(copied(bucket))


def test_two_machines_without_a_shared_disk_go_on_from_the_copy_of_one(
    tiny_flags: list[str], tmp_path: Path, bucket: str, whole: Path
) -> None:
    """One process each. What the first one has is not copied yet; the second one has another checkpoint of the step."""
    flags = [*tiny_flags, *STEPS, *DROPS]
    short = ["--max_steps", "4", "--lr_schedule", "constant"]
    train_main(flags_for(flags, tmp_path / "one", "--checkpoint_copy", bucket, *short))
    assert copied(bucket)[0] == 4
    (latest,) = [copy for copy in find_copies(RemoteFolder(bucket)) if copy.step == 4]
    RemoteFolder(bucket).delete(f"{latest.folder}/manifest.json")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "checkpoints" / "step-000004" / "manifest.json").write_text("{}")
    (tmp_path / "two" / "metrics.jsonl").unlink()
    meeting = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    argv = ["train_distributed.py", *flags, "--checkpoint_copy", bucket, "--run_dir"]
    jobs = [
        server().start(
            [*argv, str(tmp_path / name)],
            output=tmp_path / f"{name}.out",
            error=tmp_path / f"{name}.out",
            env=os.environ | meeting | {"RANK": str(rank)},
        )
        for rank, name in enumerate(("one", "two"))
    ]
    codes = [job.wait(120) for job in jobs]
    said = (tmp_path / "one.out").read_text()
    assert codes == [0, 0], said + (tmp_path / "two.out").read_text()
    assert "2 processes on " in said
    assert "resuming at step 4" in said
    ours, theirs = rows(tmp_path / "one"), rows(whole)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    losses = [(a["train/loss"], b["train/loss"]) for a, b in zip(ours, theirs, strict=True) if "train/loss" in a]
    assert max(abs(a / b - 1) for a, b in losses) <= 1e-5
    assert copied(bucket)[0] == 8
    assert not (tmp_path / "two" / "metrics.jsonl").exists()


def test_storage_that_dies_ends_nothing_and_is_caught_up_with(
    tiny_flags: list[str],
    tmp_path: Path,
    bucket: str,
    object_storage: ObjectStorage,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(remote_folder, "PATIENCE_SECONDS", 0.2)
    flags = flags_for(tiny_flags, tmp_path / "run", *STEPS, *DROPS, "--checkpoint_copy", bucket)
    object_storage.faults = Faults(refused=True, only="checkpoints/step")
    train_main(flags)
    said = caplog.text
    assert_same_end(whole, tmp_path / "run")
    assert f"THE COPY IS BEHIND: `{bucket}` lacks step 8" in said
    copy = read_status(tmp_path / "run")["copy"]
    assert (copy["step"], bool(copy["problem"])) == (None, True)
    assert SECRET not in said
    object_storage.faults = Faults(refused=True)  # looking for a copy fails too
    train_main(flags)
    assert read_status(tmp_path / "run")["state"] == "finished"
    object_storage.faults = Faults()
    train_main(flags)
    assert copied(bucket)[0] == 8
    assert read_status(tmp_path / "run")["copy"] == {"address": bucket, "step": 8, "problem": None}


def test_the_newer_of_disk_and_copy_wins(
    tiny_flags: list[str], tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    far = f"file://{tmp_path}/far"
    flags = [*STEPS, *DROPS, "--checkpoint_copy", far]
    train_main(flags_for(tiny_flags, tmp_path / "run", *flags))
    for path in (tmp_path / "run" / "checkpoints").glob("step-000008/*.safetensors"):
        path.write_bytes(b"damaged")
    caplog.clear()
    train_main(flags_for(tiny_flags, tmp_path / "run", *flags))
    assert "step 8: checkpoint fetched from" in caplog.text
    assert_same_end(whole, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-000008.invalid").exists()
    shutil.rmtree(tmp_path / "far" / "checkpoints")
    train_main(flags_for(tiny_flags, tmp_path / "run", *flags))
    assert copied(far) == [8]


def test_what_cannot_be_continued_is_refused_in_a_line_and_nothing_is_deleted(
    tiny_flags: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = f"file://{tmp_path}/far"
    train_main(flags_for(tiny_flags, tmp_path / "run", "--checkpoint_copy", far, "--save_every", "2", *SHORT))
    before = files_of(tmp_path / "far")

    def refused(run_dir: str, *flags: str) -> str:
        return refusal(capsys, *flags_for(tiny_flags, tmp_path / run_dir, "--checkpoint_copy", far, *flags))

    assert "`--resume never` would overwrite" in refused("new", "--resume", "never")
    branch = str(tmp_path / "run" / "checkpoints" / "step-000004")
    assert "holds copies of another training" in refused("new", "--resume", branch)
    assert f"`seed` is 7, wanted 42 as in `{far}/checkpoints/step-000004-" in refused("new", "--seed", "7")
    assert not (tmp_path / "new").exists()
    assert files_of(tmp_path / "far") == before
    for path in (tmp_path / "far" / "checkpoints").rglob("model.safetensors"):
        path.write_bytes(b"damaged")
    assert "no copy at" in refused("empty")


def test_copies_of_another_run_are_neither_fetched_nor_deleted(
    tiny_flags: list[str], tmp_path: Path, capsys: Capture
) -> None:
    """Of a run that differs in one setting and was here longer, and of one that differs in its length alone."""
    far, constant = f"file://{tmp_path}/far", [*SHORT, "--lr_schedule", "constant"]
    train_main(flags_for(tiny_flags, tmp_path / "other", *constant, "--checkpoint_copy", far))
    newer, older = ["--max_steps", "6", "--weight_decay", "0.1"], ["--max_steps", "2"]
    for name, flags in (("newer", newer), ("older", older)):
        train_main(flags_for(tiny_flags, tmp_path / name, *constant, *flags))
        before = files_of(tmp_path / "far"), files_of(tmp_path / name / "checkpoints")
        for more in ([], ["--resume_override"]):
            argv = flags_for(tiny_flags, tmp_path / name, *constant, *flags, "--checkpoint_copy", far, *more)
            assert refusal(capsys, *argv) == (
                f"error: `{far}` holds copies of another training up to step 4: name another `--checkpoint_copy`"
            )
        assert (files_of(tmp_path / "far"), files_of(tmp_path / name / "checkpoints")) == before
    train_main(flags_for(tiny_flags, tmp_path / "older", *constant, "--max_steps", "3"))
    assert steps_of(tmp_path / "older")[0] == 3
    train_main(flags_for(tiny_flags, tmp_path / "branch", *constant, "--resume", str(newest(tmp_path / "older"))))
    assert run_id_of(newest(tmp_path / "branch")) != run_id_of(newest(tmp_path / "older"))


def test_checkpoints_of_a_version_without_ids_are_compared_by_their_settings(
    tiny_flags: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe, far = resume._describe, f"file://{tmp_path}/far"
    flags = [*SHORT, "--lr_schedule", "constant", "--checkpoint_copy"]
    with monkeypatch.context() as older:
        older.setattr(resume, "_describe", lambda it: {k: v for k, v in describe(it).items() if k != "run_id"})
        train_main(flags_for(tiny_flags, tmp_path / "run", *flags, far))
        train_main(flags_for(tiny_flags, tmp_path / "other", "--seed", "7", *flags, f"{far}2"))
    assert "another training" in refusal(capsys, *flags_for(tiny_flags, tmp_path / "other", "--seed", "7", *flags, far))
    train_main(flags_for(tiny_flags, tmp_path / "run", "--max_steps", "5", *flags, far))
    assert copied(far)[0] == 5
    assert run_id_of(newest(tmp_path / "run"))


def test_a_new_training_is_refused_if_its_address_cannot_be_read_or_written(
    tiny_flags: list[str], tmp_path: Path, bucket: str, object_storage: ObjectStorage, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(remote_folder, "PATIENCE_SECONDS", 0.2)
    flags = flags_for(tiny_flags, tmp_path / "run", "--checkpoint_copy", bucket)
    object_storage.faults = Faults(refused=True)
    assert f"`{bucket}/checkpoints` cannot be listed" in refusal(capsys, *flags)
    assert not (tmp_path / "run").exists()
    object_storage.faults = Faults(status=403, only="config.yaml")
    assert f"`{bucket}/config.yaml` cannot be sent, access is denied" in refusal(capsys, *flags)
    object_storage.faults = Faults()
    missing = flags_for(tiny_flags, tmp_path / "run", "--checkpoint_copy", "s3://there-is-no-such-bucket/x")
    assert "`s3://there-is-no-such-bucket/x/config.yaml`" in refusal(capsys, *missing)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("runs/copy", "not of a protocol"),
        ("https://host/x", "cannot be written by `https`"),
        ("hf://datasets/x/y", "cannot be written by `hf`"),
        ("s3://user:a-password@bucket/x", "credentials come from the environment"),
        ("simplecache::s3://bucket/x", "chain"),
        ("s3://bucket/../x", "`..`"),
    ],
)
def test_wrong_addresses_are_refused(tiny_flags: list[str], capsys: Capture, address: str, reason: str) -> None:
    error = refusal(capsys, *tiny_flags, "--checkpoint_copy", address)
    assert "`checkpoint_copy`" in error
    assert reason in error
    assert "a-password" not in error


def test_trainings_of_a_sweep_share_no_copy(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "sweep.txt").write_text("--seed 1\n--seed 2\n")
    with pytest.raises(SystemExit) as ended:
        main(
            ["submit", "--dry_run", "--sweep", str(tmp_path / "sweep.txt"), "--", "--checkpoint_copy", "s3://bucket/x"]
        )
    assert ended.value.code == 2
    assert "`checkpoint_copy` must be another address for each training of a sweep" in capsys.readouterr().err


def test_another_world_is_told_of_a_failure(tiny_flags: list[str], tmp_path: Path, bucket: str) -> None:
    """The main process cannot fetch; the others end too, and the reason is said once."""
    argv = ["train_distributed.py", *tiny_flags, "--checkpoint_copy", bucket, "--run_dir", str(tmp_path / "run")]
    ended = server().run(argv, env=os.environ | {"AWS_SECRET_ACCESS_KEY": "", "AWS_ACCESS_KEY_ID": ""}, processes=2)
    assert all(one.returncode for one in ended)
    assert "access is denied" in ended[0].stderr
    assert json.dumps(ended[0].stderr).count("error: ") == 1
