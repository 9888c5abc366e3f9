"""A model whose layers run side by side on a GPU: an experiment for `benchmarks.train`, not measured on a GPU so far.

A window is cut into pieces along time. Layer i may read piece p as soon as layer i - 1 has written it, while layer
i - 1 goes on to piece p + 1. On CUDA each layer has a stream, so that small kernels of several layers run at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from textgen.model.lstm import DropoutMasks, LSTMLanguageModel, State

# One stream per layer and device. They are kept: a CUDA graph and torch's allocator know streams by identity.
_STREAMS: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


class WavefrontModel(LSTMLanguageModel):
    """An LSTMLanguageModel that computes its layers in pieces of the window, diagonal by diagonal.

    Args:
        num_pieces: pieces of a window; 1 is the plain order.
    """

    def __init__(self, *args: Any, num_pieces: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_pieces = num_pieces

    def run_layers(self, x: Tensor, states: list[State], masks: DropoutMasks | None) -> tuple[Tensor, list[State]]:
        """Run the layers, each one piece of the window behind the layer below it.

        Autograd runs the backward pass of an operation on the stream of its forward pass. So layers overlap there too.
        """
        if self.num_pieces == 1:
            return super().run_layers(x, states, masks)
        states, pieces = list(states), list(x.chunk(self.num_pieces, 1))  # each (batch, time / num_pieces, size)
        weight_masks: list[Tensor | None] = []
        # the caller's stream, then one for each layer
        streams = _streams(x.device, len(states)) if x.is_cuda else [None] * (len(states) + 1)
        # On diagonal d layer i computes piece d - i. The input of a piece, from layer i - 1, is of diagonal d - 1.
        for diagonal in range(len(pieces) + len(states) - 1):
            first, last = max(diagonal - len(pieces) + 1, 0), min(diagonal, len(states) - 1)
            # From the last layer down: at that time the stream of the layer below ends with the piece to be read. In
            # the other order it would also hold that layer's next piece, and layer i would wait for both.
            for i in range(last, first - 1, -1):
                piece = pieces[diagonal - i]
                with _on_stream(streams[i + 1], piece, *states[i], after=streams[i]):
                    if i == diagonal:  # the layer's first piece
                        weight_masks.append(self.weight_mask(masks, i))
                    pieces[diagonal - i], states[i] = self.run_layer(i, piece, states[i], masks, weight_masks[i])
        # The caller's stream waits for all layers, then joins the pieces.
        for state, stream in zip(states, streams[1:], strict=True):
            with _on_stream(streams[0], *state, after=stream):
                pass
        with _on_stream(streams[0], *pieces, after=streams[-1]):
            return torch.cat(pieces, 1), states


def _streams(device: torch.device, count: int) -> list[torch.cuda.Stream | None]:
    """Return the current stream, then `count` others, always the same ones."""
    for _ in range(len(_STREAMS[device]), count):
        _STREAMS[device].append(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    return [torch.cuda.current_stream(device), *_STREAMS[device][:count]]


@contextmanager
def _on_stream(stream: torch.cuda.Stream | None, *used: Tensor, after: torch.cuda.Stream | None) -> Iterator[None]:
    """Run the block on `stream`, after pending work on `after`; without streams, just run it.

    Args:
        stream: runs the block.
        used: tensors from `after` that the block reads.
        after: the stream whose pending work the block waits for.
    """
    if stream is None or after is None:
        yield
        return
    stream.wait_stream(after)
    for tensor in used:  # else torch's allocator could reuse their memory while this stream still reads it
        tensor.record_stream(stream)
    with torch.cuda.stream(stream):
        yield
