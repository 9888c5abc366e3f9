"""The scripts of launch/ as scripts, and `launch/local.sh` as a command; those for Slurm run in tests/slurm/."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from textgen.runs.directory import read_status
from textgen.runs.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
LOCAL = ROOT / "launch" / "local.sh"
SCRIPTS = sorted(
    path
    for pattern in ("launch/**/*.sh", "launch/**/*.sbatch", "tests/**/*.sh")
    for path in ROOT.glob(pattern)
    if path.name != "site.sh"
)


def test_there_are_scripts() -> None:
    assert {"local.sh", "train.sbatch", "sweep.sbatch", "evaluate.sbatch", "sample.sbatch", "site.example.sh"} <= {
        path.name for path in SCRIPTS
    }


def test_shellcheck_finds_nothing_in_any_script() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "it comes with the dev extra"
    done = subprocess.run([shellcheck, "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_site_of_somebody_is_in(script: Path) -> None:
    text = script.read_text()
    roots = r"(?<![\w}.])/(?:home|Users|root|work|scratch|data|mnt|opt|srv|gpfs|lustre|nfs)\b/?[\w$.-]*"
    assert [path for path in re.findall(roots, text) if path != "/scratch/$USER"] == []
    assert re.findall(r"(?m)^#SBATCH.*(?:account|partition|qos|mail|constraint).*", text) == []


@pytest.mark.parametrize("within", [False, True], ids=["before a job", "in a job"])
def test_lines_of_the_example_of_a_site_work_once_they_are_no_comments(within: bool, tmp_path: Path) -> None:
    text = (ROOT / "launch" / "slurm" / "site.example.sh").read_text()
    lines, count = re.subn(r"(?m)^# (?=(?:export|module|TEXTGEN_CONTAINER)\b)", "", text)
    assert count > 15
    (tmp_path / "site.sh").write_text(lines)
    script = 'module() { echo "module $*"; }; source "$0"; echo "container ${TEXTGEN_CONTAINER[*]}"; env'
    env = {"PATH": os.environ["PATH"], "USER": "me", "HOME": "/me"} | ({"SLURM_JOB_ID": "1"} if within else {})
    argv = ["bash", "-euc", script, str(tmp_path / "site.sh")]
    said = subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {"SBATCH_PARTITION=gpu", "TEXTGEN_HOME=/me/textgen", "TEXTGEN_PROCESSES_PER_NODE=4"} <= set(said)
    for line in (
        "module load cuda/12.8", "TEXTGEN_PYTHON=python3", "NCCL_SOCKET_IFNAME=^lo,docker",
        "HF_HOME=/scratch/me/huggingface",
        "container apptainer exec --nv --bind /scratch/me /scratch/me/textgen.sif",
    ):  # fmt: skip
        assert (line in said) == within


def test_sweeps_are_asked_of_slurm_as_trainings_are() -> None:
    options = [
        [line for line in (ROOT / "launch" / "slurm" / name).read_text().splitlines() if line.startswith("#SBATCH")]
        for name in ("train.sbatch", "sweep.sbatch")
    ]
    assert options[0][0] == "#SBATCH --job-name=textgen"
    assert options[1] == ["#SBATCH --job-name=sweep", *options[0][1:]]


# --- local.sh --------------------------------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Return a folder for the PATH, with an `accelerate` that prints what it is given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write_program(folder / "accelerate", 'printf "%s\\n" "$@"; env')
    return folder


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def local(
    *flags: str, path: Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run local.sh with a folder before the PATH and nothing said about GPUs, unless `env` does."""
    own = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PROCESSES")
    }
    own["PATH"] = f"{path}:{own['PATH']}"
    return subprocess.run(
        [str(LOCAL), *flags], cwd=cwd, env=own | dict(env or {}), capture_output=True, text=True, timeout=60
    )


def processes(done: subprocess.CompletedProcess[str]) -> int:
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    return int(said[said.index("--num_processes") + 1])


LISTED = (
    "GPU 0: NVIDIA H100 (UUID: GPU-1a2b)\n  MIG 1g.10gb Device 0: (UUID: MIG-3c)\nGPU 1: NVIDIA H100 (UUID: GPU-5e)"
)


