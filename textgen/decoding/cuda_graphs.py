"""Many steps of a batch with one launch: on a GPU, CUDA graphs of `batch.advance`.

A step of an LSTM is so short that launching its kernels one by one takes longer than running them. So `Buffers` keeps a
batch at fixed addresses, whole steps on these buffers are captured once as a graph, and the host only replays graphs of
up to 32 steps. It reads the tokens of one replay while the next one runs
(docs/decisions/0012-graphs-of-whole-steps.md).

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

from textgen.decoding.batch import Batch, Step, advance
from textgen.decoding.decoders import Decoder, DecoderState
from textgen.decoding.sampling import SamplingState, select_sampling_state
from textgen.kernels.capture import CudaCapture, Replay, reason_of

log = logging.getLogger("textgen")

# Steps of a graph, the longest first, and the number of steps that must have run before it is captured. A capture takes
# the host about as long as running its steps one by one, so no text takes much longer than without graphs, and a short
# text waits for no capture.
CAPTURE_AFTER = {32: 64, 8: 16, 1: 16}

# Larger batches run without graphs.
MAX_ROWS = 512

# In a batch of this many rows or more, a sample may end in the middle of a graph of 8 steps. Some sample ends at nearly
# every step, and building the batch again each time would cost more than the idle rows of the ended samples.
MANY_ROWS = 64

# Kinds of batches (a number of rows, a power of two, and a set of sampling features) that keep buffers and graphs.
MAX_SLOTS = 8


@dataclass
class Buffers:
    """A batch at fixed addresses: the tensors that a graph reads, changes and writes."""

    decoder: Decoder
    unk_id: int
    eos_id: int
    tokens: Tensor
    """the tokens that the next step reads, (rows,)"""
    state: DecoderState
    sampling: SamplingState
    ended: Tensor
    """bool (rows,): rows that draw the end-of-text token from now on"""
    drawn: Tensor
    """tokens of the latest steps, (steps, rows)"""
    logprobs: tuple[Tensor, ...]
    """log-probabilities of the latest steps as `advance` returns them, each (steps, rows, ...); empty if no row asks
    for them"""

    @classmethod
    def like(cls, batch: Batch, num_rows: int) -> Buffers:
        """Return buffers of `num_rows` rows for batches like this one, with undefined values."""

        def empty(value: Tensor, *, steps: tuple[int, ...] = ()) -> Tensor:
            return value.new_empty((*steps, num_rows, *value.shape[1:]))

        tokens, sampling, steps = batch.tokens, batch.sampling, (max(CAPTURE_AFTER),)
        logprobs: tuple[Tensor, ...] = ()
        if sampling.logprobs is not None:
            of_drawn = torch.empty(1, device=tokens.device)
            of_likeliest = of_drawn.new_empty(1, min(sampling.logprobs, batch.decoder.vocab_size))
            logprobs = (of_drawn, of_likeliest, of_likeliest.long())
        return cls(
            batch.decoder,
            batch.tokenizer.unk_id,
            batch.tokenizer.eos_id,
            empty(tokens),
            [empty(part) for part in batch.state],
            dataclasses.replace(sampling, tensors={name: empty(value) for name, value in sampling.tensors.items()}),
            empty(tokens).bool(),
            empty(tokens, steps=steps),
            tuple(empty(part, steps=steps) for part in logprobs),
        )

    def load(self, batch: Batch) -> None:
        """Copy a batch into the buffers. The rows after it get copies of its last row, marked as ended."""
        rows = torch.arange(len(self.tokens), device=self.tokens.device)
        sources = rows.clamp(max=len(batch.samples) - 1)
        torch.index_select(batch.tokens, 0, sources, out=self.tokens)
        for kept, part in zip(self.state, batch.state, strict=True):
            kept.copy_(part[sources])
        for name, value in select_sampling_state(batch.sampling, sources).tensors.items():
            self.sampling.tensors[name].copy_(value)
        self.ended.copy_(rows >= len(batch.samples))

    def unload(self, batch: Batch) -> None:
        """Copy tokens and states back to the batch that was loaded."""
        rows = torch.arange(len(batch.samples), device=self.tokens.device)
        batch.tokens, batch.state = self.tokens[rows], [part[rows] for part in self.state]
        batch.sampling = select_sampling_state(self.sampling, rows)

    def copy(self) -> Buffers:
        """Return buffers with the same values at other addresses."""
        tensors = {name: value.clone() for name, value in self.sampling.tensors.items()}
        return dataclasses.replace(
            self,
            tokens=self.tokens.clone(),
            state=[part.clone() for part in self.state],
            sampling=dataclasses.replace(self.sampling, tensors=tensors),
            ended=self.ended.clone(),
            drawn=self.drawn.clone(),
            logprobs=tuple(part.clone() for part in self.logprobs),
        )


def steps_in_place(buffers: Buffers, count: int) -> None:
    """Draw `count` tokens of every row, in place.

    A graph can hold this function: the host does not wait for the device, and no shape depends on data.
    """
    tokens, state = buffers.tokens, buffers.state
    for i in range(count):
        # a row that has ended keeps its place until the host takes it out
        tokens, state, logprobs = advance(
            buffers.decoder,
            tokens,
            state,
            buffers.sampling,
            unk_id=buffers.unk_id,
            eos_id=buffers.eos_id,
            ended=buffers.ended,
            out=buffers.drawn[i],
        )
        for kept, part in zip(buffers.logprobs, logprobs or (), strict=True):
            kept[i].copy_(part)
    # only now: `advance` returns new tensors, and the next replay reads from the buffers
    buffers.tokens.copy_(tokens)
    torch._foreach_copy_(buffers.state, state)


class GraphRunner:
    """Runs the batches of a decoder with graphs; `generate_stream` takes it as `run`.

    The first steps of a new kind of batch run one by one on the same buffers, so that a row draws the same text before
    and after the capture.

    Args:
        decoder: the decoder of all batches.
        capture: returns a function that runs `steps_in_place` on the given buffers, for the given number of steps, each
            time it is called; default `StepCapture`.
        max_slots: number of kinds of batches that keep buffers and graphs; the least recently used ones are dropped.
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
        """kinds of batches that cannot be captured"""

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Iterator[Step]:
        """Draw tokens until a sample has ended and all launched steps are yielded; then the batch is up to date.

        The caller pushes each step's tokens to the samples before it takes the next step, and pushes none to samples
        that have ended.

        Raises:
            RuntimeError: the batch has another decoder, or another batch runs.
        """
        if batch.decoder is not self._decoder or self._busy:
            raise RuntimeError("a GraphRunner runs one batch at a time, with its own decoder")
        if len(batch.samples) > MAX_ROWS or batch.is_guided:  # guides wait for each token on the host
            yield from batch.run()
            return
        slot = self._slot(batch)
        slot.buffers.load(batch)
        pending: deque[_PendingSteps] = deque()
        self._busy = True
        try:
            while True:
                # keep two launches in flight: the host reads the first while the second runs
                while len(pending) < 2 and (count := self._launch(slot, _remaining(batch, pending), bool(pending))):
                    pending.append(_PendingSteps(slot.buffers, count))
                if not pending:
                    break
                yield from pending.popleft().steps(batch)
        finally:
            self._busy = False
            for steps in pending:  # not read any more, but a graph must not be dropped while it runs
                steps.wait()
        slot.buffers.unload(batch)

    def _slot(self, batch: Batch) -> _Slot:
        """Return the slot of a batch's kind; make it if it is missing, and drop the least recently used slots."""
        num_rows = 1 << (len(batch.samples) - 1).bit_length()
        # graphs captured before a kernel was replaced would still replay it
        key = (num_rows, batch.decoder.fused, *batch.sampling.features)
        if key not in self._slots:
            self._slots[key] = _Slot(key, Buffers.like(batch, num_rows))
        self._slots.move_to_end(key)
        while len(self._slots) > self._max_slots:
            self._slots.popitem(last=False)
        return self._slots[key]

    def _launch(self, slot: _Slot, remaining: int, has_pending: bool) -> int:
        """Start steps without waiting for them.

        Args:
            slot: of the batch.
            remaining: steps in which no sample reaches its last token, beyond those that are launched already.
            has_pending: whether launched steps wait to be read.

        Returns:
            Number of steps; 0 if none was started.
        """
        # in a large batch some sample ends at nearly every step: the others do not wait for it step by step
        if remaining > 0 and len(slot.buffers.tokens) >= MANY_ROWS:
            remaining = max(remaining, 8)

        # the longest graph that does not overrun a text; it is captured here if its time has come
        fitting = (steps for steps in CAPTURE_AFTER if steps <= remaining and self._is_captured(slot, steps))
        count = next(fitting, 0)
        if count > 0:
            slot.graphs[count]()
        elif remaining > 0 and not has_pending:
            # No graph yet: one step without. It is not launched ahead of unread steps, as launching a step takes longer
            # than running it, so that nothing would be gained by reading late.
            count = 1
            steps_in_place(slot.buffers, count)
        slot.num_steps += count
        return count

    def _is_captured(self, slot: _Slot, count: int) -> bool:
        """Return whether there is a graph of `count` steps, after capturing it if enough steps have run."""
        if count in slot.graphs or slot.num_steps < CAPTURE_AFTER[count] or slot.key in self._refused:
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
    """The buffers of a kind of batch, their graphs by number of steps, and the number of steps that have run."""

    key: tuple[object, ...]
    buffers: Buffers
    graphs: dict[int, Replay] = field(default_factory=dict)
    num_steps: int = 0


