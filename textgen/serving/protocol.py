"""Requests of the HTTP API as typed models, and the one line that each wrong request gets."""

from __future__ import annotations

import asyncio
import difflib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from starlette.requests import Request

from textgen.config import MAX_CHOICES, MAX_REGEX_BYTES, SAMPLER_PARTS, SamplingConfig
from textgen.decoding.guides import MAX_CHOICE_TOKENS
from textgen.decoding.steering import normalize_settings
from textgen.serving.responses import ApiError

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

    @property
    def max_scored_tokens(self) -> int:
        """Prompt tokens that one request may have scored: their log-probabilities are held until the response."""
        return 16 * self.max_prompt_tokens

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its sample."""
        return self.max_prompt_tokens + self.max_tokens

    @property
    def body_bytes(self) -> int:
        """Bytes of a request's body; a prompt of `max_prompt_tokens` fits, as a text or as ids."""
        return max(BODY_BYTES, 64 * self.max_prompt_tokens)


# --- requests --------------------------------------------------------------------------------------------------------

TokenId = Annotated[int, Field(ge=0)]
Stop = Annotated[str, Field(min_length=1, max_length=64)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Regex = Annotated[str, Field(min_length=1, max_length=MAX_REGEX_BYTES, json_schema_extra={"format": "regex"})]
Choice = Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_TOKENS)]  # a schema cannot count tokens


def _require_false(value: bool) -> bool:
    if value:
        raise PydanticCustomError("unsupported", "must be false")
    return value


def _check_prompt(value: object) -> object:
    """Require a text, a list of texts, the ids of a text, or a list of them. The error names the first wrong item."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _prompt_error("prompt", "must be a text, a list of texts, token ids, or a list of lists of ids", value)
    if not value:
        raise _prompt_error("prompt", "is an empty list", value)
    given = _integral_items(value)
    kind = next((kind for kind in (str, list, int) if _is_a(given[0], kind)), None)
    if kind is None:
        raise _prompt_error("prompt[0]", "must be a text, a token id, or a list of ids", given[0])
    items = {str: "a text, as `prompt[0]`", list: "a list of ids, as `prompt[0]`", int: "a token id, as `prompt[0]`"}
    for i, item in enumerate(given):
        if not _is_a(item, kind):
            raise _prompt_error(f"prompt[{i}]", f"must be {items[kind]}", item)
        for j, token in enumerate(item if isinstance(item, list) else ()):
            if not _is_a(token, int):
                raise _prompt_error(f"prompt[{i}][{j}]", "must be a token id", token)
    return given


def _integral(value: object) -> object:
    """Return 1.0 as 1: in JSON Schema it is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _integral_items(value: Any) -> Any:
    """Return a list, also one of lists, with `_integral` of its items; any other value as it is."""
    if not isinstance(value, list):
        return value
    return [_integral_items(item) if isinstance(item, list) else _integral(item) for item in value]


def _is_a(value: object, kind: type) -> bool:
    """Return whether a JSON value is a text, a list, or a token id."""
    return type(value) is kind and not (kind is int and value < 0)  # type: ignore[operator]


def _prompt_error(name: str, problem: str, value: object) -> PydanticCustomError:
    shown = "" if isinstance(value, list | dict) else f": {json.dumps(value)[:40]}"
    return PydanticCustomError("prompt", "`{name}` {problem}", {"name": name, "problem": problem + shown})


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

    suffix: Literal[""] | None = None
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

    token_ids = {"type": "array", "items": {"not": {"type": "string"}}}
    usage = sets(stream_options={"type": "object"} | sets(include_usage={"const": True}))
    some_stop = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1}]}
    nonzero = {"type": "number", "not": {"const": 0}}
    beside_choices: dict[str, dict[str, Any]] = {
        "regex": {"type": "string"},
        "stop": some_stop,
        "logit_bias": {"type": "object", "minProperties": 1},
        "top_k": {"type": "number"},
        "label_scale": {"type": "number", "not": {"const": 1}},
        "top_p": {"type": "number", "not": {"const": 1}},
        **dict.fromkeys(
            ("min_p", "presence_penalty", "frequency_penalty", "xtc_probability", "dry_multiplier"), nonzero
        ),
    }
    parts = [
        sets(**{part: {"not": {"type": "null"}}}) | {"not": sets(**{name: nonzero})}
        for name, names in SAMPLER_PARTS.items()
        for part in names
    ]
    refused = [
        sets(regex={"type": "string"}, stop=some_stop),
        *parts,
        *(sets(choices={"type": "array"}, **{name: value}) for name, value in beside_choices.items()),
        sets(label_scale={"type": "number", "not": {"const": 1}})
        | {"not": {"anyOf": [sets(label={"type": "string"}), sets(state_id={"type": "string"})]}},
        sets(max_tokens={"const": 0}) | {"not": sets(echo={"const": True})},
        usage | {"not": sets(stream={"const": True})},
        sets(state_id={"type": "string"}, echo={"const": True}),
        sets(state_id={"type": "string"}, label={"type": "string"}),
        sets(keep_state={"const": True}, echo={"const": True}, logprobs={"type": "number"}),
        sets(keep_state={"const": True}, prompt=token_ids),
        sets(state_id={"type": "string"}, prompt=token_ids),
    ]
    schema["not"] = {"anyOf": refused}  # schemathesis cannot make requests from a `not` for each


