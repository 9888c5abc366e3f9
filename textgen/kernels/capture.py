"""CUDA graphs: capture work on the device once, then replay it with one launch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress

import torch

from textgen.errors import first_line

Replay = Callable[[], None]
"""repeats captured work on the current stream"""


def reason_of(error: BaseException) -> str:
    """Return the first line of a failed capture's first error: ending that capture raises further errors."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return first_line(error)


class CudaCapture:
    """Captures steps in CUDA graphs. They share one memory pool: they run one after the other and keep nothing in it.

    `torch.cuda.graph` is not used: it hands all cached memory back to the device first, which a training that samples
    in between would have to ask for again; and its captures forbid much to the threads that save and track.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []
        self._first: torch.cuda.CUDAGraph | None = None  # kept alive: torch refuses a pool without graphs

    def record(self, work: Callable[[], None]) -> Replay:
        """Return what replays some work on the current stream, which must have run before; nothing is computed here.

        Raises:
            RuntimeError: the work waits for the device, or does something else that no graph can hold.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    graph.capture_end()
            except RuntimeError:
                # torch's allocator would take such a capture for one that goes on, and refuse to free memory for good
                self._failed.append(graph)  # which it may still ask
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
                # torch 2.11's allocator of pinned memory still records into this pool, and would refuse it
                self._pool, self._first = torch.cuda.graph_pool_handle(), None
                raise
        self._first = self._first or graph
        return graph.replay

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run work on the stream of captures: this loads kernels and gives cuBLAS its memory for this stream.

        Raises:
            RuntimeError: the work waits for the device.
        """
        current, mode = torch.cuda.current_stream(self._device), torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says once that this mode does not see everything
                torch.cuda.set_sync_debug_mode("error")
                work()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(self._stream)
