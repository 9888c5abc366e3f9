"""Optimizer steps from a CUDA graph: everything between a batch and the updated weights, in one launch.

A step runs many short kernels. Launching them one by one may take longer than running them. All shapes of a training
are fixed, so a step can be captured once. The values that differ from step to step are copied into tensors at fixed
addresses, and the host only replays the graph (docs/decisions/0018-steps-on-a-gpu.md). Nothing here was measured on a
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

# Plain steps before the capture. They load kernels and create Adam's state. torch's notes on CUDA graphs use three.
WARM_UP = 3


Capture = Callable[[Callable[[], None]], Replay]
"""captures a function that has run before, and returns a function that replays it"""


class StepGraph:
    """Takes the first steps plainly and the later ones from a graph. Both compute the same.

    Args:
        capture: makes the graph. Tests pass a plain function, which runs the same work without a graph.
    """

    warming = WARM_UP + 1
    """number of first steps that take longer than the later ones: the plain steps and the capture"""

    def __init__(self, capture: Capture) -> None:
        self._capture, self._is_refused = capture, False
        self.forget()

    @property
    def is_refused(self) -> bool:
        """Whether a capture has failed: every step is then taken without a graph."""
        return self._is_refused

    def forget(self) -> None:
        """Drop the graph, because weights, optimizer or batches will be at other addresses."""
        self._count = 0
        self._replay: Replay | None = None

    def take(self, compute: Compute, inputs: StepInputs, record: StepRecord) -> Tensor:
        """Take a step with the same results as `compute(inputs, record)`. Nothing waits for the device."""
        self._count += 1
        if self._replay is None and self._count > WARM_UP and not self._is_refused:
            self._capture_step(compute, inputs)
        if self._replay is None:
            return compute(inputs, record)
        self._inputs.load(inputs)
        self._replay()
        inputs.states[:] = self._inputs.states
        nats, record.norm, *parts = self._results.clone().unbind()  # the next replay overwrites the results
        lanes = (batch["lanes"] for batch in inputs.micro_batches)
        record.parts[:] = zip(lanes, parts, strict=True)
        return nats

    def _capture_step(self, compute: Compute, inputs: StepInputs) -> None:
        """Capture a step on copies of its inputs. If that fails, log it once; all later steps are plain."""
        static = inputs.copy()
        results = torch.empty(2 + len(static.micro_batches), device=static.micro_batches[0]["tokens"].device)

        # The work must leave its results at fixed addresses: the nats, the norm and each micro-batch's nats in
        # `results`, the new LSTM states in place of the old ones.
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
            log.warning(
                "the step cannot be captured in a CUDA graph, so each step runs without one: %s", reason_of(error)
            )
        self._inputs, self._results = static, results
