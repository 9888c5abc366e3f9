"""The command `submit`: submit a training, or a sweep of trainings, to Slurm.

Everything that would fail when the job starts, perhaps hours later, is checked before.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from textgen.commands.parsing import Parser, fail, given_run_dir, parse_train_config, take_base
from textgen.config import TrainConfig
from textgen.console import use_utf8
from textgen.errors import TextgenError
from textgen.files import UTF8_MARK, decode_text, refuse_wide
from textgen.runs.directory import refuse_other_kinds
from textgen.settings import settings_of, unknown_setting

HOME = Path(__file__).resolve().parents[2]
"""the checkout, which has `launch/`; an installed package has not"""
SLURM = HOME / "launch" / "slurm"

# Folder of the logs. It is made before the job is submitted: Slurm does not make it, and the job would fail.
LOGS = "runs/slurm"

# Minutes before the limit that a training may lose: the scripts ask for USR1 two minutes before the limit, and Slurm
# may send it one minute early.
MINUTES_TO_SAVE = 3


def submit_command(argv: Sequence[str]) -> None:
    """Submit a job and print its id; print the commands that watch, stop and continue it to standard error."""
    at = argv.index("--") if "--" in argv else len(argv)
    parser = build_submit_parser()
    training_flags = {f"--{name}" for name in settings_of(TrainConfig)} - set(parser._option_string_actions)
    for flag in argv[:at]:
        if flag.partition("=")[0] in training_flags:
            parser.error(f"`{flag}` is a flag of the training: write it after ` -- `")
    args = parser.parse_args(list(argv[:at]))
    _check(parser, args)
    if not SLURM.exists():
        fail(f"`{HOME}` has no launch/slurm: install textgen from a checkout, by `pip install -e .`")
    flags = list(argv[at + 1 :])
    if args.preset is not None:
        flags = ["--config", _shown(_find_preset(args.preset)), *flags]
    environment = read_site(SLURM / "site.sh") | {"TEXTGEN_HOME": str(HOME)}
    processes = args.gpus_per_node or _cpu_processes(environment)
    if args.sweep is None:
        _check_training(flags, args.nodes * processes)
    else:
        trainings = read_sweep(args.sweep, flags)
        args.array = args.array or f"1-{len(trainings)}"
        addresses: set[str | None] = set()
        for number in _numbers(args.array):
            address = _check_training(_pick(trainings, number, args.sweep), args.nodes * processes)
            if address in addresses:
                fail(f"`checkpoint_copy` must be another address for each training of a sweep: {address}")
            addresses |= {address} - {None}

    command = sbatch_command(args, flags, processes)
    site = [f"source {shlex.quote(_shown(SLURM / 'site.sh'))}"] if (SLURM / "site.sh").exists() else []
    lines = [f"mkdir -p {LOGS}", *site, f"TEXTGEN_HOME={shlex.quote(str(HOME))} {shlex.join(command)}"]
    print("\n".join(lines), file=sys.stdout if args.dry_run else sys.stderr)
    if args.dry_run:
        return
    job = _run(command, environment)
    run_dir = given_run_dir(flags) or f"runs/{_name(args)}-{job}"
    again = ["textgen", "submit", *argv[:at], "--", *argv[at + 1 :]]
    again += [] if given_run_dir(flags) else ["--run_dir", run_dir]
    print(_advice(args, run_dir, job, shlex.join(again)), file=sys.stderr)
    print(job)


def build_submit_parser() -> Parser:
    """Return the parser of the flags before `--`."""
    parser = Parser(
        prog="textgen submit",
        usage="%(prog)s [OPTION ...] -- [FLAG OF train_distributed.py ...]",
        description="Submit a training to Slurm. launch/slurm/site.sh sets account, partition and similar options.",
    )
    parser.add_argument("--nodes", type=int, default=1, help="number of machines")
    parser.add_argument("--gpus_per_node", type=int, default=1, help="GPUs, and processes, of each machine; 0: CPUs")
    parser.add_argument("--cpus_per_process", type=int, default=4, help="CPU cores of each process")
    parser.add_argument(
        "--time", type=str | None, default=None, help="time limit: 90 (minutes), 4:00:00 or 1-12 (days-hours)"
    )
    parser.add_argument("--preset", type=str | None, default=None, help="preset of launch/presets, such as `large`")
    parser.add_argument("--name", type=str | None, default=None, help="name of job and run; default: the preset's name")
    parser.add_argument(
        "--sweep", type=str | None, default=None, metavar="FILE", help="file with a line of flags for each training"
    )
    parser.add_argument(
        "--array",
        type=str | None,
        default=None,
        help="lines to train: 1,4-6, or 1-9%2 for two at a time",
    )
    parser.add_argument("--sbatch", action="append", default=[], help="another option of sbatch: `--sbatch=--qos=x`")
    parser.add_argument("--dry_run", action="store_true", help="check and print the command, submit nothing")
    return parser


def _check(parser: Parser, args: Any) -> None:
    for name, least in (("nodes", 1), ("gpus_per_node", 0), ("cpus_per_process", 1)):
        if getattr(args, name) < least:
            parser.error(f"`{name}` must be at least {least}: {getattr(args, name)}")
    if args.time is not None and (minutes(args.time) or 0) <= MINUTES_TO_SAVE:
        parser.error(f"`time` must be 90 (minutes), 4:00:00 or the like, above {MINUTES_TO_SAVE} minutes: {args.time}")
    if args.name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", args.name, re.ASCII):
        parser.error(f"`name` must be the name of a folder, of letters, digits and `._-`: {args.name}")
    if args.array is not None and args.sweep is None:
        parser.error(f"`array` needs a `--sweep`: {args.array}")
    for option in args.sbatch:
        if not option.startswith("-"):
            parser.error(f"`sbatch` must be an option such as `--qos=x`: {option}")


def minutes(limit: str) -> float | None:
    """Return the minutes of a time limit in one of Slurm's forms; None if it has another form.

    Slurm's forms are M, M:S, H:M:S, D-H, D-H:M and D-H:M:S.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", limit)
    if found is None:
        return None
    parts = [int(part) for part in found[2].split(":")]
    units = (60, 1, 1 / 60) if found[1] or len(parts) == 3 else (1, 1 / 60)
    return 1440 * int(found[1] or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))


