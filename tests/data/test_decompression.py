"""Compressed files are read like others; bombs, damaged and cut off files are refused by one line."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textgen.config import DataConfig
from textgen.data.decompression import decompress, split_compression
from textgen.data.documents import read_files
from textgen.data.tally import Tally
from textgen.errors import TextgenError

zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".zst": zstd.compress, ".xz": lzma.compress, ".bz2": bz2.compress,
}  # fmt: skip
ENDINGS = pytest.mark.parametrize("ending", COMPRESS)


def read(path: Path, **settings: Any) -> list[str]:
    return list(read_files([str(path)], DataConfig(**settings), Tally()))


def refusal(path: Path) -> str:
    with pytest.raises(TextgenError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@ENDINGS
def test_every_text_format_is_read_compressed(tmp_path: Path, ending: str) -> None:
    texts = {
        "a.txt": "one\né\n", "a.jsonl": '{"text": "one"}\n{"text": "é"}\n', "a.csv": "id,text\n1,one\n2,é\n",
        "a.tsv": "id\ttext\n1\tone\n2\té\n", "a.json": '[{"text": "one"}, {"text": "é"}]',
    }  # fmt: skip
    for name, text in texts.items():
        for mark in ("", "\ufeff"):
            path = tmp_path / (name.upper() + ending.upper() if mark else name + ending)
            path.write_bytes(COMPRESS[ending]((mark + text).encode()))
            assert read(path, txt_documents="line") == ["one", "é"], path


@ENDINGS
def test_members_that_follow_each_other_are_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.txt{ending}"
    compress = COMPRESS[ending]
    path.write_bytes(compress(b"one\ntw") + compress(b"") + compress(b"o\n") + compress(b"three"))
    assert read(path, txt_documents="line") == ["one", "two", "three"]
    # zeros after a member are padding
    path.write_bytes(compress(b"one") + bytes(512) + compress(b"two") + bytes(1 << 20))
    assert read(path) == ["onetwo"]


@ENDINGS
@given(members=st.lists(st.binary(max_size=4000), min_size=1, max_size=4))
def test_decompressed_bytes_are_those_that_were_compressed(
    tmp_path_factory: pytest.TempPathFactory, ending: str, members: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("members") / f"a.txt{ending}"
    path.write_bytes(b"".join(map(COMPRESS[ending], members)))
    with path.open("rb") as file:
        assert decompress(file, str(path)).read() == b"".join(members)


@ENDINGS
def test_a_file_of_many_reads_is_decompressed(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.txt{ending}"
    draw = random.Random(0)
    raw = b"".join(draw.randbytes(1000) * draw.randrange(1, 9) for _ in range(1000))  # 4 MB, at several ratios
    path.write_bytes(COMPRESS[ending](raw) + COMPRESS[ending](raw[: 1 << 20]))
    for size in (1 << 20, 1 << 18, 12345, -1):
        with path.open("rb") as file:
            stream = decompress(file, str(path))
            assert b"".join(iter(partial(stream.read, size), b"")) == raw + raw[: 1 << 20]


@ENDINGS
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.txt{ending}"
    whole = COMPRESS[ending](bytes(range(32, 127)) * 50)
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert refusal(path).startswith(f"`{path}` is cut off: its data end after ")
    path.write_bytes(whole + whole[:-3])
    assert refusal(path).startswith(f"`{path}` is cut off: its data end after ")


@ENDINGS
def test_a_damaged_file_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.txt{ending}"
    whole = bytearray(COMPRESS[ending](bytes(range(32, 127)) * 50))
    whole[-6 if ending in (".gz", ".zst") else len(whole) // 2] ^= 0xFF  # in a checksum, or in the data
    for raw in (bytes(whole), COMPRESS[ending](b"text") + b"what is this"):
        path.write_bytes(raw)
        message = refusal(path)
        assert message.startswith((f"`{path}` is damaged after ", f"`{path}` cannot be decompressed")), raw
    path.write_bytes(b"plain text " * 9)
    assert refusal(path).startswith(f"`{path}` cannot be decompressed as `{ending}`: ")


@ENDINGS
def test_a_bomb_is_refused_early(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.txt{ending}"
    block = COMPRESS[ending](bytes(16 << 20))
    path.write_bytes(block * 64)  # 1 GB
    assert "holds more than 200 times its size: 65 MiB in the first " in refusal(path)


def test_a_text_that_shrinks_well_is_no_bomb(tmp_path: Path) -> None:
    line = "2026-01-01 00:00:00 GET /index.html 200\n"
    lines = "".join(f"{i} {line}" for i in range(300_000))
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstd.compress(lines.encode() * 5, 1))
    assert sum(map(len, read(path))) == 5 * len(lines)


def test_a_window_that_needs_much_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    for log, is_read in ((27, True), (28, False)):
        compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: log})
        path.write_bytes(compressor.compress(b"text") + compressor.flush())
        if is_read:
            assert read(path) == ["text"]
        else:
            assert refusal(path).startswith(f"`{path}` needs more memory to decompress than 128 MiB: ")
    path = tmp_path / "a.txt.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 256 << 20}]
    path.write_bytes(lzma.compress(b"text", filters=filters))
    assert refusal(path).startswith(f"`{path}` needs more memory to decompress than 128 MiB: ")


def test_frames_without_text_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"  # as of `pzstd`
    path.write_bytes(skipped + zstd.compress(b"one") + skipped + zstd.compress(b"two"))
    assert read(path) == ["onetwo"]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstd.compress(b"text"))
    package, _, name = zstd.__name__.rpartition(".")
    monkeypatch.delattr(sys.modules[package], name)
    monkeypatch.setitem(sys.modules, zstd.__name__, None)
    assert refusal(path).startswith(f"`{path}` needs `backports.zstd`: run `pip install ")


def test_compressed_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet.gz"
    path.write_bytes(gzip.compress(b"PAR1"))
    assert refusal(path) == f"`{path}` is compressed twice, as parquet is compressed inside: decompress it"


@pytest.mark.parametrize("ending", [".gz", ".zst", ".xz"])
def test_a_compressed_file_without_its_ending_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(COMPRESS[ending](b"text"))
    assert refusal(path).endswith(f": its name must end in `{ending}`")


def test_endings_of_compression() -> None:
    assert split_compression("x/a.jsonl.GZ") == ("x/a.jsonl", ".gz")
    assert split_compression("x.gz/a.jsonl") == ("x.gz/a.jsonl", "")
