"""A decoding step in a few large operations, each by torch's operators: they say what `triton_decoding` has to compute.

The operations are `layer` (matrix product and LSTM cell), `linear` (the projection), `output` (the output layer, the
settings that change logits one by one, and the best token of each block of the vocabulary), `pick` (the same from
given logits) and `draw` (the token of each row, and all that later steps need to know of it). Inputs of matrix products
are rounded to bfloat16, sums and states are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from textgen.noise import exponential, hash_bits

# Outputs are padded to a multiple of this number, so that each tile of weights is whole.
COLUMNS = 128

Logprobs = tuple[Tensor, Tensor]
"""of the drawn tokens (batch,), and the logarithm of each row's softmax sum (batch,)"""


@dataclass(frozen=True, eq=False)
class Weights:
    """A matrix as kernels read it: (outputs, inputs), both padded by zeros, in bfloat16 or int8."""

    weight: Tensor
    scale: Tensor | None
    """of each output, for int8"""
    added: Tensor
    """bias (outputs,), or table (inputs of the model, outputs)"""
    norm: tuple[Tensor, Tensor, float] | None
    """weight, bias and epsilon of the LayerNorm before the product; of the first input of a layer"""
    outputs: int
    padded: int
    """columns of each input"""
    block: int
    """divides `padded`"""

    @classmethod
    def of(
        cls, parts: Sequence[Tensor], added: Tensor, *, norm: torch.nn.Module | None = None, int8: bool = False
    ) -> Weights:
        """Lay a matrix out.

        Args:
            parts: (outputs, size) for each input.
            added: (outputs,) or (inputs of the model, outputs).
            norm: LayerNorm of the first input.
            int8: round the weights to 8 bits, with a scale for each output.
        """
        outputs, size = parts[0].shape
        block = min(max(size & -size, 64), 256)  # a power of two, 64 at least, that leaves few columns empty
        padded = -(-size // block) * block
        weight = torch.cat([F.pad(part.float(), (0, padded - size)) for part in parts], 1)
        weight, scale = F.pad(weight, (0, 0, 0, -outputs % COLUMNS)), None
        if int8:
            scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
            weight = (weight / scale[:, None]).round_()
        weight = weight.to(torch.int8 if int8 else torch.bfloat16).contiguous()
        kept = None
        if isinstance(norm, torch.nn.LayerNorm):
            kept = norm.weight.detach().float(), norm.bias.detach().float(), norm.eps
        return cls(weight, scale, added.contiguous(), kept, outputs, padded, block)

    @property
    def tensors(self) -> tuple[Tensor | float | None, ...]:
        """Return the arguments of a kernel: weight, scale, what is added, and the norm's weight, bias and epsilon."""
        return self.weight, self.scale, self.added, *(self.norm or (None, None, 0.0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """What `SamplingState.tensors` holds of the rows, as far as the kernels know it."""

    vocab_size: int
    key: Tensor | None
    """None if every row takes its likeliest token"""
    step: Tensor
    temperature: Tensor | None = None
    bias: Tensor | None = None
    seen: Tensor | None = None
    repetition_penalty: Tensor | None = None
    counts: Tensor | None = None
    presence_penalty: Tensor | None = None
    frequency_penalty: Tensor | None = None
    banned: Tensor | None = None
    min_new_tokens: Tensor | None = None
    history: Tensor | None = None
    unlabelled: Tensor | None = None


class Picks(NamedTuple):
    """The best token of each block of the vocabulary, each (batch, blocks)."""

    value: Tensor
    """float32, (logit - shift) / temperature - log(noise); at a temperature of 0 or 1, the logit - log(noise)"""
    token: Tensor
    """int32"""
    shift: Tensor
    """float32, the block's largest logit; 0 if the logits were divided before"""


def layer(
    x: Tensor | None, hidden: Tensor, cell: Tensor, weights: Weights, tokens: Tensor | None, *, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one LSTM layer for one token per row.

    Args:
        x: input, float32 (batch, hidden_size); None for the first layer, whose input is a row of a table.
        hidden: before the step, float32 (batch, hidden_size).
        cell: before the step, float32 (batch, hidden_size).
        weights: of [x, hidden], four outputs for each unit side by side: input, forget, output and cell gate.
        tokens: rows of the table that is added, (batch,) int64; None for a bias.
        residual: whether x is added to the output.

    Returns:
        New hidden state, new cell, and the layer's output, each float32 (batch, hidden_size).
    """
    gates = _product(hidden, None, weights) if x is None else _product(x, hidden, weights)
    gates = gates + (weights.added if tokens is None else weights.added[tokens]).float()
    i, f, o, g = gates.view(len(gates), -1, 4).unbind(2)  # each (batch, hidden_size)
    cell = i.sigmoid() * g.tanh() + f.sigmoid() * cell
    hidden = o.sigmoid() * cell.tanh()
    return hidden, cell, hidden + x if residual and x is not None else hidden


def linear(x: Tensor, weights: Weights) -> Tensor:
    """Return float32 (batch, outputs) of x, float32 (batch, inputs)."""
    return _product(x, None, weights) + weights.added


def _product(x: Tensor, second: Tensor | None, weights: Weights) -> Tensor:
    """Return normalised x, and `second` beside it, times the weights: float32 (batch, outputs)."""
    if weights.norm is not None:
        x = F.layer_norm(x, x.shape[1:], *weights.norm)
    parts = [F.pad(part, (0, weights.padded - part.shape[1])) for part in (x, second) if part is not None]
    y = F.linear(torch.cat(parts, 1).bfloat16().float(), weights.weight.float())
    return (y if weights.scale is None else y * weights.scale)[:, : weights.outputs]


def output(
    x: Tensor, weights: Weights, settings: Rows | None, *, unk_id: int, eos_id: int, keep: bool, logprobs: bool
) -> tuple[Tensor | None, Picks | None, Tensor | None]:
    """Compute logits, and pick the best token of each block by settings that change every logit for itself.

    Args:
        x: float32 (batch, inputs).
        weights: of the output layer.
        settings: of the rows; None to pick no token.
        unk_id: the token that is never picked.
        eos_id: the token that ends a text.
        keep: whether to return the logits.
        logprobs: whether to return parts of the softmax's sum.

    Returns:
        Logits of the model (batch, vocab_size), picks (batch, blocks), and for each block the largest logit and the sum
        of exponentials below it (2, batch, blocks); None for what is not asked for.
    """
    logits, picks, sums = linear(x, weights), None, None
    if logprobs:
        largest = logits.amax(1, keepdim=True)
        sums = torch.stack([largest, (logits - largest).exp().sum(1, keepdim=True)])
    if settings is not None:
        changed = _change_logits(logits, settings, unk_id=unk_id, eos_id=eos_id)
        shift = changed.amax(1, keepdim=True)
        if settings.temperature is not None:
            heat = settings.temperature
            divided = (changed - shift) / torch.where(heat > 0, heat, 1.0)
            changed = torch.where((heat == 1) | (heat == 0), changed, divided)
        picks = _pick(changed, settings, shift)
    return logits if keep else None, picks, sums


def _change_logits(logits: Tensor, settings: Rows, *, unk_id: int, eos_id: int) -> Tensor:
    """Return logits as `sampling.process_logits` changes them, before temperature."""
    token = torch.arange(logits.shape[1], device=logits.device)
    logits = logits.masked_fill(token == unk_id, -torch.inf)
    if settings.bias is not None:
        logits = logits + settings.bias
    if settings.seen is not None and settings.repetition_penalty is not None:
        penalty = settings.repetition_penalty
        logits = torch.where(settings.seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if settings.counts is not None:
        if settings.presence_penalty is not None:
            logits = logits - settings.presence_penalty * (settings.counts > 0)
        if settings.frequency_penalty is not None:
            logits = logits - settings.frequency_penalty * settings.counts
    if settings.banned is not None:
        logits = logits.masked_fill(settings.banned, -torch.inf)
    if settings.min_new_tokens is not None:
        early = settings.step[:, None] < settings.min_new_tokens
        logits = logits.masked_fill(early & (token == eos_id), -torch.inf)
    return logits


def pick(logits: Tensor, settings: Rows) -> Picks:
    """Return the best token of each block of logits that `sampling.process_logits` has changed.

    Args:
        logits: float32 (batch, vocab_size), divided by the temperature already.
        settings: of the rows.
    """
    return _pick(logits, settings, torch.zeros_like(logits[:, :1]))


def _pick(logits: Tensor, settings: Rows, shift: Tensor) -> Picks:
    """Return picks of a single block, the whole vocabulary."""
    if settings.key is not None:
        noise = exponential(hash_bits(settings.key, settings.step), logits.shape[1]).log_()
        logits = logits - (noise if settings.temperature is None else noise.where(settings.temperature > 0, 0.0))
    token = logits.argmax(1, keepdim=True)
    return Picks(logits.gather(1, token), token.int(), shift)


def draw(
    picks: Picks,
    settings: Rows,
    *,
    eos_id: int,
    ended: Tensor | None,
    out: Tensor,
    logits: Tensor | None = None,
    sums: Tensor | None = None,
) -> Logprobs | None:
    """Draw the best token of all blocks, and record it in the settings, in place.

    Args:
        picks: of the blocks.
        settings: of the rows.
        eos_id: the token that ends a text.
        ended: bool (batch,), rows that draw `eos_id` from now on, changed in place; None if there are none.
        out: gets the drawn tokens, (batch,) int64.
        logits: of the model, if log-probabilities are wanted.
        sums: of the logits, see `output`.
    """
    value = picks.value
    if settings.temperature is not None:
        heat, largest = settings.temperature, picks.shift.amax(1, keepdim=True)
        below = torch.where(picks.shift == -torch.inf, 0.0, picks.shift - largest) / torch.where(heat > 0, heat, 1.0)
        value = torch.where((heat == 1) | (heat == 0), value, value + below)
    drawn = picks.token.gather(1, value.argmax(1, keepdim=True))[:, 0].long()
    if ended is not None:
        drawn = drawn.masked_fill(ended, eos_id)
        ended.copy_(drawn == eos_id)
    out.copy_(drawn)
    result = None
    if logits is not None and sums is not None:
        largest = sums[0].amax(1)
        total = largest + (sums[1] * (sums[0] - largest[:, None]).exp()).sum(1).log()
        result = logits.gather(1, drawn[:, None])[:, 0] - total, total
    settings.step.add_(1)
    if settings.unlabelled is not None:
        settings.unlabelled.copy_(drawn)
    if settings.seen is not None:
        settings.seen.scatter_(1, drawn[:, None], True)
    if settings.counts is not None:
        settings.counts.scatter_add_(1, drawn[:, None], torch.ones_like(drawn[:, None], dtype=torch.int32))
    if settings.history is not None:
        settings.history.copy_(torch.cat([settings.history[:, 1:], drawn[:, None]], 1))
    return result
