"""The output of `textgen sample --batch_file`: a file of samples that a later run continues.

`NAME.origin.json` beside the file holds digests of everything that decides its samples. A run with other digests is
refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from textgen.commands.parsing import fail
from textgen.files import write_atomic

READ_BYTES = 1 << 20  # of one read while lines are counted


def origin_of(prompts: bytes, settings: Any, model: Path) -> dict[str, str]:
    """Return digests (sha256) of everything that decides the samples.

    Args:
        prompts: the batch file.
        settings: the settings, as JSON values.
        model: the directory of the model.
    """
    from textgen.model.files import MODEL_FILES

    weights = hashlib.sha256()
    for name in sorted(MODEL_FILES):
        with (model / name).open("rb") as file:
            weights.update(hashlib.file_digest(file, "sha256").digest())
    return {
        "prompts": hashlib.sha256(prompts).hexdigest(),
        "settings": hashlib.sha256(json.dumps(settings).encode()).hexdigest(),
        "weights": weights.hexdigest(),
    }


@contextmanager
def open_output(path: Path, origin: dict[str, str]) -> Iterator[tuple[Callable[[bytes], None], int]]:
    """Open a file of samples for this process alone; cut off a last line without its end.

    Args:
        path: the file of samples.
        origin: of `origin_of`.

    Yields:
        A function that appends bytes, and the number of lines in the file.
    """
    from textgen.runs.lock import FileLock  # here, since Windows lacks fcntl and other samples need none

    if path.exists() and not path.is_file():
        fail(f"`{path}` is not a file")
    try:
        file = path.open("a+b", buffering=0)
    except OSError as error:
        _fail_to_write(path, error)
    lock = FileLock(path)
    with file:
        if not lock.acquire(seconds=0):
            holder = lock.describe_holder()
            fail(f"`{path}` is being written by {holder or 'another process'}")
        with lock.hold():
            beside = path.with_name(f"{path.name}.origin.json")
            if file.seek(0, os.SEEK_END):
                _require_origin(path, beside, origin)
            else:
                write_atomic(beside, json.dumps(origin) + "\n")

            def append(data: bytes) -> None:
                lock.require()
                try:
                    while data:  # an unbuffered write may write a part
                        data = data[file.write(data) :]
                except OSError as error:
                    _fail_to_write(path, error)

            yield append, _count_lines(file)
            os.fsync(file)


def _fail_to_write(path: Path, error: OSError) -> NoReturn:
    fail(f"`{path}` cannot be written: {error.strerror}")


def _require_origin(path: Path, beside: Path, origin: dict[str, str]) -> None:
    """Fail unless the samples of a file have the same origin."""
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        fail(f"`{path}` is not empty and has no readable `{beside.name}` beside it: name another file")
    known = before if isinstance(before, dict) else {}
    if other := [name for name in origin if known.get(name) != origin[name]]:
        fail(f"`{path}` was started with other {' and '.join(other)}: name another file")


def _count_lines(file: BinaryIO) -> int:
    """Return the number of whole lines; cut off what follows the last one, which an interrupted write has left."""
    file.seek(0)
    count = end = place = 0
    while block := file.read(READ_BYTES):
        count += block.count(b"\n")
        end = place + block.rfind(b"\n") + 1 if b"\n" in block else end
        place += len(block)
    if end < place:
        file.truncate(end)
    return count
