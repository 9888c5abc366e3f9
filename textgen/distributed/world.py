"""The world that launchers promise: number of processes and machines, read from the environment without torch.

A launch that goes wrong seldom fails: it leaves every process alone in a world of one, and each trains its own model.
So this module reads every promise (torchrun, accelerate's flags and yaml, Slurm, MPI), and all of them must agree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from textgen.errors import TextgenError

# MPI's launchers set one of these to the number of processes.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")

# Kubeflow's runtime and a Job of Kubernetes set the first for torchrun, SkyPilot sets the second for its commands: the
# number of machines, of which torchrun may allow a range, 1:4.
MACHINES = ("PET_NNODES", "SKYPILOT_NUM_NODES")

# Wrappers of accelerate that textgen does not support (docs/decisions/0010-fsdp.md).
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}

# `accelerate launch` in the command line of a process: the script, `python -m accelerate.commands.launch`, or a
# debugger's `python .../accelerate/commands/launch.py`. The flags of accelerate follow it.
ACCELERATE_LAUNCH = re.compile(
    r"(?:^|[/\0])accelerate"
    r"(?:-launch|[./]commands[./]launch(?:\.py)?|(?:[./]commands[./]accelerate_cli(?:\.py)?)?\0launch)\0"
)

# Set by a user to train on some machines of a Slurm job, for example one training in each of several steps.
PART_OF_JOB = "TEXTGEN_PART_OF_JOB"

# srun sets these for each task.
TASK_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_NUM_NODES",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
)


@dataclass(frozen=True)
class World:
    """Number of processes in all, of processes on this machine, and of machines, as a launcher promises them."""

    processes: int = 1
    local_processes: int = 1
    machines: int = 1


def promised_world(
    environment: Mapping[str, str], launch: Launch | None = None, *, whole_job: bool = True, elastic: bool = False
) -> World:
    """Return the world that the environment promises, after checking that all promises agree.

    Args:
        environment: environment of this process, with the result of `slurm_variables` added.
        launch: the settings of `accelerate launch`; None if it did not start this process.
        whole_job: whether the world must have all machines of a Slurm job.
        elastic: whether the world may be smaller than promised, if torchrun made it: `--nnodes 1:2` does not tell the
            processes how many machines it may have.

    Raises:
        TextgenError: two promises differ, or one asks for something that textgen does not support.
    """
    for name, wrapper in UNSUPPORTED.items():
        if env_flag(environment, name):
            raise TextgenError(
                f"accelerate is configured to use {wrapper}, which textgen does not support: use MULTI_GPU"
            )
    dynamo = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() != "no":
        raise TextgenError(
            f"accelerate is configured with dynamo_backend {dynamo}, which textgen does not support: set `no`"
        )
    processes = _positive_int(environment, "WORLD_SIZE") or 1
    local = _positive_int(environment, "LOCAL_WORLD_SIZE") or 1
    world = World(processes, local, _positive_int(environment, "GROUP_WORLD_SIZE") or -(-processes // local))
    elastic = elastic and "TORCHELASTIC_RUN_ID" in environment
    _compare_to_accelerate(world, launch, elastic=elastic)
    _compare_to_step(world, environment, elastic=elastic)
    if whole_job and not elastic and not env_flag(environment, PART_OF_JOB):
        _compare_to_job(world, environment)
        _compare_to_pods(world, environment)
    for name in MPI_SIZES:
        size, tasks = _positive_int(environment, name) or 1, _tasks(world, environment)
        if size not in (1, tasks) and not (elastic and size > tasks):
            raise TextgenError(
                f"MPI promised {size} processes ({name}), but each would train alone: start them with "
                "`accelerate launch --multi_gpu`, torchrun or srun"
            )
    return world


def _tasks(world: World, environment: Mapping[str, str]) -> int:
    """Return the tasks that srun or mpirun started: one launcher per machine, or the processes themselves."""
    return world.machines if "TORCHELASTIC_RUN_ID" in environment else world.processes


# --- accelerate launch -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """The settings of `accelerate launch`, from its flags and its yaml; None if neither sets a value."""

    num_processes: int | None
    num_machines: int | None
    config_file: str | None
    use_cpu: bool = False


def read_launch(pid: int) -> Launch | None:
    """Return the settings of the nearest `accelerate launch` among a process and its ancestors; None without one.

    Searches all ancestors because a script may run between accelerate and the training (`--no_python`). Linux only.
    """
    match = None
    while match is None:
        try:
            match = ACCELERATE_LAUNCH.search(os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()))
            working_dir = os.readlink(f"/proc/{pid}/cwd") if match else ""
            pid = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])  # the parent's pid
        except OSError:  # no further ancestor, or no permission to read it
            return None
    flags = match.string[match.end() :].split("\0")[:-1]
    # Use accelerate's parser and reader: they accepted these flags when accelerate started this process.
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    args, _ = launch_command_parser().parse_known_args(flags)
    file = args.config_file
    if file is None and not args.cpu and Path(default_config_file).is_file():
        file = default_config_file
    config = load_config_from_file(os.path.join(working_dir, file)) if file is not None else None
    return Launch(
        args.num_processes or getattr(config, "num_processes", None),
        args.num_machines or getattr(config, "num_machines", None),
        file,
        args.cpu or bool(getattr(config, "use_cpu", False)),
    )


def _compare_to_accelerate(world: World, launch: Launch | None, *, elastic: bool) -> None:
    """Raise TextgenError if accelerate started fewer or more processes or machines than its settings ask for."""
    if launch is None or (elastic and world.processes <= (launch.num_processes or world.processes)):
        return
    source = f"`{launch.config_file}`" if launch.config_file is not None else "its flags"
    if launch.num_processes is not None and launch.num_processes != world.processes:
        if launch.num_processes % (launch.num_machines or 1):
            advice = f"num_processes counts all {launch.num_machines} machines together, which must divide it"
        elif launch.num_processes < world.processes:
            advice = "start it once per machine, or start python without it"
        else:
            advice = "add `--multi_gpu`, which joins processes on CPUs too; --cpu, MULTI_CPU and NO do not"
        raise TextgenError(
            f"`accelerate launch` was asked for {launch.num_processes} processes ({source}) but started "
            f"{world.processes}: {advice}"
        )
    if launch.num_machines is not None and launch.num_machines > world.machines:
        raise TextgenError(
            f"`accelerate launch` was asked for {launch.num_machines} machines ({source}) but joined "
            f"{world.machines}: add `--multi_gpu` and at least one process per machine"
        )


# --- Slurm -----------------------------------------------------------------------------------------------------------


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return torch's variables for a task of `srun`; empty if another launcher started the process.

    The tasks meet on the first machine of the step. The port is computed from the job's and the step's number, below
    the ports that the kernel assigns.

    Raises:
        TextgenError: srun started several tasks, but its variables are incomplete.
    """
    tasks = _positive_int(environment, "SLURM_STEP_NUM_TASKS") or 1
    if tasks == 1 or "WORLD_SIZE" in environment or "RANK" in environment:
        return {}
    if missing := [name for name in TASK_VARIABLES if name not in environment]:
        raise TextgenError(f"srun promised {tasks} tasks, but the environment lacks {', '.join(missing)}")
    port = 10000 + (int(environment["SLURM_JOB_ID"]) + 31 * int(environment["SLURM_STEP_ID"])) % 20000
    own_gpu = re.fullmatch(
        "[^,]+", environment.get("CUDA_VISIBLE_DEVICES", "")
    )  # --gpus-per-task shows one GPU, as GPU 0
    local = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[int(environment["SLURM_NODEID"])]
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": "0" if own_gpu else environment["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(local),
        "GROUP_WORLD_SIZE": environment["SLURM_STEP_NUM_NODES"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def first_host(nodes: str) -> str:
    """Return the first machine of a list in Slurm's notation: `gpu01` of `gpu[01-03,07],login`."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\]]*)\]", lambda found: re.split("[-,]", found[1])[0], first)


def tasks_per_node(counts: str) -> list[int]:
    """Return the number of tasks on each machine from Slurm's notation: [2, 2, 1] of `2(x2),1`."""
    matches = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in counts.split(",")]
    return [int(match[1]) for match in matches if match for _ in range(int(match[2] or 1))]


