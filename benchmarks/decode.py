"""Decoding beside what one would use instead: `python -m benchmarks.decode [--batch_sizes 1 8] [--compile]`.

All variants hold the same weights and draw every token; rounds are interleaved, so that a busy machine slows all. The
plain loop is what one would write by hand: nn.LSTM fed one token, softmax, torch.multinomial. Others draw as textgen
does, which is cheaper. The floor is the time to read the weights once: on a CPU at the rate a buffer of their size is
read again and again in the same rounds, on a GPU at the rate of its memory, since its cache may hold them all.
onnxruntime and openvino take part where they are installed. Batch sizes may be measured one after the other: what the
results hold of others by the same machine and versions stays. On a GPU `chosen` is the decoder that `textgen sample`
takes there, `operators` its twin of torch's operators. `runner` is what users run: graphs of the lengths that fit, with
the host's work on the texts; `graph` is the graph of 32 steps alone. No figure of a GPU has been taken yet.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import RESULTS, describe, joules, save
from textgen.config import ModelConfig, SamplingConfig
from textgen.decoding.batch import advance
from textgen.decoding.choose import choose_decoder
from textgen.decoding.decoders import CellDecoder, Decoder, DecoderState
from textgen.decoding.products import multiplies_int8
from textgen.decoding.samples import Request, RunningSample
from textgen.decoding.sampling import SamplingState, join_sampling_states, new_sampling_state, select_sampling_state
from textgen.kernels.capture import reason_of
from textgen.model.files import load_model, read_model, save_model
from textgen.model.lstm import LSTMLanguageModel, LSTMLayer
from textgen.tokenizer import Tokenizer, train_tokenizer

SHAPES = {"cpu": (8192, 512, 1024, 2), "cuda": (8192, 512, 1024, 3)}
SECONDS = 0.15  # of a variant's turn in a round
PROMPT = 64
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}

Steps = Callable[[int], object]


class Plain(nn.Module):
    """The textbook model; of nn.LSTMCell where torch.compile is to see inside."""

    def __init__(self, model: LSTMLanguageModel, *, cells: bool = False) -> None:
        super().__init__()
        config, self.head = model.config, nn.Sequential(model.projection, model.output)
        self.embedding, self.cells = model.embedding, nn.ModuleList()
        self.lstm = nn.LSTM(config.embedding_dim, config.hidden_size, config.num_layers, batch_first=True)
        layers = [layer for layer in model.layers if isinstance(layer, LSTMLayer)]
        sizes = [config.embedding_dim] + [config.hidden_size] * (config.num_layers - 1)
        for i, (size, layer) in enumerate(zip(sizes, layers, strict=True)):
            cell = nn.LSTMCell(size, config.hidden_size)
            for suffix, value in {
                "weight_ih": layer.weight_ih, "weight_hh": layer.weight_hh, "bias_ih": layer.bias,
                "bias_hh": torch.zeros_like(layer.bias),
            }.items():  # fmt: skip
                getattr(self.lstm, f"{suffix}_l{i}").data.copy_(value)
                getattr(cell, suffix).data.copy_(value)
            if cells:
                self.cells.append(cell)

    def forward(self, tokens: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return probabilities (batch, vocab_size) and the new state."""
        x = self.embedding(tokens)
        if not self.cells:
            y, state = self.lstm(x[:, None], state)
            return self.head(y[:, 0]).softmax(-1), state
        new = []
        for i, cell in enumerate(self.cells):
            x, memory = cell(x, (state[0][i], state[1][i]))
            new.append((x, memory))
        return self.head(x).softmax(-1), (torch.stack([h for h, _ in new]), torch.stack([c for _, c in new]))


