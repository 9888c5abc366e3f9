"""Decoders as files: what is written is what decodes, and the figures beside it are true."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tokenizers import Tokenizer as FastTokenizer

from textgen.cli import main, train_main
from textgen.commands.export import export_command
from textgen.config import ModelConfig
from textgen.data.texts import store_of
from textgen.decoding import choose, export
from textgen.decoding.choose import choose_decoder
from textgen.decoding.decoders import CellDecoder, Decoder
from textgen.decoding.export import PART_LENGTH, PARTS, decoded_nats, measure_int8
from textgen.decoding.onnx import OnnxDecoder, write_onnx
from textgen.evaluation import score
from textgen.kernels import fused_decoding
from textgen.model.files import load_model, save_model
from textgen.model.lstm import LSTMLanguageModel, LSTMLayer
from textgen.packages import HOME
from textgen.runs.checkpoint import find_checkpoint, newest_valid, verify
from textgen.runs.tensors import read_header
from textgen.tokenizer import Tokenizer
from textgen.training import validation

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the extra `export` is missing",
)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # the verb sets it


@pytest.fixture
def checkpoint(tiny_run: Path, tmp_path: Path) -> Path:
    newest, _ = newest_valid(tiny_run)
    assert newest is not None
    return Path(shutil.copytree(newest, tmp_path / newest.name))


def random_model(config: ModelConfig) -> LSTMLanguageModel:
    torch.manual_seed(4)
    model = LSTMLanguageModel(config, 60, labels=("a", "b")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def test_token_by_token_documents_cost_what_they_cost_window_by_window() -> None:
    model = random_model(ModelConfig(embedding_dim=16, hidden_size=32, num_layers=2, layer_norm=True))
    draw = np.random.default_rng(5)
    documents = [draw.integers(60, size=length) for length in (1, 40, 7, 7, 300, 2)]
    wanted = score(Accelerator(cpu=True), model, documents, 1, bos_id=2).nats
    for batch_size in (1, 4, 64):
        nats = decoded_nats(Decoder(model), documents, bos_id=2, batch_size=batch_size)
        assert nats == pytest.approx(wanted, rel=1e-6)


def test_export_keeps_what_int8_costs_and_the_choice_goes_by_it(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    export_command([str(checkpoint), "--limit", "5"])
    printed = capsys.readouterr().out
    figures = json.loads((checkpoint / "decoder.json").read_text())
    bits = figures["bits_per_byte"]
    assert figures["documents"] == 5
    assert printed.splitlines()[-1] == str(checkpoint / "decoder.json")
    for name in ("plain", "bfloat16", "int8", "bfloat16 x int8"):
        assert f"{name:15} {bits[name]:.6f} bits per byte" in printed
        assert bits[name] == pytest.approx(bits["plain"], abs=0.01)
    assert len(set(bits.values())) == 4
    verify(checkpoint)  # none of it is in the manifest, and the checkpoint is whole as before
    model, _ = load_model(checkpoint)
    monkeypatch.setattr(choose, "multiplies_int8", lambda: True)
    monkeypatch.setattr(choose, "MOST_BITS_PER_BYTE", abs(bits["int8"] - bits["plain"]))
    assert choose_decoder(model, directory=checkpoint).name == "int8"
    monkeypatch.setattr(choose, "MOST_BITS_PER_BYTE", bits["int8"] - bits["plain"] - 1e-9)
    assert choose_decoder(model, directory=checkpoint).name != "int8"
    # on a GPU
    monkeypatch.setattr(choose, "triton_kernels", lambda: fused_decoding)
    cost = bits["bfloat16 x int8"] - bits["plain"]
    for limit, name in ((cost, "bfloat16 x int8"), (cost - 1e-9, "bfloat16")):
        monkeypatch.setattr(choose, "MOST_BITS_PER_BYTE", limit)
        assert choose.fused_or_cells(model, "the GPU has it", directory=checkpoint).name == name


# --- at the end of a training ----------------------------------------------------------------------------------------


@pytest.fixture
def has_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let int8 be measured and chosen here; without VNNI its sums are computed in float64, bit for bit the same."""
    monkeypatch.setattr(export, "multiplies_int8", lambda: True)
    monkeypatch.setattr(choose, "multiplies_int8", lambda: True)


LONG_ENOUGH = ["--data.validation_fraction", "0.49", "--evaluate_every", "2"]
LONG_ENOUGH += ["--learning_rate", "100", "--warmup_steps", "1000"]  # 0.1, 0.2, 0.3, 0.4: the rate grows too high


