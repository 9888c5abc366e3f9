"""OpenAI's completions protocol: requests, responses, errors, and the OpenAPI description of them."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from textgen.config import SamplingConfig
from textgen.data.corpus import normalize

BODY_BYTES = 1 << 20
BODY_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a request, which the server's flags set."""

    max_tokens: int = 1024
    """tokens of a sample"""
    max_prompt_tokens: int = 2048
    """tokens of a prompt"""
    timeout: float = 300.0
    """seconds from a request to its last token"""


# --- requests --------------------------------------------------------------------------------------------------------

Text = Annotated[str, Field(max_length=16384)]
Stop = Annotated[str, Field(min_length=1, max_length=64)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The body of `POST /v1/completions`."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    # As with OpenAI, null is the same as an absent field.
    model: str | None = Field(None, description="the name in `/v1/models`")
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=8)] | None = Field(
        None, description="an absent or empty prompt starts a text"
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
    seed: int | None = Field(None, ge=0, lt=1 << 63, description="fixes the samples; random for each request if absent")
    logprobs: int | None = Field(None, ge=0, le=10, description="number of most likely tokens to return per token")
    echo: bool | None = Field(None, description="return the prompt before the text")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] | None = Field(None, description="ignored")

    @field_validator("n", "max_tokens", "top_k", "seed", "logprobs", mode="before")
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
        ApiError: the body is not JSON, or a field is unknown or invalid. The message names the first one.
    """
    try:
        request = CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if not first["loc"]:
            raise ApiError(400, f"the body: {first['msg']}") from None
        name = str(first["loc"][0])[:64]
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"unknown field `{name}`", param=name) from None
        value = "" if isinstance(first["input"], (list, dict)) else f": {str(first['input'])[:40]}"
        raise ApiError(400, f"`{name}`: {first['msg']}{value}", param=name) from None
    if request.max_tokens is not None and request.max_tokens > limits.max_tokens:
        message = f"`max_tokens` must be at most {limits.max_tokens}: {request.max_tokens}"
        raise ApiError(400, message, param="max_tokens")
    return request


# --- responses -------------------------------------------------------------------------------------------------------

# These models describe the responses in `/openapi.json`; the tests validate real responses with them. The server itself
# builds dicts: as a model, an event of a stream with one token takes 7.8 us instead of 3.9, with log-probabilities 14.9
# instead of 8.1 (one Zen 5 core, 2026-11-29). At 12,500 tokens per second of a single stream that is 5 % of a core.


class Logprobs(BaseModel):
    """Log-probabilities of the tokens of a text, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] = Field(description="the most likely tokens at each position")
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
    """What is wrong with a request."""

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
            "/healthz": {"get": _operation("tell that the server runs", _json_content(Health))},
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
    return schemas


def _json_content(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}


def _operation(summary: str, content: dict[str, Any]) -> dict[str, Any]:
    """Return a route's description: `content` if it succeeds, an `ErrorResponse` if not."""
    failure = {"description": "an error", "content": _json_content(ErrorResponse)}
    return {"summary": summary, "responses": {"200": {"description": summary, "content": content}, "default": failure}}