class CompletionRequest(UnsupportedFields):
    """The body of `POST /v1/completions`."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, json_schema_extra=_add_conditions)

    # As with OpenAI, null is the same as an absent field.
    model: str | None = Field(None, description="the name in `/v1/models`")
    prompt: Annotated[
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[list[TokenId]], Field(min_length=1)]
        | None,
        BeforeValidator(_check_prompt),
    ] = Field(None, description="texts or token ids; an absent or empty prompt starts a text")
    label: Annotated[str, Field(max_length=1000)] | None = Field(
        None, description="label of the text, of a model with labels; an extension"
    )
    label_scale: float | None = Field(
        None, ge=0, le=10, description="factor of the difference that the label makes; default 1; an extension"
    )
    n: int | None = Field(None, ge=1, le=MAX_N, description="samples of each prompt; default 1")
    best_of: int | None = Field(
        None, ge=1, le=MAX_N, description="samples to draw of each prompt, of which the `n` likeliest are returned"
    )
    max_tokens: int | None = Field(None, ge=0, description="default 16; 0, with `echo`, reads the prompt only")
    temperature: float | None = Field(None, ge=0, le=2, description="default 1")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=1 << 20, description="an extension")
    min_p: float | None = Field(None, ge=0, le=1, description="an extension")
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = Field(
        None, description="numbers to add to the logits of tokens, by id or, as an extension, by text"
    )
    regex: Regex | None = Field(None, description="the whole text matches it, unless it is cut; an extension")
    choices: (
        Annotated[list[Choice], Field(min_length=1, max_length=MAX_CHOICES, json_schema_extra={"uniqueItems": True})]
        | None
    ) = Field(None, description="the text is one of these, by the model's probability of each; an extension")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    xtc_probability: float | None = Field(None, ge=0, le=1, description="an extension, as in llama.cpp")
    xtc_threshold: float | None = Field(None, ge=0, le=0.5, description="needs `xtc_probability`; default 0.1")
    dry_multiplier: float | None = Field(None, ge=0, le=100, description="an extension, as in llama.cpp")
    dry_base: float | None = Field(None, ge=1, le=10, description="needs `dry_multiplier`; default 1.75")
    dry_allowed_length: int | None = Field(None, ge=1, le=30, description="needs `dry_multiplier`; default 2")
    dry_breakers: Annotated[list[Stop], Field(max_length=16)] | None = Field(
        None, description="needs `dry_multiplier`; default line break, colon, quotation mark, asterisk"
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=0, lt=1 << 63, description="fixes the samples; random for each request if absent")
    logprobs: int | None = Field(None, ge=0, le=10, description="number of most likely tokens to return per token")
    echo: bool | None = Field(None, description="return the prompt before the text; with `logprobs` scored")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] | None = Field(None, description="ignored")
    keep_state: bool | None = Field(
        None, description="return a `state_id` with each sample, to continue its text; an extension"
    )
    state_id: Annotated[str, Field(max_length=64)] | None = Field(
        None, description="of an earlier sample: its text, with its prompt, comes before each prompt; an extension"
    )
    cache_salt: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="requests with other salts share no states of prompts; an extension, as with vLLM"
    )

    @field_validator("best_of", "dry_allowed_length", "n", "max_tokens", "top_k", "seed", "logprobs", mode="before")
    @classmethod
    def _integral_float(cls, value: object) -> object:
        return _integral(value)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return the prompts as a list: of texts, or of lists of token ids."""
        prompt = self.prompt or ""
        if isinstance(prompt, list) and isinstance(prompt[0], str | list):
            return cast(list[str | list[int]], prompt)
        return [prompt]

    @property
    def num_samples(self) -> int:
        """Return the number of samples to draw of each prompt."""
        return max(self.n or 1, self.best_of or 1)

    @property
    def gives_ids(self) -> bool:
        """Return whether prompts are token ids."""
        return not isinstance(self.prompts[0], str)

    @property
    def scores_prompts(self) -> bool:
        """Return whether prompts are scored."""
        return bool(self.echo) and self.logprobs is not None

    def config(self, normalization: str, max_tokens: int) -> SamplingConfig:
        """Return the sampling settings, whose texts are normalized as the training text was.

        Args:
            normalization: of the training text.
            max_tokens: the server's limit, which holds for `choices` without `max_tokens`.

        Raises:
            ApiError: settings do not go together.
        """
        names = (
            "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "logprobs", "seed",
            "regex", "xtc_probability", "xtc_threshold", "dry_multiplier", "dry_base", "dry_allowed_length",
            "label_scale",
        )  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.num_samples > (self.n or 1):  # samples are compared by their log-probabilities
            given.setdefault("logprobs", 0)
        if self.top_p == 1:  # filters nothing, and would cost time
            del given["top_p"]
        if self.dry_breakers is not None:
            given["dry_breakers"] = tuple(self.dry_breakers)
        default = max_tokens if self.choices else 16  # a choice is whole
        try:
            config = SamplingConfig(
                **{"seed": secrets.randbits(32)} | given,
                max_new_tokens=default if self.max_tokens is None else max(self.max_tokens, 1),
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
                logit_bias=tuple((self.logit_bias or {}).items()),
                choices=tuple(self.choices or ()),
            )
            return normalize_settings(config, normalization)
        except ValueError as error:
            raise setting_error(error) from None


