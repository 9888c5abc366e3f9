"""Many steps of a batch at one launch: on a GPU, CUDA graphs of `generation.advance`.

A step of an LSTM is so short that launching its kernels one by one takes longer than running them. So a batch is laid
into buffers at fixed addresses, whole steps on them are captured once, and the host only replays: up to 32 steps at a
time, reading what one replay drew while the next one runs (docs/decisions/0012-graphs-of-whole-steps.md).

Nothing here was measured on a GPU so far: the constants are guesses.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from textgen.decoding.decoders import Decoder, DecoderState
from textgen.decoding.generation import Batch, Step, advance
from textgen.decoding.sampling import SamplingState, select_sampling_state
from textgen.kernels.capture import CudaCapture, Replay, reason_of

log = logging.getLogger("textgen")

# Steps that one graph may hold, and how many must have run before it is captured: that takes the host about as long as
# running its steps one by one, so no text takes much longer than without graphs, and a short one waits for none.
PATIENCE = {32: 64, 8: 16, 1: 16}

# Larger batches run without graphs.
MAX_ROWS = 512

# From so many rows on, rows may end in the middle of 8 steps: some row ends at nearly every step, and arranging the
# batch anew each time would cost more than the steps that ended rows idle through.
MANY_ROWS = 64

# Buffers kept with their graphs, one for each batch size (a power of two) and set of sampling in use.
MAX_SLOTS = 8


@dataclass
class Buffers:
    """A batch at fixed addresses: what a graph reads, changes and writes."""

    decoder: Decoder
    unk_id: int
    eos_id: int
    tokens: Tensor
    """to be read next, (rows,)"""
    state: DecoderState
    sampling: SamplingState
    ended: Tensor
    """rows that draw nothing any more but the end of the text: bool (rows,)"""
    drawn: Tensor
    """(steps, rows) of the latest steps"""
    told: tuple[Tensor, ...]
    """log-probabilities of the latest steps as `advance` returns them, each (steps, ...); empty if no row wants them"""

    @classmethod
    def like(cls, batch: Batch, num_rows: int) -> Buffers:
        """Return buffers for a batch's kind and `num_rows` rows, with anything in them."""

        def rows(value: Tensor, *, steps: tuple[int, ...] = ()) -> Tensor:
            return value.new_empty((*steps, num_rows, *value.shape[1:]))

        tokens, sampling, most = batch.tokens, batch.sampling, (max(PATIENCE),)
        told: tuple[Tensor, ...] = ()
        if sampling.logprobs is not None:
            of_drawn = torch.empty(1, device=tokens.device)
            of_likeliest = of_drawn.new_empty(1, min(sampling.logprobs, batch.decoder.vocab_size))
            told = (of_drawn, of_likeliest, of_likeliest.long())
        return cls(
            batch.decoder, batch.tokenizer.unk_id, batch.tokenizer.eos_id,
            rows(tokens), [rows(part) for part in batch.state],
            dataclasses.replace(sampling, tensors={name: rows(value) for name, value in sampling.tensors.items()}),
            rows(tokens).bool(), rows(tokens, steps=most), tuple(rows(part, steps=most) for part in told),
        )  # fmt: skip

    def load(self, batch: Batch) -> None:
        """Take a batch in. Rows beyond it are copies of its last one that have ended."""
        rows = torch.arange(len(self.tokens), device=self.tokens.device)
        places = rows.clamp(max=len(batch.samples) - 1)
        torch.index_select(batch.tokens, 0, places, out=self.tokens)
        for kept, part in zip(self.state, batch.state, strict=True):
            kept.copy_(part[places])
        for name, value in select_sampling_state(batch.sampling, places).tensors.items():
            self.sampling.tensors[name].copy_(value)
        self.ended.copy_(rows >= len(batch.samples))

    def unload(self, batch: Batch) -> None:
        """Bring a batch that was loaded up to date."""
        rows = torch.arange(len(batch.samples), device=self.tokens.device)
        batch.tokens, batch.state = self.tokens[rows], [part[rows] for part in self.state]
        batch.sampling = select_sampling_state(self.sampling, rows)

    def copy(self) -> Buffers:
        """Return the same at other addresses."""
        sampling = dataclasses.replace(
            self.sampling, tensors={name: value.clone() for name, value in self.sampling.tensors.items()}
        )
        return dataclasses.replace(
            self, tokens=self.tokens.clone(), state=[part.clone() for part in self.state], sampling=sampling,
            ended=self.ended.clone(), drawn=self.drawn.clone(), told=tuple(part.clone() for part in self.told),
        )  # fmt: skip


def steps_in_place(buffers: Buffers, count: int) -> None:
    """Draw `count` tokens of every row, in place; nothing waits for the device and no shape depends on data."""
    tokens, state = buffers.tokens, buffers.state
    for i in range(count):
        drawn, state, told = advance(
            buffers.decoder, tokens, state, buffers.sampling, unk_id=buffers.unk_id, eos_id=buffers.eos_id
        )
        tokens = drawn.masked_fill(buffers.ended, buffers.eos_id)
        buffers.ended.logical_or_(tokens == buffers.eos_id)
        buffers.drawn[i].copy_(tokens)
        for kept, part in zip(buffers.told, told or (), strict=True):
            kept[i].copy_(part)
    buffers.tokens.copy_(tokens)
    for kept, part in zip(buffers.state, state, strict=True):
        kept.copy_(part)


