"""A completion while its samples are decoded, and its two forms: one JSON object, or a stream of events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from textgen.decoding.samples import Sample, TokenLogprobs
from textgen.serving.prompts import PromptReader, for_json
from textgen.serving.responses import ApiError
from textgen.serving.scheduler import BusyError, ClosedError, Delta, Scheduler, Stream

Result = TypeVar("Result")


@dataclass(eq=False)
class PendingChoice:
    """One sample of a completion, with the part of it that is not sent yet."""

    index: int
    stream: Stream
    offset: int
    """characters before the sample's text: the length of an echoed prompt"""
    text: str
    wants_logprobs: bool
    scored: PromptReader | None
    """of a prompt whose scores are not sent yet"""
    keep: Callable[[Sample], str] | None = None
    """keeps the state after the sample and returns its id; None if the request does not ask for it"""
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.has_ranks = self.scored is not None

    def add(self, delta: Delta) -> None:
        """Add a delta."""
        self.text += delta.text
        self.logprobs += delta.logprobs
        if (sample := delta.sample) is not None:
            self.finish_reason = "stop" if sample.reason in ("end", "stop", "choice") else sample.reason

    def pop_scores(self) -> Iterator[dict[str, Any]]:
        """Yield the scores of the prompt, a window at a time, in the form of `CompletionChoice`; nothing the next time.

        The first one has the text since the previous `pop`, which comes before the scores in no response.
        """
        scored, self.scored = self.scored, None
        for logprobs in () if scored is None else scored.logprobs(self.stream.running.tokenizer):
            text, self.text = self.text, ""
            yield {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": None}

    @property
    def mean_logprob(self) -> float:
        """Log-probability per token of the sample, which has ended."""
        assert self.stream.sample is not None
        return self.stream.sample.mean_logprob

    def pop(self) -> dict[str, Any]:
        """Return everything since the previous call, in the form of `CompletionChoice`."""
        logprobs: dict[str, list[Any]] | None = None
        if self.wants_logprobs:
            logprobs = {
                "tokens": [token.token for _, token in self.logprobs],
                "token_logprobs": [for_json(token.logprob) for _, token in self.logprobs],
                # As with OpenAI, the drawn token is among them, also if it is none of the most likely ones.
                "top_logprobs": [
                    {top: for_json(value) for top, value in (*token.top, (token.token, token.logprob))}
                    for _, token in self.logprobs
                ],
                "text_offset": [self.offset + offset for offset, _ in self.logprobs],
            }
            if self.has_ranks:
                logprobs["token_ranks"] = [None] * len(self.logprobs)
        choice = {"index": self.index, "text": self.text, "logprobs": logprobs, "finish_reason": self.finish_reason}
        if self.finish_reason is not None and (choices := self.stream.running.choices) is not None:
            choice["probabilities"] = {text: round(probability, 6) for text, probability in choices}
        if self.keep is not None and self.stream.sample is not None and self.finish_reason is not None:
            choice["state_id"] = self.keep(self.stream.sample)
        self.text, self.logprobs = "", []
        return choice


def late(seconds: float) -> ApiError:
    """Return the error of a request that takes too long."""
    return ApiError(503, f"not ready within {seconds:g} seconds", code="timeout")


class PendingCompletion:
    """A completion whose samples are decoded.

    Args:
        model: the model's name.
        scheduler: decodes the samples.
        n: samples of each prompt to send.
        num_drawn: samples of each prompt to draw.
    """

    def __init__(self, model: str, scheduler: Scheduler, *, n: int, num_drawn: int) -> None:
        self.choices: list[PendingChoice] = []
        self.num_prompt_tokens, self.n, self.num_drawn = 0, n, num_drawn
        # The fields that all events of a stream share.
        self.head: dict[str, Any] = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self.created_at, self.has_delta = time.monotonic(), False
        self._scheduler = scheduler
        self._changed: dict[int, PendingChoice] = {}
        self._event = asyncio.Event()
        self._error: ApiError | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, timeout: float) -> None:
        """Queue the samples, which must end within `timeout` seconds.

        Raises:
            ApiError: the queue is full or closed.
        """
        try:
            self._scheduler.submit([choice.stream for choice in self.choices])
        except BusyError as error:
            raise ApiError(503 if isinstance(error, ClosedError) else 429, str(error)) from None
        self._timer = asyncio.get_running_loop().call_later(timeout, self._fail, late(timeout))

    def add(self, index: int, delta: Delta) -> None:
        """Add a delta to a sample."""
        self._changed[index] = self.choices[index]
        self.choices[index].add(delta)
        self._event.set()
        if delta.error is not None:
            self._fail(ApiError(503, delta.error))

    def _fail(self, error: ApiError) -> None:
        self._error = error
        self._event.set()

    @property
    def ended(self) -> bool:
        """Whether all samples have ended."""
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def usage(self) -> dict[str, int]:
        """Return the numbers of tokens, in the form of `Usage`."""
        drawn = sum(choice.stream.running.num_tokens for choice in self.choices)
        prompt = self.num_prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}

    async def wait_for_changes(self) -> list[PendingChoice]:
        """Wait for a delta, and return the samples that have changed since the previous call.

        Raises:
            ApiError: the model failed, the time is over, or the server is shutting down.
        """
        await self._event.wait()
        return self.pop_changes()

    def pop_changes(self) -> list[PendingChoice]:
        """Return the samples that have changed since the previous call.

        Raises:
            ApiError: as `wait_for_changes`.
        """
        self._event.clear()
        if self._error is not None and not self.ended:
            raise self._error
        changed, self._changed = list(self._changed.values()), {}
        return changed

    async def result(self) -> bytes:
        """Wait until all samples have ended, and return a `Completion` as JSON.

        Raises:
            ApiError: as `wait_for_changes`.
        """
        while not self.ended:
            await self.wait_for_changes()
        choices = [await _encode_choice(choice) for choice in self._best()]
        head = {name: _encode(value) for name, value in self.head.items()}
        return _encode_object(head | {"choices": b"[%s]" % b",".join(choices), "usage": _encode(self.usage)})

    def _best(self) -> list[PendingChoice]:
        """Return the samples to send: of each prompt the `n` with the largest mean log-probability, best first."""
        if self.num_drawn == self.n:
            return self.choices
        best: list[PendingChoice] = []
        for first in range(0, len(self.choices), self.num_drawn):
            group = self.choices[first : first + self.num_drawn]
            best += sorted(group, key=lambda choice: -choice.mean_logprob)[: self.n]
        for index, choice in enumerate(best):
            choice.index = index
        return best

    def close(self) -> None:
        """Cancel the samples that have not ended."""
        if self._timer is not None:
            self._timer.cancel()
        if not self.ended:
            self._scheduler.cancel([choice.stream for choice in self.choices])


