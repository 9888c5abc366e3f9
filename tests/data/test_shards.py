"""A store in shards: its files, the order in which a training reads it, and preparing it by several processes."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import textgen.data.sharding
from tests.data.test_store import CHAR, ROOT, make_texts, texts_of, write_corpus
from textgen.config import DataConfig, SourceConfig, TokenizerConfig
from textgen.data.corpus import clean_corpus, open_corpus
from textgen.data.lanes import Course, Epoch, LaneSampler, build_loader
from textgen.data.sharding import _Work
from textgen.data.shards import Shard, Shards
from textgen.data.split import Split
from textgen.data.store import TokenStore, prepare_store
from textgen.data.texts import read_split
from textgen.errors import TextgenError
from textgen.noise import permutation
from textgen.runs.tensors import serialize
from textgen.tokenizer import Tokenizer, train_tokenizer


def write_shard(directory: Path, index: int, split: Split) -> Shard:
    arrays = {"tokens": split.tokens, "offsets": split.offsets, "bytes": split.num_bytes}
    if split.begin_ids is not None:
        arrays["begins"] = split.begin_ids
    path = directory / f"train-{index:05}.safetensors"
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    path.write_bytes(b"".join(serialize(tensors)))
    return Shard(path.name, path.stat().st_size, "0" * 64, split.num_documents, split.num_tokens, 0)


def make_shards(directory: Path, lengths: list[list[int]], *, with_labels: bool = False) -> tuple[Shards, list[Split]]:
    """Write shards of documents whose tokens are all different."""
    splits, token = [], 0
    for of_shard in lengths:
        offsets = np.cumsum([0, *of_shard], dtype=np.int64)
        tokens = np.arange(token, token + offsets[-1], dtype=np.uint32)
        begins = np.arange(len(of_shard), dtype=np.uint32) + 1_000_000 if with_labels else None
        splits.append(Split(tokens, offsets, np.ones(len(of_shard), dtype=np.uint32), begins))
        token += int(offsets[-1])
    records = [write_shard(directory, index, split) for index, split in enumerate(splits)]
    return Shards(directory, records, dtype="uint32", has_labels=with_labels), splits


def read(shards: Shards | Split, steps: range, *, batch_size: int = 3, micro_batches: int = 1) -> list[dict[str, Any]]:
    sampler = LaneSampler(batch_size=batch_size, micro_batches=micro_batches, steps=steps)
    return list(build_loader(shards, sampler, seq_len=4, seed=7))


LENGTHS = [[5, 9, 30, 2], [20, 21], [7] * 12, [60]]


def test_a_shard_is_mapped_as_it_was_written(tmp_path: Path) -> None:
    shards, splits = make_shards(tmp_path, LENGTHS, with_labels=True)
    for index, split in enumerate(splits):
        mapped = shards.split(index)
        for name in ("tokens", "offsets", "num_bytes", "begin_ids"):
            assert getattr(mapped, name).dtype == getattr(split, name).dtype
            assert np.array_equal(getattr(mapped, name), getattr(split, name))
    assert shards.first_documents.tolist() == [0, 4, 6, 18]


def test_an_epoch_reads_each_shard_as_a_split_is_read(tmp_path: Path) -> None:
    shards, splits = make_shards(tmp_path, LENGTHS)
    course = Course(shards, batch_size=3, seq_len=4, seed=7)
    for number in range(3):
        expected = []
        for index in permutation(7, number, 4).tolist():
            order = permutation(7, number, splits[index].num_documents, shard=index)
            stream = np.concatenate([splits[index].document(document) for document in order.tolist()])
            length = (len(stream) - 1) // 3
            for window in range(length // 4):
                expected.append([stream[lane * length + window * 4 :][:5] for lane in range(3)])
        steps = range(number * course.per_epoch, (number + 1) * course.per_epoch)
        batches = read(shards, steps)
        assert len(expected) == len(batches) == course.per_epoch
        for batch, rows in zip(batches, expected, strict=True):
            assert np.array_equal(batch["tokens"], np.stack(rows)[:, :-1])
            assert np.array_equal(batch["targets"], np.stack(rows)[:, 1:])


def test_orders_differ_by_epoch_and_by_shard(tmp_path: Path) -> None:
    shards, _ = make_shards(tmp_path, [[8] * 40] * 6)
    course = Course(shards, batch_size=2, seq_len=4, seed=7)
    assert len({tuple(course._order(epoch).tolist()) for epoch in range(5)}) > 3
    opened = [course.epoch_at(course.find(step))._order.tolist() for step in range(0, 2 * course.per_epoch, 39)]
    assert len({tuple(order) for order in opened}) == len(opened) == 12


@pytest.mark.parametrize("first", [0, 1, 10, 17, 30])
def test_reading_goes_on_at_any_step_and_in_any_cut(tmp_path: Path, first: int) -> None:
    shards, _ = make_shards(tmp_path, LENGTHS, with_labels=True)
    whole = read(shards, range(50), batch_size=4)
    for step, batch in enumerate(read(shards, range(first, 50), batch_size=4), start=first):
        for name in batch:
            assert torch.equal(batch[name], whole[step][name])
    halves = read(shards, range(first, 50), batch_size=4, micro_batches=2)
    for step in range(first, 50):
        two = halves[2 * (step - first) :][:2]
        assert torch.equal(torch.cat([half["tokens"] for half in two]), whole[step]["tokens"])


def test_the_next_shards_are_named_before_a_shard_is_read(tmp_path: Path) -> None:
    class Watched(Shards):
        seen: list[tuple[int, list[int]]]

        def expect(self, indices: Any) -> None:
            self.following = list(indices)

        def path(self, index: int) -> Path:
            self.seen.append((index, self.following))
            return super().path(index)

    plain, _ = make_shards(tmp_path, LENGTHS)
    shards = Watched(tmp_path, plain.records, dtype="uint32", has_labels=False)
    shards.seen = []
    per_epoch = Course(shards, batch_size=3, seq_len=4, seed=7).per_epoch
    read(shards, range(3 * per_epoch))
    read_in_order = [index for index, _ in shards.seen]
    assert read_in_order == [i for epoch in range(3) for i in permutation(7, epoch, 4).tolist()], "each once"
    for place, (_, following) in enumerate(shards.seen[:8]):
        assert following[:4] == read_in_order[place + 1 :][:4]


def test_labels_are_kept_by_the_number_of_the_document_in_the_split(tmp_path: Path) -> None:
    shards, _ = make_shards(tmp_path, [[3] * 300, [3] * 300], with_labels=True)
    without = []
    for index in range(2):
        epoch = Epoch(
            shards.split(index), batch_size=1, seq_len=899, seed=7, epoch=0, shard=index,
            first_document=int(shards.first_documents[index]),
        )  # fmt: skip
        inputs, _ = epoch.windows([0], 0)
        begins = inputs[inputs >= 1_000_000].tolist()
        without.append(set(range(1_000_000, 1_000_300)) - set(begins))
    assert all(15 < len(its) < 60 for its in without), "about a tenth"
    assert without[0] != without[1]


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    shards, _ = make_shards(tmp_path, LENGTHS)
    path = tmp_path / "train-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(TextgenError, match=r"is damaged: \d+ bytes, wanted \d+"):
        shards.split(1)
    path.write_bytes(whole.replace(b'"U32"', b'"I32"'))
    with pytest.raises(TextgenError, match="holds other arrays than a shard"):
        shards.split(1)
    path.unlink()
    with pytest.raises(TextgenError, match="is damaged: 0 bytes"):
        shards.split(1)


def test_a_shard_that_is_too_small_for_the_batch_is_refused(tmp_path: Path) -> None:
    shards, _ = make_shards(tmp_path, LENGTHS)
    with pytest.raises(
        TextgenError, match=r"shard `train-00001.safetensors`: 41 tokens are too few .* or fewer shards"
    ):
        Course(shards, batch_size=11, seq_len=4, seed=0)


# --- preparing ---


@pytest.fixture(autouse=True)
def synced() -> Iterator[dict[str, list[str]]]:
    """The files that were to be synced, of each block or split: 300 blocks would wait half a minute for a busy disk."""
    seen = {}

    def note(folder: Path) -> None:
        result = folder.name.partition(".")[0]
        assert not folder.with_name(result).exists()
        seen[result] = sorted(path.name for path in folder.iterdir())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textgen.data.sharding, "_sync_files", note)
        yield seen


def prepare(corpus: Path, cache: Path, tokenizer: TokenizerConfig = CHAR, **data: Any) -> TokenStore:
    settings = DataConfig(source="files", files=(str(corpus),), cache_dir=str(cache), **data)
    return prepare_store(settings, tokenizer, progress=False)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Some texts, among them repetitions, empty ones and some that validation holds out."""
    texts = make_texts(300)
    return write_corpus(tmp_path / "reviews.jsonl", [*texts, "", *texts[100:130], *make_texts(100, seed=5)])


