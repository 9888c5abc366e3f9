"""Every way to launch, without GPUs: it trains the promised world or refuses; none trains another one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.distributed.losses import all_losses
from tests.forking import free_port, run_script

ROOT = Path(__file__).parents[2]
PYTHON = (sys.executable,)
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
PACKAGE = importlib.util.find_spec("accelerate")
assert PACKAGE is not None
assert PACKAGE.origin is not None
LAUNCH_FILE = Path(PACKAGE.origin).parent / "commands" / "launch.py"
STEP_OF_TWO = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NNODES": "2",
    "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "localhost,nowhere.invalid", "SLURM_STEP_NODELIST": "localhost,nowhere.invalid",
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
}  # fmt: skip
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
ALONE = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}"}
CONFIGS = {
    "multi_cpu.yaml": "{distributed_type: MULTI_CPU, num_processes: 2, use_cpu: true, mixed_precision: 'no'}",
    "no.yaml": "{distributed_type: 'NO', num_processes: 2, mixed_precision: 'no'}",
    "bare_no.yaml": "{distributed_type: NO, num_processes: 2, mixed_precision: 'no'}",
    "fsdp.yaml": "{distributed_type: FSDP, num_processes: 2, mixed_precision: 'no', fsdp_config: {fsdp_version: 2}}",
    "deepspeed.yaml": "{distributed_type: DEEPSPEED, num_processes: 2, deepspeed_config: {zero_stage: 2}}",
}


@dataclass(frozen=True, kw_only=True)
class Refused:
    """What ends a launch, by a piece of the message."""

    because: str
    by: str = "textgen"
    """or `the launcher`, with a traceback and whatever exit code"""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the matrix: launchers that are started together, each followed by the script and its flags."""

    launchers: Sequence[Sequence[str]]
    wanted: int | Refused
    """processes of the one training, or why there is none"""
    environment: dict[str, str] = field(default_factory=dict)
    personal: str | None = None
    """what `accelerate config` has left in the home directory"""


def accelerate(*options: str, config: str | None = None) -> tuple[str, ...]:
    return (*ACCELERATE, *(("--config_file", config) if config else ()), *options, "--main_process_port", "{port}")


def shipped(name: str, *options: str) -> tuple[str, ...]:
    return accelerate(*options, config=f"launch/configs/{name}.yaml")


def machine(rank: int) -> tuple[str, ...]:
    nodes = ("--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1")
    return shipped("multi_node", "--num_processes", "2", *nodes)


def torchrun_machine(rank: int) -> tuple[str, ...]:
    nodes = ("--nnodes", "2", "--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", "{port}")
    return (*TORCHRUN, "--nproc_per_node", "1", *nodes)


TWO = ("--num_processes", "2")
FEWER = Refused(because="was asked for 2 processes")
NOT_JOINED = Refused(because="promised 2 processes")
BY_LAUNCHER = "the launcher"

