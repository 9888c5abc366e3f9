"""The server's decoding thread without HTTP, in CUDA graphs and step by step: `python -m benchmarks.serve_graphs`.

So many clients at a time send a prompt each and, when its text has ended, the next one. A model of random weights that
never ends a text decodes: on a GPU the shape of `benchmarks.decode`, in bfloat16. Counted are tokens per second, the
wait for a first token and between two pieces, and the graphs that were captured while rows joined and left; the turns
before, which capture, are not measured. Prompts are also read alone, by the model and side by side. On a CPU, plain
functions stand for graphs: a check of this script.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.decode import SHAPES, tokenizer_of
from benchmarks.machine import save
from textgen.config import ModelConfig, SamplingConfig
from textgen.decoding.batch import Batch, RunningBatch
from textgen.decoding.choose import choose_decoder
from textgen.decoding.cuda_graphs import GraphRunner, steps_in_place
from textgen.decoding.decoders import Decoder
from textgen.decoding.samples import Request
from textgen.model.lstm import LSTMLanguageModel
from textgen.serving.scheduler import Delta, Scheduler, Stream
from textgen.serving.states import PrefixTable
from textgen.tokenizer import Tokenizer


class Clients:
    """Clients that send their requests one after the other to a scheduler, and note when text comes."""

    def __init__(self, scheduler: Scheduler, count: int, requests: int, num_tokens: int) -> None:
        self._scheduler, self._num_tokens = scheduler, num_tokens
        self._left = dict.fromkeys(range(count), requests)
        self._sent: dict[int, float] = {}
        self._last: dict[int, float | None] = {}
        self._done = threading.Event()
        self.first: list[float] = []
        """seconds from a request to its first text"""
        self.gaps: list[float] = []
        """seconds between two pieces of a text"""
        self.error: str | None = None

    def run(self) -> float:
        """Send all requests, wait for their texts, and return tokens per second."""
        started, before = time.perf_counter(), self._scheduler.num_tokens
        for owner in self._left:
            self._send(owner)
        self._done.wait()
        if self.error is not None:
            raise RuntimeError(self.error)
        return (self._scheduler.num_tokens - before) / (time.perf_counter() - started)

    def _send(self, owner: int) -> None:
        number = self._left[owner]
        self._left[owner] -= 1
        config = SamplingConfig(max_new_tokens=self._num_tokens, temperature=0.5 + 0.1 * (number % 9), seed=owner)
        ids = [self._scheduler.tokenizer.bos_id, *range(10, 10 + 16)]
        self._sent[owner], self._last[owner] = time.perf_counter(), None
        self._scheduler.submit([self._scheduler.new_stream(Request("", config, number), ids, owner)])

    def note(self, deltas: list[tuple[Stream, Delta]]) -> None:
        """Take what the scheduler delivers."""
        now = time.perf_counter()
        for stream, delta in deltas:
            owner, last = stream.owner, self._last[stream.owner]
            if last is None:
                self.first.append(now - self._sent[owner])
            else:
                self.gaps.append(now - last)
            self._last[owner], self.error = now, self.error or delta.error
            if delta.sample is not None and self._left[owner]:
                self._send(owner)
            elif delta.sample is not None:
                del self._left[owner]
        if not self._left or self.error:
            self._done.set()


def measure(
    decoder: Decoder, tokenizer: Tokenizer, batch_of: Callable[..., RunningBatch], count: int, args: Any
) -> tuple[float, Clients]:
    """Return tokens per second of so many clients, and what they saw."""
    scheduler = Scheduler(
        decoder, tokenizer, batch_size=count, max_waiting=count, prefixes=PrefixTable(0), batch_of=batch_of
    )
    clients = Clients(scheduler, count, args.requests, args.tokens)
    scheduler.start(clients.note)
    try:
        return clients.run(), clients
    finally:
        scheduler.stop(0)
        scheduler.join(10)


def reading(decoder: Decoder, count: int, length: int = 100) -> dict[str, float]:
    """Return milliseconds in which prompts are read: each by the model, and side by side if the decoder does so."""
    prompts = [tuple((row + i) % 200 + 10 for i in range(length)) for row in range(count)]
    ways: dict[str, Callable[[], object]] = {"by the model": lambda: [decoder.prefill(ids) for ids in prompts]}
    if (pieces := decoder.pieces) is not None:
        ways["side by side"] = lambda: pieces.read(prompts)
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(7):
        for way, read in ways.items():
            started = time.perf_counter()
            read()
            if decoder.device.type == "cuda":
                torch.cuda.synchronize()
            found[way].append(time.perf_counter() - started)
    return {way: round(1e3 * statistics.median(times[2:]), 3) for way, times in found.items()}  # the first ones warm up


def main() -> None:
    """Measure graphs and single steps in turns, print and save."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--requests", type=int, default=6, help="of each client, one after the other")
    parser.add_argument("--tokens", type=int, default=300, help="of each text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", type=int, nargs=4, default=SHAPES[device.type], metavar="N")
    args = parser.parse_args()
    vocab_size, embedding, hidden, layers = args.shape
    tokenizer = tokenizer_of(vocab_size)
    shape = ModelConfig(embedding_dim=embedding, hidden_size=hidden, num_layers=layers)
    model = LSTMLanguageModel(shape, tokenizer.vocab_size).to(device)
    with torch.no_grad():
        model.output.bias[tokenizer.eos_id] -= 1000
    decoder = choose_decoder(model.eval(), "auto")
    capture = None if device.type == "cuda" else lambda buffers, count: partial(steps_in_place, buffers, count)
    runner, figures = GraphRunner(decoder, capture=capture), dict[str, Any]()
    ways: dict[str, Callable[..., RunningBatch]] = {"graphs": runner.batch_of, "single steps": Batch.of}
    prompts = {count: reading(decoder, count) for count in (1, 16)}
    print(f"milliseconds for prompts of 100 tokens: {prompts}", flush=True)
    for count in args.clients:
        seen: dict[str, list[tuple[float, Clients]]] = {way: [] for way in ways}
        measure(decoder, tokenizer, runner.batch_of, count, args)
        before = runner.num_captured
        for _ in range(args.rounds):
            for way, batch_of in ways.items():
                seen[way].append(measure(decoder, tokenizer, batch_of, count, args))
        for way, turns in seen.items():
            speeds = sorted(speed for speed, _ in turns)
            entry = {
                "tokens_per_second": round(statistics.median(speeds)), "lowest": round(speeds[0]),
                "highest": round(speeds[-1]),
                "first_ms": round(1e3 * statistics.median(s for _, c in turns for s in c.first), 2),
                "longest_gap_ms": round(1e3 * max((s for _, c in turns for s in c.gaps), default=0.0), 2),
            }  # fmt: skip
            if way == "graphs":
                entry |= {"joins": args.rounds * count * args.requests, "captures": runner.num_captured - before}
            figures.setdefault(str(count), {})[way] = entry
            print(f"{count:3} clients, {way}: {entry}", flush=True)
        save(
            "serve_graphs",
            {"decoder": decoder.description, "shape": args.shape, "clients": figures, "prompts_ms": prompts},
        )
        if not runner.num_captured:
            raise SystemExit("error: no step was captured in a CUDA graph")


if __name__ == "__main__":
    main()
