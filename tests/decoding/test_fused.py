"""The fused decoder by torch's operators: its steps, its draws, and how many kernels a step takes on a GPU."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.decoding.test_cuda_graphs import MIXED, batch_of, requests_for, samples
from textgen.config import ModelConfig, SamplingConfig
from textgen.decoding import choose, cuda_graphs
from textgen.decoding.batch import SingleSteps, _prefill
from textgen.decoding.cuda_graphs import Buffers, GraphRunner, steps_in_place
from textgen.decoding.decoders import Decoder, DecoderState
from textgen.decoding.fused import FusedDecoder
from textgen.decoding.pieces import PieceReader
from textgen.decoding.samples import Request
from textgen.kernels import fused_decoding
from textgen.model.lstm import LSTMLanguageModel
from textgen.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["it was the best of times, it was the worst of times", "call me ishmael", "é è ü ß 漢字 🙂🙃 naïve café"]
PLAIN = ModelConfig(embedding_dim=24, hidden_size=40, num_layers=3)
SHAPES = [
    PLAIN,
    ModelConfig(embedding_dim=24, hidden_size=40, num_layers=3, layer_norm=True, residual=True),
    ModelConfig(embedding_dim=24, hidden_size=40, num_layers=2, layer_norm=True, tie_weights=False),
    ModelConfig(embedding_dim=40, hidden_size=40, num_layers=1),
]
# every setting that the kernels know, and every one that needs torch's operators
SETTINGS = [
    *MIXED,
    SamplingConfig(repetition_penalty=1.3, presence_penalty=0.3, frequency_penalty=0.2, temperature=0.8, logprobs=0),
    SamplingConfig(min_new_tokens=5, banned_tokens=(30,), logit_bias=(("e", 2.0),), temperature=1e-20),
    SamplingConfig(dry_multiplier=0.8, xtc_probability=0.5, xtc_threshold=0.1),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(TEXTS, vocab_size=400, model_type="char"))


def build(config: ModelConfig, tokenizer: Tokenizer, *, ending: float = 2.0) -> LSTMLanguageModel:
    """Return a model of random weights; the larger `ending`, the sooner its texts end."""
    torch.manual_seed(4)
    model = LSTMLanguageModel(config, tokenizer.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        model.output.bias[tokenizer.eos_id] += ending
    return model


class ByOperators(Decoder):
    """The steps of a fused decoder, whose tokens torch's operators draw."""

    def __init__(self, fused: FusedDecoder) -> None:
        super().__init__(fused.model)
        self._fused, self.pieces = fused, fused.pieces

    def step(self, tokens: torch.Tensor, state: DecoderState) -> tuple[torch.Tensor, DecoderState]:
        return self._fused.step(tokens, state)


