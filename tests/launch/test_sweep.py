"""A W&B sweep: its real agent, told by a stand-in for the server what to try, trains through `accelerate launch`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tracking.wandb_server import wandb_server
from textgen.commands.dashboard import SAMPLES_TABLE
from textgen.config import TrainConfig
from textgen.runs.metrics_file import read_metrics
from textgen.settings import settings_of

ROOT = Path(__file__).parents[2]
SWEEP: dict[str, Any] = yaml.safe_load((ROOT / "launch" / "sweep.yaml").read_text())
BIN = Path(sys.executable).parent


def test_parameters_of_the_sweep_are_settings() -> None:
    assert set(SWEEP["parameters"]) <= set(settings_of(TrainConfig))


@pytest.mark.slow  # the agent asks every five seconds
def test_the_agent_of_a_sweep_trains_with_what_it_is_told(tiny_flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    chosen = {"learning_rate": 0.0021, "batch_size": 16, "seq_len": 16, "model.hidden_size": 48}
    assert chosen.keys() == SWEEP["parameters"].keys()
    flags = dict(zip(tiny_flags[::2], tiny_flags[1::2], strict=True))
    told = {name.removeprefix("--"): value for name, value in flags.items()} | chosen
    told |= {"max_minutes": "null", "tracking.mode": "offline"}
    training = {"type": "run", "run_id": "abcd1234", "program": SWEEP["program"]}
    sweep = {"id": "1", "name": "sweep1", "config": yaml.safe_dump(SWEEP), "state": "RUNNING", "runs": {"edges": []}}
    with wandb_server() as server:
        server.answers |= {"project": {"sweep": sweep}, "createAgent": {"agent": {"id": "1"}}}
        server.commands = [[training | {"args": {name: {"value": value} for name, value in told.items()}}]]
        done = subprocess.run(
            [BIN / "wandb", "agent", "--count", "1", "somebody/textgen/sweep1"], cwd=tmp_path,
            env={**os.environ, **server.environment(tmp_path), "PATH": f"{BIN}:{os.environ['PATH']}"},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs" / "sweep-sweep1" / "abcd1234"
    settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert (settings["learning_rate"], settings["model"]["hidden_size"]) == (0.0021, 48)
    assert settings["lr_schedule"] == "linear", "of the preset"
    (recorded,) = run_dir.glob("wandb/offline-run-*/run-abcd1234.wandb")
    listing = subprocess.run(
        [BIN / "wandb", "leet", "inspect", "--json", recorded], capture_output=True, text=True, check=True
    )
    records = [json.loads(line) for line in listing.stdout.splitlines()]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    valid = [row for row in read_metrics(run_dir) if "valid/loss" in row][-1]
    goal = SWEEP["metric"]["name"]
    assert [row[goal] for row in history if goal in row][-1] == pytest.approx(valid[goal])
    assert list(recorded.parent.glob(f"files/media/table/{SAMPLES_TABLE}_*")), "the dashboard shows a table of samples"
