"""A store at an address: the same batches as of a local one, through a bounded cache, whatever the storage does."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.object_storage import Faults, ObjectStorage
from textgen.config import DataConfig
from textgen.data import remote
from textgen.data.lanes import Course, LaneSampler, build_loader
from textgen.data.remote import RemoteShards
from textgen.data.shards import Shard
from textgen.data.store import TokenStore, open_store
from textgen.errors import TextgenError
from textgen.storage import remote_folder
from textgen.storage.remote_folder import RemoteFolder, StorageError

SHARDS = 8
STEPS = range(180)  # more than three epochs


@pytest.fixture
def address(sharded: TokenStore, object_storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of that store in the object storage of the test."""
    monkeypatch.setattr(remote_folder, "FIRST_WAIT_SECONDS", 0.02)
    object_storage.send(sharded.directory, "s3://stores/reviews")
    return "s3://stores/reviews"


Open = Callable[..., TokenStore]


@pytest.fixture
def open_remote(address: str, sharded: TokenStore, tmp_path: Path) -> Iterator[Open]:
    """Open the store at the address, with a cache of some shards."""

    def open_it(shards: float = SHARDS) -> TokenStore:
        assert sharded.shards is not None
        size = max(record.size for record in sharded.shards.records)
        return open_store(
            DataConfig(store=address, cache_dir=str(tmp_path / "cache"), store_cache_gib=(shards * size + 1) / 2**30)
        )

    yield open_it
    for thread in threading.enumerate():
        if thread.name == "fetch-shards":
            thread.join()


def batches(store: TokenStore, steps: range = STEPS) -> Iterator[dict[str, Any]]:
    sampler = LaneSampler(batch_size=16, micro_batches=1, steps=steps)
    return iter(build_loader(store.train, sampler, seq_len=32, seed=7))


def assert_same(ours: Iterator[dict[str, Any]], theirs: Iterator[dict[str, Any]]) -> None:
    count = 0
    for one, other in zip(ours, theirs, strict=True):
        count += 1
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert count > 10


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def cached(store: TokenStore) -> list[Path]:
    return list(store.directory.glob("*train-*"))


def gets(storage: ObjectStorage) -> list[str]:
    """Return the names of the shards that were asked for."""
    return [line.rpartition("/")[2] for line in list(storage.requests) if line.startswith("GET") and "train-" in line]


@pytest.mark.parametrize("shards", [2, 3.5, SHARDS])
def test_batches_are_those_of_a_local_store_within_the_cache(
    shards: float, open_remote: Open, sharded: TokenStore, object_storage: ObjectStorage
) -> None:
    store = open_remote(shards)
    assert Course(store.train, batch_size=16, seq_len=32, seed=7).per_epoch * 3 < len(STEPS)
    assert store.training_key == sharded.training_key
    assert isinstance(store.shards, RemoteShards)
    bound, most = store.shards._cache_bytes, 0

    def read() -> Iterator[dict[str, Any]]:
        nonlocal most
        for batch in batches(store):
            sizes = []
            for path in cached(store):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            most = max(most, sum(sizes))
            yield batch

    assert_same(read(), batches(sharded))
    assert most <= bound
    if shards == SHARDS:
        assert sorted(gets(object_storage)) == sorted(record.name for record in store.shards.records)
    else:
        assert len(gets(object_storage)) > SHARDS


def test_the_next_shards_come_while_one_is_read(open_remote: Open, object_storage: ObjectStorage) -> None:
    store = open_remote()
    next(batches(store))
    wait_until(lambda: len(cached(store)) == len(gets(object_storage)) == 1 + remote.AHEAD)
    order = Course(store.train, batch_size=16, seq_len=32, seed=7)._order(0).tolist()
    assert store.shards is not None
    assert gets(object_storage) == [store.shards.records[index].name for index in order[: 1 + remote.AHEAD]]


