"""An S3 server on this machine, behind a proxy that is slow, dead or lying when a test says so."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SECRET = "a-secret-key/of+the-test"
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
print("port", server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the test closes it, or ends
"""


@dataclass
class Faults:
    """What the proxy does wrong, from now on.

    Attributes:
        bytes_per_second: of all answers together; None for as fast as it can.
        refused: connections are closed before they are answered, as of a server that was killed.
        silent: requests are not answered for as long.
        status: each answer is this error instead.
        cut: an answer ends after half of its bytes.
        lies: a byte of each file is another one.
        only: a part of the paths that the faults above concern; all by default.
        count: how many requests they concern; None for all.
    """

    bytes_per_second: float | None = None
    refused: bool = False
    silent: bool = False
    status: int | None = None
    cut: bool = False
    lies: bool = False
    only: str = ""
    count: int | None = None

    def take(self, path: str) -> bool:
        """Return whether the faults concern a request, and count it."""
        if self.only not in path or self.count == 0:
            return False
        if self.count is not None:
            self.count -= 1
        return True


@dataclass
class ObjectStorage:
    """The server as tests see it."""

    url: str
    environment: dict[str, str]
    faults: Faults = field(default_factory=Faults)
    requests: list[str] = field(default_factory=list)
    """method and path of each request"""
    sent: list[int] = field(default_factory=list)
    """bytes of each piece of an answer"""

    def send(self, folder: Path, address: str) -> None:
        """Copy a folder to an address such as `s3://bucket/name`, past the proxy; the bucket is made."""
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        self._call("PUT", f"/{bucket}")
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self._call("PUT", f"/{bucket}/{prefix}/{path.relative_to(folder)}", path.read_bytes())

    def read(self, address: str) -> bytes:
        """Return the bytes of a file, past the proxy."""
        return self._call("GET", "/" + address.removeprefix("s3://"))

    def _call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        connection = HTTPConnection(self.environment["MOTO_HOST"], timeout=60)
        # not checked, but without it moto lets no one replace a file
        connection.request(
            method, path, body, {"Authorization": "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/x"}
        )
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        assert answer.status < 300, content
        return content


def leads_elsewhere(name: str) -> bool:
    """Return whether a variable of the environment may lead to another storage, or past this one."""
    return name.startswith(("AWS_", "FSSPEC_")) or name.lower().endswith("_proxy")


@contextmanager
def start_object_storage() -> Iterator[ObjectStorage]:
    """Start the server and its proxy; end both at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if not leads_elsewhere(name)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        port = next(line.split()[1] for line in process.stdout if line.startswith(b"port"))
        with start_proxy(f"127.0.0.1:{int(port)}") as storage:
            yield storage
    finally:
        process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def start_proxy(host: str) -> Iterator[ObjectStorage]:
    """Start a proxy before an HTTP server that is there."""
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    proxy.daemon_threads = True
    proxy.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that has gone
    url = f"http://127.0.0.1:{proxy.server_port}"
    environment = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "a-key-id-of-the-test",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "FSSPEC_CONFIG_DIR": "/dev/null",
        "no_proxy": "127.0.0.1",
        "MOTO_HOST": host,
    }
    proxy.storage = ObjectStorage(url, environment)  # type: ignore[attr-defined]
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy.storage  # type: ignore[attr-defined]
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


class _Proxy(BaseHTTPRequestHandler):
    """Passes requests on, and does wrong what the faults say."""

    protocol_version = "HTTP/1.1"
    line = threading.Lock()  # all answers share one line
    free_at = 0.0

    def _pass_on(self) -> None:
        storage: ObjectStorage = self.server.storage  # type: ignore[attr-defined]
        storage.requests.append(f"{self.command} {self.path}")
        faults = storage.faults
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        wrong = faults.take(self.path)
        if wrong and (faults.refused or faults.silent):
            while faults.silent and storage.faults is faults:
                time.sleep(0.05)
            self.close_connection = True
            return
        if wrong and faults.status is not None:
            self.send_response(faults.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        connection = HTTPConnection(storage.environment["MOTO_HOST"], timeout=60)
        connection.request(self.command, self.path, body or None, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if wrong and faults.lies and content:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        if wrong and faults.cut:
            content, self.close_connection = content[: len(content) // 2], True
        self._answer(content, faults.bytes_per_second, storage.sent)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815

    def _answer(self, content: bytes, bytes_per_second: float | None, sent: list[int]) -> None:
        piece = 1 << 20 if bytes_per_second is None else max(1, int(bytes_per_second / 50))
        try:
            for start in range(0, len(content), piece):
                part = content[start : start + piece]
                if bytes_per_second is not None:
                    with self.line:
                        _Proxy.free_at = max(self.free_at, time.monotonic()) + len(part) / bytes_per_second
                        until = self.free_at
                    time.sleep(max(0.0, until - time.monotonic()))
                self.wfile.write(part)
                sent.append(len(part))
        except OSError:  # the client has gone
            self.close_connection = True

    def log_message(self, *values: Any) -> None:
        """Write nothing."""
