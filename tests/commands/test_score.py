"""`textgen score`: the figures are those of `evaluate` and of `lm.score`, whatever the form of the output."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

import textgen
from textgen.cli import main
from textgen.commands.score import _print_json
from textgen.decoding.scoring import TextScore

Capture = pytest.CaptureFixture[str]
TEXT = 'The plot was "Ça va" <b>🙂</b>\n\x01'


def score(capsys: Capture, *argv: str) -> str:
    capsys.readouterr()
    main(["score", *argv])
    return capsys.readouterr().out


def records(capsys: Capture, *argv: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in score(capsys, *argv, "--json").splitlines()]


@pytest.mark.parametrize("data", ["validation", "a file"])
def test_sums_over_documents_are_those_of_evaluate(
    data: str, tiny_run: Path, reviews_file: Path, capsys: Capture
) -> None:
    flags = [str(tiny_run), "--data", str(reviews_file) if data == "a file" else data, "--limit", "40"]
    found = records(capsys, *flags, "--batch_size", "7")
    main(["evaluate", *flags, "--json"])
    figures = json.loads(capsys.readouterr().out)
    nats, num_bytes = sum(text["nats"] for text in found), sum(text["num_bytes"] for text in found)
    assert (len(found), num_bytes) == (figures["documents"], figures["bytes"])
    assert sum(len(text["tokens"]) for text in found) == figures["tokens"]
    assert nats / math.log(2) / num_bytes == pytest.approx(figures["bits_per_byte"], rel=1e-5)


def test_documents_come_in_order_with_the_score_of_each_alone(
    tiny_run: Path, reviews_file: Path, capsys: Capture, tmp_path: Path
) -> None:
    texts = [json.loads(line)["text"] for line in reviews_file.read_text().splitlines()[:9]] + [TEXT]
    texts.insert(4, "Long. " * 400)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = records(capsys, str(tiny_run), "--data", str(path), "--batch_size", "3", "--alternatives", "2")
    assert [text["text"] for text in found] == texts
    lm = textgen.load(tiny_run)
    for text in found:
        alone = lm.score(text["text"], alternatives=2)
        tokens = text["tokens"]
        assert [token["id"] for token in tokens] == list(alone.ids)
        assert [token["logprob"] for token in tokens] == pytest.approx(alone.logprobs, abs=2e-5)
        assert [token["rank"] for token in tokens] == list(alone.ranks or ())
        assert text["bits_per_byte"] == pytest.approx(alone.bits_per_byte, rel=1e-5)


def test_ranks_and_alternatives_are_those_of_the_probabilities(tiny_run: Path, capsys: Capture) -> None:
    lm = textgen.load(tiny_run)
    vocab_size = lm._tokenizer.vocab_size
    (text,) = records(capsys, str(tiny_run), "--text", TEXT, "--alternatives", str(vocab_size + 5))
    for token in text["tokens"]:
        values = [value for _, value in token["alternatives"]]
        assert len(values) == vocab_size
        assert values == sorted(values, reverse=True)
        assert math.fsum(map(math.exp, values)) == pytest.approx(1, abs=1e-3)
        assert values[token["rank"] - 1] == token["logprob"]
        assert [token["token"], token["logprob"]] in token["alternatives"]
    (plain,) = records(capsys, str(tiny_run), "--text", TEXT, "--alternatives", "0")
    assert [token["rank"] for token in plain["tokens"]] == [token["rank"] for token in text["tokens"]]


def test_lines_and_csv_hold_the_figures_of_json(tiny_run: Path, capsys: Capture) -> None:
    flags = [str(tiny_run), "--text", TEXT, "--text", "See it."]
    texts = records(capsys, *flags)
    rows = list(csv.DictReader(io.StringIO(score(capsys, *flags, "--csv"), newline="")))
    wanted = [(number, token) for number, text in enumerate(texts, 1) for token in text["tokens"]]
    assert [int(row["text"]) for row in rows] == [number for number, _ in wanted]
    for row, (number, token) in zip(rows, wanted, strict=True):
        assert (row["token"], int(row["id"]), int(row["rank"])) == (token["token"], token["id"], token["rank"])
        assert float(row["logprob"]) == token["logprob"]
        assert json.loads(row["alternatives"]) == token["alternatives"]
        assert float(row["nats"]) == pytest.approx(texts[number - 1]["nats"], abs=1e-6)
    lines = score(capsys, *flags).splitlines()
    heads = [line for line in lines if "bits per byte" in line]
    nats, num_bytes = sum(text["nats"] for text in texts), sum(text["num_bytes"] for text in texts)
    assert [float(re.findall(r": ([\d.]+) bits", head)[0]) for head in heads] == pytest.approx(
        [*(text["bits_per_byte"] for text in texts), nats / math.log(2) / num_bytes], abs=6e-5
    )
    assert len(lines) == len(heads) + 2 + len(wanted)
    assert "\x01" not in "".join(lines)


def test_a_part_of_a_document_has_no_end(tiny_run: Path, capsys: Capture) -> None:
    (whole,), (part,) = (records(capsys, str(tiny_run), "--text", "The plot", *flags) for flags in ((), ("--no_end",)))
    assert whole["tokens"][:-1] == part["tokens"]
    assert whole["tokens"][-1]["token"] == ""


def test_a_label_is_scored_as_by_the_library(labelled_run: Path, capsys: Capture) -> None:
    lm = textgen.load(labelled_run)
    label = lm.labels[0]
    (text,) = records(capsys, str(labelled_run), "--text", TEXT, "--label", label)
    assert text["label"] == label
    assert text["nats"] == lm.score(TEXT, label=label).nats != lm.score(TEXT).nats


def test_standard_input_is_one_text(tiny_run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Ça va\nbien\r\n".encode())))
    assert [text["text"] for text in records(capsys, str(tiny_run))] == ["Ça va\nbien"]


def test_a_long_text_is_read_in_windows(
    tiny_run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No more logits are in memory at a time than those of a window, alone and in a batch."""
    from textgen.decoding import scoring
    from textgen.model.lstm import LSTMLanguageModel

    path = tmp_path / "long.txt"
    path.write_text("The plot was silly. " * 100 + "\n" + "See it twice. " * 60)
    sizes: list[int] = []
    forward = LSTMLanguageModel.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        sizes.append(result[0].numel())
        return result

    monkeypatch.setattr(LSTMLanguageModel, "forward", record)
    monkeypatch.setattr(scoring, "BATCH_LOGITS", 340 * 200)
    (alone,) = records(capsys, str(tiny_run), "--data", str(path))
    assert len(alone["tokens"]) > 2 * scoring.PREFILL_WINDOW
    assert max(sizes) == 340 * scoring.PREFILL_WINDOW
    sizes.clear()
    first, second = records(capsys, str(tiny_run), "--data", str(path), "--txt_documents", "line")
    assert max(sizes) <= 340 * 200 < 2 * max(sizes)
    assert len(first["tokens"]) + len(second["tokens"]) == pytest.approx(len(alone["tokens"]), abs=3)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--text", ""], "`--text` is empty"),
        (["--text", " \n"], "`--text` is only spaces"),
        (["--text", "a", "--data", "b.txt"], "`text` cannot be combined with `data`"),
        (["--text", "a", "--limit", "2"], "`limit` needs `data`"),
        (["--text", "a", "--encoding", "latin-1"], "`encoding` needs `data`"),
        (["--text", "a", "--json", "--csv"], "`json` cannot be combined with `csv`"),
        (["--text", "a", "--label", "good"], "label 'good': the model was trained without labels"),
        (["--text", "a", "--alternatives", "-1"], "`alternatives` must be at least 0: -1"),
        (["--data", "validation", "--limit", "0"], "`limit` must be at least 1: 0"),
        (["--data", "nothing.txt"], "`nothing.txt` does not exist"),
        (["--text", "a", "--heatmap", "none/x.html"], "`none/x.html` cannot be written: it is a folder, or its"),
        (["--text", "a", "--heatmap", "pipe"], "`pipe` is not a file"),
    ],
)
def test_wrong_flags_are_one_line(
    flags: list[str], line: str, tiny_run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")  # as a device, nothing that a file may replace
    with pytest.raises(SystemExit) as end:
        main(["score", str(tiny_run), *flags])
    assert Path("pipe").is_fifo()
    said = capsys.readouterr()
    assert (end.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err.startswith(f"error: {line}")


def test_a_probability_of_0_is_null_in_json(capsys: Capture) -> None:
    figures: dict[str, Any] = {
        "logprobs": (-math.inf,),
        "ranks": (2,),
        "alternatives": ((("b", -0.5), ("a", -math.inf)),),
    }
    score = TextScore(text="a", tokens=("a",), ids=(5,), num_bytes=1, **figures)
    list(_print_json(iter([score]), Namespace(label=None)))
    record = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (record["nats"], record["bits_per_byte"]) == (None, None)
    assert record["tokens"][0]["logprob"] is None
    assert record["tokens"][0]["alternatives"] == [["b", -0.5], ["a", None]]


def test_no_text_at_a_terminal_is_one_line(tiny_run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(SystemExit):
        main(["score", str(tiny_run)])
    assert capsys.readouterr().err.startswith("error: there is no text: give `--text` or `--data`")


def test_the_heatmap_holds_every_token_and_no_html_of_a_text(tiny_run: Path, capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "map.html"
    printed = score(capsys, str(tiny_run), "--text", TEXT, "--text", "See it.", "--heatmap", str(path))
    assert printed == score(capsys, str(tiny_run), "--text", TEXT, "--text", "See it.")
    page = path.read_text(encoding="utf-8")
    texts = records(capsys, str(tiny_run), "--text", TEXT, "--text", "See it.")
    tokens = [token for text in texts for token in text["tokens"]]
    titles = re.findall(r'<span class="h(\d)[^"]*" title="([\d.]+) bits, rank (\d+); likeliest: ', page)
    assert [float(bits) for _, bits, _ in titles] == pytest.approx(
        [-token["logprob"] / math.log(2) for token in tokens], abs=0.006
    )
    assert [int(rank) for _, _, rank in titles] == [token["rank"] for token in tokens]
    assert "<b>" not in page
    assert "<script" not in page
    assert [path.name for path in tmp_path.iterdir()] == ["map.html"]
