"""Matrix products of decoders on packed weights: float32, bfloat16, int8."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from textgen.hardware import processor_flags


class Product(Protocol):
    """x @ weight.T + bias: (batch, inputs) to (batch, outputs), float32."""

    outputs: int

    def __call__(self, x: Tensor, /) -> Tensor: ...


class _PackedProduct:
    """x @ weight.T + bias on a CPU, by oneDNN on weights in its own layout; F.linear makes that anew at each call."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype) -> None:
        self._dtype, self._bias, self.outputs = dtype, bias, len(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self._dtype), self._weight, None, "none", [], "")
        y = y.float()
        return y if self._bias is None else y.add_(self._bias)


class _PlainProduct:
    """x @ weight.T + bias where weights need no other layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype) -> None:
        self._weight, self._bias, self.outputs = weight.to(dtype).contiguous(), bias, len(weight)

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x.to(self._weight.dtype), self._weight).float()
        return y if self._bias is None else y.add_(self._bias)


class _Int8Product:
    """x @ weight.T + bias on a CPU in 8-bit integers, exact sums in 32 bits: weights scaled per output.

    x is scaled by 127 where it is bounded by -1..1, else by a factor per row: a row does not depend on the others, and
    as sums of integers have no order, not on their number either. What is multiplied is x + 128, as the operator wants
    unsigned numbers; the 128 is taken off by the bias, which is a third faster than by the operator's zero point.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, bounded: bool) -> None:
        self._bounded, self._bias, self.outputs = bounded, bias, len(weight)
        scale = (weight.abs().amax(1) / 127).clamp(min=_TINY)
        whole = (weight / scale[:, None]).round_()
        sums = whole.sum(1) * 128  # exact, as whole numbers below 2^24 are
        whole = whole.to(torch.int8)
        self.tensors = {"weight": whole, "scale": scale} | ({} if bias is None else {"bias": bias.clone()})
        self._scale = scale / 127 if bounded else scale
        self._offset = -sums * self._scale
        if bounded and bias is not None:
            self._offset += bias
        self._whole, self._sums = whole, sums

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return weight, scale, offset, and the bias that comes after a row's scale."""
        return self._whole, self._scale, self._offset, None if self._bounded else self._bias

    @functools.cached_property
    def _product(self) -> _WholeProduct:
        return _product_in_int8(self._whole, self._sums) if multiplies_int8() else _product_in_float64(self._whole)

    def __call__(self, x: Tensor) -> Tensor:
        if self._bounded:
            return self._product((x * 127).round_(), self._scale, self._offset)
        row_scale = x.abs().amax(1, keepdim=True).div_(127).clamp_(min=_TINY)
        y = self._product((x / row_scale).round_(), self._scale, self._offset).mul_(row_scale)
        return y if self._bias is None else y.add_(self._bias)


_TINY = torch.finfo(torch.float32).tiny

# x of whole numbers -127 to 127, scale and offset per output: ((x + 128) @ weight.T) * scale + offset
_WholeProduct = Callable[[Tensor, Tensor, Tensor], Tensor]


def _product_in_int8(weight: Tensor, sums: Tensor) -> _WholeProduct:
    """Return the product; `sums` are 128 times those of each row."""
    packed, zeros = torch.ops.onednn.qlinear_prepack(weight, None), torch.zeros(len(weight), dtype=torch.int32)
    transposed, sums = weight.T, sums.to(torch.int32)

    def product(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        if len(x) == 1:  # the other operator takes 17 us to set up
            return torch._int_mm(x.to(torch.int8), transposed).add_(sums).float().mul_(scale).add_(offset)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            x.add_(128).to(torch.uint8), 1.0, 0, packed, scale, zeros, offset, 1.0, 0, torch.float32, "none", [], ""
        )
        return y

    return product


def _product_in_float64(weight: Tensor) -> _WholeProduct:
    """Return the same by plain means, bit for bit: float64 holds the sums exactly."""
    wide = weight.double()

    def product(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return F.linear(x.double() + 128, wide).float().mul_(scale).add_(offset)

    return product


@functools.cache
def multiplies_int8() -> bool:
    """Tell whether this processor multiplies 8-bit integers fast, and torch's operators for it are right.

    The operators belong to torch's inner parts, so they are tried, on the largest sums: without VNNI or AMX steps of 16
    bits overflow.
    """
    if not processor_flags() & {"avx512_vnni", "avx_vnni", "amx_int8"}:
        return False
    weight = torch.full((32, 64), 127, dtype=torch.int8)
    weight[::2] = -127
    rows, ones = [torch.full((count, 64), 127.0) for count in (1, 2)], torch.ones(32)
    try:
        fast, right = _product_in_int8(weight, weight.sum(1) * 128), _product_in_float64(weight)
        return all(torch.equal(fast(x.clone(), ones, ones), right(x, ones, ones)) for x in rows)
    except (AttributeError, RuntimeError):
        return False


@functools.cache
def _packs(dtype: torch.dtype) -> bool:
    """Tell whether torch's inner operators for packed weights are there and right."""
    x, weight = torch.ones(2, 32, dtype=dtype), torch.eye(32, dtype=dtype)
    try:
        return torch.equal(_PackedProduct(weight, None, dtype=dtype)(x), x.float())
    except (AttributeError, RuntimeError):
        return False
