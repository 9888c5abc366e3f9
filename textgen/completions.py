"""OpenAI's completions API and a page over HTTP.

What clients send is checked here: who may ask, how long it may take, every field. Prompts and texts are never logged.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from textgen.batching import BusyError, ClosedError, Piece, Scheduler, Stream
from textgen.config import SamplingConfig
from textgen.corpus import normalize
from textgen.generation import TokenLogprobs

log = logging.getLogger("textgen")

Result = TypeVar("Result")

BODY_BYTES = 1 << 20
BODY_SECONDS = 10.0
HEADER_BYTES = 16384
PAGE = Path(__file__).parent / "page"

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


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for."""

    max_tokens: int = 1024
    """tokens of a sample"""
    max_prompt_tokens: int = 2048
    """tokens of a prompt"""
    timeout: float = 300.0
    """seconds from a request to its last token"""


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict[str, Any]:
        """Return the JSON object."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        type_ = kind.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": type_, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        """Return the answer; the connection of one whose request was not read to its end is closed."""
        headers = {"connection": "close"} if self.status in (408, 413) else {}
        if self.status in (429, 503):
            headers["retry-after"] = "1"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


# --- requests --------------------------------------------------------------------------------------------------------

Text = Annotated[str, Field(max_length=16384)]
Stop = Annotated[str, Field(min_length=1, max_length=64)]


class StreamOptions(BaseModel):
    """What a stream tells beside text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """A body of `POST /v1/completions`."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    # null is as good as nothing, as it is to OpenAI
    model: str | None = Field(None, description="as `/v1/models` names it")
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=8)] | None = Field(
        None, description="nothing, or '', starts a text"
    )
    n: int | None = Field(None, ge=1, le=8, description="samples of each prompt; default 1")
    max_tokens: int | None = Field(None, ge=1, description="default 16")
    temperature: float | None = Field(None, ge=0, le=2, description="default 1")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=1 << 20, description="an extension")
    min_p: float | None = Field(None, ge=0, le=1, description="an extension")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=0, lt=1 << 63, description="decides the draws; without it they differ each time")
    logprobs: int | None = Field(None, ge=0, le=10, description="how many of the likeliest tokens to tell at each")
    echo: bool | None = Field(None, description="the prompt stands before the text")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] | None = Field(None, description="without effect")

    @field_validator("n", "max_tokens", "top_k", "seed", "logprobs", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        """Take 1.0 for an integer, which it is in a JSON Schema."""
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @property
    def prompts(self) -> list[str]:
        """Return one or several prompts."""
        return self.prompt if isinstance(self.prompt, list) else [self.prompt or ""]

    def config(self, normalization: str) -> SamplingConfig:
        """Return how tokens are to be drawn."""
        names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "logprobs", "seed")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.top_p == 1:  # which filters nothing, and would take time
            del given["top_p"]
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingConfig(
            **{"seed": secrets.randbits(32)} | given,
            max_new_tokens=self.max_tokens or 16,
            stop=tuple(normalize(stop, normalization) for stop in stops),
        )


async def read_body(request: Request) -> bytes:
    """Return the body of a request, which must be short and come soon.

    Raises:
        ApiError: it is not, or not JSON by its own account.
    """
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "`content-type` must be `application/json`")
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > 8 * BODY_BYTES:
                    break
                if size <= BODY_BYTES:
                    body += chunk  # the rest is read and dropped: who writes hears the answer only then
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} seconds") from None
    if size > BODY_BYTES:
        raise ApiError(413, f"the body must be at most {BODY_BYTES} bytes")
    return bytes(body)


def parse(body: bytes, limits: Limits) -> CompletionRequest:
    """Return what a body asks for.

    Raises:
        ApiError: it is not JSON, or a field is wrong.
    """
    try:
        asked = CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if not first["loc"]:
            raise ApiError(400, f"the body: {first['msg']}") from None
        name = str(first["loc"][0])[:64]
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"unknown field `{name}`", param=name) from None
        seen = "" if isinstance(first["input"], (list, dict)) else f": {str(first['input'])[:40]}"
        raise ApiError(400, f"`{name}`: {first['msg']}{seen}", param=name) from None
    if asked.max_tokens is not None and asked.max_tokens > limits.max_tokens:
        raise ApiError(400, f"`max_tokens` must be at most {limits.max_tokens}: {asked.max_tokens}", param="max_tokens")
    return asked


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclass
class Choice:
    """One sample of an answer."""

    index: int
    stream: Stream
    shift: int
    """characters that stand before its text: an echoed prompt"""
    text: str
    told: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    reason: Literal["stop", "length"] | None = None

    def take(self, piece: Piece) -> None:
        """Add what came; the token that ends a text is not told."""
        finished = piece.sample is not None and piece.sample.finished
        self.text += piece.text
        self.told += piece.told[:-1] if finished else piece.told
        if piece.sample is not None:
            self.reason = "stop" if finished or piece.sample.stop is not None else "length"

    def give(self) -> dict[str, Any]:
        """Return what was added since the last time, in OpenAI's form."""
        logprobs = None
        if self.stream.row.request.config.logprobs is not None:
            logprobs = {
                "tokens": [at.token for _, at in self.told],
                "token_logprobs": [_finite(at.logprob) for _, at in self.told],
                "top_logprobs": [{token: _finite(value) for token, value in at.top} for _, at in self.told],
                "text_offset": [self.shift + place for place, _ in self.told],
            }
        given = {"index": self.index, "text": self.text, "logprobs": logprobs, "finish_reason": self.reason}
        self.text, self.told = "", []
        return given


