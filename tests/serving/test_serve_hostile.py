"""Requests that mean no good: each is refused, and a stream beside them goes on as if they were not there."""

from __future__ import annotations

import json
import os
import re
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.forking import ROOT
from tests.serving.servers import Running, running

# A piece comes every few milliseconds. So long a pause would mean that something held the server up, not that this
# machine is busy.
LONGEST_PAUSE = 2.0


class Witness(threading.Thread):
    """A client that reads one stream after another; it notes the longest pause and other texts than the first's."""

    def __init__(self, server: Running) -> None:
        super().__init__()
        self.server, self.over = server, threading.Event()
        self.longest, self.texts, self.wrong = 0.0, 0, ""

    def run(self) -> None:
        first = None
        body = json.dumps({"prompt": "The", "seed": 1, "max_tokens": 300, "stream": True}).encode()
        while not self.over.is_set():
            got, last = b"", time.monotonic()
            with (
                suppress(ConnectionError),
                socket.create_connection(("127.0.0.1", self.server.port), timeout=30) as connection,
            ):
                connection.sendall(post(body, "connection: close"))
                last = time.monotonic()
                while data := connection.recv(1 << 16):
                    self.longest = max(self.longest, time.monotonic() - last)
                    got, last = got + data, time.monotonic()
            if not got.startswith(b"HTTP/1.1 200 "):  # there are too many connections already
                time.sleep(0.1)
                continue
            text = "".join(re.findall(r'"text": "((?:[^"\\]|\\.)*)"', got.decode()))
            first = first or text
            if text != first or not got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                self.wrong = f"{text[:40]} is not {first[:40]}"
            self.texts += 1
            time.sleep(0.01)


@pytest.fixture(scope="module")
def server(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tiny_run, tmp_path_factory.mktemp("serve") / "log", "--max_tokens", "100000") as server:
        yield server


@pytest.fixture(scope="module")
def witness(server: Running) -> Iterator[Witness]:
    witness = Witness(server)
    witness.start()
    yield witness
    witness.over.set()
    witness.join()


def post(body: bytes, *headers: str, path: str = "/v1/completions") -> bytes:
    """Return a request as bytes; a header replaces the usual one of its name."""
    usual = {"host": "localhost", "content-type": "application/json", "content-length": str(len(body))}
    own = {header.split(":")[0].lower() for header in headers}
    lines = [f"{name}: {value}" for name, value in usual.items() if name not in own]
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, *headers, "", ""]).encode() + body


