"""Which of the Triton kernels of triton_training.py a device has: Triton may be missing, or not work."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch

from textgen.errors import first_line

log = logging.getLogger("textgen")


def kernels(device: torch.device) -> ModuleType | None:
    """Return triton_training.py if its kernels run on a device; None on CPUs, which do not import Triton."""
    return _on_gpu(device) if device.type == "cuda" else None


@functools.cache
def _on_gpu(device: torch.device) -> ModuleType | None:
    """Return triton_training.py; None, with a line in the log, if Triton cannot be imported or cannot compile."""
    try:
        from textgen.kernels import triton_training

        triton_training.weight_mask(1, step=0, seed=0, site=0, dropped=1, device=device)
    except Exception as error:  # no Triton, no C compiler for it, a GPU that it does not know
        log.info("Triton's kernels cannot be used, so torch's operators take their place: %s", first_line(error))
        return None
    return triton_training
