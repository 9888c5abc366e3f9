"""Who may ask: hosts, origins, tokens, and the headers of every answer."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import time
import traceback
from collections.abc import Sequence

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from textgen.serving.api import Metrics
from textgen.serving.protocol import ApiError

log = logging.getLogger("textgen")
HEADER_BYTES = 16384

# Browsers are told that the page loads nothing from elsewhere and runs nothing but its script: a text that is taken for
# HTML by mistake could still do nothing.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
OPEN_PATHS = ("/", "/page.css", "/page.js", "/healthz")  # without a token: they tell nothing


class Gate:
    """Lets in whom it may; counts and logs requests, and adds headers to all answers.

    A page of another site must not reach the server through its reader's browser: `Host` must be a name of the server
    (a name that was bound anew to its address is not), and `Origin`, where there is one, the same as `Host`.

    Args:
        app: answers.
        hosts: names of the server.
        any_address: take any address for a name too; names alone can be bound anew.
        token: to be sent along, if there is one.
        metrics: count requests.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Sequence[str], any_address: bool, token: str | None, metrics: Metrics
    ) -> None:
        self._app, self._hosts, self._any_address, self._token = app, set(hosts), any_address, token
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, status, started = Request(scope), 0, time.monotonic()

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_RAW_HEADERS]
            await send(message)

        try:
            refusal = self._refusal(request)
            await (self._app if refusal is None else refusal.response)(scope, receive, send_with_headers)
        except ClientDisconnect:
            status = 499
        except Exception as error:  # no message: it may hold text
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("a request failed: %s\n%s", type(error).__name__, frames)
            status = 500
        route = scope.get("route")
        path = getattr(route, "path", "other")
        self._metrics.requests[path, status] += 1
        log.info("%s %d %.3f s", path, status, time.monotonic() - started)

    def _refusal(self, request: Request) -> ApiError | None:
        if sum(len(name) + len(value) for name, value in request.scope["headers"]) > HEADER_BYTES:
            return ApiError(431, f"all headers together must be at most {HEADER_BYTES} bytes")
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not self._is_own(re.sub(r":\d+$", "", host).lower()):
            return ApiError(403, "`Host` is no name of this server (`--allowed_hosts` adds names)")
        if origin is not None and origin.partition("://")[2] != host:
            return ApiError(403, "`Origin` is another site")
        given = request.headers.get("authorization", "").encode()
        wanted = b"" if self._token is None else b"Bearer " + self._token.encode()
        if wanted and request.scope["path"] not in OPEN_PATHS and not hmac.compare_digest(given, wanted):
            return ApiError(401, "`Authorization` must be `Bearer` and the server's token")
        return None

    def _is_own(self, name: str) -> bool:
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return self._any_address


_RAW_HEADERS = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
