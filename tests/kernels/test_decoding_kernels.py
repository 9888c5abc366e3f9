"""Compiled code against torch's operators, bit for bit and token for token, and what happens where there is none."""

from __future__ import annotations

import logging
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from textgen.config import ModelConfig, SamplingConfig
from textgen.decoding import sampling
from textgen.decoding.decoders import CellDecoder
from textgen.decoding.generation import sample_all
from textgen.decoding.sampling import SamplingState, divide_by_temperature, draw, keep_allowed
from textgen.hardware import processor_flags
from textgen.kernels import compile as native
from textgen.kernels import decoding as decoding_kernels
from textgen.model.lstm import LSTMLanguageModel
from textgen.noise import exponential, hash_bits, uniform
from textgen.tokenizer import Tokenizer, train_tokenizer

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
vnni = pytest.mark.skipif("avx512_vnni" not in processor_flags(), reason="this processor has no AVX512-VNNI")


def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_kernels, "compiled_code", lambda: None)


def build(config: ModelConfig, vocab_size: int = 300) -> LSTMLanguageModel:
    torch.manual_seed(3)
    model = LSTMLanguageModel(config, vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


# --- the draw --------------------------------------------------------------------------------------------------------


def rows_to_draw(num_rows: int, vocab_size: int, seed: int) -> tuple[torch.Tensor, SamplingState]:
    """Return logits with ties and banned tokens among them, and rows of every temperature, 0 included."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=random) * 4
    logits[torch.rand(logits.shape, generator=random) < 0.1] = -torch.inf
    logits[::3] = logits[::3].round()  # equals: at temperature 0 the first counts
    logits[:, -1] = 0.0
    temperature = torch.tensor([0.0, 0.01, 0.7, 1.0, 1.0, 30.0]).repeat(num_rows)[:num_rows, None]
    key = torch.randint(1 << 62, (num_rows,), generator=random)
    return logits, SamplingState({"key": key, "step": torch.arange(num_rows) % 1000, "temperature": temperature})


@compiler
@pytest.mark.parametrize(("num_rows", "vocab_size", "times"), [(20_000, 50, 60), (500, 8192, 12), (7, 1, 1)])
def test_a_million_compiled_draws_are_those_of_torch(num_rows: int, vocab_size: int, times: int) -> None:
    doubtful = 0
    for seed in range(times):
        logits, state = rows_to_draw(num_rows, vocab_size, seed)
        logits = divide_by_temperature(logits, state.tensors["temperature"])
        drawn = decoding_kernels.draw(
            logits, sampling.item_bits(vocab_size, logits.device), *(state.tensors[name] for name in state.tensors)
        )
        assert drawn is not None
        drawing = state.tensors["temperature"][:, 0] > 0
        doubtful += int((drawn[0][drawing] < 0).sum())
        assert drawn[1] == int((drawn[0] < 0).sum())
        assert torch.equal(draw(logits, state), sampling._draw(logits, state.tensors))
    assert doubtful <= num_rows * times / 1000


@compiler
def test_tokens_that_only_rounding_tells_apart_are_drawn_as_torch_draws_them() -> None:
    _, state = rows_to_draw(200, 300, 0)
    del state.tensors["temperature"]
    logits = exponential(hash_bits(state.tensors["key"], state.tensors["step"]), 300).log()  # all equal less the noise
    assert torch.equal(draw(logits, state), sampling._draw(logits, state.tensors))


@compiler
def test_what_no_comparison_orders_is_drawn_as_torch_draws_it() -> None:
    logits, state = rows_to_draw(12, 300, 0)
    logits[0] = -torch.inf
    logits[1, 5] = torch.nan
    logits[2, 7] = torch.inf
    logits[3, [8, 200]] = torch.inf
    assert torch.equal(draw(logits, state), sampling._draw(logits, state.tensors))


@compiler
def test_logits_that_are_a_part_of_a_larger_tensor_are_drawn_by_their_own_rows() -> None:
    logits, state = rows_to_draw(64, 400, 0)
    part = logits[:, 30:250]
    assert torch.equal(draw(part, state), sampling._draw(part.clone(), state.tensors))


@compiler
def test_compiled_division_by_temperature_is_torchs_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, state = rows_to_draw(300, 500, 0)
    temperature = state.tensors["temperature"]
    divided = decoding_kernels.divide_by_temperature(logits, temperature)
    without_code(monkeypatch)
    assert divided is not None
    assert torch.equal(divide_by_temperature(logits, temperature), divided)


@compiler
@pytest.mark.parametrize(("rows", "size"), [(1, 4000), (3, 341), (300, 500), (2, 7)])
def test_compiled_masks_are_torchs_bit_for_bit(monkeypatch: pytest.MonkeyPatch, rows: int, size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, size + 9, generator=generator)[:, 5 : 5 + size]
    masks = torch.randint(256, (rows, -(-size // 32) * 4), dtype=torch.uint8, generator=generator)
    masks[0] = 0  # nothing is allowed: the text ends
    kept = decoding_kernels.keep_allowed(logits, masks, 5)
    without_code(monkeypatch)
    assert kept is not None
    assert torch.equal(kept, keep_allowed(logits, masks, eos_id=5))
    assert (kept[0] > -torch.inf).nonzero().tolist() == [[5]]


@compiler
@pytest.mark.parametrize(("rows", "size", "kinds"), [(1, 4000, 4000), (3, 341, 2), (300, 500, 20), (9, 7, 5)])
def test_compiled_penalties_of_repetitions_are_torchs_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, rows: int, size: int, kinds: int
) -> None:
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, size + 9, generator=generator)[:, 5 : 5 + size]
    history = torch.randint(kinds, (rows, sampling.HISTORY), generator=generator)
    history[:, -90:] = history[:, -180:-90]  # more than what counts is repeated
    history[: rows // 2, :900] = -1
    settings = {
        "multiplier": 10 * torch.rand(rows, 1, generator=generator),
        "base": 1 + 3 * torch.rand(rows, 1, generator=generator),
        "allowed_length": torch.randint(1, 31, (rows, 1), generator=generator),
    }
    breaks = torch.rand(rows, size, generator=generator) < 0.05
    breaks[-1:] = False
    penalized = decoding_kernels.penalize_repeats(logits, history, breaks, **settings, at_most=sampling.REPEAT_LENGTH)
    without_code(monkeypatch)
    assert penalized is not None
    assert torch.equal(sampling.penalize_repeats(logits, history, breaks, **settings), penalized)
    assert not torch.equal(penalized, logits)


@compiler
@pytest.mark.parametrize(("rows", "size"), [(1, 4000), (3, 341), (300, 500), (2, 7)])
def test_compiled_xtc_is_torchs_bit_for_bit(monkeypatch: pytest.MonkeyPatch, rows: int, size: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    logits = 3 * torch.randn(rows, size + 9, generator=generator)[:, 5 : 5 + size]
    logits[:, :2] = -torch.inf
    logits[:, 2] = logits[:, 3]
    threshold = torch.rand(rows, 1, generator=generator) / 2 * logits.softmax(-1).amax(-1, keepdim=True)
    threshold[-1] = 0
    applies = torch.rand(rows, 1, generator=generator) < 0.8
    applies[0] = True
    kept = decoding_kernels.exclude_top_choices(logits, threshold, applies)
    keys, steps = torch.randint(-(1 << 62), 1 << 62, (2, rows), generator=generator)
    chances = decoding_kernels.uniform(keys, steps, sampling.XTC_NOISE)
    without_code(monkeypatch)
    assert kept is not None
    assert chances is not None
    assert torch.equal(sampling.exclude_top_choices(logits, threshold, applies), kept)
    assert not torch.equal(kept, logits)
    assert torch.equal(uniform(keys, steps, sampling.XTC_NOISE), chances)


# --- the step --------------------------------------------------------------------------------------------------------


@compiler
@vnni
@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 6, 7, 33])
@pytest.mark.parametrize(
    "shape",
    [
        ModelConfig(embedding_dim=32, hidden_size=64, num_layers=3),
        ModelConfig(embedding_dim=96, hidden_size=32, num_layers=1, residual=True),
        ModelConfig(embedding_dim=64, hidden_size=64, num_layers=2, projection=False),
        ModelConfig(embedding_dim=32, hidden_size=64, num_layers=2, tie_weights=False),
    ],
    ids=["projected", "one layer", "not projected", "untied"],
)
def test_a_compiled_int8_step_is_that_of_the_operators_bit_for_bit(shape: ModelConfig, rows: int) -> None:
    compiled, by_operators = CellDecoder(build(shape), "int8"), CellDecoder(build(shape), "int8")
    by_operators.__dict__["kernel"] = None
    assert compiled.kernel is not None
    state = [part.repeat(rows, 1) for part in compiled.prefill([1, 2, 3])]
    wanted_state = state
    for tokens in torch.randint(300, (12, rows), generator=torch.Generator().manual_seed(5)):
        logits, state = compiled.step(tokens, state)
        wanted, wanted_state = by_operators.step(tokens, wanted_state)
        assert torch.equal(logits, wanted)
        assert all(torch.equal(part, other) for part, other in zip(state, wanted_state, strict=True))


@compiler
@vnni
@torch.inference_mode()
def test_a_step_of_many_rows_by_several_threads_is_that_of_one_bit_for_bit() -> None:
    decoder = CellDecoder(build(ModelConfig(embedding_dim=32, hidden_size=64, num_layers=3)), "int8")
    rows = 303  # more multiplications than SMALL_STEP
    tokens = torch.randint(300, (rows,), generator=torch.Generator().manual_seed(5))
    start = [part.repeat(rows, 1) for part in decoder.prefill([1, 2, 3])]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            logits, state = decoder.step(tokens, start)
            results.append(torch.cat([logits, *state], 1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


@pytest.mark.parametrize(
    "shape",
    [
        ModelConfig(embedding_dim=64, hidden_size=64, num_layers=2, residual=True, projection=False),
        ModelConfig(embedding_dim=64, hidden_size=64, num_layers=1, layer_norm=True, projection=False),
        ModelConfig(embedding_dim=64, hidden_size=72, num_layers=1),
    ],
    ids=["residual", "normed", "uneven"],
)
def test_what_compiled_code_would_round_otherwise_is_left_to_the_operators(shape: ModelConfig) -> None:
    assert CellDecoder(build(shape), "int8").kernel is None


@compiler
@vnni
@pytest.mark.parametrize("token", [-1, 300])
def test_a_token_outside_the_vocabulary_is_an_error(token: int) -> None:
    decoder = CellDecoder(build(ModelConfig(embedding_dim=32, hidden_size=64)), "int8")
    with pytest.raises(IndexError, match=rf"below the number of inputs 300: \[1, {token}\]$"):
        decoder.step(torch.tensor([1, token]), [part.repeat(2, 1) for part in decoder.prefill([1])])


@compiler
@vnni
def test_a_state_of_other_rows_or_tokens_of_another_type_are_an_error_and_no_rows_are_none() -> None:
    decoder = CellDecoder(build(ModelConfig(embedding_dim=32, hidden_size=64)), "int8")
    state = decoder.prefill([1])
    for tokens in (torch.tensor([1, 2]), torch.tensor([1], dtype=torch.int32)):
        with pytest.raises(ValueError, match="do not fit a state"):
            decoder.step(tokens, state)
    logits, state = decoder.step(torch.zeros(0, dtype=torch.int64), [part[:0] for part in state])
    assert logits.shape == (0, 300)
    assert [part.shape for part in state] == [(0, 64)] * 4


def test_texts_are_the_same_with_compiled_code_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["it was the best of times, it was the worst of times", "call me ishmael"]
    tokenizer = Tokenizer(train_tokenizer(texts, vocab_size=300, model_type="char"))
    model = build(ModelConfig(embedding_dim=32, hidden_size=64), tokenizer.vocab_size)
    config = SamplingConfig(max_new_tokens=100, temperature=0.8, top_p=0.95)
    prompts = [f"it was {i}" for i in range(9)]
    samples = sample_all(CellDecoder(model, "int8"), tokenizer, prompts, config)
    without_code(monkeypatch)
    decoder = CellDecoder(model, "int8")
    assert decoder.kernel is None
    assert sample_all(decoder, tokenizer, prompts, config) == samples


# --- compiling -------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "two.cpp"
    path.write_text('extern "C" int two() { return 2; }\n')
    return path


@compiler
def test_two_that_compile_at_a_time_leave_one_whole_file(source: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda _: native.compiled(source, tmp_path / "cache"), range(4)))
    assert made == set((tmp_path / "cache").iterdir())
    assert native.ctypes.CDLL(str(made.pop())).two() == 2


@compiler
def test_a_changed_source_is_compiled_anew_and_an_old_one_is_not(source: Path, tmp_path: Path) -> None:
    first = native.compiled(source, tmp_path)
    changed = first.stat().st_mtime_ns
    assert native.compiled(source, tmp_path) == first
    assert first.stat().st_mtime_ns == changed
    source.write_text('extern "C" int two() { return 3; }\n')
    second = native.compiled(source, tmp_path)
    assert second != first
    assert native.ctypes.CDLL(str(second)).two() == 3


@compiler
def test_code_is_not_taken_from_where_others_may_write(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(OSError, match="is writable by other users"):
        native.compiled(source, tmp_path / "cache")
    assert native.compiled(source, tmp_path / "own").parent.stat().st_mode & 0o777 == 0o700


@compiler
def test_code_that_does_not_compile_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    source.write_text("int two( {")
    with pytest.raises(subprocess.CalledProcessError):
        native.compiled(source, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_compiler_a_line_of_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with caplog.at_level(logging.INFO, logger="textgen"):
        assert native.library.__wrapped__("decoding.cpp") is None
    assert [record.getMessage() for record in caplog.records] == [
        "`decoding.cpp` is not compiled, torch's slower operators are used: there is no C++ compiler (g++, clang++)"
    ]
