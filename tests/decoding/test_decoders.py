"""Every decoder against the model's own forward: logits, and the very tokens that are drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from textgen import hardware
from textgen.config import ModelConfig, SamplingConfig
from textgen.decoding import choose, decoders, products
from textgen.decoding.choose import choose_decoder
from textgen.decoding.decoders import PREFILL_WINDOW, CellDecoder, CellDtype, Decoder
from textgen.decoding.generation import sample_all
from textgen.errors import TextgenError
from textgen.model.files import save_model
from textgen.model.lstm import LSTMLanguageModel
from textgen.tokenizer import Tokenizer, train_tokenizer

SHAPES = [
    ModelConfig(embedding_dim=24, hidden_size=40, num_layers=2),
    ModelConfig(embedding_dim=24, hidden_size=24, num_layers=3, residual=True, layer_norm=True, projection=False),
    ModelConfig(embedding_dim=24, hidden_size=40, num_layers=1, tie_weights=False, layer_norm=True),
    ModelConfig(embedding_dim=40, hidden_size=40, num_layers=3, residual=True, projection=False),
]


# of sizes that the compiled step of int8 takes
COMPILED = ModelConfig(embedding_dim=32, hidden_size=64)


def build(config: ModelConfig, vocab_size: int = 300, labels: Sequence[str] = ()) -> LSTMLanguageModel:
    torch.manual_seed(3)
    model = LSTMLanguageModel(config, vocab_size, labels=labels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # biases and norms too
    return model


@torch.inference_mode()
def logits_of(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Return logits (batch, time, vocab_size) of ids (batch, time), token by token."""
    prefilled = [decoder.prefill(row[:1].tolist()) for row in ids]
    state = [torch.cat(parts) for parts in zip(*prefilled, strict=True)]
    steps = []
    for tokens in ids.T:
        logits, state = decoder.step(tokens, state)
        steps.append(logits)
    return torch.stack(steps, 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 1e-2), ("int8", 3e-2)])
