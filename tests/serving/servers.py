"""A real server in a process of its own, for the tests of `textgen serve`."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.forking import Forked, server


@dataclass
class Running:
    """A server under test."""

    process: subprocess.Popen[bytes] | Forked
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of an answer; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = {} if body is None else {"content-type": "application/json"}
        connection.request(method, path, raw, kind | (headers or {}))
        answer = connection.getresponse()
        told = {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        connection.close()
        return answer.status, *told

    def complete(self, **asked: Any) -> dict[str, Any]:
        """Return the answer to a request that must succeed."""
        status, _, body = self.ask("POST", "/v1/completions", asked)
        assert status == 200, body
        answer: dict[str, Any] = json.loads(body)
        return answer

    def metric(self, name: str) -> float:
        """Return a figure of `/metrics`."""
        text = self.ask("GET", "/metrics")[2].decode()
        return float(re.findall(rf"^textgen_{name} (\S+)$", text, re.MULTILINE)[0])

    def wait_until(self, name: str, value: float, seconds: float = 10) -> None:
        """Wait until a figure of `/metrics` has a value."""
        last = time.monotonic() + seconds
        while (seen := self.metric(name)) != value:
            assert time.monotonic() < last, f"{name} is {seen}, not {value}"
            time.sleep(0.02)


@contextmanager
def running(
    checkpoint: Path, log: Path, *flags: str, python: str | None = None, cwd: Path | None = None
) -> Iterator[Running]:
    """Start a server and end it; with another Python than that of the tests, if one is named."""
    argv = ["-m", "textgen", "serve", str(checkpoint), "--port", "0", "--decoder", "int8", *flags]
    log.write_bytes(b"")
    process: subprocess.Popen[bytes] | Forked
    if python is None:
        process = server().start(argv, output=Path(os.devnull), error=log)
    else:
        with log.open("wb") as file:
            process = subprocess.Popen([python, *argv], stderr=file, cwd=cwd)
    try:
        last = time.monotonic() + 120
        while not (said := re.search(r"serving on http://\S+:(\d+)\n", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < last, log.read_text()
            time.sleep(0.05)
        yield Running(process, int(said[1]), log)
    finally:
        process.kill()
        process.wait()