# What everyone does, and what goes wrong most: these run always. The others are slow only for being many.
COMMON = {
    "python": Line(launchers=[PYTHON], wanted=1),
    "accelerate_config.yaml": Line(launchers=[accelerate(config="accelerate_config.yaml")], wanted=1),
    "accelerate_config.yaml, 2": Line(launchers=[accelerate(*TWO, config="accelerate_config.yaml")], wanted=2),
    "cpu_2_processes.yaml": Line(launchers=[shipped("cpu_2_processes")], wanted=2, environment=ON_CPU),
    "multi_node.yaml on two": Line(launchers=[machine(0), machine(1)], wanted=2),
    "torchrun, 2": Line(launchers=[(*TORCHRUN, "--nproc_per_node", "2", "--master_port", "{port}")], wanted=2),
    "--cpu, 2": Line(launchers=[accelerate("--cpu", *TWO)], wanted=FEWER),
    "no config, 2": Line(launchers=[accelerate(*TWO)], wanted=FEWER),
    "'NO', 2": Line(launchers=[accelerate(config="{here}/no.yaml")], wanted=FEWER),
    "MULTI_CPU, 2": Line(launchers=[accelerate(config="{here}/multi_cpu.yaml")], wanted=FEWER),
    "FSDP": Line(launchers=[accelerate(config="{here}/fsdp.yaml")], wanted=Refused(because="FSDP")),
}
RARE = {
    "cpu.yaml": Line(launchers=[shipped("cpu")], wanted=1),
    "cpu.yaml, 2": Line(launchers=[shipped("cpu", *TWO)], wanted=FEWER),
    "cpu_2_processes.yaml without the variable": Line(launchers=[shipped("cpu_2_processes")], wanted=2),
    "single_gpu.yaml": Line(launchers=[shipped("single_gpu")], wanted=1),
    "single_gpu.yaml, 2": Line(launchers=[shipped("single_gpu", *TWO)], wanted=FEWER),
    "multi_gpu.yaml": Line(launchers=[shipped("multi_gpu")], wanted=8),
    "multi_gpu.yaml, 2": Line(launchers=[shipped("multi_gpu", *TWO)], wanted=2),
    "multi_node.yaml, nothing said": Line(
        launchers=[shipped("multi_node")], wanted=Refused(because="--num_processes", by=BY_LAUNCHER)
    ),
    "multi_node.yaml, machines not said": Line(
        launchers=[shipped("multi_node", *TWO)], wanted=Refused(because="NoneType", by=BY_LAUNCHER)
    ),
    "multi_node.yaml, rank not said": Line(
        launchers=[shipped("multi_node", *TWO, "--num_machines", "2", "--main_process_ip", "127.0.0.1")],
        wanted=Refused(because="NoneType", by=BY_LAUNCHER),
    ),
    "no config": Line(launchers=[accelerate()], wanted=1),
    "no config, ACCELERATE_USE_CPU": Line(launchers=[accelerate("--multi_gpu", *TWO)], wanted=2, environment=ON_CPU),
    "personal config 'NO', 2": Line(launchers=[accelerate()], wanted=FEWER, personal=CONFIGS["no.yaml"]),
    "personal config beside --num_processes 1": Line(
        launchers=[accelerate("--num_processes", "1")], wanted=1, personal=CONFIGS["no.yaml"]
    ),
    "bare NO, 2": Line(launchers=[accelerate(config="{here}/bare_no.yaml")], wanted=FEWER),
    "--cpu, 2, as a debugger starts it": Line(
        launchers=[(sys.executable, str(LAUNCH_FILE), "--cpu", *TWO)], wanted=FEWER
    ),
    "--cpu, 2, through a script": Line(
        launchers=[(*ACCELERATE, "--cpu", *TWO, "--no_python", "sh", "-c", '"$@"; exit $?', "sh", sys.executable)],
        wanted=FEWER,
    ),
    "DeepSpeed": Line(
        launchers=[accelerate(config="{here}/deepspeed.yaml")], wanted=Refused(because="DeepSpeed", by=BY_LAUNCHER)
    ),
    "torchrun, 1": Line(launchers=[(*TORCHRUN, "--nproc_per_node", "1", "--master_port", "{port}")], wanted=1),
    "torchrun on two": Line(launchers=[torchrun_machine(0), torchrun_machine(1)], wanted=2),
    "WORLD_SIZE without peers": Line(launchers=[PYTHON], wanted=NOT_JOINED, environment=ALONE),
    "WORLD_SIZE alone": Line(launchers=[PYTHON], wanted=NOT_JOINED, environment={"WORLD_SIZE": "2"}),
    "GPU promised": Line(
        launchers=[PYTHON], wanted=Refused(because="GPUs are promised"), environment={"CUDA_VISIBLE_DEVICES": "99"}
    ),
    "Slurm's second task is missing": Line(launchers=[PYTHON], wanted=NOT_JOINED, environment=STEP_OF_TWO),
    "one machine of Slurm's two": Line(
        launchers=[accelerate("--multi_gpu", *TWO)], wanted=Refused(because="srun started 2 tasks"),
        environment=STEP_OF_TWO,
    ),
    "mpirun": Line(
        launchers=[PYTHON], wanted=Refused(because="MPI promised 2 processes"),
        environment={"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def matrix_flags(tiny_flags: list[str]) -> list[str]:
    return [*tiny_flags, "--max_steps", "3", "--log_every", "1", "--sample_prompts=[]"]


@pytest.fixture(scope="session")
def losses_of_one(matrix_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Train with one process and no launcher, which also leaves a token store for all lines."""
    run_dir = tmp_path_factory.mktemp("matrix") / "run"
    run_script("train_distributed.py", *matrix_flags, "--run_dir", str(run_dir))
    return all_losses(run_dir)


@pytest.mark.parametrize(
    "line",
    [
        *(pytest.param(line, id=name) for name, line in COMMON.items()),
        *(pytest.param(line, id=name, marks=pytest.mark.slow) for name, line in RARE.items()),
    ],
)
def test_launch_trains_the_promised_world_or_refuses(
    line: Line, matrix_flags: list[str], losses_of_one: list[float], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    patience = "5" if line.wanted is NOT_JOINED else "100"
    flags = [*matrix_flags, "--run_dir", str(run_dir), "--distributed_timeout", patience]
    codes, said = launch(line, flags, tmp_path)
    worlds = re.findall(r"^(\d+) process(?:es)?\b", said, re.MULTILINE)
    if isinstance(line.wanted, int):
        assert codes == [0] * len(line.launchers), said
        assert worlds == [str(line.wanted)], said
        assert all_losses(run_dir) == pytest.approx(losses_of_one, rel=1e-5)
        trainer = next(run_dir.glob("checkpoints/*/trainer.json"))
        assert json.loads(trainer.read_text())["processes"] == line.wanted
        return
    assert 0 not in codes, said
    assert not run_dir.exists(), said
    if line.wanted.by == "textgen":
        errors = [text for text in said.splitlines() if text.startswith("error: ")]
        assert len(errors) == 1, said
        assert line.wanted.because in errors[0]
        assert codes == [2] or re.search(r"exit status 2\b|exitcode *: 2\b", said), said
    else:
        assert line.wanted.because in said


def test_every_shipped_config_is_launched() -> None:
    launched = {word for line in (COMMON | RARE).values() for launcher in line.launchers for word in launcher}
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("launch/configs/*.yaml")} <= launched


def launch(line: Line, flags: Sequence[str], home: Path) -> tuple[list[int], str]:
    """Start a line's launchers and return their exit codes and all that they said.

    Nothing of the environment that the tests run in comes through: no GPU, no launcher's variables, no personal config.
    """
    for name, content in CONFIGS.items():
        (home / name).write_text(content)
    if line.personal is not None:
        (home / "accelerate").mkdir()
        (home / "accelerate" / "default_config.yaml").write_text(line.personal)
    fill = {"{port}": str(free_port()), "{here}": str(home)}

    def filled(text: str) -> str:
        for place, value in fill.items():
            text = text.replace(place, value)
        return text

    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR", "LANG") if name in os.environ}
    own = {
        "HOME": str(home), "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    environment = kept | own | {name: filled(value) for name, value in line.environment.items()}
    started = [
        subprocess.Popen(
            [*map(filled, launcher), "train_distributed.py", *flags], cwd=ROOT, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for launcher in line.launchers
    ]  # fmt: skip
    try:
        said = "".join(process.communicate(timeout=200)[1] for process in started)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [process.returncode for process in started], said
