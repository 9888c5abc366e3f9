"""Optimizer steps at one launch each: on a GPU, a CUDA graph of everything between a batch and the updated weights.

A window's kernels are short and many, and launching them one by one may take longer than running them. All shapes of a
training are fixed, so a step can be captured once: what differs from step to step is laid into tensors at fixed
addresses, and the host only replays (docs/decisions/0018-steps-on-a-gpu.md). Nothing here was measured on a
GPU so far.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from textgen.kernels.capture import Replay, reason_of
from textgen.training.step import Compute, StepInputs, StepRecord

log = logging.getLogger("textgen")

# Steps that are taken as they come before one is captured: they load kernels and make Adam's state. torch's notes on
# graphs take three.
WARM_UP = 3


Capture = Callable[[Callable[[], None]], Replay]
"""makes of work that has run before what does it again and again"""


class StepGraph:
    """Takes steps from a graph, after a few that are taken as they come; those and these compute the same.

    Args:
        capture: what makes the graph; a plain function in its place does everything but that.
    """

    warming = WARM_UP + 1
    """steps that take longer than those to come: before there is a graph, and the one that makes it"""

    def __init__(self, capture: Capture) -> None:
        self._capture, self._is_refused = capture, False
        self.forget()

    @property
    def is_refused(self) -> bool:
        """Whether a capture has failed: every step is then taken without a graph."""
        return self._is_refused

    def forget(self) -> None:
        """Drop the graph, which must not run: weights, optimizer or batches will be at other addresses."""
        self._count = 0
        self._replay: Replay | None = None

    def take(self, compute: Compute, inputs: StepInputs, record: StepRecord) -> Tensor:
        """Take a step as `compute` does: the same tensors change, and nothing waits for the device."""
        self._count += 1
        if self._replay is None and self._count > WARM_UP and not self._is_refused:
            self._capture_step(compute, inputs)
        if self._replay is None:
            return compute(inputs, record)
        self._inputs.load(inputs)
        self._replay()
        inputs.states[:] = self._inputs.states
        nats, record.norm, *parts = self._results.clone().unbind()  # the next replay writes where these were
        lanes = (batch["lanes"] for batch in inputs.micro_batches)
        record.parts[:] = zip(lanes, parts, strict=True)
        return nats

    def _capture_step(self, compute: Compute, inputs: StepInputs) -> None:
        """Capture a step on copies of its inputs; where that cannot be done, say so once."""
        static = inputs.copy()
        results = torch.empty(2 + len(static.micro_batches), device=static.micro_batches[0]["tokens"].device)

        def work() -> None:
            made, record = dataclasses.replace(static, states=list(static.states)), StepRecord(0, [])
            nats = compute(made, record)
            assert record.norm is not None
            torch.stack([nats, record.norm, *(part for _, part in record.parts)], out=results)
            for before, after in zip(static.states, made.states, strict=True):
                for kept, value in zip(before, after, strict=True):
                    kept.copy_(value)

        try:
            self._replay = self._capture(work)
        except RuntimeError as error:
            self._is_refused = True
            log.warning("the step cannot be captured in a CUDA graph, so steps are taken without: %s", reason_of(error))
        self._inputs, self._results = static, results
