"""States that the server keeps: every text is the one that it would be without them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.servers import Running, running
from textgen.serving.states import ENTRY_BYTES, STATE_BYTES, KeptState, PrefixTable, StateTable

SHARED = "Nobody warned me: the plot was honest and the hero was weak. " * 40  # more than two windows
ENDS = ["I watched", "Ça va", "The villain", "", "We saw it. " * 60, "My wife", "Twice", "It"]
# The model is so young that a wrong state seldom changes a text, but always the log-probabilities.
EXACT: dict[str, Any] = {"logprobs": 3, "seed": 3, "max_tokens": 12, "frequency_penalty": 0.5}


@pytest.fixture(scope="module")
def server(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("serve") / "log"
    with running(tiny_run, log, "--max_prompt_tokens", "8192", "--max_waiting", "64", "--batch_size", "16") as server:
        yield server


@pytest.fixture(scope="module")
def plain(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Serve without states."""
    log = tmp_path_factory.mktemp("plain") / "log"
    flags = ["--max_prompt_tokens", "8192", "--prefix_cache", "0", "--kept_states", "0"]
    with running(tiny_run, log, *flags) as server:
        yield server


def choices(server: Running, **asked: Any) -> list[dict[str, Any]]:
    """Return the samples of an answer without their state's ids."""
    answered: list[dict[str, Any]] = server.complete(**EXACT | asked)["choices"]
    return [{name: value for name, value in choice.items() if name != "state_id"} for choice in answered]


def refusal(server: Running, **asked: Any) -> tuple[int, dict[str, Any]]:
    status, _, body = server.ask("POST", "/v1/completions", asked)
    error: dict[str, Any] = json.loads(body)["error"]
    return status, error


# --- beginnings of prompts -------------------------------------------------------------------------------------------


def test_texts_are_equal_with_states_without_warm_and_evicted(
    server: Running, plain: Running, tiny_run: Path, tmp_path: Path
) -> None:
    """Of clients at the same time, then again; also where there is room for two states only."""
    prompts = [SHARED + end for end in ENDS]
    wanted = [choices(plain, prompt=prompt) for prompt in prompts]
    assert plain.metric("prefix_tokens_reused_total") == plain.metric("prefix_states") == 0
    small = ["--max_prompt_tokens", "8192", "--prefix_cache", str(2.5 * (ENTRY_BYTES + 512) / 2**20)]
    small += ["--kept_states", "1"]
    with running(tiny_run, tmp_path / "log", *small) as evicting, ThreadPoolExecutor(len(prompts)) as pool:
        for each in (server, server, evicting, evicting):
            before = each.metric("prefix_tokens_reused_total")
            assert [*pool.map(lambda prompt, each=each: choices(each, prompt=prompt), prompts)] == wanted
            reused = each.metric("prefix_tokens_reused_total") - before
            assert reused >= 512
            assert reused % 512 == 0
        assert evicting.metric("prefix_states") == 2
        # A state whose id is in an answer is not dropped by that answer itself.
        assert evicting.complete(prompt=SHARED, keep_state=True)["choices"][0]["state_id"]
        for prompt, said in (
            (["a", "b"], "`keep_state` of 2 samples; a connection may keep 1, by the server's flag `--kept_states`"),
            ("☃" * 2700, "`keep_state` of a prompt of 302400 bytes; all states have 262144, by the server's"),
        ):
            status, error = refusal(evicting, prompt=prompt, keep_state=True)
            assert (status, error["param"]) == (400, "keep_state")
            assert error["message"].startswith(said)
        # Both windows that all share, of all prompts: they were known by the second time.
        assert choices(server, prompt=prompts) == [{**choice, "index": i} for i, (choice,) in enumerate(wanted)]
    assert server.metric("prefix_states") > 2


def test_a_warm_prompt_is_read_from_its_last_whole_window(server: Running) -> None:
    prompt = "Twice now I have seen this. " * 100
    tokens = len(json.loads(server.ask("POST", "/tokenize", {"prompt": prompt})[2])["tokens"])
    read, reused = "prompt_tokens_read_in_slots_total", "prefix_tokens_reused_total"
    seen = []
    for salt in (None, None, "a", "a"):
        before = server.metric(read), server.metric(reused)
        server.complete(prompt=prompt, max_tokens=1, cache_salt=salt)
        seen.append((server.metric(read) - before[0], server.metric(reused) - before[1]))
    whole = (tokens - 1) // 512 * 512
    assert whole >= 1024
    assert seen == [(tokens - 1, 0), (tokens - 1 - whole, whole)] * 2


