"""Text that a model has read, so that texts that begin with it need not read it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from textgen.decoding.decoders import PREFILL_WINDOW, Decoder, DecoderState


@dataclass(frozen=True, kw_only=True)
class ReadState:
    """A text that a model has read: its tokens, and the LSTM state after most of them.

    What follows is generated and scored bit for bit as if all tokens were read at once. A model reads windows of 512
    tokens, and a window that is cut elsewhere may round differently. So the LSTM state is that of the last border
    between two windows, and the tokens after it, 512 at most, are read again with what follows.
    """

    text: str
    """normalized as the training text was"""
    ids: tuple[int, ...] = field(repr=False)
    """begin-of-text token, and the tokens of the text; penalties need them all"""
    num_read: int
    """number of tokens that `state` has read, a multiple of 512"""
    state: DecoderState = field(repr=False)
    """of the decoder: hidden state and cell of each layer, each (1, hidden_size); empty if `num_read` is 0"""
    decoder: Decoder = field(repr=False, compare=False)
    """that has read the text; the state means nothing to another model"""


def read_tokens(decoder: Decoder, text: str, ids: Sequence[int], *, after: ReadState | None = None) -> ReadState:
    """Read a text.

    Args:
        decoder: of the model.
        text: the text, without that of `after`.
        ids: its tokens, without begin-of-text.
        after: what comes before it; None for the begin-of-text token `decoder.model` starts every text with.

    Returns:
        The state after both texts. Their tokens stay as they are: a token never spans the end of the first text.
    """
    all_ids = (*(after.ids if after is not None else ()), *ids)
    # The last token is left for the step that draws what comes next.
    num_read = (len(all_ids) - 1) // PREFILL_WINDOW * PREFILL_WINDOW
    state = decoder.prefill(all_ids[: num_read + 1], read=after) if num_read else []
    whole = (after.text if after is not None else "") + text
    return ReadState(text=whole, ids=all_ids, num_read=num_read, state=state, decoder=decoder)