@pytest.mark.parametrize(
    ("listed", "env", "expected"),
    [
        (LISTED, {}, 2),
        ("No devices found.", {}, 1),
        (LISTED, {"CUDA_VISIBLE_DEVICES": "3"}, 1),
        (LISTED, {"CUDA_VISIBLE_DEVICES": ""}, 1),
        (LISTED, {"CUDA_VISIBLE_DEVICES": "-1"}, 1),
        (LISTED, {"CUDA_VISIBLE_DEVICES": "0,2,5"}, 3),
        (LISTED, {"CUDA_VISIBLE_DEVICES": "GPU-1a2b-17,GPU-5e,GPU-77"}, 3),
        (LISTED, {"CUDA_VISIBLE_DEVICES": "0,1,-1,2"}, 2),
        (LISTED, {"PROCESSES": "1"}, 1),
        ("No devices found.", {"PROCESSES": "5"}, 5),
    ],
)
def test_local_starts_a_process_for_each_gpu_that_cuda_would_show(
    listed: str, env: dict[str, str], expected: int, programs: Path
) -> None:
    write_program(programs / "nvidia-smi", f'[ "$*" = -L ] && echo "{listed}"')
    assert processes(local(path=programs, env=env)) == expected


def test_local_passes_flags_on_and_works_from_any_folder(programs: Path, tmp_path: Path) -> None:
    done = local("--sample_prompts", "a  b", "$HOME", path=programs, cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""})
    words = done.stdout.splitlines()
    assert words[:3] == ["launch", "--config_file", str(ROOT / "accelerate_config.yaml")]
    at = words.index(str(ROOT / "train_distributed.py"))
    assert words[at + 1 : at + 4] == ["--sample_prompts", "a  b", "$HOME"]
    assert f"PWD={tmp_path}" in words


def test_local_shares_the_processors_out(programs: Path) -> None:
    write_program(programs / "nproc", "echo 12")
    for count, threads in ((1, 12), (5, 2), (13, 1)):
        env = {"CUDA_VISIBLE_DEVICES": "", "PROCESSES": str(count)}
        assert f"OMP_NUM_THREADS={threads}" in local(path=programs, env=env).stdout.splitlines()
        done = local(path=programs, env=env | {"OMP_NUM_THREADS": "3"})
        assert "OMP_NUM_THREADS=3" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("smi", "env", "said"),
    [
        ("exit 9", {}, "`nvidia-smi -L` fails: mend the driver, or set CUDA_VISIBLE_DEVICES="),
        ("exit 0", {"PROCESSES": "two"}, "PROCESSES must be a number of at least 1: two"),
        ("exit 0", {"PROCESSES": "0"}, "PROCESSES must be a number of at least 1: 0"),
    ],
)
def test_local_says_in_a_line_what_is_wrong(smi: str, env: dict[str, str], said: str, programs: Path) -> None:
    write_program(programs / "nvidia-smi", smi)
    done = local(path=programs, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_local_trains_on_one_process_without_gpus(tiny_flags: list[str], tmp_path: Path) -> None:
    env = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.defpath}"}
    done = subprocess.run(
        [str(LOCAL), *tiny_flags, "--run_dir", "run"], cwd=tmp_path, env=os.environ | env, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 process on 1 machine, cpu (1 thread)" in done.stderr
    assert read_status(tmp_path / "run")["state"] == "finished"


@pytest.mark.slow
def test_sigusr1_to_local_saves_on_two_processes(tiny_flags: list[str], tmp_path: Path) -> None:
    env = {"CUDA_VISIBLE_DEVICES": "", "PROCESSES": "2", "PATH": f"{Path(sys.executable).parent}:{os.defpath}"}
    flags = [*tiny_flags, "--max_steps", "100000", "--evaluate_every", "100000", "--run_dir", str(tmp_path / "run")]
    with subprocess.Popen(
        [str(LOCAL), *flags], cwd=tmp_path, env=os.environ | env | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while not read_metrics(tmp_path / "run"):  # the file is there before the processes note signals
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        said = process.communicate(timeout=120)[1]
    assert "2 processes on 1 machine by gloo" in said
    status = read_status(tmp_path / "run")
    assert (status["state"], status["reason"]) == ("preempted", "SIGUSR1"), said
    assert (tmp_path / "run" / "checkpoints" / f"step-{status['step']:06}").is_dir()
