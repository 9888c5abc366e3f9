"""A decoding step's small operations in a Triton kernel each: the LSTM cell after its product, and the draw.

CUDA only, and not measured so far. `plain_cell` and `sampling.draw` say what is right.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F


def plain_cell(product: Tensor, added: Tensor, tokens: Tensor | None, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Return the new hidden state and cell, each float32 (batch, size).

    Args:
        product: (batch, 4 x size), of any float dtype: input, forget, output and cell gates.
        added: to the product: a table (vocab_size, 4 x size) of which `tokens` say the rows, or a bias (4 x size,).
        tokens: (batch,) int64; None for a bias.
        memory: the cell before, float32 (batch, size).
    """
    gates = product.float() + (added if tokens is None else F.embedding(tokens, added)).float()
    i, f, o, g = gates.chunk(4, 1)
    memory = i.sigmoid() * g.tanh() + f.sigmoid() * memory
    return o.sigmoid() * memory.tanh(), memory


def fused_cell(product: Tensor, added: Tensor, tokens: Tensor | None, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `plain_cell` does, up to rounding."""
    product, memory = product.contiguous(), memory.contiguous()
    hidden_out, memory_out = torch.empty_like(memory), torch.empty_like(memory)
    batch, size = memory.shape
    with torch.cuda.device_of(memory):  # type: ignore[no-untyped-call]
        _cell[(batch, triton.cdiv(size, 256))](
            product, added, tokens, memory, hidden_out, memory_out, size, TABLE=tokens is not None, BLOCK=256
        )
    return hidden_out, memory_out


def fused_draw(logits: Tensor, keys: Tensor, items: Tensor, temperature: Tensor | None) -> Tensor:
    """Return the argmax (batch,) of logits less the logarithm of `noise.exponential`, as `sampling.draw` takes it.

    Args:
        logits: float32 (batch, vocab_size).
        keys: (batch,) int64 as `noise.hash_bits` returns them.
        items: (vocab_size,) int32, the hashed numbers of the tokens in `noise.exponential`.
        temperature: (batch, 1); rows where it is 0 take no noise.
    """
    logits, drawn = logits.contiguous(), torch.empty_like(keys)
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        _draw[(len(keys),)](
            logits, keys, items, temperature, drawn, logits.shape[1], HEATED=temperature is not None, BLOCK=1024
        )
    return drawn


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _cell(product, added, tokens, memory, hidden_out, memory_out, size, TABLE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < size
    product += row * 4 * size + unit
    added += unit
    if TABLE:
        added += tl.load(tokens + row) * 4 * size
    i = tl.load(product, inside).to(tl.float32) + tl.load(added, inside).to(tl.float32)
    f = tl.load(product + size, inside).to(tl.float32) + tl.load(added + size, inside).to(tl.float32)
    o = tl.load(product + 2 * size, inside).to(tl.float32) + tl.load(added + 2 * size, inside).to(tl.float32)
    g = tl.load(product + 3 * size, inside).to(tl.float32) + tl.load(added + 3 * size, inside).to(tl.float32)
    at = row * size + unit
    # tanh(x) = 2 sigmoid(2 x) - 1
    kept = tl.sigmoid(i) * (2 * tl.sigmoid(2 * g) - 1) + tl.sigmoid(f) * tl.load(memory + at, inside)
    tl.store(memory_out + at, kept, inside)
    tl.store(hidden_out + at, tl.sigmoid(o) * (2 * tl.sigmoid(2 * kept) - 1), inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _draw(logits, keys, items, temperature, drawn, size, HEATED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    key = tl.load(keys + row).to(tl.uint32)
    cold = False
    if HEATED:
        cold = tl.load(temperature + row) == 0
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < size
        bits = key ^ tl.load(items + token, inside, 0).to(tl.uint32, bitcast=True)
        bits *= 0x7FEB352D
        bits ^= bits >> 15
        bits *= 0x846CA68B
        bits ^= bits >> 16
        share = ((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * 2.0**-31
        share = tl.minimum(share, 1 - 2.0**-24)
        rest = 1 - share
        # -log1p(-share): the quotient makes good what rounding took from a small share
        noise = tl.where(rest == 1, share, tl.log(rest) * (share / (rest - 1)))
        value = tl.load(logits + row * size + token, inside, float("-inf")) - tl.where(cold, 0.0, tl.log(noise))
        place = tl.where(value > best, token, place)
        best = tl.maximum(value, best)
    # the first of equals, as torch's argmax on a CPU
    first = tl.min(tl.where(best == tl.max(best, 0), place, size), 0)
    tl.store(drawn + row, first.to(tl.int64))
