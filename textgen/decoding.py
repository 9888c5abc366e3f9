"""Single steps of a trained model, as fast as the device reads its weights.

A decoder reads one token per row and returns logits for the next. The model's own `forward` says what is right; every
other decoder computes the same from weights laid out anew: what the first LSTM layer makes of each token's embedding is
a table, each layer is one matrix product, and the products run on weights that are packed once instead of at every
call.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from textgen.config import DecoderName
from textgen.files import JSON_BYTES, parse_json
from textgen.hardware import has_bfloat16, processor_flags
from textgen.kernels import decoding as decoding_kernels
from textgen.model import WEIGHTS_NAME, LSTMLanguageModel, LSTMLayer

log = logging.getLogger("textgen")

CellDtype = Literal["float32", "bfloat16", "int8"]

# What a decoder carries from token to token: tensors whose first dimension is the batch.
DecoderState = list[Tensor]


class Product(Protocol):
    """x @ weight.T + bias: (batch, inputs) to (batch, outputs), float32."""

    outputs: int

    def __call__(self, x: Tensor, /) -> Tensor: ...


# A prompt is read in windows of this many tokens, so that one of any length takes no more memory.
PREFILL_WINDOW = 512

# Figures of an export, in the checkpoint's directory, and what int8 may cost to be taken unasked.
FIGURES_NAME = "decoder.json"
FIGURES_FORMAT = "textgen.decoder.1"
MOST_BITS_PER_BYTE = 0.002


class DecoderError(ValueError):
    """A decoder that is not to be had here; the message is one line."""


# --- decoders --------------------------------------------------------------------------------------------------------


class Decoder:
    """Reads tokens, one per row and step. This one is the model as it stands: slow, and right by definition."""

    name = "plain"
    in_graphs = False
    """many steps at a time are to be replayed from CUDA graphs"""

    def __init__(self, model: LSTMLanguageModel, *, why: str = "") -> None:
        self.model, self._why = model, why
        self.vocab_size = model.vocab_size
        self.device = model.embedding.weight.device

    @property
    def description(self) -> str:
        """Return name, device, and why it was chosen, in a line."""
        where = f"{self.device.type}, in graphs" if self.in_graphs else self.device.type
        return f"{self.name} decoder on {where}" + (f": {self._why}" if self._why else "")

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> DecoderState:
        """Return the state (1, ...) after all tokens but the last one of a prompt, which `step` is to read."""
        model = self.model
        ids, state = torch.tensor([tokens[:-1]], dtype=torch.int64, device=self.device), model.zero_state(1)
        for start in range(0, ids.shape[1], PREFILL_WINDOW):
            window = ids[:, start : start + PREFILL_WINDOW]
            _, state = model(window, state, torch.full_like(window, -1))  # targets that score nothing: no logits
        return [part[i] for i in range(model.config.num_layers) for part in state]

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read one token per row.

        Args:
            tokens: (batch,) int64.
            state: hidden and cell of each layer in turn, each (batch, hidden_size).

        Returns:
            Logits (batch, vocab_size), float32, and the new state.
        """
        logits, (hidden, cell) = self.model(tokens[:, None], (torch.stack(state[::2]), torch.stack(state[1::2])))
        return logits[:, 0], [part[i] for i in range(len(hidden)) for part in (hidden, cell)]


