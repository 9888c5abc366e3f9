"""Lanes of several sources: each source has as many lanes as its weight gives it, and its own passes over its text.

A source with 2.3 lanes has two lanes to itself, read as in `lanes`, and three tenths of a lane that it shares. In a
shared lane the sources take turns by documents: next comes the source that has had the fewest tokens for its part. So
the shares of the tokens are the weights, whatever the batch size and the lengths of documents.

A pass of a source is a permutation of its documents, as an epoch is. The stream of a pass is cut at its lanes, and what
follows them goes to the shared lanes. Which tokens a step reads is a function of seed and step: a source's own lanes
read window `step % windows` of pass `step // windows`, and the turns of a shared lane follow from the lengths of the
documents.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from textgen.data.lanes import Epoch, LaneSampler, keeps_label
from textgen.data.split import Split
from textgen.errors import TextgenError


@dataclass(frozen=True)
class Dealt:
    """The lanes of one source: the `lanes` from `first` on, and `part` of each shared lane."""

    name: str
    split: Split
    first: int
    lanes: int
    part: Fraction
    """share of the tokens of each shared lane; 0 if the source shares none"""
    width: Fraction
    """of the source, in lanes: `lanes` and its parts of the shared lanes"""


class Mixture:
    """Several sources dealt to the lanes of a batch: the lanes of each source in order, and the shared lanes last.

    Args:
        splits: the documents of each source by name.
        weights: share of the tokens of each source, relative to the others.
        batch_size: number of lanes.
        seq_len: tokens in a window.

    Raises:
        TextgenError: a source has too few tokens for one window of its lanes.
    """

    def __init__(
        self, splits: Mapping[str, Split], weights: Mapping[str, float], *, batch_size: int, seq_len: int
    ) -> None:
        self.batch_size, self.seq_len = batch_size, seq_len
        # Fractions of the decimals that the user wrote: 0.7 and 0.3 of 10 lanes are 7 and 3.
        exact = {name: Fraction(repr(weights[name])) for name in splits}
        widths = {name: weight * batch_size / sum(exact.values()) for name, weight in exact.items()}
        self.num_shared = batch_size - sum(int(width) for width in widths.values())
        self.sources: list[Dealt] = []
        first = 0
        for name, width in widths.items():
            part = (width - int(width)) / self.num_shared if self.num_shared else Fraction(0)
            self.sources.append(Dealt(name, splits[name], first, int(width), part, width))
            first += int(width)
            self._check(self.sources[-1], weights[name])
        self.first_shared = first
        num_tokens = sum(source.split.num_tokens for source in self.sources)
        self.steps_per_epoch = max((num_tokens - 1) // batch_size // seq_len, 1)
        """steps that read as many tokens as all sources have together"""

    def _check(self, source: Dealt, weight: float) -> None:
        if source.lanes and not self.windows_per_pass(source):
            raise TextgenError(
                f"source `{source.name}`: {source.split.num_tokens} tokens are too few for weight {weight:g}, which is "
                f"{float(source.width):.4g} of {self.batch_size} lanes x seq_len {self.seq_len}: "
                f"{math.ceil(source.width * self.seq_len) + 1} would do"
            )

    def windows_per_pass(self, source: Dealt) -> int:
        """Return the number of windows in each lane of a source that has lanes to itself."""
        return int((source.split.num_tokens - 1) // source.width // self.seq_len)

    @property
    def shares(self) -> dict[str, float]:
        """The share of each source of the tokens that are read."""
        return {source.name: float(source.width / self.batch_size) for source in self.sources}

    def passes(self, step: int) -> dict[str, float]:
        """Return how often the text of each source has been read after some steps."""
        return {
            source.name: step / self.windows_per_pass(source)
            if source.lanes
            else float(step * self.seq_len * source.width / source.split.num_tokens)
            for source in self.sources
        }

    def begun(self, step: int) -> NDArray[np.bool_]:
        """Return for each lane whether the step is the first one of a pass: (batch_size,).

        A shared lane has its first step at 0 alone: in it, a pass follows another one as a document follows another.
        """
        begun = np.full(self.batch_size, step == 0)
        for source in self.sources:
            if source.lanes:
                begun[source.first : source.first + source.lanes] = step % self.windows_per_pass(source) == 0
        return begun


@dataclass(frozen=True)
class _Turn:
    """A document in a shared lane, or the part of one that is read."""

    position: int
    """in the lane, of its first token"""
    source: Dealt
    number: int
    """of the pass"""
    document: int
    first: int
    end: int
    """place of the first token in `split.tokens`, and of the one after the last"""

    @property
    def after(self) -> int:
        """Position in the lane after the last token."""
        return self.position + self.end - self.first

    @property
    def ends(self) -> bool:
        """Whether its last token is the end-of-text."""
        return self.end == int(self.source.split.offsets[self.document + 1])

    def tokens(self, start: int, stop: int) -> NDArray[np.unsignedinteger[Any]]:
        """Return its tokens from position `start` of the lane to position `stop`."""
        skipped, left = max(start - self.position, 0), max(self.after - stop, 0)
        return self.source.split.tokens[self.first + skipped : self.end - left]

    def label(self, seed: int) -> int | None:
        """Return the label of the document; None if it has none, is read without it, or is not read from its start."""
        split = self.source.split
        if split.begin_ids is None or self.first != int(split.offsets[self.document]):
            return None
        kept = keeps_label(seed, self.number, torch.tensor(self.document))
        return int(split.begin_ids[self.document]) if kept else None


class _Passes:
    """The passes of a source. Two are kept, since a shared lane may be a pass ahead of the source's own lanes."""

    def __init__(self, source: Dealt, *, seq_len: int, seed: int) -> None:
        self._split, self._seed = source.split, seed
        # a source without lanes to itself has no windows, and may be shorter than one
        self._lanes = source.width if source.lanes else 1
        self._seq_len = seq_len if source.lanes else 1
        self._kept: dict[int, Epoch] = {}

    def epoch(self, number: int) -> Epoch:
        if number not in self._kept:
            if len(self._kept) == 2:  # free its order before the new one is computed
                del self._kept[min(self._kept)]
            self._kept[number] = Epoch(
                self._split, batch_size=self._lanes, seq_len=self._seq_len, seed=self._seed, epoch=number
            )
        return self._kept[number]


