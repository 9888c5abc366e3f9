"""Compiled code for decoding on a CPU: steps of an int8 decoder, the draw, and masks, each in one call.

For a few rows, calling torch's operators takes longer than their work. The compiled code returns the same values bit
for bit, and calls the same `exp`. Functions return None without a compiler; the caller then uses torch's operators.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from textgen.kernels.compile import library


@functools.cache
def compiled_code() -> ctypes.CDLL | None:
    """Return the compiled code; None if it cannot be compiled."""
    code = library("decoding.cpp")
    if code is not None:
        code.textgen_draw.restype = ctypes.c_int64
        if hasattr(code, "textgen_draw_many"):
            code.textgen_draw_many.restype = ctypes.c_int64
        for name, kinds in _ARGUMENTS.items():
            if hasattr(code, name):
                getattr(code, name).argtypes = [_KINDS[kind] for kind in kinds]
    return code


# Kinds of arguments: p, a pointer, n, an int64, i, an int, d, a double. ctypes then takes plain numbers; making its own
# objects at each call took 4 of the 17 microseconds that one row is divided and drawn in (one Zen 4 core, 2026-11-29).
_KINDS: dict[str, type] = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "i": ctypes.c_int, "d": ctypes.c_double}
_ARGUMENTS = {
    "textgen_draw": "pnnnpppppi",
    "textgen_divide": "pnnnppi",
    "textgen_keep_allowed": "pnnnpnnpi",
    "textgen_penalize_repeats": "pnnnpnppppnpi",
    "textgen_exclude": "pnnnppppi",
    "textgen_uniform": "ppnnp",
    "textgen_step": "pnppppi",
    "textgen_draw_many": "ppnnndppppppi",
}


# --- the draw --------------------------------------------------------------------------------------------------------


def draw(
    logits: Tensor, items: Tensor, keys: Tensor, steps: Tensor, temperature: Tensor | None
) -> tuple[Tensor, int] | None:
    """Draw the tokens that `sampling.draw` draws, except those that the rounding of a logarithm could change.

    A draw is a Gumbel-max: the token with the largest logit - log(noise), where noise is `noise.exponential`.

    Args:
        logits: float32 (batch, vocab_size).
        items: int32 (vocab_size,), hash of each token, as `noise.item_bits` returns them.
        keys: int64 (batch,), hash of each row's seed and sample number.
        steps: int64 (batch,), number of tokens that each row has drawn.
        temperature: float32 (batch, 1), by which logits are divided already; a row of 0 gets no noise. None: all noisy.

    Returns:
        Tokens, int64 (batch,), and the number of rows that got -1 and have to be drawn by torch: rows whose two best
        tokens are so close that rounding decides, about one in 20,000, and rows with infinite or nan logits. None if
        there is no compiled code for these tensors.
    """
    code, (rows, size) = _code_for(logits, temperature), logits.shape
    if code is None or not keys.dtype == steps.dtype == torch.int64 or not keys.shape == steps.shape == (rows,):
        return None
    keys, steps = keys.contiguous(), steps.contiguous()
    temperature = None if temperature is None else temperature.contiguous()
    tokens = torch.empty_like(keys)
    num_doubtful = code.textgen_draw(
        logits.data_ptr(),
        rows,
        size,
        logits.stride(0),
        items.data_ptr(),
        keys.data_ptr(),
        steps.data_ptr(),
        None if temperature is None else temperature.data_ptr(),
        tokens.data_ptr(),
        torch.get_num_threads(),
    )
    return tokens, num_doubtful


def divide_by_temperature(logits: Tensor, temperature: Tensor) -> Tensor | None:
    """Return the result of `sampling.divide_by_temperature`, bit for bit if no logit is nan.

    Args:
        logits: float32 (batch, vocab_size).
        temperature: float32 (batch, 1).

    Returns:
        float32 (batch, vocab_size); None if there is no compiled code for these tensors.
    """
    code = _code_for(logits, temperature)
    if code is None:
        return None
    (rows, size), temperature, divided = logits.shape, temperature.contiguous(), _empty_like(logits)
    code.textgen_divide(
        logits.data_ptr(),
        rows,
        size,
        logits.stride(0),
        temperature.data_ptr(),
        divided.data_ptr(),
        torch.get_num_threads(),
    )
    return divided


def keep_allowed(logits: Tensor, masks: Tensor, eos_id: int) -> Tensor | None:
    """Return the result of `sampling.keep_allowed`.

    Args:
        logits: float32 (batch, vocab_size).
        masks: uint8 (batch, bytes), a bit for each token.
        eos_id: the token that ends a text.

    Returns:
        float32 (batch, vocab_size); None if there is no compiled code for these tensors.
    """
    code = _code_for(logits, None)
    if code is None or 8 * masks.shape[1] < logits.shape[1] or len(masks) != len(logits):
        return None
    masks, kept = masks.contiguous(), _empty_like(logits)
    code.textgen_keep_allowed(
        logits.data_ptr(),
        len(logits),
        logits.shape[1],
        logits.stride(0),
        masks.data_ptr(),
        masks.shape[1],
        eos_id,
        kept.data_ptr(),
        torch.get_num_threads(),
    )
    return kept


def penalize_repeats(
    logits: Tensor,
    history: Tensor,
    breaks: Tensor,
    *,
    multiplier: Tensor,
    base: Tensor,
    allowed_length: Tensor,
    at_most: int,
) -> Tensor | None:
    """Return the result of `sampling.penalize_repeats`, whose arguments these are.

    Args:
        logits: float32 (batch, vocab_size).
        history: int64 (batch, length), at least `at_most` tokens.
        breaks: bool (batch, vocab_size).
        multiplier: float32 (batch, 1).
        base: float32 (batch, 1).
        allowed_length: int64 (batch, 1), at least 1.
        at_most: tokens of a repetition that count.

    Returns:
        float32 (batch, vocab_size); None if there is no compiled code for these tensors.
    """
    code = _code_for(logits, multiplier)
    if code is None:
        return None
    parts = [part.contiguous() for part in (history, breaks, multiplier, base, allowed_length)]
    penalized = _empty_like(logits)
    code.textgen_penalize_repeats(
        logits.data_ptr(),
        *logits.shape,
        logits.stride(0),
        parts[0].data_ptr(),
        history.shape[1],
        *[part.data_ptr() for part in parts[1:]],
        at_most,
        penalized.data_ptr(),
        torch.get_num_threads(),
    )
    return penalized


def exclude_top_choices(logits: Tensor, threshold: Tensor, applies: Tensor) -> Tensor | None:
    """Return the result of `sampling.exclude_top_choices`; torch computes the probabilities.

    Args:
        logits: float32 (batch, vocab_size).
        threshold: float32 (batch, 1).
        applies: bool (batch, 1).

    Returns:
        float32 (batch, vocab_size); None if there is no compiled code for these tensors.
    """
    code = _code_for(logits, threshold)
    if code is None:
        return None
    probabilities, kept = logits.softmax(-1), _empty_like(logits)
    threshold, applies = threshold.contiguous(), applies.contiguous()
    code.textgen_exclude(
        logits.data_ptr(),
        *logits.shape,
        logits.stride(0),
        probabilities.data_ptr(),
        threshold.data_ptr(),
        applies.data_ptr(),
        kept.data_ptr(),
        torch.get_num_threads(),
    )
    return kept


def uniform(keys: Tensor, steps: Tensor, coordinate: int) -> Tensor | None:
    """Return `noise.uniform` of each row: float32 (batch,); None if there is no compiled code for these tensors.

    Args:
        keys: int64 (batch,).
        steps: int64 (batch,).
        coordinate: the third one.
    """
    code = compiled_code() if keys.device.type == "cpu" else None
    if code is None:
        return None
    keys, steps, values = keys.contiguous(), steps.contiguous(), torch.empty(len(keys))
    code.textgen_uniform(keys.data_ptr(), steps.data_ptr(), coordinate, len(keys), values.data_ptr())
    return values


def can_read(logits: Tensor, temperature: Tensor | None) -> bool:
    """Return whether there is compiled code for logits (batch, vocab_size) and temperatures (batch, 1)."""
    return _code_for(logits, temperature) is not None


def _code_for(logits: Tensor, temperature: Tensor | None) -> ctypes.CDLL | None:
    """Return the compiled code if it can read these logits and temperatures; None otherwise."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32 or logits.dim() != 2 or logits.stride(1) != 1:
        return None
    if temperature is not None and (temperature.dtype != torch.float32 or temperature.shape != (logits.shape[0], 1)):
        return None
    return compiled_code()


