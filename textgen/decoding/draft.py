"""A text that a user and a model write in turns, with all its earlier states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from textgen.config import SamplingConfig
from textgen.decoding.decoders import Decoder
from textgen.decoding.generation import generate_stream
from textgen.decoding.reading import ReadState, read_tokens
from textgen.decoding.samples import Request, Sample, begin_id, require_drawable
from textgen.errors import TextgenError
from textgen.tokenizer import Tokenizer


@dataclass
class _Version:
    """The text after a line of the user or a continuation of the model."""

    read: ReadState | None
    """None of the empty text"""
    by_model: bool = False
    """whether a continuation was added last"""
    num_drawn: int = 0
    """continuations of this version that were drawn: the number of the next sample"""

    @property
    def text(self) -> str:
        """Return the whole text."""
        return "" if self.read is None else self.read.text


class Draft:
    """A text that is written by `write` and `draw`, and goes back by `undo`.

    Every version keeps its `ReadState`, so nothing is read again after `undo`. Parts are encoded apart: no token spans
    the end of a line or a continuation.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer) -> None:
        self._decoder, self._tokenizer = decoder, tokenizer
        self._versions = [_Version(None)]
        self.alternatives: Sequence[str] = ()
        """continuations that were drawn last, if nothing was written or undone since"""
        self.label: str | None = None
        """of the text, for a model with labels; see `set_label`"""

    @property
    def text(self) -> str:
        """Everything so far."""
        return self._versions[-1].text

    @property
    def waits(self) -> bool:
        """Whether none of several alternatives is picked yet."""
        return bool(self.alternatives) and not self._versions[-1].by_model

    def set_label(self, label: str | None) -> None:
        """Give the text a label, or none; all its versions are read again after it.

        Raises:
            TextgenError: the model does not know the label.
        """
        begin = begin_id(self._decoder.model, self._tokenizer, label)
        before: ReadState | None = None
        for version in self._versions:
            if version.read is not None:
                ids = (begin, *version.read.ids[1:])
                before = version.read = read_tokens(self._decoder, version.read.text, ids, after=before)
            version.num_drawn = 0
        self.label = label

    def require_drawable(self, config: SamplingConfig) -> None:
        """Check settings; see `samples.require_drawable`, which raises ValueError."""
        require_drawable(config, self._tokenizer)

    def write(self, text: str) -> None:
        """Append a text of the user.

        Raises:
            TextgenError: an alternative is to be picked first, or the text is spaces alone.
        """
        self._require_picked()
        if text.isspace():  # the tokenizer reads it as an empty text
            raise TextgenError("the line is only spaces; an empty line continues the text")
        self._append(text, by_model=False)
        self.alternatives = ()

    def draw(
        self, config: SamplingConfig, n: int, *, again: bool = False, interrupted: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, str | Sample]]:
        """Continue the text `n` times; one continuation is appended to it, and several are alternatives for `pick`.

        Args:
            config: the settings of sampling.
            n: number of continuations. They are the samples 0, 1, ... of the text.
            again: draw the next samples of the text before the last continuation instead; they take its place.
            interrupted: called before every token; once it returns true, the continuations end as they are.

        Yields:
            Events of `generate_stream`. The draft changes after the last one.

        Raises:
            TextgenError: no alternative is picked yet, or there is no continuation yet.
        """
        if not again:
            self._require_picked()
        last = self._last_beginning() if again else len(self._versions) - 1
        beginning = self._versions[last]
        first = beginning.num_drawn if again else 0
        if again and not first:
            raise TextgenError("there is no continuation to draw again")
        read = beginning.read
        label, ids = (self.label, None) if read is None else (None, read.ids)  # the first id is the label's
        requests = [Request(beginning.text, config, first + i, ids=ids, read=read, label=label) for i in range(n)]
        texts = [""] * n
        for index, event in generate_stream(
            self._decoder, self._tokenizer, requests, batch_size=n, interrupted=interrupted
        ):
            if isinstance(event, str):
                texts[index] += event
            yield index, event
        beginning.num_drawn = first + n
        if any(texts):
            del self._versions[last + 1 :]
            self.alternatives = texts
            if n == 1:
                self.pick(1)

    def pick(self, number: int) -> None:
        """Append one of the alternatives, counted from 1, in place of the one that was picked before.

        Raises:
            TextgenError: there is no such alternative.
        """
        if not 1 <= number <= len(self.alternatives):
            raise TextgenError(f"there are {len(self.alternatives) or 'no'} alternatives to pick from: {number}")
        del self._versions[self._last_beginning() + 1 :]
        self._append(self.alternatives[number - 1], by_model=True)

    def undo(self) -> None:
        """Take back the last continuation, or alternatives that wait, or the last line.

        Raises:
            TextgenError: the text is empty.
        """
        if not self.waits:
            if len(self._versions) == 1:
                raise TextgenError("there is nothing to undo")
            self._versions.pop()
        self.alternatives = ()

    def _last_beginning(self) -> int:
        """Return the index of the version before the last continuation; the last version if it is a line."""
        return len(self._versions) - 1 - self._versions[-1].by_model

    def _append(self, text: str, *, by_model: bool) -> None:
        before = self._versions[-1].read
        begin = begin_id(self._decoder.model, self._tokenizer, self.label)
        ids = (*((begin,) if before is None else before.ids), *self._tokenizer.encode(text))
        read = read_tokens(self._decoder, self.text + text, ids, after=before)
        self._versions.append(_Version(read, by_model))

    def _require_picked(self) -> None:
        if self.waits:
            raise TextgenError("pick one of the alternatives first, as `:pick 1`, or leave them by `:undo`")