def plain_steps(
    step: Callable[..., Any], model: LSTMLanguageModel, rows: int, *, onednn: bool = True, compiled: bool = False
) -> Steps:
    """Return a function that takes n steps of the plain loop.

    Args:
        step: returns probabilities and the new state.
        model: its zero state begins.
        rows: of the batch.
        onednn: whether torch may use oneDNN.
        compiled: whether `step` returns memory that its next call writes to, as `reduce-overhead` does: its state is
            then copied, without which torch leaves its graphs.
    """
    kept: dict[str, Any] = {"state": model.zero_state(rows)}
    kept["tokens"] = torch.zeros(rows, dtype=torch.int64, device=kept["state"][0].device)

    def steps(count: int) -> None:
        with nullcontext() if onednn else torch.backends.mkldnn.flags(enabled=False):
            for _ in range(count):
                if compiled:
                    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                probabilities, state = step(kept["tokens"], kept["state"])
                kept["state"] = tuple(part.clone() for part in state) if compiled else state
                kept["tokens"] = torch.multinomial(probabilities, 1)[:, 0]

    return steps


def start_of(decoder: Decoder, rows: int) -> tuple[Tensor, DecoderState, SamplingState]:
    """Return tokens, decoder state and sampling state of rows that draw at temperature 1."""
    one = decoder.prefill([1])
    state = [part.repeat(rows, 1) for part in one]
    sampling = [
        new_sampling_state(SamplingConfig(), [1], i, vocab_size=decoder.vocab_size, device=decoder.device)
        for i in range(rows)
    ]
    tokens = torch.ones(rows, dtype=torch.int64, device=decoder.device)
    return tokens, state, join_sampling_states(sampling, decoder.vocab_size)


def decoder_steps(decoder: Decoder, rows: int) -> Steps:
    """Return a function that takes n steps as `textgen sample` does, the draw included."""
    tokens, state, sampling = start_of(decoder, rows)
    kept: dict[str, Any] = {"tokens": tokens, "state": state}

    def steps(count: int) -> None:
        for _ in range(count):
            kept["tokens"], kept["state"], _ = advance(
                decoder, kept["tokens"], kept["state"], sampling, unk_id=0, eos_id=2
            )
            kept["tokens"].tolist()  # the host reads each token, as a stream of text does

    return steps


