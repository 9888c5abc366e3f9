"""LSTMLanguageModel: one forward for training, scoring and single decoding steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from textgen.config import ModelConfig
from textgen.kernels import training as training_kernels
from textgen.noise import hash_bits, uniform

# (hidden, cell), each (num_layers, batch, hidden_size)
State = tuple[Tensor, Tensor]

# Logits alive at a time. A step of 128 x 64 tokens and 8,192 pieces would have 2^26 of them, three times over with
# softmax and gradient; in chunks they stay in a processor's cache, on a GPU they only must not be small.
LOGITS_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 26}

# Where weight drop draws its masks, counting down over layers: locked dropout's sites count up from 0.
_WEIGHT_SITE = -2

# Of each device, those that layers run on side by side.
_STREAMS: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


@dataclass(frozen=True)
class DropoutMasks:
    """What dropout and weight drop need to draw their masks: pure functions of the step, kept by no generator."""

    seed: int
    step: int | Tensor  # a tensor, int64 scalar, where a graph takes many steps
    lanes: Tensor  # (batch,) int64, global lane of each row


class _SummedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear layer, summed, whose logits never exist all at once.

    The gradients are made in the forward pass, while a chunk's logits are at hand, and only scaled in the backward
    pass: three matrix products a chunk, as in the plain way, instead of the four of recomputation.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        with_gradient: bool,
    ) -> Tensor:
        low_x, low_weight = x.to(dtype), weight.to(dtype)
        grad_x = torch.empty_like(low_x) if with_gradient else None
        grad_weight = torch.zeros_like(weight) if with_gradient else None
        grad_bias = torch.zeros_like(bias) if with_gradient else None
        total = torch.zeros((), device=x.device)
        rows = max(LOGITS_CHUNK.get(x.device.type, 1 << 24) // len(weight), 1)
        for start in range(0, len(x), rows):
            part = low_x[start : start + rows]
            nats, slopes = _slopes(part @ low_weight.T, bias, targets[start : start + rows], grad_bias)
            total += nats
            if grad_x is not None and grad_weight is not None:
                torch.mm(slopes, low_weight, out=grad_x[start : start + rows])
                grad_weight += slopes.T @ part
        if grad_x is not None and grad_weight is not None and grad_bias is not None:
            ctx.save_for_backward(grad_x, grad_weight, grad_bias)
            ctx.x_dtype = x.dtype  # type: ignore[attr-defined]
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, grad_bias = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_x = (grad_x.float() * grad).to(ctx.x_dtype)  # type: ignore[attr-defined]
        return grad_x, grad_weight * grad, grad_bias * grad, None, None, None


def _slopes(logits: Tensor, bias: Tensor, targets: Tensor, grad_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the nats of some rows, a scalar, and the slopes of their logits (rows, vocab_size), in the logits' dtype.

    Args:
        logits: (rows, vocab_size), without the bias; may be overwritten.
        bias: (vocab_size,).
        targets: (rows,) int64; -1 is not scored.
        grad_bias: (vocab_size,), the slopes are added to it; None where no slopes are wanted, and none are returned.
    """
    nats = training_kernels.softmax(logits, bias, targets, grad_bias)
    if nats is not None:
        return nats.sum(), logits
    exact = logits.float().add_(bias)  # (rows, vocab_size)
    wanted = targets[:, None]
    scored = wanted >= 0  # (rows, 1)
    wanted = wanted.clamp(min=0)
    seen, peak = exact.gather(1, wanted), exact.amax(1, keepdim=True)
    softmax = exact.sub_(peak).exp_()  # in place, and so far without its denominator
    mass = softmax.sum(1, keepdim=True)
    total = ((mass.log() + peak - seen) * scored).sum()
    if grad_bias is None:
        return total, logits
    # d nats / d logits = softmax - one-hot, zero where the target is not scored
    slopes = softmax.div_(mass).scatter_add_(1, wanted, softmax.new_full((1, 1), -1.0).expand_as(wanted))
    slopes = slopes.mul_(scored)
    grad_bias += slopes.sum(0)
    return total, slopes.to(logits.dtype)