def _finite(logprob: float) -> float:
    """Return a log-probability for JSON, which knows no infinity."""
    return round(max(logprob, -9999.0), 6)


class Answer:
    """The samples of a request, as they come."""

    def __init__(self, name: str, scheduler: Scheduler) -> None:
        self.choices: list[Choice] = []
        self.num_prompt_tokens = 0
        self.head: dict[str, Any] = {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
            "model": name,
        }  # fmt: skip
        self.started, self.begun = time.monotonic(), False
        self._scheduler = scheduler
        self._changed: dict[int, Choice] = {}
        self._came = asyncio.Event()
        self._error: ApiError | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, timeout: float) -> None:
        """Queue the samples; give them so many seconds.

        Raises:
            ApiError: there is no room for them.
        """
        try:
            self._scheduler.submit([choice.stream for choice in self.choices])
        except BusyError as error:
            raise ApiError(503 if isinstance(error, ClosedError) else 429, str(error)) from None
        late = ApiError(503, f"not ready within {timeout:g} seconds", code="timeout")
        self._timer = asyncio.get_running_loop().call_later(timeout, self._fail, late)

    def take(self, index: int, piece: Piece) -> None:
        """Note what came of a sample."""
        self._changed[index] = self.choices[index]
        self.choices[index].take(piece)
        self._came.set()
        if piece.error is not None:
            self._fail(ApiError(503, piece.error))

    def _fail(self, error: ApiError) -> None:
        self._error = error
        self._came.set()

    @property
    def ended(self) -> bool:
        """Tell whether all samples have."""
        return all(choice.reason is not None for choice in self.choices)

    @property
    def usage(self) -> dict[str, int]:
        """Return numbers of tokens."""
        drawn = sum(choice.stream.row.num_tokens for choice in self.choices)
        prompt = self.num_prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}

    async def changed(self) -> list[Choice]:
        """Wait for text or an end, and return the samples that have it.

        Raises:
            ApiError: no more will come.
        """
        await self._came.wait()
        self._came.clear()
        if self._error is not None and not self.ended:
            raise self._error
        changed, self._changed = list(self._changed.values()), {}
        return changed

    async def whole(self) -> dict[str, Any]:
        """Wait for all; return it in OpenAI's form."""
        while not self.ended:
            await self.changed()
        return self.head | {"choices": [choice.give() for choice in self.choices], "usage": self.usage}

    def close(self) -> None:
        """Free the places of what has not ended."""
        if self._timer is not None:
            self._timer.cancel()
        if not self.ended:
            self._scheduler.cancel([choice.stream for choice in self.choices])


class EventStream(Response):
    """An answer as server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, *, usage: bool) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._answer, self._usage = answer, usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the last, or until the client has gone."""
        with suppress(ClientDisconnect), closing(self._answer):
            await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        answer, usage = self._answer, {"usage": None} if self._usage else {}
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        ended = False
        while not ended:
            try:
                changed = await answer.changed()
                ended = answer.ended
                events = [answer.head | usage | {"choices": [choice.give()]} for choice in changed]
                if ended and self._usage:
                    events.append(answer.head | {"choices": [], "usage": answer.usage})
            except ApiError as error:
                ended, events = True, [error.body]
            body = _events(events) + (b"data: [DONE]\n\n" if ended else b"")
            await send({"type": "http.response.body", "body": body, "more_body": not ended})