class CellDecoder(Decoder):
    """Steps of one LSTM cell per layer, on packed weights.

    Args:
        model: whose weights are taken; changes to it afterwards do not show.
        dtype: what the matrix products read. bfloat16 adds up in float32; int8 weights are scaled per output, what they
            multiply by a constant or per row, so that a row does not depend on the others. State and everything else
            is float32, but for the table, which is bfloat16 unless all is float32.
        why: it was chosen.
    """

    def __init__(self, model: LSTMLanguageModel, dtype: CellDtype = "float32", *, why: str = "") -> None:
        super().__init__(model, why=why)
        self.name = dtype
        config, normed = model.config, len(model.norms) > 0
        packed = self.device.type == "cpu" and dtype != "int8" and _packs(_DTYPES[dtype])
        kind = _PackedProduct if packed else _PlainProduct

        def within_one(num_layers: int) -> bool:
            """Tell whether what so many layers return lies within -1..1, as hidden states do; norms and sums do not."""
            return not normed and (num_layers == 1 or not config.residual)

        def pack(weight: Tensor, bias: Tensor | None = None, *, bounded: bool) -> Product:
            if dtype == "int8":
                return _Int8Product(weight, bias, bounded=bounded)
            return kind(weight, bias, dtype=_DTYPES[dtype])

        with torch.no_grad():
            layers = [layer for layer in model.layers if isinstance(layer, LSTMLayer)]
            first = layers[0]
            table_dtype = torch.float32 if dtype == "float32" else torch.bfloat16
            self._table = F.linear(*_table_parts(model, first, table_dtype))  # (vocab_size, 4 x hidden_size)
            # Of each layer what it makes of its own hidden state, or of that after what lies below; and of what lies
            # below, where that has a scale of its own.
            self._cells: list[Product] = [pack(_gates_last(first.weight_hh), bounded=True)]
            self._below: list[Product | None] = [None]
            for i, layer in enumerate(layers[1:], 1):
                joined = dtype != "int8" or within_one(i)
                weight = torch.cat([layer.weight_ih, layer.weight_hh], 1) if joined else layer.weight_hh
                self._cells.append(pack(_gates_last(weight), _gates_last(layer.bias), bounded=True))
                self._below.append(None if joined else pack(_gates_last(layer.weight_ih), bounded=False))
            projection, bounded = model.projection, within_one(config.num_layers)
            self._projection: Product | None = None
            if isinstance(projection, torch.nn.Linear):
                self._projection, bounded = pack(projection.weight, projection.bias, bounded=bounded), False
            self._output = pack(model.output.weight, model.output.bias, bounded=bounded)

    @functools.cached_property
    def _kernel(self) -> decoding_kernels.Int8Step | None:
        """The same step in compiled code, where that is to be had."""
        config = self.model.config
        plain = len(self.model.norms) == 0 and (config.num_layers == 1 or not config.residual)
        # torch rounds the last elements of an array that is no multiple of 32 by another `exp`
        whole = config.hidden_size % 32 == 0 and config.embedding_dim % 32 == 0
        if (
            self.name != "int8"
            or self.device.type != "cpu"
            or not (plain and whole and decoding_kernels.has_int8_step())
        ):
            return None
        products = [cast(_Int8Product, p) for p in (*self._cells, self._projection, self._output) if p is not None]
        return decoding_kernels.Int8Step(self._table, [product.parts for product in products], config.num_layers)

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read one token per row, as `Decoder.step` says."""
        return self._by_operators(tokens, state) if self._kernel is None else self._kernel(tokens, state)

    def _by_operators(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        config, norms, out = self.model.config, self.model.norms, []
        tanh = _tanh if self.name.endswith("int8") else torch.tanh
        size, x = config.hidden_size, state[0]
        for i, cell in enumerate(self._cells):
            hidden, memory = state[2 * i : 2 * i + 2]
            before = x
            if i == 0:
                gates = cell(hidden).add_(self._table.index_select(0, tokens))  # (batch, 4 x hidden_size)
            else:
                below, alone = (norms[i - 1](x) if len(norms) else x), self._below[i]
                gates = cell(torch.cat([below, hidden], 1)) if alone is None else cell(hidden).add_(alone(below))
            opened = gates[:, : 3 * size].sigmoid_()  # input, forget, output
            memory = (opened[:, size : 2 * size] * memory).addcmul_(opened[:, :size], tanh(gates[:, 3 * size :]))
            x = hidden = opened[:, 2 * size :] * tanh(memory)
            if i > 0 and config.residual:
                x = x + before
            out += [hidden, memory]
        if len(norms):
            x = norms[-1](x)
        if self._projection is not None:
            x = self._projection(x)
        return self._output(x), out

    def int8_tensors(self) -> dict[str, Tensor]:
        """Return what an int8 decoder is made of, by name; rows of cells are input, forget, output, cell."""
        first = self.model.layers[0]
        assert isinstance(first, LSTMLayer)
        embedding, weight, bias = _table_parts(self.model, first, torch.bfloat16)
        tensors = {"embedding": embedding, "table.weight": weight, "table.bias": bias}
        tensors |= {f"norms.{name}": value for name, value in self.model.norms.named_parameters()}
        products = {f"cells.{i}": cell for i, cell in enumerate(self._cells)}
        products |= {f"below.{i}": below for i, below in enumerate(self._below) if below is not None}
        products |= {"output": self._output} | ({} if self._projection is None else {"projection": self._projection})
        for name, product in products.items():
            assert isinstance(product, _Int8Product)
            tensors |= {f"{name}.{part}": value for part, value in product.tensors.items()}
        return {name: value.detach() for name, value in tensors.items()}


class CompiledDecoder(CellDecoder):
    """A `CellDecoder` whose step is fused by torch.compile, which takes half a minute at the first call.

    On a CPU this takes a C++ compiler, and gains nothing over the bare cells that was measured.
    """

    def __init__(self, model: LSTMLanguageModel, dtype: CellDtype = "float32", *, why: str = "") -> None:
        super().__init__(model, dtype, why=why)
        self.name = f"compiled {dtype}"
        if self.device.type == "cpu":
            self._cells = [_Opaque(cell) for cell in self._cells]
            self._below = [below and _Opaque(below) for below in self._below]
            self._projection = self._projection and _Opaque(self._projection)
            self._output = _Opaque(self._output)
        self._step = torch.compile(self._by_operators, dynamic=True)

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read one token per row, as `Decoder.step` says."""
        return self._step(tokens, state)


