"""OpenAI's completions protocol: requests, responses, errors, and the OpenAPI description of them."""

from __future__ import annotations

import asyncio
import difflib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
)
from pydantic.json_schema import models_json_schema
from pydantic_core import ErrorDetails, PydanticCustomError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from textgen.config import SamplingConfig
from textgen.data.corpus import normalize

BODY_BYTES = 1 << 20
BODY_SECONDS = 10.0
MAX_N = 128  # as with OpenAI


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a request, which the server's flags set."""

    max_tokens: int = 1024
    """tokens of a sample"""
    max_prompt_tokens: int = 2048
    """tokens of a prompt"""
    max_samples: int = 256
    """samples of a request, which are queued together"""
    timeout: float = 300.0
    """seconds from a request to its last token"""


# --- requests --------------------------------------------------------------------------------------------------------

Text = Annotated[str, Field(max_length=16384)]
Stop = Annotated[str, Field(min_length=1, max_length=64)]


def _require_false(value: bool) -> bool:
    if value:
        raise PydanticCustomError("unsupported", "must be false")
    return value


# `Literal[False]` would take 0 as well.
Off = Annotated[bool, AfterValidator(_require_false), WithJsonSchema({"const": False})]
EmptyList = Annotated[list[Any], Field(max_length=0)]
EmptyObject = Annotated[dict[str, Any], Field(max_length=0)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: Off | None = None


class ResponseFormat(BaseModel):
    """The form of a chat's response."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"] | None = None


class UnsupportedFields(BaseModel):
    """Fields of OpenAI's completions and chats without a function here.

    Clients send some of them always. Each takes the values that ask for nothing, and any other value is refused. Types
    are those of `openai.types.completion_create_params` and `openai.types.chat.completion_create_params` (3.54).
    """

    best_of: int | None = Field(None, ge=1, le=1)
    suffix: Literal[""] | None = None
    logit_bias: EmptyObject | None = None
    messages: EmptyList | None = None
    tools: EmptyList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: EmptyList | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    store: Off | None = None
    metadata: EmptyObject | None = None
    service_tier: Literal["auto", "default"] | None = None
    top_logprobs: None = None
    max_completion_tokens: None = None
    modalities: None = None
    audio: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_key: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    reasoning_effort: None = None
    safety_identifier: None = None
    verbosity: None = None
    web_search_options: None = None


def _add_conditions(schema: dict[str, Any]) -> None:
    """Describe the combinations of fields that `parse_request` refuses, in the schema of a request."""

    def sets(**fields: dict[str, Any]) -> dict[str, Any]:
        return {"required": list(fields), "properties": fields}

    usage = sets(stream_options={"type": "object"} | sets(include_usage={"const": True}))
    refused = [
        sets(echo={"const": True}, logprobs={"type": "number"}),
        sets(best_of={"const": 1}, n={"type": "number", "minimum": 2}),
        usage | {"not": sets(stream={"const": True})},
    ]
    schema["allOf"] = [{"not": condition} for condition in refused]


class CompletionRequest(UnsupportedFields):
    """The body of `POST /v1/completions`."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, json_schema_extra=_add_conditions)

    # As with OpenAI, null is the same as an absent field.
    model: str | None = Field(None, description="the name in `/v1/models`")
    # `fail_fast`: a body has room for 500,000 wrong items, and an error for each would hold the server up for seconds.
    prompt: Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)] | None = Field(
        None, description="an absent or empty prompt starts a text"
    )
    n: int | None = Field(None, ge=1, le=MAX_N, description="samples of each prompt; default 1")
    max_tokens: int | None = Field(None, ge=1, description="default 16")
    temperature: float | None = Field(None, ge=0, le=2, description="default 1")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=1 << 20, description="an extension")
    min_p: float | None = Field(None, ge=0, le=1, description="an extension")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=0, lt=1 << 63, description="fixes the samples; random for each request if absent")
    logprobs: int | None = Field(None, ge=0, le=10, description="number of most likely tokens to return per token")
    echo: bool | None = Field(None, description="return the prompt before the text; not with `logprobs`")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] | None = Field(None, description="ignored")

    @field_validator("best_of", "n", "max_tokens", "top_k", "seed", "logprobs", mode="before")
    @classmethod
    def _integral_float(cls, value: object) -> object:
        """Accept 1.0 as an integer: in JSON Schema it is one."""
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @property
    def prompts(self) -> list[str]:
        """Return the prompts as a list."""
        return self.prompt if isinstance(self.prompt, list) else [self.prompt or ""]

    def config(self, normalization: str) -> SamplingConfig:
        """Return the sampling settings; the same normalization applies to stop strings as to the training text."""
        names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "logprobs", "seed")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.top_p == 1:  # filters nothing, and would cost time
            del given["top_p"]
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingConfig(
            **{"seed": secrets.randbits(32)} | given,
            max_new_tokens=self.max_tokens or 16,
            stop=tuple(normalize(stop, normalization) for stop in stops),
        )


