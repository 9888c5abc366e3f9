"""The world that a launcher promises this process: read from the environment, before torch is there.

A launch that goes wrong seldom fails: it leaves every process alone in a world of one, each training a model of its
own. So all who promised something are asked (torchrun, accelerate's flags and yaml, Slurm, MPI), and have to agree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from textgen.errors import TextgenError

# Names that MPI's launchers give the number of processes.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")

# What accelerate can be told to wrap a model in, and textgen has no use for (docs/decisions/0010-fsdp.md).
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}  # fmt: skip


# `accelerate launch` among the words of a process: as script, `python -m accelerate.commands.launch`, or a debugger's
# `python .../accelerate/commands/launch.py`. Its flags follow.
ACCELERATE_LAUNCH = re.compile(
    r"(?:^|[/\0])accelerate"
    r"(?:-launch|[./]commands[./]launch(?:\.py)?|(?:[./]commands[./]accelerate_cli(?:\.py)?)?\0launch)\0"
)

# What srun tells each of its tasks.
TASK_VARIABLES = (
    "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES", "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """What a launcher promises: processes in all, those on this machine, machines."""

    processes: int = 1
    local_processes: int = 1
    machines: int = 1


def promised_world(environment: Mapping[str, str], launch: Launch | None = None) -> World:
    """Return the world that the environment promises, once all who promise one agree.

    Args:
        environment: of this process, Slurm's promise already taken up (`slurm_variables`).
        launch: what `accelerate launch` was told, where it has started this process.

    Raises:
        TextgenError: they do not agree, or promise what textgen does not do.
    """
    for name, what in UNSUPPORTED.items():
        if env_flag(environment, name):
            raise TextgenError(f"accelerate was told to use {what}, which textgen does not: take MULTI_GPU")
    dynamo = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() != "no":
        raise TextgenError(f"accelerate was told dynamo_backend {dynamo}, and textgen does not compile: set `no`")
    processes = _number(environment, "WORLD_SIZE") or 1
    local = _number(environment, "LOCAL_WORLD_SIZE") or 1
    world = World(processes, local, _number(environment, "GROUP_WORLD_SIZE") or -(-processes // local))
    _compare_to_accelerate(world, launch)
    _compare_to_slurm(world, environment)
    for name in MPI_SIZES:
        if (size := _number(environment, name) or 1) not in (1, _tasks(world, environment)):
            raise TextgenError(
                f"MPI promised {size} processes ({name}) and each would train alone: start them by "
                "`accelerate launch --multi_gpu`, torchrun or srun"
            )
    return world


def _tasks(world: World, environment: Mapping[str, str]) -> int:
    """Return what srun or mpirun has started: launchers, one on each machine, or the processes themselves."""
    return world.machines if "TORCHELASTIC_RUN_ID" in environment else world.processes


# --- accelerate launch -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """What `accelerate launch` was told by its flags and its yaml; None where neither says."""

    num_processes: int | None
    num_machines: int | None
    config_file: str | None
    use_cpu: bool = False


def read_launch(pid: int) -> Launch | None:
    """Return what the nearest `accelerate launch` was told, from a process upwards; None without one. Linux only.

    A script may stand between it and the training (`--no_python`).
    """
    found = None
    while found is None:
        try:
            found, folder = ACCELERATE_LAUNCH.search(Path(f"/proc/{pid}/cmdline").read_text()), f"/proc/{pid}/cwd"
            where = os.readlink(folder) if found else None
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])  # its parent
        except (OSError, UnicodeDecodeError):  # above the first process, or not to be looked at
            return None
    flags = found.string[found.end() :].split("\0")[:-1]
    # accelerate's own parser and reader: it has come as far as to start this process with them
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    told, _ = launch_command_parser().parse_known_args(flags)
    file = told.config_file
    if file is None and not told.cpu and Path(default_config_file).is_file():
        file = default_config_file
    said = load_config_from_file(os.path.join(where or "", file)) if file is not None else None
    return Launch(
        told.num_processes or getattr(said, "num_processes", None),
        told.num_machines or getattr(said, "num_machines", None),
        file,
        told.cpu or bool(getattr(said, "use_cpu", False)),
    )


def _compare_to_accelerate(world: World, launch: Launch | None) -> None:
    if launch is None:
        return
    by = f"`{launch.config_file}`" if launch.config_file is not None else "its flags"
    if launch.num_processes is not None and launch.num_processes != world.processes:
        if launch.num_processes % (launch.num_machines or 1):
            mend = f"num_processes counts those of all {launch.num_machines} machines, which must divide it"
        elif launch.num_processes < world.processes:
            mend = "start it once per machine, or start python itself"
        else:
            mend = "give it `--multi_gpu`, which joins them on CPUs too; --cpu, MULTI_CPU and NO do not"
        raise TextgenError(
            f"`accelerate launch` was told {launch.num_processes} processes ({by}) and started {world.processes}: "
            f"{mend}"
        )
    if launch.num_machines is not None and launch.num_machines > world.machines:
        raise TextgenError(
            f"`accelerate launch` was told {launch.num_machines} machines ({by}) and joined {world.machines}: give it "
            "`--multi_gpu` and at least one process per machine"
        )


# --- Slurm -----------------------------------------------------------------------------------------------------------


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what torch wants to know of a task of `srun` that no other launcher stands before; else nothing.

    Slurm names and counts its tasks; the first machine of the step is where they meet, at a port made of the job's and
    the step's number, below those that the kernel gives out.
    """
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS") or 1
    if tasks == 1 or "WORLD_SIZE" in environment or "RANK" in environment:
        return {}
    if missing := [name for name in TASK_VARIABLES if name not in environment]:
        raise TextgenError(f"srun promised {tasks} tasks, and the environment lacks {', '.join(missing)}")
    port = 10000 + (int(environment["SLURM_JOB_ID"]) + 31 * int(environment["SLURM_STEP_ID"])) % 20000
    own_gpu = re.fullmatch("[^,]+", environment.get("CUDA_VISIBLE_DEVICES", ""))  # by --gpus-per-task: its first one
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
    """Return the first of Slurm's list of machines: `gpu01` of `gpu[01-03,07],login`."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\]]*)\]", lambda found: re.split("[-,]", found[1])[0], first)


def tasks_per_node(counts: str) -> list[int]:
    """Return Slurm's counts of tasks, machine by machine: [2, 2, 1] of `2(x2),1`."""
    found = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in counts.split(",")]
    return [int(part[1]) for part in found if part for _ in range(int(part[2] or 1))]