def test_a_table_of_prefixes_drops_what_was_not_used_for_longest() -> None:
    size = ENTRY_BYTES + 4 * (8 + 8 + 16)
    table = PrefixTable(3 * size + size - 1)
    keys = table.keys(range(4 * 512 + 1), "")
    assert len(keys) == len(set(keys)) == 4

    def state(value: float) -> list[torch.Tensor]:
        return [torch.full((1, 8), value), torch.full((1, 8), value + 0.25), torch.full((1, 16), value + 0.5)]

    def found(i: int) -> bool:
        """Return whether the state of a key is known; it must be the one that was put."""
        if (known := table.find(keys[: i + 1], i)) is None:
            return False
        assert known[0] == i + 1
        assert all(torch.equal(one, other) for one, other in zip(known[1], state(i), strict=True))
        return True

    for i in range(3):
        table.put(keys[i], state(i))
    known = table.find(keys[:1], 0)
    assert known is not None
    table.put(keys[0], state(7))  # is known
    table.put(keys[3], state(3))
    assert [found(i) for i in range(4)] == [True, False, True, True]
    assert (len(table), table.num_bytes) == (3, 3 * size)
    for i in (1, 2, 3):
        table.put(keys[i], state(i))
    assert [found(i) for i in range(4)] == [False, True, True, True]
    assert torch.equal(known[1][2], state(0)[2])  # not what took its place
    assert table.find(keys, 4) is None
    none = PrefixTable(size - 1)
    none.put(keys[0], state(0))
    assert len(none) == none.num_bytes == 0


def test_keys_are_of_all_tokens_before_of_the_salt_and_of_the_process() -> None:
    table, ids = PrefixTable(1), [*range(1025)]
    keys = table.keys(ids, "a")
    assert keys == table.keys([*ids, 5], "a")
    assert len(keys) == 2
    assert len(table.keys(ids[:1024], "a")) == 1  # a token is left to read
    assert table.keys([7, *ids[1:]], "a")[1] != keys[1]
    assert table.keys([*ids[:1000], 7, *ids[1001:]], "a") == [
        keys[0],
        table.keys([*ids[:1000], 7, *ids[1001:]], "a")[1],
    ]
    assert {*table.keys(ids, "b"), *table.keys(ids, ""), *PrefixTable(1).keys(ids, "a")}.isdisjoint(keys)
    assert PrefixTable(0).keys(ids, "a") == []


# --- texts that clients continue -------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["The plot wa", SHARED + "I wa"])
def test_a_continued_text_is_that_of_the_whole_prompt(server: Running, plain: Running, first: str) -> None:
    """Three turns, each of which the client could send as one text."""
    text, asked = first, {"prompt": first}
    for added in ("s weak", " and", ""):
        answer = server.complete(**EXACT, **asked, keep_state=True)["choices"][0]
        (wanted,) = choices(plain, prompt=text)
        assert {**answer, "state_id": None} == {**wanted, "state_id": None}
        text += answer["text"] + added
        asked = {"prompt": added, "state_id": answer["state_id"]}
    assert choices(server, **asked) == choices(plain, prompt=text)
    assert choices(server, **asked) == choices(plain, prompt=text)  # a state may be used again


def test_a_continued_text_is_read_from_the_answers_prompt(server: Running, plain: Running) -> None:
    """Also if the table of prefixes does not know it."""
    answer = server.complete(prompt=SHARED, **EXACT, keep_state=True, cache_salt="once")["choices"][0]
    before = server.metric("prefix_tokens_reused_total")
    asked = {"state_id": answer["state_id"], "prompt": " and", "cache_salt": "another"}
    assert choices(server, **asked) == choices(plain, prompt=SHARED + answer["text"] + " and")
    assert server.metric("prefix_tokens_reused_total") - before >= 1024


