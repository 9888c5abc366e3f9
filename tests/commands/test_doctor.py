"""`textgen doctor` on one machine: what it finds is there, what it misses is really missing, and nothing is left."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from textgen.cli import main
from textgen.commands.parsing import parse_train_config
from textgen.data.store import prepare_store
from textgen.diagnosis import inputs, machine, precision, results, storage
from textgen.diagnosis.process_group import ProcessGroup
from textgen.runs import lock

Capture = pytest.CaptureFixture[str]
Examine = Callable[..., tuple[int, dict[str, dict[str, Any]]]]

NAMES = [
    "world", "versions", "gpus", "processors", "precision", "all_reduce", "disk", "space", "data", "wandb", "clocks",
    "limits",
]  # fmt: skip
CPU = torch.device("cpu")


def code_of(argv: list[str]) -> int:
    """Run `textgen` and return its exit code."""
    try:
        main(argv)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def examine(tiny_flags: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """Return a function that runs the doctor as JSON and returns its exit code and the checks by name."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # so that what the doctor sets does not outlive the test

    def call(*flags: str, run_dir: Path = tmp_path / "runs" / "one") -> tuple[int, dict[str, dict[str, Any]]]:
        capsys.readouterr()
        code = code_of(["doctor", *tiny_flags, "--run_dir", str(run_dir), *flags, "--json"])
        out, err = capsys.readouterr()
        assert err == ""
        report = json.loads(out)  # one value: anything beside it would not be JSON
        checks = {check["name"]: check for check in report["checks"]}
        assert list(checks) == NAMES, "all checks are made, whatever failed"
        assert len(report["checks"]) == len(NAMES), "one process has one line for each"
        worst = {check["status"] for check in report["checks"]}
        assert report["status"] == ("fail" if "fail" in worst else "warn" if "warn" in worst else "ok")
        assert code == (1 if "fail" in worst else 0)
        return code, checks

    return call


@pytest.mark.usefixtures("tiny_run")  # which has the store made
def test_machine_that_trains_passes_and_nothing_is_left_on_it(examine: Examine, tmp_path: Path) -> None:
    code, checks = examine()
    assert code == 0, checks
    assert list(tmp_path.iterdir()) == []
    assert checks["world"]["value"]["processes"] == 1
    assert checks["versions"]["value"]["torch"] == torch.__version__
    assert checks["disk"]["value"]["write_mb_per_s"] > 0
    assert set(checks["world"]) == {"name", "status", "value", "advice", "machines"}


