"""The verb `classify` and `LanguageModel.classify`, on a tiny run that has learned two labels."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import textgen
from textgen.cli import main
from textgen.runs.checkpoint import find_checkpoint

GOOD, BAD = "good hero fine plot 1", "bad plot dull hero 2"

Classify = Callable[..., str]


@pytest.fixture
def classify(labelled_run: Path, capsys: pytest.CaptureFixture[str]) -> Classify:
    """Return a function that classifies with more flags and returns what went to standard output."""

    def call(*flags: str) -> str:
        main(["classify", str(labelled_run), *flags])
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="session")
def head(labelled_run: Path, labelled_reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("head") / "head"
    data = ["--train", str(labelled_reviews), "--label_column", "label", "--head", str(place)]
    main(["classify", str(labelled_run), *data])
    return place


def fails(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Return the one line of an error that ends the command with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["classify", *flags])
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# --- by bits ---------------------------------------------------------------------------------------------------------


def test_texts_are_classified_with_margin_and_probability(classify: Classify) -> None:
    lines = [line.split("\t") for line in classify("--text", GOOD, "--text", BAD).splitlines()]
    assert [line[0] for line in lines] == ["positive", "negative"]
    assert all(0.5 < float(line[1]) <= 1 and float(line[2].removesuffix(" bits")) > 0 for line in lines)
    assert [line[3] for line in lines] == [GOOD, BAD]


def test_bits_are_those_of_the_score_under_each_label(labelled_run: Path) -> None:
    lm = textgen.load(labelled_run)
    texts = [GOOD, BAD, "The plot", GOOD * 20]
    found = lm.classify(texts)
    for text, one in zip(texts, found, strict=True):
        for label in lm.labels:
            score = lm.score(text, label=label)
            assert one.bits[label] == pytest.approx(score.bits_per_byte * score.num_bytes, rel=1e-5)
    alone = lm.classify(GOOD)  # the other texts of a batch change a score by rounding only
    assert alone.bits == pytest.approx(found[0].bits, rel=1e-5)


def test_data_with_true_labels_gives_figures_and_a_row_for_each_text(
    classify: Classify, labelled_reviews: Path, tmp_path: Path
) -> None:
    data = ["--data", str(labelled_reviews), "--label_column", "label"]
    said = classify(*data, "--out", str(tmp_path / "rows.csv"))
    assert "accuracy " in said
    assert "true label, and the number of texts by found label:" in said
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    answer = json.loads(classify(*data, "--json"))
    assert len(rows) == len(answer["texts"]) == answer["figures"]["documents"] == 400
    right = sum(row["true"] == row["label"] for row in rows)
    assert answer["figures"]["accuracy"] == right / 400 > 0.95
    assert {"p(negative)", "p(positive)", "margin", "text", "probability"} < set(rows[0])
    classify(*data, "--limit", "3", "--out", str(tmp_path / "rows.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for line, text in zip(lines, answer["texts"], strict=False):
        assert line["bits"] == pytest.approx(text["bits"], rel=1e-5)
        assert (line["text"], line["true"], line["label"]) == (text["text"], text["true"], text["label"])


def test_texts_of_data_are_shown_as_they_were_given(
    labelled_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of lower-cased text reads them so."""
    place = tmp_path / "model"
    main(["publish", str(labelled_run), "--to", str(place)])
    config = json.loads((place / "config.json").read_text())
    config["text"]["normalization"] = "lowercase"
    (place / "config.json").write_text(json.dumps(config))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("Good HERO", "good hero")))
    capsys.readouterr()
    main(["classify", str(place), "--data", str(data), "--json"])
    upper, lower = json.loads(capsys.readouterr().out)["texts"]
    assert (upper["text"], lower["text"]) == ("Good HERO", "good hero")
    assert upper["bits"] == pytest.approx(lower["bits"], rel=1e-6)


def test_a_split_of_the_training_brings_its_labels(classify: Classify) -> None:
    assert json.loads(classify("--data", "validation", "--json"))["figures"]["documents"] == 40


def test_priors_shift_a_text_that_says_nothing(labelled_run: Path) -> None:
    lm = textgen.load(labelled_run)
    even, shifted = lm.classify("The plot"), lm.classify("The plot", priors={"negative": 999, "positive": 1})
    assert shifted.bits == even.bits
    assert shifted.probabilities["negative"] > even.probabilities["negative"]


