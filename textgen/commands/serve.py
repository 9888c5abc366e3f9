"""The command `serve`: a trained model behind OpenAI's completions API, and a page to try it.

Heavy packages, and those of the HTTP server, are imported once the flags are valid.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textgen.commands.model_argument import OpenModel, add_model_arguments, open_decoder
from textgen.commands.parsing import Parser, fail
from textgen.files import decode_text
from textgen.packages import require_packages

if TYPE_CHECKING:
    from textgen.decoding.decoders import Decoder
    from textgen.serving.server import DrainingServer
    from textgen.serving.states import PrefixTable

log = logging.getLogger("textgen")

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")

MIN_TOKEN_LENGTH = 16


def serve_command(argv: Sequence[str]) -> None:
    """Serve a checkpoint until a signal arrives."""
    args = _parse(argv)
    token = _read_token(args.token_file)
    from textgen.serving.server import exit_at_once

    signal.signal(signal.SIGTERM, exit_at_once)
    listener = _listen(args.host, args.port)  # before the model is loaded: a wrong address fails at once

    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    import torch

    torch.set_num_threads(args.threads or max(torch.get_num_threads() - 1, 1))  # by default one core is left to HTTP
    opened, decoder = open_decoder(args.checkpoint, args.decoder, best=args.best)
    server = _build(args, opened, decoder, token)
    log.info("serving on http://%s:%d", _in_url(args.host), listener.getsockname()[1])
    server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    from textgen.serving.server import open_listener

    try:
        return open_listener(host, port)
    except OSError as error:
        reason = str(error.strerror).split(" (")[0]
        fail(f"cannot listen on `host` {host} and `port` {port}: {reason}")


def _build(args: Any, opened: OpenModel, decoder: Decoder, token: str | None) -> DrainingServer:
    """Return the server with all its parts."""
    from textgen.serving.access import AccessMiddleware
    from textgen.serving.api import Api
    from textgen.serving.protocol import Limits
    from textgen.serving.scheduler import Scheduler
    from textgen.serving.server import build_server
    from textgen.serving.states import StateTable

    server: DrainingServer  # built last, from the API, which reads its number of connections at each request
    scheduler = Scheduler(
        decoder,
        opened.tokenizer,
        batch_size=args.batch_size,
        max_waiting=args.max_waiting,
        prefixes=_prefix_table(args.prefix_cache, decoder),
    )
    states = StateTable(args.kept_states, args.kept_state_seconds)
    limits = Limits(
        max_tokens=args.max_tokens,
        max_prompt_tokens=args.max_prompt_tokens,
        max_samples=args.max_waiting,
        timeout=args.timeout,
    )
    api = Api(
        _model_name(args),
        opened.normalization,
        scheduler,
        limits,
        states,
        lambda: len(server.server_state.connections),
    )
    app = AccessMiddleware(
        api.app(),
        hosts=[*LOOPBACK_NAMES, _in_url(args.host), *(name.lower() for name in args.allowed_hosts or ())],
        any_address=not _is_loopback(args.host),
        token=token,
        metrics=api.metrics,
    )
    server = build_server(app, scheduler)
    return server


def _prefix_table(mebibytes: float, decoder: Decoder) -> PrefixTable:
    """Return a table with all its memory; fail if there is not so much."""
    from textgen.serving.states import PrefixTable

    try:
        return PrefixTable(int(mebibytes * 2**20), like=decoder.prefill([0]))
    except (RuntimeError, MemoryError):
        fail(f"`prefix_cache` {mebibytes:g} MiB cannot be allocated: this machine has less memory")


def _parse(argv: Sequence[str]) -> Any:
    parser = _new_parser()
    args = parser.parse_args(list(argv))
    _check(args, parser)
    require_packages("`textgen serve`", "pydantic", "starlette", "uvicorn", extra="serve")
    return args


def _new_parser() -> Parser:
    parser = Parser(
        prog="textgen serve",
        description="Serve OpenAI's completions API, and a page to try the model, until SIGTERM or Ctrl-C.",
    )
    add_model_arguments(parser, decoder=True)
    parser.add_argument("--name", help="the model's name; default: the name of the checkpoint's or run's folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 for any free port")
    parser.add_argument(
        "--token_file",
        help=f"file with a token of at least {MIN_TOKEN_LENGTH} characters that clients must send; required if `host` "
        "is not a loopback address",
    )
    parser.add_argument(
        "--allowed_hosts", nargs="+", metavar="NAME", help="more names of this server, for example that of a proxy"
    )
    parser.add_argument(
        "--threads",
        type=int | None,
        default=None,
        help="threads that decode; default: all but one, which is left to HTTP",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="maximum number of samples that run at a time")
    parser.add_argument(
        "--max_waiting",
        type=int,
        default=256,
        help="maximum number of samples that wait; clients get status 429 beyond it",
    )
    parser.add_argument("--max_tokens", type=int, default=1024, help="maximum number of tokens of a sample")
    parser.add_argument("--max_prompt_tokens", type=int, default=2048, help="maximum number of tokens of a prompt")
    parser.add_argument("--timeout", type=float, default=300.0, help="maximum number of seconds of a request")
    parser.add_argument(
        "--prefix_cache",
        type=float,
        default=64.0,
        help="MiB for the model's states after beginnings of prompts, which are then read once; 0 turns this off",
    )
    parser.add_argument(
        "--kept_states",
        type=int,
        default=1024,
        help="maximum number of texts that clients may continue by a `state_id`; 0 turns this off",
    )
    parser.add_argument(
        "--kept_state_seconds", type=float, default=3600.0, help="maximum age of such a text, in seconds"
    )
    return parser


def _check(args: Any, parser: Parser) -> None:
    """End the command if a flag has a wrong value."""
    least = {
        "batch_size": 1,
        "max_waiting": 1,
        "max_tokens": 1,
        "max_prompt_tokens": 1,
        "port": 0,
        "prefix_cache": 0,
        "kept_states": 0,
    }
    for name, value in least.items():
        if args[name] < value:
            parser.error(f"`{name}` must be at least {value}: {args[name]}")
    if args.threads is not None and args.threads < 1:
        parser.error(f"`threads` must be at least 1: {args.threads}")
    if args.port > 65535:
        parser.error(f"`port` must be at most 65535: {args.port}")
    if not 0 < args.timeout <= 86400:
        parser.error(f"`timeout` must be above 0 and at most 86400: {args.timeout}")
    if not args.prefix_cache < 2**30:
        parser.error(f"`prefix_cache` must be below {2**30} MiB: {args.prefix_cache}")
    if not 0 < args.kept_state_seconds <= 86400 * 365:
        parser.error(f"`kept_state_seconds` must be above 0 and at most a year: {args.kept_state_seconds}")
    if args.token_file is None and not _is_loopback(args.host):
        parser.error(f"`host` {args.host} is not a loopback address: set `token_file`")


def _model_name(args: Any) -> str:
    """Return the model's name as text: JSON has no bytes that are not UTF-8, as the name of a folder may."""
    return os.fsencode(args.name or Path(args.checkpoint).resolve().name).decode(errors="replace")


def _is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a host; False for any other name without looking it up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _in_url(host: str) -> str:
    """Return a host as URLs spell it: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host.lower()


def _read_token(path: str | None) -> str | None:
    """Return the token in a file; None without a path."""
    if path is None:
        return None
    try:
        token = decode_text(Path(path).read_bytes(), f"`{path}`").strip()
    except OSError as error:
        fail(f"`{path}` cannot be read: {error.strerror}")
    if len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
        fail(f"`{path}` must contain a token of at least {MIN_TOKEN_LENGTH} letters, digits and signs")
    return token
