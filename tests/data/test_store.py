"""The token store, and what an epoch makes of it: lanes, windows and a position that is two integers."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import textgen.data.split
import textgen.data.store
from textgen.config import DataConfig, TokenizerConfig
from textgen.data.corpus import CleanCorpus, clean_corpus
from textgen.data.lanes import STRIDE, Epoch, LaneSampler, build_loader, windows_per_epoch
from textgen.data.split import Split
from textgen.data.store import TokenStore, encode_batches, encode_documents, prepare_store
from textgen.errors import TextgenError
from textgen.noise import permutation
from textgen.runs import lock
from textgen.tokenizer import MODEL_NAME, Tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]


# --- lanes and windows -----------------------------------------------------------------------------------------------


def split_of(lengths: list[int]) -> Split:
    """Return a split whose token at position i is i: every place of the stream can be told from any other."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Split(np.arange(offsets[-1], dtype=np.uint32), offsets, np.ones(len(lengths), dtype=np.uint32))


def stream_of(split: Split, *, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    """Return the epoch's whole stream, the plain way."""
    return np.concatenate([split.document(int(i)) for i in permutation(seed, epoch, split.num_documents)])


def batches_of(
    split: Split, *, batch_size: int, seq_len: int, seed: int, steps: range | None = None, micro_batches: int = 1
) -> list[dict[str, torch.Tensor]]:
    """Return the micro-batches of some steps; of the first epoch's where none are named."""
    steps = range(windows_per_epoch(split, batch_size=batch_size, seq_len=seq_len)) if steps is None else steps
    sampler = LaneSampler(batch_size=batch_size, micro_batches=micro_batches, steps=steps)
    loader = build_loader(split, sampler, seq_len=seq_len, seed=seed)
    batches = list(loader)
    assert len(loader) == len(batches) == len(steps) * micro_batches
    return batches


def random_lengths(count: int, *, longest: int = 2000, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.choice([1, 2, draw.randint(1, 20), draw.randint(1, longest)]) for _ in range(count)]


@pytest.mark.parametrize("count", [1 << 20, 6400, 640])
def test_a_sample_is_of_evenly_spaced_blocks(count: int) -> None:
    split = split_of(random_lengths(60)).part(7, 40)
    first, end = int(split.offsets[0]), int(split.offsets[-1])
    sample = split.sample(count)
    assert sample.dtype == np.int32
    if count > end - first:
        assert np.array_equal(sample, split.tokens[first:end])
    else:
        starts = sample.reshape(64, -1)[:, 0]
        assert np.array_equal(sample.reshape(64, -1), starts[:, None] + np.arange(count // 64))
        assert (starts[0], sample[-1]) == (first, end - 1)
        assert np.ptp(np.diff(starts)) <= 1


@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 7), (4, 16), (6, 1), (8, 64), (3, 300)])
def test_lanes_partition_the_corpus(batch_size: int, seq_len: int) -> None:
    split = split_of(random_lengths(60, longest=200))
    epoch = Epoch(split, batch_size=batch_size, seq_len=seq_len, seed=3, epoch=2)
    stream = stream_of(split, seed=3, epoch=2)
    place = np.empty(split.num_tokens, dtype=np.int64)
    place[stream] = np.arange(len(stream))
    seen = np.zeros(split.num_tokens, dtype=np.int64)
    steps = range(2 * epoch.num_windows, 3 * epoch.num_windows)
    for batch in batches_of(split, batch_size=batch_size, seq_len=seq_len, seed=3, steps=steps):
        assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
        places = place[batch["tokens"].numpy()]
        assert (place[batch["targets"].numpy()] == places + 1).all(), "a target is not the next token"
        np.add.at(seen, places, 1)
    assert seen.max() == 1, "a position was read twice"
    assert epoch.num_windows * batch_size * seq_len == seen.sum()
    assert 0 < (seen == 0).sum() < batch_size * (seq_len + 1)


def test_a_lane_is_read_from_left_to_right_without_gaps() -> None:
    epoch = Epoch(split_of(random_lengths(60)), batch_size=5, seq_len=11, seed=0, epoch=0)
    stream = stream_of(epoch.split, seed=0, epoch=0)
    for lane in range(5):
        windows = [epoch.window(lane, window)[:-1] for window in range(epoch.num_windows)]
        start = lane * epoch.lane_length
        assert np.array_equal(np.concatenate(windows), stream[start : start + 11 * epoch.num_windows])


@pytest.mark.parametrize("count", [1, STRIDE - 1, STRIDE, STRIDE + 1, 3 * STRIDE + 77])
def test_read_equals_the_plain_concatenation(count: int) -> None:
    split = split_of([*random_lengths(count - 1, seed=count), 9])
    epoch = Epoch(split, batch_size=1, seq_len=1, seed=5, epoch=1)
    stream = stream_of(split, seed=5, epoch=1)
    draw = random.Random(count)
    spans = [(0, len(stream)), (len(stream) - 1, 1), (0, 1), (0, 0)]
    starts = draw.choices(range(len(stream)), k=300)
    spans += [(start, draw.randint(0, min(5000, len(stream) - start))) for start in starts]
    for start, length in spans:
        assert np.array_equal(epoch.read(start, length), stream[start : start + length]), (start, length)