@pytest.mark.parametrize("shape", SHAPES, ids=["default", "normed", "untied", "residual"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_logits_are_those_of_the_model(shape: ModelConfig, dtype: CellDtype, tolerance: float, batch_size: int) -> None:
    model = build(shape)
    ids = torch.randint(300, (batch_size, 30), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        wanted, _ = model(ids, model.zero_state(batch_size))
    logits = logits_of(CellDecoder(model, dtype), ids)
    assert logits.dtype == torch.float32
    assert (logits - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 1e-2), ("int8", 3e-2)])
@pytest.mark.parametrize("shape", [*SHAPES, COMPILED], ids=["default", "normed", "untied", "residual", "compiled"])
def test_labels_are_inputs_and_never_outputs(shape: ModelConfig, dtype: CellDtype, tolerance: float) -> None:
    model = build(shape, labels=("a", "b"))
    ids = torch.randint(300, (4, 12), generator=torch.Generator().manual_seed(5))
    ids[:, 0] = torch.tensor([1, 300, 301, 300])
    with torch.inference_mode():
        wanted, _ = model(ids, model.zero_state(4))
    for decoder in (Decoder(model), CellDecoder(model, dtype)):
        logits = logits_of(decoder, ids)
        assert logits.shape == (4, 12, 300)
        assert (logits - wanted).norm() <= tolerance * wanted.norm()
    ids[3, 0] = 301
    assert not torch.equal(logits_of(decoder, ids)[3], logits[3])
    with pytest.raises(IndexError):
        decoder.step(torch.tensor([302]), decoder.prefill([1]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_rows_logits_do_not_depend_on_the_other_rows(dtype: CellDtype) -> None:
    decoder = CellDecoder(build(SHAPES[1]), dtype)
    ids = torch.randint(300, (4, 12), generator=torch.Generator().manual_seed(6))
    together = logits_of(decoder, ids)
    ids[1:] = torch.randint(300, (3, 12), generator=torch.Generator().manual_seed(7))
    assert torch.equal(logits_of(decoder, ids)[0], together[0])


@pytest.mark.parametrize("residual", [False, True])
def test_in_int8_a_row_alone_has_the_logits_it_has_among_others(residual: bool) -> None:
    shape = ModelConfig(embedding_dim=32, hidden_size=64, num_layers=3, residual=residual, layer_norm=residual)
    decoder = CellDecoder(build(shape), "int8")
    ids = torch.randint(300, (33, 12), generator=torch.Generator().manual_seed(6))
    together = logits_of(decoder, ids)
    for row in (0, 7, 32):
        assert torch.equal(logits_of(decoder, ids[row : row + 1])[0], together[row])
    assert torch.equal(logits_of(decoder, ids[:5]), together[:5])


@pytest.mark.parametrize("shape", SHAPES, ids=["default", "normed", "untied", "residual"])
def test_int8_without_fast_instructions_is_the_same_bit_for_bit(
    shape: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not products.processor_flags() & {"avx512_vnni", "avx_vnni", "amx_int8"}:
        pytest.skip("this processor has no fast instructions for int8")
    assert products.multiplies_int8()
    ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(6))
    fast = logits_of(CellDecoder(build(shape), "int8"), ids)
    monkeypatch.setattr(products, "multiplies_int8", lambda: False)
    assert torch.equal(logits_of(CellDecoder(build(shape), "int8"), ids), fast)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_torchs_inner_operators_logits_are_the_same(dtype: CellDtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(6))
    packed = logits_of(CellDecoder(build(SHAPES[0]), dtype), ids)
    monkeypatch.setattr(decoders, "has_packed_product", lambda dtype: False)
    tolerance = 2e-6 if dtype == "float32" else 1e-2
    assert (logits_of(CellDecoder(build(SHAPES[0]), dtype), ids) - packed).norm() <= tolerance * packed.norm()


def test_a_prompt_longer_than_a_window_is_read_whole() -> None:
    model = build(SHAPES[0])
    ids = torch.randint(300, (1, 2 * PREFILL_WINDOW + 9), generator=torch.Generator().manual_seed(8))
    with torch.inference_mode():
        wanted, _ = model(ids, model.zero_state(1))
    decoder = CellDecoder(model)
    for length in (1, 2, PREFILL_WINDOW, PREFILL_WINDOW + 1, PREFILL_WINDOW + 2, ids.shape[1]):
        logits, _ = decoder.step(ids[:, length - 1], decoder.prefill(ids[0, :length].tolist()))
        torch.testing.assert_close(logits, wanted[:, length - 1], rtol=1e-5, atol=1e-5)


TEXTS = ["it was the best of times, it was the worst of times", "call me ishmael", "é è ü ß 漢字 🙂🙃 naïve café"]


def test_ten_thousand_tokens_are_those_of_the_model() -> None:
    tokenizer = Tokenizer(train_tokenizer(TEXTS, vocab_size=400, model_type="char"))
    model = build(ModelConfig(embedding_dim=24, hidden_size=64), tokenizer.vocab_size)
    config = SamplingConfig(max_new_tokens=1000, min_new_tokens=1000, temperature=0.9, top_p=0.98)
    prompts = [f"it was {i}" for i in range(10)]
    wanted = sample_all(model, tokenizer, prompts, config)
    assert sum(sample.num_tokens for sample in wanted) == 10_000
    assert sample_all(CellDecoder(model), tokenizer, prompts, config) == wanted


# --- the choice ------------------------------------------------------------------------------------------------------


def exported(directory: Path, cost: float, **changes: Any) -> LSTMLanguageModel:
    """Write a model and what an export found int8 to cost it."""
    model = build(SHAPES[0])
    save_model(model, directory)
    figures = {
        "format": choose.FIGURES_FORMAT,
        "model_sha256": hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest(),
        "bits_per_byte": {"plain": 1.5, "bfloat16": 1.5, "int8": 1.5 + cost},
    }
    (directory / choose.FIGURES_NAME).write_text(json.dumps(figures | changes))
    return model


def on_a_processor(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(hardware, "processor_flags", lambda: frozenset(flags))
    monkeypatch.setattr(choose, "multiplies_int8", lambda: "avx512_vnni" in flags)


def test_auto_takes_int8_where_it_is_measured_and_cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor(monkeypatch, "avx512_vnni", "avx512_bf16")
    model = exported(tmp_path, 0.0019)
    decoder = choose_decoder(model, directory=tmp_path)
    assert decoder.description == "int8 decoder on cpu: it costs +0.00190 bits per byte"
    assert choose_decoder(model).name == "bfloat16"
    assert "int8 is not measured" in choose_decoder(model).description


@pytest.mark.parametrize(
    ("cost", "changes", "why"),
    [
        (0.0021, {}, "int8 costs +0.00210 bits per byte"),
        (0.0, {"model_sha256": "0" * 64}, "`decoder.json` belongs to other weights"),
        (0.0, {"bits_per_byte": {"plain": 1.0}}, "cannot be used (KeyError: 'int8')"),
        (0.0, {"bits_per_byte": "none"}, "cannot be used (TypeError"),
        (0.0, {"format": "another"}, "cannot be used (ValueError: its format is not textgen.decoder.1)"),
    ],
)
def test_auto_takes_bfloat16_where_int8_is_not_known_to_be_cheap(
    cost: float, changes: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_processor(monkeypatch, "avx512_vnni", "avx512_bf16")
    decoder = choose_decoder(exported(tmp_path, cost, **changes), directory=tmp_path)
    assert decoder.name == "bfloat16"
    assert why in decoder.description
    assert "\n" not in decoder.description


def test_auto_takes_what_the_processor_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exported(tmp_path, 0.0)
    on_a_processor(monkeypatch, "avx2")
    assert choose_decoder(model, directory=tmp_path).name == "float32"
    on_a_processor(monkeypatch, "avx2", "avx512_bf16")
    decoder = choose_decoder(model, directory=tmp_path)
    assert decoder.description == "bfloat16 decoder on cpu: the processor has it; no int8, as the processor has no VNNI"
    assert choose_decoder(model, "int8").description == (
        "int8 decoder on cpu: as asked, though this processor has no VNNI: slow"
    )


def test_a_forced_decoder_is_that_or_an_error_of_one_line() -> None:
    model = build(SHAPES[0])
    for name in ("plain", "float32", "bfloat16", "int8"):
        assert choose_decoder(model, name).name == name
    with pytest.raises(TextgenError, match=r"^the decoder `graph` needs a CUDA device, the model is on cpu$"):
        choose_decoder(model, "graph")
    with pytest.raises(TextgenError, match=r"^`decoder` must be one of `auto`, `plain`.*: fast$"):
        choose_decoder(model, "fast")
    with pytest.raises(TextgenError, match=r"^the decoder `int8` needs a CPU, the model is on meta$"):
        choose_decoder(model.to("meta"), "int8")


def test_the_removed_decoder_is_an_error_that_names_auto() -> None:
    with pytest.raises(
        TextgenError, match=r"^the decoder `compiled` was removed, as no gain was measured: use `auto`$"
    ):
        choose_decoder(build(SHAPES[0]), "compiled")