@pytest.mark.usefixtures("tiny_run")
def test_table_has_a_line_for_each_check_and_ends_with_a_verdict(
    tiny_flags: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    flags = [*tiny_flags, "--run_dir", str(tmp_path), "--tracking.mode", "online"]
    assert code_of(["doctor", *flags]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")][:-1] == NAMES
    assert lines[-1].startswith("warn: ")
    assert "wandb" in lines[-1]
    assert code_of(["doctor", *flags, "--data.files", str(tmp_path / "no.txt")]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("fail: data; warn: ")


def test_wrong_flag_ends_with_two_and_the_nearest_name(capsys: Capture) -> None:
    assert code_of(["doctor", "--run_dri", "x"]) == 2
    assert capsys.readouterr().err == "error: unknown setting `run_dri`; the nearest is `run_dir`\n"


def test_world_that_is_not_the_promised_one_fails_and_the_rest_is_still_examined(
    examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    code, checks = examine()
    assert code == 1
    assert checks["world"]["status"] == "fail"
    assert "gradient_accumulation_steps 4" in checks["world"]["advice"]
    assert checks["disk"]["status"] == "ok"


# --- GPUs and processors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "status"),
    [
        ({"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(99)))}, "fail"),
        ({"SLURM_GPUS_ON_NODE": "99"}, "fail"),
        ({"SLURM_GPUS_ON_NODE": "99", "ACCELERATE_USE_CPU": "true"}, "ok"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "ok"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "ok"),
    ],
)
def test_gpus_that_are_promised_and_not_seen_fail(environment: dict[str, str], status: str, tmp_path: Path) -> None:
    check = machine.check_gpus(CPU, environment=environment, devices=tmp_path)
    assert check.status == status
    assert ("99 GPUs are promised" in check.advice) == (status == "fail")


def test_gpus_that_the_driver_shows_and_torch_does_not_see_fail(tmp_path: Path) -> None:
    for name in ("nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert machine.check_gpus(CPU, environment={"CUDA_VISIBLE_DEVICES": ""}, devices=tmp_path).status == "ok"
    for number in range(99):
        (tmp_path / f"nvidia{number}").touch()
    assert machine.check_gpus(CPU, environment={}, devices=tmp_path).value["promised"] == 99
    assert machine.check_gpus(CPU, environment={}, devices=tmp_path).status == "fail"
    assert machine.check_gpus(CPU, environment={"CUDA_VISIBLE_DEVICES": ""}, devices=tmp_path).status == "ok"


def test_more_threads_than_cores_are_told_and_how_many_would_fit() -> None:
    cores, before = len(os.sched_getaffinity(0)), torch.get_num_threads()
    torch.set_num_threads(4 * cores)
    try:
        check = machine.check_processors(ProcessGroup(None))
    finally:
        torch.set_num_threads(before)
    assert check.status == "warn"
    assert check.value["threads"] == 4 * cores
    assert check.advice.endswith(f"OMP_NUM_THREADS={check.value['cores']:g}")


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_quota_of_a_container_is_read_from_both_kinds_of_cgroups(
    files: dict[str, str], cores: float, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert machine.cpu_quota(tmp_path) == cores


# --- the disk --------------------------------------------------------------------------------------------------------


def test_disk_that_cannot_be_written_to_fails(examine: Examine, small_disk: Callable[[str], Path]) -> None:
    place = small_disk("64m")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    code, checks = examine(run_dir=place / "run")
    assert code == 1
    assert checks["disk"]["status"] == "fail"
    assert f"`{place}`: Read-only file system" in checks["disk"]["advice"]


@pytest.mark.usefixtures("tiny_run")
def test_full_disk_fails_and_what_was_tried_on_it_is_removed(
    examine: Examine, small_disk: Callable[[str], Path]
) -> None:
    place = small_disk("2m")
    assert examine(run_dir=place / "run")[0] == 0
    (place / "filling").write_bytes(bytes(1900 << 10))
    code, checks = examine(run_dir=place / "run")
    assert code == 1
    assert (checks["disk"]["status"], checks["space"]["status"]) == ("ok", "fail"), "100 KiB are enough for a file"
    with pytest.raises(OSError, match="No space"), (place / "filling").open("ab") as file:
        file.write(bytes(1 << 20))
    _, checks = examine(run_dir=place / "run")
    assert "No space left on device" in checks["disk"]["advice"]
    assert "MB of free space, the run needs" in checks["space"]["advice"]
    assert [path.name for path in place.iterdir()] == ["filling"]


def test_checkpoints_are_as_large_and_as_many_as_is_said(examine: Examine, tiny_run: Path, tmp_path: Path) -> None:
    value = examine()[1]["space"]["value"]
    written = sorted((tiny_run / "checkpoints").iterdir())
    size = sum(file.stat().st_size for file in written[0].iterdir())
    assert size <= value["checkpoint_mb"] * 1e6 <= size + (64 << 10)
    assert value["checkpoints"] == len(written) == 1
    assert examine("--save_every", "1")[1]["space"]["value"]["checkpoints"] == 4, "keep_last, one more and the best"


def test_lock_that_others_get_too_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.check_disk(ProcessGroup(None), tmp_path).status == "ok"
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: None)  # as where locks stay on one machine
    check = storage.check_disk(ProcessGroup(None), tmp_path)
    assert check.status == "fail"
    assert "gets a lock that the main process holds" in check.advice
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("tiny_run")
def test_disk_without_locks_is_a_warning_that_names_the_lease(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert examine()[1]["disk"]["value"]["lock"] == "flock"
    monkeypatch.setattr(lock.fcntl, "flock", Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))
    code, checks = examine()
    assert (code, checks["disk"]["status"], checks["disk"]["value"]["lock"]) == (0, "warn", "lease")
    assert "has no locks (flock fails): a training holds its run by a lease" in checks["disk"]["advice"]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(lock.Lease, "try_acquire", lambda *_: True)  # as where renames do not exclude each other
    code, checks = examine()
    assert (code, checks["disk"]["status"]) == (1, "fail")
    assert "gets a lock that the main process holds" in checks["disk"]["advice"]
    monkeypatch.setattr(lock.fcntl, "flock", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    code, checks = examine()
    assert (code, checks["disk"]["status"]) == (1, "fail")
    assert "/lock` cannot be locked: Input/output error" in checks["disk"]["advice"]


def test_signal_ends_a_doctor_and_nothing_is_left(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def end(probe: Path) -> str:
        seen.extend(path.name for path in probe.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)
        return ""

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(storage, "_look_at_probe", end)
    assert code_of(["doctor", *tiny_flags, "--run_dir", str(tmp_path / "run")]) == 128 + signal.SIGTERM
    assert "lock" in seen
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_doctor_left_is_removed_by_the_next_and_a_running_ones_is_not(tmp_path: Path) -> None:
    old, new = tmp_path / f"{storage.PROBE}old", tmp_path / f"{storage.PROBE}new"
    for path in (old, new):
        path.mkdir()
        (path / "large").touch()
    os.utime(old, (0, time.time() - 2 * storage.STALE_SECONDS))
    storage.check_disk(ProcessGroup(None), tmp_path)
    assert list(tmp_path.iterdir()) == [new]


# --- data, precision, W&B --------------------------------------------------------------------------------------------


def test_store_that_prepare_made_is_found_and_one_of_other_settings_is_not(
    examine: Examine, tiny_flags: list[str], tmp_path: Path
) -> None:
    config = parse_train_config(tiny_flags)
    store = prepare_store(config.data, config.tokenizer)
    value = examine()[1]["data"]["value"]
    assert (value["store"], value["key"]) == (str(store.directory), store.training_key[:8])
    assert value["train_tokens"] == store.record["splits"]["train"]["tokens"]
    for flags in (["--tokenizer.vocab_size", "341"], ["--data.cache_dir", str(tmp_path / "none")]):
        code, checks = examine(*flags)
        assert code == 0
        assert checks["data"]["status"] == "warn"
        assert "`textgen prepare`" in checks["data"]["advice"]
    assert not (tmp_path / "none").exists()


def test_text_or_store_that_is_not_there_fails(examine: Examine, tmp_path: Path) -> None:
    code, checks = examine("--data.files", str(tmp_path / "no.txt"))
    assert code == 1
    assert str(tmp_path / "no.txt") in checks["data"]["advice"]
    code, checks = examine("--data.store", str(tmp_path / "no_store"))
    assert code == 1
    assert "is not a token store" in checks["data"]["advice"]


def test_dataset_that_is_not_cached_is_a_warning_and_no_network_is_asked(tmp_path: Path) -> None:
    """In a process of its own, which takes its word from the environment, and where asking would take 3 s."""
    flags = ["--data.dataset", "nobody/nothing", "--run_dir", str(tmp_path), "--data.cache_dir", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "textgen", "doctor", *flags, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    data = next(check for check in json.loads(done.stdout)["checks"] if check["name"] == "data")
    assert data["status"] == "warn"
    assert data["advice"].startswith("dataset `nobody/nothing` is not in the local cache; run `textgen prepare` on")


def test_precision_is_the_one_that_the_training_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16, fp32 = (parse_train_config(["--mixed_precision", name]) for name in ("bf16", "no"))
    value = precision.check_precision(bf16, CPU).value
    assert (value["training"], value["float32"]) == ("bf16", 1.0)
    monkeypatch.setattr(precision, "_trains_in", lambda dtype, _: dtype != torch.bfloat16)
    check = precision.check_precision(bf16, CPU)
    assert (check.status, check.value["bfloat16"]) == ("fail", "does not train")
    assert precision.check_precision(fp32, CPU).status == "ok"


def test_wandb_key_is_found_and_never_shown(
    tiny_flags: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for key, status in (("", "warn"), ("secret-of-somebody", "ok")):
        monkeypatch.setenv("WANDB_API_KEY", key)
        config = parse_train_config([*tiny_flags, "--tracking.mode", "online"])
        check = inputs.check_wandb(config)
        assert (check.status, check.value["mode"]) == (status, "online")
        assert "secret" not in str(check)
    assert inputs.check_wandb(parse_train_config([*tiny_flags, "--tracking.mode", "auto"])).value["mode"] == "online"
    monkeypatch.setenv("WANDB_API_KEY", "")
    assert inputs.check_wandb(parse_train_config([*tiny_flags, "--tracking.mode", "auto"])).value["mode"] == "offline"


def test_few_open_files_are_told() -> None:
    code = (
        "import torch; from textgen.diagnosis import machine; print(machine.check_limits(torch.device('cpu')).advice)"
    )
    command = ["bash", "-c", f'ulimit -n 256; exec "{sys.executable}" -c "{code}"']
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "`ulimit -n 1024`" in said
    assert machine.check_limits(CPU).value["shm_gb"] >= 0


# --- merging ---------------------------------------------------------------------------------------------------------


def said(machine: str, status: str, **value: object) -> dict[str, Any]:
    return {"machine": machine, "checks": [{"name": "gpus", "status": status, "value": value, "advice": ""}]}


def test_processes_that_found_the_same_share_a_line_with_their_figures() -> None:
    everyone = [said("a", "ok", name="H", free=3.0), said("a", "ok", name="H", free=1.0)]
    everyone += [said("b", "ok", name="H", free=2.0)]
    assert results.merge(everyone) == [
        {
            "name": "gpus",
            "status": "ok",
            "value": {"name": "H", "free": [1.0, 2.0, 3.0]},
            "advice": "",
            "machines": None,
        }
    ]


def test_machine_that_differs_has_a_line_of_its_own() -> None:
    everyone = [
        said("a", "ok", name="H"),
        said("a", "ok", name="H"),
        said("b", "fail", name="H"),
        said("c", "ok", name="V"),
    ]
    everyone += [said("d", "ok", name="V", free=1)]  # a figure that the others do not have
    rows = [(row["status"], row["machines"], row["value"]["name"]) for row in results.merge(everyone)]
    assert rows == [("ok", ["a"], "H"), ("fail", ["b"], "H"), ("ok", ["c"], "V"), ("ok", ["d"], "V")]
    assert "gpus        fail  [b] name H" in results.as_table(results.merge(everyone)).splitlines()
