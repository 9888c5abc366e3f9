"""metrics.jsonl is whole whatever happens to Weights & Biases (law 7)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from textgen.cli import train_main
from textgen.tracking import has_wandb_key, read_metrics

BIN = Path(sys.executable).parent


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No W&B key is to be found."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)


@pytest.mark.usefixtures("no_key")
def test_without_a_key_wandb_records_offline_what_metrics_jsonl_holds(tiny_flags: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train_main([*tiny_flags, "--run_dir", str(run_dir), "--log_every", "1", "--tracking.mode", "auto"])
    (log,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    listing = subprocess.run(
        [BIN / "wandb", "leet", "inspect", "--json", log], capture_output=True, text=True, check=True
    )
    recorded: dict[int, dict[str, float]] = {}
    for line in listing.stdout.splitlines():
        record = json.loads(line)
        if record["type"] == "history":
            row = record["history"]["item"]
            recorded.setdefault(int(row["step"]), {}).update(row)
    rows = read_metrics(run_dir)
    assert {row["step"] for row in rows} == recorded.keys()
    for row in rows:
        for name, value in row.items():
            assert recorded[row["step"]][name] == pytest.approx(value)


@pytest.mark.parametrize("broken", ["init", "log"])
@pytest.mark.usefixtures("no_key")
def test_a_failing_tracker_does_not_end_the_training(
    tiny_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    import wandb

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("wandb-core is dead")

    monkeypatch.setattr(wandb if broken == "init" else wandb.Run, broken, fail)
    run_dir = tmp_path / "run"
    train_main([*tiny_flags, "--run_dir", str(run_dir), "--log_every", "1", "--tracking.mode", "offline"])
    assert [row["step"] for row in read_metrics(run_dir) if "train/loss" in row] == [1, 2, 3, 4]
    said = [record.message for record in caplog.records if "W&B is off" in record.message]
    assert len(said) == 1
    assert "wandb-core is dead" in said[0]


@pytest.mark.usefixtures("no_key")
def test_a_key_is_found_in_environment_and_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_wandb_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert has_wandb_key()
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert has_wandb_key()


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 10}\n{"step": 2, "tok')
    assert read_metrics(tmp_path) == [{"step": 1, "tokens": 10}]
