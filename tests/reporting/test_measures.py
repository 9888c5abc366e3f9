"""Measures of texts against values computed by hand, and `textgen measure` on a tiny run."""

from __future__ import annotations

import json
import math
import random
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from textgen.cli import main
from textgen.reporting.measures import copied_shares, distinct, diversity, repetition, self_bleu, words, zipf_slope

Capture = pytest.CaptureFixture[str]


def texts(*lines: str) -> list[list[str]]:
    return [line.split() for line in lines]


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_words_are_lower_case_and_marks_are_words() -> None:
    assert words('I don\'t.<br /><br />"Très BON!"') == ["i", "don't", ".", '"', "très", "bon", "!", '"']


@pytest.mark.parametrize(("n", "share"), [(1, 4 / 7), (2, 4 / 5), (3, 1.0), (4, 1.0), (5, math.nan)])
def test_distinct_counts_over_all_texts(n: int, share: float) -> None:
    """Of 7 words 4 are different, of 5 pairs 4: `a b` stands in both, and no pair spans them."""
    assert distinct(texts("a b c d", "a b b"), n) == pytest.approx(share, nan_ok=True)


def test_repetition_is_within_a_text() -> None:
    """The first has the pairs ab, ba, ab, ba: half of them repeated; the second none; the third has no pair."""
    assert repetition(texts("a b a b a", "a b c", "a"), 2) == pytest.approx(0.25)


