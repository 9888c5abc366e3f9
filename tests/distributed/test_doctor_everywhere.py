"""`textgen doctor` on several processes: one report of all of them, and figures that were measured between them.

Launched, this file is the program whose processes examine each other while one of them is made to differ.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.forking import free_port, run_script, server
from textgen.commands.doctor import doctor_command
from textgen.commands.parsing import parse_train_config
from textgen.diagnosis import checks as all_checks
from textgen.diagnosis import inputs, machine, network, storage
from textgen.diagnosis.process_group import ProcessGroup
from textgen.diagnosis.results import Check
from textgen.runs import lock

ROOT = Path(__file__).parents[2]
CPUS = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
    "--main_process_port", "0",
]  # fmt: skip
SKEW = 5.0
Report = dict[str, Any]


# --- the program -----------------------------------------------------------------------------------------------------


def examine_each_other(place: Path) -> None:
    """Print, from the main process, what the processes found of each other, one thing wrong at a time."""
    group = ProcessGroup.join(parse_train_config(["--mixed_precision", "no"]))
    rank = group.rank
    own = place / f"process-{rank}"
    own.mkdir()
    found = {"gathered": group.gather({"rank": rank, "text": "ä" * (1 + 9 * rank)})}

    def differs(tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor)
        tensor[-1:] += rank

    def no_lock(*_: object) -> None: ...

    checks = {
        "sums": network.check_all_reduce(group),
        "wrong_sums": network.check_all_reduce(group, differs),
        "clocks": network.check_clocks(group),
        "wrong_clocks": network.check_clocks(group, lambda: time.time() - SKEW * rank),
        "disk": storage.check_disk(group, place / "runs" / "one"),
        "other_disks": storage.check_disk(group, own),
        "versions": machine.check_versions(group),
        "data": inputs.check_data(group, Check("data", "ok", {}), SimpleNamespace(training_key="one")),  # type: ignore[arg-type]
        "other_data": inputs.check_data(
            group, Check("data", "ok", {}), SimpleNamespace(training_key=str(rank))  # type: ignore[arg-type]
        ),
        "processors": machine.check_processors(group),
    }  # fmt: skip
    if rank == 1:
        lock.fcntl = SimpleNamespace(LOCK_EX=2, LOCK_NB=4, flock=no_lock)  # type: ignore[assignment]
        machine.importlib.metadata.version = lambda name: f"9.{name}"
    checks |= {"local_locks": storage.check_disk(group, place), "other_versions": machine.check_versions(group)}
    found |= {name: group.gather(asdict(check)) for name, check in checks.items()}
    if group.is_main:
        (place / "found.json").write_text(json.dumps(found))
    os._exit(0)  # without tearing its process group down, as `cli.run` does


def die_in_the_all_reduce(flags: list[str]) -> None:
    """Be a process of a doctor that dies without a word."""
    all_checks.check_all_reduce = lambda _: os._exit(9)
    doctor_command(flags)


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Report]]:
    """Return what two processes found of each other, by process."""
    place = tmp_path_factory.mktemp("place")
    ended = server().run([__file__, "each_other", str(place)], processes=2)
    assert [one.returncode for one in ended] == [0, 0], ended
    report: dict[str, list[Report]] = json.loads((place / "found.json").read_text())
    (place / "found.json").unlink()
    assert sorted(path.name for path in place.iterdir()) == ["process-0", "process-1"]
    assert [path for own in place.iterdir() for path in own.iterdir()] == []
    assert report["gathered"] == [{"rank": 0, "text": "ä"}, {"rank": 1, "text": "ä" * 10}]
    return report


def test_all_reduce_is_measured_as_nccl_tests_do(found: dict[str, list[Report]]) -> None:
    for check in found["sums"]:
        value = check["value"]
        assert check["status"] == "ok"
        assert value["latency_us"] > 1
        assert value["bus_gb_per_s"] == pytest.approx(value["algorithm_gb_per_s"])  # 2 (n - 1) / n of 2 processes is 1
        milliseconds = value["mib"] * 1.048576 / value["algorithm_gb_per_s"]
        assert value["latency_us"] / 1e3 < milliseconds < 10_000, "8 MiB take longer than a number"


def test_wrong_sum_on_one_process_fails_there(found: dict[str, list[Report]]) -> None:
    assert [check["status"] for check in found["wrong_sums"]] == ["ok", "fail"]
    assert found["wrong_sums"][1]["value"]["wrong_sums"] == 1


def test_clocks_are_compared_within_the_uncertainty_that_is_told(found: dict[str, list[Report]]) -> None:
    for check in found["clocks"]:
        assert check["status"] == "ok"
        assert check["value"]["apart_ms"] <= check["value"]["uncertainty_ms"] < 1000, "they are one clock"
    for check in found["wrong_clocks"]:
        assert check["status"] == "warn"
        assert abs(check["value"]["apart_ms"] - SKEW * 1e3) <= check["value"]["uncertainty_ms"] < 1000


def test_run_dir_that_processes_do_not_share_fails(found: dict[str, list[Report]]) -> None:
    for one, other in zip(found["disk"], found["other_disks"], strict=True):
        assert (one["status"], one["value"]["seen_by"]) == ("ok", 2)
        assert other["status"] == "fail"
        assert f"process 1 on {socket.gethostname()} does not see the main process's files" in other["advice"]


def test_lock_that_another_process_gets_too_fails(found: dict[str, list[Report]]) -> None:
    for check in found["local_locks"]:
        assert check["status"] == "fail"
        assert "process 1" in check["advice"]
        assert "gets a lock that the main process holds" in check["advice"]


def test_other_versions_on_another_process_fail_by_name(found: dict[str, list[Report]]) -> None:
    for one, other in zip(found["versions"], found["other_versions"], strict=True):
        assert one["status"] == "ok"
        assert other["status"] == "fail"
        assert f"torch ({version('torch')}, 9.torch)" in other["advice"]
        assert "python" not in other["advice"]


def test_other_text_on_another_process_fails(found: dict[str, list[Report]]) -> None:
    assert {check["status"] for check in found["data"]} == {"ok"}
    assert {check["status"] for check in found["other_data"]} == {"fail"}


def test_threads_of_all_processes_of_a_machine_are_counted(found: dict[str, list[Report]]) -> None:
    assert [check["value"]["processes"] for check in found["processors"]] == [2, 2]


def test_two_processes_under_accelerate_launch_report_once(tiny_flags: list[str], tmp_path: Path) -> None:
    command = [*LAUNCH, "-m", "textgen", "doctor", *tiny_flags, "--run_dir", str(tmp_path / "run"), "--json"]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | CPUS, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)  # one value: a second report would not be JSON
    print(f"{time.monotonic() - started:.1f} s")
    assert (report["processes"], report["machines"]) == (2, [socket.gethostname()])
    world = report["checks"][0]
    assert (world["name"], world["value"]["processes"], world["value"]["backend"]) == ("world", 2, "gloo")
    assert list(tmp_path.iterdir()) == []


def as_process(rank: int, port: int) -> dict[str, str]:
    """Return the environment of one of two processes that no launcher ends together."""
    world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return os.environ | CPUS | world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_process_that_dies_fails_the_world_and_is_not_waited_for(tiny_flags: list[str], tmp_path: Path) -> None:
    port, flags = free_port(), [*tiny_flags, "--run_dir", str(tmp_path / "run")]
    nowhere = Path(os.devnull)
    other = server().start([__file__, "die", *flags], output=nowhere, error=nowhere, env=as_process(1, port))
    done = run_script("-m", "textgen", "doctor", *flags, "--json", env=as_process(0, port), expect=1)
    assert other.wait(60) == 9
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert {name for name, check in checks.items() if check["status"] == "fail"} == {"world", "all_reduce"}
    assert "another process has ended, or did not answer" in checks["world"]["advice"]
    assert list(tmp_path.iterdir()) == []


def test_process_that_never_comes_is_waited_for_no_longer_than_is_said(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = [*tiny_flags, "--run_dir", str(tmp_path / "run"), "--json", "--distributed_timeout", "3"]
    done = run_script("-m", "textgen", "doctor", *flags, env=as_process(0, free_port()), expect=1)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert {name for name, check in checks.items() if check["status"] == "fail"} == {"world"}


if __name__ == "__main__":
    if sys.argv[1] == "die":
        die_in_the_all_reduce(sys.argv[2:])
    else:
        examine_each_other(Path(sys.argv[2]))
