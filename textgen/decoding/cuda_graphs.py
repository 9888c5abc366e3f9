"""A running batch on a GPU whose steps are CUDA graphs: many steps of all rows with one launch.

A step of an LSTM is so short that launching its kernels one by one takes longer than running them. So `Buffers` keeps
rows at fixed addresses, whole steps on these buffers are captured once as a graph, and the host only replays graphs of
up to 32 steps. It reads the tokens of one replay while the next one runs. A row that joins is copied into a free slot
of the buffers between two replays; nothing is captured for it (docs/decisions/0012-graphs-of-whole-steps.md,
docs/decisions/0034-rows-join-between-replays.md).

Nothing here was measured on a GPU so far: the constants are guesses.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from textgen.decoding.batch import (
    MOST_SECONDS,
    REFILL_DIVISOR,
    Batch,
    Prefilled,
    RunningBatch,
    Scored,
    Steps,
    advance,
    token_logprobs,
)
from textgen.decoding.decoders import Decoder, DecoderState
from textgen.decoding.fused import BY_KERNELS
from textgen.decoding.samples import RunningSample, TokenLogprobs
from textgen.decoding.sampling import SamplingState, widen_sampling_state
from textgen.kernels.capture import CudaCapture, Replay, reason_of
from textgen.kernels.decoding import Halt
from textgen.tokenizer import Tokenizer

log = logging.getLogger("textgen")

# Steps of a graph, the longest first, and the number of steps that must have run before it is captured. A capture takes
# the host about as long as running its steps one by one, so no text takes much longer than without graphs, and a short
# text waits for no capture.
CAPTURE_AFTER = {32: 64, 8: 16, 1: 16}

# Rows of a kind; those beyond run step by step.
MAX_ROWS = 512

# Kinds of rows that run at a time, each of which reads the model's weights at every step. Rows of further kinds run
# step by step.
MAX_KINDS = 8

# Buffers and graphs that are kept: a kind of rows and a number of slots, which is a power of two. Their bytes are
# bounded too: with a large vocabulary and many slots, buffers take hundreds of MB.
MAX_KEPT = 32
MAX_KEPT_BYTES = 1 << 30

# Settings that the fused kernels know besides the temperature. A row that has one of them gets neutral values for the
# others, so that clients with all kinds of these settings need one graph.
KNOWN_TO_KERNELS = BY_KERNELS - {"vocab_size", "key", "step", "temperature"}

# At least so many of the largest logits are looked at for `top_k`, and for alternatives with log-probabilities.
LEAST_K, LEAST_ALTERNATIVES = 64, 8


@dataclass
class Buffers:
    """Rows at fixed addresses: the tensors that a graph reads, changes and writes. A slot is a row of all of them."""

    decoder: Decoder
    unk_id: int
    eos_id: int
    tokens: Tensor
    """the tokens that the next step reads, (slots,)"""
    state: DecoderState
    sampling: SamplingState
    ended: Tensor
    """bool (slots,): rows that draw the end-of-text token from now on"""
    drawn: Tensor
    """tokens of the latest steps, (steps, slots)"""
    logprobs: tuple[Tensor, ...]
    """log-probabilities of the latest steps as `advance` returns them, each (steps, slots, ...); empty if no row asks
    for them"""

    @classmethod
    def like(cls, batch: Batch, num_slots: int) -> Buffers:
        """Return buffers for rows of the kind of a batch's; all slots hold copies of its first row."""

        def repeat(value: Tensor) -> Tensor:
            return value[:1].repeat_interleave(num_slots, 0)

        tokens, sampling, steps = repeat(batch.tokens), batch.sampling, max(CAPTURE_AFTER)
        logprobs: tuple[Tensor, ...] = ()
        if sampling.logprobs is not None:
            of_drawn = torch.empty(steps, num_slots, device=tokens.device)
            of_likeliest = of_drawn.new_empty(steps, num_slots, min(sampling.logprobs, batch.decoder.vocab_size))
            logprobs = (of_drawn, of_likeliest, of_likeliest.long())
        return cls(
            batch.decoder,
            batch.tokenizer.unk_id,
            batch.tokenizer.eos_id,
            tokens,
            [repeat(part) for part in batch.state],
            dataclasses.replace(sampling, tensors={name: repeat(value) for name, value in sampling.tensors.items()}),
            tokens == tokens,
            tokens.new_empty(steps, num_slots),
            logprobs,
        )

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        tensors = self.tokens, *self.state, *self.sampling.tensors.values(), self.ended, self.drawn, *self.logprobs
        return sum(tensor.nbytes for tensor in tensors)

    def load(self, rows: Batch | Buffers, slots: Sequence[int]) -> None:
        """Copy rows of the same kind into slots, while no graph runs on them that was launched later."""
        places = _on_device(slots, self.tokens.device)
        pairs = [(self.tokens, rows.tokens), *zip(self.state, rows.state, strict=True)]
        pairs += [(kept, rows.sampling.tensors[name]) for name, kept in self.sampling.tensors.items()]
        for kept, value in pairs:
            kept.index_copy_(0, places, value)
        self.ended.index_fill_(0, places, False)

    def copy(self, slots: Sequence[int]) -> Buffers:
        """Return buffers with the values of some slots, at other addresses."""
        places = _on_device(slots, self.tokens.device)
        tensors = {name: value[places] for name, value in self.sampling.tensors.items()}
        return dataclasses.replace(
            self,
            tokens=self.tokens[places],
            state=[part[places] for part in self.state],
            sampling=dataclasses.replace(self.sampling, tensors=tensors),
            ended=self.ended[places],
            drawn=self.drawn[:, places],
            logprobs=tuple(part[:, places] for part in self.logprobs),
        )


