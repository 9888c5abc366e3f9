"""Files of read texts: exact, bound to their model, and refused if anything in them is wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import textgen
from textgen.api import LanguageModel
from textgen.errors import TextgenError
from textgen.runs.tensors import serialize

LONG = "Nobody warned me: the plot was honest. " * 60


@pytest.fixture(scope="module")
def lm(tiny_run: Path) -> LanguageModel:
    return textgen.load(tiny_run, decoder="int8")


@pytest.fixture
def saved(lm: LanguageModel, tmp_path: Path) -> Path:
    """Return the file of a text of more than one window."""
    lm.read(LONG).save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_a_state_in_a_file_is_the_state(lm: LanguageModel, saved: Path) -> None:
    read, again = lm.read(LONG), lm.load_state(saved)
    assert read.num_read >= 512
    assert (again.text, again.ids, again.num_read) == (read.text, read.ids, read.num_read)
    assert all(torch.equal(one, other) for one, other in zip(again.state, read.state, strict=True))
    penalties: dict[str, Any] = {"repetition_penalty": 1.4, "no_repeat_ngram": 3, "max_new_tokens": 30}
    exact: dict[str, Any] = penalties | {"details": True, "logprobs": 0}
    assert lm.generate("It", state=again, **exact) == lm.generate(LONG + "It", **exact)


def test_a_state_of_a_state_is_that_of_the_whole(lm: LanguageModel, saved: Path, tmp_path: Path) -> None:
    lm.read(LONG + "The pl", state=lm.load_state(saved)).save(tmp_path / "chained")
    lm.read(LONG + LONG + "The pl").save(tmp_path / "whole")
    assert (tmp_path / "chained").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_state_is_not_that_of_the_decoder(lm: LanguageModel, saved: Path, tiny_run: Path) -> None:
    """The model itself reads prompts, so another decoder continues the state bit for bit."""
    other = textgen.load(tiny_run, decoder="float32")
    exact: dict[str, Any] = {"max_new_tokens": 30, "details": True, "logprobs": 0}
    assert other.generate("It", state=other.load_state(saved), **exact) == other.generate(LONG + "It", **exact)


def test_a_state_without_a_window_is_text_and_tokens(lm: LanguageModel, tmp_path: Path) -> None:
    lm.read("The plot wa").save(tmp_path / "short")
    state = lm.load_state(tmp_path / "short")
    assert (state.num_read, state.state) == (0, [])
    assert lm.generate("s", state=state) == lm.generate("The plot was")


def test_a_state_of_another_model_or_tokenizer_is_refused(lm: LanguageModel, saved: Path, tiny_run: Path) -> None:
    other = textgen.load(tiny_run, decoder="plain")
    with torch.no_grad():
        other._decoder.model.layers[0].bias[0] += 1
    with pytest.raises(
        TextgenError, match=r"a.safetensors` is the state of another model: weights_sha256 \w{64}, this one has \w{64}$"
    ):
        other.load_state(saved)
    saved.write_bytes(saved.read_bytes().replace(lm._tokenizer.sha256.encode(), b"0" * 64))
    with pytest.raises(TextgenError, match=r"is the state of another tokenizer: tokenizer_sha256 0{64}, this one has"):
        lm.load_state(saved)


def test_a_file_that_cannot_be_written_is_named(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(TextgenError, match=r"nowhere/a` cannot be written: No such file or directory"):
        lm.read("The plot").save(tmp_path / "nowhere" / "a")
    with pytest.raises(TextgenError, match=r"missing` cannot be read: No such file or directory"):
        lm.load_state(tmp_path / "missing")
    with pytest.raises(TextgenError, match="`path` must be the path of a file: 3"):
        lm.load_state(3)
    assert list(tmp_path.iterdir()) == []


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    """Change tensors and header of a file."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    kinds = {"F32": torch.float32, "U8": torch.uint8, "I32": torch.int32}
    metadata: dict[str, str] = header.pop("__metadata__")
    data = bytearray(raw[8 + int.from_bytes(raw[:8], "little") :])
    tensors = {
        name: torch.frombuffer(data[slice(*entry["data_offsets"])], dtype=kinds[entry["dtype"]]).view(entry["shape"])
        for name, entry in header.items()
    }
    change(tensors, metadata)
    path.write_bytes(b"".join(serialize(tensors, metadata=metadata)))


def put(name: str, value: Any) -> Callable[[dict[str, torch.Tensor], dict[str, str]], None]:
    return lambda tensors, metadata: (metadata if isinstance(value, str) else tensors).update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format", "textgen.lstm.1"), "is of another format: textgen.lstm.1, wanted textgen.state.1"),
        (put("device", "cuda"), "is of another device: cuda, wanted cpu"),
        (put("num_read", "513"), "do not fit together"),
        (put("num_read", "-512"), "do not fit together"),
        (put("num_read", "0"), "it holds other tensors than"),
        (put("num_read", "512000"), "do not fit together"),
        (put("text", torch.tensor([255], dtype=torch.uint8)), "do not fit together"),
        (put("text", torch.tensor([65], dtype=torch.uint8)), "do not fit together"),
        (put("ids", torch.tensor([], dtype=torch.int32)), "do not fit together"),
        (put("ids", torch.tensor(-1, dtype=torch.int32)), "it holds other tensors than"),
        (put("hidden.0", torch.full((1, 32), float("nan"))), "do not fit together"),
        (put("hidden.0", torch.zeros(1, 33)), "it holds other tensors than"),
        (put("hidden.0", torch.zeros(1, 32, dtype=torch.int32)), "it holds other tensors than"),
        (put("hidden.7", torch.zeros(1, 32)), "it holds other tensors than"),
        (lambda tensors, _: tensors["ids"].__setitem__(0, 10**6), "do not fit together"),
        (lambda tensors, _: tensors["ids"].__setitem__(9, -1), "do not fit together"),
        (lambda tensors, _: tensors.pop("ids"), "it holds other tensors than"),
    ],
)  # fmt: skip
def test_a_crafted_file_is_refused(lm: LanguageModel, saved: Path, change: Any, message: str) -> None:
    rewritten(saved, change)
    with pytest.raises(TextgenError, match=message) as refused:
        lm.load_state(saved)
    assert "\n" not in str(refused.value)


def test_a_damaged_file_is_refused_or_is_a_state(lm: LanguageModel, saved: Path) -> None:
    """A flipped bit of the LSTM state itself gives another state, which is as valid."""
    raw, draw, wanted = saved.read_bytes(), random.Random(0), lm.read(LONG)
    for _ in range(300):
        damaged = bytearray(raw)
        damaged[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        saved.write_bytes(damaged[: draw.choice([len(raw), draw.randrange(len(raw))])])
        with suppress(TextgenError):
            assert lm.load_state(saved) == wanted


def test_a_file_of_too_many_bytes_is_not_read(lm: LanguageModel, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textgen.decoding.state_files.MOST_BYTES", 1000)
    with pytest.raises(TextgenError, match=r"has \d+ bytes, a state has at most 1000$"):
        lm.load_state(saved)
    with pytest.raises(TextgenError, match=r"would have \d+ bytes, a state has at most 1000: the text is too long"):
        lm.read(LONG).save(saved)
