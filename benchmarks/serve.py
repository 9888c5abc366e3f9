"""The server under load, beside the batch decoder alone: `python -m benchmarks.serve runs/quick [--clients 64]`.

Every client sends its requests one after the other, each with a seed of its own, and reads a stream to its end; the
batch decoder takes the same requests in one process, as `textgen sample --batch_file` does. Rounds are taken in turns.
Each text must be the one that the batch decoder gave. Server and clients share this machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import save
from textgen.config import SamplingConfig
from textgen.decoding.choose import choose_decoder
from textgen.decoding.decoders import Decoder
from textgen.decoding.generation import generate_stream
from textgen.decoding.samples import Request, Sample
from textgen.model.files import load_model
from textgen.runs.checkpoint import find_checkpoint
from textgen.tokenizer import Tokenizer

PROMPTS = ["i love this movie because", "this movie is terrible because", "the plot", ""]


@dataclass
class Seen:
    """A stream as a client saw it; it is parsed when nothing is measured any more."""

    number: int
    raw: bytes
    first: float
    """seconds from the request to the first text"""
    gap: float
    """the longest wait between two pieces"""

    @property
    def events(self) -> list[dict[str, Any]]:
        """Return what the server sent."""
        chunks = re.findall(rb"^data: ({.*})$", self.raw, re.MULTILINE)
        return [json.loads(chunk) for chunk in chunks]

    @property
    def text(self) -> str:
        """Return the whole text."""
        return "".join(choice["text"] for event in self.events for choice in event["choices"])

    @property
    def num_tokens(self) -> int:
        """Return how many tokens were drawn, the end included."""
        *_, last, usage = self.events
        ended: bool = last["choices"][0]["finish_reason"] == "stop"
        return int(usage["usage"]["completion_tokens"]) + ended


def request(number: int, num_tokens: int) -> tuple[str, SamplingConfig]:
    """Return prompt and settings of a request."""
    config = SamplingConfig(seed=number, max_new_tokens=num_tokens, temperature=0.9)
    return PROMPTS[number % len(PROMPTS)], config


def offline(decoder: Decoder, tokenizer: Tokenizer, count: int, args: Any) -> tuple[float, dict[int, str]]:
    """Return tokens per second of the batch decoder alone, and the texts."""
    requests = [Request(*request(number, args.tokens)) for number in range(count)]
    started = time.perf_counter()
    samples = {
        row: event
        for row, event in generate_stream(decoder, tokenizer, requests, batch_size=args.clients)
        if isinstance(event, Sample)
    }
    seconds = time.perf_counter() - started
    return sum(s.num_tokens + s.finished for s in samples.values()) / seconds, {i: s.text for i, s in samples.items()}


async def client(port: int, numbers: list[int], num_tokens: int) -> list[Seen]:
    """Send requests over one connection and read their streams."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    streams = []
    for number in numbers:
        prompt, config = request(number, num_tokens)
        body = json.dumps({
            "prompt": prompt, "stream": True, "seed": number, "max_tokens": num_tokens,
            "temperature": config.temperature, "stream_options": {"include_usage": True},
        }).encode()  # fmt: skip
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        started = time.perf_counter()
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        status = await reader.readuntil(b"\r\n\r\n")
        assert status.startswith(b"HTTP/1.1 200 "), status
        raw, times = b"", []
        while not raw.endswith(b"\r\n0\r\n\r\n"):
            raw += await reader.read(1 << 16)
            times.append(time.perf_counter())
        gaps = [after - before for before, after in itertools.pairwise(times)]
        streams.append(Seen(number, raw, times[0] - started, max(gaps, default=0.0)))
    writer.close()
    await writer.wait_closed()
    return streams


async def load(port: int, num_clients: int, args: Any) -> tuple[float, list[Seen]]:
    """Return tokens per second of so many clients at a time, and what they saw."""
    started = time.perf_counter()
    everything = await asyncio.gather(
        *(
            client(port, [place + num_clients * i for i in range(args.requests)], args.tokens)
            for place in range(num_clients)
        )
    )
    seconds = time.perf_counter() - started
    seen = [stream for streams in everything for stream in streams]
    return sum(stream.num_tokens for stream in seen) / seconds, seen


@contextmanager
def server(checkpoint: str, args: Any, *flags: str) -> Iterator[int]:
    """Start a server and end it; yield its port."""
    argv = [sys.executable, "-m", "textgen", "serve", checkpoint, "--port", "0", "--decoder", args.decoder]
    argv += ["--batch_size", str(args.clients), *(["--threads", str(args.threads)] if args.threads else []), *flags]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(argv, stderr=file)
        try:
            while not (said := re.search(r"serving on http://127.0.0.1:(\d+)\n", log.read_text())):
                if process.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.1)
            yield int(said[1])
        finally:
            process.terminate()
            process.wait(10)


def measure(checkpoint: str, args: Any) -> list[dict[str, Any]]:
    """Return figures of a checkpoint's rounds."""
    model, tokenizer = load_model(checkpoint)
    decoder = choose_decoder(model, args.decoder, directory=find_checkpoint(checkpoint))
    rounds = []
    with server(checkpoint, args) as port:
        offline(decoder, tokenizer, args.clients, args)  # warm
        asyncio.run(load(port, args.clients, args))
        for _ in range(args.rounds):
            alone, texts = offline(decoder, tokenizer, args.clients * args.requests, args)
            served, seen = asyncio.run(load(port, args.clients, args))
            single, _ = asyncio.run(load(port, 1, args))
            rounds.append({
                "offline": round(alone), "served": round(served), "one_client": round(single),
                "share": round(served / alone, 3), "texts": len(seen),
                "other_texts": sum(stream.text != texts[stream.number] for stream in seen),
                "first_text_ms": round(1e3 * statistics.median(stream.first for stream in seen), 1),
                "longest_gap_ms": round(1e3 * max(stream.gap for stream in seen), 1),
            })  # fmt: skip
            print(rounds[-1], flush=True)
    share = statistics.median(entry["share"] for entry in rounds)
    print(f"{args.clients} clients: {share:.2f} of the batch decoder's tokens per second")
    return rounds


def main() -> None:
    """Measure in turns, compare every text, print and save figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=6, help="of each client, one after the other")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens of a text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decoder", default="int8")
    parser.add_argument("--threads", type=int, help="of the server's decoder")
    args = parser.parse_args()
    settings = vars(args).copy()
    figures = {Path(checkpoint).name: measure(checkpoint, args) for checkpoint in settings.pop("checkpoints")}
    save("serve", {"settings": settings, "rounds": figures})


if __name__ == "__main__":
    main()