class EventStream(Response):
    """A completion as server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, completion: PendingCompletion, *, include_usage: bool) -> None:
        # The second header keeps nginx from buffering the stream.
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._completion, self._include_usage = completion, include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the completion ends or the client disconnects."""
        with suppress(ClientDisconnect), closing(self._completion):
            await cancel_on_disconnect(receive, self._send_events(send))

    async def _send_events(self, send: Send) -> None:
        # As OpenAI does, a stream with usage has the field in every event, null in all but the last.
        completion, usage = self._completion, {"usage": None} if self._include_usage else {}
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        ended = False
        while not ended:
            try:
                changed = await completion.wait_for_changes()
                if any(choice.scored is not None for choice in changed):
                    for part in (part for choice in changed for part in choice.pop_scores()):
                        event = completion.head | usage | {"choices": [part]}
                        body = _encode_events([event])
                        await send({"type": "http.response.body", "body": body, "more_body": True})
                        await asyncio.sleep(0)  # other streams go on
                    changed = list(dict.fromkeys((*changed, *completion.pop_changes())))
                ended = completion.ended
                events = [completion.head | usage | {"choices": [choice.pop()]} for choice in changed]
                if ended and self._include_usage:
                    events.append(completion.head | {"choices": [], "usage": completion.usage})
            except ApiError as error:  # the status is sent already, so the error is the last event
                ended, events = True, [error.body]
            body = _encode_events(events) + (b"data: [DONE]\n\n" if ended else b"")
            await send({"type": "http.response.body", "body": body, "more_body": not ended})


def _encode_events(events: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(event, ensure_ascii=False).encode() for event in events)


async def _encode_choice(choice: PendingChoice) -> bytes:
    """Return a `CompletionChoice` as JSON. The event loop goes on between the parts of a long one."""
    texts: list[str] = []
    lists: dict[str, list[bytes]] = {}
    fields: dict[str, Any] = {}
    for fields in chain(choice.pop_scores(), (choice.pop() for _ in range(1))):  # `pop` after the scores
        texts.append(fields["text"])
        for name, values in (fields["logprobs"] or {}).items():
            lists.setdefault(name, []).extend([_encode(values)[1:-1]] if values else [])
        await asyncio.sleep(0)
    encoded = {name: _encode(value) for name, value in fields.items()} | {"text": _encode("".join(texts))}
    if lists:
        encoded["logprobs"] = _encode_object({name: b"[%s]" % b",".join(parts) for name, parts in lists.items()})
    return _encode_object(encoded)


def _encode_object(fields: dict[str, bytes]) -> bytes:
    return b"{%s}" % b",".join(_encode(name) + b":" + value for name, value in fields.items())


def _encode(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of `work`; cancel it if the client disconnects first.

    Raises:
        ClientDisconnect: the client has disconnected.
    """

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
