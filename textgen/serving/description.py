"""The OpenAPI description of the HTTP API, made of the models of its requests and responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from textgen.serving.protocol import MAX_N, CompletionRequest, DetokenizeRequest, Limits, TokenizeRequest
from textgen.serving.responses import (
    Completion,
    Detokenized,
    ErrorResponse,
    Health,
    Model,
    ModelList,
    Tokenized,
    TokenizerInfo,
)


def describe_api(name: str, limits: Limits, vocab_size: int, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Return the OpenAPI description of a server with one model of this name."""
    schemas = _schemas(name, limits, vocab_size, labels)
    completion = _operation("continue prompts", _json_content(Completion) | {"text/event-stream": {}})
    model_name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "textgen", "version": "1"},
        "paths": {
            "/v1/completions": {"post": completion | _body(CompletionRequest)},
            "/v1/models": {"get": _operation("list the model", _json_content(ModelList))},
            "/v1/models/{name}": {
                "get": _operation("describe the model", _json_content(Model)) | {"parameters": [model_name]}
            },
            "/tokenize": {
                "post": _operation("encode a text", _json_content(Tokenized)) | _body(TokenizeRequest),
            },
            "/detokenize": {
                "post": _operation("decode token ids", _json_content(Detokenized)) | _body(DetokenizeRequest),
            },
            "/tokenizer_info": {"get": _operation("describe the tokenizer", _json_content(TokenizerInfo))},
            "/healthz": {"get": _operation("confirm that the server runs", _json_content(Health))},
            "/metrics": {
                "get": _operation("metrics for Prometheus", {"text/plain": {"schema": {"type": "string"}}}),
            },
        },
        "components": {"schemas": schemas},
    }


def _schemas(name: str, limits: Limits, vocab_size: int, labels: Sequence[str]) -> dict[str, Any]:
    """Return the JSON schemas of requests and responses, with the limits that this server sets."""
    requests = (CompletionRequest, TokenizeRequest, DetokenizeRequest)
    responses = (Completion, ModelList, Model, Tokenized, Detokenized, TokenizerInfo, Health, ErrorResponse)
    _, definitions = models_json_schema(
        [
            *((request, "validation") for request in requests),
            *((response, "serialization") for response in responses),
        ],
        ref_template="#/components/schemas/{model}",
    )
    schemas: dict[str, Any] = definitions["$defs"]
    for request in requests:
        schemas[request.__name__]["properties"]["model"]["anyOf"][0]["enum"] = [name]
    fields = schemas["CompletionRequest"]["properties"]
    fields["max_tokens"]["anyOf"][0]["maximum"] = limits.max_tokens
    if labels:
        fields["label"]["anyOf"][0]["enum"] = list(labels)
    else:
        fields["label"] = {"type": "null"}
    fields["n"]["anyOf"][0]["maximum"] = fields["best_of"]["anyOf"][0]["maximum"] = min(limits.max_samples, MAX_N)
    _, texts, ids, lists, _ = fields["prompt"]["anyOf"]
    texts["maxItems"] = lists["maxItems"] = limits.max_samples
    ids["maxItems"] = lists["items"]["maxItems"] = limits.max_prompt_tokens
    tokens = schemas["DetokenizeRequest"]["properties"]["tokens"]
    for items in (ids["items"], lists["items"]["items"], tokens["items"]):
        items["maximum"] = vocab_size - 1
    return schemas


def _body(model: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": _json_content(model)}}


def _json_content(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}


def _operation(summary: str, content: dict[str, Any]) -> dict[str, Any]:
    """Return a route's description: `content` if it succeeds, an `ErrorResponse` if not."""
    failure = {"description": "an error", "content": _json_content(ErrorResponse)}
    return {"summary": summary, "responses": {"200": {"description": summary, "content": content}, "default": failure}}
