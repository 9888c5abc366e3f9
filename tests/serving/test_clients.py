"""Clients that people use: what they send is answered, and lm-evaluation-harness gets the model's own figures."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import textgen
from tests.serving.servers import Running, running
from textgen.cli import main

INSTALL_SECONDS = 600

CLIENTS = Path(__file__).parents[1] / "clients"
RECORDED: list[dict[str, Any]] = json.loads((CLIENTS / "requests.json").read_text())
ANSWERS = {
    "/v1/completions": {"id", "object", "created", "model", "choices", "usage"},
    "/v1/models": {"object", "data"},
    "/tokenize": {"count", "max_model_len", "tokens", "token_strs"},
    "/detokenize": {"prompt"},
}


@pytest.fixture(scope="module")
def server(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tiny_run, tmp_path_factory.mktemp("serve") / "log") as server:
        yield server


def rows(name: str) -> list[dict[str, Any]]:
    """Return the documents of a task."""
    return [json.loads(line) for line in (CLIENTS / "tasks" / name).read_text().splitlines()]


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda entry: f"{entry['client']}: {entry['call']}")
def test_what_clients_send_is_answered(server: Running, recorded: dict[str, Any]) -> None:
    body = recorded["body"]
    status, _, raw = server.ask(recorded["method"], recorded["path"], body)
    assert status == 200, raw
    if body and body.get("stream"):
        assert raw.endswith(b"data: [DONE]\n\n")
        return
    answer = json.loads(raw)
    assert ANSWERS.get(recorded["path"], set()) <= answer.keys()
    if recorded["path"] == "/v1/completions":
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        assert len(answer["choices"]) == len(prompts) * body.get("n", 1)
        for choice in answer["choices"]:
            assert (choice["logprobs"] is None) == (body.get("logprobs") is None)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with openai and lm-eval: that of `TEXTGEN_CLIENTS`, or a new one."""
    if "TEXTGEN_CLIENTS" in os.environ:
        return Path(os.environ["TEXTGEN_CLIENTS"]) / "bin" / "python"
    folder = tmp_path_factory.mktemp("clients") / "venv"
    packages = ["openai", "lm-eval", "aiohttp", "requests", "tenacity"]
    environment = os.environ | {"PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "10"}
    script = [str(CLIENTS / "make_environment.sh"), str(folder), *packages]
    log = folder.with_name("log")
    with log.open("wb") as errors:
        made = subprocess.Popen(script, env=environment, stderr=errors, start_new_session=True)
    try:
        code = made.wait(INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(made.pid, signal.SIGKILL)  # pip has children
        code = made.wait()
    if code:
        pytest.skip(f"the clients cannot be installed within {INSTALL_SECONDS} seconds: {log.read_text()[-500:]}")
    return folder / "bin" / "python"


@pytest.mark.slow
def test_lm_eval_gets_the_models_own_figures(
    server: Running, tiny_run: Path, python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts as ids, prompts as texts, and texts without a tokenizer; OpenAI's client beside them."""
    calls = ["openai", *(f"lm-eval:{call}" for call in ("every task", "as texts", "no tokenizer"))]
    command = [str(python), str(CLIENTS / "calls.py"), server.url, *calls]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    results = {(line["client"], line["call"]): line["result"] for line in lines}  # an error has none
    assert len(results) == 9, ended.stderr

    capsys.readouterr()
    main(["evaluate", str(tiny_run), "--data", str(CLIENTS / "tasks" / "texts.jsonl"), "--json"])
    evaluated = json.loads(capsys.readouterr().out)["bits_per_byte"]
    model = textgen.load(tiny_run, decoder="int8")
    texts = [row["text"] for row in rows("texts.jsonl")]
    nats = math.fsum(model.score(text, end=False).nats for text in texts)
    without_ends = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    prompts = [row["prompt"] for row in rows("prompts.jsonl")]
    continued = model.generate(prompts, temperature=0.0, max_new_tokens=30, stop=["."])
    likelier = [likeliest(model, row) == row["answer"] for row in rows("choices.jsonl")]
    for call in ("every task", "as texts"):
        result = results["lm-eval", call]
        assert result["textgen_documents/bits_per_byte"] == pytest.approx(evaluated, abs=1e-3)
        assert result["textgen_texts/bits_per_byte"] == pytest.approx(without_ends, abs=1e-3)
        assert result["textgen_choices/acc"] == pytest.approx(sum(likelier) / len(likelier))
        assert result["texts"] == continued
    assert results["lm-eval", "no tokenizer"]["texts"] == continued
    assert results["openai", "complete"] == results["openai", "stream"]


def likeliest(model: textgen.LanguageModel, row: dict[str, Any]) -> int:
    """Return which choice the model gives the fewest nats."""
    nats = [model.score(row["question"] + choice, end=False).nats for choice in row["choices"]]
    return nats.index(min(nats))