def _on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return numbers as a tensor; the host does not wait for the device."""
    made = torch.tensor(numbers, dtype=torch.int64)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


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


def kind_of(sampling: SamplingState, vocab_size: int) -> SamplingState:
    """Return the state of a row as a row of its kind; its `features` name the kind.

    What the kernels compute anyway costs no time where its values are neutral. Every other setting takes further
    operators, so a row without it is of another kind.
    """
    widened = sampling
    if sampling.tensors.keys() <= BY_KERNELS:
        names = ["temperature", *(KNOWN_TO_KERNELS if KNOWN_TO_KERNELS & sampling.tensors.keys() else ())]
        widened = dataclasses.replace(widen_sampling_state(sampling, names, vocab_size), greedy=False)
    return dataclasses.replace(
        widened,
        largest_k=_power_of_two(max(sampling.largest_k, LEAST_K)) if sampling.largest_k else 0,
        logprobs=_power_of_two(max(sampling.logprobs, LEAST_ALTERNATIVES)) if sampling.logprobs else sampling.logprobs,
    )


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below a number."""
    return 1 << (number - 1).bit_length()


def batch_of(decoder: Decoder) -> Callable[..., RunningBatch]:
    """Return what makes batches of a decoder, with the arguments of `Batch.of`: a runner if it runs in graphs."""
    return GraphRunner(decoder).batch_of if decoder.in_graphs else Batch.of


class GraphRunner:
    """Keeps buffers and graphs for the batches of a decoder, which run one after the other.

    The first steps on new buffers run one by one, so that a row draws the same text before and after the capture.

    Args:
        decoder: the decoder of all batches.
        capture: returns a function that runs `steps_in_place` on the given buffers, for the given number of steps, each
            time it is called; default `StepCapture`.
        max_kept: number of buffers that are kept with their graphs; the least recently used ones are dropped, also if
            the buffers take more than `MAX_KEPT_BYTES`.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        capture: Callable[[Buffers, int], Replay] | None = None,
        max_kept: int = MAX_KEPT,
    ) -> None:
        self.decoder, self._max_kept, self._warned = decoder, max_kept, False
        self._capture = StepCapture(decoder.device) if capture is None else capture
        self._kept: OrderedDict[tuple[object, ...], Graphs] = OrderedDict()
        self._refused: set[tuple[object, ...]] = set()
        """kinds of buffers whose steps cannot be captured"""
        self.running: GraphBatch | None = None
        """the latest batch; earlier ones must not go on"""
        self.num_captured = 0

    def batch_of(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        samples: list[RunningSample],
        *,
        beside: RunningBatch | None = None,
        prefilled: Prefilled | None = None,
        scored: Scored | None = None,
    ) -> GraphBatch:
        """Read the prompts of new samples and add them to a running batch; arguments are those of `Batch.of`.

        Raises:
            RuntimeError: the decoder is not that of the runner, or the batch was given up for another one.
        """
        if decoder is not self.decoder or (beside is not None and beside is not self.running):
            raise RuntimeError("a GraphRunner runs one batch at a time, with its own decoder")
        rows = Batch.each_of(decoder, tokenizer, samples, prefilled=prefilled, scored=scored)
        if beside is None or self.running is None:
            self.running = GraphBatch(self)
        self.running.join(rows)
        return self.running

    def graphs_of(self, rows: Batch, num_slots: int) -> Graphs:
        """Return buffers for rows of the kind of a batch's, with their graphs."""
        # graphs captured before a kernel was replaced would still replay it
        key = (num_slots, self.decoder.fused, *rows.sampling.features)
        if key not in self._kept:
            self._kept[key] = Graphs(key, Buffers.like(rows, num_slots))
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and (len(self._kept) > self._max_kept or self._num_bytes > MAX_KEPT_BYTES):
            self._kept.popitem(last=False)
        return self._kept[key]

    @property
    def _num_bytes(self) -> int:
        return sum(graphs.buffers.num_bytes for graphs in self._kept.values())

    def is_captured(self, graphs: Graphs, count: int) -> bool:
        """Return whether there is a graph of `count` steps, after capturing it if enough steps have run."""
        if count in graphs.replays or graphs.num_steps < CAPTURE_AFTER[count] or graphs.key in self._refused:
            return count in graphs.replays
        try:
            graphs.replays[count] = self._capture(graphs.buffers, count)
            self.num_captured += 1
        except RuntimeError as error:
            self._refused.add(graphs.key)
            if not self._warned:
                log.warning("steps that cannot be captured in a CUDA graph run one by one: %s", reason_of(error))
            self._warned = True
        return count in graphs.replays