class GraphRunner:
    """Runs batches of a decoder from graphs.

    The first tokens of a new kind of batch are drawn step by step, on the same buffers, so that a row draws the same
    text with graphs and before there are any.

    Args:
        decoder: of all batches to come.
        capture: makes of buffers and a number of steps what runs `steps_in_place` on them again and again.
        max_slots: how many kinds of batches keep their buffers and graphs; the least recently used ones are dropped.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        capture: Callable[[Buffers, int], Replay] | None = None,
        max_slots: int = MAX_SLOTS,
    ) -> None:
        self._decoder, self._max_slots, self._busy, self._warned = decoder, max_slots, False, False
        self._capture = StepCapture(decoder.device) if capture is None else capture
        self._slots: OrderedDict[tuple[object, ...], _Slot] = OrderedDict()
        self._refused: set[tuple[object, ...]] = set()

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Iterator[Step]:
        """Draw tokens until a row has ended and all that was under way is told; then the batch is up to date.

        The caller pushes a step's tokens to the rows before it takes the next one, and none to rows that have ended.
        """
        if batch.decoder is not self._decoder or self._busy:
            raise RuntimeError("a runner of graphs runs one batch at a time, of its own decoder")
        if len(batch.samples) > MAX_ROWS:
            yield from batch.run()
            return
        slot = self._slot(batch)
        slot.buffers.load(batch)
        coming: deque[_Coming] = deque()
        self._busy = True
        try:
            while True:
                # one replay is read while another one runs
                while len(coming) < 2 and (count := self._launch(slot, _left(batch, coming), bool(coming))):
                    coming.append(_Coming(slot.buffers, count))
                if not coming:
                    break
                yield from coming.popleft().steps(batch)
        finally:
            self._busy = False
            for outputs in coming:  # nobody wants them, but a graph that runs must not be dropped
                outputs.wait()
        slot.buffers.unload(batch)

    def _slot(self, batch: Batch) -> _Slot:
        """Return buffers for a batch, and drop those that were used the longest time ago."""
        num_rows = 1 << (len(batch.samples) - 1).bit_length()
        key = (num_rows, *batch.sampling.features)
        if key not in self._slots:
            self._slots[key] = _Slot(key, Buffers.like(batch, num_rows))
        self._slots.move_to_end(key)
        while len(self._slots) > self._max_slots:
            self._slots.popitem(last=False)
        return self._slots[key]

    def _launch(self, slot: _Slot, left: int, something_comes: bool) -> int:
        """Start as many steps as are sure to be wanted, without waiting; return how many."""
        if left > 0 and len(slot.buffers.tokens) >= MANY_ROWS:
            left = max(left, 8)
        for count in (count for count in PATIENCE if count <= left and self._is_captured(slot, count)):
            slot.graphs[count]()
            break
        else:
            if left <= 0 or something_comes:  # launching single steps takes longer than running them: read at once
                return 0
            count = 1
            steps_in_place(slot.buffers, count)
        slot.num_steps += count
        return count

    def _is_captured(self, slot: _Slot, count: int) -> bool:
        """Capture a graph of so many steps where it is time to."""
        if count in slot.graphs or slot.num_steps < PATIENCE[count] or slot.key in self._refused:
            return count in slot.graphs
        try:
            slot.graphs[count] = self._capture(slot.buffers, count)
        except RuntimeError as error:
            self._refused.add(slot.key)
            if not self._warned:
                log.warning("steps that cannot be captured in a CUDA graph run one by one: %s", reason_of(error))
            self._warned = True
        return count in slot.graphs


@dataclass
class _Slot:
    """Buffers and their graphs by number of steps."""

    key: tuple[object, ...]
    buffers: Buffers
    graphs: dict[int, Replay] = field(default_factory=dict)
    num_steps: int = 0


class _Coming:
    """What the latest `count` steps drew, on its way to the host."""

    def __init__(self, buffers: Buffers, count: int) -> None:
        self.count = count
        # memory on the host is pinned where the copy is to go on in the background
        self._drawn, *self._told = (
            part[:count].to("cpu", non_blocking=True, copy=True) for part in (buffers.drawn, *buffers.told)
        )
        self._arrived: torch.cuda.Event | None = None
        if buffers.drawn.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(buffers.drawn.device))

    def wait(self) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()

    def steps(self, batch: Batch) -> Iterator[Step]:
        """Wait for it, and return it step by step."""
        self.wait()
        rows = slice(len(batch.samples))
        for i, tokens in enumerate(self._drawn[:, rows].tolist()):
            told = [part[i, rows] for part in self._told]
            yield tokens, batch.token_logprobs(tokens, *told) if told else None


def _left(batch: Batch, coming: deque[_Coming]) -> int:
    """Return how many tokens every row still lacks at least; 0 if one has ended."""
    if any(row.ended for row in batch.samples):
        return 0
    lacking = min(row.request.config.max_new_tokens - row.num_tokens for row in batch.samples)
    return lacking - sum(outputs.count for outputs in coming)


class StepCapture:
    """Captures steps of a batch in CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._capture = CudaCapture(device)

    def __call__(self, buffers: Buffers, count: int) -> Replay:
        """Return what replays the steps on the current stream; nothing is drawn here.

        Raises:
            RuntimeError: a step waits for the device, or something else that no graph can hold.
        """
        self._capture.warm_up(partial(steps_in_place, buffers.copy(), 1))
        return self._capture.record(partial(steps_in_place, buffers, count))
