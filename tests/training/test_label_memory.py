"""A label of a text that is much longer than a window."""

from __future__ import annotations

import json
import random
from pathlib import Path

import textgen

ENDINGS = {"bad": "it was dull", "good": "it was fine"}


def test_a_label_is_learned_from_words_many_windows_later(tmp_path: Path) -> None:
    """A text tells its label at its end, after five windows: no gradient reaches the label from there."""
    draw = random.Random(0)
    rows = []
    for i in range(300):
        label = draw.choice(list(ENDINGS))
        words = " ".join(draw.choice(("we", "saw", "a", "film", "of", "the", "sea")) for _ in range(40))
        rows.append({"text": f"{words} {i} {ENDINGS[label]}", "label": label})
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = textgen.train(
        files=tmp_path / "texts.jsonl", run_dir=tmp_path / "run", tracking=False, sample_prompts=(), max_steps=150,
        batch_size=8, seq_len=8, learning_rate=0.01, mixed_precision="no",
        **{
            "data.label_column": "label", "data.cache_dir": str(tmp_path / "cache"), "tokenizer.vocab_size": 300,
            "model.embedding_dim": 32, "model.hidden_size": 64, "model.num_layers": 1,
        },
    )  # fmt: skip
    new = [f"{row['text'].rsplit(' ', 4)[0]} 300 {ENDINGS[row['label']]}" for row in rows[:40]]
    found = run.load().classify(new)
    right = sum(one.label == row["label"] for one, row in zip(found, rows, strict=False))
    assert right >= 36
