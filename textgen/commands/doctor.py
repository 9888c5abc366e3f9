"""The command `doctor`: check a machine, or all machines of an allocation, before a training.

It runs alone and under every launcher of a training. Every process runs every check in the same order; the main process
gathers the results and prints one report.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from textgen.commands.parsing import PEER_WAIT_SECONDS, parse_train_config, take_base
from textgen.distributed.signals import StopSignals, end_with_launcher
from textgen.errors import TextgenError
from textgen.reporting.profile import explain_profile, find_traces, read_profile

HELP = """usage: textgen doctor [--json] [--config FILE] [--SETTING VALUE] ...
       textgen doctor --profile RUN

Check this machine, or all machines of an allocation, before a training: versions, processes, GPUs, processors,
precision, an all-reduce, the disk of `--run_dir`, free space, data and tokenizer without a network, W&B, clocks,
limits.

  --json    print one JSON object and nothing else
  --profile RUN
            of a training with `--profile 20:23`: say where the time of these steps went, and what to try
  others    the flags of `textgen train`, for the training that you plan

Runs alone, or under `accelerate launch -m textgen doctor`, torchrun and `srun`. If the processes have different values,
a/b/c is the smallest, the median and the largest. Exit code 1 if a check failed, 2 if a flag is wrong.
"""


def doctor_command(argv: Sequence[str]) -> None:
    """Run all checks and print a table or JSON; end with exit code 1 if a check failed. Collective."""
    if {"--help", "-h"} & set(argv):
        print(HELP, end="")
        raise SystemExit(0)
    flags = [flag for flag in argv if flag != "--json"]
    if (profiled := re.fullmatch(r"--profile[= ]((?![0-9]+:[0-9]+$).+)", " ".join(flags), re.DOTALL)) is not None:
        if "--json" in argv:
            raise TextgenError("`--profile RUN` is explained in words: leave out `--json`")
        explain_profile_of(Path(profiled[1]))
        return
    config = parse_train_config(flags, prog="textgen doctor")
    # The hub's client reads this when it is imported, so set it before: the checks use no network.
    os.environ["HF_HUB_OFFLINE"] = "1"
    config = take_base(config, flags)
    end_with_launcher()
    with StopSignals():
        from textgen.diagnosis.checks import examine
        from textgen.diagnosis.process_group import ProcessGroup, check_world
        from textgen.diagnosis.results import as_json, as_table, merge

        group = ProcessGroup.join(config)
        several = group.size > 1
        checks = examine(group, config)
        everyone = group.gather({"machine": socket.gethostname(), "checks": [asdict(check) for check in checks]})
        everyone[0]["checks"].insert(0, asdict(check_world(group, everyone)))
        rows = merge(everyone)
        failed = any(row["status"] == "fail" for row in rows)
        if group.is_main:
            print(as_json(rows, everyone) if "--json" in argv else as_table(rows), flush=True)
        elif group.problem:
            # The report of the main process has this problem too. If the main process lives, it needs about as long as
            # this one, and then the launcher ends this one.
            time.sleep(PEER_WAIT_SECONDS)
            print(f"process {group.rank}: {group.problem}", file=sys.stderr)
        group.gather(None)  # no process ends before the main process has printed
    # With several processes always raise, so that `cli.run` ends the process without tearing down its process group: if
    # one process tears it down before another, that one aborts.
    if failed or several:
        raise SystemExit(int(failed))


def explain_profile_of(run_dir: Path) -> None:
    """Print where the time of a run's profiled steps went, and what to try.

    Raises:
        TextgenError: the run has no profile, or a damaged one.
    """
    if not run_dir.is_dir():
        raise TextgenError(f"`{run_dir}` is not a run folder")
    if not (traces := find_traces(run_dir)):
        raise TextgenError(f"`{run_dir}` has no profile: train with `--profile 20:23`")
    print("\n".join(explain_profile([read_profile(path) for path in traces])))
