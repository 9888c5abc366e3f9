"""Training through the command line's own entry, on a small corpus."""

from __future__ import annotations

import errno
import json
import math
import re
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from tests.forking import run_script, server
from textgen.cli import train_main
from textgen.commands.parsing import parse_train_config
from textgen.config import TrainConfig
from textgen.errors import TextgenError
from textgen.runs.metrics_file import read_metrics
from textgen.tracking.tracker import RunEnd, Tracker
from textgen.training import loop
from textgen.training.optim import learning_rate_at

ROOT = Path(__file__).parents[2]


def newest(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").iterdir())


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint by file and name."""
    return {
        f"{path.name} {name}": value
        for path in checkpoint.glob("*.safetensors")
        for name, value in load_file(path).items()
    }


def assert_same_bits(one: Path, other: Path) -> None:
    a, b = tensors_of(newest(one)), tensors_of(newest(other))
    assert a.keys() == b.keys()
    assert {"model.safetensors", "optimizer.safetensors", "lanes.safetensors"} <= {name.split()[0] for name in a}
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def steps_and_losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in read_metrics(run_dir) if "train/loss" in row]


def flags_for(tiny_flags: list[str], run_dir: Path, *more: str) -> list[str]:
    """Return the flags of a tiny run; later flags win."""
    return [*tiny_flags, "--run_dir", str(run_dir), "--log_every", "1", *more]


RESUMABLE = [
    "--evaluate_every", "3", "--model.dropout", "0.2", "--model.layer_norm", "--ema_decay", "0.9",
    "--max_grad_norm", "1",
]  # fmt: skip


def test_resume_equals_uninterrupted_run(tiny_flags: list[str], tmp_path: Path) -> None:
    """Weights, Adam's moments, averages, lane states and metrics: the same bits, across an epoch's end."""
    flags = [*RESUMABLE, "--seq_len", "64", "--batch_size", "16"]
    train_main(flags_for(tiny_flags, tmp_path / "whole", *flags, "--max_steps", "40"))
    for stop in ("5", "23", "40"):
        train_main(flags_for(tiny_flags, tmp_path / "parts", *flags, "--max_steps", stop))
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    assert steps_and_losses(tmp_path / "whole") == steps_and_losses(tmp_path / "parts")
    epochs = json.loads((newest(tmp_path / "whole") / "trainer.json").read_text())["progression"]["epoch_tokens"]
    assert epochs != 40 * 64 * 16, "the run should cross an epoch's end"


def test_killed_run_resumes_bit_for_bit(tiny_flags: list[str], tmp_path: Path) -> None:
    """SIGKILL of a real process somewhere after its first checkpoint."""
    flags = [*RESUMABLE, "--max_steps", "120"]
    said = tmp_path / "said"
    process = server().start(
        ["train_distributed.py", *flags_for(tiny_flags, tmp_path / "killed", *flags)], output=said, error=said
    )
    deadline = time.monotonic() + 120
    while len(read_metrics(tmp_path / "killed")) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it should have been running when it was killed"
    for name in ("killed", "whole"):
        run_script("train_distributed.py", *flags_for(tiny_flags, tmp_path / name, *flags))
    assert_same_bits(tmp_path / "killed", tmp_path / "whole")
    assert steps_and_losses(tmp_path / "killed") == steps_and_losses(tmp_path / "whole")


def test_finished_run_says_so(tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = flags_for(tiny_flags, tmp_path / "run", "--max_steps", "2")
    train_main(flags)

    def times() -> dict[Path, int]:
        paths = [path for path in (tmp_path / "run").rglob("*") if path.name not in (".lock", "status.json")]
        return {path: path.stat().st_mtime_ns for path in paths}

    before = times()
    capsys.readouterr()
    train_main(flags)
    assert "has finished at step 2: nothing to do" in capsys.readouterr().out
    assert before == times()


@pytest.mark.parametrize(
    ("flag", "then", "now"),
    [
        ("learning_rate", "0.001", "0.002"),
        ("seed", "42", "7"),
        ("model.dropout", "0.0", "0.1"),
        ("batch_size", "8", "16"),
    ],
)
def test_resume_refuses_a_setting_that_changes_the_result(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, then: str, now: str
) -> None:
    run_dir = tmp_path / "run"
    train_main(flags_for(tiny_flags, run_dir, "--max_steps", "2"))
    with pytest.raises(SystemExit) as stop:
        train_main(flags_for(tiny_flags, run_dir, "--max_steps", "4", f"--{flag}", now))
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert flag.split(".")[-1] in errors[0]
    assert then in errors[0]
    assert now in errors[0]
    assert steps_and_losses(run_dir)[-1][0] == 2


def test_resume_takes_what_changes_no_result(tiny_flags: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train_main(flags_for(tiny_flags, run_dir, "--max_steps", "2"))
    train_main(flags_for(tiny_flags, run_dir, "--max_steps", "4", "--gradient_accumulation_steps", "2"))
    assert [step for step, _ in steps_and_losses(run_dir)] == [1, 2, 3, 4]


@pytest.mark.parametrize("evaluate_every", ["1", "100"])
def test_training_that_turns_to_nan_stops_before_it_is_saved(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluate_every: str
) -> None:
    """Whether a step's loss shows it first, or the weights right before a checkpoint."""
    run_dir = tmp_path / "run"
    train_main(flags_for(tiny_flags, run_dir, "--max_steps", "2", "--evaluate_every", "1"))
    good = tensors_of(newest(run_dir))
    with pytest.raises(SystemExit) as stop:
        train_main(
            flags_for(tiny_flags, run_dir, "--max_steps", "9", "--evaluate_every", evaluate_every, "--log_every", "4",
                      "--learning_rate", "1e38", "--resume_override")
        )  # fmt: skip
    assert stop.value.code == 2
    assert "turned to" in capsys.readouterr().err
    after = tensors_of(newest(run_dir))
    assert all(torch.isfinite(value.float()).all() for value in after.values())
    assert all(math.isfinite(loss) for _, loss in steps_and_losses(run_dir))
    assert good.keys() == after.keys()


def test_timed_warm_up_leaves_no_trace(tiny_flags: list[str], tmp_path: Path) -> None:
    """`max_minutes` fixes the number of steps once; the steps themselves are those of any other run."""
    timed, counted = tmp_path / "timed", tmp_path / "counted"
    train_main(flags_for(tiny_flags, timed, "--max_minutes", "0.01", "--max_steps", "30"))
    rows = steps_and_losses(timed)
    train_main(flags_for(tiny_flags, counted, "--max_steps", str(len(rows))))
    assert rows == steps_and_losses(counted)
    assert_same_bits(timed, counted)


def test_steps_fit_the_minutes(tiny_flags: list[str], tmp_path: Path) -> None:
    """The stored number of steps takes about the minutes asked for, and a resume does not fix it anew."""
    flags = ["--max_minutes", "0.05", "--max_epochs", "100000", "--log_every", "10", "--max_steps", "null"]
    train_main(flags_for(tiny_flags, tmp_path / "run", *flags))
    trainer = json.loads((newest(tmp_path / "run") / "trainer.json").read_text())["progression"]
    assert trainer["finished"]
    assert trainer["total_steps"] == trainer["step"] > 5
    rows = [row for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    tokens = rows[0]["tokens"] / rows[0]["step"]
    seconds = sum(10 * tokens / row["train/tokens_per_second"] for row in rows)
    assert 0.5 < seconds < 12, "3 s were asked for; the machine may be busy"


def test_early_stopping_ends_a_run_that_does_not_get_better(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--learning_rate", "1e-12", "--evaluate_every", "1", "--early_stopping_patience", "2", "--max_steps", "50"]
    train_main(flags_for(tiny_flags, tmp_path / "run", *flags))
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["step"] < 50
    assert json.loads((newest(tmp_path / "run") / "trainer.json").read_text())["progression"]["finished"]


def test_learning_something(tiny_flags: list[str], tmp_path: Path) -> None:
    """The loss of a small repetitive corpus falls by much more than noise, on training and validation."""
    flags = ["--learning_rate", "0.02", "--max_steps", "300", "--evaluate_every", "150", "--lr_schedule", "cosine"]
    train_main(flags_for(tiny_flags, tmp_path / "run", *flags))
    losses = [loss for _, loss in steps_and_losses(tmp_path / "run")]
    assert sum(losses[-5:]) / 5 < losses[0] - 1
    valid = [row["valid/bits_per_byte"] for row in read_metrics(tmp_path / "run") if "valid/loss" in row]
    assert valid[1] < valid[0]


def test_run_directory_holds_what_the_design_names(tiny_run: Path) -> None:
    names = {path.name for path in tiny_run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "samples.md", "loss.png", "checkpoints"} <= names
    assert {path.name for path in newest(tiny_run).iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.model", "trainer.json", "optimizer.safetensors",
        "lanes.safetensors", "manifest.json",
    }  # fmt: skip
    keys = {key for row in read_metrics(tiny_run) for key in row}
    assert {
        "step", "tokens", "train/loss", "train/bits_per_byte", "train/learning_rate", "train/tokens_per_second",
        "valid/loss", "valid/bits_per_byte",
    } <= keys  # fmt: skip
    assert (tiny_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    samples = (tiny_run / "samples.md").read_text()
    for temperature in ("0.8", "1.0", "1.2"):
        assert f"temperature {temperature}: **i love this movie because**" in samples


def test_old_checkpoints_are_pruned_and_the_best_stays(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--evaluate_every", "1", "--max_steps", "8", "--keep_last", "2", "--learning_rate", "0.02"]
    train_main(flags_for(tiny_flags, tmp_path / "run", *flags))
    steps = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").iterdir())
    best = json.loads((newest(tmp_path / "run") / "trainer.json").read_text())["progression"]["best_step"]
    assert set(steps) == {7, 8, best}


def test_batches_come_from_the_loader_that_accelerate_prepared(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator
    from accelerate.data_loader import DataLoaderShard

    loaders: list[Any] = []
    original = Accelerator.prepare

    def prepare(self: Accelerator, *things: Any, **options: Any) -> Any:
        prepared = original(self, *things, **options)
        loaders.extend(thing for thing in [prepared] if isinstance(thing, DataLoaderShard))
        return prepared

    served: list[int] = []
    iterate = DataLoaderShard.__iter__

    def count(self: DataLoaderShard) -> Any:
        for batch in iterate(self):
            served.append(len(batch["tokens"]))
            yield batch

    monkeypatch.setattr(Accelerator, "prepare", prepare)
    monkeypatch.setattr(DataLoaderShard, "__iter__", count)
    train_main(flags_for(tiny_flags, tmp_path / "run", "--max_steps", "3", "--gradient_accumulation_steps", "2"))
    assert len(loaders) == 1
    assert len(served) == 6


def test_an_lstm_in_another_dtype_is_refused(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As CUDA's autocast would do it: asked for one dtype, given another."""
    from textgen.model.lstm import LSTMLayer

    original = LSTMLayer.forward

    def half(self: LSTMLayer, *args: Any) -> Any:
        y, state = original(self, *args)
        return y.to(torch.float16), state

    monkeypatch.setattr(LSTMLayer, "forward", half)
    with pytest.raises(SystemExit) as stop:
        train_main(flags_for(tiny_flags, tmp_path / "run", "--max_steps", "3"))
    assert stop.value.code == 2
    assert "the LSTM computes in torch.float16, wanted torch.float32" in capsys.readouterr().err


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    config = TrainConfig(learning_rate=1.0, lr_schedule="linear", warmup_steps=9)
    assert [round(learning_rate_at(step, 100, config), 3) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    for schedule in ("linear", "cosine"):
        decayed = TrainConfig(learning_rate=1.0, lr_schedule=schedule, warmup_steps=9)  # type: ignore[arg-type]
        rates = [learning_rate_at(step, 100, decayed) for step in range(9, 101)]
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] == pytest.approx(0, abs=1e-12)
    constant = TrainConfig(learning_rate=0.5)
    assert {learning_rate_at(step, 100, constant) for step in range(100)} == {0.5}


def test_averaged_weights_are_what_is_saved_and_scored(tiny_flags: list[str], tmp_path: Path) -> None:
    """After two steps: average = lerp(lerp(w0, w1), w2), with the early steps' shorter memory."""
    for steps in (1, 2):
        train_main(flags_for(tiny_flags, tmp_path / f"{steps}", "--max_steps", str(steps), "--ema_decay", "0.9"))
    after_1, after_2 = tensors_of(newest(tmp_path / "1")), tensors_of(newest(tmp_path / "2"))
    name = "embedding.weight"
    wanted = torch.lerp(after_1[f"model.safetensors {name}"], after_2[f"weights.safetensors {name}"], 1 - 2 / 11)
    torch.testing.assert_close(after_2[f"model.safetensors {name}"], wanted)
    assert not torch.equal(after_2[f"model.safetensors {name}"], after_2[f"weights.safetensors {name}"])


def test_config_of_a_run_is_the_config(tiny_run: Path) -> None:
    config = parse_train_config(["--config", str(tiny_run / "config.yaml")])
    assert config.run_dir == str(tiny_run)


def test_first_line_says_where_and_what_is_trained(
    tiny_flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "some.yaml").write_text("seq_len: 4\n")
    with caplog.at_level("INFO", logger="textgen"):
        train_main(flags_for(tiny_flags, tmp_path / "run", "--config", str(tmp_path / "some.yaml"), "--max_steps", "1"))
    assert re.fullmatch(
        r"1 process on 1 machine, cpu \(\d+ threads?\), LSTM in float32, up to (\d+,\d+) parameters, "
        rf"8 x 16 tokens per step, config {tmp_path}/some.yaml",
        caplog.messages[0],
    )


def refusal(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one error line of a training that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train_main(flags)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_an_older_checkpoint_is_not_resumed_beside_newer_ones(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else pruning would delete what is saved next, and the next resume take the abandoned branch."""
    run_dir = tmp_path / "run"
    train_main(flags_for(tiny_flags, run_dir, "--evaluate_every", "2"))
    older = run_dir / "checkpoints" / "step-000002"
    assert "newer than" in refusal(flags_for(tiny_flags, run_dir, "--resume", str(older)), capsys)
    train_main(flags_for(tiny_flags, tmp_path / "branch", "--resume", str(older)))
    assert_same_bits(run_dir, tmp_path / "branch")


def test_other_minutes_are_refused_where_the_schedule_depends_on_them(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    train_main(flags_for(tiny_flags, run_dir, "--lr_schedule", "linear", "--max_minutes", "0.01"))
    other = flags_for(tiny_flags, run_dir, "--lr_schedule", "linear", "--max_minutes", "0.02")
    assert "`max_minutes` is 0.02" in refusal(other, capsys)


def test_a_finished_run_goes_on_to_more_steps_within_the_same_minutes(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = flags_for(tiny_flags, tmp_path / "run", "--max_minutes", "60")
    train_main([*flags, "--max_steps", "3"])
    train_main([*flags, "--max_steps", "5", "--resume_override"])
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["total_steps"]) == ("finished", 5, 5)


def test_other_limits_never_end_a_run_before_the_steps_that_its_minutes_promised(
    tiny_flags: list[str],
    tmp_path: Path,
    stop_at: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a machine that seems slower at every resume."""

    def resume(*flags: str, fitting: int | None, stop: int | None) -> tuple[str, int, int]:
        def fit(*_: object) -> int:
            assert fitting is not None, "the minutes have decided already"
            return fitting

        monkeypatch.setattr(loop, "fit_steps", fit)
        stop_at(stop)
        with nullcontext() if stop is None else pytest.raises(SystemExit):
            train_main(flags_for(tiny_flags, tmp_path / "run", "--lr_schedule", "constant", *flags))
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        return status["state"], status["step"], status["total_steps"]

    hour = ["--max_minutes", "60"]
    assert resume(*hour, "--max_steps", "6", fitting=9, stop=4) == ("preempted", 4, 6)
    assert resume(*hour, "--max_steps", "20", fitting=3, stop=5) == ("preempted", 5, 6)  # 6 fitted before
    assert resume(*hour, "--max_steps", "30", fitting=None, stop=None) == ("finished", 6, 6)
    assert resume("--max_minutes", "90", "--max_steps", "30", fitting=8, stop=7) == ("preempted", 7, 8)
    assert resume("--max_minutes", "30", "--max_steps", "30", fitting=3, stop=None) == ("finished", 7, 7)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory"),
        MemoryError(),
        RuntimeError("can't allocate memory"),
        PermissionError(errno.EACCES, "Permission denied", "a"),
        OSError(errno.EINVAL, "Invalid argument"),
        RuntimeError("made to fail"),
    ],
)
def test_status_trackers_and_exit_code_agree_about_the_end(
    error: Exception,
    tiny_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ends: list[RunEnd] = []
    monkeypatch.setattr(Tracker, "finish", lambda _, end: ends.append(end))
    monkeypatch.setattr(loop, "validate", Mock(side_effect=error))
    with pytest.raises(SystemExit) as ended:
        train_main(flags_for(tiny_flags, tmp_path / "run"))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (ended.value.code, status["reason"]) == (ends[0].exit_code, ends[0].reason)
    assert (f"error: {status['reason']}\n" in capsys.readouterr().err) == (ended.value.code == 2)
    place = "not enough memory after step 4, in train_and_save > run_steps > evaluate_and_save\n"
    assert (place in caplog.text) == ("not enough memory" in status["reason"])


def test_a_lack_of_memory_of_one_process_ends_the_others(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would wait for it in their next collective call."""
    ended = Mock()
    monkeypatch.setattr("textgen.cli.end_siblings", ended)
    for error, calls in ((TextgenError("wrong"), 0), (MemoryError(), 1)):
        monkeypatch.setattr(loop, "start_processes", Mock(side_effect=error))
        with pytest.raises(SystemExit) as stop:
            train_main(flags_for(tiny_flags, tmp_path / "run"))
        assert (stop.value.code, ended.call_count) == (2, calls)


def test_past_epochs_are_let_go(tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch holds the order of all documents: the last one is freed before the next one is made."""
    import gc
    import weakref

    from textgen.data import lanes

    alive: list[weakref.ref[Any]] = []
    most = 0
    original = lanes.Epoch

    def epoch(*args: Any, **options: Any) -> Any:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        made = original(*args, **options)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(lanes, "Epoch", epoch)
    flags = ["--seq_len", "128", "--batch_size", "16", "--max_epochs", "4", "--max_steps", "null"]
    train_main(flags_for(tiny_flags, tmp_path / "run", *flags))
    assert len(alive) == 4
    assert most == 0
