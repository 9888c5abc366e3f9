"""One decoding step as an ONNX file, and a decoder that runs it under onnxruntime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textgen.decoding.decoders import Decoder, DecoderState
from textgen.model.lstm import LSTMLanguageModel, LSTMLayer


class _Step(nn.Module):
    """The model's step in plain operators, one matrix product per layer: what an LSTM operator would do, and faster."""

    def __init__(self, model: LSTMLanguageModel) -> None:
        super().__init__()
        self.model = model
        layers = [layer for layer in model.layers if isinstance(layer, LSTMLayer)]
        self.weights = nn.ParameterList(torch.cat([layer.weight_ih, layer.weight_hh], 1) for layer in layers)

    def forward(self, tokens: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model, x = self.model, self.model.embedding(tokens)  # (batch, embedding_dim)
        out = []
        for i, (weight, layer) in enumerate(zip(self.weights, model.layers, strict=True)):
            before, bias = x, layer.bias
            assert isinstance(bias, Tensor)
            if i > 0 and len(model.norms):
                x = model.norms[i - 1](x)
            gates = F.linear(torch.cat([x, hidden[i]], 1), weight, bias)
            opened, forgot, new, shown = gates.chunk(4, 1)
            memory = forgot.sigmoid() * cell[i] + opened.sigmoid() * new.tanh()
            x = shown.sigmoid() * memory.tanh()
            out.append((x, memory))
            if i > 0 and model.config.residual:
                x = x + before
        if len(model.norms):
            x = model.norms[-1](x)
        return (
            model.output(model.projection(x)),
            torch.stack([hidden for hidden, _ in out]),
            torch.stack([memory for _, memory in out]),
        )


def write_onnx(model: LSTMLanguageModel, path: Path) -> None:
    """Write a step: tokens (batch,), hidden and cell (num_layers, batch, hidden_size) to logits and the new state."""
    hidden, cell = model.zero_state(2)
    batch = torch.export.Dim("batch", min=1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells what it was not asked
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of torch's own parts
        program = torch.onnx.export(
            _Step(model).eval(), (torch.zeros(2, dtype=torch.int64), hidden, cell),
            input_names=["tokens", "hidden", "cell"], output_names=["logits", "new_hidden", "new_cell"],
            dynamic_shapes=({0: batch}, {1: batch}, {1: batch}), dynamo=True, verbose=False,
        )  # fmt: skip
        assert program is not None
        aside = path.with_name(f".{path.name}.tmp")
        program.save(aside, external_data=False)
    aside.replace(path)


class OnnxDecoder(Decoder):
    """Decodes with a file that `write_onnx` wrote; a prompt is read by the model itself.

    Args:
        model: of which the file was made.
        path: the file.
        threads: that onnxruntime takes; by default as many as torch.
    """

    name = "onnxruntime"

    def __init__(self, model: LSTMLanguageModel, path: Path, *, threads: int | None = None) -> None:
        import onnxruntime

        super().__init__(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        # its threads must not spin while torch's draw: 0.5 ms a step against 3.9
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read one token per row, as `Decoder.step` says."""
        inputs = {"tokens": tokens, "hidden": torch.stack(state[::2]), "cell": torch.stack(state[1::2])}
        results = self._session.run(None, {name: value.numpy() for name, value in inputs.items()})
        logits, hidden, cell = (torch.from_numpy(result) for result in results)
        return logits, [part[i] for i in range(len(hidden)) for part in (hidden, cell)]
