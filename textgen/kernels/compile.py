"""C++ beside Python: compiled at first use, within two seconds, for the processor that is there, and kept in a cache.

Who asks for code must do without it: there may be no compiler. It shares torch's pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from textgen.hardware import processor_identity

log = logging.getLogger("textgen")

COMPILERS = ("g++", "clang++")
# Without contraction of a product and a sum to one rounding, so that code can be written that rounds as torch does.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-w")
CACHE = Path("~/.cache/textgen/native")


@functools.cache
def library(source: str) -> ctypes.CDLL | None:
    """Return the compiled code of a file of this package; None, and a line of log, where there is none."""
    try:
        return ctypes.CDLL(str(compiled(Path(__file__).with_name(source), CACHE.expanduser())))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        told = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else str(error)
        log.info(
            "`%s` is not compiled, torch's slower operators are used: %s", source, told.strip().split("\n")[0][:200]
        )
        return None


def compiled(source: Path, cache: Path) -> Path:
    """Return the compiled file, made now if it is not in the cache; it is there whole or not at all.

    Raises:
        OSError: the cache cannot be written.
        RuntimeError: there is no compiler, or torch brings no OpenMP of GNU's, whose threads would be shared.
        subprocess.SubprocessError: the compiler fails.
    """
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    told = cache.stat()
    if told.st_uid != os.getuid() or told.st_mode & 0o022:
        raise OSError(f"`{cache}` may be written by others, who could leave code there")
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise RuntimeError(f"there is no C++ compiler ({', '.join(COMPILERS)})")
    threads = next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))), None)
    if threads is None:
        raise RuntimeError("torch comes without GNU's OpenMP")
    made = Path(compiler).resolve().stat()
    parts = [source.read_bytes(), compiler, made.st_size, made.st_mtime_ns, FLAGS, threads, processor_identity()]
    path = cache / f"{source.stem}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        # in the cache, so that it is moved as a whole
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as folder:
            target = Path(folder) / path.name
            command = [compiler, *FLAGS, str(source), "-Wl,--as-needed", str(threads), "-o", str(target)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            with target.open("rb") as file:  # half a file, after a power cut, would end every process that loads it
                os.fsync(file.fileno())
            target.replace(path)
    return path
