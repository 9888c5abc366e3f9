"""What `python -m benchmarks.decode` does on a GPU, as far as it needs none."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import decode, machine
from textgen.config import ModelConfig
from textgen.decoding.cuda_graphs import steps_in_place
from textgen.decoding.decoders import CellDecoder
from textgen.model.lstm import LSTMLanguageModel


@torch.inference_mode()
def test_what_users_run_draws_as_many_tokens_as_are_timed() -> None:
    tokenizer = decode.tokenizer_of(300)
    model = LSTMLanguageModel(ModelConfig(embedding_dim=8, hidden_size=16), tokenizer.vocab_size)
    assert tokenizer.vocab_size == 300
    model.output.bias[tokenizer.eos_id] = -1000.0
    sizes = []

    def capture(buffers: Any, count: int) -> Any:
        sizes.append((len(buffers.tokens), count))
        return partial(steps_in_place, buffers, count)

    steps = decode.runner_steps(CellDecoder(model), 3, tokenizer, capture=capture)
    for _ in range(2):
        steps(128)
    assert (4, 32) in sizes


@torch.inference_mode()
def test_steps_without_graphs_do_not_pass_for_what_users_run(capsys: pytest.CaptureFixture[str]) -> None:
    """They are left out with the reason, and the others are measured."""
    tokenizer = decode.tokenizer_of(300)
    model = LSTMLanguageModel(ModelConfig(embedding_dim=8, hidden_size=16), tokenizer.vocab_size)
    model.output.bias[tokenizer.eos_id] = -1000.0

    def refuse(buffers: Any, count: int) -> Any:
        raise RuntimeError("the step waits")

    variants = {
        "runner": decode.runner_steps(CellDecoder(model), 1, tokenizer, capture=refuse),
        "eager": decode.decoder_steps(CellDecoder(model), 1),
    }
    variants["runner"](16)  # none is captured that early
    times, _ = decode.compare(variants, 1, torch.device("cpu"))
    assert set(times) == {"eager"}
    assert "runner is left out: steps could not be captured in CUDA graphs: the step waits" in capsys.readouterr().out


def test_a_compiled_step_may_write_to_what_it_returned_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `reduce-overhead` does; its state is copied before the next call."""
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)  # it loads torch's compiler
    model = LSTMLanguageModel(ModelConfig(embedding_dim=8, hidden_size=16), 40)
    plain = decode.Plain(model).eval()
    memory: list[Tensor] = []

    def compiled(tokens: Tensor, state: Any) -> Any:
        for part in memory:
            part.fill_(float("nan"))
        probabilities, new = plain(tokens, tuple(part.clone() for part in state))
        memory[:] = [part.clone() for part in new]
        return probabilities, tuple(memory)

    with torch.inference_mode():
        steps = decode.plain_steps(compiled, model, 2, compiled=True)
        steps(4)  # torch.multinomial refuses nan


def test_each_batch_size_is_saved_when_it_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decode, "RESULTS", tmp_path)
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    decode.keep("decode", {"shape": (1, 2), "steps": {"8": {"plain": 1}}})
    decode.keep("decode", {"shape": (1, 2), "steps": {"1": {"plain": 2}}})
    assert list(machine_figures(tmp_path)["steps"]) == ["1", "8"]
    decode.keep("decode", {"shape": (1, 3), "steps": {"1": {"plain": 2}}})  # another shape
    assert list(machine_figures(tmp_path)["steps"]) == ["1"]
    assert [path.name for path in tmp_path.iterdir()] == ["decode.json"]


def machine_figures(folder: Path) -> Any:
    return json.loads((folder / "decode.json").read_text())["figures"]
