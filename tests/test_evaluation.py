"""Scores: sums over whole documents, whatever the batch, the order and the number of processes; true code lengths."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from numpy.typing import NDArray

from textgen import evaluation
from textgen.cli import main
from textgen.config import ModelConfig
from textgen.data.store import encode_documents
from textgen.decoding.samples import begin_id
from textgen.evaluation import SCORE_WINDOW, Score, score
from textgen.model.files import save_model
from textgen.model.lstm import LSTMLanguageModel, State
from textgen.tokenizer import Tokenizer, train_tokenizer

Tokens = NDArray[np.int64]

FILMS = ["The Third Man", "Amélie", "Plan 9 from Outer Space", "Ran", "M"]
VERDICTS = ["a masterpiece", "dull from start to end", "worth seeing twice", "the worst film I've seen", "10/10!!"]
REASONS = ["the acting", "its script", "the music", "a slow second half", "the camera work", "nothing at all"]
REVIEWS = [  # nobody's own, but with what real ones have: paragraph marks, quotes, accents, an emoji, a line break
    '"The Third Man" is a masterpiece.<br /><br />Worth seeing twice because of the music, and of the ending!',
    "Amélie?? I fell asleep; my wife didn't. 4/10 🙂",
    "M\nnothing at all happens, and yet the acting...",
    "ok",
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Three hundred reviews in front of which no model is at a loss."""
    draw = random.Random(1)
    return [
        " ".join(
            f"{draw.choice(FILMS)} is {draw.choice(VERDICTS)} because of {draw.choice(REASONS)}."
            for _ in range(draw.randint(1, 5))
        )
        + draw.choice(["", "<br /><br />I saw it in 1997."])
        for _ in range(300)
    ]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> Tokenizer:
    return Tokenizer(train_tokenizer(texts, vocab_size=320))