class _PendingSteps:
    """Tokens and log-probabilities of the latest `count` steps, while they are copied to the host."""

    def __init__(self, buffers: Buffers, count: int) -> None:
        self.count = count
        # a non-blocking copy from the device goes to pinned memory
        self._drawn, *self._logprobs = (
            part[:count].to("cpu", non_blocking=True, copy=True) for part in (buffers.drawn, *buffers.logprobs)
        )
        self._arrived: torch.cuda.Event | None = None
        if buffers.drawn.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(buffers.drawn.device))

    def wait(self) -> None:
        """Wait until the steps have run and their values are on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def steps(self, batch: Batch) -> Iterator[Step]:
        """Wait for the values, and yield them step by step."""
        self.wait()
        rows = slice(len(batch.samples))
        for i, tokens in enumerate(self._drawn[:, rows].tolist()):
            logprobs = [part[i, rows] for part in self._logprobs]
            yield tokens, batch.token_logprobs(tokens, *logprobs) if logprobs else None


def _remaining(batch: Batch, pending: deque[_PendingSteps]) -> int:
    """Return how many steps beyond the launched ones every sample still has room for; 0 if a sample has ended."""
    if any(sample.ended for sample in batch.samples):
        return 0
    room = min(sample.request.config.max_new_tokens - sample.num_tokens for sample in batch.samples)
    return room - sum(steps.count for steps in pending)


class StepCapture:
    """Captures the steps of a batch in CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._capture = CudaCapture(device)

    def __call__(self, buffers: Buffers, count: int) -> Replay:
        """Return a function that replays `count` steps on the current stream; no token is drawn here.

        Raises:
            RuntimeError: a step waits for the device, or does something else that no graph can hold.
        """
        # the warm-up draws a token on a copy, since the buffers hold a running batch
        self._capture.warm_up(partial(steps_in_place, buffers.copy(), 1))
        return self._capture.record(partial(steps_in_place, buffers, count))
