"""The files for containers, Kubernetes and SkyPilot: their commands train, told of their place as those systems do."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.forking import Forked, free_port, server
from textgen.cli import COMMANDS
from textgen.runs.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
JOB = list(yaml.safe_load_all((LAUNCH / "kubernetes" / "job.yaml").read_text()))[1]
TRAIN_JOB = yaml.safe_load((LAUNCH / "kubernetes" / "trainjob.yaml").read_text())
SKY = yaml.safe_load((LAUNCH / "sky.yaml").read_text())


def container_of_job() -> dict[str, Any]:
    (container,) = JOB["spec"]["template"]["spec"]["containers"]
    return dict(container)


# In place of textgen: says what it was started with and as which process, and ends at SIGTERM, as a training does.
STUB = """
import json, os, signal, sys, time

def main():
    if sys.argv[1] == "train":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("SIGTERM", flush=True)))
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
    print(json.dumps([sys.argv[1:], [os.environ.get(name) for name in names]]), flush=True)
    while sys.argv[1] == "train":
        time.sleep(0.05)
"""


def pod_of_job(index: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of a pod of job.yaml, on the CPU, with one process and this machine's address."""
    container = container_of_job()
    environment = {}
    for one in container["env"]:
        path = one.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        assert "value" in one or path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        environment[one["name"]] = one.get("value", str(index))
    assert environment["PET_MASTER_ADDR"] == "textgen-0.textgen"  # pod 0 by its name in the headless service
    here = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port), "PET_NPROC_PER_NODE": "1"}
    return [*container["command"], *container["args"]], environment | here


def pod_of_train_job(index: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the same for a pod of trainjob.yaml; Kubeflow's runtime sets the variables."""
    trainer = TRAIN_JOB["spec"]["trainer"]
    environment = {one["name"]: one["value"] for one in trainer["env"]} | {
        "PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(index),
        "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port),
    }  # fmt: skip
    return [*trainer["command"], *trainer["args"]], environment


def machine_of_sky(index: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the same for one of two machines of sky.yaml."""
    environment = {
        "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": str(index), "SKYPILOT_NUM_GPUS_PER_NODE": "1",
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1", "PORT": str(port),
    }  # fmt: skip
    return ["bash", "-c", SKY["run"].replace(".venv/bin/", "")], environment


Process = subprocess.Popen[bytes] | Forked


@contextlib.contextmanager
def started(
    argvs: Sequence[Sequence[str]], owns: Sequence[dict[str, str]], *, cwd: Path, logs: Sequence[Path]
) -> Iterator[list[Process]]:
    """Start commands with `torchrun` and `textgen` of this environment; kill those that still run at the end."""
    processes: list[Process] = []
    for argv, own, log in zip(argvs, owns, logs, strict=True):
        environment = os.environ | own | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(cwd),
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        log.touch()
        if argv[0] == "torchrun":
            run = ["-m", "torch.distributed.run", *argv[1:]]
            processes.append(server().start(run, output=log, error=log, env=environment, cwd=cwd))
            continue
        with log.open("a") as file:
            processes.append(subprocess.Popen(argv, cwd=cwd, env=environment, stdout=file, stderr=file))
    try:
        yield processes
    finally:
        for one in processes:
            one.kill()
            one.wait()


def wait_for(condition: Callable[[], object], processes: Sequence[Process], logs: Sequence[Path]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, [log.read_text() for log in logs]
        assert {one.poll() for one in processes} == {None}, [log.read_text() for log in logs]
        time.sleep(0.05)


def end(processes: Sequence[Process]) -> None:
    """Send SIGTERM to the first process of each machine, as a preemption does, and wait for their ends."""
    for one in processes:
        one.send_signal(signal.SIGTERM)
    for one in processes:
        one.wait(timeout=110)  # of 120 s of grace


@pytest.mark.parametrize("place", [pod_of_job, pod_of_train_job, machine_of_sky])
def test_two_machines_start_the_command_as_one_training_and_pass_on_sigterm(
    place: Callable[[int, int], tuple[list[str], dict[str, str]]], tmp_path: Path
) -> None:
    """With another `textgen`, which starts in no time; the commands are those of the files."""
    package, port = tmp_path / "textgen", free_port()
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(STUB)
    (package / "__main__.py").write_text("from textgen.cli import main\nmain()\n")
    logs = [tmp_path / f"{index}.log" for index in range(2)]
    argvs, owns = zip(*(place(index, port) for index in range(2)), strict=True)
    with started(argvs, owns, cwd=tmp_path, logs=logs) as processes:
        wait_for(lambda: all('["train"' in log.read_text() for log in logs), processes, logs)
        end(processes)
    flags = ["--config", "large", "--run_dir", "/runs/large"]
    for index, log in enumerate(logs):
        said = [line for line in log.read_text().splitlines() if line[0] in "[S"]
        assert said[-1] == "SIGTERM"
        world = [str(index), "2", "0", "127.0.0.1", str(port)]
        assert json.loads(said[-2]) == [["train", *flags, "--save_every", "500"], world]
        doctors = [[["doctor", *flags], [None] * 5]] if place is machine_of_sky else []
        assert list(map(json.loads, said[:-2])) == doctors


def test_two_pods_train_as_one_and_save_at_the_end_of_their_time(tiny_flags: list[str], tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    flags = [*tiny_flags, "--run_dir", str(run), "--max_steps", "100000", "--log_every", "1", "--sample_prompts=[]"]
    flags += ["--max_epochs", "1000", "--evaluate_every", "100000"]
    logs = [tmp_path / f"{index}.log" for index in range(2)]
    argvs, owns = zip(*(pod_of_job(index, port) for index in range(2)), strict=True)
    assert {tuple(argv[:4]) for argv in argvs} == {("torchrun", "-m", "textgen", "train")}
    with started([[*argv[:4], *flags] for argv in argvs], owns, cwd=ROOT, logs=logs) as processes:
        wait_for(lambda: read_metrics(run), processes, logs)
        assert "2 processes on 1 machine by gloo" in logs[0].read_text()
        end(processes)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("preempted", "SIGTERM"), logs[0].read_text()
    assert len(list(run.glob("checkpoints/step-*/manifest.json"))) == 1


def test_numbers_of_machines_and_gpus_agree() -> None:
    job, pod = JOB["spec"], JOB["spec"]["template"]["spec"]
    values = {one["name"]: one.get("value") for one in container_of_job()["env"]}
    assert job["completions"] == job["parallelism"] == int(values["PET_NNODES"])
    assert container_of_job()["resources"]["limits"] == {"nvidia.com/gpu": values["PET_NPROC_PER_NODE"]}
    trainer = TRAIN_JOB["spec"]["trainer"]
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": str(trainer["numProcPerNode"])}
    assert int(values["PET_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert pod["initContainers"][0]["args"][0] in COMMANDS  # textgen is the image's entry point


def test_steps_of_the_container_copy_files_that_exist() -> None:
    """And all that the build may read: .dockerignore lets nothing else in."""
    dockerfile = (LAUNCH / "container" / "Dockerfile").read_text()
    allowed = (LAUNCH / "container" / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE) for name in line.split()]
    assert sorted(copied) == sorted(line[1:] for line in allowed if line.startswith("!"))
    assert all((ROOT / name).exists() for name in copied)
    assert "\nUSER 1000:1000\n" in dockerfile
    assert '\nENTRYPOINT ["textgen"]\n' in dockerfile
