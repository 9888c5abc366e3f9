"""Responses of the HTTP API as typed models, and errors in OpenAI's form."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

# These models describe the responses in `/openapi.json`; the tests validate real responses with them. The server itself
# builds dicts: as a model, an event of a stream with one token takes 7.8 us instead of 3.9, with log-probabilities 14.9
# instead of 8.1 (one Zen 5 core, 2026-11-29). At 12,500 tokens per second of a single stream that is 5 % of a core.


class Logprobs(BaseModel):
    """Log-probabilities of the tokens of a text, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null for the first token of a prompt")
    top_logprobs: list[dict[str, float] | None] = Field(
        description="the most likely tokens at each position, and the token itself"
    )
    text_offset: list[int] = Field(description="the token's first character in the text of all events")
    token_ranks: list[int | None] | None = Field(
        None, description="of a scored prompt, 1 for the most likely token; null for tokens of the sample; an extension"
    )


class CompletionChoice(BaseModel):
    """One sample of a prompt."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "nothing_allowed", "regex_limit"] | None = Field(
        description="null in a stream until the sample ends. The last two are extensions: no token could be drawn"
    )
    probabilities: dict[str, float] | None = Field(
        None, description="of the texts of `choices`, at the sample's end; an extension"
    )
    state_id: str | None = Field(
        None, description="continues the text, at the sample's end, with `keep_state`; an extension"
    )


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
    root: str = Field(description="the same name, as with vLLM")
    parent: None = Field(description="no model that this one adapts, as with vLLM")
    max_model_len: int = Field(description="largest number of tokens of prompt and text together, as with vLLM")
    max_tokens: int = Field(description="the limit of `max_tokens` in a request; an extension")
    labels: list[str] = Field(description="labels that `label` in a request may name; an extension")


class ModelList(BaseModel):
    """The response to `GET /v1/models`."""

    object: Literal["list"]
    data: list[Model]


class Tokenized(BaseModel):
    """The response to `POST /tokenize`, that of vLLM."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    """The response to `POST /detokenize`, that of vLLM."""

    prompt: str


class TokenizerInfo(BaseModel):
    """The response to `GET /tokenizer_info`, with the names of Hugging Face's tokenizer_config.json."""

    tokenizer_class: Literal["textgen"]
    vocab_size: int
    model_max_length: int
    bos_token: str
    bos_token_id: int
    eos_token: str
    eos_token_id: int
    unk_token: str
    unk_token_id: int
    pad_token: None
    add_bos_token: bool = Field(description="every text begins with `bos_token`")
    chat_template: None
    sha256: str = Field(description="of the tokenizer's model file")


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
