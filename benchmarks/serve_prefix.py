"""Clients whose prompts begin alike, with and without kept states: `python -m benchmarks.serve_prefix runs/quick`.

All clients connect at once and send one prompt each: `--prefix_tokens` tokens of reviews that all share, then a few
words of their own. One server keeps states of prompts, the other does not (`--prefix_cache 0`). A round is: the server
without states, the other one with a beginning that it has not seen, and again with that beginning. Each text must be
the one of the server without states. Servers and clients share this machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import time
import urllib.request
from dataclasses import dataclass
from itertools import islice
from typing import Any

from benchmarks.machine import save
from benchmarks.serve import server
from textgen.config import DataConfig
from textgen.data.corpus import open_corpus
from textgen.model.files import load_model
from textgen.tokenizer import Tokenizer


@dataclass
class Answer:
    """A stream as a client saw it."""

    first: float
    """seconds from the request to the first text"""
    text: str


async def ask(port: int, prompt: str, seed: int, args: Any) -> Answer:
    """Send a prompt and read its stream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    asked = {"prompt": prompt, "stream": True, "seed": seed, "max_tokens": args.tokens}
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    started, first, raw = time.perf_counter(), 0.0, b""
    writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
    status = await reader.readuntil(b"\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 200 "), status
    while not raw.endswith(b"\r\n0\r\n\r\n"):
        raw += await reader.read(1 << 16)
        first = first or time.perf_counter() - started
    writer.close()
    events = [json.loads(chunk) for chunk in re.findall(rb"^data: ({.*})$", raw, re.MULTILINE)]
    return Answer(first, "".join(choice["text"] for event in events for choice in event["choices"]))


async def ask_all(port: int, prompts: list[str], args: Any) -> list[Answer]:
    """Send all prompts at once."""
    return await asyncio.gather(*(ask(port, prompt, seed, args) for seed, prompt in enumerate(prompts)))


def shared_text(tokenizer: Tokenizer, texts: list[str], num_tokens: int) -> str:
    """Return the text of so many tokens, or a few less."""
    text = tokenizer.decode(tokenizer.encode(" ".join(texts))[:num_tokens])
    return text[: tokenizer.settled(text)]


def reused(port: int) -> int:
    """Return the server's count of tokens that were not read again."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        found = re.search(rb"^textgen_prefix_tokens_reused_total (\d+)", answer.read(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def milliseconds(answers: list[Answer]) -> dict[str, float]:
    """Return the times to the first text."""
    first = sorted(1e3 * answer.first for answer in answers)
    return {"median_ms": round(statistics.median(first)), "last_ms": round(first[-1])}


def main() -> None:
    """Measure in turns, compare every text, print and save figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--prefix_tokens", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=20, help="most tokens of a text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decoder", default="int8")
    parser.add_argument("--threads", type=int, help="of the servers' decoders")
    args = parser.parse_args()
    _, tokenizer = load_model(args.checkpoint)
    texts = list(islice(open_corpus(DataConfig(source="package")).splits["train"](), 200 * args.rounds))
    rounds: list[dict[str, Any]] = []
    flags = ["--max_prompt_tokens", str(args.prefix_tokens + 100)]
    with (
        server(args.checkpoint, args, *flags, "--prefix_cache", "0") as without,
        server(args.checkpoint, args, *flags) as port,
    ):
        for place in (without, port):
            asyncio.run(ask_all(place, ["The plot was"] * args.clients, args))  # warm
        for i in range(args.rounds):
            shared = shared_text(tokenizer, texts[200 * i : 200 * (i + 1)], args.prefix_tokens)
            prompts = [f"{shared} Number {n}:" for n in range(args.clients)]
            off = asyncio.run(ask_all(without, prompts, args))
            cold = asyncio.run(ask_all(port, prompts, args))
            count = reused(port)
            warm = asyncio.run(ask_all(port, prompts, args))
            wanted = [answer.text for answer in off]
            entry: dict[str, Any] = {
                "without": milliseconds(off),
                "cold": milliseconds(cold),
                "warm": milliseconds(warm),
            }
            entry |= {"tokens": len(tokenizer.encode(prompts[0])), "reused_warm": reused(port) - count}
            entry |= {"other_texts": sum([a.text for a in seen] != wanted for seen in (cold, warm))}
            rounds.append(entry)
            print(entry, flush=True)
    settings = {name: value for name, value in vars(args).items() if name != "checkpoint"}
    save("serve_prefix", {"settings": settings, "rounds": rounds})


if __name__ == "__main__":
    main()