# Values in JSON that a field must not have.
ANY = ["[]", "{}", '"\\ud800"', "[[[]]]", "NaN", "-Infinity", "1e999"]
COUNT = ["0", "-1", "1.5", '"1"', "true", "1" + "0" * 400]
NUMBER = ['"x"', "true", "-100", "1e300"]
FIELDS = {
    "model": ["1", "true", '"gpt-4"', '""', f'"{"x" * 5000}"'],
    "prompt": [
        "1",
        "true",
        "[1, 1000000]",
        "[-1]",
        "[1.5]",
        '["a", 1]',
        '[1, "a"]',
        '[["a"]]',
        "[[1], 2]",
        "[[1], [-1]]",
        "[" + "9" * 400 + "]",
        json.dumps([""] * 257),
        json.dumps([[]] * 257),
        f'"{"x" * 100000}"',
        f"[{'2,' * 2048}1]",
    ],
    "n": [*COUNT, "129", "1000000000"],
    "best_of": [*COUNT, "129", "1000000000"],
    "suffix": ["1", '"x"', "true"],
    "max_tokens": [*COUNT, "100001", "9223372036854775808"],
    "temperature": [*NUMBER, "2.1", "-0.1"],
    "top_p": [*NUMBER, "0", "1.01"],
    "top_k": [*COUNT, "1048577"],
    "min_p": [*NUMBER, "-0.01", "1.01"],
    "presence_penalty": [*NUMBER, "2.01", "-2.01"],
    "frequency_penalty": [*NUMBER, "2.01", "-2.01"],
    "stop": ["1", "true", '""', '[""]', "[1]", "[null]", json.dumps(["x"] * 17), f'"{"x" * 65}"'],
    "seed": [*COUNT[1:], "9223372036854775808"],
    "logprobs": [*COUNT[1:], "11", "100000"],
    "echo": ["0", '"yes"'],
    "logit_bias": [
        '{"0000000000009999999": 1}',
        '{"9999999": 1}',
        '{"": 1}',
        '{"%s": 1}' % ("0" * 5000),
        '{"%s": 1}' % ("é" * 300),
        '{"a": 101}',
        '{"a": "1"}',
        '{"a": null}',
    ],
    "choices": ["1", '"a"', '[""]', '["a", "a"]', "[1]", json.dumps(["漢" * 300]), json.dumps(["x"] * 257)],
    "stream": ["1", '"true"'],
    "stream_options": ["1", '{"include_usage": 1}', '{"x": 1}'],
    "user": ["1", f'"{"x" * 257}"'],
}
BODIES = {
    "nothing": b"",
    "spaces": b"   ",
    "no JSON": b"prompt=x",
    "cut JSON": b'{"prompt": "x"',
    "more after JSON": b'{"prompt": "x"} {}',
    "single quotes": b"{'prompt': 'x'}",
    "a comment": b'{"prompt": "x" /* */}',
    "a list": b"[]",
    "a text": b'"x"',
    "a number": b"1",
    "null": b"null",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"prompt": "x"}',
    "a raw line break": b'{"prompt": "a\nb"}',
    "a raw NUL": b'{"prompt": "a\0b"}',
    "deep lists": b"[" * 60_000,
    "deep lists in a field": b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "deep objects": b'{"a":' * 20_000,
    "a huge number": b'{"seed": ' + b"9" * 100_000 + b"}",
    "a huge exponent": b'{"seed": 1e999999999}',
    "many fields": json.dumps({f"x{i}": 1 for i in range(9000)}).encode(),
    "an unknown field": b'{"prompt": "x", "best_off": 1}',
    "__proto__": b'{"__proto__": {"n": 1}}',
    "__class__": b'{"__class__": 1}',
    "a long unknown field": b'{"' + b"x" * 100_000 + b'": 1}',
    "500,000 token ids": b'{"prompt": [' + b"1," * 500_000 + b"1]}",
    "200 kB": b'{"prompt": "' + b"x" * 200_000 + b'"}',
    "5 MB": b" " * 5_000_000,
}
NO_BODIES = {name: body for name, body in BODIES.items() if name != "200 kB"}  # of which tokens are counted
TOKENIZER = {
    "/tokenize": NO_BODIES | {
        "no prompt": b"{}", "ids": b'{"prompt": [1]}', "null": b'{"prompt": null}',
        "half a pair": b'{"prompt": "\\ud800"}',
        "an unknown field": b'{"prompt": "x", "messages": []}', "a number": b'{"prompt": "x", "add_special_tokens": 1}',
        "another model": b'{"prompt": "x", "model": "gpt-4"}',
    },
    "/detokenize": NO_BODIES | {
        "no tokens": b"{}", "a text": b'{"tokens": "x"}', "a large id": b'{"tokens": [1000000]}',
        "a negative id": b'{"tokens": [-1]}', "a huge id": b'{"tokens": [' + b"9" * 400 + b"]}",
        "true": b'{"tokens": [true]}', "a list": b'{"tokens": [[1]]}', "half": b'{"tokens": [0.5]}',
        "500,000 wrong ids": b'{"tokens": [' + b"-1," * 300_000 + b"1]}",
    },
}  # fmt: skip
HEADERS = {
    "no type": ["content-type: "],
    "a form": ["content-type: application/x-www-form-urlencoded"],
    "a multipart form": ["content-type: multipart/form-data; boundary=x"],
    "plain text": ["content-type: text/plain"],
    "another host": ["host: evil.example"],
    "an empty host": ["host: "],
    "two hosts": ["host: localhost", "host: evil.example"],
    "another site": ["origin: http://evil.example"],
    "no site": ["origin: null"],
    "a negative length": ["content-length: -1"],
    "a length in words": ["content-length: two"],
    "two lengths": ["content-length: 2", "content-length: 3"],
    "a length of 400 digits": [f"content-length: {'9' * 400}"],
    "an unknown encoding": ["transfer-encoding: gzip"],
    "a header without a colon": ["nonsense"],
    "a header with a NUL": ["x: a\0b"],
    "a header of 40 kB": [f"x: {'x' * 40_000}"],
    "5000 headers": [f"x{i}: 1" for i in range(5000)],
}
LINES = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
    "zeros": b"\0" * 1000,
    "a chunk without a size": post(b"{}\r\n\r\n", "transfer-encoding: chunked"),
    "HTTP/1.0 without a host": b"GET /healthz HTTP/1.0\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "a line of 100 kB": b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "a space in the path": b"GET /a b HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "CONNECT": b"CONNECT evil.example:80 HTTP/1.1\r\nhost: evil.example:80\r\n\r\n",
    "another server's address": b"GET http://evil.example/ HTTP/1.1\r\nhost: evil.example\r\n\r\n",
} | {
    f"{method} {path}": f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
    for method, path in [
        ("GET", "/v1/completions"), ("PUT", "/v1/completions"), ("DELETE", "/v1/models"), ("POST", "/"),
        ("POST", "/metrics"), ("PATCH", "/healthz"), ("OPTIONS", "/v1/completions"), ("TRACE", "/"), ("FOO", "/"),
        ("GET", "/../../etc/passwd"), ("GET", "/page/../../serve.py"), ("GET", "/%2e%2e/%2e%2e/etc/passwd"),
        ("GET", "//etc/passwd"), ("GET", "/page.js/"), ("GET", "/%00"), ("GET", "/v1/models/../../x"),
        ("GET", "/v1/models/%ff%fe"), ("GET", "/v1/models/" + "x" * 5000), ("GET", "/.git/config"), ("GET", "*"),
    ]
}  # fmt: skip
REQUESTS = (
    {f"{name} is {v[:24]}": post(b'{"%s": %s}' % (name.encode(), v.encode())) for name, values in FIELDS.items()
     for v in (*values, *ANY) if (name, v) not in {("stop", "[]"), ("stream_options", "{}"), ("logit_bias", "{}")}}
    | {f"body: {name}": post(body) for name, body in BODIES.items()}
    | {f"{path}: {name}": post(body, path=path) for path, bodies in TOKENIZER.items() for name, body in bodies.items()}
    | {f"header: {name}": post(b"{}", *headers) for name, headers in HEADERS.items()}
    | LINES
)  # fmt: skip