@pytest.fixture(scope="session")
def model(texts: list[str], tokenizer: Tokenizer) -> LSTMLanguageModel:
    """A tiny model after 60 steps: its probabilities are far from equal, and its state matters."""
    torch.manual_seed(0)
    stream = torch.from_numpy(np.concatenate(encode_documents(tokenizer, texts)))
    lanes = stream[: len(stream) // 16 * 16].view(16, -1)
    model = LSTMLanguageModel(
        ModelConfig(embedding_dim=24, hidden_size=32, num_layers=2, layer_norm=True, residual=True),
        tokenizer.vocab_size,
        labels=("bad", "good"),
        unigram_counts=torch.bincount(stream, minlength=tokenizer.vocab_size),
        text={"tokenizer_sha256": tokenizer.sha256, "normalization": "none"},
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(60):
        window = lanes[:, step * 16 :][:, :33]
        nats, _ = model(window[:, :-1], model.zero_state(16), window[:, 1:])
        optimizer.zero_grad()
        (nats / window[:, 1:].numel()).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def checkpoint(model: LSTMLanguageModel, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    save_model(model, directory)
    tokenizer.save(directory / "tokenizer.model")
    return directory


@pytest.fixture
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no other test's device or precision reach this one: accelerate keeps them for the life of a process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def accelerator(fresh_state: None) -> Accelerator:
    return Accelerator(cpu=True, mixed_precision="no")


@pytest.fixture(scope="session")
def documents(tokenizer: Tokenizer) -> list[Tokens]:
    """Documents of very different lengths, two of them empty, each with its end."""
    lengths = [0, 1, 700, 3, SCORE_WINDOW - 1, 0, SCORE_WINDOW, 2 * SCORE_WINDOW + 5, 17, 40, 80, 5, SCORE_WINDOW - 2]
    draw = np.random.default_rng(2)
    return [np.append(draw.integers(2, tokenizer.vocab_size, length), tokenizer.eos_id) for length in lengths]


@pytest.fixture
def score_of(
    accelerator: Accelerator, model: LSTMLanguageModel, tokenizer: Tokenizer
) -> Callable[[Sequence[Tokens], int], Score]:
    return lambda documents, batch_size: score(
        accelerator, model, documents, 1000, bos_id=tokenizer.bos_id, batch_size=batch_size
    )


def nats_alone(model: LSTMLanguageModel, document: Tokens, bos_id: int) -> float:
    """Return the plain cross-entropy of one document, from a zero state, all its logits at once."""
    inputs = torch.tensor([[bos_id, *document[:-1].tolist()]])
    with torch.no_grad():
        logits, _ = model(inputs, model.zero_state(1))
    return float(torch.nn.functional.cross_entropy(logits[0].double(), torch.from_numpy(document), reduction="sum"))


# Sums


def test_each_document_may_begin_with_its_own_label(
    accelerator: Accelerator, model: LSTMLanguageModel, tokenizer: Tokenizer, documents: list[Tokens]
) -> None:
    first = [[tokenizer.bos_id, model.label_id("bad"), model.label_id("good")][i % 3] for i in range(len(documents))]
    result = score(accelerator, model, documents, 1000, bos_id=first, batch_size=4)
    wanted = [nats_alone(model, document, begin) for document, begin in zip(documents, first, strict=True)]
    assert result.nats == pytest.approx(sum(wanted), rel=1e-6)
    others = score(accelerator, model, documents, 1000, bos_id=first[1:] + first[:1], batch_size=4)
    assert others.nats != pytest.approx(result.nats, rel=1e-6)


def test_score_is_the_sum_over_documents_that_are_each_read_alone(
    score_of: Callable[..., Score], documents: list[Tokens], model: LSTMLanguageModel, tokenizer: Tokenizer
) -> None:
    result = score_of(documents, 64)
    assert result.nats == pytest.approx(sum(nats_alone(model, d, tokenizer.bos_id) for d in documents), rel=1e-4)
    assert (result.documents, result.tokens, result.bytes) == (13, sum(map(len, documents)), 1000)


@pytest.mark.parametrize("index", range(13))
def test_a_single_document_of_any_length_costs_what_it_costs_alone(
    score_of: Callable[..., Score], documents: list[Tokens], model: LSTMLanguageModel, tokenizer: Tokenizer, index: int
) -> None:
    alone = nats_alone(model, documents[index], tokenizer.bos_id)
    assert score_of([documents[index]], 64).nats == pytest.approx(alone, rel=1e-4)


def test_score_does_not_depend_on_batch_size_or_order(score_of: Callable[..., Score], documents: list[Tokens]) -> None:
    expected = score_of(documents, 1).bits_per_byte
    for batch_size in (3, 64):
        assert score_of(documents, batch_size).bits_per_byte == pytest.approx(expected, rel=1e-4)
    shuffled = random.Random(3).sample(documents, len(documents))
    for order in (documents[::-1], shuffled):
        assert score_of(order, 3).bits_per_byte == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("window", [1, 7, 255, 257, 100_000])
def test_score_does_not_depend_on_where_its_windows_end(
    score_of: Callable[..., Score], documents: list[Tokens], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = score_of(documents, 3).bits_per_byte
    monkeypatch.setattr(evaluation, "SCORE_WINDOW", window)
    assert score_of(documents, 3).bits_per_byte == pytest.approx(expected, rel=1e-4)


def test_score_leaves_a_model_in_training_as_it_was(
    score_of: Callable[..., Score], documents: list[Tokens], model: LSTMLanguageModel
) -> None:
    expected = score_of(documents[:3], 2).nats
    model.train()
    try:
        assert score_of(documents[:3], 2).nats == expected
        assert model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
    finally:
        model.eval()


def test_figures_are_made_of_the_sums() -> None:
    result = Score(nats=math.log(2) * 1200, tokens=400, bytes=600, documents=3, seconds=1.0)
    assert result.bits_per_byte == pytest.approx(2)
    assert result.perplexity == pytest.approx(2**3) == pytest.approx(math.exp(result.nats_per_token))
    assert result.word_perplexity(100) == pytest.approx(2**12)


# A code length


FREQUENCY_BITS, STATE_BITS = 40, 64
TOTAL, WHOLE = 1 << FREQUENCY_BITS, 1 << STATE_BITS
HALF, QUARTER = WHOLE // 2, WHOLE // 4


class Frequencies:
    """A model's next-token probabilities as integers that sum to TOTAL, after each token that it is shown."""

    def __init__(self, model: LSTMLanguageModel, bos_id: int) -> None:
        self.model = model
        self.state: State = model.zero_state(1)
        self.show(bos_id)

    @torch.no_grad()
    def show(self, token: int) -> None:
        logits, self.state = self.model(torch.tensor([[token]]), self.state)
        probabilities = logits[0, 0].double().softmax(0).numpy()
        counts = 1 + (probabilities * (TOTAL - len(probabilities))).astype(np.int64)  # none may be zero
        counts[counts.argmax()] += TOTAL - counts.sum()
        self.edges = [0, *np.cumsum(counts).tolist()]  # (vocab_size + 1,)


def encode(tokens: Sequence[int], frequencies: Frequencies) -> list[int]:
    """Return the bits of an exact arithmetic code (Witten, Neal and Cleary 1987) that ends with its last token."""
    low, high, pending = 0, WHOLE, 0
    bits: list[int] = []
    for token in tokens:
        width = high - low
        low, high = (low + width * edge // TOTAL for edge in frequencies.edges[token : token + 2])
        while True:
            if high <= HALF or low >= HALF:
                bit = int(low >= HALF)
                bits += [bit, *[1 - bit] * pending]
                pending, shift = 0, bit * HALF
            elif low >= QUARTER and high <= 3 * QUARTER:
                pending, shift = pending + 1, QUARTER
            else:
                break
            low, high = 2 * (low - shift), 2 * (high - shift)
        frequencies.show(token)
    return [*bits, 1, *[0] * pending]  # one half: it lies between `low` and `high`


def decode(bits: Sequence[int], frequencies: Frequencies, end: int) -> list[int]:
    """Return the tokens of a code; zeros follow its last bit."""
    source = iter([*bits, *[0] * STATE_BITS])
    low, high = 0, WHOLE
    value = int("".join(str(next(source)) for _ in range(STATE_BITS)), 2)
    tokens: list[int] = []
    while not tokens or tokens[-1] != end:
        width = high - low
        place = ((value - low + 1) * TOTAL - 1) // width
        token = int(np.searchsorted(frequencies.edges, place, side="right")) - 1
        low, high = (low + width * edge // TOTAL for edge in frequencies.edges[token : token + 2])
        while high <= HALF or low >= HALF or (low >= QUARTER and high <= 3 * QUARTER):
            shift = HALF if low >= HALF else 0 if high <= HALF else QUARTER
            low, high, value = 2 * (low - shift), 2 * (high - shift), 2 * (value - shift) + next(source, 0)
        frequencies.show(token)
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("label", [None, "bad", "good"])
def test_score_is_the_length_of_a_code_that_decodes_to_the_text(
    accelerator: Accelerator, model: LSTMLanguageModel, tokenizer: Tokenizer, label: str | None
) -> None:
    """What an arithmetic coder writes is within 2 bits of the score, for each document.

    It ends each document with one bit of its own and writes whole bits: between -1 and +1 of the code length under its
    frequencies. Those are at least p (1 - 320 / 2**40), so cost less than 1e-9 bits a token more than p, and at most
    p + 2**-40, so save less than 0.01 bits where p is above 1e-10 (the model is sure of itself on text unlike its own:
    with 24 bits its least likely tokens came 25 bits cheaper than they are). The rest is fp32 rounding of the score.
    """
    begin = begin_id(model, tokenizer, label)
    for text in [*REVIEWS, ""] if label is None else REVIEWS[:2]:
        (document,) = encode_documents(tokenizer, [text]) if text else (np.array([tokenizer.eos_id]),)
        result = score(accelerator, model, [document], len(text.encode()), bos_id=begin)
        bits = encode(document.tolist(), Frequencies(model, begin))
        tokens = decode(bits, Frequencies(model, begin), tokenizer.eos_id)
        assert tokenizer.decode(tokens) == text
        assert abs(len(bits) - result.nats / math.log(2)) < 2, text
        if text:
            assert result.bits_per_byte * len(text.encode()) == pytest.approx(result.nats / math.log(2))


# The command


RECORD_RANK = "import os, pathlib; pathlib.Path(os.environ['RANKS'], os.environ.get('RANK', 'alone')).touch()\n"


def run_evaluate(launcher: Sequence[str], arguments: Sequence[str], folder: Path) -> tuple[str, set[str]]:
    """Run `textgen evaluate` in processes of its own; return its standard output and the ranks that took part."""
    (folder / "startup").mkdir()
    (folder / "startup" / "sitecustomize.py").write_text(RECORD_RANK)  # run by each Python as it starts
    (folder / "ranks").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "HF_"))}
    extra = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(folder / "startup"),
        "RANKS": str(folder / "ranks"),
    }
    command = [sys.executable, "-m", *launcher, "textgen", "evaluate", *arguments]
    result = subprocess.run(command, env=kept | extra, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout, {path.name for path in (folder / "ranks").iterdir()}


def test_two_processes_equal_one(checkpoint: Path, texts: list[str], tmp_path: Path) -> None:
    data = tmp_path / "reviews.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*REVIEWS, *texts[:51], " ".join(texts)]))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port), "--module"]
    arguments = [str(checkpoint), "--data", str(data), "--json", "--batch_size", "8"]
    outputs = {}
    for name, launcher, ranks in (("one", [], {"alone"}), ("two", launch, {"alone", "0", "1"})):
        (tmp_path / name).mkdir()
        outputs[name], seen = run_evaluate(launcher, arguments, tmp_path / name)
        assert seen == ranks  # the launcher itself is alone
    one, two = (json.loads(output) for output in outputs.values())  # nothing but JSON
    assert one.pop("label") == two.pop("label") == "none"
    assert one.pop("seconds") > 0
    assert two.pop("seconds") > 0
    assert one["documents"] == 56
    assert two == pytest.approx(one, rel=1e-4)


def evaluate(*arguments: object, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run the verb in this process and return the figures it prints."""
    main(["evaluate", *map(str, arguments), "--json"])
    figures: dict[str, Any] = json.loads(capsys.readouterr().out)
    return figures


@pytest.fixture
def parquet(texts: list[str], tmp_path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "reviews.parquet"
    pq.write_table(pa.table({"id": list(range(20)), "review": ["  ", *texts[:19]]}), path)
    return path


@pytest.mark.usefixtures("fresh_state")
def test_limit_scores_the_first_documents_of_the_column_that_is_asked_for(
    checkpoint: Path, parquet: Path, texts: list[str], capsys: pytest.CaptureFixture[str], score_of: Any,
    tokenizer: Tokenizer,
) -> None:  # fmt: skip
    figures = evaluate(checkpoint, "--data", parquet, "--text_column", "review", "--limit", 7, capsys=capsys)
    expected = score_of(encode_documents(tokenizer, texts[:7]), 64)
    assert figures["documents"] == 7
    assert figures["bytes"] == sum(len(text.encode()) for text in texts[:7])
    assert figures["tokens"] == expected.tokens
    assert figures["bits_per_byte"] == pytest.approx(expected.nats / math.log(2) / figures["bytes"], rel=1e-4)
    nats = figures["nats_per_token"] * figures["tokens"]
    assert figures["perplexity"] == pytest.approx(math.exp(figures["nats_per_token"]))
    assert figures["word_perplexity"] == pytest.approx(math.exp(nats / sum(len(text.split()) for text in texts[:7])))
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / figures["bytes"])


@pytest.mark.usefixtures("fresh_state")
def test_a_missing_column_is_one_line_and_exit_code_2(
    checkpoint: Path, parquet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", str(checkpoint), "--data", str(parquet), "--json"])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: `{parquet}` has no column `text`; it has `id`, `review`\n"


@pytest.mark.usefixtures("fresh_state")
def test_evaluate_scores_without_labels_or_with_the_true_ones_and_says_which(
    checkpoint: Path, model: LSTMLanguageModel, tokenizer: Tokenizer, texts: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path, labels = tmp_path / "a.jsonl", ["good", "bad", None, "unknown"]
    rows = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=False)]
    path.write_text("\n".join(rows))
    flags = [checkpoint, "--data", path, "--label_column", "label"]
    for chosen, known in (("none", [None] * 4), ("true", ["good", "bad", None, None])):
        figures = evaluate(*flags, "--label", chosen, capsys=capsys)
        begins = [begin_id(model, tokenizer, label) for label in known]
        wanted = [nats_alone(model, *its) for its in zip(encode_documents(tokenizer, texts[:4]), begins, strict=True)]
        assert figures["nats_per_token"] * figures["tokens"] == pytest.approx(sum(wanted), rel=1e-5)
        assert figures["label"] == chosen
    with caplog.at_level(logging.INFO, logger="textgen"):
        main(["evaluate", *map(str, flags), "--label", "true"])
    assert capsys.readouterr().out.startswith("label            true\nbits_per_byte ")
    assert caplog.messages[-1] == "2 of 4 documents have no label of the model, and are scored without one"
    with pytest.raises(SystemExit):
        main(["evaluate", str(checkpoint), "--data", str(path), "--label", "true"])
    assert "no document of `" in (refused := capsys.readouterr().err)
    assert refused.endswith("has a label of the model: `--label_column` names the column of the label\n")


@pytest.mark.usefixtures("fresh_state")
def test_a_lowercase_model_scores_lowercase_text(
    model: LSTMLanguageModel, tokenizer: Tokenizer, texts: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = {**model.text, "normalization": "lowercase"}
    lower = LSTMLanguageModel(model.config, model.vocab_size, labels=model.labels, text=text)
    lower.load_state_dict(model.state_dict())
    save_model(lower, tmp_path / "lower")
    tokenizer.save(tmp_path / "lower" / "tokenizer.model")
    figures = []
    for name, text in (("upper", texts[0].upper()), ("lower", texts[0].lower())):
        (tmp_path / f"{name}.txt").write_text(text)
        figures.append(evaluate(tmp_path / "lower", "--data", tmp_path / f"{name}.txt", capsys=capsys)["bits_per_byte"])
    assert figures[0] == figures[1]


@pytest.mark.usefixtures("fresh_state")
def test_a_long_text_without_spaces_is_scored_too(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One word of 1,500 bytes: its perplexity is more than a float can hold."""
    (tmp_path / "a.txt").write_text("木" * 500)
    figures = evaluate(checkpoint, "--data", tmp_path / "a.txt", capsys=capsys)
    assert (figures["documents"], figures["bytes"]) == (1, 1500)
    assert figures["bits_per_byte"] > 0