def _find_preset(name: str) -> Path:
    presets = {path.stem: path for path in (HOME / "launch" / "presets").glob("*.yaml")}
    if name not in presets:
        fail(unknown_setting(name, presets, f" for `--preset`, which has {', '.join(sorted(presets))}"))
    return presets[name]


def _check_training(flags: Sequence[str], processes: int) -> str | None:
    """Return the `checkpoint_copy` of a training. Fail if settings or folder are wrong; its data is not read."""
    config = parse_train_config(flags, prog="textgen submit --")
    if given_run_dir(flags) is None:  # the job names its folder
        config = replace(config, run_dir=os.devnull)
    refuse_other_kinds(Path(config.run_dir))
    config = take_base(config, flags)
    if config.batch_size % (processes * config.gradient_accumulation_steps):
        fail(
            f"batch_size {config.batch_size} is not divisible by {processes} processes x "
            f"{config.gradient_accumulation_steps} gradient_accumulation_steps"
        )
    return config.checkpoint_copy


def _shown(path: Path) -> str:
    """Return a path, relative to the current folder if it is in it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


# --- sweeps ----------------------------------------------------------------------------------------------------------


def read_sweep(path: str, common: Sequence[str] = ()) -> list[list[str]]:
    """Return the flags of each training of a sweep.

    Lines are quoted as in a shell, without expansion. Blank lines and comments after `#` are left out.

    Args:
        path: the file, with a line of flags for each training.
        common: flags of all trainings; those of a line override them.
    """
    try:
        lines = decode_text(Path(path).read_bytes(), f"`{path}`").splitlines()
    except OSError as error:
        fail(f"`{path}` cannot be read: {error.strerror}")
    except TextgenError as error:  # this is also a script, without the handler of textgen/cli.py
        fail(str(error))
    trainings = []
    for number, line in enumerate(lines, 1):
        try:
            own = shlex.split(line, comments=True)
        except ValueError:
            fail(f"`{path}` line {number} has a quote that is not closed: {line}")
        if (folder := given_run_dir([*common, *own])) is not None:
            fail(f"`run_dir` cannot be set in a sweep, whose trainings get a folder each: {folder}")
        if own:
            trainings.append([*common, *own])
    if not trainings:
        fail(f"`{path}` has no line of flags")
    return trainings


def _pick(trainings: Sequence[list[str]], number: int, path: str) -> list[str]:
    if not 1 <= number <= len(trainings):
        fail(f"`{path}` has no training {number}: it has {len(trainings)}")
    return trainings[number - 1]


def _numbers(array: str) -> Iterator[int]:
    """Yield the numbers of Slurm's `--array`."""
    for part in re.sub(r"%[1-9]\d*$", "", array).split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?", part)
        if found is None:
            fail(f"`array` must be numbers and ranges such as 1,4-6 or 1-9%2: {array}")
        first, last, step = (int(group or 0) for group in found.groups())
        yield from range(first, max(first, last) + 1, step or 1)