@dataclass
class Graphs:
    """Buffers, and the graphs that step them."""

    key: tuple[object, ...]
    buffers: Buffers
    replays: dict[int, Replay] = field(default_factory=dict)
    """by number of steps"""
    num_steps: int = 0
    """that have run on the buffers"""


class GraphBatch:
    """A running batch whose rows join and leave between replays; made by `GraphRunner.batch_of`.

    Rows of a kind share buffers. Rows that the host guides run in a plain batch beside them, a step at a time.
    """

    def __init__(self, runner: GraphRunner) -> None:
        self.samples: list[RunningSample] = []
        self._runner = runner
        self._groups: dict[tuple[object, ...], Group] = {}
        """by kind of rows"""
        self._stepwise: Batch | None = None

    @torch.inference_mode()
    def join(self, rows: Sequence[Batch]) -> None:
        """Add batches of one row each."""
        kinds: dict[tuple[object, ...], list[Batch]] = {}
        stepwise = [row for row in rows if row.is_guided]
        for row in rows:
            if not row.is_guided:  # a guide waits for each token on the host
                row.sampling = kind_of(row.sampling, row.decoder.vocab_size)
                kinds.setdefault(row.sampling.features, []).append(row)
        for kind, added in kinds.items():
            group = self._groups.get(kind)
            num_rows = len(added) + (0 if group is None else group.num_rows)
            if num_rows > MAX_ROWS or (group is None and len(self._groups) == MAX_KINDS):
                stepwise += added
                continue
            if group is None:
                group = self._groups[kind] = Group(self._runner, added[0], _power_of_two(num_rows))
            group.add(Batch.joined(added))
        if stepwise:
            self._stepwise = Batch.joined(([] if self._stepwise is None else [self._stepwise]) + stepwise)
        self.samples += [sample for row in rows for sample in row.samples]

    @torch.inference_mode()
    def advance_many(
        self, *, seconds: float = MOST_SECONDS, most_ended: int | None = None, halt: Halt | None = None
    ) -> Steps:
        """Draw tokens of every row; read those of one launch, while the next one may run.

        A row that has joined since that launch has none yet. Tokens after the end of a text are to be dropped.

        Args:
            seconds: 0 or less: a step is launched, not many.
            most_ended: is not used: the end of a row is seen when the tokens of its launch are read.
            halt: is not used: a launch takes less than the host needs to stop it.

        Raises:
            RuntimeError: the runner has begun another batch.
        """
        if self._runner.running is not self:
            raise RuntimeError("a GraphRunner runs one batch at a time, with its own decoder")
        for group in self._groups.values():
            group.launch(1 if seconds <= 0 else max(CAPTURE_AFTER))
        drawn: dict[int, tuple[list[int], Sequence[TokenLogprobs] | None]] = {}
        if self._stepwise is not None:
            tokens, logprobs = self._stepwise.advance()
            for row, sample in enumerate(self._stepwise.samples):
                drawn[id(sample)] = [tokens[row]], None if logprobs is None else [logprobs[row]]
        for group in self._groups.values():
            drawn |= group.read()
        rows = [drawn.get(id(sample), ([], None)) for sample in self.samples]
        return [tokens for tokens, _ in rows], [logprobs for _, logprobs in rows]

    @torch.inference_mode()
    def without_ended(self) -> GraphBatch | None:
        """Free the slots of samples that have ended; return None if all have."""
        self.samples = [sample for sample in self.samples if not sample.ended]
        for group in self._groups.values():
            group.drop_ended()
        self._groups = {kind: group for kind, group in self._groups.items() if group.num_rows}
        self._stepwise = None if self._stepwise is None else self._stepwise.without_ended()
        return self if self.samples else None


