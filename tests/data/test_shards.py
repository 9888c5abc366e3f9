"""A store in shards: its files, the order in which a training reads it, and preparing it by several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from textgen.data.lanes import Course, Epoch, LaneSampler, build_loader
from textgen.data.shards import Shard, Shards
from textgen.data.split import Split
from textgen.errors import TextgenError
from textgen.noise import permutation
from textgen.runs.tensors import serialize


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
    opened = [course.open(course.find(step))._order.tolist() for step in range(0, 2 * course.per_epoch, 39)]
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
