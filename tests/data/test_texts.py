"""Texts to score of a split: those of each of several sources, read from a store that is opened once."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from textgen.config import DataConfig, TokenizerConfig
from textgen.data import texts
from textgen.data.store import TokenStore, prepare_store
from textgen.data.texts import documents_to_score, texts_by_source
from textgen.settings import build_settings

GIVEN: dict[str, Any] = {"normalization": "none", "settings": DataConfig()}


@pytest.fixture
def of_sources(tmp_path: Path) -> dict[int, Path]:
    """Return checkpoints, as far as they name their data, of a training on one source and of one on two."""
    files = []
    for name in "ab":
        rows = "".join(json.dumps({"text": f"{name} number {i} has {i % 7} words"}) + "\n" for i in range(40))
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text(rows, encoding="utf-8")
    names = [{"name": path.stem, "weight": i + 1, "files": [str(path)]} for i, path in enumerate(files)]
    checkpoints = {}
    for count, source in ((1, {"source": "files", "files": [str(files[0])]}), (2, {"sources": names})):
        data = build_settings(DataConfig, {"cache_dir": str(tmp_path / "cache")} | source)
        tokenizer = TokenizerConfig(vocab_size=300, model_type="bpe")
        prepare_store(data, tokenizer, progress=False)
        checkpoints[count] = tmp_path / f"step-{count}"
        checkpoints[count].mkdir()
        record = json.dumps({"config": {"data": asdict(data), "tokenizer": asdict(tokenizer)}})
        (checkpoints[count] / "trainer.json").write_text(record, encoding="utf-8")
    return checkpoints


def test_a_limit_is_of_each_source_of_a_split(of_sources: dict[int, Path]) -> None:
    for count, checkpoint in of_sources.items():
        whole = list(documents_to_score(checkpoint, "train", limit=None, **GIVEN))
        limited = list(documents_to_score(checkpoint, "train", limit=3, **GIVEN))
        firsts = [[text for text in whole if text.startswith(name)][:3] for name in "ab"[:count]]
        assert limited == [text for its in firsts for text in its]
        assert len(limited) == 3 * count
        by_source, weights = texts_by_source(checkpoint, "train", limit=3, **GIVEN)
        assert list(by_source.values()) == firsts
        assert weights == ({"": 1.0} if count == 1 else {"a": 1, "b": 2})


def test_texts_by_source_open_the_store_once(of_sources: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[TokenStore] = []

    def spy(*given: Any) -> TokenStore:
        opened.append(prepare_store(*given))
        return opened[-1]

    monkeypatch.setattr(texts, "prepare_store", spy)
    for number, checkpoint in enumerate(of_sources.values(), start=1):
        texts_by_source(checkpoint, "validation", limit=None, **GIVEN)
        assert len(opened) == number