class Group:
    """The rows of a kind in a running batch.

    Args:
        runner: keeps the buffers.
        row: of the kind.
        num_slots: for the first rows.
    """

    def __init__(self, runner: GraphRunner, row: Batch, num_slots: int) -> None:
        self._runner, self._row = runner, row
        self._graphs = runner.graphs_of(row, num_slots)
        self._slots: list[RunningSample | None] = [None] * num_slots
        self._launches: deque[Launch] = deque()

    @property
    def num_rows(self) -> int:
        """Number of slots that hold a sample."""
        return len(self._places)

    @property
    def _places(self) -> list[int]:
        return [place for place, sample in enumerate(self._slots) if sample is not None]

    def add(self, rows: Batch) -> None:
        """Copy rows into free slots; move all to more slots if too few are free."""
        needed = self.num_rows + len(rows.samples)
        if needed > len(self._slots):
            self._move(_power_of_two(needed))
        free = [place for place, sample in enumerate(self._slots) if sample is None][: len(rows.samples)]
        self._graphs.buffers.load(rows, free)
        for place, sample in zip(free, rows.samples, strict=True):
            self._slots[place] = sample

    def drop_ended(self) -> None:
        """Free the slots of samples that have ended; move the others if a quarter of the slots would do."""
        self._slots = [None if sample is None or sample.ended else sample for sample in self._slots]
        if 0 < 4 * self.num_rows <= len(self._slots):
            self._move(_power_of_two(self.num_rows))

    def _move(self, num_slots: int) -> None:
        """Move all rows to other buffers."""
        places, before = self._places, self._graphs.buffers
        self._graphs = self._runner.graphs_of(self._row, num_slots)
        self._graphs.buffers.load(before.copy(places), range(len(places)))
        self._slots = [self._slots[place] for place in places] + [None] * (num_slots - len(places))

    def launch(self, most: int) -> None:
        """Start steps without waiting for them, of at most so many steps a launch, until two launches are not read."""
        if self._runner.decoder.fused != self._graphs.key[1]:  # a kernel was replaced
            self._move(len(self._slots))
        while len(self._launches) < 2:
            room = self._room()
            # the longest graph that is not too long for the texts; it is captured here if its time has come
            fitting = (n for n in CAPTURE_AFTER if n <= min(room, most) and self._runner.is_captured(self._graphs, n))
            if count := next(fitting, 0):
                self._graphs.replays[count]()
            elif room > 0 and not self._launches:
                # No graph yet: one step without. It is not launched ahead of unread steps, as launching a step takes
                # longer than running it, so that nothing would be gained by reading late.
                count = 1
                steps_in_place(self._graphs.buffers, count)
            else:
                return
            self._graphs.num_steps += count
            self._launches.append(Launch(self._graphs, count, self._slots))

    def _room(self) -> int:
        """Return for how many more steps an eighth of the samples at most has no token left to draw."""
        rooms = sorted(
            sample.request.config.max_new_tokens
            - sample.num_tokens
            - sum(launch.count_of(sample) for launch in self._launches)
            for sample in self._slots
            if sample is not None
        )
        return rooms[len(rooms) // REFILL_DIVISOR]

    def read(self) -> dict[int, tuple[list[int], Sequence[TokenLogprobs] | None]]:
        """Wait for the oldest launch, and return tokens and log-probabilities by the identity of their samples."""
        return self._launches.popleft().read(self._row.tokenizer)


class Launch:
    """Steps that are launched: their tokens and log-probabilities, while they are copied to the host."""

    def __init__(self, graphs: Graphs, count: int, slots: Sequence[RunningSample | None]) -> None:
        self._graphs, self._count = graphs, count
        self._samples = {id(sample): (place, sample) for place, sample in enumerate(slots) if sample is not None}
        self._arrived: torch.cuda.Event | None = None
        buffers = graphs.buffers
        # a non-blocking copy from the device goes to pinned memory
        self._drawn, *self._logprobs = (
            part[:count].to("cpu", non_blocking=True, copy=True) for part in (buffers.drawn, *buffers.logprobs)
        )
        if buffers.drawn.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(buffers.drawn.device))

    def _wait(self) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()

    def __del__(self) -> None:
        self._wait()  # nobody reads the tokens any more, but a graph must not be dropped while it runs

    def count_of(self, sample: RunningSample) -> int:
        """Return how many tokens of a sample the steps draw."""
        return self._count if id(sample) in self._samples else 0

    def read(self, tokenizer: Tokenizer) -> dict[int, tuple[list[int], Sequence[TokenLogprobs] | None]]:
        """Wait for the values, and return them by the identity of their samples."""
        self._wait()
        told: list[list[TokenLogprobs]] = []
        if self._logprobs:
            steps = zip(self._drawn.tolist(), *self._logprobs, strict=False)
            told = [token_logprobs(tokenizer, tokens, *parts) for tokens, *parts in steps]
        drawn = self._drawn.T.tolist()
        return {
            identity: (drawn[place], [step[place] for step in told] if told else None)
            for identity, (place, _) in self._samples.items()
        }


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
        self._capture.warm_up(partial(steps_in_place, buffers.copy(range(len(buffers.tokens))), 1))
        return self._capture.record(partial(steps_in_place, buffers, count))