def test_read_finds_every_position_across_a_block_boundary() -> None:
    split = split_of([1 + i % 3 for i in range(2 * STRIDE + 3)])
    epoch, stream = Epoch(split, batch_size=1, seq_len=1, seed=1, epoch=0), stream_of(split, seed=1, epoch=0)
    assert [int(epoch.read(start, 1)[0]) for start in range(len(stream))] == stream.tolist()


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("first", [0, 1, 9])
def test_the_loader_goes_on_exactly_at_a_window(first: int, micro_batches: int) -> None:
    split = split_of(random_lengths(50, longest=100))

    per_epoch = windows_per_epoch(split, batch_size=8, seq_len=5)
    assert per_epoch > 10

    def read(first_step: int) -> list[dict[str, torch.Tensor]]:
        steps = range(first_step, 6 * per_epoch + 2)
        return batches_of(split, batch_size=8, seq_len=5, seed=2, steps=steps, micro_batches=micro_batches)

    start = 4 * per_epoch
    tail, whole = read(start + first), read(start)[first * micro_batches :]
    assert len(tail) == len(whole)
    for a, b in zip(tail, whole, strict=True):
        assert a.keys() == b.keys() == {"tokens", "targets", "lanes", "windows"}
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_loader_deals_windows_lane_by_lane_micro_batch_by_micro_batch() -> None:
    epoch = Epoch(split_of(random_lengths(50, longest=100)), batch_size=6, seq_len=5, seed=2, epoch=0)
    batches = batches_of(epoch.split, batch_size=6, seq_len=5, seed=2, steps=range(2, 5), micro_batches=3)
    dealt = [(window, lanes) for window in (2, 3, 4) for lanes in ([0, 1], [2, 3], [4, 5])]
    assert [(batch["windows"].unique().item(), batch["lanes"].tolist()) for batch in batches] == dealt
    for batch in batches:
        for row, (lane, window) in enumerate(zip(batch["lanes"].tolist(), batch["windows"].tolist(), strict=True)):
            wanted = epoch.window(lane, window)
            assert np.array_equal(batch["tokens"][row], wanted[:-1])
            assert np.array_equal(batch["targets"][row], wanted[1:])
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_micro_batches_cut_the_same_windows() -> None:
    split = split_of(random_lengths(50, longest=100))
    whole, cut = (
        [batch["tokens"] for batch in batches_of(split, batch_size=8, seq_len=5, seed=2, micro_batches=micro_batches)]
        for micro_batches in (1, 4)
    )
    assert torch.equal(torch.cat(whole), torch.cat(cut))


def test_a_loader_of_no_steps_is_empty() -> None:
    assert batches_of(split_of([200]), batch_size=2, seq_len=5, seed=2, steps=range(0)) == []


def test_a_loader_goes_on_into_the_next_epochs_order() -> None:
    split = split_of(random_lengths(50, longest=100))
    per_epoch = windows_per_epoch(split, batch_size=6, seq_len=5)
    batches = batches_of(split, batch_size=6, seq_len=5, seed=2, steps=range(per_epoch - 2, 2 * per_epoch + 1))
    wanted = [(0, per_epoch - 2), (0, per_epoch - 1), *((1, window) for window in range(per_epoch)), (2, 0)]
    epochs = [Epoch(split, batch_size=6, seq_len=5, seed=2, epoch=number) for number in range(3)]
    for batch, (number, window) in zip(batches, wanted, strict=True):
        rows = np.stack([epochs[number].window(lane, window) for lane in range(6)])
        assert np.array_equal(batch["tokens"], rows[:, :-1]), (number, window)
        assert batch["windows"].tolist() == [window] * 6


def test_a_sampler_lists_other_steps_at_its_next_iteration() -> None:
    sampler = LaneSampler(batch_size=2, micro_batches=1, steps=range(5))
    begun = iter(sampler)
    assert next(begun) == [(0, 0), (0, 1)]
    sampler.steps = range(7, 8)
    assert list(sampler) == [[(7, 0), (7, 1)]]
    assert next(begun) == [(1, 0), (1, 1)], "an iteration that has begun keeps its steps"


def test_epochs_and_seeds_order_documents_differently() -> None:
    split = split_of([3] * 100)
    streams = [
        Epoch(split, batch_size=1, seq_len=1, seed=seed, epoch=epoch).read(0, 300).tolist()
        for seed, epoch in ((1, 0), (1, 1), (2, 0), (1, 0))
    ]
    assert streams[0] == streams[3]
    assert streams[0] != streams[1] != streams[2] != streams[0]
    assert sorted(streams[0]) == sorted(streams[1]) == list(range(300))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 10, 64, 100, 128, 129, 8192])