@pytest.mark.usefixtures("has_vnni")
def test_a_finished_training_has_measured_int8_and_auto_takes_it(tiny_flags: list[str], tmp_path: Path) -> None:
    train_main([*tiny_flags, *LONG_ENOUGH, "--run_dir", str(tmp_path / "run")])
    best = find_checkpoint(tmp_path / "run", best=True)
    newest = find_checkpoint(tmp_path / "run")
    assert best is not None
    assert newest is not None
    assert best != newest, "such a learning rate makes the model worse"
    for directory in (best, newest):
        figures = json.loads((directory / "decoder.json").read_text())
        assert figures["data"] == "validation"
        assert figures["tokens"] == PARTS * PART_LENGTH
        verify(directory)  # the manifest is as before
        model, _ = load_model(directory)
        chosen = choose_decoder(model, directory=directory)
        cost = figures["bits_per_byte"]["int8"] - figures["bits_per_byte"]["plain"]
        assert (chosen.name == "int8") == (cost <= choose.MOST_BITS_PER_BYTE)


@pytest.mark.usefixtures("has_vnni")
def test_the_end_of_a_training_measures_what_the_model_costs(checkpoint: Path, tmp_path: Path) -> None:
    store = store_of(checkpoint)
    model, tokenizer = load_model(checkpoint)
    with torch.no_grad():
        model.output.weight.mul_(40)  # a model that rounding costs something
    save_model(model, checkpoint)
    cost = measure_int8(checkpoint, store)
    figures = json.loads((checkpoint / "decoder.json").read_text())
    split = store.split(figures["data"])
    places = [i * split.num_tokens // PARTS for i in range(PARTS)]
    parts = [split.tokens[place : place + PART_LENGTH] for place in places]
    num_bytes = figures["tokens"] * store.bytes_per_token(figures["data"])
    plain = score(Accelerator(cpu=True), model, parts, 1, bos_id=tokenizer.bos_id).nats
    int8 = decoded_nats(CellDecoder(model, "int8"), parts, bos_id=tokenizer.bos_id, batch_size=7)
    assert figures["bits_per_byte"]["plain"] == pytest.approx(plain / math.log(2) / num_bytes, rel=1e-5)
    assert cost == pytest.approx((int8 - plain) / math.log(2) / num_bytes, rel=0.01)
    assert cost == figures["bits_per_byte"]["int8"] - figures["bits_per_byte"]["plain"]


def test_int8_is_not_measured_where_it_is_slow_or_the_text_is_short(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(checkpoint)
    monkeypatch.setattr(export, "multiplies_int8", lambda: False)
    assert measure_int8(checkpoint, store) is None
    monkeypatch.setattr(export, "multiplies_int8", lambda: True)
    monkeypatch.setattr(export, "LEAST_PARTS", 10**6)
    assert measure_int8(checkpoint, store) is None
    assert not (checkpoint / "decoder.json").exists()


@pytest.mark.usefixtures("has_vnni")
def test_what_export_measured_stays_at_the_end_of_a_training(checkpoint: Path) -> None:
    export_command([str(checkpoint), "--limit", "5"])
    path, store = checkpoint / "decoder.json", store_of(checkpoint)
    exported = path.read_bytes()
    assert measure_int8(checkpoint, store) is None
    assert path.read_bytes() == exported
    figures = json.loads(exported)
    without = {name: bits for name, bits in figures["bits_per_byte"].items() if name != "int8"}
    for other in ({"model_sha256": "0"}, {"bits_per_byte": without}, {"format": "textgen.decoder.0"}):
        path.write_text(json.dumps(figures | other))
        assert measure_int8(checkpoint, store) is not None
        assert json.loads(path.read_text())["tokens"] == PARTS * PART_LENGTH


@pytest.mark.usefixtures("has_vnni")
def test_a_large_model_is_measured_on_fewer_parts_or_not_at_all(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, size = store_of(checkpoint), load_model(checkpoint)[0].num_parameters
    monkeypatch.setattr(export, "MOST_WORK", 63 * PART_LENGTH * size)
    with caplog.at_level("INFO", logger="textgen"):
        assert measure_int8(checkpoint, store) is None
        assert not (checkpoint / "decoder.json").exists()
        assert "measuring" not in caplog.text
        monkeypatch.setattr(export, "MOST_WORK", 65 * PART_LENGTH * size)
        assert measure_int8(checkpoint, store) is not None
    assert json.loads((checkpoint / "decoder.json").read_text())["tokens"] == 65 * PART_LENGTH
    assert f"measuring what int8 costs `{checkpoint.name}`" in caplog.messages


@pytest.mark.usefixtures("has_vnni")
def test_an_error_of_the_measurement_ends_no_training(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(validation, "measure_int8", fail)
    train_main([*tiny_flags, "--run_dir", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    assert "what int8 costs step 4 is not measured: no space left" in caplog.text


# --- files -----------------------------------------------------------------------------------------------------------


def test_decoder_file_holds_what_the_int8_decoder_computes_with(checkpoint: Path, tmp_path: Path) -> None:
    export_command([str(checkpoint), "--limit", "1", "--out", str(tmp_path / "out")])
    assert not (checkpoint / "decoder.json").exists()
    path = tmp_path / "out" / "decoder.safetensors"
    header, tensors = read_header(path), load_file(path)
    assert {name for name, (dtype, _) in header.items() if dtype == "I8"} == {
        "cells.0.weight", "cells.1.weight", "projection.weight", "output.weight",
    }  # fmt: skip
    model, _ = load_model(checkpoint)
    kept = CellDecoder(model, "int8").int8_tensors()
    assert tensors.keys() == kept.keys()
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)
    back = tensors["output.weight"] * tensors["output.scale"][:, None]
    assert ((back - model.output.weight).abs() <= tensors["output.scale"][:, None] * 0.501).all()
    first = model.layers[0]
    assert isinstance(first, LSTMLayer)
    i, f, g, o = first.weight_hh.chunk(4)
    back = tensors["cells.0.weight"] * tensors["cells.0.scale"][:, None]
    assert (back - torch.cat([i, f, o, g])).abs().max() <= tensors["cells.0.scale"].max() * 0.501


@needs_onnx
@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(embedding_dim=16, hidden_size=32, num_layers=2),
        ModelConfig(embedding_dim=32, hidden_size=32, num_layers=3, layer_norm=True, residual=True, projection=False),
        ModelConfig(embedding_dim=16, hidden_size=32, num_layers=1, tie_weights=False),
    ],
    ids=["default", "normed", "untied"],
)
def test_onnx_step_is_the_models(config: ModelConfig, tmp_path: Path) -> None:
    model = random_model(config)
    write_onnx(model, tmp_path / "decoder.onnx")
    decoder = OnnxDecoder(model, tmp_path / "decoder.onnx", threads=1)
    for rows in (1, 3):
        ids = torch.randint(60, (rows, 20))
        ids[:, 0] = torch.tensor([60, 61, 2][:rows])  # labels are inputs too
        with torch.inference_mode():
            wanted, _ = model(ids, model.zero_state(rows))
        state = [torch.zeros(rows, 32) for _ in range(2 * config.num_layers)]
        for place in range(20):
            logits, state = decoder.step(ids[:, place], state)
            torch.testing.assert_close(logits, wanted[:, place], rtol=1e-4, atol=1e-4)


@needs_onnx
def test_export_to_onnx_compares_under_onnxruntime(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_command([str(checkpoint), "--to", "onnx", "--limit", "3"])
    assert "onnxruntime" in capsys.readouterr().out
    bits = json.loads((checkpoint / "onnx.json").read_text())["bits_per_byte"]
    assert bits["onnxruntime"] == pytest.approx(bits["plain"], abs=1e-5)
    verify(checkpoint)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--limit", "0"], "error: `limit` must be at least 1: 0"),
        (["--batch_size", "0"], "error: `batch_size` must be at least 1: 0"),
        (["--to", "zip"], "error: `to` must be one of `decoder`, `onnx`, `tokenizer`: zip"),
    ],
)
def test_wrong_flags_end_with_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        export_command(["checkpoint", *argv])
    assert ended.value.code == 2
    assert capsys.readouterr().err == message + "\n"


def test_missing_packages_are_named_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SystemExit) as ended:
        main(["export", "nowhere", "--to", "onnx"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"error: `--to onnx` needs `onnxscript`: run `pip install -e '.[export]'` in `{HOME}`\n"
    )


def test_a_tokenizer_is_written_for_hugging_face(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    main(["export", str(checkpoint), "--to", "tokenizer"])
    names = ["tokenizer.json", "tokenizer_config.json"]
    assert capsys.readouterr().out.splitlines() == [str(checkpoint / name) for name in names]
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name not in names} == before
    verify(checkpoint)
    main(["export", str(checkpoint), "--to", "tokenizer", "--out", str(tmp_path / "new" / "out")])
    for name in names:
        assert (tmp_path / "new" / "out" / name).read_bytes() == (checkpoint / name).read_bytes()
    fast = FastTokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = "The plot was \u2581 Ça 🙂 <br /><br />silly."
    assert fast.encode(text).ids == Tokenizer.from_file(checkpoint).encode(text)


def test_flags_of_scoring_are_refused_for_a_tokenizer(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["export", str(checkpoint), "--to", "tokenizer", "--limit", "3"])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: `limit` has no effect with `--to tokenizer`, which scores no documents\n"
    )