def test_priors_of_the_training_are_its_shares(classify: Classify) -> None:
    priors = json.loads(classify("--text", GOOD, "--priors", "training", "--json"))["priors"]
    assert priors == pytest.approx({"negative": 0.5, "positive": 0.5}, abs=0.02)


def test_calibration_fits_the_temperature_that_it_names(
    classify: Classify, labelled_reviews: Path, tmp_path: Path
) -> None:
    """An eighth of the labels is turned round, so that a model that is sure is wrong."""
    rows = [json.loads(line) for line in labelled_reviews.read_text().splitlines()]
    for row in rows[::8]:
        row["label"] = "positive" if row["label"] == "negative" else "negative"
    (tmp_path / "turned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data", str(labelled_reviews), "--label_column", "label", "--json", "--limit", "100"]
    plain, fitted = (
        json.loads(classify(*data, *more)) for more in ([], ["--calibrate", str(tmp_path / "turned.jsonl")])
    )
    assert plain["temperature"] == 1 < fitted["temperature"]
    sure = [max(text["probabilities"].values()) for text in fitted["texts"]]
    assert sum(sure) / len(sure) == pytest.approx(0.87, abs=0.1)
    again = json.loads(classify(*data, "--temperature", repr(fitted["temperature"])))
    assert again["texts"][0] == fitted["texts"][0]


# --- by a head -------------------------------------------------------------------------------------------------------


def test_a_head_judges_in_place_of_the_bits(classify: Classify, head: Path, labelled_reviews: Path) -> None:
    answer = json.loads(
        classify("--data", str(labelled_reviews), "--label_column", "label", "--head", str(head), "--json")
    )
    assert answer["by"] == "head"
    assert answer["figures"]["accuracy"] > 0.95
    assert answer["temperature"] == json.loads((head / "head.json").read_text())["temperature"]
    assert sorted(path.name for path in head.iterdir()) == ["head.json", "head.safetensors"]


def test_a_head_needs_no_labels_of_the_model(tiny_run: Path, labelled_reviews: Path, tmp_path: Path) -> None:
    data = ["--train", str(labelled_reviews), "--label_column", "label", "--head", str(tmp_path / "head")]
    weights = find_checkpoint(tiny_run) / "model.safetensors"  # type: ignore[operator]
    before = weights.read_bytes()
    main(["classify", str(tiny_run), *data])
    assert weights.read_bytes() == before
    found = textgen.load(tiny_run).classify([GOOD, BAD], head=tmp_path / "head")
    assert [one.label for one in found] == ["positive", "negative"]


