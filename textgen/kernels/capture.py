"""CUDA graphs: capture work on a GPU once, then replay all its kernels with one launch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress

import torch

from textgen.errors import first_line

Replay = Callable[[], None]
"""Repeats captured work on the current stream."""


def reason_of(error: BaseException) -> str:
    """Return the first line of a failed capture's first error: ending that capture raises further errors."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return first_line(error)


class CudaCapture:
    """Captures steps in CUDA graphs that share one memory pool.

    Sharing is safe because graphs run one after the other and no result stays in the pool.

    `torch.cuda.graph` is not used, for two reasons. It returns all cached memory to the device first; a training that
    samples between steps would have to allocate it again. And its captures forbid CUDA calls of other threads, which
    save and track.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []
        self._first: torch.cuda.CUDAGraph | None = None  # kept alive: torch refuses a pool without graphs

    def record(self, work: Callable[[], None]) -> Replay:
        """Capture work and return a function that replays it on the current stream. Nothing is computed here.

        The work must have run before, see `warm_up`.

        Raises:
            RuntimeError: the work waits for the device, or does something else that a graph cannot hold.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            try:
                self._begin(graph)
                try:
                    work()
                finally:
                    graph.capture_end()
            except RuntimeError:
                # torch's allocator would treat the failed capture as unfinished, and never free memory again
                self._failed.append(graph)  # kept alive: the allocator may still use it
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
                # torch 2.11's allocator of pinned memory still records into this pool, and would refuse it
                self._pool, self._first = torch.cuda.graph_pool_handle(), None
                try:
                    self._free_generator()
                except RuntimeError:
                    self._pool = torch.cuda.graph_pool_handle()
                raise
        self._first = self._first or graph
        return graph.replay

    def _begin(self, graph: torch.cuda.CUDAGraph) -> None:
        """Begin a capture.

        The first graph makes the tensors in which torch's generator keeps seed and offset of all graphs. Made in
        inference mode, as text is drawn, they would refuse the capture of a training step.
        """
        with torch.inference_mode(mode=False):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _free_generator(self) -> None:
        """Capture a graph that nobody replays: after a failure torch's generator needs a capture that works."""
        graph, value = torch.cuda.CUDAGraph(), torch.zeros(1, device=self._device)
        self._begin(graph)
        try:
            value.zero_()
        finally:
            graph.capture_end()
        self._first = graph

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run work on the stream of captures. This loads its kernels and allocates cuBLAS's workspace for the stream.

        Raises:
            RuntimeError: the work waits for the device.
        """
        current, mode = torch.cuda.current_stream(self._device), torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns once that this mode misses some waits
                torch.cuda.set_sync_debug_mode("error")
                work()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(self._stream)
