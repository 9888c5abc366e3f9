"""OpenAI's completions protocol: requests, errors, and the API's description of itself."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from textgen.config import SamplingConfig
from textgen.data.corpus import normalize

BODY_BYTES = 1 << 20
BODY_SECONDS = 10.0


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