@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 3), (2, 64), (128, 64), (128, 1), (3, 10_000)])
def test_too_few_tokens_name_sizes_that_fit(tokens: int, batch_size: int, seq_len: int) -> None:
    split = split_of([tokens])
    if tokens > batch_size * seq_len:
        assert windows_per_epoch(split, batch_size=batch_size, seq_len=seq_len) == (tokens - 1) // batch_size // seq_len
        return
    with pytest.raises(TextgenError) as caught:
        Epoch(split, batch_size=batch_size, seq_len=seq_len, seed=0, epoch=0)
    said, _, fitting = str(caught.value).partition(": ")
    assert said == f"{tokens} tokens are too few for batch_size {batch_size} x seq_len {seq_len}"
    sizes = {name: int(value) for name, value in re.findall(r"(batch_size|seq_len) (\d+)", fitting)}
    if tokens == 1:
        assert fitting == "no sizes would fit, at least 2 tokens are needed"
        return
    fits = {"batch_size": batch_size, "seq_len": seq_len} | sizes
    assert fits["batch_size"] <= batch_size
    assert fits["seq_len"] <= seq_len
    epoch = Epoch(split, **fits, seed=0, epoch=0)
    assert len(batches_of(split, **fits, seed=0)) == epoch.num_windows >= 1


# --- the store -------------------------------------------------------------------------------------------------------