def graph_steps(decoder: Decoder, rows: int) -> Steps:
    """Return a function that replays a CUDA graph of 32 steps. The host reads no token: `runner_steps` does."""
    from textgen.decoding.cuda_graphs import Buffers, StepCapture

    tokens, state, sampling = start_of(decoder, rows)
    drawn = tokens.new_zeros(32, rows)
    buffers = Buffers(decoder, 0, 2, tokens, state, sampling, torch.zeros_like(tokens).bool(), drawn, ())
    replays: list[Callable[[], None]] = []

    def steps(count: int) -> None:
        if not replays:  # here, since a capture that is refused leaves this variant out, and no other
            replays.append(StepCapture(decoder.device)(buffers, 32))
        for _ in range(count // 32):
            replays[0]()

    return steps


def runner_steps(
    decoder: Decoder,
    rows: int,
    tokenizer: Tokenizer,
    *,
    capture: Callable[[Any, int], Callable[[], None]] | None = None,
) -> Steps:
    """Return a function that draws n tokens of each row as users get them: by `GraphRunner`, pushed to their texts.

    Args:
        decoder: of a model that hardly ever draws the end of a text.
        rows: of the batch.
        tokenizer: of the model's vocabulary.
        capture: of the runner; default: CUDA graphs.
    """
    from textgen.decoding.cuda_graphs import GraphRunner, StepCapture

    capture = StepCapture(decoder.device) if capture is None else capture
    refusals: list[RuntimeError] = []

    def noting(buffers: Any, count: int) -> Callable[[], None]:
        try:
            return capture(buffers, count)
        except RuntimeError as error:  # the runner goes on step by step, which must not pass for graphs
            refusals.append(error)
            raise

    runner = GraphRunner(decoder, capture=noting)

    def steps(count: int) -> None:
        request = Request("", SamplingConfig(max_new_tokens=count))
        samples = [RunningSample.of(i, request, tokenizer) for i in range(rows)]
        batch = runner.batch_of(decoder, tokenizer, samples)
        while not any(sample.ended for sample in samples):
            for tokens, sample in zip(batch.advance_many()[0], samples, strict=True):
                list(sample.push_all(tokens, None))
        assert all(sample.num_tokens == count for sample in samples)
        if refusals:
            raise RuntimeError(f"steps could not be captured in CUDA graphs: {reason_of(refusals[0])}")

    return steps


def tokenizer_of(vocab_size: int) -> Tokenizer:
    """Return a tokenizer with so many pieces, each a character."""
    text = "".join(chr(0x4E00 + i) for i in range(vocab_size))
    return Tokenizer(train_tokenizer([text], vocab_size=vocab_size, model_type="char"))


class OpenvinoDecoder(Decoder):
    """Decodes with an ONNX file under openvino, in bfloat16 as openvino would itself where the processor has it."""

    name = "openvino bfloat16"

    def __init__(self, model: LSTMLanguageModel, path: Path) -> None:
        import openvino

        super().__init__(model)
        settings: dict[str, object] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        settings["INFERENCE_PRECISION_HINT"] = "bf16"
        self._request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read one token per row, as `Decoder.step` says."""
        inputs = [tokens.numpy(), torch.stack(state[::2]).numpy(), torch.stack(state[1::2]).numpy()]
        results = self._request.infer(inputs, share_inputs=True, share_outputs=False)
        logits, hidden, cell = (torch.from_numpy(results[i]) for i in range(3))
        return logits, [part[i] for i in range(len(hidden)) for part in (hidden, cell)]


def cpu_decoders(model: LSTMLanguageModel, folder: Path) -> Iterator[Decoder]:
    """Yield every decoder there is on this CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if importlib.util.find_spec("onnxruntime"):
            from onnxruntime.quantization import quantize_dynamic

            from textgen.decoding.onnx import OnnxDecoder, write_onnx

            write_onnx(model, folder / "step.onnx")
            quantize_dynamic(folder / "step.onnx", folder / "int8.onnx")
            for name in ("step", "int8"):
                decoder = OnnxDecoder(model, folder / f"{name}.onnx")
                decoder.name = f"onnxruntime {'int8' if name == 'int8' else 'float32'}"
                yield decoder
            if importlib.util.find_spec("openvino"):
                yield OpenvinoDecoder(model, folder / "step.onnx")
    yield CellDecoder(model, "float32")
    yield CellDecoder(model, "bfloat16")
    if multiplies_int8():
        yield CellDecoder(model, "int8")
        operators = CellDecoder(model, "int8")
        operators.__dict__["kernel"] = None  # as where there is no compiler
        operators.name = "int8 by operators"
        yield operators


def weight_count(model: LSTMLanguageModel) -> int:
    """Return how many weights a step must read: all but embedding and first input weights, which are a table."""
    first = model.layers[0]
    assert isinstance(first, LSTMLayer)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - first.weight_ih.numel()
    return matrices if model.config.tie_weights else matrices - model.embedding.weight.numel()


def reading(num_bytes: int, device: torch.device) -> Steps:
    """Return a function that reads a buffer of `num_bytes` bytes n times; on a GPU 32 buffers in a launch.

    Together they do not fit a GPU's cache, and the launch hardly counts.
    """
    at_once = 32 if device.type == "cuda" else 1
    buffer = torch.randn(at_once * num_bytes // 4, device=device)

    def steps(count: int) -> None:
        for _ in range(count // at_once):
            buffer.sum()

    return steps


def compare(
    variants: dict[str, Steps], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return seconds per step, round by round, of variants that take turns; and joules per step if they are counted."""

    def seconds(steps: Steps, count: int) -> float:
        started = time.perf_counter()
        steps(count)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / count

    counts, unit = {}, 128 if device.type == "cuda" else 2  # after 64 steps `GraphRunner` has its longest graph
    for name, steps in variants.items():
        try:
            seconds(steps, unit)  # warm
            counts[name] = max(int(SECONDS / seconds(steps, unit)) // unit * unit, unit)
        except RuntimeError as error:  # torch.compile's own, or a refused capture; the others are worth having
            print(f"{name} is left out: {reason_of(error)}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in counts}
    energy: dict[str, float] = dict.fromkeys(counts, 0.0)
    for _ in range(rounds):
        for name, count in counts.items():
            before = joules(device)
            times[name].append(seconds(variants[name], count))
            energy[name] += (joules(device) - before) / count / rounds
    return times, energy if joules(device) else {}


def loading(model: LSTMLanguageModel, folder: Path, device: torch.device) -> dict[str, Any]:
    """Return seconds from files to a decoder, and from a prompt to its first token."""
    save_model(model, folder / "model")
    figures: dict[str, Any] = {}
    for name in ("float32", "bfloat16", "int8") if device.type == "cpu" else ("float32", "bfloat16"):
        times = []
        for _ in range(3):
            started = time.perf_counter()
            loaded = read_model(folder / "model").to(device).eval()
            read = time.perf_counter()
            decoder = CellDecoder(loaded, name)
            made = time.perf_counter()
            state = decoder.prefill(list(range(1, PROMPT + 1)))
            tokens, _, sampling = start_of(decoder, 1)
            advance(decoder, tokens, state, sampling, unk_id=0, eos_id=2)[0].tolist()
            times.append((read - started, made - read, time.perf_counter() - made))
        figures[name] = {
            part: round(statistics.median(values), 4)
            for part, values in zip(("read", "pack", "first_token"), zip(*times, strict=True), strict=True)
        }
        print(f"{name:10} seconds to {', '.join(f'{part} {value:.3f}' for part, value in figures[name].items())}")
    return figures


def main() -> None:
    """Measure all variants in turns and print milliseconds per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--compile", action="store_true", help="with the plain loop under torch.compile, a minute more")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=4,
        metavar="N",
        help="vocabulary, embedding, hidden size and layers (default: by device)",
    )
    parser.add_argument("--name", help="of the results on a CPU", default="decode")
    parser.add_argument("--checkpoint", help="count on this one how often other tokens are drawn, and nothing else")
    args = parser.parse_args()
    if args.checkpoint is not None:
        with torch.inference_mode():
            save("decode_tokens", differences(args.checkpoint))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = tuple(args.shape or SHAPES[device.type])
    vocab_size, embedding_dim, hidden_size, num_layers = shape
    torch.manual_seed(0)
    config = ModelConfig(embedding_dim=embedding_dim, hidden_size=hidden_size, num_layers=num_layers)
    model = LSTMLanguageModel(config, vocab_size).to(device).eval()
    graphed = None
    if device.type == "cuda":
        tokenizer = tokenizer_of(vocab_size)
        model.output.bias.data[tokenizer.eos_id] = -1000.0  # no text ends by itself
        graphed = choose_decoder(model, "graph"), CellDecoder(model, "bfloat16"), tokenizer
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        figures: dict[str, Any] = {"shape": shape, "load": loading(model, folder, device), "steps": {}}
        plain, decoders = Plain(model).to(device).eval(), []
        if device.type == "cpu":
            decoders = list(cpu_decoders(model, folder))
        if graphed is not None:
            figures["chosen"] = graphed[0].description
        if args.compile:
            mode = "reduce-overhead" if device.type == "cuda" else "default"
            cells = torch.compile(Plain(model, cells=True).to(device).eval(), mode=mode)
        for rows in args.batch_sizes:
            variants = {"plain": plain_steps(plain, model, rows)}
            if device.type == "cpu":
                variants["plain, oneDNN off"] = plain_steps(plain, model, rows, onednn=False)
            elif graphed is not None:
                chosen, operators, tokenizer = graphed
                variants["bfloat16 operators, eager"] = decoder_steps(operators, rows)
                variants["bfloat16 operators, graph"] = graph_steps(operators, rows)
                variants["bfloat16 chosen, graph"] = graph_steps(chosen, rows)
                variants["bfloat16 chosen, runner"] = runner_steps(chosen, rows, tokenizer)
            if args.compile:
                variants["torch.compile"] = plain_steps(cells, model, rows, compiled=device.type == "cuda")
            variants |= {decoder.name: decoder_steps(decoder, rows) for decoder in decoders}
            readings = {
                f"reading {name}": reading(weight_count(model) * size, device) for name, size in BYTES.items()
            }  # fmt: skip
            figures["steps"][str(rows)] = report(*compare(variants | readings, args.rounds, device), rows)
            keep(args.name if device.type == "cpu" else "decode_cuda", figures)


def keep(name: str, figures: dict[str, Any]) -> None:
    """Save figures beside those of other batch sizes by the same machine and versions."""
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    steps = dict(figures["steps"])
    if before.get("machine") == describe() and before["figures"]["shape"] == list(figures["shape"]):
        steps = before["figures"]["steps"] | steps
    save(name, figures | {"steps": dict(sorted(steps.items(), key=lambda item: int(item[0])))})


def differences(name: str, rows: int = 10, length: int = 1000) -> dict[str, Any]:
    """Tell how often a decoder would draw another token than the model itself, after the same text by the same noise.

    Args:
        name: a checkpoint.
        rows: of a batch; each is read alone too.
        length: tokens of a row, drawn by the plain decoder at temperature 1.
    """
    model, tokenizer = load_model(name)

    def drawn(decoder: Decoder, chosen: list[int], text: Tensor | None) -> Tensor:
        """Return what is drawn (rows, length), along a text or freely."""
        tokens, state, sampling = start_of(decoder, rows)
        places, out = torch.tensor(chosen), []
        sampling, tokens = select_sampling_state(sampling, places), torch.full((len(chosen),), tokenizer.bos_id)
        state = [part[places] for part in state]
        for i in range(length):
            tokens, state, _ = advance(
                decoder, tokens, state, sampling, unk_id=tokenizer.unk_id, eos_id=tokenizer.eos_id
            )
            out.append(tokens)
            tokens = tokens if text is None else text[places, i]
        return torch.stack(out, 1)

    everyone = list(range(rows))
    text = drawn(Decoder(model), everyone, None)
    figures: dict[str, Any] = {"tokens": text.numel()}
    for kind in ("plain", "float32", "bfloat16", "int8"):
        decoder = choose_decoder(model, kind)
        together = drawn(decoder, everyone, text)
        alone = torch.cat([drawn(decoder, [row], text) for row in everyone])
        figures[kind] = {"of_plain": int((together != text).sum()), "alone": int((alone != together).sum())}
        print(
            f"{kind:10} {figures[kind]['of_plain']} of {text.numel()} tokens differ from the plain decoder's, "
            f"{figures[kind]['alone']} where a row is read alone"
        )
    return figures


def report(times: dict[str, list[float]], energy: dict[str, float], rows: int) -> dict[str, Any]:
    """Print and return figures of a batch size; ratios are taken round by round."""
    figures = {}
    for name, seconds in times.items():
        median = statistics.median(seconds)
        figures[name] = {
            "ms": round(median * 1e3, 4), "lowest": round(min(seconds) * 1e3, 4),
            "highest": round(max(seconds) * 1e3, 4),
        }  # fmt: skip
        if name in energy:
            figures[name]["millijoules_per_token"] = round(energy[name] / rows * 1e3, 3)
        if name.startswith("reading"):
            print(f"{rows:4} {name:24} {median * 1e3:8.3f} ms")
            continue
        ratios = sorted(p / s for p, s in zip(times["plain"], seconds, strict=True))
        read = [part for part in BYTES if part in name] or ["float32"]
        floors = times[f"reading {read[0]}"]
        share = statistics.median(f / s for f, s in zip(floors, seconds, strict=True))
        figures[name] |= {
            "tokens_per_second": round(rows / median), "ratio": round(statistics.median(ratios), 2),
            "lowest_ratio": round(ratios[0], 2), "highest_ratio": round(ratios[-1], 2), "of_floor": round(share, 3),
        }  # fmt: skip
        print(
            f"{rows:4} {name:24} {median * 1e3:8.3f} ms {rows / median:10,.0f} tokens/s "
            f"{statistics.median(ratios):6.1f} x plain ({ratios[0]:.1f} to {ratios[-1]:.1f}), {share:.2f} of the floor"
        )
    return figures


if __name__ == "__main__":
    main()
