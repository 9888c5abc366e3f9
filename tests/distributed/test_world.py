"""Promises of launchers and schedulers, and what becomes of those that do not agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from textgen.distributed.world import (
    Launch,
    World,
    first_host,
    promised_gpus,
    promised_world,
    read_launch,
    slurm_variables,
    tasks_per_node,
)
from textgen.errors import TextgenError

# A task of `srun --nodes 2 --ntasks-per-node 2`: the last one.
SRUN = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip
ONE_TASK = SRUN | {
    "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "gpu03",
    "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}  # fmt: skip
FIRST_MACHINE = ONE_TASK | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
BATCH_SHELL = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}


def torchrun(processes: int, local: int, machines: int) -> dict[str, str]:
    return {
        "TORCHELASTIC_RUN_ID": "none", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(local), "GROUP_WORLD_SIZE": str(machines),
    }  # fmt: skip


def test_without_a_launcher_the_world_is_one_process() -> None:
    assert promised_world({}) == World(1, 1, 1)


def test_torchrun_says_how_many_machines_it_joined() -> None:
    assert promised_world(torchrun(8, 4, 2)) == World(8, 4, 2)
    assert promised_world({"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "4"}) == World(6, 4, 2)


def test_tasks_of_srun_join_without_a_launcher() -> None:
    variables = slurm_variables(SRUN)
    assert variables == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu03", "MASTER_PORT": "10038",
    }  # fmt: skip
    assert promised_world(SRUN | variables) == World(4, 2, 2)
    # each task has a GPU of its own, or sees all of its machine
    assert slurm_variables(SRUN | {"CUDA_VISIBLE_DEVICES": "5"})["LOCAL_RANK"] == "0"
    assert slurm_variables(SRUN | {"CUDA_VISIBLE_DEVICES": "4,5"})["LOCAL_RANK"] == "1"
    assert slurm_variables(SRUN | {"MASTER_ADDR": "here", "MASTER_PORT": "5"}).items() >= {
        "MASTER_ADDR": "here", "MASTER_PORT": "5",
    }.items()  # fmt: skip


def test_slurm_is_left_to_the_launcher_that_stands_before_it() -> None:
    assert slurm_variables(SRUN | torchrun(4, 2, 2)) == {}
    assert slurm_variables(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert slurm_variables(BATCH_SHELL) == {}


def test_a_task_that_does_not_know_its_place_is_refused() -> None:
    with pytest.raises(TextgenError, match=r"promised 4 tasks, but the environment lacks SLURM_NODEID$"):
        slurm_variables({name: value for name, value in SRUN.items() if name != "SLURM_NODEID"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,other2", "node1"),
        ("gpu[01-03,07],login", "gpu01"),
        ("gpu[7,9]", "gpu7"),
        ("rack[2-3]n[08-15]", "rack2n08"),
    ],
)
def test_first_host_of_slurms_lists(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_slurms_counts_of_tasks() -> None:
    assert tasks_per_node("2(x2),1") == [2, 2, 1]
    assert tasks_per_node("4") == [4]


@pytest.mark.parametrize(
    ("environment", "launch", "problem"),
    [
        # each of 4 tasks of srun runs a launcher of its own
        (SRUN | torchrun(2, 2, 1), None, "srun started 4 tasks, but the launcher in this task joined 1"),
        (SRUN | {"WORLD_SIZE": "2"}, None, "srun started 4 tasks, but the launcher in this task joined 2"),
        (SRUN, None, "srun started 4 tasks, but the launcher in this task joined 1"),
        # python or a launcher in the batch shell, on the first machine alone
        (BATCH_SHELL, None, "the Slurm job has 2 machines, this training 1"),
        (BATCH_SHELL | torchrun(4, 4, 1), None, "the Slurm job has 2 machines, this training 1"),
        # a step of one task, as of `srun --pty`, and of two tasks on the first machine of two
        (ONE_TASK, None, r"job has 2 machines, this training 1: .* by `srun --overlap --nodes=2 --ntasks=N`"),
        (ONE_TASK | torchrun(4, 4, 1), None, "job has 2 machines, this training 1: .*`TEXTGEN_PART_OF_JOB=1` allows"),
        (FIRST_MACHINE | slurm_variables(FIRST_MACHINE), None, "the Slurm job has 2 machines, this training 1"),
        (ONE_TASK | {"TEXTGEN_PART_OF_JOB": "0"}, None, "the Slurm job has 2 machines, this training 1"),
        # what accelerate launch was asked for and did not start
        ({}, Launch(2, None, None), r"asked for 2 processes \(its flags\) but started 1: add `--multi_gpu`"),
        ({}, Launch(2, 1, "my.yaml"), r"asked for 2 processes \(`my.yaml`\) but started 1"),
        (
            torchrun(2, 1, 2),
            Launch(3, 2, None),
            "asked for 3 processes .* started 2: num_processes counts all 2 machines",
        ),
        (torchrun(2, 1, 2), Launch(1, 1, None), "asked for 1 processes .* started 2: start it once per machine"),
        ({}, Launch(1, 2, "my.yaml"), "asked for 2 machines .* joined 1"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, None, "MPI promised 2 processes"),
        (torchrun(1, 1, 1) | {"OMPI_COMM_WORLD_SIZE": "2"}, None, "MPI promised 2 processes"),
        # python in each of several pods or rented machines
        ({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "8"}, None, r"job has 2 machines \(PET_NNODES\), this training 1"),
        (torchrun(8, 8, 1) | {"PET_NNODES": "2:4"}, None, r"the job has 2 machines \(PET_NNODES\), this training 1"),
        ({"SKYPILOT_NUM_NODES": "4"}, None, r"the job has 4 machines \(SKYPILOT_NUM_NODES\), this training 1"),
        ({"ACCELERATE_USE_FSDP": "true"}, None, "configured to use FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, None, "configured to use DeepSpeed"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, None, "dynamo_backend INDUCTOR"),
        ({"WORLD_SIZE": "two"}, None, "`WORLD_SIZE` must be a number of at least 1: two"),
    ],
)
def test_promises_that_do_not_agree_are_refused(
    environment: dict[str, str], launch: Launch | None, problem: str
) -> None:
    with pytest.raises(TextgenError, match=problem) as refused:
        promised_world(environment, launch)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2"} | torchrun(8, 4, 2), Launch(8, 2, "multi_node.yaml")),
        # some machines of a job, on purpose
        (ONE_TASK | {"TEXTGEN_PART_OF_JOB": "1"}, None),
        (BATCH_SHELL | {"TEXTGEN_PART_OF_JOB": "true"}, None),
        (FIRST_MACHINE | slurm_variables(FIRST_MACHINE) | {"TEXTGEN_PART_OF_JOB": "1"}, None),
        # a launcher of two machines in each of two steps of one task
        (ONE_TASK | torchrun(8, 4, 2), Launch(8, 2, "multi_node.yaml")),
        # a task of an array is a job; variables of tasks that are left over without a job
        (ONE_TASK | {"SLURM_JOB_NUM_NODES": "1", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_COUNT": "9"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_NPROCS": "4"}, None),
        (BATCH_SHELL | {"SLURM_JOB_NUM_NODES": "1"} | torchrun(4, 4, 1), Launch(4, None, None)),
        (SRUN | slurm_variables(SRUN) | {"PMI_SIZE": "4"}, None),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2"} | torchrun(8, 4, 2) | {"PMI_SIZE": "2"}, None),
        (torchrun(16, 8, 2) | {"PET_NNODES": "2", "SKYPILOT_NUM_NODES": "2"}, None),
        (torchrun(8, 8, 1) | {"PET_NNODES": "1:4"}, None),
        ({"PET_NNODES": "2", "TEXTGEN_PART_OF_JOB": "1"}, None),
        ({}, Launch(1, 1, "accelerate_config.yaml")),
        ({}, Launch(None, None, None)),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_FSDP": "false"}, None),
    ],
)
def test_promises_that_agree_are_kept(environment: dict[str, str], launch: Launch | None) -> None:
    assert promised_world(environment, launch).processes == int(environment.get("WORLD_SIZE", "1"))


ELASTIC = [
    (SRUN | {"SLURM_STEP_NUM_TASKS": "2"} | torchrun(4, 4, 1), None),
    (BATCH_SHELL | torchrun(4, 4, 1), None),
    (torchrun(4, 4, 1), Launch(8, 2, "multi_node.yaml")),
    (torchrun(4, 4, 1) | {"PMI_SIZE": "2"}, None),
    (torchrun(4, 4, 1) | {"SKYPILOT_NUM_NODES": "2"}, None),
]


@pytest.mark.parametrize(("environment", "launch"), ELASTIC)
def test_elastic_world_may_be_smaller_than_promised(environment: dict[str, str], launch: Launch | None) -> None:
    assert promised_world(environment, launch, elastic=True) == World(4, 4, 1)
    with pytest.raises(TextgenError):
        promised_world(environment, launch)


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2"} | torchrun(12, 4, 3), None),  # more than promised
        (torchrun(12, 4, 3), Launch(8, 2, "multi_node.yaml")),
        (torchrun(12, 4, 3) | {"PMI_SIZE": "2"}, None),
        ({}, Launch(2, None, None)),  # no torchrun: each process would train alone
        (SRUN, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, None),
    ],
)
def test_elastic_world_is_of_torchrun_and_not_larger(environment: dict[str, str], launch: Launch | None) -> None:
    with pytest.raises(TextgenError):
        promised_world(environment, launch, elastic=True)


def test_an_evaluation_may_use_a_part_of_a_job() -> None:
    assert promised_world(ONE_TASK, whole_job=False) == promised_world(BATCH_SHELL, whole_job=False) == World(1, 1, 1)
    with pytest.raises(TextgenError, match="srun started 4 tasks"):
        promised_world(SRUN, whole_job=False)


def test_gpus_are_promised_by_slurm_or_cuda_unless_the_cpu_is_wanted() -> None:
    assert promised_gpus({"SLURM_GPUS_ON_NODE": "2"}) == "SLURM_GPUS_ON_NODE=2"
    assert promised_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}) == "CUDA_VISIBLE_DEVICES=0,1"
    assert promised_gpus({"CUDA_VISIBLE_DEVICES": "0", "ACCELERATE_USE_CPU": "true"}) is None
    hidden = {"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": ""}
    for nothing in (
        {},
        hidden,
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "-1"},
        {"SLURM_GPUS_ON_NODE": "0"},
    ):
        assert promised_gpus(nothing) is None


# A program that shows itself to be `accelerate launch` by its command line, and waits.
WAITING = "import sys; print('up', flush=True); sys.stdin.read()"


def launch_of(arguments: list[str], tmp_path: Path) -> Launch | None:
    name = tmp_path / arguments[0]
    name.write_text(WAITING)
    with subprocess.Popen(
        [sys.executable, str(name), *arguments[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        launch = read_launch(process.pid)
        process.communicate()
    return launch


@pytest.fixture
def no_default_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    from accelerate.commands.config import config_args

    default = tmp_path / "default_config.yaml"
    monkeypatch.setattr(config_args, "default_config_file", str(default))
    return default


YAML = "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_machines: 1\nnum_processes: 3\nuse_cpu: true\n"


def test_what_accelerate_was_told_is_read_from_its_command_line(tmp_path: Path, no_default_config: Path) -> None:
    script = ["train_distributed.py", "--num_processes", "9"]  # which is not accelerate's
    assert launch_of(["accelerate", "launch", "--cpu", "--num_processes", "2", *script], tmp_path) == Launch(
        2, None, None, use_cpu=True
    )
    assert launch_of(["accelerate-launch", "--num-machines=2", *script], tmp_path) == Launch(None, 2, None)
    assert launch_of(["accelerate", "launch", *script], tmp_path) == Launch(None, None, None)
    yaml = tmp_path / "my.yaml"
    yaml.write_text(YAML)
    assert launch_of(["accelerate", "launch", "--config_file", str(yaml), *script], tmp_path) == Launch(
        3, 1, str(yaml), True
    )
    flags = ["--config_file", str(yaml), "--num_processes", "2"]
    assert launch_of(["accelerate", "launch", *flags, *script], tmp_path) == Launch(2, 1, str(yaml), use_cpu=True)


def test_the_users_own_default_config_counts_where_none_is_named(tmp_path: Path, no_default_config: Path) -> None:
    no_default_config.write_text(YAML)
    told = launch_of(["accelerate", "launch", "train_distributed.py"], tmp_path)
    assert told == Launch(3, 1, str(no_default_config), use_cpu=True)
    assert launch_of(["accelerate", "launch", "--cpu", "train_distributed.py"], tmp_path) == Launch(
        None, None, None, True
    )


def test_other_parents_told_nothing(tmp_path: Path) -> None:
    assert launch_of(["torchrun", "--nproc_per_node", "2", "train_distributed.py"], tmp_path) is None
    assert launch_of(["accelerate", "config"], tmp_path) is None
    assert read_launch(os.getpid()) is None
    assert read_launch(1 << 22) is None