def test_every_sample_has_a_state_in_streams_too(server: Running, plain: Running) -> None:
    """Of several samples, of those that a stop string ends, with its text left out, and of the best of several."""
    asked = EXACT | {"n": 3, "stop": ["e", "a"], "keep_state": True, "stream": True, "prompt": ["The", "It"]}
    events = server.ask("POST", "/v1/completions", asked)[2].split(b"\n\n")[:-2]
    texts, ids = [""] * 6, dict[int, str]()
    for event in events:
        for choice in json.loads(event.removeprefix(b"data: "))["choices"]:
            texts[choice["index"]] += choice["text"]
            assert ("state_id" in choice) == (choice["finish_reason"] is not None)
            if "state_id" in choice:
                ids[choice["index"]] = choice["state_id"]
    assert len(set(ids.values())) == 6
    for index, text in enumerate(texts):
        prompt = asked["prompt"][index // 3]
        assert choices(server, state_id=ids[index], prompt=" so") == choices(plain, prompt=prompt + text + " so")
    best = server.complete(**EXACT, prompt="The", best_of=4, n=2, keep_state=True)["choices"]
    for choice in best:
        wanted = choices(plain, prompt="The" + choice["text"])
        assert choices(server, state_id=choice["state_id"]) == wanted


def test_prompts_that_continue_one_state_are_numbered_as_whole_ones(server: Running, plain: Running) -> None:
    kept = server.complete(prompt="The", max_tokens=0, echo=True, keep_state=True)["choices"][0]
    assert kept["text"] == "The"
    asked = {"state_id": kept["state_id"], "prompt": [" plot", " hero", " plot"], "n": 2}
    assert choices(server, **asked) == choices(plain, prompt=["The plot", "The hero", "The plot"], n=2)


def test_wrong_requests_are_refused_by_name(server: Running, plain: Running) -> None:
    state_id = server.complete(prompt="The", keep_state=True)["choices"][0]["state_id"]
    for asked, message in [
        ({"state_id": state_id, "echo": True}, "`echo` cannot be combined with `state_id`"),
        ({"state_id": state_id, "prompt": [5, 6]}, "`prompt` must be a text with `state_id`, not token ids"),
        ({"keep_state": True, "prompt": [[5, 6]]}, "`prompt` must be a text with `keep_state`, not token ids"),
        (
            {"keep_state": True, "echo": True, "logprobs": 0},
            "`keep_state` cannot be combined with `echo` and `logprobs`",
        ),
        ({"state_id": 5}, "`state_id` must be a string: 5"),
        ({"state_id": "a" * 65}, "`state_id` has 65 characters; at most 64"),
        ({"keep_state": "yes"}, '`keep_state` must be true or false: "yes"'),
        ({"cache_salt": "a" * 257}, "`cache_salt` has 257 characters; at most 256"),
    ]:
        status, error = refusal(server, **asked)
        assert (status, error["message"]) == (400, message)
    wrong = state_id[:-1] + ("0" if state_id[-1] != "0" else "1")
    for unknown in (wrong, "", "é", state_id.upper()):
        status, error = refusal(server, state_id=unknown)
        assert (status, error["code"], error["param"]) == (404, "state_not_found", "state_id")
        assert not unknown or unknown not in error["message"]
    status, error = refusal(plain, keep_state=True)
    assert (status, error["message"]) == (400, "`keep_state` is off, by the server's flag `--kept_states 0`")
    assert refusal(plain, state_id=state_id)[0] == 400
    long = server.complete(prompt="I am " * 2000, max_tokens=1, keep_state=True)["choices"][0]["state_id"]
    status, error = refusal(server, state_id=long, prompt="I am " * 300)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert (
        "tokens with the text of `state_id`; at most 8192, by the server's flag `--max_prompt_tokens`"
        in error["message"]
    )


def test_no_id_is_logged(server: Running) -> None:
    state_id = server.complete(prompt="The", keep_state=True)["choices"][0]["state_id"]
    assert len(state_id) == len("state-") + 32
    server.complete(state_id=state_id)
    refusal(server, state_id=state_id + "0")
    refusal(server, state_id=state_id, n=0)
    assert state_id not in server.log.read_text()
    assert state_id.removeprefix("state-")[:8] not in server.log.read_text()


def test_states_are_bounded_in_number_age_memory_and_by_connection() -> None:
    now = 0.0
    table = StateTable(16, 10, clock=lambda: now)
    kept = KeptState("a", None)
    first = table.put(kept, "one")
    others = [table.put(kept, "two") for _ in range(3)]
    # The third one of a connection drives out its first one, not those of others.
    assert [table.get(state_id) is not None for state_id in (first, *others)] == [True, False, True, True]
    assert len(table) == 3
    many = [table.put(kept, place) for place in range(16)]
    assert [table.get(state_id) is not None for state_id in (first, *others)] == [False] * 4
    assert all(table.get(state_id) is kept for state_id in many)
    assert len({*many, first, *others}) == 20
    now = 10
    assert all(table.get(state_id) is None for state_id in many)
    assert len(table) == 0
    alone = StateTable(1, 10)
    assert alone.get(alone.put(KeptState("a" * STATE_BYTES, None), "one")) is not None, "the newest is kept"
    large = [table.put(KeptState("a" * STATE_BYTES, None), place) for place in range(16)]  # four bytes each
    assert [table.get(state_id) is not None for state_id in large] == [False] * 13 + [True] * 3
