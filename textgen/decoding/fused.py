"""A decoder for GPUs whose step is a few kernels: one for each layer, the projection, the output layer, and the draw.

The kernels are those of `kernels.triton_decoding`; `kernels.fused_decoding` computes the same by torch's operators.
Filters that compare tokens of a row (top-k, top-p and others) run as torch's operators between the output layer and the
draw (docs/explanation/decoding-on-a-gpu.md).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from textgen.config import SamplingConfig
from textgen.decoding.decoders import Decoder, DecoderState, gates_last, table_parts
from textgen.decoding.pieces import PieceReader
from textgen.decoding.sampling import SamplingState, new_sampling_state, process_logits, select_sampling_state
from textgen.errors import first_line
from textgen.kernels import fused_decoding
from textgen.kernels.fused_decoding import Rows, Weights
from textgen.model.lstm import LSTMLanguageModel, LSTMLayer

log = logging.getLogger("textgen")

# Name of the decoder whose weights are rounded to 8 bits, and of its figure in `decoder.json`.
WEIGHTS_OF_8_BITS = "bfloat16 x int8"

_FIELDS = {field.name for field in fields(Rows)}

# Settings that the output layer's kernel knows, and what only the draw changes.
BY_KERNELS = _FIELDS - {"history", "unlabelled"}


def triton_kernels() -> ModuleType | None:
    """Return the module of Triton's kernels; None if Triton cannot be imported."""
    try:
        from textgen.kernels import triton_decoding
    except Exception:  # Triton is missing, or another one than torch's
        return None
    return triton_decoding


