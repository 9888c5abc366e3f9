"""The command `serve`: a trained model behind OpenAI's completions API, and a page to play with it.

Heavy packages are imported once the flags are known to be right.
"""

from __future__ import annotations

import ipaddress
import logging
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textgen.commands.model_argument import add_model_arguments, open_decoder
from textgen.commands.parsing import Parser, fail

if TYPE_CHECKING:
    pass
from textgen.serving.server import build_server, exit_at_once, open_listener

log = logging.getLogger("textgen")

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")

# Samples of one request: prompts x `n`. The queue holds at least that many.
MOST_SAMPLES = 64
TOKEN_LENGTH = 16


def serve_command(argv: Sequence[str]) -> None:
    """Serve a checkpoint until a signal comes."""
    args = _parse(argv)
    token = _read_token(args.token_file)
    signal.signal(signal.SIGTERM, exit_at_once)
    try:
        listener = open_listener(args.host, args.port)
    except OSError as error:
        reason = str(error.strerror).split(" (")[0]
        fail(f"`host` {args.host} and `port` {args.port} cannot be listened on: {reason}")

    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    import torch

    from textgen.serving.api import Api
    from textgen.serving.gate import Gate
    from textgen.serving.protocol import Limits
    from textgen.serving.scheduler import Scheduler

    torch.set_num_threads(args.threads or max(torch.get_num_threads() - 1, 1))
    opened, decoder = open_decoder(args.checkpoint, args.decoder, best=args.best)

    scheduler = Scheduler(decoder, opened.tokenizer, batch_size=args.batch_size, max_waiting=args.max_waiting)
    limits = Limits(max_tokens=args.max_tokens, max_prompt_tokens=args.max_prompt_tokens, timeout=args.timeout)
    server: Any = None
    api = Api(
        args.name or Path(args.checkpoint).resolve().name, opened.normalization, scheduler, limits,
        lambda: len(server.server_state.connections),
    )  # fmt: skip
    hosts = [*LOOPBACK_NAMES, _in_url(args.host), *(name.lower() for name in args.allowed_hosts or ())]
    gate = Gate(api.app(), hosts=hosts, any_address=not _is_loopback(args.host), token=token, metrics=api.metrics)
    server = build_server(gate, scheduler)
    log.info("serving on http://%s:%d", _in_url(args.host), listener.getsockname()[1])
    server.run(sockets=[listener])


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        prog="textgen serve",
        description="Answer OpenAI's completions API, and show a page to play with, until SIGTERM or Ctrl-C.",
    )
    add_model_arguments(parser, decoder=True)
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
