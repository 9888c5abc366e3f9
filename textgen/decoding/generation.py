"""From prompts to texts: samples run side by side in a batch, and a new sample takes the place of a finished one.

`generate_stream` is the loop. It turns each request into a `RunningSample`, which holds a text on the host, and puts
running samples into the rows of a `Batch`, which holds tokens and states on the device. `advance_many` draws tokens
of each row, many in one call where compiled code can; they are pushed to their samples, which return the new pieces of
text, and at the end a `Sample`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from textgen.config import SamplingConfig
from textgen.decoding import cuda_graphs
from textgen.decoding.batch import REFILL_DIVISOR, Prefilled, RunningBatch, Scored
from textgen.decoding.decoders import Decoder
from textgen.decoding.reading import ReadState
from textgen.decoding.samples import Request, RunningSample, Sample, begin_id
from textgen.model.lstm import LSTMLanguageModel
from textgen.tokenizer import Tokenizer

# Samples that run at a time by default: enough to keep a CPU or GPU busy.
BATCH_SIZE = 64

# The newest running request is at most this far ahead of the oldest one. A caller that returns samples in order has to
# hold the samples that end before the oldest one, and this bounds their number.
MAX_AHEAD = 4096


def generate(
    model: LSTMLanguageModel | Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    *,
    num_samples: int = 1,
    batch_size: int = BATCH_SIZE,
) -> Iterator[tuple[int, str | Sample]]:
    """Continue every prompt `num_samples` times.

    The noise of a sample depends on the seed, the prompt and the number of `number_requests` alone, so its text does
    not depend on the samples of other prompts.

    Yields:
        (index, piece of text) as it is drawn, whole characters only, and once per sample (index, Sample) when it ends.
        Sample i of a prompt has the index prompt index x `num_samples` + i.
    """
    requests = number_requests(((prompt, config) for prompt in prompts), num_samples)
    return generate_stream(model, tokenizer, requests, batch_size=batch_size)


def number_requests(
    prompts: Iterable[tuple[str, SamplingConfig] | tuple[str, SamplingConfig, str | None]],
    num_samples: int,
    *,
    read: ReadState | None = None,
) -> Iterator[Request]:
    """Yield the requests for `num_samples` samples of each prompt of a list, in order.

    Sample i of a prompt has the number `num_samples` x (earlier entries that are equal) + i. So a prompt that is in
    the list k times has k different texts: those of one entry with k times `num_samples`.

    Args:
        prompts: texts and settings, and a label if the text has one.
        num_samples: of each prompt.
        read: a text that was read earlier, with which the prompts begin.
    """
    earlier: Counter[tuple[str, SamplingConfig, str | None]] = Counter()
    for prompt, config, *rest in prompts:
        label = rest[0] if rest else None
        first = num_samples * earlier[prompt, config, label]
        earlier[prompt, config, label] += 1
        for i in range(num_samples):
            yield Request(prompt, config, first + i, read=read, label=label)


def sample_all(
    model: LSTMLanguageModel | Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    *,
    num_samples: int = 1,
) -> list[Sample]:
    """Return the finished samples of `generate`, in the order of the prompts."""
    events = generate(model, tokenizer, prompts, config, num_samples=num_samples)
    ended = {index: event for index, event in events if isinstance(event, Sample)}
    return [ended[index] for index in sorted(ended)]


def generate_stream(
    model: LSTMLanguageModel | Decoder,
    tokenizer: Tokenizer,
    requests: Iterable[Request],
    *,
    batch_size: int = BATCH_SIZE,
    interrupted: Callable[[], bool] = lambda: False,
    batch_of: Callable[..., RunningBatch] | None = None,
) -> Iterator[tuple[int, str | Sample]]:
    """Continue requests, `batch_size` of them at a time; the next requests start when rows are free.

    Args:
        model: the model, or a decoder of it.
        tokenizer: the model's.
        requests: read one by one, at most `MAX_AHEAD` beyond the oldest one that runs.
        batch_size: number of rows.
        interrupted: called before tokens are drawn. Once it returns true, running samples end as they are and no
            request starts.
        batch_of: reads prompts and makes a batch, as `Batch.of` does. Default: that of `cuda_graphs.batch_of`.

    Yields:
        (index of the request, piece of text) as it is drawn, and once per request (index, Sample) when it ends.

    Raises:
        ValueError: a request is impossible, see `require_drawable` and `begin_id`.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    waiting, num_started, prefilled, scored = iter(requests), 0, Prefilled(), Scored()
    make_batch = cuda_graphs.batch_of(decoder) if batch_of is None else batch_of
    batch: RunningBatch | None = None
    stopped = interrupted()
    while not stopped:
        # take requests for the free rows, unless few are free or the oldest sample is too far behind
        running = batch.samples if batch is not None else []
        oldest = min((sample.index for sample in running), default=num_started)
        room = min(batch_size - len(running), oldest + MAX_AHEAD - num_started)
        room = room if room >= batch_size // REFILL_DIVISOR else 0
        arrived = [
            RunningSample.of(
                num_started + i,
                request,
                tokenizer,
                begin=None if request.label is None else begin_id(decoder.model, tokenizer, request.label),
            )
            for i, request in enumerate(islice(waiting, room))
        ]
        num_started += len(arrived)

        # forced tokens come first, and may already end a sample; the others join the batch
        for sample in arrived:
            for event in sample.begin():
                yield sample.index, event
        if joining := [sample for sample in arrived if not sample.ended]:
            batch = make_batch(decoder, tokenizer, joining, beside=batch, prefilled=prefilled, scored=scored)
        if batch is None:
            if not arrived:  # no request is left
                return
            stopped = interrupted()
            continue

        # draw until some sample has ended, then drop the ended samples
        while not (stopped or any(sample.ended for sample in batch.samples)):
            tokens, logprobs = batch.advance_many()
            for row, sample in enumerate(batch.samples):
                for event in sample.push_all(tokens[row], None if logprobs is None else logprobs[row]):
                    yield sample.index, event
            stopped = interrupted()
        batch = batch.without_ended()
    for sample in batch.samples if batch is not None else []:
        for event in sample.cut():
            yield sample.index, event
