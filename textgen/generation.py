"""Prompts to text, token by token: prefill, decode step, draw."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from textgen.config import SamplingConfig
from textgen.model import LSTMLanguageModel, State
from textgen.sampling import draw
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Sample:
    """A finished continuation: of which prompt, which of its samples, the text after the prompt, its tokens."""

    prompt: str
    number: int
    text: str
    num_tokens: int
    finished: bool  # the model ended the text itself


def prefill(model: LSTMLanguageModel, tokens: Sequence[int]) -> tuple[Tensor, State]:
    """Read a prompt that starts with the end-of-text token; return logits (1, vocab_size) after it, and the state."""
    device = model.embedding.weight.device
    ids = torch.tensor([tokens], device=device)  # (1, time)
    state = model.zero_state(1)
    if ids.shape[1] > 1:
        # targets that score nothing: never more than a chunk of the prompt's logits exists
        _, state = model(ids[:, :-1], state, torch.full_like(ids[:, :-1], -1))
    return decode_step(model, ids[:, -1], state)


def decode_step(model: LSTMLanguageModel, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """Read one token per row (batch,); return logits (batch, vocab_size) for the next, and the state."""
    logits, state = model(tokens[:, None], state)
    return logits[:, 0], state


@torch.inference_mode()
def generate(
    model: LSTMLanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    *,
    num_samples: int = 1,
) -> Iterator[tuple[int, str | Sample]]:
    """Continue every prompt `num_samples` times, all of them in one batch.

    Sample j of a prompt draws noise that the seed, the prompt and j decide: the same whatever stands beside it.

    Yields:
        (row, piece of text) as it is drawn, whole characters only, and once per row (row, Sample) when it ends.
        Row is prompt index x `num_samples` + j.
    """
    rows = [(prompt, j) for prompt in prompts for j in range(num_samples)]
    if not rows:
        return
    starts = [prefill(model, [tokenizer.bos_id, *tokenizer.encode(prompt)]) for prompt in prompts]
    logits = torch.cat([start[0] for start in starts]).repeat_interleave(num_samples, 0)  # (rows, vocab_size)
    hidden, cell = (torch.cat([start[1][i] for start in starts], 1).repeat_interleave(num_samples, 1) for i in (0, 1))
    state: State = (hidden, cell)  # each (num_layers, rows, hidden_size)
    numbers = [_sample_number(prompt, j) for prompt, j in rows]
    live = list(range(len(rows)))
    streams, texts = [tokenizer.stream() for _ in rows], ["" for _ in rows]
    for step in range(config.max_new_tokens):
        samples = torch.tensor([numbers[row] for row in live], device=logits.device)
        logits[:, tokenizer.unk_id] = -math.inf  # text never holds it; drawn it would show as U+FFFD
        tokens = draw(logits, config, samples=samples, step=step)
        going = []
        for place, (row, token) in enumerate(zip(live, tokens.tolist(), strict=True)):
            ended = token == tokenizer.eos_id
            last = ended or step + 1 == config.max_new_tokens
            piece = ("" if ended else streams[row].push(token)) + (streams[row].flush() if last else "")
            texts[row] += piece
            if piece:
                yield row, piece
            if last:
                yield row, Sample(*rows[row], texts[row], step + (not ended), ended)
            else:
                going.append(place)
        if not going:
            break
        if len(going) < len(live):
            live = [live[place] for place in going]
            kept = torch.tensor(going, device=logits.device)
            tokens, state = tokens[kept], (state[0][:, kept], state[1][:, kept])
        logits, state = decode_step(model, tokens, state)


def _sample_number(prompt: str, j: int) -> int:
    """Return the number that sample j of a prompt has in the noise: other prompts draw other noise."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "big") + j


def sample_all(
    model: LSTMLanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    *,
    num_samples: int = 1,
) -> list[Sample]:
    """Return the finished samples of `generate`, in the order of prompts."""
    events = generate(model, tokenizer, prompts, config, num_samples=num_samples)
    ended = {row: event for row, event in events if isinstance(event, Sample)}
    return [ended[row] for row in sorted(ended)]
