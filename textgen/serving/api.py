"""Routes of the HTTP API, and its metrics. Prompts and texts are never logged."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from textgen.config import SamplingConfig
from textgen.data.corpus import normalize
from textgen.decoding.decoders import PREFILL_WINDOW
from textgen.decoding.generation import number_requests
from textgen.decoding.samples import Sample, require_drawable, require_label
from textgen.errors import TextgenError
from textgen.serving.completion import EventStream, PendingChoice, PendingCompletion, cancel_on_disconnect, late
from textgen.serving.description import describe_api
from textgen.serving.prompts import (
    Prompt,
    PromptReader,
    decode_document,
    encode_document,
    read_prompts,
    require_ids,
)
from textgen.serving.protocol import (
    CompletionRequest,
    DetokenizeRequest,
    Limits,
    TokenizeRequest,
    parse_body,
    parse_request,
    read_body,
    setting_error,
)
from textgen.serving.responses import ApiError
from textgen.serving.scheduler import Delta, Scheduler, Stream
from textgen.serving.states import KeptState, StateTable

PAGE = Path(__file__).parent / "page"


@dataclass
class Metrics:
    """Counters of `/metrics`."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    """by path and status"""
    prompt_tokens: int = 0
    first_tokens: int = 0
    first_token_seconds: float = 0.0
    """sum of the seconds from a request to its first token"""

    def text(self, scheduler: Scheduler, num_connections: int, num_states: int) -> str:
        """Return all metrics in Prometheus' text format."""
        values: list[tuple[str, str, str, float]] = [
            ("counter", "requests_total", f'{{path="{path}",code="{code}"}}', count)
            for (path, code), count in sorted(self.requests.items())
        ]
        values += [
            ("counter", "prompt_tokens_total", "", self.prompt_tokens),
            ("counter", "prompt_tokens_read_in_slots_total", "", scheduler.num_read_tokens),
            ("counter", "prefix_tokens_reused_total", "", scheduler.num_reused_tokens),
            ("gauge", "prefix_states", "", len(scheduler.prefixes)),
            ("gauge", "prefix_bytes", "", scheduler.prefixes.num_bytes),
            ("gauge", "kept_states", "", num_states),
            ("counter", "tokens_total", "", scheduler.num_tokens),
            ("gauge", "samples_running", "", scheduler.num_running),
            ("gauge", "samples_waiting", "", scheduler.num_waiting),
            ("gauge", "connections", "", num_connections),
            ("summary", "first_token_seconds", "_sum", round(self.first_token_seconds, 6)),
            ("summary", "first_token_seconds", "_count", self.first_tokens),
        ]
        lines: dict[str, None] = {}  # ordered, without repeated TYPE lines
        for kind, name, suffix, value in values:
            lines[f"# TYPE textgen_{name} {kind}"] = None
            lines[f"textgen_{name}{suffix} {value}"] = None
        return "\n".join(lines) + "\n"


