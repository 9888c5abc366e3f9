"""Files of object storage are fetched and sent whole, also from storage that fails; its faults end in one line."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import fsspec.config
import pytest
from s3fs import S3FileSystem

from tests.object_storage import SECRET, Faults, ObjectStorage
from textgen.errors import TextgenError
from textgen.storage import remote_folder
from textgen.storage.remote_folder import MissingFileError, RemoteFolder, StorageError

CONTENT = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def address(object_storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a folder in a bucket with one file."""
    monkeypatch.setattr(remote_folder, "FIRST_WAIT_SECONDS", 0.02)
    address = f"s3://bucket-{tmp_path.name.replace('_', '-').lower()[:40]}/folder"
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / "file").write_bytes(CONTENT)
    object_storage.send(tmp_path / "sent", address)
    return address


def test_what_is_sent_is_fetched_listed_and_deleted(address: str, tmp_path: Path) -> None:
    folder = RemoteFolder(address)
    for name in ("file", "deep/er/file2"):
        folder.send(tmp_path / "sent" / "file", name)
    folder.fetch("deep/er/file2", tmp_path / "fetched", size=len(CONTENT), sha256=SHA256)
    assert (tmp_path / "fetched").read_bytes() == CONTENT
    assert folder.read("file", limit=len(CONTENT)) == CONTENT
    assert folder.names() == ["deep/er/file2", "file"]
    assert folder.names("deep") == ["deep/er/file2"]
    assert folder.names("none") == []
    folder.delete("deep/er/file2")
    folder.delete("deep/er/file2")
    assert folder.names() == ["file"]


def test_these_tests_need_no_settings_of_a_developer(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profile, another endpoint, a proxy and settings of fsspec would lead elsewhere."""
    nowhere = "http://127.0.0.1:9"
    for name in ("AWS_ENDPOINT_URL_S3", "http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, nowhere)
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setattr(fsspec.config, "conf", {"s3": {"anon": True, "endpoint_url": nowhere}})
    assert RemoteFolder(request.getfixturevalue("address"), patience=0.2).names() == ["file"]


def test_a_folder_of_a_shared_disk_has_an_address_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    folder = RemoteFolder(f"file://{tmp_path}/remote")
    folder.send(tmp_path / "file", "deep/file")
    folder.fetch("deep/file", tmp_path / "fetched", sha256=SHA256)
    assert (tmp_path / "fetched").read_bytes() == CONTENT
    assert folder.names() == ["deep/file"]
    folder.delete("deep/file")
    assert folder.names() == []


@pytest.mark.parametrize(
    "faults",
    [
        Faults(refused=True, count=2),
        Faults(status=500, count=2),
        Faults(status=503, count=2),
        Faults(cut=True, count=2),
        Faults(lies=True, count=2),
    ],
    ids=["killed", "500", "503", "cut", "lies"],
)
def test_failures_that_pass_are_tried_again(
    faults: Faults, address: str, object_storage: ObjectStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    object_storage.faults = faults
    with caplog.at_level(logging.WARNING, logger="textgen"):
        RemoteFolder(address).fetch("file", tmp_path / "fetched", size=len(CONTENT), sha256=SHA256)
    assert (tmp_path / "fetched").read_bytes() == CONTENT
    assert faults.count == 0
    assert len(caplog.messages) == 1
    assert "trying again" in caplog.messages[0]


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        (Faults(refused=True), ""),
        (Faults(silent=True), "timeout"),
        (Faults(status=500), "Internal Server Error"),
        (Faults(cut=True), ""),
        (Faults(lies=True), f"wanted {SHA256[:8]}"),
    ],
    ids=["killed", "silent", "500", "cut", "lies"],
)
def test_failures_that_last_end_in_one_line_and_leave_what_was_there(
    faults: Faults,
    reason: str,
    address: str,
    object_storage: ObjectStorage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if faults.silent:
        monkeypatch.setattr(remote_folder, "SILENT_SECONDS", 0.5)
    (tmp_path / "fetched").write_bytes(b"before")
    object_storage.faults = faults
    with pytest.raises(StorageError) as failed:
        RemoteFolder(address, patience=0.5).fetch("file", tmp_path / "fetched", size=len(CONTENT), sha256=SHA256)
    assert reason in str(failed.value)
    assert f"`{address}/file` cannot be fetched, tried " in str(failed.value)
    assert "\n" not in str(failed.value)
    assert SECRET not in str(failed.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fetched", "sent"]
    assert (tmp_path / "fetched").read_bytes() == b"before"


def test_a_slow_answer_ends(
    address: str, object_storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_folder, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(remote_folder, "MIN_BYTES_PER_SECOND", 10_000_000)
    object_storage.faults = Faults(bytes_per_second=20_000)
    with pytest.raises(StorageError, match="slower than 10000 KB a second"):
        RemoteFolder(address, patience=0.1).fetch("file", tmp_path / "fetched", size=len(CONTENT))


def test_what_waiting_cannot_mend_is_said_at_once(
    address: str, object_storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RemoteFolder(address)
    for missing in (folder, RemoteFolder("s3://no-such-bucket/x")):
        with pytest.raises(MissingFileError, match=r"`s3://.*/missing` does not exist"):
            missing.fetch("missing", tmp_path / "fetched")
    with pytest.raises(StorageError, match="is longer than 10 bytes"):
        folder.read("file", limit=10)
    object_storage.faults = Faults(status=403)
    with pytest.raises(StorageError, match=r"cannot be fetched, access is denied"):
        folder.fetch("file", tmp_path / "fetched")
    object_storage.faults = Faults()
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match=r"access is denied: .*[Cc]redentials"):
        RemoteFolder(address).fetch("file", tmp_path / "fetched")
    S3FileSystem.clear_instance_cache()  # the tests that follow have credentials


def test_a_full_disk_is_named_at_once(address: str, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("256k")
    with pytest.raises(OSError, match="No space left on device") as failed:
        RemoteFolder(address).fetch("file", disk / "fetched", size=len(CONTENT))
    assert failed.value.filename == str(disk / "fetched")
    assert list(disk.iterdir()) == []


def test_a_folder_of_this_disk_that_is_missing_is_no_fault_of_storage(address: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as failed:
        RemoteFolder(address).fetch("file", tmp_path / "none" / "fetched")
    assert failed.value.filename == str(tmp_path / "none" / "fetched")
    with pytest.raises(FileNotFoundError):
        RemoteFolder(address).send(tmp_path / "none", "file2")


@pytest.mark.parametrize("name", ["", "/file", "../file", "a/../../file", "a\\b", "a\nb"])
@pytest.mark.parametrize("use", ["fetch", "send", "delete"])
def test_names_that_lead_out_of_the_folder_are_refused(name: str, use: str, tmp_path: Path) -> None:
    (tmp_path / "local").touch()
    folder = RemoteFolder(f"file://{tmp_path}/folder")
    uses: dict[str, Callable[[], None]] = {
        "fetch": lambda: folder.fetch(name, tmp_path / "local"),
        "send": lambda: folder.send(tmp_path / "local", name),
        "delete": lambda: folder.delete(name),
    }
    with pytest.raises(StorageError, match="is not the name of a file in"):
        uses[use]()
    assert [path.name for path in tmp_path.iterdir()] == ["local"]


@pytest.mark.parametrize(("protocol", "package"), [("gs", "gcsfs"), ("az", "adlfs")])
def test_a_missing_package_is_named(protocol: str, package: str) -> None:
    with pytest.raises(TextgenError, match=f"`{protocol}://` needs `{package}`: run `pip install {package}`"):
        RemoteFolder(f"{protocol}://bucket/x")