async def read_body(request: Request) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: the content type is not JSON, or the body exceeds `BODY_BYTES` or takes longer than `BODY_SECONDS`.
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
                # Read beyond the limit and discard it: a client reads the response only after it has sent its body.
                if size <= BODY_BYTES:
                    body += chunk
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
    if size > BODY_BYTES:
        raise ApiError(413, f"the body must be at most {BODY_BYTES} bytes")
    return bytes(body)


def parse_request(body: bytes, limits: Limits) -> CompletionRequest:
    """Parse the body of a completions request.

    Raises:
        ApiError: the body is not JSON, a field is unknown or invalid, or fields do not go together. The message names
            the first one.
    """
    try:
        request = CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise _field_error(error.errors(include_url=False)) from None
    n, prompts = request.n or 1, len(request.prompts)
    wants_usage = request.stream_options is not None and request.stream_options.include_usage
    if request.max_tokens is not None and request.max_tokens > limits.max_tokens:
        wrong = "max_tokens", f"`max_tokens` must be at most {limits.max_tokens}: {request.max_tokens}"
    elif n * prompts > limits.max_samples:
        items, times = f"`prompt` has {prompts} items", f"`n` is {n}"
        seen = items if n == 1 else times if prompts == 1 else f"{items} and {times}: {n * prompts} samples"
        wrong = "prompt", f"{seen}; at most {limits.max_samples}, by the server's flag `--max_waiting`"
    elif request.echo and request.logprobs is not None:
        wrong = "echo", "`echo` cannot be combined with `logprobs`: prompts are not scored"
    elif request.best_of is not None and n > 1:
        wrong = "best_of", f"`best_of` must be at least `n` {n}: {request.best_of}"
    elif wants_usage and not request.stream:
        wrong = "stream_options", "`stream_options.include_usage` needs `stream`"
    else:
        return request
    raise ApiError(400, wrong[1], param=wrong[0])


# The error of a wrong value, by pydantic's name of the error. `bound` is the violated limit, `size` what the value has.
VALUE_ERRORS = {
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "finite_number": "must be finite",
    "greater_than_equal": "must be at least {bound}",
    "greater_than": "must be above {bound}",
    "less_than_equal": "must be at most {bound}",
    "less_than": "must be below {bound}",
}
SIZE_ERRORS = {
    "string_too_short": "is an empty string",
    "too_short": "is an empty list",
    "string_too_long": "has {size} characters; at most {bound}",
    "too_long": "has {size} items; at most {bound}",
}
UNIONS = ("prompt", "stop")  # fields that take a string or a list of strings


def _field_error(errors: Sequence[ErrorDetails]) -> ApiError:
    """Return the response for the errors of the first wrong field."""
    field = errors[0]["loc"][:1]
    errors = [error for error in errors if error["loc"][:1] == field]
    # A union reports an error of each type that it takes. Those of the type that the value has are the telling ones.
    fitting = [error for error in errors if len(error["loc"]) != 2 or not error["type"].endswith("_type")]
    error = (fitting or errors)[0]
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if not field:
        return ApiError(400, "the body " + VALUE_ERRORS.get(kind, f"is not JSON: {context.get('error')}"))

    path = error["loc"][2:] if field[0] in UNIONS else error["loc"][1:]
    name = str(field[0])[:64] + "".join(f"[{part}]" if isinstance(part, int) else f".{part[:64]}" for part in path)
    name = json.dumps(name, ensure_ascii=False)[1:-1]  # without line breaks
    shown = "" if isinstance(value, (list, dict)) else f": {json.dumps(value, ensure_ascii=False)[:40]}"
    bound = next((context[key] for key in ("ge", "gt", "le", "lt", "max_length") if key in context), None)
    if kind == "extra_forbidden":
        known = sorted({*CompletionRequest.model_fields} - {*UnsupportedFields.model_fields})
        nearest = [] if path else difflib.get_close_matches(name, known, n=1)
        message = f"unknown field `{name}`" + "".join(f"; the nearest is `{other}`" for other in nearest)
    elif field[0] in UNIONS and not fitting:
        message = f"`{name}` must be a string or a list of strings{shown}"
    elif field[0] == "prompt" and type(value) in (int, list) and kind == "string_type":
        message = f"`{name}` must be a string{shown}; token ids are not supported"
    elif kind in SIZE_ERRORS and bound != 0:
        message = f"`{name}` " + SIZE_ERRORS[kind].format(bound=bound, size=len(value))
    elif kind in VALUE_ERRORS:
        limit = f"{bound:g}" if isinstance(bound, float) else bound
        message = f"`{name}` {VALUE_ERRORS[kind].format(bound=limit)}{shown}"
    else:
        message = f"`{name}` is not supported{shown}; leave it out"
    return ApiError(400, message, param=name)


