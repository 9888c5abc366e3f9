"""Access control by host, origin and token; security headers, the request log and request counts."""

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
from textgen.serving.responses import ApiError

log = logging.getLogger("textgen")
HEADER_BYTES = 16384

# The page loads nothing from other sites and runs only its own script. So generated text could do nothing even if a
# mistake in the page made a browser treat it as HTML.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
RAW_HEADERS = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

OPEN_PATHS = ("/", "/page.css", "/page.js", "/healthz")  # need no token: they reveal neither the model nor its use


class AccessMiddleware:
    """Refuses requests without access, adds security headers to all responses, logs and counts requests.

    A page of another site must not reach the server through the browser of its reader. `Host` must be a name of the
    server, which stops DNS rebinding: a site that points its own name to the server's address. `Origin`, if present,
    must match `Host`.

    Args:
        app: the application behind the middleware.
        hosts: names of the server, in lower case.
        any_address: accept every IP address as `Host`; DNS rebinding works with names alone.
        token: the token that clients must send; None if they need none.
        metrics: counts the requests.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Sequence[str], any_address: bool, token: str | None, metrics: Metrics
    ) -> None:
        self._app, self._hosts, self._any_address, self._token = app, set(hosts), any_address, token
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, status, started = Request(scope), 0, time.monotonic()

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *RAW_HEADERS]
            await send(message)

        try:
            refusal = self._refusal(request)
            await (self._app if refusal is None else refusal.response)(scope, receive, send_with_headers)
        except ClientDisconnect:
            status = 499
        except Exception as error:  # log no message: it may contain a client's text
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("a request failed: %s\n%s", type(error).__name__, frames)
            status = 500
        # The route's pattern, not the path: a path may contain a client's text too.
        route = scope.get("route")
        path = getattr(route, "path", "other")
        self._metrics.requests[path, status] += 1
        log.info("%s %d %.3f s", path, status, time.monotonic() - started)

    def _refusal(self, request: Request) -> ApiError | None:
        """Return the error response; None if the request may pass."""
        if sum(len(name) + len(value) for name, value in request.scope["headers"]) > HEADER_BYTES:
            return ApiError(431, f"all headers together must be at most {HEADER_BYTES} bytes")
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not self._is_own_name(re.sub(r":\d+$", "", host).lower()):
            return ApiError(403, "`Host` is not a name of this server (`--allowed_hosts` adds names)")
        if origin is not None and origin.partition("://")[2] != host:
            return ApiError(403, "`Origin` is another site")
        if self._token is not None and request.scope["path"] not in OPEN_PATHS:
            authorization = request.headers.get("authorization", "").encode()
            if not hmac.compare_digest(authorization, b"Bearer " + self._token.encode()):
                return ApiError(401, "`Authorization` must be `Bearer` and the server's token")
        return None

    def _is_own_name(self, host: str) -> bool:
        """Return whether a host without its port is a name of this server."""
        if host in self._hosts:
            return True
        try:
            ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return self._any_address