class _SharedLane:
    """A lane without end in which sources take turns. It is read forward, from any window on."""

    def __init__(self, mixture: Mixture, place: int, passes: Mapping[str, _Passes], *, seed: int) -> None:
        self._mixture, self._place, self._passes, self._seed = mixture, place, passes, seed
        self._sources = [source for source in mixture.sources if source.part]
        self._window: int | None = None  # the last one that was read

    def turns(self, start: int = 0) -> Iterator[_Turn]:
        """Yield the turns of the lane, beginning with one that begins at or before position `start`.

        The source with the fewest tokens for its part is next. So turns are in the order of that number, and those
        whose number is below a bound come first: they are counted source by source, and skipped.
        """
        parts = [float(source.part) for source in self._sources]
        # The parts add up to 1, so the turns below a bound have as many tokens, and those of a few documents more.
        bound, back = start, self._mixture.seq_len
        while sum(read := [self._read_below(source, bound) for source in self._sources]) > start:
            bound, back = start - back, 2 * back
        position = sum(read)
        streams = [self._documents(source, its) for source, its in zip(self._sources, read, strict=True)]
        while True:
            i = min(range(len(read)), key=lambda i: read[i] / parts[i])
            turn = _Turn(position, self._sources[i], *next(streams[i]))
            yield turn
            position = turn.after
            read[i] += turn.end - turn.first

    def _read_below(self, source: Dealt, bound: int) -> int:
        """Return the number of tokens in those turns of a source before which it has fewer than `bound` x its part."""
        if bound <= 0:
            return 0
        part = float(source.part)
        read = max(int(bound * part) - 1, 0)  # a token of one of these turns, near the last one's end
        for _, _, first, end in self._documents(source, read):
            read += end - first
            if read / part >= bound:
                break
        return read

    def _documents(self, source: Dealt, read: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield pass, document and place of a source's documents in this lane, from its token `read` in the lane on."""
        own = source.lanes * int((source.split.num_tokens - 1) // source.width)
        left = source.split.num_tokens - own  # at least one token
        start, stop = (own + left * i // self._mixture.num_shared for i in (self._place, self._place + 1))
        length = max(stop - start, 1)  # the same in each pass
        first_pass, done = divmod(read, length)
        for number in count(first_pass):
            for document, first, end in self._passes[source.name].epoch(number).documents(start + done):
                end = min(end, first + length - done)
                yield number, document, first, end
                done += end - first
                if done == length:
                    break
            done = 0

    def window(self, window: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a window, each (1, seq_len) int64."""
        seq_len = self._mixture.seq_len
        start, stop = window * seq_len, (window + 1) * seq_len + 1
        if self._window is None or not 0 <= window - self._window <= 1:
            self._turns = self.turns(start)
            self._held = deque([next(self._turns)])
        self._window = window
        while self._held[-1].after < stop or self._held[0].after <= start:
            if self._held[0].after <= start and len(self._held) > 1:
                self._held.popleft()
            else:
                self._held.append(next(self._turns))
        parts = (turn.tokens(start, stop) for turn in self._held)
        tokens = torch.from_numpy(np.concatenate([part.astype(np.int64) for part in parts]))
        inputs, targets = tokens[None, :-1].clone(), tokens[None, 1:]
        for before, turn in pairwise(self._held):
            label = turn.label(self._seed)
            if before.ends and label is not None:
                inputs[0, turn.position - start - 1] = label
        return inputs, targets


class _MixedWindows(Dataset[dict[str, Tensor]]):
    """Reads windows of a mixture by (step, lane), a whole micro-batch in one call."""

    def __init__(self, mixture: Mixture, *, seed: int) -> None:
        self._mixture = mixture
        self._passes = {s.name: _Passes(s, seq_len=mixture.seq_len, seed=seed) for s in mixture.sources}
        self._shared = [_SharedLane(mixture, i, self._passes, seed=seed) for i in range(mixture.num_shared)]

    def __getitems__(self, rows: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        step, lanes = rows[0][0], [lane for _, lane in rows]  # a micro-batch is of one step
        parts: list[tuple[Tensor, Tensor]] = []
        windows: list[int] = []
        for source in self._mixture.sources:
            if own := [lane - source.first for lane in lanes if 0 <= lane - source.first < source.lanes]:
                number, window = divmod(step, self._mixture.windows_per_pass(source))
                parts.append(self._passes[source.name].epoch(number).windows(own, window))
                windows += [window] * len(own)
        for place in (lane - self._mixture.first_shared for lane in lanes):
            if place >= 0:
                parts.append(self._shared[place].window(step))
                windows.append(step)
        inputs, targets = zip(*parts, strict=True)  # the lanes of each source are in order, as those of the batch are
        return {
            "tokens": torch.cat(inputs),
            "targets": torch.cat(targets),
            "lanes": torch.tensor(lanes),
            "windows": torch.tensor(windows),
        }


def build_mixed_loader(mixture: Mixture, sampler: LaneSampler, *, seed: int) -> DataLoader[dict[str, Tensor]]:
    """Build the loader of a training on a mixture, with items as those of `lanes.build_loader`.

    In a source's own lanes, `windows` counts from the start of the pass, in a shared lane from that of the training.
    """
    return DataLoader(_MixedWindows(mixture, seed=seed), batch_sampler=sampler, collate_fn=lambda batch: batch)
