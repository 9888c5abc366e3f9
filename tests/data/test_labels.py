"""Labels of documents: read from every source, kept beside the tokens, the input before a document's first token."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.files import write_parquet
from textgen.config import DataConfig, TokenizerConfig
from textgen.data.corpus import CleanCorpus, clean_corpus, fingerprint, open_corpus
from textgen.data.documents import read_documents
from textgen.data.labels import MAX_LABELS, label_of, take_label
from textgen.data.lanes import Epoch, LaneSampler, build_loader
from textgen.data.memory import corpus_of_dataset, corpus_of_texts
from textgen.data.split import Split
from textgen.data.store import TokenStore, prepare_store
from textgen.data.tally import RowError
from textgen.data.texts import read_split
from textgen.errors import TextgenError
from textgen.noise import permutation, uniform

Rows = list[tuple[str, Any]]

ROWS: Rows = [("so good", "pos"), ("so bad", "neg"), ("who knows", None), ("bad again", "neg")]


def write_rows(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path


def write_saved_dataset(folder: Path, rows: Rows) -> Path:
    import datasets

    names = sorted({str(label) for _, label in rows if label is not None})
    columns = {"text": [text for text, _ in rows], "label": [-1 if x is None else names.index(x) for _, x in rows]}
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))
    return folder


def write_csv(path: Path, rows: Rows) -> Path:
    separator = "\t" if path.suffix == ".tsv" else ","
    lines = [f"{text}{separator}{label or ''}\n" for text, label in rows]
    path.write_text(f"text{separator}label\n" + "".join(lines))
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "jsonl": lambda folder: write_rows(folder / "a.jsonl", ROWS),
    "json": lambda folder: write_array(folder / "a.json"),
    "csv": lambda folder: write_csv(folder / "a.csv", ROWS),
    "tsv": lambda folder: write_csv(folder / "a.tsv", ROWS),
    "parquet": lambda folder: write_parquet(
        folder / "a.parquet", {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}
    ),
    "arrow": lambda folder: write_saved_dataset(folder / "saved", ROWS),
}


def write_array(path: Path) -> Path:
    path.write_text(json.dumps([{"text": text, "label": label} for text, label in ROWS], indent=1))
    return path


def labels_of(path: Path, **settings: Any) -> Rows:
    """Return the texts of a file or folder, and their labels."""
    settings = {"label_column": "label"} | settings
    return [(str(text), label_of(text)) for text in read_documents([str(path)], DataConfig(**settings))]


def clean(path: Path, **settings: Any) -> CleanCorpus:
    config = DataConfig(source="files", files=(str(path),), **{"label_column": "label"} | settings)
    return clean_corpus(open_corpus(config), config)


def named(corpus: CleanCorpus, split: str) -> Rows:
    """Return texts and labels of a split."""
    names = (*corpus.label_names, None)  # -1 is the last
    return [(text, names[i]) for text, i in zip(corpus.documents(split), corpus.labels[split], strict=True)]


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_reads_the_label_of_a_text(form: str, folder: Path) -> None:
    assert labels_of(WRITERS[form](folder)) == ROWS


@pytest.mark.parametrize("form", [form for form in WRITERS if form != "tsv"])
def test_a_missing_column_of_labels_is_one_line_that_names_it(form: str, folder: Path) -> None:
    with pytest.raises(TextgenError) as refused:
        labels_of(WRITERS[form](folder), label_column="stars")
    assert "has no column `stars`; it has `text`, `label`" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_label_of_a_folder_is_the_name_of_its_folder_unless_that_names_a_split(folder: Path) -> None:
    for name in ("train/pos", "train/neg", "train/unsup", "test/pos"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.txt").write_text(f"text of {name}")
    assert dict(labels_of(folder, label_column=None, label_folders=True)) == {
        "text of train/pos": "pos", "text of train/neg": "neg", "text of train/unsup": None, "text of test/pos": "pos",
    }  # fmt: skip


def test_a_txt_file_has_no_column_of_labels(folder: Path) -> None:
    (folder / "a.txt").write_text("a text")
    with pytest.raises(TextgenError, match=r"without columns.*label_column` is label: `--data.label_folders true`"):
        labels_of(folder)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("pos", "pos"), (" pos ", "pos"), ("", None), (" ", None), ("none", None), (None, None), (True, "true"),
        (False, "false"), (0, "0"), (7, "7"), (1.0, "1"), (0.5, "0.5"), (float("nan"), None), (float("inf"), "inf"),
        ("été", "été"),
    ],
)  # fmt: skip
def test_numbers_and_truth_values_are_labels_and_what_is_empty_is_none(value: object, label: str | None) -> None:
    assert take_label(value, "label") == label


@pytest.mark.parametrize("value", [["pos"], {"a": 1}, "two\nlines", "x" * 101, 1e300, 10**100, b"pos", "\ud800"])
def test_what_is_no_label_is_refused_by_line(value: object, folder: Path) -> None:
    with pytest.raises(RowError, match=r"^: `label` "):
        take_label(value, "label")
    if not isinstance(value, bytes):
        write_rows(folder / "a.jsonl", [("a", "pos"), ("b", value)])
        with pytest.raises(TextgenError, match=r"a.jsonl` line 2: `label` "):
            labels_of(folder / "a.jsonl")


def test_parts_of_a_long_document_have_its_label(folder: Path) -> None:
    write_rows(folder / "a.jsonl", [("word " * 500, "pos"), ("short", "neg")])
    read = labels_of(folder / "a.jsonl", max_document_bytes=1024)
    assert [label for _, label in read] == ["pos", "pos", "pos", "neg"]


# --- a corpus --------------------------------------------------------------------------------------------------------


def test_the_package_has_negative_and_positive_reviews_and_no_contradiction() -> None:
    config = DataConfig(source="package", label_column="label")
    corpus = clean_corpus(open_corpus(config), config)
    assert corpus.label_names == ("negative", "positive")
    assert np.bincount(corpus.labels["train"]).tolist() == [11122, 11201]
    assert np.bincount(corpus.labels["validation"]).tolist() == [1250, 1250]
    assert corpus.counts["contradicting_labels"] == 0


def test_contradicting_copies_of_a_text_have_no_label_and_copies_without_one_do_not_count(folder: Path) -> None:
    rows = [("a", "pos"), ("b", "neg"), ("a", "neg"), ("c", None), ("c", "neg"), ("b", "neg"), ("d", "pos")]
    corpus = clean(write_rows(folder / "a.jsonl", rows), validation_fraction=0)
    assert named(corpus, "train") == [("a", None), ("b", "neg"), ("c", "neg"), ("d", "pos")]
    assert (corpus.counts["contradicting_labels"], corpus.counts["dropped_duplicates"]) == (1, 3)


def test_a_label_of_validation_that_training_never_saw_is_none_and_counted(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(folder / "train.jsonl", [("a", "pos"), ("b", "neg")])
    write_rows(folder / "valid.jsonl", [("c", "new"), ("d", "neg"), ("e", None)])
    with caplog.at_level(logging.INFO, logger="textgen"):
        corpus = clean(folder)
    assert corpus.label_names == ("neg", "pos")
    assert named(corpus, "validation") == [("c", None), ("d", "neg"), ("e", None)]
    assert "labels: 1 documents of validation have a label that train has not, which is not used" in caplog.messages


def test_a_thousand_labels_in_natural_order_and_one_seen_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: Rows = [(f"text {i}", i % 1000) for i in range(1999, -1, -1)]
    write_rows(folder / "a.jsonl", [*rows, ("the last", "seen once")])
    with caplog.at_level(logging.INFO, logger="textgen"):
        corpus = clean(folder / "a.jsonl", validation_fraction=0)
    assert corpus.label_names == (*map(str, range(1000)), "seen once")
    assert named(corpus, "train")[-1] == ("the last", "seen once")
    assert "labels: 1,001 labels of 1 to 2 documents, 1 of them in one, without a label 0" in caplog.messages


def test_a_column_of_ids_is_too_many_labels(folder: Path) -> None:
    write_rows(folder / "a.jsonl", [(f"text {i}", i) for i in range(MAX_LABELS + 1)])
    with pytest.raises(
        TextgenError, match=r"more than 10,000 different ones, the last '10000': does `--data.label_col"
    ):
        clean(folder / "a.jsonl")


def test_a_corpus_without_any_label_is_refused(folder: Path) -> None:
    write_rows(folder / "a.jsonl", [("a", None), ("b", ""), ("c", None)])
    with pytest.raises(TextgenError, match="no document to train on has a label"):
        clean(folder / "a.jsonl")


def test_the_held_out_end_of_a_long_document_has_its_label(folder: Path) -> None:
    write_rows(folder / "a.jsonl", [("one " * 400, "a"), ("two " * 300, "b")])
    corpus = clean(folder / "a.jsonl")
    assert [label for _, label in named(corpus, "train")] == ["a", "b"]
    assert [label for _, label in named(corpus, "validation")] == ["a", "b"]


def test_a_dataset_in_memory_has_labels_and_a_list_of_texts_has_none(folder: Path) -> None:
    import datasets

    config = DataConfig(source="memory", label_column="label", validation_fraction=0)
    dataset = datasets.load_from_disk(str(write_saved_dataset(folder / "saved", ROWS)))
    assert named(clean_corpus(corpus_of_dataset(dataset, config), config), "train") == ROWS
    with pytest.raises(TextgenError, match="`texts` have no column `label`: labelled texts are a `dataset`"):
        corpus_of_texts(["a", "b"], config)
    with pytest.raises(TextgenError, match=r"no column `stars`; it has `text`, `label`: see `data.label_column`"):
        corpus_of_dataset(dataset, DataConfig(source="memory", label_column="stars"))


def test_labels_are_part_of_a_fingerprint_and_one_without_them_is_that_of_older_versions() -> None:
    import datasets

    def found(labels: list[int]) -> str:
        dataset = datasets.Dataset.from_dict({"text": ["a", "b"], "label": labels})
        return corpus_of_dataset(dataset, DataConfig(source="memory", label_column="label")).fingerprint

    assert len({found([0, 1]), found([1, 0]), found([0, 1])}) == 2
    config = DataConfig(source="package")
    # as before there were labels and several sources: an index of stores is found again
    assert fingerprint(config, 1) == "8f8502ff01e41ba4d240474fe3cfb694eac473757986c8af319a747704a96985"


@pytest.mark.parametrize("source", ["package", "imdb", "memory"])
def test_labels_of_folders_are_for_files(source: Any) -> None:
    with pytest.raises(TextgenError, match=f"`--data.label_folders` needs `source` files: {source}"):
        open_corpus(DataConfig(source=source, label_folders=True))


# --- the store -------------------------------------------------------------------------------------------------------


def prepare(path: Path, cache: Path, **settings: Any) -> TokenStore:
    config = DataConfig(source="files", files=(str(path),), cache_dir=str(cache), **settings)
    return prepare_store(config, TokenizerConfig(vocab_size=300, model_type="bpe"), progress=False)


def texts_with_labels(count: int) -> Rows:
    return [(f"text number {i} of some", [None, "pos", "neg"][i % 3]) for i in range(count)]


def test_the_store_keeps_the_first_input_of_each_document(folder: Path, tmp_path: Path) -> None:
    path = write_rows(folder / "a.jsonl", texts_with_labels(60))
    store = prepare(path, tmp_path / "cache", label_column="label")
    assert store.labels == ("neg", "pos")
    wanted = {None: store.tokenizer.eos_id, "neg": store.tokenizer.vocab_size, "pos": store.tokenizer.vocab_size + 1}
    label_of_text = dict(texts_with_labels(60))
    for name in ("train", "validation"):
        split, texts = store.split(name), list(read_split(store, name))
        assert split.begin_ids is not None
        assert split.begin_ids.tolist() == [wanted[label_of_text[text]] for text in texts]
        assert [label_of(text) for text in texts] == [label_of_text[text] for text in texts]
    begins = store.directory / "train.begins.uint32"
    begins.write_bytes(begins.read_bytes()[:-4])
    with pytest.raises(TextgenError, match=r"train.begins.uint32` is damaged"):
        TokenStore.open(store.directory)


def test_labels_are_part_of_the_keys_and_a_store_without_them_has_none(folder: Path, tmp_path: Path) -> None:
    rows = texts_with_labels(60)
    first = write_rows(folder / "a.jsonl", rows)
    second = write_rows(folder / "b.jsonl", [(text, "neg" if label == "pos" else label) for text, label in rows])
    plain = prepare(first, tmp_path / "cache")
    labelled = prepare(first, tmp_path / "cache", label_column="label")
    others = prepare(second, tmp_path / "cache", label_column="label")
    assert len({store.key for store in (plain, labelled, others)}) == 3
    assert len({store.training_key for store in (plain, labelled, others)}) == 3
    assert {path.name for path in plain.directory.iterdir()} == {
        "store.json", "unigram.int64", "tokenizer.model", "train.tokens.uint16", "train.offsets.int64",
        "train.bytes.uint32", "validation.tokens.uint16", "validation.offsets.int64", "validation.bytes.uint32",
    }  # fmt: skip
    assert sorted(plain.record) == [
        "counts", "digests", "dtype", "format", "key", "normalization", "source", "splits", "tokenizer", "vocab_size",
    ]  # fmt: skip
    assert plain.split("train").begin_ids is None
    # as before there were labels: an old store is found again
    trainer = f"bpe 300 sentencepiece {importlib.metadata.version('sentencepiece')}"
    parts = ["2", trainer, *(f"{name} {digest}" for name, digest in sorted(plain.record["digests"].items()))]
    assert plain.key == hashlib.sha256("\n".join(parts).encode()).hexdigest()
    for name in ("train.tokens.uint16", "train.offsets.int64"):
        assert (plain.directory / name).read_bytes() == (labelled.directory / name).read_bytes()


# --- lanes -----------------------------------------------------------------------------------------------------------

EOS, VOCAB = 1, 1000


def labelled_split(lengths: list[int], labels: list[int | None]) -> Split:
    """Return a split of random tokens, each document ending with EOS."""
    draw = np.random.default_rng(0)
    documents = [np.append(draw.integers(2, VOCAB, length - 1), EOS) for length in lengths]
    begins = [EOS if label is None else VOCAB + label for label in labels]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.concatenate(documents).astype(np.uint16)
    return Split(tokens, offsets, np.ones(len(lengths), dtype=np.uint32), np.array(begins, dtype=np.uint32))


def read_all(split: Split, *, batch_size: int, seq_len: int, micro_batches: int = 1, epoch: int = 0) -> Any:
    """Return the inputs and targets of an epoch, each (batch_size, tokens of a lane)."""
    num = Epoch(split, batch_size=batch_size, seq_len=seq_len, seed=5, epoch=epoch).num_windows
    steps = range(num * epoch, num * (epoch + 1))
    sampler = LaneSampler(batch_size=batch_size, micro_batches=micro_batches, steps=steps)
    rows: dict[str, list[list[torch.Tensor]]] = {"tokens": [[] for _ in range(batch_size)], "targets": []}
    rows["targets"] = [[] for _ in range(batch_size)]
    for batch in build_loader(split, sampler, seq_len=seq_len, seed=5):
        for name, its in rows.items():
            for lane, row in zip(batch["lanes"].tolist(), batch[name], strict=True):
                its[lane].append(row)
    return [torch.stack([torch.cat(lane) for lane in rows[name]]) for name in ("tokens", "targets")]


@pytest.mark.parametrize(("batch_size", "seq_len", "micro_batches"), [(1, 7, 1), (4, 16, 2), (6, 1, 3), (3, 50, 1)])
def test_a_label_takes_the_place_of_the_end_before_its_document_and_is_never_a_target(
    batch_size: int, seq_len: int, micro_batches: int
) -> None:
    draw = np.random.default_rng(1)
    lengths = draw.integers(1, 12, 300).tolist()
    labels = [None if i % 5 == 0 else int(draw.integers(0, 9)) for i in range(300)]
    split = labelled_split(lengths, labels)
    plain = Split(split.tokens, split.offsets, split.num_bytes)
    size = {"batch_size": batch_size, "seq_len": seq_len, "micro_batches": micro_batches, "epoch": 1}
    inputs, targets = read_all(split, **size)
    old_inputs, old_targets = read_all(plain, **size)
    assert torch.equal(targets, old_targets)
    # the plain way: the stream of a whole epoch, and the label of each document but those that go without
    order = permutation(5, 1, 300)
    without = uniform(5, 1, -1 << 32, order) < 0.1
    assert 10 < int(without.sum()) < 60
    place, stream = 0, []
    wanted: dict[int, int] = {}
    for document, none in zip(order.tolist(), without.tolist(), strict=True):
        if place and labels[document] is not None and not none:
            wanted[place - 1] = VOCAB + (labels[document] or 0)
        stream += split.document(document).tolist()
        place = len(stream)
    changed = np.array(stream)
    changed[list(wanted)] = list(wanted.values())
    lane_length = (len(stream) - 1) // batch_size
    for lane in range(batch_size):
        start, count = lane * lane_length, inputs.shape[1]
        assert inputs[lane].tolist() == changed[start : start + count].tolist()
        assert set(inputs[lane][inputs[lane] != old_inputs[lane]].tolist()) > {VOCAB}
        assert (old_inputs[lane][inputs[lane] != old_inputs[lane]] == EOS).all()


def test_other_documents_go_without_their_label_in_another_epoch() -> None:
    split = labelled_split([3] * 400, list(range(400)))  # a label tells its document
    seen = [set(read_all(split, batch_size=2, seq_len=8, epoch=epoch)[0].unique().tolist()) for epoch in range(4)]
    without = [{document for document in range(400) if VOCAB + document not in labels} for labels in seen]
    assert all(20 < len(documents) < 70 for documents in without)
    assert all(len(one & other) < 20 for one in without for other in without if one is not other)
