"""The flags that choose a checkpoint: how often files are hashed, and what is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from textgen.commands.model_argument import open_decoder, open_model
from textgen.decoding import choose as choose_module
from textgen.decoding.decoders import Decoder
from textgen.errors import CheckpointError, TextgenError
from textgen.model.files import WEIGHTS_NAME
from textgen.model.lstm import LSTMLanguageModel
from textgen.runs.checkpoint import MANIFEST_NAME, TRAINER_NAME

RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0_1"
NEWEST, BEST = "step-000004", "step-000003"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a copy of a run whose best checkpoint is not its newest one."""
    return Path(shutil.copytree(RUN, tmp_path / "run"))


@pytest.mark.parametrize("way", ["run", "checkpoint", "best"])
def test_opening_a_model_hashes_its_weights_once(run: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    wanted = run / "checkpoints" / (BEST if way == "best" else NEWEST)
    hashed: Counter[str] = Counter()
    file_digest = hashlib.file_digest

    def count(file: Any, name: str) -> Any:
        hashed[file.name] += 1
        return file_digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", count)
    opened = open_model(wanted if way == "checkpoint" else run, best=way == "best")
    assert opened.directory == opened.checkpoint == wanted
    assert hashed[str(wanted / WEIGHTS_NAME)] == 1
    assert hashed[str(wanted / TRAINER_NAME)] == 1


def test_decoder_is_said_to_run_in_graphs_where_it_does(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def choose(model: LSTMLanguageModel, *_: Any, **__: Any) -> Decoder:
        decoder = Decoder(model)
        decoder.in_graphs = True  # as on a GPU
        return decoder

    monkeypatch.setattr(choose_module, "choose_decoder", choose)
    with caplog.at_level(logging.INFO, "textgen"):
        open_decoder(run, "auto", best=False)
    assert caplog.messages == ["plain decoder on cpu, in graphs"]


def test_a_damaged_best_checkpoint_is_refused(run: Path) -> None:
    with (run / "checkpoints" / BEST / WEIGHTS_NAME).open("r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CheckpointError, match="is damaged"):
        open_model(run, best=True)
    assert open_model(run, best=False).directory == run / "checkpoints" / NEWEST


def test_weights_that_the_manifest_does_not_list_are_refused(run: Path) -> None:
    path = run / "checkpoints" / NEWEST / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    del manifest["files"][WEIGHTS_NAME]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"has no `model.safetensors` in its `manifest.json`"):
        open_model(run, best=False)


def test_a_best_checkpoint_that_is_gone_is_refused(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / BEST)
    with pytest.raises(CheckpointError, match=r"has no `manifest.json`"):
        open_model(run, best=True)


def test_a_published_model_has_no_checkpoint(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", WEIGHTS_NAME, "tokenizer.model"):
        shutil.copyfile(run / "checkpoints" / NEWEST / name, folder / name)
    opened = open_model(folder, best=False)
    assert (opened.directory, opened.checkpoint, opened.normalization) == (folder, None, "none")


def test_the_decoder_is_the_one_of_the_flag(run: Path) -> None:
    _, decoder = open_decoder(run, "plain", best=False)
    assert decoder.name == "plain"
    with pytest.raises(TextgenError, match="needs a CUDA device"):
        open_decoder(run, "graph", best=False)
