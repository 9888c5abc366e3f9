"""Routes of the HTTP API, answers and streams. Prompts and texts are never logged."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from textgen.data.corpus import normalize
from textgen.decoding.generation import TokenLogprobs
from textgen.serving.protocol import ApiError, CompletionRequest, Limits, describe_api, parse, read_body
from textgen.serving.scheduler import BusyError, ClosedError, Piece, Scheduler, Stream

log = logging.getLogger("textgen")

Result = TypeVar("Result")
PAGE = Path(__file__).parent / "page"


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