@pytest.mark.parametrize("num_shards", [1, 3, 64])
@pytest.mark.parametrize("normalization", ["none", "lowercase"])
def test_shards_hold_the_documents_of_a_whole_store(
    corpus: Path, tmp_path: Path, num_shards: int, normalization: Any
) -> None:
    whole = prepare(corpus, tmp_path / "cache", normalization=normalization)
    store = prepare(corpus, tmp_path / "cache", normalization=normalization, shards=num_shards)
    assert (store.order, whole.order) == ("shards", "documents")
    assert store.key != whole.key
    assert store.training_key != whole.training_key
    for name in ("digests", "counts", "splits", "tokenizer", "dtype", "normalization", "vocab_size"):
        assert store.record[name] == whole.record[name], name
    assert Counter(read_split(store, "train")) == Counter(read_split(whole, "train"))
    assert texts_of(store, "validation") == texts_of(whole, "validation")
    assert torch.equal(store.unigram_counts, whole.unigram_counts)
    assert store.shards is not None
    assert len(store.shards) == num_shards
    sizes = [shard.tokens for shard in store.shards.records]
    assert max(sizes) < 3 * min(sizes) or num_shards == 64
    assert sorted(path.name for path in store.directory.iterdir()) == sorted(
        ["store.json", "tokenizer.model", "unigram.int64", *(shard.name for shard in store.shards.records)]
        + [f"validation.{name}" for name in ("tokens.uint16", "offsets.int64", "bytes.uint32")]
    )
    assert not list((tmp_path / "cache").glob("*.work"))
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 2