def summed_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross-entropy of a linear output layer without holding all its logits.

    Args:
        x: (rows, size).
        weight: (vocab_size, size).
        bias: (vocab_size,).
        targets: (rows,) int64; -1 is not scored.

    Returns:
        Nats, a float32 scalar. Products are taken in autocast's dtype where it is on, everything else in float32.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        nats: Tensor = _SummedCrossEntropy.apply(x, weight, bias, targets, dtype, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return nats


class LSTMLayer(nn.Module):
    """One LSTM layer with torch's fused kernel and a compute dtype of its own.

    Weights stay in float32 and are cast at each call. `nn.LSTM` is not used: autocast on CUDA runs it in float16
    whatever was asked for, and `flatten_parameters` makes all its tensors views of one storage, which safetensors
    would store once. torch's second bias only adds to the first, so there is one.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size))

    def forward(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Run over a window.

        Args:
            x: (batch, time, input_size).
            state: hidden and cell, each (1, batch, hidden_size).
            mask: (4 * hidden_size, hidden_size), multiplies the recurrent weights.

        Returns:
            (batch, time, hidden_size) and the new state, in autocast's dtype where it is on, else the weights'.

        Raises:
            ValueError: shapes do not fit; torch's kernel would read beyond them.
        """
        wanted = 1, len(x), self.weight_hh.shape[1]
        if x.shape[2] != self.weight_ih.shape[1] or any(part.shape != wanted for part in state):
            raise ValueError(f"x of {tuple(x.shape)} and a state of {tuple(state[0].shape)} do not fit the layer")
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight_ih.dtype
        weight_hh = self.weight_hh if mask is None else self.weight_hh * mask
        if dtype == torch.bfloat16:
            compiled = training_kernels.lstm(x, state, self.weight_ih, weight_hh, self.bias)
            if compiled is not None:
                return compiled
        weights = self._packed(dtype, weight_hh)
        with torch.autocast(device, enabled=False):
            y, hidden, cell = torch.lstm(
                x.to(dtype), [s.to(dtype) for s in state], weights,
                has_biases=True, num_layers=1, dropout=0.0, train=self.training, bidirectional=False, batch_first=True,
            )  # fmt: skip
        return y, (hidden, cell)

    def _packed(self, dtype: torch.dtype, weight_hh: Tensor) -> list[Tensor]:
        """Return weights and biases in `dtype`; on CUDA as views of one buffer, as cuDNN wants them."""
        weights = [self.weight_ih, weight_hh, self.bias, torch.zeros_like(self.bias)]
        if self.weight_ih.device.type != "cuda":
            return [w.to(dtype) for w in weights]
        flat = torch.cat([w.flatten().to(dtype) for w in weights])
        parts = torch.split(flat, [w.numel() for w in weights])
        return [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]