def test_a_second_process_fetches_nothing_again(
    open_remote: Open, sharded: TokenStore, object_storage: ObjectStorage
) -> None:
    opened: list[TokenStore] = []
    threads = [threading.Thread(target=lambda: opened.append(open_remote())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    readings = [list(batches(store, range(60))) for store in opened]
    assert_same(iter(readings[0]), iter(readings[1]))
    fetched = [line for line in object_storage.requests if line.startswith("GET") and "store.json" not in line]
    assert len(fetched) == len(set(fetched))


def test_storage_that_comes_back_is_read_on(
    open_remote: Open, sharded: TokenStore, object_storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_remote(2)

    def read() -> Iterator[dict[str, Any]]:
        for number, batch in enumerate(batches(store)):
            if number in (20, 60):
                object_storage.faults = Faults(refused=True, count=4)
            if number in (40, 80):
                object_storage.faults = Faults(lies=True, cut=number == 80, count=3)  # the fourth lie is the last
            yield batch

    assert_same(read(), batches(sharded))


@pytest.mark.parametrize(
    ("faults", "reason"),
    [(Faults(refused=True), ""), (Faults(lies=True), "sha256")],
    ids=["dead", "lies"],
)
def test_storage_that_fails_for_good_ends_in_one_line(
    faults: Faults, reason: str, open_remote: Open, object_storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_folder, "PATIENCE_SECONDS", 0.3)
    store = open_remote(2)
    object_storage.faults = faults
    with pytest.raises(TextgenError, match=r"`s3://stores/reviews/train-.*` cannot be fetched, tried ") as failed:
        list(batches(store))
    assert reason in str(failed.value)
    assert cached(store) == []


class Flaky(RemoteFolder):
    """A folder that gives a shard after some time, or breaks."""

    seconds, dead = 0.0, False

    def _download(self, name: str, path: Path, limit: int | None, longer: StorageError) -> None:
        time.sleep(self.seconds)
        if self.dead:
            raise ConnectionError("dead")
        path.write_bytes(name.encode())


def open_flaky(directory: Path, *, patience: float) -> RemoteShards:
    directory.mkdir(exist_ok=True)
    names = [f"train-{index:05}.safetensors" for index in range(10)]
    records = [Shard(name, len(name), hashlib.sha256(name.encode()).hexdigest(), 1, 1, 1) for name in names]
    folder = Flaky("file:///nowhere", patience=patience)
    return RemoteShards(folder, directory, records, dtype="uint16", has_labels=False, cache_bytes=1 << 20)


def read_until_it_fails(shards: RemoteShards) -> float:
    """Return how long the last shard was waited for."""
    for index in range(1, 10):
        shards.expect(range(index + 1, 10))
        started = time.monotonic()
        try:
            shards.path(index)
        except StorageError as error:
            assert str(error).endswith("dead")  # noqa: PT017
            return time.monotonic() - started
        time.sleep(0.1)
    raise AssertionError("storage was dead")


def test_storage_that_is_dead_ends_all_processes_after_one_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_folder, "FIRST_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(remote_folder, "LAST_WAIT_SECONDS", 0.3)
    ranks = [open_flaky(tmp_path / "cache", patience=1.0) for _ in range(4)]
    for shards in ranks:
        shards.expect(range(1, 5))
        shards.path(0)
    wait_until(lambda: len(list((tmp_path / "cache").glob("train-*"))) == 5)
    monkeypatch.setattr(Flaky, "dead", True)
    monkeypatch.setattr(Flaky, "seconds", 0.2)
    with ThreadPoolExecutor() as pool:
        waited = list(pool.map(read_until_it_fails, ranks))
    assert max(waited) < 6


def test_a_slow_transfer_of_another_process_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flaky, "seconds", 0.6)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / remote.FAILED_NAME).write_text("earlier\nof an outage that has ended")
    ranks = [open_flaky(tmp_path / "cache", patience=0.1) for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        paths = list(pool.map(lambda shards, index: shards.path(index), ranks, (7, 7, 8)))
    assert [path.read_bytes() for path in paths] == [path.name.encode() for path in paths]


def test_a_shard_that_others_delete_is_read_on(open_remote: Open) -> None:
    store = open_remote()
    assert store.shards is not None
    split = store.shards.split(3)
    expected = split.tokens.copy()
    for path in cached(store):
        path.unlink()
    assert (split.tokens == expected).all()
    assert (store.shards.split(3).tokens == expected).all()


def test_a_cache_is_opened_again_and_repaired(open_remote: Open, object_storage: ObjectStorage) -> None:
    directory = open_remote().directory
    for name in ("unigram.int64", "tokenizer.model"):
        (directory / name).unlink()
    (directory / ".train-00000.safetensors.of-a-killed-process").touch()
    object_storage.requests.clear()
    store = open_remote()
    assert store.directory == directory
    assert len(object_storage.requests) == 3  # store.json, and what was missing
    next(batches(store))
    assert not (directory / ".train-00000.safetensors.of-a-killed-process").exists()


def test_a_cache_too_small_for_two_shards_is_refused(open_remote: Open) -> None:
    with pytest.raises(TextgenError, match=r"`store_cache_gib` of .* is too small for two shards"):
        open_remote(1.5)


def test_lies_about_small_files_are_noticed(
    open_remote: Open, object_storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_folder, "PATIENCE_SECONDS", 0.1)
    for name in ("tokenizer.model", "unigram.int64", "validation.tokens.uint16"):
        object_storage.faults = Faults(lies=True, only=name)
        with pytest.raises(TextgenError, match=rf"`s3://stores/reviews/{name}` cannot be fetched, .*sha256"):
            open_remote()


def test_what_is_no_store_in_shards_is_refused(
    sharded: TokenStore, object_storage: ObjectStorage, tmp_path: Path
) -> None:
    whole = {name: value for name, value in sharded.record.items() if name not in ("order", "shards")}
    hostile = sharded.record | {"splits": {"../../outside": sharded.record["splits"]["validation"]}}
    cases: dict[str, tuple[bytes, str]] = {
        "whole": (json.dumps(whole | {"format": 2}).encode(), "is not in shards: make a store with `textgen prepare"),
        "newer": (json.dumps({"format": 4}).encode(), "format 4, wanted 2 or 3"),
        "noise": (b"\xff\x00", "is not a token store"),
        "deep": (b"[" * 100_000, "is not a token store"),
        "empty": (json.dumps({"format": 3, "order": "shards"}).encode(), "is damaged"),
        "hostile": (json.dumps(hostile).encode(), "does not exist"),
        "names": (
            json.dumps(sharded.record | {"shards": [sharded.record["shards"][0] | {"name": "../x"}]}).encode(),
            "is damaged: a record of a shard names '../x'",
        ),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "store.json").write_bytes(content)
        object_storage.send(tmp_path / name, f"s3://wrong/{name}")
        with pytest.raises(TextgenError) as refused:
            open_store(DataConfig(store=f"s3://wrong/{name}", cache_dir=str(tmp_path / "cache")))
        assert reason in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(TextgenError, match=r"`s3://wrong/none/store.json` does not exist"):
        open_store(DataConfig(store="s3://wrong/none", cache_dir=str(tmp_path / "cache")))
    assert list(tmp_path.rglob("*outside*")) == []


def test_a_store_of_a_shared_disk_is_read_in_place(sharded: TokenStore, tmp_path: Path) -> None:
    store = open_store(DataConfig(store=f"file://{sharded.directory}", cache_dir=str(tmp_path / "none")))
    assert store.directory == sharded.directory
    assert list(tmp_path.iterdir()) == []
