"""A text that was read is not read again."""

from __future__ import annotations

import torch

from textgen.config import ModelConfig
from textgen.decoding.decoders import PREFILL_WINDOW, Decoder
from textgen.decoding.reading import ReadState, read_tokens
from textgen.model.lstm import LSTMLanguageModel


def test_only_what_follows_a_state_is_read() -> None:
    """The state is a wrong one, so that what is read before it would show."""
    torch.manual_seed(0)
    decoder = Decoder(LSTMLanguageModel(ModelConfig(embedding_dim=8, hidden_size=8, num_layers=2), 20).eval())
    ids = torch.randint(20, (PREFILL_WINDOW + 4,)).tolist()
    wrong = [torch.randn(1, 8) for _ in range(4)]
    read = ReadState(text="", ids=tuple(ids[:-2]), num_read=PREFILL_WINDOW, state=wrong, decoder=decoder)
    state = wrong
    for token in ids[PREFILL_WINDOW:-1]:
        with torch.inference_mode():
            _, state = decoder.step(torch.tensor([token]), state)
    for seen, wanted in zip(decoder.prefill(ids, read=read), state, strict=True):
        torch.testing.assert_close(seen, wanted)


def test_a_state_of_another_beginning_is_not_used() -> None:
    torch.manual_seed(0)
    decoder = Decoder(LSTMLanguageModel(ModelConfig(embedding_dim=8, hidden_size=8, num_layers=1), 20).eval())
    ids = torch.randint(20, (PREFILL_WINDOW + 4,)).tolist()
    read = read_tokens(decoder, "", ids)
    assert read.begins(ids[: PREFILL_WINDOW + 1])
    assert not read.begins(ids[:PREFILL_WINDOW])  # no token is left for a step
    other = [*ids[:100], ids[100] ^ 1, *ids[101:]]
    assert not read.begins(other)
    assert torch.equal(read_tokens(decoder, "", other, after=read).state[0], read_tokens(decoder, "", other).state[0])


def test_a_state_is_at_the_last_border_that_is_surely_behind() -> None:
    """The last token is left to the step that draws the next one, so a border right after it is not reached."""
    decoder = Decoder(LSTMLanguageModel(ModelConfig(embedding_dim=8, hidden_size=8, num_layers=1), 20).eval())
    counts = {length: read_tokens(decoder, "", [1] * length).num_read for length in (1, 512, 513, 1024, 1025)}
    assert counts == {1: 0, 512: 0, 513: 512, 1024: 512, 1025: 1024}