def _empty_like(logits: Tensor) -> Tensor:
    """Return a new tensor of the same shape, whose rows are contiguous."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


# --- the step --------------------------------------------------------------------------------------------------------


class _Product(ctypes.Structure):
    """The C++ structure `Product`; fields must be in the same order."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "offset", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    )


class _Model(ctypes.Structure):
    """The C++ structure `Model`; fields must be in the same order."""

    _fields_ = (
        ("products", ctypes.POINTER(_Product)),
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_layers", "hidden_size", "num_inputs", "vocab_size", "projected")),
        ("exp", ctypes.c_void_p),
    )


# Settings of rows that compiled steps know, by the names of `sampling.SamplingState`, in the order of the C++ structure
# `Rows` after `kept_rows`.
_ROW_SETTINGS = (
    ("temperature", torch.float32), ("top_p", torch.float32), ("min_p", torch.float32), ("top_k", torch.int64),
    ("min_new_tokens", torch.int64), ("bias", torch.float32), ("banned", torch.bool), ("seen", torch.bool),
    ("counts", torch.int32), ("repetition_penalty", torch.float32), ("presence_penalty", torch.float32),
    ("frequency_penalty", torch.float32), ("dry_multiplier", torch.float32), ("dry_base", torch.float32),
    ("dry_allowed_length", torch.int64), ("breaks", torch.bool), ("history", torch.int64),
    ("xtc_probability", torch.float32), ("xtc_threshold", torch.float32), ("label_scale", torch.float32),
)  # fmt: skip
_RECORDS = ("step", "seen", "counts", "history")  # what a step changes


