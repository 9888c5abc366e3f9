"""The HTTP server: its socket, its limits on connections, and how it ends."""

from __future__ import annotations

import os
import resource
import socket
from asyncio import BaseTransport, TimerHandle, Transport
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from textgen.serving.scheduler import Scheduler


MAX_CONNECTIONS = 1024
REQUEST_SECONDS = 10.0  # from a connection, or the answer before, to a whole head of a request
STALL_SECONDS = 30.0  # that a client may leave what it is sent unread
DRAIN_SECONDS = 2.0  # after SIGTERM, for samples to end; a second later connections are cut

TOO_MANY = b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
NO_HTTP = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
# For a client to read that what it sends is not HTTP: to close while it still sends would discard the answer.
LINGER_SECONDS = 1.0


def open_listener(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address; connections wait in it until the server runs.

    Raises:
        OSError: the address is unknown, taken or forbidden.
    """
    kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    # a short queue: the server accepts all connections in it at once, while streams wait
    listener = socket.create_server(address[:2], family=kind, backlog=128)
    # Connections inherit the option. Without it text waits 40 ms for the head of its answer to be acknowledged: asyncio
    # sets it only on sockets that were made with the protocol's number.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def exit_at_once(number: int, _: object) -> NoReturn:
    """End at once: before there is a server, or after it has drained, when its library sends itself the signal again.

    Nothing is left to write, and an orderly end of torch takes seconds on a busy machine.
    """
    os._exit(0)


def build_server(app: ASGIApp, scheduler: Scheduler) -> Any:
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