def test_a_head_takes_numbers_in_their_order_and_names_what_it_leaves_out(
    tiny_run: Path, labelled_reviews: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [json.loads(line) for line in labelled_reviews.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["label"] = None if number < 20 else {"negative": 2, "positive": 10}[row["label"]]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--train", str(data), "--label_column", "label", "--head", str(tmp_path / "head"), "--batch_size", "7"]
    main(["classify", str(tiny_run), *flags])
    assert "20 of 400 texts have no label of the model and are not used" in caplog.messages
    assert json.loads((tmp_path / "head" / "head.json").read_text())["labels"] == ["2", "10"]


def test_a_head_is_the_same_for_the_same_seed(
    labelled_run: Path, head: Path, labelled_reviews: Path, tmp_path: Path
) -> None:
    data = ["--train", str(labelled_reviews), "--label_column", "label"]
    threads = torch.get_num_threads()
    main(["classify", str(labelled_run), *data, "--head", str(tmp_path / "same")])
    assert torch.get_num_threads() == threads
    assert (tmp_path / "same" / "head.safetensors").read_bytes() == (head / "head.safetensors").read_bytes()
    main(["classify", str(labelled_run), *data, "--head", str(tmp_path / "other"), "--seed", "1"])
    assert (tmp_path / "other" / "head.safetensors").read_bytes() != (head / "head.safetensors").read_bytes()


def test_a_head_of_another_model_is_refused(tiny_run: Path, head: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, str(tiny_run), "--text", GOOD, "--head", str(head))
    assert said.startswith(f"error: `{head}` is the head of another model")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"format": "other"}, "`format` is not textgen.head.1"),
        ({"labels": ["one"]}, "`labels` must be at least two names"),
        ({"labels": ["a", "a"]}, "is not a head: `labels` holds a name twice"),
        ({"labels": ["a", "\x1b[2Jb"]}, r"is not a head: `labels` is ['a', '\x1b[2Jb'], wanted a list of names"),
        ({"labels": ["a", "b", "c"]}, "`6.bias` is F32 [2], wanted F32 [3]"),
        ({"temperature": -1.0}, "`temperature` must be a number above 0"),
        ({"origin": 1}, "is not a head"),
    ],
)
def test_a_damaged_head_is_refused_by_one_line(
    labelled_run: Path, head: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, wanted: str
) -> None:
    for name in ("head.json", "head.safetensors"):
        (tmp_path / name).write_bytes((head / name).read_bytes())
    record = json.loads((head / "head.json").read_text())
    (tmp_path / "head.json").write_text(json.dumps(record | change))
    assert wanted in fails(capsys, str(labelled_run), "--text", GOOD, "--head", str(tmp_path))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ([], "give texts by `text` or `data`, or a head's by `train`"),
        (["--text", "a", "--data", "b"], "`text` and `data` are both given: choose one"),
        (["--text", " "], "`text` must hold more than spaces"),
        (["--train", "train"], "`train` needs `head`, the folder that the head is written to"),
        (["--data", "validation", "--calibrate", "validation"], "`calibrate` and `data` are the same texts"),
        (["--text", "a", "--out", "rows.txt"], "`out` must end in .csv or .jsonl: rows.txt"),
        (["--text", "a", "--batch_size", "0"], "`batch_size` must be at least 1: 0"),
        (["--text", "a", "--temperature", "0"], "`temperature` must be above 0: 0.0"),
        (["--text", "a", "--head", "nowhere"], "`nowhere/head.json` cannot be read: No such file or directory"),
        (["--text", "a", "--limit", "3"], "`limit` has no effect without `data`"),
        (["--text", "a", "--seed", "3"], "`seed` has no effect without `train`"),
        *(
            (["--train", "train", "--head", "head", *flags], f"`{flags[0][2:]}` has no effect with `train` alone")
            for flags in (
                ["--limit", "3"],
                ["--priors", "training"],
                ["--temperature", "2"],
                ["--calibrate", "validation"],
                ["--json"],
                ["--out", "rows.csv"],
            )
        ),
        (["--text", "a", "--txt_documents", "line"], "`txt_documents` line is for files, and no file is given"),
    ],
)
def test_wrong_flags_are_one_line(
    labelled_run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], wanted: str
) -> None:
    assert fails(capsys, str(labelled_run), *flags).startswith(f"error: {wanted}")


def test_a_model_without_labels_is_refused(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "was trained without labels: train a head" in fails(capsys, str(tiny_run), "--text", GOOD)


def test_data_with_other_labels_is_refused_and_some_are_left_out(
    labelled_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": GOOD, "label": "mixed"}, {"text": BAD, "label": None}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", str(data), "--label_column", "label"]
    said = fails(capsys, str(labelled_run), *flags)
    assert said == "error: no text has a label of `negative`, `positive`: the labels are `mixed`"
    data.write_text(data.read_text() + json.dumps({"text": GOOD, "label": "positive"}) + "\n")
    main(["classify", str(labelled_run), *flags, "--json"])
    assert "2 of 3 texts have no label of the model, and no figure counts them" in caplog.messages
    assert json.loads(capsys.readouterr().out)["figures"]["documents"] == 1


def test_api_refuses_by_one_line(labelled_run: Path, tiny_run: Path) -> None:
    lm = textgen.load(labelled_run)
    assert lm.labels == ("negative", "positive")
    assert textgen.load(tiny_run).labels == ()
    refused: list[tuple[Any, dict[str, Any], str]] = [
        ("", {}, "`text` is empty"),
        (3, {}, "`text` must be a text or a list of texts: 3"),
        (["a", 3], {}, "`text` must be a text: 3"),
        ("a", {"priors": {"positive": 1}}, "`priors` are for `positive`; the labels are `negative`, `positive`"),
        ("a", {"priors": {"positive": 0, "negative": 0}}, "`priors` must be at least 0, and one above"),
        ("a", {"temperature": float("nan")}, "`temperature` must be above 0: nan"),
    ]
    for text, settings, wanted in refused:
        with pytest.raises(textgen.TextgenError) as error:
            lm.classify(text, **settings)
        assert str(error.value).startswith(wanted)