class TokenizeRequest(BaseModel):
    """The body of `POST /tokenize`, as vLLM takes it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = Field(None, description="the name in `/v1/models`")
    prompt: str
    add_special_tokens: bool | None = Field(None, description="begin with `</s>`, as every text does; default true")
    return_token_strs: bool | None = Field(None, description="return the text of each token too")


class DetokenizeRequest(BaseModel):
    """The body of `POST /detokenize`, as vLLM takes it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = Field(None, description="the name in `/v1/models`")
    tokens: Annotated[list[TokenId], Field(fail_fast=True), BeforeValidator(_integral_items)]


def setting_error(error: ValueError) -> ApiError:
    """Return the response for settings that do not go together, or that the model cannot follow."""
    message = str(error)
    return ApiError(400, message, param=message.partition("`")[2].partition("`")[0])


async def read_body(request: Request, limit: int = BODY_BYTES) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: the content type is not JSON, or the body exceeds `limit` or takes longer than `BODY_SECONDS`.
    """
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "`content-type` must be `application/json`")
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > 8 * limit:
                    break
                # Read beyond the limit and discard it: a client reads the response only after it has sent its body.
                if size <= limit:
                    body += chunk
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
    if size > limit:
        raise ApiError(413, f"the body must be at most {limit} bytes")
    return bytes(body)


def parse_request(body: bytes, limits: Limits) -> CompletionRequest:
    """Parse the body of a completions request.

    Raises:
        ApiError: the body is not JSON, a field is unknown or invalid, or fields do not go together. The message names
            the first one.
    """
    request = parse_body(CompletionRequest, body)
    n, prompts, samples = request.n or 1, len(request.prompts), request.num_samples
    wants_usage = request.stream_options is not None and request.stream_options.include_usage
    if request.max_tokens is not None and request.max_tokens > limits.max_tokens:
        wrong = "max_tokens", f"`max_tokens` must be at most {limits.max_tokens}: {request.max_tokens}"
    elif request.max_tokens == 0 and not request.echo:
        wrong = "max_tokens", "`max_tokens` must be at least 1 without `echo`: 0"
    elif request.best_of is not None and request.best_of < n:
        wrong = "best_of", f"`best_of` must be at least `n` {n}: {request.best_of}"
    elif samples > n and request.stream:
        wrong = "best_of", f"`best_of` {samples} above `n` {n} cannot be combined with `stream`"
    elif samples * prompts > limits.max_samples:
        items, times = f"`prompt` has {prompts} items", f"`{'n' if samples == n else 'best_of'}` is {samples}"
        seen = items if samples == 1 else times if prompts == 1 else f"{items} and {times}: {samples * prompts} samples"
        wrong = "prompt", f"{seen}; at most {limits.max_samples}, by the server's flag `--max_waiting`"
    elif request.state_id is not None and request.label is not None:
        wrong = "label", f"`label` {request.label[:40]} comes before the text of `state_id`: it is kept with that text"
    elif request.state_id is not None and request.echo:
        wrong = "echo", "`echo` cannot be combined with `state_id`"
    elif request.keep_state and request.scores_prompts:
        wrong = "keep_state", "`keep_state` cannot be combined with `echo` and `logprobs`"
    elif (request.keep_state or request.state_id is not None) and request.gives_ids:
        name = "keep_state" if request.keep_state else "state_id"
        wrong = "prompt", f"`prompt` must be a text with `{name}`, not token ids"
    elif request.label_scale not in (None, 1) and request.label is None and request.state_id is None:
        wrong = "label_scale", f"`label_scale` needs a `label`: {request.label_scale:g}"
    elif wants_usage and not request.stream:
        wrong = "stream_options", "`stream_options.include_usage` needs `stream`"
    else:
        return request
    raise ApiError(400, wrong[1], param=wrong[0])


Body = TypeVar("Body", bound=BaseModel)


def parse_body(model: type[Body], body: bytes) -> Body:
    """Return a request's body as its model.

    Raises:
        ApiError: the body is not JSON, or a field is unknown or invalid. The message names the first one.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _field_error(error.errors(include_url=False), model) from None


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
UNIONS = ("stop",)  # fields that take a string or a list of strings


