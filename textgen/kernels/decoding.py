"""C++ for decoding on a CPU: one step of an int8 decoder, and the draw, each in a single call (decoding.cpp).

What a step does takes less time than torch's operators take to be called. What is returned is what they return, bit for
bit; the same `exp` is called. Where there is no compiler they are used.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from textgen.kernels.compile import library


@functools.cache
def _code() -> ctypes.CDLL | None:
    code = library("decoding.cpp")
    if code is not None:
        code.textgen_draw.restype = ctypes.c_int64
    return code


# --- the draw --------------------------------------------------------------------------------------------------------


def draw(
    logits: Tensor, items: Tensor, keys: Tensor, steps: Tensor, temperature: Tensor | None
) -> tuple[Tensor, int] | None:
    """Draw as `sampling.draw` does where the rounding of logarithms cannot matter.

    Args:
        logits: float32 (batch, vocab_size).
        items: hash of each token, int32 (vocab_size,), see `noise.exponential`.
        keys: int64 (batch,), of each row's seed and sample.
        steps: int64 (batch,), tokens drawn.
        temperature: float32 (batch, 1); a row of 0 has no noise.

    Returns:
        Tokens int64 (batch,), -1 for rows whose two best are too close to tell which one torch takes, about one in
        20,000, and for infinities and what is no number; and how many these are. None where this is not to be had.
    """
    code = _code_for(logits, temperature)
    if code is None or any(t.dtype != torch.int64 or t.shape != (len(logits),) for t in (keys, steps)):
        return None
    keys, steps = keys.contiguous(), steps.contiguous()
    temperature = None if temperature is None else temperature.contiguous()
    tokens = torch.empty_like(keys)
    num_doubtful = code.textgen_draw(
        _at(logits), _whole(len(logits)), _whole(logits.shape[1]), _whole(logits.stride(0)), _at(items), _at(keys),
        _at(steps), None if temperature is None else _at(temperature), _at(tokens), torch.get_num_threads(),
    )  # fmt: skip
    return tokens, num_doubtful


def divide_by_temperature(logits: Tensor, temperature: Tensor) -> Tensor | None:
    """Return what `sampling.divide_by_temperature` does, bit for bit where no logit is nan; None if not to be had."""
    code = _code_for(logits, temperature)
    if code is None:
        return None
    temperature, divided = temperature.contiguous(), torch.empty_like(logits, memory_format=torch.contiguous_format)
    code.textgen_divide(
        _at(logits), _whole(len(logits)), _whole(logits.shape[1]), _whole(logits.stride(0)), _at(temperature),
        _at(divided), torch.get_num_threads(),
    )  # fmt: skip
    return divided


def _code_for(logits: Tensor, temperature: Tensor | None) -> ctypes.CDLL | None:
    """Return the compiled code if it can read these logits and temperatures."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32 or logits.dim() != 2 or logits.stride(1) != 1:
        return None
    if temperature is not None and (temperature.dtype != torch.float32 or temperature.shape != (len(logits), 1)):
        return None
    return _code()


_whole = ctypes.c_int64


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


# --- the step --------------------------------------------------------------------------------------------------------


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "offset", "bias")),
        ("inputs", ctypes.c_int64), ("outputs", ctypes.c_int64),
    ]  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = [
        ("products", ctypes.POINTER(_Product)), ("table", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_layers", "hidden_size", "vocab_size", "projected")),
        ("exp", ctypes.c_void_p),
    ]  # fmt: skip


class Int8Step:
    """A step of stacked LSTM layers, without norms or residual sums, in 8-bit integers.

    Args:
        table: what the first layer sees in each token, bfloat16 (vocab_size, 4 x hidden_size), gates in the order
            input, forget, output, cell.
        products: weight int8 (outputs, inputs), scale and offset (outputs,) and perhaps bias, of each layer (outputs in
            the same order), perhaps a projection, and the output, in turn. What the output reads after a projection is
            scaled per row and its bias added last; everything else reads values from -1 to 1.
        num_layers: how many of the products are layers.
    """

    def __init__(
        self, table: Tensor, products: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]], num_layers: int
    ) -> None:
        code = _code()
        assert code is not None
        self._step, self._num_layers = code.textgen_step, num_layers
        self._vocab_size, self._size = len(table), table.shape[1] // 4
        self._products, self._kept = (_Product * len(products))(), [table]
        for i, (product, parts) in enumerate(zip(self._products, products, strict=True)):
            product.outputs, product.inputs = parts[0].shape
            weight, *others = (part if part is None else _in_panels(part, gates=i < num_layers) for part in parts)
            assert weight is not None
            weight = weight.view(len(weight), 64, -1, 4).transpose(1, 2).contiguous()  # 4 inputs of each output
            for name, tensor in zip(("weight", "scale", "offset", "bias"), (weight, *others), strict=True):
                if tensor is not None:
                    setattr(product, name, tensor.data_ptr())
                    self._kept.append(tensor)
        projected = len(products) - num_layers - 1
        self._model = _Model(
            self._products, table.data_ptr(), num_layers, self._size, self._vocab_size, projected, _exp()
        )

    def __call__(self, tokens: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Read one token per row, as `Decoder.step` says.

        Raises:
            IndexError: a token is not in the vocabulary.
            ValueError: tokens are not int64 (batch,), or the state is not of as many rows.
        """
        rows, make = len(tokens), functools.partial(torch.empty, dtype=torch.float32, device="cpu")
        if tokens.dtype != torch.int64 or any(p.shape != (rows, self._size) or p.dtype != torch.float32 for p in state):
            raise ValueError(f"{rows} tokens of {tokens.dtype} do not fit a state of {[tuple(p.shape) for p in state]}")
        tokens, state = tokens.contiguous(), [part.contiguous() for part in state]
        logits, after = make(rows, self._vocab_size), make(2 * self._num_layers, rows, self._size)
        before = (ctypes.c_void_p * len(state))(*(part.data_ptr() for part in state))
        known = self._step(
            ctypes.byref(self._model), _whole(rows), _at(tokens), before, _at(after), _at(logits),
            torch.get_num_threads(),
        )  # fmt: skip
        if not known:
            raise IndexError(f"tokens must be below the vocabulary's size {self._vocab_size}: {tokens.tolist()[:10]}")
        return logits, list(after.unbind(0))


def _in_panels(x: Tensor, *, gates: bool) -> Tensor:
    """Return x (outputs, ...) in panels of 64 outputs, (panels, 64, ...): of gates the four of each 16 units."""
    if gates:
        groups = x.reshape(4, -1, 16, *x.shape[1:]).transpose(0, 1)
    else:
        groups = torch.cat([x, x.new_zeros(-len(x) % 64, *x.shape[1:])])
    return groups.reshape(-1, 64, *x.shape[1:]).contiguous()


@functools.cache
def _exp() -> int | None:
    """Return the address of torch's `exp` of 16 floats, Sleef's (https://sleef.org), if torch has it."""
    try:
        torchs = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torchs.Sleef_expf16_u10, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


def has_int8_step() -> bool:
    """Tell whether there is an `Int8Step` here: on processors with AVX512-VNNI, and where torch has what it takes."""
    return hasattr(_code(), "textgen_step") and _exp() is not None