class Api:
    """Handlers of all routes.

    Args:
        name: the model's name.
        normalization: the normalization of the model's training text.
        scheduler: decodes the samples.
        limits: limits of a request.
        states: the texts that clients may continue.
        num_connections: returns the number of open connections.
    """

    def __init__(
        self,
        name: str,
        normalization: str,
        scheduler: Scheduler,
        limits: Limits,
        states: StateTable,
        num_connections: Callable[[], int],
    ) -> None:
        self.metrics, self._states = Metrics(), states
        self._name, self._normalization, self._scheduler, self._limits = name, normalization, scheduler, limits
        self._num_connections, self._compiling = num_connections, asyncio.Lock()
        self._model = {
            "id": name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "textgen",
            "root": name,
            "parent": None,
            "max_model_len": limits.max_model_len,
            "max_tokens": limits.max_tokens,
            "labels": list(scheduler.labels),
        }

    def app(self) -> Starlette:
        """Return the routes as an application. It starts the decoding thread, and waits for its end."""
        routes = [
            _static_route("/", "index.html", "text/html"),
            _static_route("/page.css", "page.css", "text/css"),
            _static_route("/page.js", "page.js", "text/javascript"),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info),
            Route("/healthz", self.health),
            Route("/metrics", self.prometheus),
            Route("/openapi.json", self.openapi),
        ]
        handlers = {
            ApiError: _on_api_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
            Exception: _on_exception,
        }
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._run_scheduler)
        app.router.redirect_slashes = False
        return app

    @asynccontextmanager
    async def _run_scheduler(self, _: Starlette) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def on_deltas(deltas: Sequence[tuple[Stream, Delta]]) -> None:
            with suppress(RuntimeError):  # the loop is closed, so that no client waits
                loop.call_soon_threadsafe(self._add_deltas, deltas)

        self._scheduler.start(on_deltas)
        yield
        self._scheduler.stop(0)
        self._scheduler.join(1)

    def _add_deltas(self, deltas: Sequence[tuple[Stream, Delta]]) -> None:
        """Add deltas to their completions."""
        for stream, delta in deltas:
            completion, index = stream.owner
            if not completion.has_delta:
                completion.has_delta = True
                self.metrics.first_tokens += 1
                self.metrics.first_token_seconds += time.monotonic() - completion.created_at
            completion.add(index, delta)

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        parsed = parse_request(await read_body(request, self._limits.body_bytes), self._limits)
        self._require_model(parsed.model)
        config = parsed.config(self._normalization, self._limits.max_tokens)
        await self._require_drawable(config)
        completion = self._new_completion(parsed, config, request.client)
        completion.start(self._limits.timeout)
        self.metrics.prompt_tokens += completion.num_prompt_tokens
        if parsed.stream:
            options = parsed.stream_options
            return EventStream(completion, include_usage=options is not None and options.include_usage is True)
        with closing(completion):
            result = await cancel_on_disconnect(request.receive, completion.result())
            return Response(result, media_type="application/json")

    def _require_model(self, name: str | None) -> None:
        """Raise ApiError if a request names another model."""
        if name not in (None, self._name):
            raise _model_not_found(self._name)

    async def _require_drawable(self, config: SamplingConfig) -> None:
        """Check settings against the tokenizer. A regex is compiled in a thread, one at a time, for all samples.

        Raises:
            ApiError: the settings cannot be used.
        """
        if config.regex is not None and find_spec("llguidance") is None:
            raise ApiError(400, "`regex` is not supported here: the server lacks the package llguidance", param="regex")
        try:
            if config.regex is None:
                require_drawable(config, self._scheduler.tokenizer)
            else:
                async with asyncio.timeout(self._limits.timeout):  # of the wait alone: a thread cannot be stopped
                    await self._compiling.acquire()
                try:
                    await asyncio.to_thread(require_drawable, config, self._scheduler.tokenizer)
                finally:
                    self._compiling.release()
        except ValueError as error:
            raise setting_error(error) from None
        except TimeoutError:
            raise late(self._limits.timeout) from None

    def _new_completion(
        self, request: CompletionRequest, config: SamplingConfig, connection: Hashable
    ) -> PendingCompletion:
        """Return a completion that is not started.

        Raises:
            ApiError: a prompt has too many tokens, an id is not in the vocabulary, or a state or the label is unknown.
        """
        tokenizer, num_drawn = self._scheduler.tokenizer, request.num_samples
        kept = self._kept_state(request)
        label = request.label if kept is None else kept.label
        begin = self._begin_id(label, config)
        completion = PendingCompletion(self._name, self._scheduler, n=request.n or 1, num_drawn=num_drawn)
        before = "" if kept is None else kept.text
        prompts = read_prompts(request, tokenizer, self._normalization, self._limits, begin=begin, before=before)
        if request.keep_state:
            self._require_room(prompts, completion.n)
        samples = number_requests(((prompt.text, config, label) for prompt in prompts), num_drawn)
        for prompt in prompts:
            completion.num_prompt_tokens += len(prompt.tokens)
            reader = self._new_reader(request, prompt, kept)
            readers = [] if reader is None else [reader]
            if config.label_scale != 1 and len(prompt.tokens) > PREFILL_WINDOW and request.max_tokens != 0:
                plain = replace(prompt, begin=tokenizer.bos_id)  # read without the label too
                keys = self._scheduler.prefixes.keys(plain.ids(tokenizer.bos_id), request.cache_salt or "")
                readers.append(PromptReader(plain, tokenizer.bos_id, None, keys=keys))
            keep = partial(self._keep, prompt, label, reader, connection) if request.keep_state else None
            for sample in islice(samples, num_drawn):
                index = len(completion.choices)
                stream = self._scheduler.new_stream(
                    sample,
                    prompt.ids(tokenizer.bos_id),
                    (completion, index),
                    readers=readers,
                    reads_only=request.max_tokens == 0,
                )
                wants_logprobs, scored = request.logprobs is not None, reader if request.scores_prompts else None
                choice = PendingChoice(index, stream, len(prompt.echo), prompt.echo, wants_logprobs, scored, keep)
                completion.choices.append(choice)
        return completion

    def _new_reader(self, request: CompletionRequest, prompt: Prompt, kept: KeptState | None) -> PromptReader | None:
        """Return the reader of a prompt that is scored or longer than a window; None for another one."""
        bos_id = self._scheduler.tokenizer.bos_id
        if request.scores_prompts:
            return PromptReader(prompt, bos_id, request.logprobs)
        if len(prompt.tokens) <= PREFILL_WINDOW or (request.max_tokens == 0 and not request.keep_state):
            return None
        keys = self._scheduler.prefixes.keys(prompt.ids(bos_id), request.cache_salt or "")
        return PromptReader(prompt, bos_id, None, keys=keys, read=None if kept is None else kept.read)

    def _kept_state(self, request: CompletionRequest) -> KeptState | None:
        """Return the state that a request continues; None if it continues none.

        Raises:
            ApiError: the state is unknown, or the server keeps none.
        """
        if self._states.max_states == 0 and (request.keep_state or request.state_id is not None):
            name = "keep_state" if request.keep_state else "state_id"
            raise ApiError(400, f"`{name}` is off, by the server's flag `--kept_states 0`", param=name)
        if request.state_id is None:
            return None
        kept = self._states.get(request.state_id)
        if kept is None:  # without the id, which a client may log
            message = "`state_id` is not known here: it is too old, or of another server process; send the whole text"
            raise ApiError(404, message, code="state_not_found", param="state_id")
        return kept

    def _require_room(self, prompts: Sequence[Prompt], n: int) -> None:
        """Raise ApiError if the states after `n` samples of each prompt would drive each other out."""
        most, count = self._states.max_of_connection, n * len(prompts)
        if count > most:
            message = f"`keep_state` of {count} samples; a connection may keep {most}, by the server's flag"
            raise ApiError(400, f"{message} `--kept_states`", param="keep_state")
        for prompt in prompts:
            # its text and tokens; a state beside them is much smaller
            size = 4 * len(prompt.given) + 36 * len(prompt.tokens)
            if size > self._states.max_bytes:
                message = f"`keep_state` of a prompt of {size} bytes; all states have {self._states.max_bytes}"
                raise ApiError(400, f"{message}, by the server's flag `--kept_states`", param="keep_state")

    def _begin_id(self, label: str | None, config: SamplingConfig) -> int:
        """Return the first input of a text; raise ApiError if its label is unknown, or missing for `label_scale`."""
        try:
            begin = self._scheduler.begin_id(label)
            require_label(config, begin, self._scheduler.tokenizer)
            return begin
        except TextgenError as error:
            raise ApiError(400, f"`label`: {error}"[:1000], param="label") from None

    def _keep(
        self, prompt: Prompt, label: str | None, reader: PromptReader | None, connection: Hashable, sample: Sample
    ) -> str:
        """Keep the state after a sample, and return its id."""
        read = None if reader is None else reader.read_state(self._scheduler.decoder)
        if read is not None:  # copied, else it would keep the memory of the window whose part it is
            read = replace(read, state=[part.clone() for part in read.state])
        return self._states.put(KeptState(prompt.given + sample.text, read, label), connection)

    async def tokenize(self, request: Request) -> Response:
        """Return the tokens of a text, as vLLM does."""
        parsed = parse_body(TokenizeRequest, await read_body(request, self._limits.body_bytes))
        self._require_model(parsed.model)
        tokenizer = self._scheduler.tokenizer
        text = normalize(parsed.prompt, self._normalization)
        # in a thread: a long text takes a second, and streams wait meanwhile
        tokens = await asyncio.to_thread(encode_document, tokenizer, text)
        if parsed.add_special_tokens is not False and tokens[:1] != [tokenizer.bos_id]:
            tokens = [tokenizer.bos_id, *tokens]
        texts = None
        if parsed.return_token_strs:
            texts = [tokenizer.token_text(token) or tokenizer.eos_token for token in tokens]
        return JSONResponse(
            {
                "count": len(tokens),
                "max_model_len": self._limits.max_model_len,
                "tokens": tokens,
                "token_strs": texts,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        """Return the text of tokens, as vLLM does."""
        parsed = parse_body(DetokenizeRequest, await read_body(request, self._limits.body_bytes))
        self._require_model(parsed.model)
        tokenizer = self._scheduler.tokenizer
        require_ids(parsed.tokens, tokenizer, "tokens")
        return JSONResponse({"prompt": decode_document(tokenizer, parsed.tokens)})

    async def tokenizer_info(self, _: Request) -> Response:
        """Describe the tokenizer, as vLLM does."""
        tokenizer = self._scheduler.tokenizer
        return JSONResponse(
            {
                "tokenizer_class": "textgen",
                "vocab_size": tokenizer.vocab_size,
                "model_max_length": self._limits.max_model_len,
                "bos_token": tokenizer.eos_token,
                "bos_token_id": tokenizer.bos_id,
                "eos_token": tokenizer.eos_token,
                "eos_token_id": tokenizer.eos_id,
                "unk_token": tokenizer.unk_token,
                "unk_token_id": tokenizer.unk_id,
                "pad_token": None,
                "add_bos_token": True,
                "chat_template": None,
                "sha256": tokenizer.sha256,
            }
        )

    async def models(self, _: Request) -> Response:
        """List the one model."""
        return JSONResponse({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        """Describe the one model."""
        if request.path_params["name"] != self._name:
            raise _model_not_found(self._name)
        return JSONResponse(self._model)

    async def health(self, _: Request) -> Response:
        """Confirm that the server runs."""
        return JSONResponse({"status": "ok"})

    async def prometheus(self, _: Request) -> Response:
        """Return metrics for Prometheus."""
        text = self.metrics.text(self._scheduler, self._num_connections(), len(self._states))
        return Response(text, media_type="text/plain; version=0.0.4")

    async def openapi(self, _: Request) -> Response:
        """Describe the API."""
        return JSONResponse(
            describe_api(self._name, self._limits, self._scheduler.tokenizer.vocab_size, self._scheduler.labels)
        )


def _static_route(path: str, name: str, media_type: str) -> Route:
    """Return a route to a file of the page, which is read once."""
    response = Response((PAGE / name).read_bytes(), headers={"cache-control": "no-cache"}, media_type=media_type)
    return Route(path, lambda _: response)


def _model_not_found(name: str) -> ApiError:
    return ApiError(404, f"the model here is `{name}`", code="model_not_found", param="model")


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = error.detail
    if error.status_code == 404:
        detail = "unknown path; `POST /v1/completions` continues texts; chats are not supported"
    response = ApiError(error.status_code, detail).response
    response.headers.update(error.headers or {})
    return response


async def _on_disconnect(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # for the log only; nginx logs this status for a client that disconnected


async def _on_exception(_: Request, error: Exception) -> Response:
    return ApiError(500, "the server failed; its log has the traceback").response
