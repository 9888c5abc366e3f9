"""What the protocol refuses, and how it says so: no field of a request is done by half or left out in silence."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams

from textgen.serving.protocol import CompletionRequest, Limits, UnsupportedFields, parse_request
from textgen.serving.responses import ApiError


def refused(fields: dict[str, Any] | str) -> tuple[str, str | None]:
    """Return message and `param` of the error that a request must get."""
    body = fields if isinstance(fields, str) else json.dumps(fields)
    with pytest.raises(ApiError) as error:
        parse_request(body.encode(), Limits())
    assert error.value.status == 400
    return str(error.value), error.value.param


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": 1}, "`prompt` must be a text, a list of texts, token ids, or a list of lists of ids: 1"),
        ({"prompt": {"a": 1}}, "`prompt` must be a text, a list of texts, token ids, or a list of lists of ids"),
        ({"prompt": []}, "`prompt` is an empty list"),
        ({"prompt": ["a"] * 300}, "`prompt` has 300 items; at most 256, by the server's flag `--max_waiting`"),
        ({"prompt": True}, "`prompt` must be a text, a list of texts, token ids, or a list of lists of ids: true"),
        ({"stop": ["a"] * 17}, "`stop` has 17 items; at most 16"),
        ({"stop": ""}, "`stop` is an empty string"),
        ({"stop": True}, "`stop` must be a string or a list of strings: true"),
        ({"n": "2"}, '`n` must be an integer: "2"'),
        ({"n": True}, "`n` must be an integer: true"),
        ({"n": 129}, "`n` must be at most 128: 129"),
        ({"temperature": 2.5}, "`temperature` must be at most 2: 2.5"),
        ({"top_p": 0}, "`top_p` must be above 0: 0"),
        ({"seed": -1}, "`seed` must be at least 0: -1"),
        ({"seed": 1 << 63}, f"`seed` must be below {1 << 63}: {1 << 63}"),
        ({"echo": "yes"}, '`echo` must be true or false: "yes"'),
        ({"logprobs": True}, "`logprobs` must be an integer: true"),
        ({"max_tokens": 0}, "`max_tokens` must be at least 1 without `echo`: 0"),
        ({"max_tokens": -1, "echo": True}, "`max_tokens` must be at least 0: -1"),
        ({"max_tokens": 1025}, "`max_tokens` must be at most 1024: 1025"),
        ({"stream_options": True}, "`stream_options` must be an object: true"),
        ({"temprature": 1}, "unknown field `temprature`; the nearest is `temperature`"),
        ({"a\nb": 1}, "unknown field `a\\nb`"),
        ({"suffix": "end"}, '`suffix` is not supported: "end"; leave it out'),
        ({"best_of": 129}, "`best_of` must be at most 128: 129"),
        ({"best_of": 0}, "`best_of` must be at least 1: 0"),
        ({"logit_bias": [1]}, "`logit_bias` must be an object"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "`logit_bias` has 1025 items; at most 1024"),
        ({"regex": ""}, "`regex` is an empty string"),
        ({"regex": 1}, "`regex` must be a string: 1"),
        ({"regex": "a" * 4097}, "`regex` has 4097 characters; at most 4096"),
        ({"choices": []}, "`choices` is an empty list"),
        ({"choices": "a,b"}, '`choices` must be a list: "a,b"'),
        ({"choices": ["a"] * 257}, "`choices` has 257 items; at most 256"),
        ({"tools": [{"type": "function"}]}, "`tools` is not supported; leave it out"),
        ({"store": True}, "`store` is not supported: true; leave it out"),
        ({"store": 0}, "`store` must be true or false: 0"),
        ({"metadata": {"a": "b"}}, "`metadata` is not supported; leave it out"),
        ('{"temperature": NaN}', "`temperature` must be finite: NaN"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_in_one_line_with_what_is_wanted(fields: dict[str, Any] | str, message: str) -> None:
    names = [*json.loads(fields)] if isinstance(fields, str) else [*fields]
    assert refused(fields) == (message, message.split("`")[1])
    assert message.split("`")[1] in (names[0], "a\\nb")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ["a", [1]]}, "`prompt[1]` must be a text, as `prompt[0]`"),
        ({"prompt": ["a", 1]}, "`prompt[1]` must be a text, as `prompt[0]`: 1"),
        ({"prompt": [1, "a"]}, '`prompt[1]` must be a token id, as `prompt[0]`: "a"'),
        ({"prompt": [1, -2]}, "`prompt[1]` must be a token id, as `prompt[0]`: -2"),
        ({"prompt": [1, True]}, "`prompt[1]` must be a token id, as `prompt[0]`: true"),
        ({"prompt": [1, 2.5]}, "`prompt[1]` must be a token id, as `prompt[0]`: 2.5"),
        ({"prompt": [-1]}, "`prompt[0]` must be a text, a token id, or a list of ids: -1"),
        ({"prompt": [[1], 2]}, "`prompt[1]` must be a list of ids, as `prompt[0]`: 2"),
        ({"prompt": [[1], "a"]}, '`prompt[1]` must be a list of ids, as `prompt[0]`: "a"'),
        ({"prompt": [[1], [2, "a"]]}, '`prompt[1][1]` must be a token id: "a"'),
        ({"prompt": [[1], [[2]]]}, "`prompt[1][0]` must be a token id"),
        ({"prompt": ["a", "b", None]}, "`prompt[2]` must be a text, as `prompt[0]`: null"),
        ({"stop": ["a", "b" * 65]}, "`stop[1]` has 65 characters; at most 64"),
        ({"stop": ["a", ""]}, "`stop[1]` is an empty string"),
        ({"stream_options": {"foo": 1}}, "unknown field `stream_options.foo`"),
        ({"stream_options": {"include_usage": 1}}, "`stream_options.include_usage` must be true or false: 1"),
        ({"stream_options": {"include_obfuscation": True}},
         "`stream_options.include_obfuscation` is not supported: true; leave it out"),
        ({"response_format": {"type": "json_object"}},
         '`response_format.type` is not supported: "json_object"; leave it out'),
        ({"logit_bias": {"17": -101}}, "`logit_bias.17` must be at least -100: -101"),
        ({"logit_bias": {"17": "1"}}, '`logit_bias.17` must be a number: "1"'),
        ({"choices": ["a", ""]}, "`choices[1]` is an empty string"),
    ],
)  # fmt: skip
def test_a_wrong_value_in_a_list_or_object_is_named_by_its_whole_path(fields: dict[str, Any], message: str) -> None:
    assert refused(fields) == (message, message.split("`")[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stream_options": {"include_usage": True}}, "`stream_options.include_usage` needs `stream`"),
        ({"best_of": 1, "n": 2}, "`best_of` must be at least `n` 2: 1"),
        ({"best_of": 3, "stream": True}, "`best_of` 3 above `n` 1 cannot be combined with `stream`"),
        ({"best_of": 100, "prompt": ["a"] * 3},
         "`prompt` has 3 items and `best_of` is 100: 300 samples; at most 256, by the server's flag `--max_waiting`"),
        ({"prompt": ["a"] * 100, "n": 3},
         "`prompt` has 100 items and `n` is 3: 300 samples; at most 256, by the server's flag `--max_waiting`"),
    ],
)  # fmt: skip
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], message: str) -> None:
    assert refused(fields)[0] == message
    for name in [*fields][:2]:  # each of the two alone
        parse_request(json.dumps({**fields, name: None}).encode(), Limits())


def test_a_body_that_is_no_request_is_named() -> None:
    for body in ("[]", "null", '"x"'):
        assert refused(body) == ("the body must be an object", None)
    assert refused('{"prompt": "x')[0] == "the body is not JSON: EOF while parsing a string at line 1 column 13"


def test_null_is_nothing_for_every_field_of_openais_completions_and_chats() -> None:
    names = {*get_type_hints(CompletionParams), *get_type_hints(ChatParams)}
    assert {"logit_bias", "suffix", "tools", "verbosity"} < names
    assert names < {*CompletionRequest.model_fields}
    assert {*UnsupportedFields.model_fields} < names
    parse_request(json.dumps(dict.fromkeys(names)).encode(), Limits())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"choices": ["a", "a"]}, "`choices` must be different texts that are not empty: ['a', 'a']"),
        ({"choices": ["é" * 250] * 20}, "`choices` must be at most 8192 bytes together: 10000"),
        ({"choices": ["a"], "regex": "a"}, "`choices` cannot be combined with `regex`: a"),
        ({"choices": ["a"], "top_k": 2}, "`choices` cannot be combined with `top_k`: 2"),
        ({"choices": ["a"], "stop": "x"}, "`choices` cannot be combined with `stop`: ('x',)"),
        ({"choices": ["a"], "logit_bias": {"a": 1}}, "`choices` cannot be combined with `logit_bias`: (('a', 1.0),)"),
        ({"regex": "a", "stop": ["x"]}, "`regex` cannot be combined with `stop`: ('x',)"),
        ({"regex": "é" * 2100}, "`regex` must be a text of at most 4096 bytes: 2100 characters"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields: dict[str, Any], message: str) -> None:
    request = parse_request(json.dumps(fields).encode(), Limits())
    with pytest.raises(ApiError) as error:
        request.config("none", 100)
    assert (error.value.status, str(error.value), error.value.param) == (400, message, next(iter(fields)))
    neutral = {"top_p": 1, "min_p": 0, "presence_penalty": 0, "stop": [], "logit_bias": {}}
    parse_request(json.dumps(neutral | {"choices": ["a"]}).encode(), Limits()).config("none", 100)
