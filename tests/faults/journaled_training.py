"""Trains as train_distributed.py does, and notes every micro-batch: the exact bits of its loss, and what it was of.

Each process appends to a file of its own in `$TEXTGEN_JOURNAL`, named after `$TEXTGEN_LAUNCH` and its rank. A line is
written whole and at once, so that a killed process leaves what it had done. Nothing of the product is changed.
"""

from __future__ import annotations

import functools
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from textgen import cli
from textgen.commands import train


def journal() -> None:
    """Wrap `textgen.training.loop.train_step`."""
    import torch

    from textgen.data import lanes
    from textgen.training import loop as training
    from textgen.training import step as steps

    path = Path(os.environ["TEXTGEN_JOURNAL"]) / f"{os.environ['TEXTGEN_LAUNCH']}-{os.environ.get('RANK', '0')}"
    file = path.open("a", buffering=1)
    epochs: dict[int, int] = {}  # epoch of a micro-batch, by the checksum of its tokens

    def checksum(tokens: torch.Tensor) -> int:
        return zlib.crc32(tokens.contiguous().numpy().tobytes())

    class NotedWindows(lanes._Windows):
        def __getitems__(self, rows: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
            batch = super().__getitems__(rows)
            assert self._epoch is not None
            epochs[checksum(batch["tokens"])] = self._epoch.number
            return batch

    original = steps.train_step

    @functools.wraps(original)
    def train_step(job: steps.Learner, micro_batches: Sequence[dict[str, torch.Tensor]], **options: Any) -> Any:
        nats = original(job, micro_batches, **options)
        record = job.recent[-1]
        lines = []
        for micro, (batch, (rows, part)) in enumerate(zip(micro_batches, record.parts, strict=True)):
            read = checksum(batch["tokens"])
            windows = batch["windows"].tolist()
            entry = [record.step, micro, epochs[read], windows, rows.tolist(), read, float(part).hex()]
            lines.append(json.dumps(entry) + "\n")
        file.write("".join(lines))
        file.flush()
        return nats

    lanes._Windows = NotedWindows  # type: ignore[misc]
    training.train_step = train_step


def main() -> None:
    """Train; the wrapping waits until the flags are read, since it imports torch."""
    start_log = train.start_log

    def start_log_and_journal() -> None:
        start_log()
        journal()

    train.start_log = start_log_and_journal
    cli.train_main()


if __name__ == "__main__":
    main()