SELF_BLEU = {
    "the same twice": (("a b c d", "a b c d"), 4, 1.0),
    "2 of 4 words, 1 of 3 pairs": (("a b c d", "a b x y"), 2, math.sqrt(1 / 2 * 1 / 3)),
    "as often as one other text has a word": (("a a a a", "a b c d", "a a e f"), 1, (2 / 4 + 1 / 4 + 2 / 4) / 3),
    "no match counts as a tenth": (("a b", "c d"), 1, 0.1 / 2),
    "the shorter one pays": (("a b c d", "a b c d e f"), 1, (math.exp(1 - 6 / 4) + 4 / 6) / 2),
    "the shorter of two equally near lengths counts": (
        ("a b c", "a b", "a b c d"), 1, (1 + math.exp(1 - 3 / 2) + 3 / 4) / 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SELF_BLEU)
def test_self_bleu_is_the_one_computed_by_hand(case: str) -> None:
    lines, n, value = SELF_BLEU[case]
    assert self_bleu(texts(*lines), n) == pytest.approx(value)


def test_zipf_slope_of_frequencies_that_fall_with_the_rank_is_one() -> None:
    text = [word for word, count in zip("abcde", (60, 30, 20, 15, 12), strict=True) for _ in range(count)]
    assert zipf_slope([text]) == pytest.approx(1)
    assert zipf_slope([text], most=2) == pytest.approx(1)
    assert zipf_slope([["a", "b", "b", "a"]]) == pytest.approx(0)


def test_copied_ngrams_are_those_within_a_training_document() -> None:
    """Of `a b c d e` the first 4-gram is in a document, the second only across two, or backwards."""
    sets = [texts("a b c d e"), texts("b c d e f", "a b c d"), texts("a b")]
    training = iter(texts("x a b c d", "e", "b c", "f e d c b a"))
    first, second, third = copied_shares(sets, training, sizes=(2, 4))
    assert first == {"copied_2": 3 / 4, "copied_4": 1 / 2}
    assert second == {"copied_2": 5 / 7, "copied_4": 1 / 3}
    assert third["copied_2"] == 1
    assert math.isnan(third["copied_4"])


def test_memory_does_not_grow_with_the_training_text() -> None:
    draw = random.Random(0)
    known = [f"word{i}" for i in range(500)]

    def document() -> list[str]:
        return [draw.choice(known) for _ in range(100)]

    def documents(count: int) -> Iterator[list[str]]:
        return (document() for _ in range(count))

    sets = [[document() for _ in range(20)]]
    copied_shares(sets, documents(1))
    peaks = []
    for count in (50, 1000):
        tracemalloc.start()
        copied_shares(sets, documents(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_human_reviews_have_the_known_values() -> None:
    """1,000 held-out IMDB reviews; known are values of other reviews, of a like way to count words."""
    from textgen.config import DataConfig
    from textgen.data.corpus import clean_corpus, open_corpus

    config = DataConfig(source="package")
    reviews = map(words, clean_corpus(open_corpus(config), config).documents("validation"))
    cut = [review[:128] for review in reviews if len(review) >= 128]
    figures = diversity([cut[i * len(cut) // 1000] for i in range(1000)])
    known = {"distinct_1": 0.093, "distinct_2": 0.511, "distinct_3": 0.848, "distinct_4": 0.960, "zipf_slope": 1.11}
    assert {name: figures[name] for name in known} == pytest.approx(known, rel=0.05)
    assert figures["repetition_4"] == pytest.approx(0.0034, abs=0.0005)


# --- the verb --------------------------------------------------------------------------------------------------------

FLAGS = ["--texts", "6", "--words", "12", "--max_new_tokens", "60", "--decoder", "plain"]


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def test_measures_are_left_beside_the_run_and_shown_in_its_report(run: Path, capsys: Capture) -> None:
    main(["measure", str(run), *FLAGS, "--temperatures", "1", "0.5", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert json.loads((run / "measures.json").read_text()) == record
    assert [one["temperature"] for one in record["generated"]] == [0.5, 1.0]
    for figures in (record["human"], *record["generated"]):
        assert {"length", "distinct_1", "distinct_4", "repetition_4", "self_bleu_4", "zipf_slope"} <= figures.keys()
        assert 0 <= figures["copied_12"] <= figures["copied_4"] <= 1
    # whole reviews of held-out documents, as the data has them
    assert 12 < record["human"]["length"] < 40
    page = (run / "report.html").read_text()
    assert "Measures of generated texts" in page
    assert format(record["generated"][1]["distinct_2"], ".4g") in page


def test_the_same_texts_are_measured_whatever_runs_beside_them(run: Path, capsys: Capture) -> None:
    told = []
    for batch_size in ("1", "64"):
        main(["measure", str(run), *FLAGS, "--temperatures", "0.8", "--batch_size", batch_size, "--json"])
        told.append(json.loads(capsys.readouterr().out) | {"seconds": None})
    assert told[0] == told[1]


def test_texts_that_stay_too_short_are_said_and_only_their_length_told(
    run: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    """At temperature 0 this model hardly writes a word."""
    main(["measure", str(run), *FLAGS, "--temperatures", "0", "1", "--json"])
    assert "temperature 0: 0 of 48 texts have 12 words: only the length is measured" in caplog.messages
    short, long = json.loads(capsys.readouterr().out)["generated"]
    assert short.pop("length") < 12
    assert short == {"temperature": 0, "drawn": 48}
    assert "distinct_1" in long


WRONG = {
    "too few human texts": (["--texts", "31", "--words", "4"], "has 30 texts of 4 words, `texts` wants 31: lower"),
    "too few words": (["--words", "3"], "`words` must be at least 4: 3"),
    "a temperature": (["--temperatures", "-1"], "`temperatures` must be finite and at least 0: -1"),
    "a split": (["--data", "nowhere.txt"], "nowhere.txt"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_ends_in_one_line_and_leaves_nothing(wrong: str, run: Path, capsys: Capture) -> None:
    flags, message = WRONG[wrong]
    with pytest.raises(SystemExit) as end:
        main(["measure", str(run), *flags])
    assert end.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    assert message in last
    assert not (run / "measures.json").exists()


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_run_without_a_checkpoint_is_refused(what: str, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    if what == "empty":
        run.mkdir()
    with pytest.raises(SystemExit) as end:
        main(["measure", str(run)])
    assert end.value.code == 2
    wanted = "does not exist" if what == "missing" else "is not a run folder with checkpoints"
    assert capsys.readouterr().err == f"error: `{run}` {wanted}\n"
