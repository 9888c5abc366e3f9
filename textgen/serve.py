"""The verb `serve`: a trained model behind OpenAI's completions API, and a page to play with it.

What is heavy is imported once the flags are known to be right.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import resource
import signal
import socket
import sys
from asyncio import BaseTransport, TimerHandle, Transport
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from textgen.config import DecoderName
from textgen.parsing import Parser, fail

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from textgen.batching import Scheduler

log = logging.getLogger("textgen")

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")

# Samples of one request: prompts x `n`. The queue holds at least that many.
MOST_SAMPLES = 64

MAX_CONNECTIONS = 1024
REQUEST_SECONDS = 10.0  # from a connection, or the answer before, to a whole head of a request
STALL_SECONDS = 30.0  # that a client may leave what it is sent unread
DRAIN_SECONDS = 2.0  # after SIGTERM, for samples to end; a second later connections are cut
TOKEN_LENGTH = 16

TOO_MANY = b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
NO_HTTP = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
LINGER_SECONDS = (
    1.0  # for a client to read that what it sends is no HTTP: an end while it sends would take the answer back
)


def serve_command(argv: Sequence[str]) -> None:
    """Serve a checkpoint until a signal comes."""
    args = _parse(argv)
    token = _read_token(args.token_file)
    signal.signal(signal.SIGTERM, _exit)
    listener = _listen(args.host, args.port)

    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    import torch

    from textgen.batching import Scheduler
    from textgen.checkpoint import find_checkpoint, load_model
    from textgen.completions import Api, Gate, Limits
    from textgen.decoding import choose_decoder
    from textgen.model import resolve_model_directory

    torch.set_num_threads(args.threads or max(torch.get_num_threads() - 1, 1))
    directory = find_checkpoint(args.checkpoint, best=args.best) or resolve_model_directory(args.checkpoint)
    model, tokenizer = load_model(directory, "cuda" if torch.cuda.is_available() else "cpu")
    try:
        decoder = choose_decoder(model, args.decoder, directory=directory)
    except ValueError as error:
        fail(str(error))
    log.info("%s", decoder.description)

    scheduler = Scheduler(decoder, tokenizer, batch_size=args.batch_size, max_waiting=args.max_waiting)
    limits = Limits(max_tokens=args.max_tokens, max_prompt_tokens=args.max_prompt_tokens, timeout=args.timeout)
    server: Any = None
    api = Api(
        args.name or Path(args.checkpoint).resolve().name, model.text.get("normalization", "none"), scheduler, limits,
        lambda: len(server.server_state.connections),
    )  # fmt: skip
    hosts = [*LOOPBACK_NAMES, _in_url(args.host), *(name.lower() for name in args.allowed_hosts or ())]
    gate = Gate(api.app(), hosts=hosts, any_address=not _is_loopback(args.host), token=token, metrics=api.metrics)
    server = _server(gate, scheduler)
    log.info("serving on http://%s:%d", _in_url(args.host), listener.getsockname()[1])
    server.run(sockets=[listener])


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        prog="textgen serve",
        description="Answer OpenAI's completions API, and show a page to play with, until SIGTERM or Ctrl-C.",
    )
    parser.add_argument("checkpoint", help="checkpoint, run folder or hub repository")
    parser.add_argument("--best", action="store_true", help="of a run, the best checkpoint instead of the newest")
    parser.add_argument("--name", help="the model's name; that of the checkpoint's or run's folder, unless given")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument(
        "--token_file",
        help=f"file with a token of {TOKEN_LENGTH} characters or more that clients must send; `host` beyond loopback "
        "demands it",
    )
    parser.add_argument(
        "--allowed_hosts", nargs="+", metavar="NAME", help="more names of this server, as a proxy before it has them"
    )
    parser.add_argument("--decoder", type=DecoderName, default="auto", help="how the model's steps are computed")
    parser.add_argument(
        "--threads", type=int | None, default=None, help="threads that decode; all but one, unless given: for HTTP"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="samples that run at a time")
    parser.add_argument("--max_waiting", type=int, default=256, help="samples that wait; beyond them clients get a 429")
    parser.add_argument("--max_tokens", type=int, default=1024, help="most tokens of a sample")
    parser.add_argument("--max_prompt_tokens", type=int, default=2048, help="most tokens of a prompt")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that a request may take")
    args = parser.parse_args(list(argv))
    least = {"batch_size": 1, "max_waiting": MOST_SAMPLES, "max_tokens": 1, "max_prompt_tokens": 1, "port": 0}
    for name, value in least.items():
        if args[name] < value:
            parser.error(f"`{name}` must be at least {value}: {args[name]}")
    if args.threads is not None and args.threads < 1:
        parser.error(f"`threads` must be at least 1: {args.threads}")
    if args.port > 65535:
        parser.error(f"`port` must be at most 65535: {args.port}")
    if not 0 < args.timeout <= 86400:
        parser.error(f"`timeout` must be above 0 and at most 86400: {args.timeout}")
    if args.token_file is None and not _is_loopback(args.host):
        parser.error(f"`host` {args.host} can be reached from elsewhere, which needs `token_file`")
    if missing := [name for name in ("starlette", "uvicorn", "pydantic") if find_spec(name) is None]:
        fail(f"`textgen serve` needs `{missing[0]}`: pip install textgen[serve]")
    return args


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host.lower()


def _read_token(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        fail(f"`{path}` cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        fail(f"`{path}` is not UTF-8")
    if len(token) < TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
        fail(f"`{path}` must hold a token of at least {TOKEN_LENGTH} letters, digits and signs")
    return token


def _listen(host: str, port: int) -> socket.socket:
    # a short queue: all connections in it are taken up at a time, while streams wait
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=kind, backlog=128)
        # Connections inherit it. Without it text waits 40 ms for the head of its answer to be acknowledged, as asyncio
        # sets it only on sockets that were made with the protocol's number.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        fail(f"`host` {host} and `port` {port} cannot be listened on: {str(error.strerror).split(' (')[0]}")


def _exit(number: int, _: object) -> NoReturn:
    """End at once: before there is a server, or after it has drained, when its library sends itself the signal again.

    Nothing is left to write, and an orderly end of torch takes seconds on a busy machine.
    """
    os._exit(0)


def _server(app: ASGIApp, scheduler: Scheduler) -> Any:
    """Return a server that closes connections which are too many, too slow or stalled, and drains at its end."""
    from uvicorn import Config, Server
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Connection(H11Protocol):
        timer: TimerHandle | None = None
        refused = False

        def connection_made(self, transport: BaseTransport) -> None:
            assert isinstance(transport, Transport)  # as asyncio's loop gives them, uvloop does not
            super().connection_made(transport)
            if len(self.connections) > MAX_CONNECTIONS:
                transport.write(TOO_MANY)
                transport.close()
            else:
                self._expect_request()

        def on_response_complete(self) -> None:
            self._expect_request()
            super().on_response_complete()

        def _expect_request(self) -> None:
            self._watch(REQUEST_SECONDS, self._close_if_idle)

        def _close_if_idle(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

        def _watch(self, seconds: float, action: Any) -> None:
            if self.timer is not None:
                self.timer.cancel()
            self.timer = self.loop.call_later(seconds, action)

        def data_received(self, data: bytes) -> None:
            if not self.refused:
                super().data_received(data)

        def send_400_response(self, msg: str) -> None:
            self.refused = True
            under_way = self.cycle is not None and not self.cycle.response_complete
            if under_way:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            if under_way and self.cycle.response_started:
                self.transport.close()
            else:
                self.transport.write(NO_HTTP)
                self._watch(LINGER_SECONDS, self.transport.close)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch(STALL_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._expect_request()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self.timer is not None:
                self.timer.cancel()

    class Draining(Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            scheduler.stop(DRAIN_SECONDS)
            await super().shutdown(sockets)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * MAX_CONNECTIONS)), hard))
    config = Config(
        app, http=Connection, loop="asyncio", ws="none", lifespan="on", backlog=128, log_config=None,
        log_level="critical", access_log=False, server_header=False, timeout_graceful_shutdown=int(DRAIN_SECONDS) + 1,
        h11_max_incomplete_event_size=16384,
    )  # fmt: skip
    return Draining(config)
