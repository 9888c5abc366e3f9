"""Checkpoints as a training uses them: found valid, compared, gone on from bit for bit."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from textgen.cli import main, train_main
from textgen.model.files import load_model
from textgen.runs.checkpoint import checkpoints, newest_valid
from textgen.runs.metrics_file import read_metrics
from textgen.training import loop as training

Capture = pytest.CaptureFixture[str]


def flags_for(tiny_flags: list[str], run_dir: Path, *more: str) -> list[str]:
    return [*tiny_flags, "--run_dir", str(run_dir), *more]


def steps_of(run_dir: Path) -> list[int]:
    return [step for step, _ in checkpoints(run_dir)]


def rows_of(run_dir: Path) -> list[tuple[Any, ...]]:
    """Return what metrics.jsonl says of losses, in order."""
    return [(row["step"], row.get("train/loss"), row.get("valid/loss")) for row in read_metrics(run_dir)]


def assert_same_end(one: Path, other: Path) -> None:
    """Both runs end in the same step, with the same tensors and the same rows of metrics."""
    (a, _), (b, _) = newest_valid(one), newest_valid(other)
    assert a is not None
    assert b is not None
    assert a.name == b.name
    names = sorted(path.name for path in a.glob("*.safetensors"))
    assert names == sorted(path.name for path in b.glob("*.safetensors"))
    for name in names:
        ours, theirs = load_file(a / name), load_file(b / name)
        assert [key for key in ours.keys() | theirs.keys() if not torch.equal(ours[key], theirs[key])] == []
    progressions = [json.loads((path / "trainer.json").read_text())["progression"] for path in (a, b)]
    assert progressions[0] == progressions[1]
    assert rows_of(one) == rows_of(other)


@pytest.fixture(autouse=True)
def _any_precision() -> Iterator[None]:
    """Accelerate fixes the precision of a process with its first Accelerator."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_schedule_and_precision_resumes_bit_for_bit(
    tiny_flags: list[str], tmp_path: Path, stop_at: Callable[[int | None], None], schedule: str, precision: str
) -> None:
    """Stopped between rows of metrics and between evaluations, at the end of an epoch (step 20) and before its own."""
    flags = [
        "--mixed_precision", precision, "--lr_schedule", schedule, "--warmup_steps", "4", "--max_steps", "24",
        "--log_every", "5", "--evaluate_every", "9", "--save_every", "4", "--max_grad_norm", "1", "--batch_size", "16",
        "--seq_len", "96", "--model.dropout", "0.2", "--ema_decay", "0.9", "--weight_decay", "0.01",
    ]  # fmt: skip
    train_main(flags_for(tiny_flags, tmp_path / "whole", *flags))
    for step in (7, 18, 20, 23):
        stop_at(step)
        with pytest.raises(SystemExit) as stopped:
            train_main(flags_for(tiny_flags, tmp_path / "parts", *flags))
        assert stopped.value.code == 128 + signal.SIGTERM
        assert steps_of(tmp_path / "parts")[0] == step
    stop_at(None)
    train_main(flags_for(tiny_flags, tmp_path / "parts", *flags))
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_a_training_with_labels_resumes_bit_for_bit_and_not_with_others(
    labelled_flags: list[str], tmp_path: Path, stop_at: Callable[[int | None], None], capsys: Capture
) -> None:
    flags = ["--max_steps", "12", "--save_every", "4", "--model.dropout", "0.2", "--ema_decay", "0.9"]
    train_main(flags_for(labelled_flags, tmp_path / "whole", *flags))
    stop_at(7)
    with pytest.raises(SystemExit):
        train_main(flags_for(labelled_flags, tmp_path / "parts", *flags))
    stop_at(None)
    capsys.readouterr()
    with pytest.raises(SystemExit) as refused:
        train_main(flags_for(labelled_flags, tmp_path / "parts", *flags, "--data.label_column", "null"))
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert "`data.label_column` is None, `" in said
    assert "resume_override" not in said
    rows = Path(labelled_flags[3]).read_text().replace('"label": "bad"', '"label": "new"')
    (tmp_path / "others.jsonl").write_text(rows)
    others = ["--data.files", str(tmp_path / "others.jsonl"), "--resume_override"]
    with pytest.raises(SystemExit) as refused:
        train_main(flags_for(labelled_flags, tmp_path / "parts", *flags, *others))
    assert refused.value.code == 2
    assert "has 2 labels and this training 2, and only one of them has `bad`, `new`: " in capsys.readouterr().err
    train_main(flags_for(labelled_flags, tmp_path / "parts", *flags))
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    model, _ = load_model(tmp_path / "parts")
    assert model.labels == ("bad", "good")
    plain = load_file(newest_valid(tmp_path / "parts")[0] / "optimizer.safetensors")  # type: ignore[operator]
    assert plain["exp_avg.label_embedding.weight"].abs().sum(1).gt(0).all()


