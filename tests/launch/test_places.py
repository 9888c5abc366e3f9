"""The files for containers, Kubernetes and SkyPilot: their commands train, told of their place as those systems do."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.forking import free_port
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


def on_this_machine(argv: list[str], flags: list[str]) -> list[str]:
    """Return the command of a container with the flags of a tiny training in place of its own."""
    assert argv[:4] == ["torchrun", "-m", "textgen", "train"], argv
    return [sys.executable, "-m", "torch.distributed.run", "-m", "textgen", "train", *flags]


def pod_of_job(index: int, port: int, flags: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of a pod of job.yaml, on the CPU, with one process and this machine's address."""
    container = container_of_job()
    environment = {}
    for one in container["env"]:
        path = one.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        assert "value" in one or path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        environment[one["name"]] = one.get("value", str(index))
    assert environment["PET_MASTER_ADDR"] == "textgen-0.textgen"  # pod 0 by its name in the headless service
    here = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port), "PET_NPROC_PER_NODE": "1"}
    return on_this_machine([*container["command"], *container["args"]], flags), environment | here


def pod_of_train_job(index: int, port: int, flags: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the same for a pod of trainjob.yaml; Kubeflow's runtime sets the variables."""
    trainer = TRAIN_JOB["spec"]["trainer"]
    environment = {one["name"]: one["value"] for one in trainer["env"]} | {
        "PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(index),
        "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port),
    }  # fmt: skip
    return on_this_machine([*trainer["command"], *trainer["args"]], flags), environment


def machine_of_sky(index: int, port: int, flags: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the same for one of two machines of sky.yaml, whose script runs as it is but for the flags."""
    script = SKY["run"].replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    words = " ".join(f"'{flag}'" for flag in flags)
    script, count = re.subn(r"--config large --run_dir /runs/large( --save_every 500)?", words, script)
    assert count == 2
    environment = {
        "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": str(index), "SKYPILOT_NUM_GPUS_PER_NODE": "1",
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1", "PORT": str(port),
    }  # fmt: skip
    return ["bash", "-c", script], environment


@pytest.mark.parametrize("place", [pod_of_job, pod_of_train_job, machine_of_sky])
def test_two_machines_train_as_one_and_save_at_the_end_of_their_time(
    place: Any, tiny_flags: list[str], tmp_path: Path
) -> None:
    """SIGTERM to the first process of each, as a preemption sends it, ends the training with a checkpoint."""
    run, port = tmp_path / "run", free_port()
    flags = [*tiny_flags, "--run_dir", str(run), "--max_steps", "100000", "--log_every", "1", "--sample_prompts=[]"]
    flags += ["--max_epochs", "1000", "--evaluate_every", "100000"]
    logs = [tmp_path / f"{index}.log" for index in range(2)]
    started = []
    for index, log in enumerate(logs):
        argv, own = place(index, port, flags)
        environment = os.environ | own | {
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        with log.open("w") as file:
            started.append(subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=file, stderr=file))
    try:
        deadline = time.monotonic() + 300
        while not read_metrics(run):
            assert time.monotonic() < deadline, [log.read_text() for log in logs]
            assert {one.poll() for one in started} == {None}, [log.read_text() for log in logs]
            time.sleep(0.05)
        assert "2 processes on 1 machine by gloo" in logs[0].read_text()
        for one in started:
            one.send_signal(signal.SIGTERM)
        for one in started:
            one.wait(timeout=110)  # of 120 s of grace
    finally:
        for one in started:
            one.kill()
            one.wait()
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