class _Rows(ctypes.Structure):
    """The C++ structure `Rows`; fields must be in the same order."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("items", "keys", "steps", "lengths", "scaled_rows", "kept_rows")),
        *((name, ctypes.c_void_p) for name, _ in _ROW_SETTINGS),
        *((name, ctypes.c_int64) for name in ("unk", "eos", "history_length", "repeat_length", "xtc_noise")),
        *((name, ctypes.c_int64) for name in ("num_scaled", "num_kept")),
    )
    pointed: list[Tensor]
    """the tensors that it points into, which must live as long"""


_NO_ROWS = torch.empty(0, dtype=torch.int64)

# Most logits that `Int8Step.draw_many` keeps: 64 MiB. A call takes fewer steps rather than more memory.
KEPT_LOGITS = 1 << 24


class Halt:
    """A flag that ends `Int8Step.draw_many` after its step, from any thread."""

    def __init__(self) -> None:
        self.flag = ctypes.c_int32(0)

    def set(self, value: bool) -> None:
        """End the call that runs, and later ones after their first step; or let later ones run."""
        self.flag.value = value


@dataclass(frozen=True)
class Drawn:
    """What `Int8Step.draw_many` returns."""

    tokens: Tensor
    """int64 (steps, batch), at least one step"""
    state: list[Tensor]
    """after all steps but the reading of the last tokens, as `Decoder.step` returns it"""
    doubtful: Tensor | None
    """logits of the last step, float32 (batch, vocab_size), if some of its tokens are -1; else None"""
    kept_rows: Sequence[int]
    """the rows whose logits were kept"""
    kept: Tensor
    """their logits by the model alone, float32 (steps, kept rows, vocab_size)"""


class Int8Step:
    """A step of stacked LSTM layers, without norms or residual sums, in 8-bit integers.

    Args:
        table: bfloat16 (inputs, 4 * hidden_size), the first layer's input weights times the embedding of each token
            and label, plus its bias; gates in the order input, forget, output, cell.
        products: matrix products in order: one of each layer (outputs are gates, in the same order), a projection if
            the model has one, and the output layer. Each is weight int8 (outputs, inputs), scale and offset
            (outputs,), and bias (outputs,) or None. Inputs are hidden states from -1 to 1. Only the input of an output
            layer after a projection has another range: it is scaled per row, and the bias is added last.
        num_layers: number of layers among the products.
        vocab_size: number of logits.
    """

    def __init__(
        self,
        table: Tensor,
        products: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]],
        num_layers: int,
        *,
        vocab_size: int,
    ) -> None:
        code = compiled_code()
        assert code is not None  # see has_int8_step
        self._step, self._draw_many, self._num_layers = code.textgen_step, code.textgen_draw_many, num_layers
        self._num_inputs, self._vocab_size, self._size = len(table), vocab_size, table.shape[1] // 4
        self._products = (_Product * len(products))()
        self._kept = [table]  # tensors that the structures point into
        for i, (product, parts) in enumerate(zip(self._products, products, strict=True)):
            product.outputs, product.inputs = parts[0].shape
            weight, *others = (part if part is None else _in_panels(part, gates=i < num_layers) for part in parts)
            assert weight is not None
            # vpdpbusd multiplies 4 inputs with 4 weights of each output: (panels, inputs / 4, 64 outputs, 4 inputs).
            # The copy takes half the time if 4 inputs are an int32.
            weight = weight.view(torch.int32).transpose(1, 2).contiguous()
            for name, tensor in zip(("weight", "scale", "offset", "bias"), (weight, *others), strict=True):
                if tensor is not None:
                    setattr(product, name, tensor.data_ptr())
                    self._kept.append(tensor)
        projected = len(products) - num_layers - 1
        self._model = _Model(
            self._products,
            table.data_ptr(),
            num_layers,
            self._size,
            self._num_inputs,
            self._vocab_size,
            projected,
            _exp(),
        )
        self._address, self._pointers = ctypes.addressof(self._model), ctypes.c_void_p * (2 * num_layers)

    def __call__(self, tokens: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Read one token per row; see `Decoder.step`.

        Args:
            tokens: int64 (batch,).
            state: hidden and cell of each layer in turn, each float32 (batch, hidden_size).

        Returns:
            Logits, float32 (batch, vocab_size), and the new state.

        Raises:
            IndexError: a token is not in the vocabulary.
            ValueError: tokens are not int64 (batch,), or the state has another shape or dtype.
        """
        rows, shape = len(tokens), (len(tokens), self._size)
        if tokens.dtype != torch.int64 or any(p.shape != shape or p.dtype != torch.float32 for p in state):
            raise ValueError(f"{rows} tokens of {tokens.dtype} do not fit a state of {[tuple(p.shape) for p in state]}")
        tokens, state = tokens.contiguous(), [part.contiguous() for part in state]
        logits = torch.empty(rows, self._vocab_size, dtype=torch.float32, device="cpu")
        after = torch.empty(2 * self._num_layers, rows, self._size, dtype=torch.float32, device="cpu")
        before = self._pointers(*[part.data_ptr() for part in state])
        in_vocabulary = self._step(
            self._address,
            rows,
            tokens.data_ptr(),
            before,
            after.data_ptr(),
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        if not in_vocabulary:
            raise IndexError(f"tokens must be below the number of inputs {self._num_inputs}: {tokens.tolist()[:10]}")
        return logits, list(after.unbind(0))

    def draw_many(
        self,
        tokens: Tensor,
        state: Sequence[Tensor],
        sampling: Mapping[str, Tensor],
        lengths: Sequence[int],
        kept_rows: Sequence[int],
        *,
        items: Tensor,
        unk_id: int,
        eos_id: int,
        repeat_length: int,
        xtc_noise: int,
        most_steps: int,
        most_ended: int,
        seconds: float,
        halt: Halt,
    ) -> Drawn:
        """Read a token per row, draw the next one, read that, and so on: what `batch.advance` does, many times.

        The call ends early after a step in which torch has to draw a row, because rounding may decide about its token.
        These rows get -1, and `sampling` does not record the tokens of that step: the caller does both.

        Args:
            tokens: int64 (batch,).
            state: as in a call.
            sampling: tensors of `sampling.SamplingState`. Those of filters that compiled code does not know are not
                looked at. What is drawn is recorded in place.
            lengths: number of tokens after which each row ends. A row also ends with the end-of-text token, and gets
                that token from then on.
            kept_rows: rows whose logits by the model alone are returned for each step.
            items: as in `draw`.
            unk_id: a token that is never drawn.
            eos_id: the token that ends a text.
            repeat_length: tokens of a repetition that DRY counts.
            xtc_noise: coordinate of XTC's noise.
            most_steps: largest number of steps.
            most_ended: the call ends when so many rows have ended.
            seconds: the call ends after the step in which they have passed.
            halt: ends the call.

        Raises:
            IndexError: a token is not in the vocabulary.
        """
        count, empty = len(tokens), functools.partial(torch.empty, dtype=torch.float32)
        if kept_rows:
            most_steps = max(min(most_steps, KEPT_LOGITS // (len(kept_rows) * self._vocab_size)), 1)
        # Rows whose label is scaled have a twin without the label, which reads the same tokens.
        scaled = (sampling["label_scale"][:, 0] != 1).nonzero()[:, 0] if "unlabelled" in sampling else _NO_ROWS
        if len(scaled):
            tokens = torch.cat([tokens, sampling["unlabelled"][scaled]])
            twins = [sampling[f"unlabelled.{i}"] for i in range(2 * self._num_layers)]
            state = [torch.cat([part, twin[scaled]]) for part, twin in zip(state, twins, strict=True)]
        drawn = torch.empty(most_steps + 1, len(tokens), dtype=torch.int64)
        drawn[0] = tokens
        logits, after = empty(len(tokens), self._vocab_size), empty(2 * self._num_layers, len(tokens), self._size)
        kept = empty(most_steps, len(kept_rows), self._vocab_size)
        state = [part.contiguous() for part in state]
        before = self._pointers(*[part.data_ptr() for part in state])
        rows = _rows_of(sampling, items, torch.tensor(lengths), scaled, torch.tensor(kept_rows, dtype=torch.int64))
        rows.unk, rows.eos, rows.repeat_length, rows.xtc_noise = unk_id, eos_id, repeat_length, xtc_noise
        rows.num_scaled, rows.num_kept = len(scaled), len(kept_rows)
        steps = self._draw_many(
            self._address,
            ctypes.byref(rows),
            count,
            most_steps,
            most_ended,
            seconds,
            ctypes.byref(halt.flag),
            drawn.data_ptr(),
            before,
            after.data_ptr(),
            logits.data_ptr(),
            kept.data_ptr(),
            torch.get_num_threads(),
        )
        if steps == 0:
            raise IndexError(f"tokens must be below the number of inputs {self._num_inputs}: {tokens.tolist()[:10]}")
        drawn = drawn[1 : abs(steps) + 1]
        if len(scaled):
            sampling["unlabelled"][scaled] = drawn[-1, count:]
            for twin, part in zip(twins, after, strict=True):
                twin[scaled] = part[count:]
        new_state = list(after[:, :count].unbind(0))
        doubtful = logits[:count] if steps < 0 else None
        return Drawn(drawn[:, :count], new_state, doubtful, kept_rows, kept[: abs(steps)])


def _rows_of(
    sampling: Mapping[str, Tensor], items: Tensor, lengths: Tensor, scaled_rows: Tensor, kept_rows: Tensor
) -> _Rows:
    """Return the structure of rows with its pointers and `history_length`; the caller sets the other numbers."""
    pointed = [items, sampling["key"].contiguous(), sampling["step"], lengths, scaled_rows, kept_rows]
    rows = _Rows(*(tensor.data_ptr() for tensor in pointed))
    for name, dtype in _ROW_SETTINGS:
        if (tensor := sampling.get(name)) is not None:
            tensor = tensor.log() if name == "min_p" else tensor
            assert tensor.dtype == dtype
            assert tensor.is_contiguous() or name not in _RECORDS
            pointed.append(tensor.contiguous())
            setattr(rows, name, pointed[-1].data_ptr())
    rows.history_length = sampling["history"].shape[1] if "history" in sampling else 0
    rows.pointed = pointed
    return rows


def _in_panels(x: Tensor, *, gates: bool) -> Tensor:
    """Return x (outputs, ...) in panels of 64 outputs, (panels, 64, ...).

    A panel of gates holds the four gates of 16 units, so that the units' cells can be computed from one panel. Other
    outputs are filled up with zeros to a multiple of 64.
    """
    if gates:  # (4, units, ...) to (units / 16, 4, 16, ...)
        groups = x.reshape(4, -1, 16, *x.shape[1:]).transpose(0, 1)
    else:
        groups = torch.cat([x, x.new_zeros(-len(x) % 64, *x.shape[1:])])
    return groups.reshape(-1, 64, *x.shape[1:]).contiguous()


@functools.cache
def _exp() -> int | None:
    """Return the address of the `exp` of 16 floats that torch calls, Sleef's (https://sleef.org); None without it."""
    try:
        libtorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(libtorch.Sleef_expf16_u10, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


def has_int8_step() -> bool:
    """Return whether `Int8Step` works here: the processor has AVX512-VNNI, and torch's library exports its `exp`."""
    return hasattr(compiled_code(), "textgen_step") and _exp() is not None