@pytest.mark.parametrize("config", SHAPES)
@torch.inference_mode()
def test_a_step_is_that_of_the_model(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Up to the rounding of bfloat16, with rows at different tokens."""
    model = build(config, tokenizer)
    plain, fused = Decoder(model), FusedDecoder(model, None)
    state = [torch.randn(5, 40) * 0.5 for _ in range(2 * config.num_layers)]
    mine, theirs = state, state
    for i in range(4):
        tokens = torch.arange(5) * 7 + i
        logits, mine = fused.step(tokens, mine)
        wanted, theirs = plain.step(tokens, theirs)
        assert (logits - wanted).abs().max() < 0.1 * wanted.std()
        for part, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(part, other, atol=0.06, rtol=0.03)


@pytest.mark.parametrize("config", SETTINGS)
def test_each_setting_draws_as_torch_operators_do(config: SamplingConfig, tokenizer: Tokenizer) -> None:
    fused = FusedDecoder(build(PLAIN, tokenizer), None)
    requests = requests_for([config], 3, [40])
    drawn = samples(SingleSteps.of, fused, tokenizer, requests)
    wanted = samples(SingleSteps.of, ByOperators(fused), tokenizer, requests)
    assert {i: s.text for i, s in drawn.items()} == {i: s.text for i, s in wanted.items()}
    for i in wanted:
        for mine, theirs in zip(drawn[i].logprobs or (), wanted[i].logprobs or (), strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_batch_draws_the_texts_of_its_rows_alone(tokenizer: Tokenizer, batch_size: int) -> None:
    """Rows of all settings side by side, in buffers as a graph has them, with rows that end and rows that come."""
    fused = FusedDecoder(build(PLAIN, tokenizer), None)
    requests = requests_for(SETTINGS, 20, [1, 7, 30, 64])
    wanted = samples(SingleSteps.of, ByOperators(fused), tokenizer, requests, batch_size=1)
    runner = GraphRunner(fused, capture=lambda buffers, count: lambda: steps_in_place(buffers, count))
    drawn = samples(runner.batch_of, fused, tokenizer, requests, batch_size=batch_size)
    assert {i: s.text for i, s in drawn.items()} == {i: s.text for i, s in wanted.items()}


def refuse(*_: object, **__: object) -> None:
    raise OSError("out of resource: shared memory\nand more lines")


def kernels_but(*refused: str) -> ModuleType:
    """Return operations by torch's operators, some of which do not run."""
    kernels = ModuleType("kernels")
    for name in ("layer", "linear", "output", "pick", "draw"):
        setattr(kernels, name, refuse if name in refused else getattr(fused_decoding, name))
    return kernels


def test_a_kernel_that_does_not_run_is_replaced_by_operators(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, requests = build(PLAIN, tokenizer), requests_for(MIXED, 7, [20])
    wanted = samples(SingleSteps.of, FusedDecoder(model, None), tokenizer, requests)
    monkeypatch.setattr(choose, "triton_kernels", lambda: kernels_but("output"))
    decoder = choose.fused_or_cells(model, "as asked")
    with caplog.at_level(logging.WARNING, "textgen"):
        assert samples(SingleSteps.of, decoder, tokenizer, requests) == wanted
    assert caplog.messages == []
    assert decoder.description == (
        "bfloat16 decoder on cpu: as asked; fused kernels: layer, linear, pick, draw; "
        "output by torch's operators: out of resource: shared memory"
    )
    # one that fails later, as with more rows
    late = kernels_but()
    decoder = FusedDecoder(model, late)
    decoder.try_kernels()
    late.layer = refuse  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, "textgen"):
        assert samples(SingleSteps.of, decoder, tokenizer, requests) == wanted
    assert caplog.messages == ["kernel `layer` does not run here, torch's operators do: out of resource: shared memory"]


def test_kernels_are_tried_with_few_and_many_rows(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """A kernel for many rows needs more shared memory; no text changes its decoder in the middle."""

    def refusing_from(num_rows: int, name: str) -> Any:
        operation = getattr(fused_decoding, name)
        rows_of = {"layer": 1, "linear": 0}[name]
        return lambda *given, **more: (refuse if len(given[rows_of]) >= num_rows else operation)(*given, **more)

    kernels = kernels_but()
    kernels.linear, kernels.layer = refusing_from(17, "linear"), refusing_from(65, "layer")  # type: ignore[attr-defined]
    decoder = FusedDecoder(build(PLAIN, tokenizer), kernels)
    with caplog.at_level(logging.WARNING, "textgen"):
        decoder.try_kernels()
    assert decoder.fused == ("output", "pick", "draw")
    assert caplog.messages == []


def test_an_error_that_is_not_the_kernels_replaces_none(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = kernels_but("linear")
    decoder = FusedDecoder(build(PLAIN, tokenizer), kernels)
    tokens, state = torch.zeros(1, dtype=torch.int64), [torch.zeros(1, 40) for _ in range(6)]

    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    kernels.layer = no_memory  # type: ignore[attr-defined]
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        decoder.step(tokens, state)
    kernels.layer = fused_decoding.layer  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "device", torch.device("cuda"))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=r"out of resource: shared memory$"):
            decoder.step(tokens, state)
    assert decoder.fused == ("layer", "linear", "output", "pick", "draw")
    assert caplog.messages == []


def test_graphs_are_captured_again_without_a_replaced_kernel(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "CAPTURE_AFTER", {8: 0})
    kernels, captured = kernels_but(), []
    decoder = FusedDecoder(build(PLAIN, tokenizer, ending=-1000.0), kernels)

    def capture(buffers: Buffers, count: int) -> Any:
        captured.append(decoder.fused)
        return lambda: steps_in_place(buffers, count)

    runner = GraphRunner(decoder, capture=capture)
    few, many = (requests_for([SamplingConfig()], count, [8]) for count in (2, 4))
    samples(runner.batch_of, decoder, tokenizer, few)
    kernels.layer = refuse  # type: ignore[attr-defined]
    for requests in (many, few, few):
        samples(runner.batch_of, decoder, tokenizer, requests)
    everything = ("layer", "linear", "output", "pick", "draw")
    # where prompts are read, the kernel is already missed; the graph of few rows has it
    assert captured == [everything, everything[1:], everything[1:]]


def test_decoder_on_a_gpu_is_fused_where_kernels_run(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model, everything = build(PLAIN, tokenizer), ("layer", "linear", "output", "pick", "draw")
    for kernels, said in (
        (kernels_but(), "fused kernels: layer, linear, output, pick, draw"),
        (None, "no fused kernels, as Triton cannot be imported"),
        (kernels_but(*everything), "no fused kernels: out of resource: shared memory"),
    ):
        monkeypatch.setattr(choose, "triton_kernels", lambda kernels=kernels: kernels)
        decoder = choose.fused_or_cells(model, "as asked")
        assert decoder.description == f"bfloat16 decoder on cpu: as asked; {said}"
        assert isinstance(decoder, FusedDecoder) == said.startswith("fused")


def test_label_is_scaled_as_by_torch_operators() -> None:
    """Rows with a label's scale beside rows without: two steps, and a state for each."""
    tokenizer = Tokenizer(train_tokenizer(TEXTS, vocab_size=400, model_type="char"))
    torch.manual_seed(4)
    model = LSTMLanguageModel(PLAIN, tokenizer.vocab_size, labels=("good", "bad"))
    fused = FusedDecoder(model, None)
    requests = [
        Request("it was", SamplingConfig(label_scale=scale, max_new_tokens=30), number=i, label=label)
        for i, (scale, label) in enumerate([(2.0, "good"), (1.0, None), (1.0, "bad"), (0.5, "bad")])
    ]
    wanted = samples(SingleSteps.of, ByOperators(fused), tokenizer, requests)
    assert samples(SingleSteps.of, fused, tokenizer, requests) == wanted


# --- prompts ---------------------------------------------------------------------------------------------------------


def prompts_of(lengths: list[int], vocab_size: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(vocab_size, (n,), generator=generator).tolist()) for n in lengths]


LENGTHS = [[1], [2], [33], [128, 1, 32, 34, 2], list(range(1, 40))]


@torch.inference_mode()
@pytest.mark.parametrize("lengths", LENGTHS)
def test_prompts_side_by_side_have_the_states_of_steps_and_the_bits_of_each_alone(
    tokenizer: Tokenizer, lengths: list[int]
) -> None:
    fused = FusedDecoder(build(PLAIN, tokenizer), None)
    prompts = prompts_of(lengths, tokenizer.vocab_size)
    states = _prefill(fused, prompts)
    assert states.keys() == set(prompts)
    for ids in prompts:
        state = [torch.zeros(1, 40) for _ in range(6)]
        for token in ids[:-1]:
            state = fused.step(torch.tensor([token]), state)[1]
        torch.testing.assert_close(states[ids], state, rtol=1e-4, atol=1e-4)
        for mine, alone in zip(states[ids], _prefill(fused, [ids])[ids], strict=True):
            assert torch.equal(mine, alone)


def test_long_prompts_are_read_by_the_model(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = FusedDecoder(build(PLAIN, tokenizer), None)
    read: list[int] = []
    monkeypatch.setattr(fused.pieces, "read", lambda prompts: read.extend(map(len, prompts)) or {})
    states = _prefill(fused, prompts_of([129, 128, 5], tokenizer.vocab_size))
    assert read == [128, 5]
    assert [len(ids) for ids in states] == [129]


@pytest.mark.parametrize("refused", [False, True])
def test_prompts_are_read_by_a_graph_from_the_second_time_on(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, refused: bool
) -> None:
    """One graph for all lengths and numbers of prompts; without it they are read all the same."""
    fused, captured, replayed = FusedDecoder(build(PLAIN, tokenizer), None), [], []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        captured.append(work)
        if refused:
            refuse_capture()
        work()  # warms up, before anything is read
        return lambda: (replayed.append(1), work())[1]

    wanted = [_prefill(fused, prompts_of(lengths, tokenizer.vocab_size)) for lengths in LENGTHS]
    reader = PieceReader(fused, capture=capture)
    fused.in_graphs = True
    for lengths, states in zip(LENGTHS, wanted, strict=True):
        seen = reader.read(prompts_of(lengths, tokenizer.vocab_size))
        for ids, state in states.items():
            assert all(torch.equal(*pair) for pair in zip(seen[ids], state, strict=True))
    assert len(captured) == 1
    # the first prompt has nothing to read; then 1 + 1 + 4 and, for 39 prompts, 2 + 1 + 1 pieces
    assert len(replayed) == (0 if refused else 10)
    assert len(caplog.messages) == refused


def refuse_capture() -> None:
    raise RuntimeError("called a synchronizing operation")


# --- kernels of a step -----------------------------------------------------------------------------------------------

# Operators that allocate, or describe memory in another way: no kernel runs.
NO_KERNEL = {
    "alias", "as_strided", "detach", "empty", "empty_like", "expand", "new_empty", "permute", "select", "slice",
    "split", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip


class Kernels(TorchDispatchMode):
    """Counts the operators that launch a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        is_empty = isinstance(result, torch.Tensor) and result.numel() == 0
        is_same = name == "to" and result.dtype == args[0].dtype
        self.launched[name] += not (name in NO_KERNEL or is_empty or is_same)
        return result

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
        """Stand in for `triton_decoding._launch`."""
        self.launched[kernel.__name__] += 1


def kernels_of_a_step(
    config: ModelConfig, sampling: SamplingConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> Counter[str]:
    """Return the kernels of a step in a graph, by name, on tensors without data: whoever reads a value fails."""
    from textgen.kernels import triton_decoding

    counted = Kernels()
    monkeypatch.setattr(triton_decoding, "_launch", counted.launch)
    model = build(config, tokenizer)
    batch = batch_of(Decoder(model), tokenizer, requests_for([sampling], 3, [200]))
    batch.decoder = FusedDecoder(model.to("meta"), triton_decoding)
    batch.tokens, batch.state = batch.tokens.to("meta"), [part.to("meta") for part in batch.state]
    batch.sampling.tensors = {name: value.to("meta") for name, value in batch.sampling.tensors.items()}
    buffers = Buffers.like(batch, 4)
    counts = []
    for steps in (1, 1, 2):  # the first one computes what is kept
        counted.launched = Counter()
        with counted, torch.inference_mode():
            steps_in_place(buffers, steps)
        counts.append(counted.launched)
    assert (counts[1] - (counts[2] - counts[1])).keys() <= {"_foreach_copy_", "copy_"}  # once a graph
    return counts[2] - counts[1]  # without names of no launch


@pytest.mark.usefixtures("triton_device")
@pytest.mark.parametrize(
    ("sampling", "more"),
    [
        (SamplingConfig(temperature=0.8), {}),
        (SamplingConfig(temperature=0.0), {}),
        (SamplingConfig(repetition_penalty=1.3, presence_penalty=0.3, frequency_penalty=0.2, min_new_tokens=9), {}),
        (SamplingConfig(banned_tokens=(30,), logit_bias=(("e", 2.0),)), {}),
        (SamplingConfig(logprobs=0), {"copy_": 1}),
    ],
)
@pytest.mark.parametrize("config", SHAPES[:2])
def test_a_step_of_three_layers_takes_six_kernels(
    config: ModelConfig,
    sampling: SamplingConfig,
    more: dict[str, int],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched = kernels_of_a_step(config, sampling, tokenizer, monkeypatch)
    assert launched == {"_layer": 3, "_linear": 1, "_output": 1, "_draw": 1} | more


@pytest.mark.usefixtures("triton_device")
@pytest.mark.parametrize(
    ("sampling", "count"),
    [
        (SamplingConfig(logprobs=2), 11),
        (SamplingConfig(min_p=0.02), 13),
        (SamplingConfig(top_k=20), 16),
        (SamplingConfig(top_p=0.9), 20),
        (SamplingConfig(no_repeat_ngram=3), 27),
        (SamplingConfig(typical_p=0.95), 30),
        (SamplingConfig(dry_multiplier=0.8), 31),
        (SamplingConfig(xtc_probability=0.5, xtc_threshold=0.1), 63),
    ],
)
def test_filters_take_more_kernels(
    sampling: SamplingConfig, count: int, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the table of docs/explanation/decoding-on-a-gpu.md says."""
    launched = kernels_of_a_step(PLAIN, sampling, tokenizer, monkeypatch)
    assert launched.total() == count
    assert launched["_pick_rows"] == (sampling.logprobs is None)
