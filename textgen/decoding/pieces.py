"""Short prompts read side by side on a GPU, in pieces of one shape.

Every piece has the same number of rows and of tokens, and unused places read token 0. So the same kernels run whatever
prompts come together, and a prompt's state depends on its own tokens alone. For the same reason one CUDA graph reads
every piece (docs/explanation/decoding-on-a-gpu.md). Not measured on a GPU.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import torch

from textgen.decoding.decoders import Decoder, DecoderState
from textgen.kernels.capture import CudaCapture, Replay, reason_of

log = logging.getLogger("textgen")

# Prompts of a piece, the rows of a decoder's smallest tile, and tokens of each.
ROWS, TOKENS = 16, 32


class PieceReader:
    """Reads prompts of a decoder by its steps.

    Args:
        decoder: reads the tokens.
        capture: runs work once, and returns a function that repeats it; default a CUDA graph.
    """

    def __init__(self, decoder: Decoder, *, capture: Callable[[Callable[[], None]], Replay] | None = None) -> None:
        self._decoder, self._capture = decoder, _capture_on(decoder.device) if capture is None else capture
        self._state = [part.repeat(ROWS, 1) for part in decoder.prefill([0])]
        self._tokens = torch.zeros(TOKENS, ROWS, dtype=torch.int64, device=decoder.device)
        # states after each token, (tokens, parts, rows, hidden_size)
        self._after = self._state[0].new_empty(TOKENS, len(self._state), *self._state[0].shape)
        self._replay: Replay | None = None
        self._captured: tuple[str, ...] | None = None
        """kernels that the graph has, or that could not be captured"""
        self._was_used = False
        self._lock = threading.Lock()

    @torch.inference_mode()
    def read(self, prompts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], DecoderState]:
        """Return the states (1, ...) after all tokens but the last of each prompt."""
        states: dict[tuple[int, ...], DecoderState] = {}
        longest_first = sorted(prompts, key=len, reverse=True)
        with self._lock:
            for first in range(0, len(prompts), ROWS):
                self._prepare()
                states |= self._read_together(longest_first[first : first + ROWS])
        return states

    def _read_together(self, prompts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], DecoderState]:
        """Read up to `ROWS` prompts, the longest first."""
        states: dict[tuple[int, ...], DecoderState] = {
            ids: [torch.zeros_like(part[:1]) for part in self._state] for ids in prompts if len(ids) == 1
        }
        num_pieces = -(-(len(prompts[0]) - 1) // TOKENS)
        tokens = torch.zeros(num_pieces, TOKENS, ROWS, dtype=torch.int64)
        for row, ids in enumerate(prompts):
            tokens.view(-1, ROWS)[: len(ids) - 1, row] = torch.tensor(ids[:-1], dtype=torch.int64)
        tokens = tokens.to(self._tokens.device)
        torch._foreach_zero_(self._state)
        for piece in range(num_pieces):
            self._tokens.copy_(tokens[piece])
            (self._replay or self._read_piece)()
            for row, ids in enumerate(prompts):
                last = len(ids) - 2 - piece * TOKENS  # place of its last token that is read
                if 0 <= last < TOKENS:
                    states[ids] = [part.clone() for part in self._after[last, :, row : row + 1]]
        return states

    def _read_piece(self) -> None:
        """Read the tokens, in place. A graph can hold this function."""
        state = self._state
        for i in range(TOKENS):
            state = self._decoder.read(self._tokens[i], state)
            torch.stack(state, out=self._after[i])
        torch._foreach_copy_(self._state, state)

    def _prepare(self) -> None:
        """Capture the graph if the decoder runs in graphs, from the second use on: a single prompt waits for none."""
        kernels = self._decoder.fused
        if self._decoder.in_graphs and self._was_used and self._captured != kernels:
            self._replay, self._captured = None, kernels
            try:
                self._replay = self._capture(self._read_piece)
            except RuntimeError as error:
                log.warning("prompts are read without a CUDA graph: %s", reason_of(error))
        self._was_used = True


def _capture_on(device: torch.device) -> Callable[[Callable[[], None]], Replay]:
    """Return a function that runs work once on a GPU, and captures it."""

    def capture(work: Callable[[], None]) -> Replay:
        captured = CudaCapture(device)
        captured.warm_up(work)
        return captured.record(work)

    return capture