def answer(server: Running, request: bytes) -> bytes:
    """Send bytes and return the answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        with suppress(ConnectionError):  # it has read enough
            connection.sendall(request)
        got = b""
        while data := connection.recv(1 << 16):
            got += data
            head, _, body = got.partition(b"\r\n\r\n")
            if (size := re.search(rb"content-length: (\d+)", head)) and len(body) >= int(size[1]):
                break
        return got


def test_there_are_200_kinds() -> None:
    assert len(REQUESTS) >= 200


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_hostile_request_gets_a_4xx(server: Running, witness: Witness, kind: str) -> None:
    got = answer(server, REQUESTS[kind])
    wanted = b"413" if kind == "body: 5 MB" else rb"4\d\d"
    assert re.match(rb"HTTP/1\.1 %s " % wanted, got), got[:200]
    head, _, body = got.partition(b"\r\n\r\n")
    assert len(got) < 2000, "what was sent is not sent back"
    if b"content-length: 0" not in head:  # as where it was not even HTTP
        error = json.loads(body)["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert "\n" not in error["message"]


def test_cut_connections_leave_nothing(server: Running, witness: Witness) -> None:
    whole = post(json.dumps({"prompt": "The", "temperature": 0, "max_tokens": 100_000, "n": 8}).encode())
    for cut in range(1, len(whole) + 20, 9):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(whole[:cut])
            if cut % 2:  # a reset, not an end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    last = time.monotonic() + 60
    while server.metric("samples_running") > 1 or server.metric("samples_waiting"):  # the witness's
        assert time.monotonic() < last


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    two = [post(json.dumps({"prompt": "The", "seed": seed, "echo": True}).encode()) for seed in (1, 2)]
    last = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(two[0] + two[1] + last)
        got = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert [int(code) for code in re.findall(rb"HTTP/1\.1 (\d+)", got)] == [200, 200, 200]
    texts = re.findall(rb'"text":("(?:[^"\\]|\\.)*")', got)
    assert [json.loads(text) for text in texts] == [
        server.complete(prompt="The", seed=seed, echo=True)["choices"][0]["text"] for seed in (1, 2)
    ]


@pytest.mark.slow
def test_slow_requests_are_ended(server: Running, witness: Witness) -> None:
    """Heads and bodies that trickle are ended after ten seconds, and so is a connection that says nothing."""
    whole = post(b"{}" + b" " * 1000)
    head = whole.index(b"\r\n\r\n") + 4
    with ExitStack() as stack:
        silent, slow_head, slow_body = (
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(3)
        )
        slow_body.sendall(whole[:head])
        started, ended = time.monotonic(), dict[socket.socket, tuple[float, bytes]]()
        for place in range(150):
            for connection, start in ((slow_head, 0), (slow_body, head)):
                if connection not in ended and not select.select([connection], [], [], 0)[0]:
                    connection.sendall(whole[start + place : start + place + 1])
            left = [connection for connection in (silent, slow_head, slow_body) if connection not in ended]
            time.sleep(0.1)  # all three are due at about the same time
            for connection in select.select(left, [], [], 0)[0]:
                ended.setdefault(connection, (time.monotonic() - started, connection.recv(1000)))
            if len(ended) == 3:
                break
    assert all(9 < seconds < 13 for seconds, _ in ended.values())
    assert ended[slow_body][1].startswith(b"HTTP/1.1 408 ")
    assert ended[silent][1] == ended[slow_head][1] == b""


@pytest.mark.slow
def test_10000_connections_do_not_stop_those_that_are_there(server: Running, witness: Witness) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(10_000, hard - 200)
    texts = witness.texts
    try:
        with ExitStack() as stack:
            held = [
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
                for _ in range(count)
            ]
            poll = select.poll()
            for connection in held:
                poll.register(connection, select.POLLIN)
            refused, last = 0, time.monotonic() + 60
            while refused < count - 1024 and time.monotonic() < last:
                time.sleep(0.1)
                refused = len(poll.poll(0))
            assert refused >= count - 1024, "too many connections are held"
            by_number = {connection.fileno(): connection for connection in held}
            told = []
            for number, _ in poll.poll(0):
                with suppress(ConnectionError):
                    told.append(by_number[number].recv(100))
            assert b"HTTP/1.1 429 Too Many Requests" in {answer[:30] for answer in told}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    last = time.monotonic() + 30
    while witness.texts < texts + 2:  # it connects anew for each text
        assert witness.is_alive()
        assert time.monotonic() < last
        time.sleep(0.1)
    assert server.complete(prompt="The")["choices"]


@pytest.mark.slow
def test_the_description_holds_what_the_server_does(tiny_run: Path, tmp_path: Path) -> None:
    """Requests made from the OpenAPI description, right and wrong ones, are answered as it says."""
    command = Path(sys.executable).with_name("schemathesis")
    # A schema cannot count the tokens of a text, nor compare fields: schemathesis_hooks.py does.
    limits = ["--max_tokens", "50", "--max_prompt_tokens", "100000", "--max_waiting", "60"]
    with running(tiny_run, tmp_path / "log", *limits) as server:
        argv = [str(command), "run", f"{server.url}/openapi.json", "--max-examples", "100", "--seed", "1", "--no-color"]
        argv += ["--exclude-checks", "unsupported_method"]
        hooks = {"SCHEMATHESIS_HOOKS": "tests.serving.schemathesis_hooks", "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=600, env=os.environ | hooks)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-1000:]
    assert "failed" not in (tmp_path / "log").read_text()


def test_regexes_and_lists_that_would_take_all_time_or_memory_are_refused_or_bounded(
    server: Running, witness: Witness
) -> None:
    refused = [
        "(a{1,1000}){1,1000}",
        "((((x{9}){9}){9}){9}){9}",
        "(a?){900}a{900}",
        "(" * 2000 + ")" * 2000,
        "(a|" * 999,
    ]
    for regex in refused:
        status, _, body = server.ask("POST", "/v1/completions", {"regex": regex})
        assert status == 400, (regex[:40], body)
        assert json.loads(body)["error"]["message"].startswith("`regex` ")
    for allowed in (
        r"(\w{1,9} ){1,60}",
        "(.*a.{5}){30}b",
        "([a-z]{2,20}){1,50}",
        r"[\s\S]{1,999}",
        "(a|b)*a(a|b){300}",
    ):
        choices = server.complete(regex=allowed, n=8, max_tokens=100)["choices"]
        assert {choice["finish_reason"] for choice in choices} <= {"stop", "length", "regex_limit"}
    many = [f"{i} of many choices, each longer" for i in range(250)]
    assert server.complete(choices=many, n=8)["choices"][0]["text"] in many


def test_meanwhile_another_stream_went_on_evenly(server: Running, witness: Witness) -> None:
    texts = witness.texts
    while witness.texts < texts + 2:
        assert witness.is_alive()
        time.sleep(0.05)
    assert witness.wrong == ""
    assert witness.longest < LONGEST_PAUSE
    assert "failed" not in server.log.read_text()
