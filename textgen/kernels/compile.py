"""C++ of this package, compiled at first use for this machine's processor and kept in a cache.

Compilation takes up to two seconds. It may fail, for example because there is no compiler: callers then fall back to
torch's operators. Compiled code runs its loops in torch's own pool of threads (GNU's OpenMP).
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
# -ffp-contract=off: the compiler must not contract a product and a sum to one rounding, since some code has to round
# exactly as torch's operators do.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-w")
CACHE = Path("~/.cache/textgen/native")


@functools.cache
def library(source: str) -> ctypes.CDLL | None:
    """Return the compiled code of a C++ file of this package. Return None and log the reason if compilation fails."""
    try:
        return ctypes.CDLL(str(compiled(Path(__file__).with_name(source), CACHE.expanduser())))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        output = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else ""
        reason = (output or str(error)).strip().split("\n")[0][:200]
        log.info("`%s` is not compiled, torch's slower operators are used: %s", source, reason)
        return None


def compiled(source: Path, cache: Path) -> Path:
    """Compile a C++ file unless the cache has the result, and return the path of the shared library.

    Raises:
        OSError: the cache cannot be written.
        RuntimeError: there is no compiler, or this build of torch brings no GNU OpenMP, whose threads would be shared.
        subprocess.SubprocessError: the compiler fails.
    """
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = cache.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"`{cache}` is writable by other users, who could put code there")
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise RuntimeError(f"there is no C++ compiler ({', '.join(COMPILERS)})")
    openmp = next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))), None)
    if openmp is None:
        raise RuntimeError("torch comes without GNU's OpenMP")
    # The name depends on everything that the machine code depends on: a home directory may be shared by machines.
    binary = Path(compiler).resolve().stat()
    key = [source.read_bytes(), compiler, binary.st_size, binary.st_mtime_ns, FLAGS, openmp, processor_identity()]
    path = cache / f"{source.stem}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        # A folder in the cache is on the same file system, so the move is atomic. Two processes may do the same work.
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as folder:
            target = Path(folder) / path.name
            command = [compiler, *FLAGS, str(source), "-Wl,--as-needed", str(openmp), "-o", str(target)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            with target.open("rb") as file:  # after a power cut, half a library would crash every process that loads it
                os.fsync(file.fileno())
            target.replace(path)
    return path
