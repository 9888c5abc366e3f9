"""A data set of the library `datasets` that is streamed into shards. The hub is not at hand: all are folders."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import textgen.data.sharding
from tests.data.test_corpus import run_open, write_cache
from tests.data.test_shards import kill_stopped, start
from tests.data.test_store import CHAR, make_texts
from textgen.config import DataConfig
from textgen.data.corpus import open_corpus
from textgen.data.store import TokenStore, prepare_store
from textgen.errors import BrokenSourceError

TEXTS = [*make_texts(300), "", *make_texts(100, seed=5)]
LABELS = [(0, 1, -1)[i % 3] for i in range(len(TEXTS))]
BOUNDS = (0, 150, 290, len(TEXTS))  # of the files


def write_parquet(folder: Path) -> Path:
    """Write the texts as the hub has them: several files in a folder, with names of the labels."""
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["low", "high"]), "id": Value("int64")})
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for number, (low, high) in enumerate(pairwise(BOUNDS)):
        columns = {"text": TEXTS[low:high], "label": LABELS[low:high], "id": list(range(low, high))}
        path = folder / "data" / f"train-{number:05}-of-00003.parquet"
        Dataset.from_dict(columns, features=features).to_parquet(path)
    return folder


def write_jsonl(folder: Path) -> Path:
    """Write the texts as files whose columns are not known before they are read."""
    folder.mkdir()
    for number, (low, high) in enumerate(pairwise(BOUNDS)):
        rows = [{"text": TEXTS[i], "label": ["low", "high", None][i % 3]} for i in range(low, high)]
        (folder / f"train-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    set_cache(tmp_path / "datasets", monkeypatch)
    return write_parquet(tmp_path / "set")


def set_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def prepare(dataset: Path, cache: Path, *, streaming: bool = True, **data: Any) -> TokenStore:
    settings = DataConfig(dataset=str(dataset), cache_dir=str(cache), shards=6, streaming=streaming, **data)
    return prepare_store(settings, CHAR, progress=False)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("write", [write_parquet, write_jsonl])
def test_a_streamed_dataset_makes_the_store_of_a_loaded_one_and_leaves_no_copy_of_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    folder, stores = write(tmp_path / "set"), {}
    for streaming in (True, False):
        set_cache(tmp_path / f"datasets {streaming}", monkeypatch)
        stores[streaming] = prepare(folder, tmp_path / str(streaming), streaming=streaming, label_column="label")
    streamed, loaded = stores[True], stores[False]
    sources = [store.record.pop("source") for store in (streamed, loaded)]
    assert sources == [f"dataset {folder} (folder): {what}" for what in ("train, streamed", f"{len(TEXTS)} train")]
    assert streamed.record == loaded.record
    assert streamed.labels == ("high", "low")
    for path in loaded.directory.iterdir():
        if path.name != "store.json":
            assert path.read_bytes() == (streamed.directory / path.name).read_bytes(), path.name
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert size_of(tmp_path / "datasets False") > num_bytes
    assert size_of(tmp_path / "datasets True") < num_bytes / 100
    assert size_of(tmp_path / "True") - size_of(streamed.directory) < num_bytes / 100


def test_what_a_killed_preparation_of_a_stream_has_done_stays_done(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_stopped(start(dataset, tmp_path / "cache", stop_at=20))
    done = {path.name for path in (tmp_path / "cache").glob("*.work/parts/block-???????")}
    assert len(done) == 18  # after the validation split; the last one was not finished
    written, write = [], textgen.data.sharding.write_split

    def watched(directory: Path, *args: Any, **kwargs: Any) -> dict[str, int]:
        written.append(directory.name.partition(".")[0])
        return write(directory, *args, **kwargs)

    monkeypatch.setattr(textgen.data.sharding, "write_split", watched)
    monkeypatch.setattr(textgen.data.sharding, "clean_corpus", None)  # it is not called again
    store = prepare(dataset, tmp_path / "cache")
    assert len(written) > 18
    assert not done.intersection(written)
    monkeypatch.undo()
    assert store.record == prepare(dataset, tmp_path / "other").record


def test_a_stream_that_breaks_off_ends_in_one_line_and_is_gone_on_with(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.dataset

    last, read = [], pyarrow.dataset.ParquetFileFormat.make_fragment

    def break_off(format: Any, file: Any) -> Any:
        if file.name.endswith("train-00002-of-00003.parquet") and last:
            raise ConnectionResetError("reset by\nthe hub")
        return read(format, file)

    class Breaking(pyarrow.dataset.ParquetFileFormat):
        make_fragment = break_off

    save = textgen.data.sharding.save_plan
    monkeypatch.setattr(pyarrow.dataset, "ParquetFileFormat", Breaking)
    monkeypatch.setattr(textgen.data.sharding, "save_plan", lambda *args: [save(*args), last.append(True)])
    with pytest.raises(BrokenSourceError) as refused:
        prepare(dataset, tmp_path / "cache")
    line = f"dataset `{dataset}` could not be read to its end: ConnectionResetError reset by the hub"
    assert str(refused.value) == line
    monkeypatch.undo()
    monkeypatch.setattr(textgen.data.sharding, "clean_corpus", None)  # what is kept is known
    store = prepare(dataset, tmp_path / "cache")
    monkeypatch.undo()
    assert store.record == prepare(dataset, tmp_path / "other").record


def test_a_streamed_dataset_is_known_by_its_files_and_the_names_of_its_labels(dataset: Path) -> None:
    def fingerprint() -> str:
        return open_corpus(DataConfig(dataset=str(dataset), streaming=True, shards=6)).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    write_parquet(dataset)
    second = fingerprint()
    assert second != first, "other times"
    path = next((dataset / "data").iterdir())
    before = path.stat()
    path.write_bytes(path.read_bytes()[:4] + path.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fingerprint() not in (first, second), "another size"
    write_parquet(dataset)
    third = fingerprint()
    (dataset / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: id\n    dtype: int64\n"
        "  - name: label\n    dtype:\n      class_label:\n        names:\n"
        "          '0': bad\n          '1': good\n---\n"
    )
    assert fingerprint() != third


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"streaming": True, "shards": 4}, "`streaming` needs `source` hub or a `dataset`: imdb"),
        ({"source": "files", "files": ("a",), "streaming": True, "shards": 4}, "`streaming` needs `source` hub or a"),
        ({"source": "hub", "streaming": True}, "`streaming` needs `shards`"),
    ],
)
def test_streaming_of_files_and_without_shards_is_refused(data: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        DataConfig(**data)


def test_a_stream_that_cannot_be_had_is_refused_in_one_line(dataset: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    settings = "streaming=True, shards=2"
    write_cache(tmp_path / "datasets" / "owner___name" / "default" / "0.0.0" / "0123abcd", {"train": TEXTS})
    output, _ = run_open(tmp_path, f"dataset='owner/name', {settings}", HF_HUB_OFFLINE="1")
    assert output == "refused: dataset `owner/name` is streamed from the hub, and HF_HUB_OFFLINE is set\n"
    output, _ = run_open(tmp_path, f"dataset={str(dataset)!r}, text_column='body', {settings}", HF_HUB_OFFLINE="1")
    assert output.endswith(f"dataset `{dataset}` has no column `body`; it has `text`, `label`, `id`\n")
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    output, _ = run_open(tmp_path, f"dataset={str(tmp_path / 'saved')!r}, {settings}", HF_HUB_OFFLINE="1")
    assert output.endswith("was saved by `save_to_disk`: it is read in place without `streaming`\n")