def test_an_evaluation_that_was_logged_and_not_saved_is_logged_once(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: Callable[[int | None], None]
) -> None:
    """Asked to stop at the step of an evaluation; the next start is killed between its row and its checkpoint."""
    flags = ["--max_steps", "5", "--evaluate_every", "2"]
    train_main(flags_for(tiny_flags, tmp_path / "whole", *flags))
    stop_at(2)
    with pytest.raises(SystemExit):
        train_main(flags_for(tiny_flags, tmp_path / "parts", *flags))
    stop_at(None)
    with monkeypatch.context() as killed:
        killed.setattr(training, "save", lambda _: 1 / 0)
        with pytest.raises(SystemExit):
            train_main(flags_for(tiny_flags, tmp_path / "parts", *flags))
    assert [row["step"] for row in read_metrics(tmp_path / "parts") if "valid/loss" in row] == [2]
    train_main(flags_for(tiny_flags, tmp_path / "parts", *flags))
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_no_result_depends_on_a_generator_once_training_has_begun(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why a checkpoint holds no generator states: dropout, order and samples are hashes of their coordinates."""
    flags = ["--model.dropout", "0.3", "--evaluate_every", "2", "--log_every", "1"]
    train_main(flags_for(tiny_flags, tmp_path / "one", *flags))
    original = training.train_step

    def step(*args: Any, **options: Any) -> torch.Tensor:
        torch.manual_seed(random.SystemRandom().getrandbits(60))
        random.seed()
        np.random.seed()
        return original(*args, **options)

    monkeypatch.setattr(training, "train_step", step)
    train_main(flags_for(tiny_flags, tmp_path / "other", *flags))
    assert_same_end(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "samples.md").read_text() == (tmp_path / "other" / "samples.md").read_text()


# --- which checkpoint ------------------------------------------------------------------------------------------------

SAVES = ("--evaluate_every", "2")


@pytest.fixture
def saved_run(tiny_flags: list[str], tmp_path: Path) -> Path:
    """Return a run of 6 steps with checkpoints of 2, 4 and 6."""
    train_main(flags_for(tiny_flags, tmp_path / "run", "--max_steps", "6", *SAVES, "--keep_last", "3"))
    return tmp_path / "run"


def damage(checkpoint: Path) -> None:
    """Flip one bit of the optimizer's state."""
    path = checkpoint / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tiny_flags: list[str], saved_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(saved_run, tmp_path / "whole")
    for step in (4, 6):
        damage(saved_run / "checkpoints" / f"step-{step:06d}")
    flags = [*SAVES, "--keep_last", "3"]
    for run_dir in (saved_run, tmp_path / "whole"):
        train_main(flags_for(tiny_flags, run_dir, *flags, "--max_steps", "8"))
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "step-000006/optimizer.safetensors` is damaged" in line
    assert "step-000004/optimizer.safetensors` is damaged" in line
    assert "step-000002" in line
    assert_same_end(saved_run, tmp_path / "whole")
    assert steps_of(saved_run) == [8, 6, 4], "the damaged ones must not count among those to keep"


def test_a_run_without_a_valid_checkpoint_is_not_begun_anew(
    tiny_flags: list[str], saved_run: Path, capsys: Capture
) -> None:
    for _, path in checkpoints(saved_run):
        damage(path)
    with pytest.raises(SystemExit) as refused:
        train_main(flags_for(tiny_flags, saved_run, "--max_steps", "8"))
    assert refused.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: no checkpoint of `{saved_run}` is valid: ")
    assert steps_of(saved_run) == [6, 4, 2]


def test_sampling_takes_the_newest_valid_checkpoint(saved_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    four = load_file(saved_run / "checkpoints" / "step-000004" / "model.safetensors")
    path = saved_run / "checkpoints" / "step-000006" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    model, _ = load_model(saved_run)
    assert all(torch.equal(value, four[name]) for name, value in model.state_tensors().items())
    assert "INVALID CHECKPOINT" in caplog.text


def test_the_best_checkpoint_is_found_by_validation(tiny_flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    """A rate that grows to 0.75 helps at first and then does harm: the best step is neither the first nor the last."""
    flags = ["--learning_rate", "25", "--warmup_steps", "1000", "--max_steps", "30", "--evaluate_every", "3"]
    flags += ["--keep_last", "1"]
    train_main(flags_for(tiny_flags, tmp_path / "run", *flags))
    valid = {row["step"]: row["valid/loss"] for row in read_metrics(tmp_path / "run") if "valid/loss" in row}
    best = min(valid, key=lambda step: valid[step])
    assert 3 < best < 30
    assert steps_of(tmp_path / "run") == [30, best]
    model, _ = load_model(tmp_path / "run", best=True)
    wanted = load_file(tmp_path / "run" / "checkpoints" / f"step-{best:06d}" / "model.safetensors")
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_tensors().items())
    capsys.readouterr()
    texts = []
    for place in ([str(tmp_path / "run"), "--best"], [str(tmp_path / "run" / "checkpoints" / f"step-{best:06d}")]):
        main(["sample", *place, "--prompt", "I ", "--max_new_tokens", "20"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_what_may_differ_is_noted(tiny_flags: list[str], saved_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    train_main(flags_for(tiny_flags, saved_run, "--max_steps", "7", *SAVES, "--keep_last", "1"))
    notes = [record.getMessage() for record in caplog.records if "was made with" in record.getMessage()]
    assert [note.split("`")[1] for note in notes] == ["max_steps", "keep_last"]
    assert any(note.startswith("`keep_last` is 1, ") and note.endswith("was made with 3") for note in notes)


def test_files_of_a_checkpoint_follow_the_umask(tiny_flags: list[str], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        train_main(flags_for(tiny_flags, tmp_path / "run", "--max_steps", "1"))
    finally:
        os.umask(before)
    (_, path), *_ = checkpoints(tmp_path / "run")
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


def test_verify_tells_what_a_checkpoint_holds_and_what_is_wrong(saved_run: Path, capsys: Capture) -> None:
    capsys.readouterr()
    main(["verify", str(saved_run / "checkpoints" / "step-000004")])
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if " " in line.strip())
    assert told["valid"] == "True"
    assert told["step"] == "4"
    assert int(told["bytes"]) < sum(p.stat().st_size for p in (saved_run / "checkpoints" / "step-000004").iterdir())
    damage(saved_run / "checkpoints" / "step-000006")
    with pytest.raises(SystemExit) as refused:
        main(["verify", str(saved_run), "--json"])
    assert refused.value.code == 2
    captured = capsys.readouterr()
    contents = [json.loads(line) for line in captured.out.splitlines()]
    assert [(c["checkpoint"][-1], c["valid"]) for c in contents] == [("6", False), ("4", True), ("2", True)]
    assert "optimizer.safetensors` is damaged" in contents[0]["problem"]
    assert captured.err == f"error: 1 invalid checkpoint in `{saved_run}`\n"


def test_a_branch_goes_on_from_its_own_checkpoints(
    tiny_flags: list[str], saved_run: Path, tmp_path: Path, stop_at: Callable[[int | None], None]
) -> None:
    """The same command again: `--resume` names where the branch began, not where it stands."""
    flags = [*SAVES, "--max_steps", "9", "--log_every", "1"]
    branch = ["--resume", str(saved_run / "checkpoints" / "step-000004"), *flags]
    stop_at(7)
    with pytest.raises(SystemExit):
        train_main(flags_for(tiny_flags, tmp_path / "branch", *branch))
    assert steps_of(tmp_path / "branch")[0] == 7
    stop_at(None)
    train_main(flags_for(tiny_flags, tmp_path / "branch", *branch))
    assert [step for step, *_ in rows_of(tmp_path / "branch")] == [5, 6, 6, 7, 8, 8, 9, 9]
    train_main(flags_for(tiny_flags, saved_run, *flags))
    ours, theirs = (load_file(checkpoints(run)[0][1] / "model.safetensors") for run in (tmp_path / "branch", saved_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    model, _ = load_model(tmp_path / "branch", best=True)
    assert model.num_parameters > 0, "its best checkpoint is one of its own"


def test_a_checkpoint_that_cannot_be_read_now_is_not_put_away(
    tiny_flags: list[str], saved_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def stale(*_: Any) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as away:
        away.setattr("hashlib.file_digest", stale)
        with pytest.raises(SystemExit) as refused:
            train_main(flags_for(tiny_flags, saved_run, "--max_steps", "8"))
    assert refused.value.code == 2
    assert "cannot be read: Stale file handle" in capsys.readouterr().err
    assert steps_of(saved_run) == [6, 4, 2]
    train_main(flags_for(tiny_flags, saved_run, "--max_steps", "8"))


def test_a_file_that_will_not_be_deleted_ends_nothing(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that another process reads over NFS."""

    def busy(path: Path, *, ignore_errors: bool = False, **_: Any) -> None:
        if not ignore_errors:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    train_main(flags_for(tiny_flags, tmp_path / "run", "--evaluate_every", "1", "--keep_last", "1", "--max_steps", "4"))
    assert steps_of(tmp_path / "run")[0] == 4
    assert len(steps_of(tmp_path / "run")) <= 2
