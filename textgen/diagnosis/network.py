"""Checks between processes: sums and speed of an all-reduce, and the clocks."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, distributed

from textgen.diagnosis.process_group import ProcessGroup
from textgen.diagnosis.results import Check
from textgen.diagnosis.timing import median_seconds

LATENCY_ROUNDS = 100
BANDWIDTH_ROUNDS = 5
BANDWIDTH_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
CLOCK_ROUNDS = 30
MAX_CLOCK_SECONDS = 1.0


def check_all_reduce(group: ProcessGroup, all_reduce: Callable[[Tensor], object] | None = None) -> Check:
    """Check that a sum over all processes is right, and measure its latency and bandwidth. Collective.

    Algorithm bandwidth is bytes over seconds. Bus bandwidth is 2 (n - 1) / n times that for n processes, so it does not
    depend on n (nccl-tests, doc/PERFORMANCE.md).

    Args:
        group: the processes.
        all_reduce: sums a tensor in place; None for torch's.
    """
    if group.size == 1:
        return Check("all_reduce", "ok", {"skipped": "one process"})
    advice = "a process was lost: look for its error message; set NCCL_DEBUG=INFO for details"
    lost = Check("all_reduce", "fail", {}, advice)
    return group.attempt(lambda: _measure_all_reduce(group, all_reduce or distributed.all_reduce), otherwise=lost)


def _measure_all_reduce(group: ProcessGroup, all_reduce: Callable[[Tensor], object]) -> Check:
    device, count = group.device, BANDWIDTH_BYTES[group.device.type] // 4
    pattern = torch.arange(count, device=device).remainder(251).float()  # sums of small integers are exact in float32
    summed = pattern + group.rank
    all_reduce(summed)
    wrong = int((summed != pattern * group.size + group.size * (group.size - 1) / 2).sum())
    small, large = torch.zeros(1, device=device), torch.zeros(count, device=device)
    latency = median_seconds(lambda: all_reduce(small), device, rounds=LATENCY_ROUNDS)
    seconds = median_seconds(lambda: all_reduce(large), device, rounds=BANDWIDTH_ROUNDS)
    algorithm = 4 * count / seconds / 1e9
    value = {
        "latency_us": latency * 1e6,
        "mib": 4 * count / (1 << 20),
        "algorithm_gb_per_s": algorithm,
        "bus_gb_per_s": algorithm * 2 * (group.size - 1) / group.size,
    }
    if wrong:
        advice = (
            "sums over the processes are wrong, so do not train on these machines: set NCCL_DEBUG=INFO for details, "
            "or try NCCL_P2P_DISABLE=1"
        )
        return Check("all_reduce", "fail", value | {"wrong_sums": wrong}, advice)
    return Check("all_reduce", "ok", value)


def check_clocks(group: ProcessGroup, clock: Callable[[], float] = time.time) -> Check:
    """Compare the clocks of all processes. Collective.

    No process leaves an all-reduce before all have entered it. So in each round the clock of process i is ahead of the
    clock of process 0 by at least entry i - exit 0 and at most exit i - entry 0. Several rounds narrow these bounds.

    Args:
        group: the processes.
        clock: returns seconds.
    """
    if group.size == 1:
        return Check("clocks", "ok", {"skipped": "one process"})
    token = torch.zeros(1, device=group.device)

    def measure() -> list[tuple[float, float]]:
        rounds = []
        for _ in range(CLOCK_ROUNDS):
            entry = clock()
            distributed.all_reduce(token)
            token.item()  # on CUDA, waits for the end of the all-reduce
            rounds.append((entry, clock()))
        return rounds

    everyone = group.gather(group.attempt(measure, otherwise=[(0.0, 0.0)]))
    ahead, width = [0.0], [0.0]  # seconds ahead of process 0, and half the distance of the bounds
    for rounds in everyone[1:]:
        pairs = list(zip(rounds, everyone[0], strict=True))
        low = max(entry - first_exit for (entry, _), (_, first_exit) in pairs)
        high = min(exit_ - first_entry for (_, exit_), (first_entry, _) in pairs)
        ahead.append((low + high) / 2)
        width.append(abs(high - low) / 2)
    last, first = ahead.index(max(ahead)), ahead.index(min(ahead))
    apart, uncertain = ahead[last] - ahead[first], sum(sorted(width)[-2:])
    value = {"apart_ms": apart * 1e3, "uncertainty_ms": uncertain * 1e3}
    if apart - uncertain > MAX_CLOCK_SECONDS:
        advice = (
            f"the clocks of processes {first} and {last} differ by {apart:,.1f} s: synchronise them with chrony or ntpd"
        )
        return Check("clocks", "warn", value, advice)
    return Check("clocks", "ok", value)