def _compare_to_slurm(world: World, environment: Mapping[str, str]) -> None:
    if "SLURM_STEP_ID" in environment:
        tasks = _number(environment, "SLURM_STEP_NUM_TASKS") or 1
        if tasks > 1 and tasks != (joined := _tasks(world, environment)):
            raise TextgenError(
                f"srun started {tasks} tasks and the launcher in this one joined {joined}: give it `--num_machines "
                f"{tasks} --machine_rank $SLURM_NODEID` and one task per machine, or start python by srun itself; in a "
                "shell of `srun --pty`, ask for one task"
            )
    elif (nodes := _number(environment, "SLURM_JOB_NUM_NODES") or 1) > world.machines:
        raise TextgenError(
            f"the Slurm job has {nodes} machines, this training {world.machines}: start it by srun, or as "
            "`launch/slurm/train.sbatch` does"
        )


def promised_gpus(environment: Mapping[str, str]) -> str | None:
    """Return what promises GPUs on this machine, as `NAME=value`; None if nothing does, or they are not wanted."""
    if env_flag(environment, "ACCELERATE_USE_CPU"):
        return None
    if environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):  # hidden: Slurm shows its GPUs there too
        return None
    for name in ("SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"):
        value = environment.get(name, "")
        if value and (name, value) != ("SLURM_GPUS_ON_NODE", "0"):
            return f"{name}={value}"
    return None


def env_flag(environment: Mapping[str, str], name: str) -> bool:
    """Tell whether a variable is switched on."""
    return environment.get(name, "").lower() in ("1", "true", "yes")


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise TextgenError(f"`{name}` must be a number of at least 1: {value}")
    return int(value)
