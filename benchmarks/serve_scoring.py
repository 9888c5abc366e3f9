"""Streams beside a client that has long prompts scored: `python -m benchmarks.serve_scoring runs/quick`.

Every client reads streams, as in `benchmarks.serve`. In every second round one more client sends prompts of
`--prompt_tokens` tokens with `echo`, `logprobs` 5 and `max_tokens` 0, one after the other, until the streams end. The
longest pause of a stream says how long the streams wait for a prompt; it should be about that of a window of 512 tokens
(`window_ms`, of a prompt that is scored alone) beyond the pause without. Server and clients share this machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import time
from typing import Any

from benchmarks.machine import save
from benchmarks.serve import load, server
from textgen.decoding.decoders import PREFILL_WINDOW

# Tokens of the prompts; any ids will do.
FIRST_ID, NUM_IDS = 300, 1000


async def score(port: int, num_tokens: int, seconds: list[float], count: int | None = None) -> None:
    """Have prompts scored, `count` of them or until cancelled, and note how long each took."""
    ids = [FIRST_ID + 7 * i % NUM_IDS for i in range(num_tokens)]
    body = json.dumps({"prompt": ids, "echo": True, "logprobs": 5, "max_tokens": 0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    try:
        while count is None or len(seconds) < count:
            started = time.perf_counter()
            writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200 "), answer
            length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            seconds.append(time.perf_counter() - started)
    finally:
        writer.close()


async def load_and_score(port: int, args: Any) -> tuple[float, list[Any], list[float]]:
    """Return tokens per second and streams of the clients, and the seconds of each scored prompt beside them."""
    seconds: list[float] = []
    scoring = asyncio.create_task(score(port, args.prompt_tokens, seconds))
    served, seen = await load(port, args.clients, args)
    scoring.cancel()
    return served, seen, seconds


def main() -> None:
    """Measure in turns, print and save figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=3, help="of each client, one after the other")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens of a text")
    parser.add_argument("--prompt_tokens", type=int, default=4000, help="of a scored prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decoder", default="int8")
    parser.add_argument("--threads", type=int, help="of the server's decoder")
    args = parser.parse_args()
    rounds: list[dict[str, Any]] = []
    with server(args.checkpoint, args, "--max_prompt_tokens", str(args.prompt_tokens)) as port:
        asyncio.run(load(port, args.clients, args))  # warm
        for _ in range(args.rounds):
            alone, seen = asyncio.run(load(port, args.clients, args))
            beside, seen_beside, seconds = asyncio.run(load_and_score(port, args))
            single: list[float] = []
            asyncio.run(score(port, args.prompt_tokens, single, count=2))
            windows = math.ceil(args.prompt_tokens / PREFILL_WINDOW)
            rounds.append(
                {
                    "window_ms": round(1e3 * min(single) / windows, 1),
                    "alone": round(alone),
                    "beside": round(beside),
                    "longest_gap_ms": round(1e3 * max(stream.gap for stream in seen), 1),
                    "longest_gap_beside_ms": round(1e3 * max(stream.gap for stream in seen_beside), 1),
                    "median_gap_beside_ms": round(1e3 * statistics.median(stream.gap for stream in seen_beside), 1),
                    "prompts": len(seconds),
                    "seconds_of_a_prompt": round(statistics.median(seconds), 2) if seconds else None,
                }
            )
            print(rounds[-1], flush=True)
    settings = {name: value for name, value in vars(args).items() if name != "checkpoint"}
    save("serve_scoring", {"settings": settings, "rounds": rounds})


if __name__ == "__main__":
    main()