# --- Slurm -----------------------------------------------------------------------------------------------------------


def read_site(path: Path) -> dict[str, str]:
    """Return the environment with the exports of the site's file; fail if the file fails."""
    if not path.exists():
        return dict(os.environ)
    raw = path.read_bytes()
    refuse_wide(raw, f"`{path}`", "wanted UTF-8")
    if raw.startswith(UTF8_MARK) or b"\r\n" in raw:
        what = "begins with a byte order mark" if raw.startswith(UTF8_MARK) else "has Windows line ends"
        fail(f"`{path}` {what}, which bash takes as part of a command: save it as UTF-8 without them")
    reader = ["bash", "-c", 'source "$0" 1>&2 && env --null', str(path)]
    done = subprocess.run(reader, capture_output=True, check=False)
    if done.returncode != 0:
        fail(f"`{path}` fails: {_last_line(done)}")
    pairs = (pair.partition("=") for pair in os.fsdecode(done.stdout).split("\0") if pair)
    return {name: value for name, _, value in pairs}


def _cpu_processes(environment: Mapping[str, str]) -> int:
    value = environment.get("TEXTGEN_PROCESSES_PER_NODE", "1")
    if not re.fullmatch(r"[1-9]\d*", value):
        fail(f"`TEXTGEN_PROCESSES_PER_NODE` must be an integer of at least 1: {value}")
    return int(value)


def sbatch_command(args: Any, flags: Sequence[str], processes: int) -> list[str]:
    """Return the command that submits the job.

    Args:
        args: the flags of `build_submit_parser`.
        flags: the flags of the training, or those of all trainings of a sweep.
        processes: the processes of each machine.
    """
    script, *more = ["train.sbatch"] if args.sweep is None else ["sweep.sbatch", args.sweep]
    return [
        "sbatch", "--parsable", f"--job-name={_name(args)}", f"--nodes={args.nodes}",
        *([f"--gpus-per-node={args.gpus_per_node}"] if args.gpus_per_node else []),
        f"--cpus-per-task={args.cpus_per_process * processes}",
        *([f"--time={args.time}"] if args.time is not None else []),
        *([f"--array={args.array}"] if args.sweep is not None else []),
        f"--output={_log(args, '%j' if args.sweep is None else '%A_%a')}", *args.sbatch,
        _shown(SLURM / script), *more, *flags,
    ]  # fmt: skip


def _name(args: Any) -> str:
    return str(args.name or args.preset or ("textgen" if args.sweep is None else "sweep"))


def _log(args: Any, job: str) -> str:
    return f"{LOGS}/{_name(args)}-{job}.out"


def _run(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Submit the job and return its id."""
    if shutil.which("sbatch", path=environment.get("PATH")) is None:
        fail("there is no `sbatch` here: submit on a machine of the cluster")
    Path(LOGS).mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    if done.returncode != 0:
        fail(f"sbatch refuses the job: {_last_line(done)}")
    return done.stdout.decode().strip().partition(";")[0]


def _last_line(done: subprocess.CompletedProcess[bytes]) -> str:
    line = os.fsdecode(done.stderr).strip().rpartition("\n")[2]
    return re.sub(r"^sbatch: (error|fatal): ", "", line) or f"exit code {done.returncode}"


def _advice(args: Any, run_dir: str, job: str, again: str) -> str:
    """Return the commands that watch the job, stop it and continue it."""
    sweep = args.sweep is not None
    one = f"{job}_N" if sweep else job  # a signal to the whole array would also reach jobs that have just begun
    save = f"scancel --signal=USR1 --batch {one}"
    lines = [
        ("run", f"{run_dir}/*" if sweep else run_dir),
        ("watch", f"tail -F {_log(args, f'{job}_*' if sweep else job)}"),
        ("stop", f"scancel {job}    # saves if there is time: Slurm's KillWait, mostly 30 s"),
        ("", f"scontrol update JobId={one} Requeue=0 && {save}    # saves without a time limit"),
        ("restart", f"{save}    # saves, and waits in the queue again"),
        *([] if sweep else [("continue", f"{again}    # after it has ended")]),
    ]
    return "\n".join(f"{name:8} {text}" for name, text in lines)


# For sweep.sbatch: `NUMBER FILE [FLAG ...]` prints the flags of one training, with a zero byte after each.
if __name__ == "__main__":
    use_utf8()
    _flags = _pick(read_sweep(sys.argv[2], sys.argv[3:]), int(sys.argv[1]), sys.argv[2])
    sys.stdout.buffer.write(b"".join(os.fsencode(flag) + b"\0" for flag in _flags))