def test_each_shard_is_a_sample_of_the_whole_text(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "reviews.jsonl", [f"text number {i} of this file" for i in range(800)])
    store = prepare(corpus, tmp_path / "cache", shards=4, validation_fraction=0)
    for split in store.parts("train"):
        numbers = [int(store.tokenizer.decode(split.document(i).tolist()).split()[2]) for i in range(200)]
        assert numbers == sorted(numbers)
        for first in range(0, 800, 100):
            assert sum(first <= number < first + 100 for number in numbers) == 25


def test_the_same_text_elsewhere_is_the_same_store_in_shards(corpus: Path, tmp_path: Path) -> None:
    one, two = (prepare(corpus, tmp_path / cache, shards=3) for cache in ("one", "two"))
    assert one.key == two.key
    assert one.record == two.record, "sizes and hashes of the shards too"
    moved = corpus.rename(tmp_path / "others.jsonl")
    again = prepare(moved, tmp_path / "one", shards=3)
    assert again.directory == one.directory
    assert prepare(moved, tmp_path / "one", shards=4).key != one.key


def test_labels_follow_their_documents_into_shards(tmp_path: Path) -> None:
    path = tmp_path / "labelled.jsonl"
    rows = [{"text": text, "label": ["low", None, "high"][i % 3]} for i, text in enumerate(make_texts(300))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stores = [prepare(path, tmp_path / "cache", shards=shards, label_column="label") for shards in (None, 5)]
    assert stores[0].record["label_digests"] == stores[1].record["label_digests"]
    pairs = [Counter((text, text.label) for text in read_split(store, "train")) for store in stores]  # type: ignore[attr-defined]
    assert pairs[0] == pairs[1]
    assert {label for _, label in pairs[1]} == {"low", "high", None}


def test_the_end_of_a_long_document_is_held_out_of_shards_too(tmp_path: Path) -> None:
    long = " ".join(f"chapter {i} of a long book" for i in range(400))
    corpus = write_corpus(tmp_path / "book.jsonl", [*make_texts(60), long])
    whole, store = (prepare(corpus, tmp_path / "cache", shards=shards) for shards in (None, 4))
    assert texts_of(store, "validation") == texts_of(whole, "validation")
    assert "chapter 399" in "".join(texts_of(store, "validation"))
    assert Counter(read_split(store, "train")) == Counter(read_split(whole, "train"))


PREPARE_SHARDS = """
import logging, os, sys, time
from textgen.config import DataConfig, TokenizerConfig
from textgen.data import sharding
from textgen.data.store import prepare_store
logging.basicConfig(level=logging.INFO, format='%(message)s')
stop_at, corpus, cache, shards = sys.argv[1:]
sharding._sync_files = lambda folder: None
write = sharding.write_split
num_written = 0
def write_and_stop(directory, name, *args, **kwargs):  # stops while it holds a claim, with a block half written
    global num_written
    sizes = write(directory, name, *args, **kwargs)
    num_written += 1
    if num_written == int(stop_at):
        print('stopped', flush=True)
        time.sleep(600)
    return sizes
sharding.write_split = write_and_stop
text = dict(dataset=corpus, streaming=True) if os.path.isdir(corpus) else dict(source='files', files=(corpus,))
data = DataConfig(**text, cache_dir=cache, shards=int(shards))
print(prepare_store(data, TokenizerConfig(model_type='char', vocab_size=400), progress=False).key)
"""


def start(corpus: Path, cache: Path, *, stop_at: int = -1, shards: int = 6) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE_SHARDS, str(stop_at), str(corpus), str(cache), str(shards)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def kill_stopped(process: subprocess.Popen[str]) -> None:
    """Kill a preparation when it holds the claim at which `start` lets it stop."""
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped\n", process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)


def test_four_processes_of_which_two_are_killed_make_the_store_of_one(corpus: Path, tmp_path: Path) -> None:
    alone = prepare(corpus, tmp_path / "alone", shards=6)
    cache = tmp_path / "cache"
    killed = [start(corpus, cache, stop_at=stop_at) for stop_at in (2, 3)]
    said = [process.stdout.readline() for process in killed if process.stdout]  # both hold a claim from now on
    assert said == ["stopped\n"] * 2, [process.communicate() for process in killed]
    others = [start(corpus, cache) for _ in range(2)]
    deadline = time.monotonic() + 120
    while len(list(cache.glob("*.work/parts/block-???????"))) < 45:  # of some 50, one of which is held
        assert time.monotonic() < deadline, [process.poll() for process in others]
        time.sleep(0.02)
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    ended = [process.communicate(timeout=120) for process in others]
    assert [process.returncode for process in others] == [0, 0], ended
    assert ended[0][0] == ended[1][0] == f"{alone.key}\n"
    store = prepare(corpus, cache, shards=6)
    assert store.record == alone.record
    for path in alone.directory.iterdir():
        assert path.read_bytes() == (store.directory / path.name).read_bytes(), path.name
    assert sorted(path.name for path in cache.iterdir()) == sorted(["index", "prepare.lock", store.directory.name])


def test_what_a_killed_preparation_has_done_stays_done(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_stopped(start(corpus, tmp_path / "cache", stop_at=20))
    blocks = list((tmp_path / "cache").glob("*.work/parts/block-???????"))
    assert len(blocks) == 18  # after the validation split; the last one was not finished
    written = []

    def watched(directory: Path, *args: Any, **kwargs: Any) -> dict[str, int]:
        written.append(directory.name.partition(".")[0])
        return write(directory, *args, **kwargs)

    def refuse(*args: Any) -> None:
        raise AssertionError("the text was cleaned again")

    write = textgen.data.sharding.write_split
    monkeypatch.setattr(textgen.data.sharding, "write_split", watched)
    monkeypatch.setattr(textgen.data.sharding, "clean_corpus", refuse)
    (blocks[0].parents[1] / ".train-00001.safetensors.331b0db6").touch()  # of one that is killed while it joins blocks
    store = prepare(corpus, tmp_path / "cache", shards=6)
    documents = store.record["splits"]["train"]["documents"]
    num_blocks = -(-documents // (documents // 48))
    assert sorted([*written, *(block.name for block in blocks)]) == [f"block-{i:07}" for i in range(num_blocks)]
    assert not list(store.directory.glob(".*"))


def test_blocks_and_splits_are_on_disk_before_they_have_their_names(
    corpus: Path, tmp_path: Path, synced: dict[str, list[str]]
) -> None:
    prepare(corpus, tmp_path / "cache", shards=1)
    files = ["train.bytes.uint32", "train.offsets.int64", "train.tokens.uint16"]
    blocks = {f"block-{number:07}": ["hashes", "sums.json", *files, "unigram.int64"] for number in range(9)}
    assert synced == blocks | {"validation": [name.replace("train", "validation") for name in files]}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [cut, zero, Path.unlink])
def test_what_a_disk_has_lost_of_a_killed_preparation_is_encoded_again(
    corpus: Path, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    alone = prepare(corpus, tmp_path / "alone", shards=6)
    kill_stopped(start(corpus, tmp_path / "cache", stop_at=20))
    work = next((tmp_path / "cache").glob("*.work"))
    names = ("train.tokens.uint16", "train.offsets.int64", "train.bytes.uint32", "unigram.int64", "hashes", "sums.json")
    damaged = [work / "parts" / f"block-{number:07}" / name for number, name in enumerate(names)]
    damaged += [work / "validation.tokens.uint16"]
    for path in damaged:
        damage(path)
    with caplog.at_level(logging.WARNING, logger="textgen"):
        store = prepare(corpus, tmp_path / "cache", shards=6)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(damaged)
    assert all("damaged: encoding" in message for message in warnings)
    assert store.record == alone.record
    for path in alone.directory.iterdir():
        assert path.read_bytes() == (store.directory / path.name).read_bytes(), path.name


def test_the_work_of_other_preparations_is_named(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache" / "0123.work" / "parts").mkdir(parents=True)
    (tmp_path / "cache" / "0123.work" / "parts" / "file").write_bytes(bytes(2_500_000))
    with caplog.at_level(logging.INFO, logger="textgen"):
        prepare(corpus, tmp_path / "cache", shards=3)
    (said,) = (message for message in caplog.messages if ".work" in message)
    assert "0123.work` holds 0.0025 GB of a preparation that has not ended" in said


def test_the_work_on_many_shards_is_listed_once(corpus: Path, tmp_path: Path) -> None:
    data = DataConfig(source="files", files=(str(corpus),), cache_dir=str(tmp_path), shards=40)
    work = _Work(tmp_path / "store", "key", clean_corpus(open_corpus(data), data), 40)
    assert work.blocks is work.blocks
    assert work.shards is work.shards


@pytest.mark.parametrize("given", [False, True])
def test_text_that_changes_in_silence_makes_no_store(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    """As many bytes, and the same time: no process can see it before it has read the text."""
    saved = textgen.data.sharding.save_plan

    def save_and_change(*given: Any) -> None:
        saved(*given)
        before = corpus.stat()
        corpus.write_text(corpus.read_text().replace("good", "mild", 1))
        os.utime(corpus, ns=(before.st_atime_ns, before.st_mtime_ns))

    monkeypatch.setattr(textgen.data.sharding, "save_plan", save_and_change)
    tokenizer = CHAR
    if given:  # else its training reads the text first
        Tokenizer(train_tokenizer(make_texts(), vocab_size=300, model_type="char")).save(tmp_path / "tokenizer.model")
        tokenizer = TokenizerConfig(path=str(tmp_path / "tokenizer.model"))
    with pytest.raises(TextgenError, match=f"changed while it was {'encoded' if given else 'read'}"):
        prepare(corpus, tmp_path / "cache", tokenizer, shards=44)  # blocks of one document: no pass reads on to the end
    assert not list((tmp_path / "cache").glob("*/store.json"))
    monkeypatch.undo()
    store = prepare(corpus, tmp_path / "cache", tokenizer, shards=44)
    assert any("mild" in text for text in [*read_split(store, "train"), *texts_of(store, "validation")])


def test_a_damaged_store_in_shards_is_made_again(corpus: Path, tmp_path: Path) -> None:
    store = prepare(corpus, tmp_path / "cache", shards=3)
    (store.directory / "train-00001.safetensors").unlink()
    with pytest.raises(TextgenError, match=r"train-00001.safetensors` is damaged: 0 bytes"):
        TokenStore.open(store.directory)
    assert prepare(corpus, tmp_path / "cache", shards=3).record == store.record


@pytest.mark.parametrize(
    "damage",
    [
        {"order": "spiral"},
        {"shards": [{"name": "train-00000.safetensors"}]},
        {"shards": "many"},
        {"shards": None},
        {"shards": [asdict(Shard("../../etc/passwd", 1, "0" * 64, 1, 1, 1))]},
    ],
)
def test_a_record_that_is_damaged_is_refused_in_one_line(corpus: Path, tmp_path: Path, damage: dict[str, Any]) -> None:
    store = prepare(corpus, tmp_path / "cache", shards=3)
    (store.directory / "store.json").write_text(json.dumps(store.record | damage))
    with pytest.raises(TextgenError) as error:
        TokenStore.open(store.directory)
    assert "\n" not in str(error.value)


def test_more_shards_than_documents_are_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "few.jsonl", make_texts(10))
    with pytest.raises(TextgenError, match=r"`data.shards` is 64, and there are 9 documents to train on"):
        prepare(corpus, tmp_path / "cache", shards=64)


def test_wrong_numbers_of_shards_and_several_sources_are_refused() -> None:
    for wrong in (0, -1, 10_001):
        with pytest.raises(ValueError, match=rf"`shards` must be from 1 to 10000: {wrong}"):
            DataConfig(shards=wrong)
    one = SourceConfig(name="a", weight=1.0, files=("a.txt",))
    with pytest.raises(ValueError, match="`shards` is for one source, and there are 1 `sources`: leave one out"):
        DataConfig(shards=2, sources=(one,))
