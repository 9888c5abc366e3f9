"""The state of a process that a training changes, and its restoration."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch


@contextmanager
def process_as_before() -> Iterator[None]:
    """Restore this process: environment, random generators, torch's switches, Accelerate's state.

    Accelerate's states are class attributes, and an `Accelerator` of another precision is refused while they are set.
    """
    # Not imported for a `load`: half of what textgen takes beside torch.
    from accelerate.state import AcceleratorState, GradientState, PartialState

    environment = dict(os.environ)
    states = [PartialState._shared_state, AcceleratorState._shared_state, GradientState._shared_state]
    kept = [dict(state) for state in states]
    python, numpy_state, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    tf32 = torch.backends.cudnn.allow_tf32
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(gpus))
        for state in states:
            state.clear()
        try:
            yield
        finally:
            for state, values in zip(states, kept, strict=True):
                state.clear()
                state.update(values)
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)
            random.setstate(python)
            np.random.set_state(numpy_state)
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
            torch.backends.cudnn.allow_tf32 = tf32