class _Opaque:
    """A product on packed weights that the compiler calls and does not look into: it knows no packed tensors."""

    _alive: WeakValueDictionary[int, Product] = WeakValueDictionary()

    def __init__(self, product: Product) -> None:
        self._product, self.outputs = product, product.outputs
        self._alive[id(product)] = product
        self._define()

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.textgen.product(x, id(self._product), self.outputs)
        return y

    @classmethod
    @functools.cache
    def _define(cls) -> torch.library.Library:
        library = torch.library.Library("textgen", "DEF")  # type: ignore[no-untyped-call]
        library.define("product(Tensor x, int product, int outputs) -> Tensor")  # type: ignore[no-untyped-call]
        library.impl("product", lambda x, product, outputs: cls._alive[product](x), "CPU")  # type: ignore[no-untyped-call]
        library.impl("product", lambda x, product, outputs: x.new_empty(len(x), outputs), "Meta")  # type: ignore[no-untyped-call]
        return library


def _tanh(x: Tensor) -> Tensor:
    """Return tanh(x) but for 2^-23, which int8 does not see. torch's own is its BLAS's, which may round as it likes."""
    return (x * 2).sigmoid_().mul_(2).sub_(1)


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _table_parts(model: LSTMLanguageModel, first: LSTMLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return embedding, weight and bias that make the table: what the first layer sees in each token."""
    weight, bias = _gates_last(first.weight_ih), _gates_last(first.bias)
    return model.embedding.weight.to(dtype), weight.to(dtype), bias.to(dtype)


def _gates_last(weight: Tensor) -> Tensor:
    """Return rows in the order input, forget, output, cell: torch's has the cell third."""
    i, f, g, o = weight.chunk(4)
    return torch.cat([i, f, o, g])


# --- matrix products on packed weights -------------------------------------------------------------------------------


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


# --- the choice ------------------------------------------------------------------------------------------------------


def choose_decoder(model: LSTMLanguageModel, name: str = "auto", *, directory: Path | None = None) -> Decoder:
    """Return the decoder of a name; `auto` takes the fastest that costs nothing worth knowing.

    Args:
        model: on the device where it is to decode.
        name: one of `DecoderName`.
        directory: the checkpoint's, whose `decoder.json` says what int8 costs.

    Raises:
        DecoderError: there is no such decoder, or not here.
    """
    names, device = get_args(DecoderName), model.embedding.weight.device.type
    if name not in names:
        raise DecoderError(f"`decoder` must be one of {', '.join(f'`{known}`' for known in names)}: {name}")
    if name == "plain":
        return Decoder(model, why="as asked")
    if name == "graph" and device != "cuda":
        raise DecoderError(f"the decoder `graph` needs a CUDA device, the model is on {device}")
    if name == "int8" and device != "cpu":
        raise DecoderError(f"the decoder `int8` is one of CPUs, the model is on {device}")
    if name not in ("auto", "compiled", "graph"):
        slow = name == "int8" and not multiplies_int8()
        why = "as asked" + (", though this processor has no VNNI: slow" if slow else "")
        return CellDecoder(model, cast(CellDtype, name), why=why)
    dtype, why = _fastest(device, directory)
    if name in ("auto", "graph"):
        decoder = CellDecoder(model, dtype, why=why)
        decoder.in_graphs = device == "cuda"
        return decoder
    if device == "cpu" and (compiler := _missing_compiler()) is not None:
        log.warning("the decoder `compiled` needs a C++ compiler, and there is no `%s`: not compiled", compiler)
        return CellDecoder(model, dtype, why=why)
    return CompiledDecoder(model, dtype, why=why)


def _fastest(device: str, directory: Path | None) -> tuple[CellDtype, str]:
    """Return what products of cells best read on a device, and why."""
    if device == "cuda":
        if has_bfloat16(use_cpu=False):
            return "bfloat16", "the GPU has it"
        return "float32", "the GPU has no bfloat16"
    if device != "cpu":
        return "float32", f"nothing else is known of {device}"
    if not multiplies_int8():
        no_int8 = "no int8, which takes VNNI"
    else:
        cost, no_int8 = _int8_cost(directory)
        if cost is not None and cost <= MOST_BITS_PER_BYTE:
            return "int8", f"it costs {cost:+.5f} bits per byte"
    if has_bfloat16(use_cpu=True):
        return "bfloat16", f"the processor has it; {no_int8}"
    return "float32", f"the processor has no fast bfloat16; {no_int8}"


def _int8_cost(directory: Path | None) -> tuple[float | None, str]:
    """Return what an export has found int8 to cost, if it did, and why int8 is not taken."""
    path = directory and directory / FIGURES_NAME
    if path is None or not path.is_file():
        return None, "int8 is not measured (`textgen export --to decoder`)"
    try:
        with path.open("rb") as file:
            figures: dict[str, Any] = parse_json(file.read(JSON_BYTES + 1))
        if figures["format"] != FIGURES_FORMAT:
            raise ValueError(f"its format is not {FIGURES_FORMAT}")
        bits = figures["bits_per_byte"]
        cost = float(bits["int8"] - bits["plain"])
        with (path.parent / WEIGHTS_NAME).open("rb") as file:
            if figures["model_sha256"] != hashlib.file_digest(file, "sha256").hexdigest():
                return None, f"`{FIGURES_NAME}` is of other weights"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"`{path}` cannot be used ({type(error).__name__}: {str(error)[:80]})"
    return cost, f"int8 costs {cost:+.5f} bits per byte"


def _missing_compiler() -> str | None:
    """Return the C++ compiler that torch would call, if it is not there."""
    from torch._inductor import config

    names = config.cpp.cxx if isinstance(config.cpp.cxx, tuple | list) else [config.cpp.cxx]
    wanted = [name or "g++" for name in names]
    return None if any(shutil.which(name) for name in wanted) else wanted[0]