def _events(events: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(event, ensure_ascii=False).encode() for event in events)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Return what `work` returns; give it up once the client has gone.

    Raises:
        ClientDisconnect: it has.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, going = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, going}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        going.cancel()


# --- routes ----------------------------------------------------------------------------------------------------------


@dataclass
class Metrics:
    """What `/metrics` tells, in Prometheus' text format."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    prompt_tokens: int = 0
    first_tokens: int = 0
    first_token_seconds: float = 0.0

    def text(self, scheduler: Scheduler, num_connections: int) -> str:
        """Return all figures."""
        figures: list[tuple[str, str, str, float]] = [
            ("counter", "requests_total", f'{{path="{path}",code="{code}"}}', count)
            for (path, code), count in sorted(self.requests.items())
        ]
        figures += [
            ("counter", "prompt_tokens_total", "", self.prompt_tokens),
            ("counter", "tokens_total", "", scheduler.num_tokens),
            ("gauge", "samples_running", "", scheduler.num_running),
            ("gauge", "samples_waiting", "", scheduler.num_waiting),
            ("gauge", "connections", "", num_connections),
            ("summary", "first_token_seconds", "_sum", round(self.first_token_seconds, 6)),
            ("summary", "first_token_seconds", "_count", self.first_tokens),
        ]
        lines: dict[str, None] = {}
        for kind, name, rest, value in figures:
            lines[f"# TYPE textgen_{name} {kind}"] = None
            lines[f"textgen_{name}{rest} {value}"] = None
        return "\n".join(lines) + "\n"


class Api:
    """What the routes answer.

    Args:
        name: of the model.
        normalization: what its text went through.
        scheduler: draws.
        limits: of a request.
        num_connections: tells how many there are.
    """

    def __init__(
        self, name: str, normalization: str, scheduler: Scheduler, limits: Limits, num_connections: Callable[[], int]
    ) -> None:
        self.metrics = Metrics()
        self._name, self._normalization, self._scheduler, self._limits = name, normalization, scheduler, limits
        self._num_connections, self._created = num_connections, int(time.time())

    def app(self) -> Starlette:
        """Return the routes as an application that starts the decoding thread, and waits for its end."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            loop = asyncio.get_running_loop()

            def deliver(pieces: Sequence[tuple[Stream, Piece]]) -> None:
                with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(self.deliver, pieces)

            self._scheduler.start(deliver)
            yield
            self._scheduler.stop(0)
            self._scheduler.join(1)

        def file(name: str, media_type: str) -> Route:
            response = Response(
                (PAGE / name).read_bytes(), headers={"cache-control": "no-cache"}, media_type=media_type
            )
            return Route("/" if name == "index.html" else f"/{name}", lambda _: response)

        routes = [
            file("index.html", "text/html"), file("page.css", "text/css"), file("page.js", "text/javascript"),
            Route("/v1/completions", self.completions, methods=["POST"]), Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model), Route("/healthz", self.healthz),
            Route("/metrics", self.tell_metrics), Route("/openapi.json", self.openapi),
        ]  # fmt: skip
        handlers = {ApiError: _api_error, HTTPException: _http_error, ClientDisconnect: _gone, Exception: _fault}
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
        app.router.redirect_slashes = False
        return app

    def deliver(self, pieces: Sequence[tuple[Stream, Piece]]) -> None:
        """Hand pieces to the answers that wait for them."""
        for stream, piece in pieces:
            answer, index = stream.owner
            if not answer.begun:
                answer.begun = True
                self.metrics.first_tokens += 1
                self.metrics.first_token_seconds += time.monotonic() - answer.started
            answer.take(index, piece)

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        asked = parse(await read_body(request), self._limits)
        if asked.model not in (None, self._name):
            raise _no_such_model(self._name)
        answer = self._answer(asked)
        answer.start(self._limits.timeout)
        self.metrics.prompt_tokens += answer.num_prompt_tokens
        if asked.stream:
            options = asked.stream_options
            return EventStream(answer, usage=options is not None and options.include_usage)
        with closing(answer):
            return JSONResponse(await unless_gone(request.receive, answer.whole()))

    def _answer(self, asked: CompletionRequest) -> Answer:
        """Return the samples of a request, not started."""
        answer, config = Answer(self._name, self._scheduler), asked.config(self._normalization)
        most = self._limits.max_prompt_tokens
        for prompt in asked.prompts:
            read = normalize(prompt, self._normalization)
            tokens = self._scheduler.tokenizer.encode(read)
            if len(tokens) > most:
                wanted = f"`prompt` must have at most {most} tokens: {len(tokens)}"
                raise ApiError(400, wanted, code="context_length_exceeded", param="prompt")
            answer.num_prompt_tokens += len(tokens)
            for number in range(asked.n or 1):
                index, echoed = len(answer.choices), prompt if asked.echo else ""
                stream = self._scheduler.stream(read, tokens, config, number, (answer, index))
                answer.choices.append(Choice(index, stream, len(echoed), echoed))
        return answer

    async def models(self, _: Request) -> Response:
        """List the one model."""
        return JSONResponse({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        """Describe the one model."""
        if request.path_params["name"] != self._name:
            raise _no_such_model(self._name)
        return JSONResponse(self._model)

    @property
    def _model(self) -> dict[str, Any]:
        return {
            "id": self._name, "object": "model", "created": self._created, "owned_by": "textgen",
            "max_tokens": self._limits.max_tokens,
        }  # fmt: skip

    async def healthz(self, _: Request) -> Response:
        """Tell that the server runs."""
        return JSONResponse({"status": "ok"})

    async def tell_metrics(self, _: Request) -> Response:
        """Return figures for Prometheus."""
        text = self.metrics.text(self._scheduler, self._num_connections())
        return Response(text, media_type="text/plain; version=0.0.4")

    async def openapi(self, _: Request) -> Response:
        """Describe the API."""
        return JSONResponse(describe_api(self._name, self._limits))


def _no_such_model(name: str) -> ApiError:
    return ApiError(404, f"the model here is `{name}`", code="model_not_found", param="model")


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = ApiError(error.status_code, error.detail).response
    response.headers.update(error.headers or {})
    return response


async def _gone(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # which nobody reads: nginx's number for the log


async def _fault(_: Request, error: Exception) -> Response:
    return ApiError(500, "the server failed; its log says where").response


def describe_api(name: str, limits: Limits) -> dict[str, Any]:
    """Return the OpenAPI description."""
    asked = CompletionRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = asked.pop("$defs")
    asked["properties"]["model"]["anyOf"][0]["enum"] = [name]
    asked["properties"]["max_tokens"]["anyOf"][0]["maximum"] = limits.max_tokens
    integer, text = {"type": "integer"}, {"type": "string"}

    def object_of(**fields: Any) -> dict[str, Any]:
        return {"type": "object", "properties": fields, "required": list(fields)}

    def many(item: dict[str, Any]) -> dict[str, Any]:
        return {"type": "array", "items": item}

    def maybe(schema: dict[str, Any]) -> dict[str, Any]:
        return {"anyOf": [schema, {"type": "null"}]}

    number = {"type": "number"}
    model = object_of(id=text, object={"const": "model"}, created=integer, owned_by=text, max_tokens=integer)
    logprobs = object_of(
        tokens=many(text), token_logprobs=many(number),
        top_logprobs=many({"type": "object", "additionalProperties": number}), text_offset=many(integer),
    )  # fmt: skip
    choice = object_of(
        index=integer, text=text, logprobs=maybe(logprobs), finish_reason=maybe({"enum": ["stop", "length"]})
    )
    usage = object_of(prompt_tokens=integer, completion_tokens=integer, total_tokens=integer)
    completion = object_of(
        id=text, object={"const": "text_completion"}, created=integer, model=text, choices=many(choice), usage=usage
    )
    error = object_of(error=object_of(message=text, type=text, param=maybe(text), code=maybe(text)))
    failed = {"description": "an error", "content": {"application/json": {"schema": error}}}

    def route(what: str, kind: str, schema: dict[str, Any], **more: Any) -> dict[str, Any]:
        content = {kind: {"schema": schema}} | ({"text/event-stream": {}} if more else {})
        return {
            "summary": what,
            "responses": {"200": {"description": what, "content": content}, "default": failed},
        } | more

    by_name = {"name": "name", "in": "path", "required": True, "schema": text}
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Asked"}}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "textgen", "version": "1"},
        "paths": {
            "/v1/completions": {
                "post": route("continue prompts", "application/json", completion, requestBody=body)
            },
            "/v1/models": {"get": route("the model", "application/json", object_of(data=many(model)))},
            "/v1/models/{name}": {"get": route("the model", "application/json", model) | {"parameters": [by_name]}},
            "/healthz": {"get": route("the server runs", "application/json", object_of(status=text))},
            "/metrics": {"get": route("figures for Prometheus", "text/plain", text)},
        },
        "components": {"schemas": parts | {"Asked": asked}},
    }  # fmt: skip


# --- who may ask -----------------------------------------------------------------------------------------------------


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
