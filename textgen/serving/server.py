"""The HTTP server: its socket, its limits on connections, and its shutdown."""

from __future__ import annotations

import os
import resource
import socket
from asyncio import BaseTransport, TimerHandle, Transport
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from textgen.serving.scheduler import Scheduler


MAX_CONNECTIONS = 1024
REQUEST_SECONDS = 10.0  # for the head of a request, after the connection or the previous response
STALL_SECONDS = 30.0  # for a client to read data that the server has sent
DRAIN_SECONDS = 2.0  # for samples to end after SIGTERM; connections are closed a second later

TOO_MANY = b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
# For a client to read `BAD_REQUEST`: closing the connection while the client still sends would discard the response.
LINGER_SECONDS = 1.0


def open_listener(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address; connections wait in its queue until the server runs.

    Raises:
        OSError: the address is unknown, in use or forbidden.
    """
    kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    # A short queue: the server accepts all queued connections at once, and streams wait meanwhile.
    listener = socket.create_server(address[:2], family=kind, backlog=128)
    # Connections inherit the option. Without it the text of a response waits 40 ms until its head is acknowledged:
    # asyncio sets the option only on sockets that were created with the protocol's number.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def exit_at_once(number: int, _: object) -> NoReturn:
    """Handle a signal: exit with code 0, without cleaning up.

    It handles SIGTERM before the server runs, and the SIGTERM that uvicorn sends itself again after it has shut down.
    Nothing is left to write then, and torch's cleanup takes seconds on a busy machine.
    """
    os._exit(0)


class Connection(H11Protocol):
    """A connection with limits: it is closed if there are too many, or if its client is too slow or reads nothing."""

    timer: TimerHandle | None = None
    """the one limit that applies now"""
    refused = False
    """the client sent something other than HTTP"""

    def connection_made(self, transport: BaseTransport) -> None:
        """Wait for a request, or refuse the connection."""
        assert isinstance(transport, Transport)  # asyncio's loop passes these, uvloop does not
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.write(TOO_MANY)
            transport.close()
        else:
            self._expect_request()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._expect_request()
        super().on_response_complete()

    def _expect_request(self) -> None:
        self._start_timer(REQUEST_SECONDS, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _start_timer(self, seconds: float, action: Callable[[], None]) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.loop.call_later(seconds, action)

    def data_received(self, data: bytes) -> None:
        """Parse data, unless the client is refused."""
        if not self.refused:
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Refuse data that is not HTTP; uvicorn's own method assumes that no response has started."""
        self.refused = True
        responding = self.cycle is not None and not self.cycle.response_complete
        if responding:  # wake the application, as uvicorn does when a client disconnects
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if responding and self.cycle.response_started:
            self.transport.close()
        else:
            self.transport.write(BAD_REQUEST)
            self._start_timer(LINGER_SECONDS, self.transport.close)

    def pause_writing(self) -> None:
        """Wait for the client to read: the buffers are full."""
        super().pause_writing()
        self._start_timer(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Replace the limit of `pause_writing` by that of the next request."""
        super().resume_writing()
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timer."""
        super().connection_lost(exc)
        if self.timer is not None:
            self.timer.cancel()


class DrainingServer(Server):
    """A server that gives running samples `DRAIN_SECONDS` to end when it shuts down."""

    def __init__(self, config: Config, scheduler: Scheduler) -> None:
        super().__init__(config)
        self._scheduler = scheduler

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new samples, and wait for connections to end."""
        self._scheduler.stop(DRAIN_SECONDS)
        await super().shutdown(sockets)


def build_server(app: ASGIApp, scheduler: Scheduler) -> DrainingServer:
    """Return a server for `app`, and raise the process's limit of open files to what its connections need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * MAX_CONNECTIONS)), hard))
    config = Config(
        app,
        http=Connection,
        loop="asyncio",
        ws="none",
        lifespan="on",
        backlog=128,
        log_config=None,  # the access middleware logs; uvicorn's lines would contain paths
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(DRAIN_SECONDS) + 1,
        h11_max_incomplete_event_size=16384,
    )
    return DrainingServer(config, scheduler)