def _side_by_side(device: torch.device, count: int) -> list[torch.cuda.Stream | None]:
    """Return the current stream, and as many others, always the same ones."""
    for _ in range(len(_STREAMS[device]), count):
        _STREAMS[device].append(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    return [torch.cuda.current_stream(device), *_STREAMS[device][:count]]


@contextmanager
def _on(stream: torch.cuda.Stream | None, *used: Tensor, after: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on a stream, after what another one holds so far, with tensors that came from there; None: just work."""
    if stream is None or after is None:
        yield
        return
    stream.wait_stream(after)
    for tensor in used:
        tensor.record_stream(stream)  # else their memory could be given away when they are dropped
    with torch.cuda.stream(stream):
        yield


class LSTMLanguageModel(nn.Module):
    """Embedding, stacked LSTM, projection and output layer.

    Args:
        config: the shape.
        vocab_size: number of tokens.
        unigram_counts: (vocab_size,) how often each token occurs in training text; the output bias starts at their
            log frequency, which saves the first hundred or so steps.
        text: what stands between text and tokens, kept in config.json: `tokenizer_sha256`, `normalization`.
    """

    num_pieces = 1
    """into which a window is cut, for layers to run side by side; more than one is for benchmarks/train.py to try"""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        unigram_counts: Tensor | None = None,
        text: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.text = config, vocab_size, dict(text or {})
        shape = vocab_size, config.embedding_dim
        # drawing on the meta device would import torch's compiler, which takes longer than all else of a loading
        self.embedding = nn.Embedding(*shape, _weight=torch.empty(shape) if torch.empty(0).is_meta else None)
        sizes = [config.embedding_dim] + [config.hidden_size] * config.num_layers
        self.layers = nn.ModuleList(LSTMLayer(a, b) for a, b in pairwise(sizes))
        num_norms = config.num_layers if config.layer_norm else 0
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden_size) for _ in range(num_norms))
        self.projection: nn.Module = nn.Identity()
        if config.tie_weights and config.projection:
            self.projection = nn.Linear(config.hidden_size, config.embedding_dim)
        output_size = config.embedding_dim if config.tie_weights else config.hidden_size
        self.output = nn.Linear(output_size, vocab_size)
        if config.tie_weights:
            self.output.weight = self.embedding.weight
        self._initialize(unigram_counts)

    @torch.no_grad()
    def _initialize(self, unigram_counts: Tensor | None) -> None:
        """Draw initial weights from torch's default generator."""
        if self.output.bias.is_meta:
            return
        nn.init.normal_(self.embedding.weight, std=self.config.embedding_dim**-0.5)
        for layer in self.layers:
            assert isinstance(layer, LSTMLayer)
            nn.init.xavier_uniform_(layer.weight_ih)
            for gate in layer.weight_hh.chunk(4):
                nn.init.orthogonal_(gate)
            layer.bias.chunk(4)[1].fill_(1.0)  # forget gate open (Jozefowicz et al. 2015, section 2.2)
        if not self.config.tie_weights:
            nn.init.normal_(self.output.weight, std=self.config.hidden_size**-0.5)
        self.output.bias.zero_()
        if unigram_counts is not None:
            frequency = (unigram_counts.float() + 1) / (unigram_counts.float() + 1).sum()
            self.output.bias.copy_(frequency.log())

    @property
    def num_parameters(self) -> int:
        """Number of trained values, a tied matrix counted once."""
        return sum(p.numel() for p in self.parameters())

    def zero_state(self, batch_size: int) -> State:
        """Return the state before any text: two float32 zeros (num_layers, batch_size, hidden_size)."""
        shape = (self.config.num_layers, batch_size, self.config.hidden_size)
        zeros = torch.zeros(shape, device=self.embedding.weight.device)
        return zeros, zeros.clone()

    def forward(
        self, tokens: Tensor, state: State, targets: Tensor | None = None, *, masks: DropoutMasks | None = None
    ) -> tuple[Tensor, State]:
        """Read a window of tokens.

        Args:
            tokens: (batch, time) int64.
            state: hidden and cell, each (num_layers, batch, hidden_size), as an earlier call returned them.
            targets: (batch, time) int64, the token after each; -1 is not scored.
            masks: draws what training leaves out by `dropout` and `weight_drop`; None: nothing.

        Returns:
            Without targets the logits (batch, time, vocab_size), with them the nats summed over all targets, a
            scalar; both float32. And the new state, in the dtype the LSTM computed in.
        """
        x, state = self._features(tokens, state, masks)
        if targets is None:
            return self.output(x).float(), state  # (batch, time, vocab_size)
        return summed_cross_entropy(x.flatten(0, 1), self.output.weight, self.output.bias, targets.flatten()), state

    def _features(self, tokens: Tensor, state: State, masks: DropoutMasks | None) -> tuple[Tensor, State]:
        """Return what the output layer sees (batch, time, embedding_dim or hidden_size), and the new state."""
        x = self._drop(self.embedding(tokens), masks, 0)  # (batch, time, embedding_dim)
        states = [(state[0][i : i + 1], state[1][i : i + 1]) for i in range(len(self.layers))]
        if self.num_pieces > 1:
            x, states = self._wavefront(x, states, masks)
        else:
            for i in range(len(self.layers)):
                x, states[i] = self._layer(i, x, states[i], masks, self._weight_mask(masks, i))
        if self.norms:
            x = self.norms[-1](x)
        return self.projection(x), (torch.cat([h for h, _ in states]), torch.cat([c for _, c in states]))

    def _layer(
        self, i: int, x: Tensor, state: State, masks: DropoutMasks | None, weight_mask: Tensor | None
    ) -> tuple[Tensor, State]:
        """Run a layer with what stands around it; returns (batch, time, hidden_size) and its new state."""
        before = x
        if i > 0 and self.norms:
            x = self.norms[i - 1](x)
        x, state = self.layers[i](x, state, weight_mask)
        if i > 0 and self.config.residual:
            x = x + before
        return self._drop(x, masks, i + 1), state

    def _wavefront(self, x: Tensor, states: list[State], masks: DropoutMasks | None) -> tuple[Tensor, list[State]]:
        """Run the layers side by side, each a piece of the window behind the one below it; on CUDA on streams.

        Autograd runs what belongs to a layer on the stream of its forward pass: they are side by side there too.
        """
        states, pieces = list(states), list(x.chunk(self.num_pieces, 1))
        weight_masks: list[Tensor | None] = []
        # the caller's stream, then one for each layer
        streams = _side_by_side(x.device, len(states)) if x.is_cuda else [None] * (len(states) + 1)
        for diagonal in range(len(pieces) + len(states) - 1):
            # From the last layer down: the stream below then holds the piece that is wanted, and nothing after it.
            for i in reversed(range(max(diagonal - len(pieces) + 1, 0), min(diagonal + 1, len(states)))):
                piece = pieces[diagonal - i]
                with _on(streams[i + 1], piece, *states[i], after=streams[i]):
                    if i == diagonal:  # its first piece
                        weight_masks.append(self._weight_mask(masks, i))
                    pieces[diagonal - i], states[i] = self._layer(i, piece, states[i], masks, weight_masks[i])
        for state, stream in zip(states, streams[1:], strict=True):
            with _on(streams[0], *state, after=stream):
                pass
        with _on(streams[0], *pieces, after=streams[-1]):
            return torch.cat(pieces, 1), states

    def _weight_mask(self, masks: DropoutMasks | None, layer: int) -> Tensor | None:
        """Return what multiplies a layer's recurrent weights (4 * hidden_size, hidden_size): one mask per step.

        A byte of a hash decides on each weight: a hash for each would cost more than the layer.
        """
        dropped = min(round(256 * self.config.weight_drop), 255)
        if masks is None or dropped == 0:
            return None
        size = self.config.hidden_size
        count = 4 * size * size
        eights = torch.arange(-(-count // 8), device=masks.lanes.device)
        kept = hash_bits(masks.seed, masks.step, _WEIGHT_SITE - layer, eights).view(torch.uint8)[:count] >= dropped
        return (kept * (256 / (256 - dropped))).view(4 * size, size)

    def _drop(self, x: Tensor, masks: DropoutMasks | None, site: int) -> Tensor:
        """Apply locked dropout to x (batch, time, size): the same units of a lane are left out at all times."""
        if masks is None or self.config.dropout == 0:
            return x
        lanes, units = masks.lanes[:, None], torch.arange(x.shape[2], device=x.device)
        kept = uniform(masks.seed, masks.step, site, lanes, units) >= self.config.dropout  # (batch, size)
        return x * (kept / (1 - self.config.dropout)).to(x.dtype)[:, None]

    def state_tensors(self) -> dict[str, Tensor]:
        """Return what a file holds: the weights themselves by name, a tied output matrix left out."""
        skip = {"output.weight"} if self.config.tie_weights else set()
        return {name: value.detach() for name, value in self.state_dict().items() if name not in skip}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of `state_tensors`."""
        return {name: tuple(value.shape) for name, value in self.state_tensors().items()}