def make_texts(count: int = 200, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = "The film A Plot was WAS good bad very not naïve café 🙂 <br /> really and but".split()  # noqa: SIM905
    return [f"{i}: {' '.join(draw.choices(words, k=draw.randint(3, 30)))}" for i in range(count)]


def write_corpus(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


CHAR = TokenizerConfig(model_type="char", vocab_size=400)


def prepare(corpus: Path, cache: Path, tokenizer: TokenizerConfig = CHAR, **data: Any) -> TokenStore:
    return prepare_store(
        DataConfig(source="files", files=(str(corpus),), cache_dir=str(cache), **data), tokenizer, progress=False
    )


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by a store's directory each time one is encoded."""
    made: list[str] = []
    write = textgen.data.store._write_store

    def counted(directory: Path, *args: Any, **kwargs: Any) -> TokenStore:
        made.append(directory.name)
        return write(directory, *args, **kwargs)

    monkeypatch.setattr(textgen.data.store, "_write_store", counted)
    return made


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "here" / "reviews.jsonl", make_texts())


def texts_of(store: TokenStore, name: str) -> list[str]:
    split = store.split(name)
    documents = [split.document(i).tolist() for i in range(split.num_documents)]
    assert all(ids.count(store.tokenizer.eos_id) == 1 and ids[-1] == store.tokenizer.eos_id for ids in documents)
    return [store.tokenizer.decode(ids) for ids in documents]


def test_a_store_gives_back_every_text(corpus: Path, tmp_path: Path) -> None:
    store = prepare(corpus, tmp_path / "cache")
    train, validation = texts_of(store, "train"), texts_of(store, "validation")
    assert sorted(train + validation) == sorted(make_texts())
    assert len(validation) == 20
    for name, texts in (("train", train), ("validation", validation)):
        split, num_bytes = store.split(name), [len(text.encode()) for text in texts]
        assert split.num_bytes.tolist() == num_bytes
        assert split.num_tokens == split.offsets[-1] == len(split.tokens)
        assert store.bytes_per_token(name) == pytest.approx(sum(num_bytes) / split.num_tokens, rel=1e-12)


def test_a_split_is_mapped_and_cannot_be_written(corpus: Path, tmp_path: Path) -> None:
    store = prepare(corpus, tmp_path / "cache")
    split = store.split("train")
    maps = Path("/proc/self/maps")
    for array, name in ((split.tokens, "tokens.uint16"), (split.offsets, "offsets.int64"), (split.num_bytes, "bytes")):
        assert not array.flags.writeable
        assert not maps.exists() or f"{store.directory}/train.{name}" in maps.read_text()


def test_reading_ahead_changes_nothing_but_the_time(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = prepare(corpus, tmp_path / "cache")
    wanted = store.split("train").tokens.tolist()
    monkeypatch.setattr(textgen.data.split, "READ_AHEAD_BELOW", 0)
    assert store.split("train").tokens.tolist() == wanted


def test_unigram_counts_are_those_of_the_train_split(corpus: Path, tmp_path: Path) -> None:
    store = prepare(corpus, tmp_path / "cache")
    tokens = torch.from_numpy(store.split("train").tokens.astype(np.int64))
    assert torch.equal(store.unigram_counts, torch.bincount(tokens, minlength=store.tokenizer.vocab_size))
    assert int(store.unigram_counts[store.tokenizer.eos_id]) == store.split("train").num_documents


def test_a_split_that_is_not_there_is_named_with_those_that_are(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(TextgenError, match=r"^the data has no split `test`; it has `train`, `validation`$"):
        prepare(corpus, tmp_path / "cache").split("test")


def test_validation_fraction_zero_leaves_no_validation_split(corpus: Path, tmp_path: Path) -> None:
    store = prepare(corpus, tmp_path / "cache", validation_fraction=0)
    assert list(store.record["splits"]) == ["train"]
    assert texts_of(store, "train") == make_texts()


def test_a_second_call_encodes_nothing(corpus: Path, tmp_path: Path, encodings: list[str]) -> None:
    first, second = (prepare(corpus, tmp_path / "cache") for _ in range(2))
    assert (first.key, first.directory) == (second.key, second.directory)
    assert len(encodings) == 1


def test_a_second_call_does_not_read_the_text(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(corpus, tmp_path / "cache")

    def refuse(*args: Any) -> None:
        raise AssertionError("the text was read")

    monkeypatch.setattr(textgen.data.store, "clean_corpus", refuse)
    assert prepare(corpus, tmp_path / "cache").key == first.key


def test_the_same_text_elsewhere_is_the_same_store(corpus: Path, tmp_path: Path, encodings: list[str]) -> None:
    first = prepare(corpus, tmp_path / "cache")
    elsewhere = write_corpus(tmp_path / "there" / "other-name.jsonl", make_texts())
    txt = tmp_path / "lines.txt"
    txt.write_text("\n".join(make_texts()) + "\n")
    assert prepare(elsewhere, tmp_path / "cache").directory == first.directory
    assert prepare(txt, tmp_path / "cache", txt_documents="line").key == first.key
    write_corpus(tmp_path / "parts" / "1.jsonl", make_texts()[:70])
    write_corpus(tmp_path / "parts" / "2.jsonl", make_texts()[70:])
    assert prepare(tmp_path / "parts", tmp_path / "cache").key == first.key
    assert len(encodings) == 1


def test_the_same_text_gives_the_same_bytes_in_another_cache(corpus: Path, tmp_path: Path) -> None:
    one, two = (prepare(corpus, tmp_path / cache).directory for cache in ("one", "two"))
    assert one.name == two.name
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert [name for name in names if (one / name).read_bytes() != (two / name).read_bytes()] == []


@pytest.mark.parametrize(
    ("tokenizer", "data"),
    [
        (TokenizerConfig(model_type="char", vocab_size=280), {}),
        (TokenizerConfig(model_type="bpe", vocab_size=320), {}),
        (CHAR, {"normalization": "lowercase"}),
        (CHAR, {"validation_fraction": 0.2}),
    ],
)
def test_other_settings_are_another_store(
    corpus: Path, tmp_path: Path, encodings: list[str], tokenizer: TokenizerConfig, data: dict[str, Any]
) -> None:
    first = prepare(corpus, tmp_path / "cache")
    other = prepare(corpus, tmp_path / "cache", tokenizer, **data)
    assert other.key != first.key
    assert len(encodings) == 2
    assert first.directory.exists()  # both are kept
    assert prepare(corpus, tmp_path / "cache").directory == first.directory
    assert len(encodings) == 2


def test_changed_text_is_another_store(corpus: Path, tmp_path: Path, encodings: list[str]) -> None:
    first = prepare(corpus, tmp_path / "cache")
    before = corpus.stat()
    corpus.write_text(corpus.read_text().replace("good", "mild", 1))  # as many bytes as before
    os.utime(corpus, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    second = prepare(corpus, tmp_path / "cache")
    assert first.key != second.key
    assert any("mild" in text for text in texts_of(second, "train") + texts_of(second, "validation"))
    assert len(encodings) == 2


def test_lowercase_normalization_lowers_every_text(corpus: Path, tmp_path: Path) -> None:
    store = prepare(corpus, tmp_path / "cache", normalization="lowercase")
    assert store.record["normalization"] == "lowercase"
    texts = texts_of(store, "train") + texts_of(store, "validation")
    assert sorted(texts) == sorted(text.lower() for text in make_texts())
    assert store.split("train").num_bytes.tolist() == [len(text.encode()) for text in texts_of(store, "train")]


def test_tokenizer_path_is_used_instead_of_training_one(corpus: Path, tmp_path: Path, encodings: list[str]) -> None:
    own = Tokenizer(train_tokenizer(["quite other text, of other words"], vocab_size=300, model_type="char"))
    own.save(tmp_path / "own.model")
    trained = prepare(corpus, tmp_path / "cache")
    store = prepare(corpus, tmp_path / "cache", TokenizerConfig(path=str(tmp_path / "own.model")))
    assert store.tokenizer.sha256 == own.sha256 == store.record["tokenizer"] != trained.tokenizer.sha256
    assert store.key != trained.key
    assert sorted(texts_of(store, "train") + texts_of(store, "validation")) == sorted(make_texts())
    assert prepare(corpus, tmp_path / "cache", TokenizerConfig(path=str(tmp_path / "own.model"))).key == store.key
    assert len(encodings) == 2


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_tokens_take_two_bytes_where_the_vocabulary_allows(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    blocks = (range(0x4E00, 0xA000), range(0xAC00, 0xD7A4), range(0x20000, 0x2A6D0))  # Han, Hangul, more Han
    characters = [chr(codepoint) for block in blocks for codepoint in block]
    texts = ["".join(characters[start : start + 500]) for start in range(0, len(characters), 500)]
    corpus = write_corpus(tmp_path / "characters.jsonl", texts)
    config = TokenizerConfig(model_type="char", vocab_size=vocab_size)
    store = prepare(corpus, tmp_path / "cache", config, validation_fraction=0)
    assert store.tokenizer.vocab_size == vocab_size
    tokens = store.split("train").tokens
    assert tokens.dtype == np.dtype(dtype)
    assert int(tokens.max()) == vocab_size - 1
    assert texts_of(store, "train") == texts


def test_text_that_changes_while_it_is_encoded_leaves_no_store(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, text = textgen.data.store.clean_corpus, corpus.read_text()

    def clean_and_change(*given: Any) -> CleanCorpus:
        cleaned = clean(*given)
        corpus.write_text(text.replace("good", "fine"))
        return cleaned

    with monkeypatch.context() as patch:
        patch.setattr(textgen.data.store, "clean_corpus", clean_and_change)
        with pytest.raises(TextgenError, match="changed while it was read: other texts in its split `train`"):
            prepare(corpus, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/store.json"))
    assert "good" not in "".join(texts_of(prepare(corpus, tmp_path / "cache"), "train"))


def test_data_store_opens_a_store_directly(corpus: Path, tmp_path: Path) -> None:
    made = prepare(corpus, tmp_path / "cache")
    moved = made.directory.rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "cache")
    corpus.unlink()
    store = prepare_store(DataConfig(store=str(moved), cache_dir=str(tmp_path / "unused")), TokenizerConfig())
    assert (store.key, store.directory) == (made.key, moved)
    assert len(texts_of(store, "train")) == 180
    assert not (tmp_path / "unused").exists()


def test_settings_beside_a_store_are_named_as_not_used(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = str(prepare(corpus, tmp_path / "cache").directory)
    caplog.set_level(logging.INFO, "textgen")
    caplog.clear()
    prepare_store(DataConfig(store=store, reading_rules=1, cache_dir="elsewhere"), TokenizerConfig())
    prepare_store(DataConfig(store=store, source="memory"), CHAR)
    assert not caplog.messages
    data = DataConfig(store=store, source="files", files=("a.txt",), encoding="latin-1", normalization="lowercase")
    prepare_store(data, TokenizerConfig(vocab_size=300))
    names = "`data.files`, `data.encoding`, `data.normalization`, `tokenizer.vocab_size`"
    assert caplog.messages == [f"`{store}` holds encoded text, so these settings are not used: {names}"]


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", '{"format": 0}', "\x00\xff"])
def test_what_is_no_store_is_refused_in_one_line(tmp_path: Path, content: str | None) -> None:
    directory = tmp_path / "store"
    if content is not None:
        directory.mkdir()
        (directory / "store.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(TextgenError, match=rf"^`{directory}` is (not )?a token store") as caught:
        prepare_store(DataConfig(store=str(directory)), TokenizerConfig())
    assert len(str(caught.value).splitlines()) == 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def garble(path: Path) -> None:
    path.write_bytes(b"\x00" * path.stat().st_size)


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "truncated tokens": ("train.tokens.uint16", truncate),
    "lengthened tokens": ("train.tokens.uint16", lambda path: path.write_bytes(path.read_bytes() + b"xx")),
    "no tokens": ("train.tokens.uint16", Path.unlink),
    "truncated offsets": ("validation.offsets.int64", truncate),
    "no byte counts": ("train.bytes.uint32", Path.unlink),
    "no unigram counts": ("unigram.int64", Path.unlink),
    "truncated unigram counts": ("unigram.int64", truncate),
    "no tokenizer": ("tokenizer.model", Path.unlink),
    "garbled tokenizer": ("tokenizer.model", garble),
    "no record": ("store.json", Path.unlink),
    "truncated record": ("store.json", lambda path: path.write_text(path.read_text()[:50])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_encoded_again(corpus: Path, tmp_path: Path, encodings: list[str], damage: str) -> None:
    store = prepare(corpus, tmp_path / "cache")
    wanted = {path.name: path.read_bytes() for path in store.directory.iterdir()}
    name, change = DAMAGES[damage]
    change(store.directory / name)
    with pytest.raises(TextgenError):
        TokenStore.open(store.directory)
    again = prepare(corpus, tmp_path / "cache")
    assert again.directory == store.directory
    assert {path.name: path.read_bytes() for path in again.directory.iterdir()} == wanted
    assert len(encodings) == 2


def test_a_torn_index_is_no_harm(corpus: Path, tmp_path: Path, encodings: list[str]) -> None:
    store = prepare(corpus, tmp_path / "cache")
    (index,) = (tmp_path / "cache" / "index").iterdir()
    for content in (b"", b"00", b"\xff\xfe"):
        index.write_bytes(content)
        assert prepare(corpus, tmp_path / "cache").key == store.key
    assert len(encodings) == 1


PREPARE = """
import sys, logging, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # what shells start in the background ignores it
from textgen.config import DataConfig, TokenizerConfig
from textgen.data.store import prepare_store
logging.basicConfig(level=logging.INFO, format='%(message)s')
data = DataConfig(source='files', files=(sys.argv[1],), cache_dir=sys.argv[2])
store = prepare_store(data, TokenizerConfig(model_type='char', vocab_size=400), progress=False)
print(store.key, store.split('train').num_tokens)
"""


def start_preparing(corpus: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(corpus), str(cache)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_processes_at_once_encode_once(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "reviews.jsonl", make_texts(3000))
    both = [start_preparing(corpus, tmp_path / "cache") for _ in range(2)]
    ended = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert ended[0][0] == ended[1][0] != ""
    assert sum("encoded in " in logged for _, logged in ended) == 1
    assert sum("encoded earlier" in logged for _, logged in ended) == 1
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == ["", "", ".lock"]  # store, index, lock


def test_a_killed_preparation_leaves_no_store_and_the_next_clears_its_rest(tmp_path: Path) -> None:
    corpus, cache = write_corpus(tmp_path / "reviews.jsonl", make_texts(60_000)), tmp_path / "cache"
    killed = start_preparing(corpus, cache)
    deadline = time.monotonic() + 60
    while not list(cache.glob("*.tmp/train.tokens.*")):
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    (left,) = cache.glob("*.tmp")
    assert list(cache.glob("*/store.json")) == []
    write_corpus(corpus, make_texts(300))
    store = prepare(corpus, cache)  # another store: what was left is no harm, and not its business
    assert left.exists()
    write_corpus(corpus, make_texts(60_000))
    del store
    again = prepare(corpus, cache)
    assert not left.exists()
    assert again.split("train").num_documents == 54_000


def test_preparation_that_was_taken_over_replaces_no_store(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = prepare(corpus, tmp_path / "cache")
    (store.directory / "store.json").unlink()  # else it would be found
    before = sorted(store.directory.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(lock.FileLock, "is_lost", lambda _: True)
        with pytest.raises(TextgenError, match=r"`.*prepare.lock` was removed"):
            prepare(corpus, tmp_path / "cache")
    assert sorted(store.directory.iterdir()) == before
    assert list((tmp_path / "cache").glob("*.tmp")) == []


def test_an_error_while_encoding_leaves_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(textgen.data.store, "encode_documents", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["prepare.lock"]
    assert len(texts_of(prepare(corpus, tmp_path / "cache"), "train")) == 180


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 512 KiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("a small file system can be mounted by root only")
    made = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(directory)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, small_disk: Path) -> None:
    corpus = write_corpus(tmp_path / "reviews.jsonl", make_texts(6000))
    with pytest.raises(OSError) as caught:
        prepare(corpus, small_disk / "cache")
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in (small_disk / "cache").iterdir()] == ["prepare.lock"]
    small = write_corpus(tmp_path / "small.jsonl", make_texts(100))
    assert len(texts_of(prepare(small, small_disk / "cache"), "train")) == 90


@pytest.mark.parametrize("home", ["/proc", "/dev/null", "gone"])
def test_a_cache_that_cannot_be_written_names_its_flag(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str
) -> None:
    """Root may write anywhere but in /proc."""
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere" / "far")
    monkeypatch.setenv("HOME", str(tmp_path / home))
    with pytest.raises(TextgenError) as caught:
        prepare(corpus, Path("~/.cache/textgen"))
    assert str(caught.value).startswith("`~/.cache/textgen` cannot be written: ")
    assert str(caught.value).endswith("; name another folder for encoded text: `--data.cache_dir`")


def test_a_tokenizer_that_loses_text_is_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(train_tokenizer(make_texts(), vocab_size=400, model_type="char"))
    good = encode_documents(tokenizer, ["The film", ""])
    assert [ids.tolist() for ids in good] == [[*tokenizer.encode("The film"), tokenizer.eos_id], [tokenizer.eos_id]]
    spoiled = tokenizer._all_pieces.copy()
    spoiled[tokenizer._piece_ends[tokenizer.encode("f")[0]] - 1] = ord("F")
    monkeypatch.setattr(tokenizer, "_all_pieces", spoiled)
    with pytest.raises(TextgenError, match=r"^the tokenizer loses text of the document that starts 'The film'$"):
        encode_documents(tokenizer, ["A cat", "The film", "A cat"])


def test_the_fast_way_from_ids_to_bytes_is_the_slow_one() -> None:
    tokenizer = Tokenizer(train_tokenizer(make_texts(), vocab_size=400, model_type="char"))
    ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 2000)
    utf8, ends = tokenizer.utf8_of(ids)
    pieces = [tokenizer.token_bytes(int(token)) for token in ids]
    assert utf8 == b"".join(pieces)
    assert ends.tolist() == np.cumsum([len(piece) for piece in pieces]).tolist()
    assert b"" in pieces  # `</s>`


def test_long_documents_are_encoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textgen.data.store, "ENCODE_CHARACTERS", 10)
    monkeypatch.setattr(textgen.data.store, "ENCODE_BATCH", 3)
    texts = ["a", "b", "c", "d", "e" * 11, "f", "g" * 30, "h"]
    batches = list(textgen.data.store._in_batches(iter(texts)))
    assert batches == [["a", "b", "c"], ["d", "e" * 11], ["f", "g" * 30], ["h"]]


# --- reading ahead ---------------------------------------------------------------------------------------------------


def char_tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(make_texts(), vocab_size=400, model_type="char"))


def test_the_next_texts_are_read_while_the_first_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    has_read_on = threading.Event()

    def wait_and_encode(*args: Any, **kwargs: Any) -> list[np.ndarray[Any, Any]]:
        assert has_read_on.wait(timeout=60)
        return encode_documents(*args, **kwargs)

    def texts() -> Iterator[str]:
        yield "A cat"
        yield "The film"
        has_read_on.set()

    monkeypatch.setattr(textgen.data.store, "ENCODE_BATCH", 1)
    monkeypatch.setattr(textgen.data.store, "encode_documents", wait_and_encode)
    assert [batch for batch, _ in encode_batches(char_tokenizer(), texts())] == [["A cat"], ["The film"]]


@pytest.mark.parametrize("num_cores", [1, 3, 64])
def test_texts_come_in_order_with_their_ids_whoever_is_done_first(
    num_cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, texts, draw = char_tokenizer(), make_texts(100), random.Random(num_cores)

    def encode_some_time(tokenizer: Tokenizer, texts: list[str], **kwargs: Any) -> list[np.ndarray[Any, Any]]:
        time.sleep(draw.random() / 50)
        return encode_documents(tokenizer, texts, **kwargs)

    monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
    monkeypatch.setattr(textgen.data.store, "ENCODE_BATCH", 3)
    monkeypatch.setattr(textgen.data.store, "encode_documents", encode_some_time)
    got = list(encode_batches(tokenizer, texts))
    assert [text for batch, _ in got for text in batch] == texts
    ids = [document.tolist() for _, encoded in got for document in encoded]
    assert ids == [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]


@pytest.mark.parametrize(("num_cores", "held"), [(1, 2), (4, 5), (1000, 17)])
def test_a_few_texts_are_held_however_many_there_are(
    num_cores: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
    monkeypatch.setattr(textgen.data.store, "ENCODE_BATCH", 1)
    read = count()
    before = threading.active_count()
    batches = encode_batches(char_tokenizer(), (f"The film {number}" for number in read))
    for number in range(50):
        assert next(batches)[0] == [f"The film {number}"]
    assert next(read) == 49 + held
    batches.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(("num_cores", "batch", "characters"), [(1, 1, 1 << 20), (3, 7, 1 << 20), (64, 512, 100)])
def test_cores_and_batches_do_not_change_a_store(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_cores: int, batch: int, characters: int
) -> None:
    tokenizer = TokenizerConfig(vocab_size=360)
    wanted = prepare(corpus, tmp_path / "one", tokenizer).directory
    monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
    monkeypatch.setattr(textgen.data.store, "ENCODE_BATCH", batch)
    monkeypatch.setattr(textgen.data.store, "ENCODE_CHARACTERS", characters)
    got = prepare(corpus, tmp_path / "two", tokenizer).directory
    assert {path.name: path.read_bytes() for path in got.iterdir()} == {
        path.name: path.read_bytes() for path in wanted.iterdir()
    }


def test_a_text_that_changes_while_it_is_encoded_is_one_line_and_leaves_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = len(make_texts()) // 2
    rest: dict[str, str] = {
        f"`{corpus}` line {line + 1} is not valid JSON: ": '{"text": \n',
        f"1 files: train 1 ({corpus.stat().st_size / 1e6:.1f} MB) changed while it was read: "
        "it no longer has 200 documents": "",
    }
    monkeypatch.setattr(textgen.data.store, "ENCODE_BATCH", 16)
    lines = corpus.read_text().splitlines(keepends=True)
    path = tmp_path / MODEL_NAME
    Tokenizer(train_tokenizer(make_texts(), vocab_size=400, model_type="char")).save(path)
    for message, end in rest.items():

        def clean_and_change(*args: Any, end: str = end) -> CleanCorpus:
            cleaned = clean_corpus(*args)
            corpus.write_text("".join(lines[:line]) + end)
            return cleaned

        corpus.write_text("".join(lines))
        monkeypatch.setattr(textgen.data.store, "clean_corpus", clean_and_change)
        with pytest.raises(TextgenError) as caught:
            prepare(corpus, tmp_path / "cache", TokenizerConfig(path=str(path)))
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)
        assert [path.name for path in (tmp_path / "cache").iterdir()] == ["prepare.lock"]


def test_a_document_that_is_lost_in_a_thread_is_named_and_leaves_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utf8_of = Tokenizer.utf8_of

    def lose(self: Tokenizer, ids: np.ndarray[Any, Any]) -> tuple[bytes, np.ndarray[Any, Any]]:
        utf8, ends = utf8_of(self, ids)
        return utf8.replace(b"150: ", b"150; "), ends

    monkeypatch.setattr(textgen.data.store, "ENCODE_BATCH", 16)
    monkeypatch.setattr(Tokenizer, "utf8_of", lose)
    with pytest.raises(TextgenError, match=r"^the tokenizer loses text of the document that starts '150: "):
        prepare(corpus, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["prepare.lock"]


def test_ctrl_c_while_encoding_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    corpus, cache = write_corpus(tmp_path / "reviews.jsonl", make_texts(60_000)), tmp_path / "cache"
    process = start_preparing(corpus, cache)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in cache.glob("*.tmp/train.tokens.*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, logged = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT
    assert logged.splitlines()[-1] == "KeyboardInterrupt"
    assert {path.name for path in cache.rglob("*")} == {"prepare.lock"}


# --- memory ----------------------------------------------------------------------------------------------------------

PREPARE_AND_TELL_MEMORY = """
import re, sys
from pathlib import Path
from textgen.config import DataConfig, TokenizerConfig
from textgen.data.store import prepare_store
data = DataConfig(source="files", files=(sys.argv[1],), cache_dir=sys.argv[2], shards=int(sys.argv[4]) or None)
prepare_store(data, TokenizerConfig(path=sys.argv[3]), progress=False)
print(re.findall("VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(("shards", "fewer"), [(0, 3), (1, 12)])  # megabytes; blocks smaller than a batch need less
def test_much_more_text_is_prepared_in_the_same_memory(tmp_path: Path, shards: int, fewer: int) -> None:
    char_tokenizer().save(tmp_path / MODEL_NAME)
    long = " ".join(make_texts(20, seed=1))
    peaks = []
    for megabytes in (fewer, 30):
        texts = [f"{number}: {long}" for number in range(megabytes * 1_000_000 // len(long.encode()))]
        corpus = write_corpus(tmp_path / f"{megabytes}.jsonl", texts)
        argv = [sys.executable, "-c", PREPARE_AND_TELL_MEMORY, corpus, tmp_path / "cache", tmp_path / MODEL_NAME]
        argv.append(str(shards))
        told = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
        peaks.append(int(told.stdout) / 1000)
    assert peaks[1] - peaks[0] < 15, peaks


def make_large_store(small: TokenStore, directory: Path, num_tokens: int) -> int:
    """Make a store of documents of 200 to 399 tokens, all of them `<unk>`; return their number.

    The tokens are a hole in a sparse file. Offsets are written for real, a block at a time.
    """
    shutil.copytree(small.directory, directory)
    for path in directory.glob("validation.*"):
        path.unlink()
    draw, written, documents = np.random.default_rng(0), 0, 0
    with (
        open(directory / "train.offsets.int64", "wb") as offsets,
        open(directory / "train.bytes.uint32", "wb") as num_bytes,
    ):
        offsets.write(np.int64(0).tobytes())
        while written < num_tokens:
            ends = written + np.cumsum(draw.integers(200, 400, size=100_000))
            ends = ends[: int(np.searchsorted(ends, num_tokens)) + 1]
            ends[-1] = min(ends[-1], num_tokens)
            offsets.write(ends.astype(np.int64).data)
            num_bytes.write(np.full(len(ends), 1200, dtype=np.uint32).data)
            written, documents = int(ends[-1]), documents + len(ends)
    (directory / "train.tokens.uint16").write_bytes(b"")
    os.truncate(directory / "train.tokens.uint16", num_tokens * 2)
    sizes = {"documents": documents, "tokens": num_tokens, "bytes": documents * 1200}
    record = small.record | {"key": "large", "splits": {"train": sizes}}
    (directory / "store.json").write_text(json.dumps(record))
    return documents


def anonymous_memory(pid: int) -> float:
    """Return a process's RssAnon in MB: what is its own, not pages of mapped files."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) / 1000


def train_and_watch(store: Path, run_dir: Path, *, steps: int) -> tuple[float, float, float]:
    """Train on a store; return RssAnon in MB at step 1, at step `steps`, and the highest seen up to then."""
    command = [
        sys.executable, str(ROOT / "train_distributed.py"), "--data.store", str(store), "--run_dir", str(run_dir),
        "--model.embedding_dim", "8", "--model.hidden_size", "16", "--batch_size", "64", "--seq_len", "32",
        "--max_steps", str(3 * steps), "--log_every", "1", "--mixed_precision", "no", "--tracking.mode", "disabled",
        "--sample_prompts", "[]",
    ]  # fmt: skip
    metrics = run_dir / "metrics.jsonl"
    log = run_dir.with_suffix(".log")
    seen: dict[int, float] = {}
    highest = 0.0
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        try:
            while steps not in seen:
                time.sleep(0.01)
                assert process.poll() is None, log.read_text()
                now = anonymous_memory(process.pid)
                highest = max(highest, now)
                step = metrics.read_text().count('"step"') if metrics.exists() else 0
                if step:
                    seen.setdefault(1, now)
                if step >= steps:
                    seen[steps] = now
            process.terminate()
            process.wait(timeout=60)
        finally:
            process.kill()
            process.wait()
    return seen[1], seen[steps], highest


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_two_billion_tokens_train_in_the_memory_of_a_few(corpus: Path, tmp_path: Path) -> None:
    small = prepare(write_corpus(corpus, make_texts(5000)), tmp_path / "cache", validation_fraction=0)
    documents = make_large_store(small, tmp_path / "large", 2_000_000_000)
    assert documents > 6_600_000
    assert TokenStore.open(tmp_path / "large").split("train").num_tokens == 2_000_000_000
    try:
        few = train_and_watch(small.directory, tmp_path / "run-small", steps=100)
        many = train_and_watch(tmp_path / "large", tmp_path / "run-large", steps=100)
    finally:
        shutil.rmtree(tmp_path / "large")
    report = (
        f"RssAnon at step 1, at step 100, highest, in MB: "
        f"{few[0]:.0f}, {few[1]:.0f}, {few[2]:.0f} with {small.split('train').num_tokens} tokens; "
        f"{many[0]:.0f}, {many[1]:.0f}, {many[2]:.0f} with 2e9 tokens in {documents} documents"
    )
    print(report)
    assert many[1] - many[0] < 50, report
    assert textgen.data.lanes._document_order(1, 0, documents).nbytes == 4 * documents
    # 12 bytes a document while the permutation is made, in 4 of which it stays; glibc keeps the other 8 for activations
    assert many[2] - few[2] < 12e-6 * documents + 20, report
