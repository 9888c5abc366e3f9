"""The processes of a diagnosis: they join as those of a training do, and survive the loss of one of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from textgen.config import TrainConfig
from textgen.diagnosis.results import Check
from textgen.distributed import launch
from textgen.errors import first_line

T = TypeVar("T")

# Processes wait this long for each other, or for `--distributed_timeout` if it is shorter. The slowest of many machines
# may need a minute to import torch from a cold network disk.
JOIN_SECONDS = 120.0


class ProcessGroup:
    """The processes that joined. After a failed join, or the loss of a process, this process continues alone.

    Attributes:
        accelerator: joins the processes; None if this process is alone because of a problem.
        problem: the reason why this process is alone; empty without a problem.
        is_main: whether this process prints the report.
    """

    def __init__(self, accelerator: Accelerator | None, *, problem: str = "") -> None:
        self.accelerator, self.problem = accelerator, problem
        self.is_main = self.rank == 0

    @classmethod
    def join(cls, config: TrainConfig) -> ProcessGroup:
        """Join the other processes as a training does. Collective."""
        try:
            accelerator = launch.start(
                config.mixed_precision,
                batch_size=config.batch_size,
                gradient_accumulation_steps=config.gradient_accumulation_steps,
                model=config.model,
                seq_len=config.seq_len,
                timeout=min(config.distributed_timeout, JOIN_SECONDS),
                elastic=config.elastic,
            )
        except (ValueError, RuntimeError) as error:  # TextgenError, or some processes did not come in time
            return cls(None, problem=first_line(error))
        return cls(accelerator)

    @property
    def rank(self) -> int:
        """Number of this process; the launcher's number if this process is alone."""
        if self.accelerator is not None:
            return int(self.accelerator.process_index)
        return int(os.environ.get("RANK", "0"))

    @property
    def size(self) -> int:
        """Number of processes, this one included."""
        return 1 if self.accelerator is None else int(self.accelerator.num_processes)

    @property
    def precision(self) -> str | None:
        """Precision of the training; None if the processes did not join."""
        return None if self.accelerator is None else str(self.accelerator.mixed_precision)

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        if self.accelerator is not None:
            return torch.device(self.accelerator.device.type, self.accelerator.device.index)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, by rank. Collective.

        Args:
            value: plain values that JSON can hold. They are sent as tensors of bytes, so no process unpickles anything.
        """
        return self.attempt(lambda: self._gather(value), otherwise=[value])

    def _gather(self, value: Any) -> list[Any]:
        if self.accelerator is None or self.size == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.accelerator.gather(torch.tensor([len(content)], device=self.device)).tolist()
        # All rows of a gather have one length: pad to the longest content.
        row = torch.zeros((1, max(sizes)), dtype=torch.uint8)
        row[0, : len(content)] = content
        rows = self.accelerator.gather(row.to(self.device)).cpu()  # (processes, bytes)
        return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]

    def attempt(self, action: Callable[[], T], *, otherwise: T) -> T:
        """Run a collective action; if a process is lost, return `otherwise` and continue alone from now on."""
        try:
            return action()
        except RuntimeError as error:
            self.accelerator = None
            self.problem = self.problem or f"another process has ended, or did not answer: {first_line(error)}"
            return otherwise


def check_world(group: ProcessGroup, everyone: Sequence[Mapping[str, Any]]) -> Check:
    """Report the processes that joined; fail if they are not the promised ones.

    Args:
        group: the processes.
        everyone: for each process a mapping with its `machine`.
    """
    if group.problem:
        return Check("world", "fail", {}, group.problem)
    assert group.accelerator is not None
    initialized = torch.distributed.is_initialized()
    value = {
        "processes": group.size,
        "machines": len({one["machine"] for one in everyone}),
        "backend": torch.distributed.get_backend() if initialized else "none",
        "device": group.device.type,
        "precision": str(group.accelerator.mixed_precision),
    }
    return Check("world", "ok", value)