def _compare_to_step(world: World, environment: Mapping[str, str], *, elastic: bool) -> None:
    """Raise TextgenError if srun's tasks are not all in this world."""
    tasks, joined = _positive_int(environment, "SLURM_STEP_NUM_TASKS") or 1, _tasks(world, environment)
    if "SLURM_STEP_ID" in environment and tasks > 1 and tasks != joined and not (elastic and tasks > joined):
        raise TextgenError(
            f"srun started {tasks} tasks, but the launcher in this task joined {joined}: add `--num_machines "
            f"{tasks} --machine_rank $SLURM_NODEID` and run one task per machine, or let srun start python "
            "directly; in a shell of `srun --pty`, ask for one task"
        )


def _compare_to_job(world: World, environment: Mapping[str, str]) -> None:
    """Raise TextgenError if the Slurm job has more machines than this world: in its batch shell, or in a small step."""
    if (nodes := _positive_int(environment, "SLURM_JOB_NUM_NODES") or 1) > world.machines:
        overlap = "--overlap " if "SLURM_STEP_ID" in environment else ""  # this step holds what the new one needs
        raise TextgenError(
            f"the Slurm job has {nodes} machines, this training {world.machines}: start it on all of them, by "
            f"`srun {overlap}--nodes={nodes} --ntasks=N` with N processes in all, or as "
            f"`launch/slurm/train.sbatch` does; `{PART_OF_JOB}=1` allows a part of the job"
        )


def _compare_to_pods(world: World, environment: Mapping[str, str]) -> None:
    """Raise TextgenError if Kubernetes or SkyPilot started more machines than this world has."""
    for name in MACHINES:
        least = re.match("[0-9]+", environment.get(name, ""))
        if least is not None and int(least[0]) > world.machines:
            raise TextgenError(
                f"the job has {least[0]} machines ({name}), this training {world.machines}: start it by torchrun on "
                f"all of them, as launch/kubernetes/ and launch/sky.yaml do; `{PART_OF_JOB}=1` allows a part of the job"
            )


def promised_gpus(environment: Mapping[str, str]) -> str | None:
    """Return the variable that promises GPUs on this machine, as `NAME=value`.

    None if no variable does, or if the environment asks for the CPU or hides the GPUs.
    """
    if env_flag(environment, "ACCELERATE_USE_CPU"):
        return None
    if environment.get("CUDA_VISIBLE_DEVICES") in (
        "",
        "-1",
        "NoDevFiles",
    ):  # hidden on purpose: Slurm sets its GPUs here too
        return None
    for name in ("SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"):
        value = environment.get(name, "")
        if value and (name, value) != ("SLURM_GPUS_ON_NODE", "0"):
            return f"{name}={value}"
    return None


def env_flag(environment: Mapping[str, str], name: str) -> bool:
    """Return whether a variable is set to 1, true or yes."""
    return environment.get(name, "").lower() in ("1", "true", "yes")


def _positive_int(environment: Mapping[str, str], name: str) -> int | None:
    """Return a variable as a number of at least 1; None if it is not set."""
    value = environment.get(name)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise TextgenError(f"`{name}` must be a number of at least 1: {value}")
    return int(value)
