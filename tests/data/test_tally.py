"""What reading leaves out and cuts is in the log once, and in the counts, however often a source is read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from textgen.config import DataConfig
from textgen.data.corpus import clean_corpus, open_corpus
from textgen.errors import TextgenError


def messages_of_two_passes(config: DataConfig, caplog: pytest.LogCaptureFixture) -> tuple[list[str], Any]:
    """Return the warnings of a first pass and of those that use the documents, and the corpus."""
    with caplog.at_level(logging.WARNING, "textgen"):
        clean = clean_corpus(open_corpus(config), config)
        for _ in range(2):
            assert len(list(clean.documents("train"))) == clean.counts["train_documents"]
    return [record.message for record in caplog.records], clean


def test_skipped_rows_are_named_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [json.dumps({"text": f"text {i}"}) for i in range(400)]
    for place in (5, 50, 100, 200):
        rows[place] = "{broken"
    rows[300] = '{"text": null}'
    path = tmp_path / "corpus" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(rows))
    config = DataConfig(source="files", files=(str(path),), on_error="skip")
    messages, clean = messages_of_two_passes(config, caplog)
    assert [message.split(" is not")[0] for message in messages[:3]] == [
        f"skipped: `{path}` line {line}" for line in (6, 51, 101)
    ]
    assert messages[3:] == [
        f"`{path}`: dropped 1 of 400 rows, as `text` is null",
        f"`{path}`: skipped 4 of 400 documents, which cannot be read",
    ]
    assert (clean.counts["dropped_unreadable"], clean.counts["dropped_empty"]) == (4, 1)
    assert clean.counts["train_documents"] + clean.counts["validation_documents"] == 395


def test_cut_documents_are_in_the_log_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"word{i} " for i in range(2000)))
    config = DataConfig(source="files", files=(str(path),), max_document_bytes=1024)
    messages, clean = messages_of_two_passes(config, caplog)
    parts = clean.counts["train_documents"] + clean.counts["validation_documents"]
    assert messages == [
        f"`{path}`: cut 1 of its documents, of more than 1,024 bytes, at white space into {parts} of at most 1,024; "
        "see `--data.max_document_bytes`"
    ]
    assert "dropped_unreadable" not in clean.counts


def test_a_dataset_drops_null_and_refuses_a_column_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts: list[str | None] = [f"text {i}" for i in range(400)]
    texts[7] = None
    folder = tmp_path / "dataset"
    folder.mkdir()
    config = DataConfig(source="hub", dataset=str(folder), cache_dir=str(tmp_path))
    pq.write_table(pa.table({"text": texts}), folder / "train.parquet")
    messages, clean = messages_of_two_passes(config, caplog)
    assert messages == [f"dataset `{folder}`: dropped 1 of 400 rows, as `text` is null"]
    assert clean.counts["dropped_empty"] == 1
    pq.write_table(pa.table({"text": [*texts[:100], *([None] * 300)]}), folder / "train.parquet")
    with pytest.raises(TextgenError, match="`text` is null in 301 of 400 rows"):
        clean_corpus(open_corpus(config), config)