# --- responses -------------------------------------------------------------------------------------------------------

# These models describe the responses in `/openapi.json`; the tests validate real responses with them. The server itself
# builds dicts: as a model, an event of a stream with one token takes 7.8 us instead of 3.9, with log-probabilities 14.9
# instead of 8.1 (one Zen 5 core, 2026-11-29). At 12,500 tokens per second of a single stream that is 5 % of a core.


class Logprobs(BaseModel):
    """Log-probabilities of the tokens of a text, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] = Field(
        description="the most likely tokens at each position, and the drawn one"
    )
    text_offset: list[int] = Field(description="the token's first character in the text of all events")


class CompletionChoice(BaseModel):
    """One sample of a prompt."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None = Field(description="null in a stream until the sample ends")


class Usage(BaseModel):
    """Numbers of tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """The response to `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Model(BaseModel):
    """A model that the server offers."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_tokens: int = Field(description="the limit of `max_tokens` in a request; an extension")


class ModelList(BaseModel):
    """The response to `GET /v1/models`."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """The response to `GET /healthz`."""

    status: Literal["ok"]


class ErrorDetail(BaseModel):
    """The fault of a request."""

    message: str
    type: str
    param: str | None = Field(description="the field of the request")
    code: str | None


class ErrorResponse(BaseModel):
    """The response of every request that fails."""

    error: ErrorDetail


class ApiError(Exception):
    """An error response in OpenAI's form.

    Args:
        status: the HTTP status.
        message: one line for the client.
        code: OpenAI's name of the error, if it has one.
        param: the field of the request that is invalid.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict[str, Any]:
        """Return the JSON object, an `ErrorResponse`."""
        types = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        type_ = types.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": type_, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        """Return the HTTP response."""
        # After 408 and 413 part of the body is unread, so that the connection cannot carry another request.
        headers = {"connection": "close"} if self.status in (408, 413) else {}
        if self.status in (429, 503):
            headers["retry-after"] = "1"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


# --- the OpenAPI description -----------------------------------------------------------------------------------------


def describe_api(name: str, limits: Limits) -> dict[str, Any]:
    """Return the OpenAPI description of a server with one model of this name."""
    schemas = _schemas(name, limits)
    post_body = {"required": True, "content": _json_content(CompletionRequest)}
    completion = _operation("continue prompts", _json_content(Completion) | {"text/event-stream": {}})
    model_name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "textgen", "version": "1"},
        "paths": {
            "/v1/completions": {"post": completion | {"requestBody": post_body}},
            "/v1/models": {"get": _operation("list the model", _json_content(ModelList))},
            "/v1/models/{name}": {
                "get": _operation("describe the model", _json_content(Model)) | {"parameters": [model_name]}
            },
            "/healthz": {"get": _operation("confirm that the server runs", _json_content(Health))},
            "/metrics": {
                "get": _operation("metrics for Prometheus", {"text/plain": {"schema": {"type": "string"}}}),
            },
        },
        "components": {"schemas": schemas},
    }


def _schemas(name: str, limits: Limits) -> dict[str, Any]:
    """Return the JSON schemas of requests and responses, with the limits that this server sets."""
    responses = (Completion, ModelList, Model, Health, ErrorResponse)
    _, definitions = models_json_schema(
        [(CompletionRequest, "validation"), *((response, "serialization") for response in responses)],
        ref_template="#/components/schemas/{model}",
    )
    schemas: dict[str, Any] = definitions["$defs"]
    fields = schemas["CompletionRequest"]["properties"]
    fields["model"]["anyOf"][0]["enum"] = [name]
    fields["max_tokens"]["anyOf"][0]["maximum"] = limits.max_tokens
    fields["prompt"]["anyOf"][1]["maxItems"] = limits.max_samples
    fields["n"]["anyOf"][0]["maximum"] = min(limits.max_samples, MAX_N)
    return schemas


def _json_content(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}


def _operation(summary: str, content: dict[str, Any]) -> dict[str, Any]:
    """Return a route's description: `content` if it succeeds, an `ErrorResponse` if not."""
    failure = {"description": "an error", "content": _json_content(ErrorResponse)}
    return {"summary": summary, "responses": {"200": {"description": summary, "content": content}, "default": failure}}