def _field_error(errors: Sequence[ErrorDetails], model: type[BaseModel]) -> ApiError:
    """Return the response for the errors of the first wrong field."""
    field = errors[0]["loc"][:1]
    errors = [error for error in errors if error["loc"][:1] == field]
    # A union reports an error of each type that it takes. Those of the type that the value has are the telling ones.
    fitting = [error for error in errors if len(error["loc"]) != 2 or not error["type"].endswith("_type")]
    error = (fitting or errors)[0]
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if not field:
        return ApiError(400, "the body " + VALUE_ERRORS.get(kind, f"is not JSON: {context.get('error')}"))

    if kind == "prompt":
        return ApiError(400, error["msg"], param=context["name"])
    path = error["loc"][2:] if field[0] in UNIONS else error["loc"][1:]
    name = str(field[0])[:64] + "".join(f"[{part}]" if isinstance(part, int) else f".{part[:64]}" for part in path)
    name = json.dumps(name, ensure_ascii=False)[1:-1]  # without line breaks
    shown = "" if isinstance(value, (list, dict)) else f": {json.dumps(value, ensure_ascii=False)[:40]}"
    bound = next((context[key] for key in ("ge", "gt", "le", "lt", "max_length") if key in context), None)
    if kind == "extra_forbidden":
        known = sorted({*model.model_fields} - {*UnsupportedFields.model_fields})
        nearest = [] if path else difflib.get_close_matches(name, known, n=1)
        message = f"unknown field `{name}`" + "".join(f"; the nearest is `{other}`" for other in nearest)
    elif field[0] in UNIONS and not fitting:
        message = f"`{name}` must be a string or a list of strings{shown}"
    elif kind in SIZE_ERRORS and bound != 0:
        message = f"`{name}` " + SIZE_ERRORS[kind].format(bound=bound, size=len(value))
    elif kind in VALUE_ERRORS:
        limit = f"{bound:g}" if isinstance(bound, float) else bound
        message = f"`{name}` {VALUE_ERRORS[kind].format(bound=limit)}{shown}"
    else:
        message = f"`{name}` is not supported{shown}; leave it out"
    return ApiError(400, message, param=name)
