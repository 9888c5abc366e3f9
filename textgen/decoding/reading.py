"""Text that a model has read, so that texts that begin with it need not read it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from textgen.data.corpus import normalize
from textgen.decoding.decoders import PREFILL_WINDOW, Decoder, DecoderState
from textgen.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ReadState:
    """A text that a model has read: its tokens, and the LSTM state after most of them.

    What follows is generated and scored bit for bit as if all tokens were read at once. A model reads windows of 512
    tokens, and a window that is cut elsewhere may round differently. So the LSTM state is that of the last border
    between two windows, and the tokens after it, mostly fewer than 512, are read again with what follows.
    """

    text: str
    """as it was given"""
    ids: tuple[int, ...] = field(repr=False)
    """begin-of-text token, and the tokens of the text"""
    num_read: int
    """number of tokens that `state` has read, a multiple of 512"""
    state: DecoderState = field(repr=False, compare=False)
    """of the decoder: hidden state and cell of each layer, each (1, hidden_size); empty if `num_read` is 0"""
    decoder: Decoder = field(repr=False, compare=False)
    """that has read the text; the state means nothing to another model"""
    tokenizer_sha256: str = field(default="", repr=False)
    """of the tokenizer's file; empty for tokens that no single encoding gave, whose state is not saved"""

    def begins(self, ids: Sequence[int]) -> bool:
        """Return whether a text of these tokens may begin with the state: it has read the same, and a token is left."""
        return self.num_read < len(ids) and tuple(ids[: self.num_read]) == self.ids[: self.num_read]

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file, which `LanguageModel.load_state` reads.

        Raises:
            TextgenError: the text is too long for a file, or the file cannot be written.
        """
        from textgen.decoding.state_files import write_state

        write_state(self, Path(path))


def read_tokens(decoder: Decoder, text: str, ids: Sequence[int], *, after: ReadState | None = None) -> ReadState:
    """Read a text of which all tokens are given, and will not change whatever follows.

    Args:
        decoder: of the model.
        text: the whole text.
        ids: begin-of-text token, and its tokens.
        after: a state after some first tokens, which are not read again.
    """
    return _read(decoder, text, ids, len(ids), after)


def read_prompt(
    decoder: Decoder,
    tokenizer: Tokenizer,
    text: str,
    *,
    normalization: str,
    after: ReadState | None = None,
    begin: int | None = None,
) -> ReadState:
    """Read a text that others will continue, which may join its last tokens.

    Args:
        decoder: of the model.
        tokenizer: the model's.
        text: the text after that of `after`.
        normalization: of the model's training text.
        after: what comes before it; None at the beginning of a text.
        begin: the first input of a text; default begin-of-text.
    """
    whole = text if after is None else after.text + text
    if begin is None:
        begin = tokenizer.bos_id if after is None else after.ids[0]
    normalized = normalize(whole, normalization)
    settled = 1 + len(tokenizer.encode(normalized[: tokenizer.settled(normalized)]))
    read = _read(decoder, whole, (begin, *tokenizer.encode(normalized)), settled, after)
    return replace(read, tokenizer_sha256=tokenizer.sha256)


def _read(decoder: Decoder, text: str, ids: Sequence[int], settled: int, after: ReadState | None) -> ReadState:
    """Read a text as `read_tokens` does; the first `settled` tokens are sure not to change."""
    # The last token is left for the step that draws what comes next.
    num_read = min(len(ids) - 1, settled) // PREFILL_WINDOW * PREFILL_WINDOW
    usable = after if after is not None and after.begins(ids[: num_read + 1]) else None
    state = decoder.prefill(ids[: num_read + 1], read=usable) if num_read else []
    return ReadState(text=text, ids=tuple(ids), num_read=num_read, state=state, decoder=decoder)