class FusedDecoder(Decoder):
    """Decodes in bfloat16 by fused kernels; sums and states are float32.

    Args:
        model: must not change afterwards: weights are copied.
        kernels: module of the kernels, see `triton_kernels`; None for torch's operators.
        int8: round weights to 8 bits, with a scale for each output; half as many bytes to read. Inputs, table and sums
            stay as they are.
        why: reason of the choice, for the description.
    """

    def __init__(
        self, model: LSTMLanguageModel, kernels: ModuleType | None, *, int8: bool = False, why: str = ""
    ) -> None:
        super().__init__(model, why=why)
        self.name = WEIGHTS_OF_8_BITS if int8 else "bfloat16"
        self._kernels, self._refused, self._tried = kernels, dict[str, str](), False
        config, norms = model.config, [*model.norms]
        lay_out = functools.partial(Weights.of, int8=int8)
        with torch.no_grad():
            layers = [layer for layer in model.layers if isinstance(layer, LSTMLayer)]
            table = torch.nn.functional.linear(*table_parts(model, layers[0], torch.bfloat16))
            self._layers = [lay_out([_by_units(gates_last(layers[0].weight_hh))], _by_units(table.T.contiguous()).T)]
            for i, layer in enumerate(layers[1:]):
                input_weight, hidden_weight, bias = (
                    _by_units(gates_last(part)) for part in (layer.weight_ih, layer.weight_hh, layer.bias)
                )
                norm = norms[i] if norms else None
                self._layers.append(lay_out([input_weight, hidden_weight], bias.float(), norm=norm))
            last, self._projection = norms[-1] if norms else None, None
            if isinstance(model.projection, torch.nn.Linear):
                self._projection = lay_out([model.projection.weight], model.projection.bias.float(), norm=last)
                last = None
            self._output = lay_out([model.output.weight], model.output.bias.float(), norm=last)
        self._residual = config.residual

    @property
    def fused(self) -> tuple[str, ...]:
        operations = ("layer", "linear", "output", "pick", "draw")
        return tuple(name for name in operations if self._kernels is not None and name not in self._refused)

    @property
    def description(self) -> str:
        """Return the decoder, which operations are fused, and the first reason why others are not."""
        refused = "".join(f"; {', '.join(self._refused)} by torch's operators: {why}" for why in self.refusals[:1])
        return f"{super().description}; fused kernels: {', '.join(self.fused) or 'none'}{refused}"

    @property
    def refusals(self) -> list[str]:
        """Why kernels do not run here."""
        return list(self._refused.values())

    @torch.inference_mode()
    def try_kernels(self) -> None:
        """Run every kernel for few, some and many rows, which are compiled to different code.

        Those that do not run here are replaced, and `description` says so.
        """
        for num_rows in (1, 17, 65):
            tokens = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
            size, num_parts = self.model.config.hidden_size, 2 * len(self._layers)
            state = [torch.zeros(num_rows, size, device=self.device) for _ in range(num_parts)]
            self.step(tokens, state)
            for config in (SamplingConfig(), SamplingConfig(min_p=0.5)):  # `pick` comes after filters
                row = new_sampling_state(config, (), 0, vocab_size=self.vocab_size, device=self.device)
                self.advance(tokens, state, select_sampling_state(row, tokens), unk_id=0, eos_id=0)
        self._tried = True

    def _run(self, name: str, *arguments: Any, **settings: Any) -> Any:
        """Run an operation of `fused_decoding` by its kernel, or by torch's operators if the kernel does not run.

        Raises:
            OutOfMemoryError: torch's allocator has no memory, which says nothing of the kernel.
            RuntimeError: the kernel failed while a graph is captured; outside of one it may run.
        """
        if self._kernels is not None and name not in self._refused:
            try:
                return getattr(self._kernels, name)(*arguments, **settings)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # Triton raises many kinds: no compiler, too little shared memory
                if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(first_line(error)) from error
                self._refused[name] = first_line(error)
                if self._tried:  # else `description` says it
                    log.warning("kernel `%s` does not run here, torch's operators do: %s", name, first_line(error))
        return getattr(fused_decoding, name)(*arguments, **settings)

    @functools.cached_property
    def pieces(self) -> PieceReader:  # type: ignore[override]
        """Return what reads short prompts."""
        return PieceReader(self)

    def read(self, tokens: Tensor, state: DecoderState) -> DecoderState:
        """Read one token per row; arguments and result are those of `Decoder.read`."""
        return self._run_layers(tokens, state)[1]

    def _run_layers(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Return the output of the last layer, float32 (batch, hidden_size), and the new state."""
        x: Any = None
        new_state: DecoderState = []
        for i, weights in enumerate(self._layers):
            rows, residual = (tokens, False) if i == 0 else (None, self._residual)
            hidden, cell, x = self._run("layer", x, *state[2 * i : 2 * i + 2], weights, rows, residual=residual)
            new_state += [hidden, cell]
        return x, new_state

    def _run_projection(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Return the input of the output layer, float32 (batch, size), and the new state."""
        x, state = self._run_layers(tokens, state)
        return x if self._projection is None else self._run("linear", x, self._projection), state

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read one token per row; arguments and results are those of `Decoder.step`."""
        x, state = self._run_projection(tokens, state)
        return self._run("linear", x, self._output), state

    def advance(
        self,
        tokens: Tensor,
        state: DecoderState,
        sampling: SamplingState,
        *,
        unk_id: int,
        eos_id: int,
        ended: Tensor | None = None,
        out: Tensor | None = None,
        scale_label: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, DecoderState, tuple[Tensor, Tensor, Tensor] | None]:
        """Read one token per row and draw the next one; arguments and results are those of `batch.advance`.

        `scale_label` returns changed logits, for rows with a scale of their label.
        """
        tensors, wanted = sampling.tensors, sampling.logprobs
        settings = Rows(
            vocab_size=self.vocab_size,
            key=None if sampling.greedy else tensors["key"],
            **{name: value for name, value in tensors.items() if name in _FIELDS - {"key"}},
        )
        x, state = self._run_projection(tokens, state)
        by_kernels = not sampling.ngrams and tensors.keys() <= BY_KERNELS
        logits, picks, sums = self._run(
            "output",
            x,
            self._output,
            settings if by_kernels else None,
            unk_id=unk_id,
            eos_id=eos_id,
            keep=wanted is not None or not by_kernels,
            logprobs=wanted is not None,
        )
        if not by_kernels:
            changed = logits if scale_label is None else scale_label(logits)
            changed = changed.clone() if changed is logits and wanted is not None else changed
            changed.select(1, unk_id).fill_(-torch.inf)
            picks = self._run("pick", process_logits(changed, sampling, eos_id=eos_id), settings)
        drawn = torch.empty_like(tokens) if out is None else out
        logprobs = self._run("draw", picks, settings, eos_id=eos_id, ended=ended, out=drawn, logits=logits, sums=sums)
        if wanted is None:
            return drawn, state, None
        of_drawn, total = logprobs
        if wanted == 0:  # nothing to sort
            return drawn, state, (of_drawn, logits[:, :0], drawn[:, None][:, :0])
        values, ids = logits.topk(min(wanted, self.vocab_size))
        return drawn, state, (of_drawn, values - total[:, None], ids)


def _by_units(weight: Tensor) -> Tensor:
    """Return rows in the order of units, the four gates of each side by side, from the order of gates."""
    return weight.view(4, -1, *weight.shape[1:]).transpose(0, 1).flatten(0, 1)
