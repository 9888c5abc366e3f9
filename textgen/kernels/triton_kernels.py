"""Triton kernels for a decoding step on a GPU: the LSTM cell after its matrix product, and the draw.

Experimental: no decoder uses them yet, and their speed is not measured. They are tested on GPUs only (tests marked
`gpu`). Their plain twins define the right results: `plain_cell` here, and `sampling.draw`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F


def plain_cell(product: Tensor, added: Tensor, tokens: Tensor | None, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Return the new hidden state and the new cell, each float32 (batch, hidden_size).

    Args:
        product: (batch, 4 * hidden_size), of any float dtype: input, forget, output and cell gates.
        added: added to the product: a table (vocab_size, 4 * hidden_size) with a row for each token, or a bias
            (4 * hidden_size,).
        tokens: (batch,) int64, the rows of the table; None for a bias.
        cell: the cell before the step, float32 (batch, hidden_size).
    """
    gates = product.float() + (added if tokens is None else F.embedding(tokens, added)).float()
    i, f, o, g = gates.chunk(4, 1)  # each (batch, hidden_size)
    cell = i.sigmoid() * g.tanh() + f.sigmoid() * cell
    return o.sigmoid() * cell.tanh(), cell


def fused_cell(product: Tensor, added: Tensor, tokens: Tensor | None, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result of `plain_cell`, up to rounding. Arguments as there, on a GPU."""
    product, cell = product.contiguous(), cell.contiguous()
    new_hidden, new_cell = torch.empty_like(cell), torch.empty_like(cell)
    batch, hidden_size = cell.shape
    with torch.cuda.device_of(cell):  # type: ignore[no-untyped-call]
        _cell[(batch, triton.cdiv(hidden_size, 256))](
            product, added, tokens, cell, new_hidden, new_cell, hidden_size, TABLE=tokens is not None, BLOCK=256
        )
    return new_hidden, new_cell


def fused_draw(logits: Tensor, keys: Tensor, items: Tensor, temperature: Tensor | None) -> Tensor:
    """Return the draw of each row, int64 (batch,): the argmax of logits - log(noise), as `sampling.draw` takes it.

    Args:
        logits: float32 (batch, vocab_size).
        keys: (batch,) int64, as `noise.hash_bits` returns them.
        items: (vocab_size,) int32, hash of each token, as `noise.item_bits` returns them.
        temperature: (batch, 1); rows with a temperature of 0 get no noise. None: all rows get noise.
    """
    logits, drawn = logits.contiguous(), torch.empty_like(keys)
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        _draw[(len(keys),)](
            logits, keys, items, temperature, drawn, logits.shape[1], HEATED=temperature is not None, BLOCK=1024
        )
    return drawn


# One program computes BLOCK units of one row: grid (batch, hidden_size / BLOCK). Arrays as in `plain_cell`, row-major.
@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _cell(product, added, tokens, cell, new_hidden, new_cell, size, TABLE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    row = tl.program_id(0).to(tl.int64)  # 64 bits: row * size may pass 2^31
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
    c = tl.sigmoid(i) * (2 * tl.sigmoid(2 * g) - 1) + tl.sigmoid(f) * tl.load(cell + at, inside)
    tl.store(new_cell + at, c, inside)
    tl.store(new_hidden + at, tl.sigmoid(o) * (2 * tl.sigmoid(2 * c) - 1), inside)


# One program draws one row: grid (batch,). It reads the vocabulary in blocks and keeps, for each of BLOCK columns, the
# best value so far and its token; the columns are compared at the end. Hash and noise are those of `noise.exponential`.
@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _draw(logits, keys, items, temperature, drawn, size, HEATED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    key = tl.load(keys + row).to(tl.uint32)
    cold = False
    if HEATED:
        cold = tl.load(temperature + row) == 0
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_token = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < size
        bits = key ^ tl.load(items + token, inside, 0).to(tl.uint32, bitcast=True)
        bits *= 0x7FEB352D
        bits ^= bits >> 15
        bits *= 0x846CA68B
        bits ^= bits >> 16
        u = ((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * 2.0**-31
        u = tl.minimum(u, 1 - 2.0**-24)
        rest = 1 - u
        # -log1p(-u) without log1p: the quotient corrects for the digits of a small u that `1 - u` rounded away
        noise = tl.where(rest == 1, u, tl.log(rest) * (u / (rest - 1)))
        value = tl.load(logits + row * size + token, inside, float("-inf")) - tl.where(cold, 0.0, tl.log(noise))
        best_token = tl.where(value > best, token, best_token)
        best = tl.maximum(value, best)
    # the first of equal values, as torch's argmax on a CPU
    first = tl.min(tl.where(best == tl.max(best, 0), best_token, size), 0)
    tl.store(drawn + row, first.to(tl.int64))
