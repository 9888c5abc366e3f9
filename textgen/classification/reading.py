"""What a model makes of whole texts: the nats that they take after each label, and pooled states for a head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from textgen.console import Progress
from textgen.data.side_by_side import Tokens, batch_by_length, document_windows
from textgen.hardware import sum_dtype
from textgen.model.lstm import LSTMLanguageModel, State

# Tokens of each text read in one call; fewer for a large vocabulary, since the logits of a call are LOGITS at most.
WINDOW = 256
LOGITS = 1 << 24


@torch.inference_mode()
def label_scores(
    model: LSTMLanguageModel,
    documents: Sequence[Tokens],
    begin_ids: Sequence[int],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> NDArray[np.float64]:
    """Return the log-probability of each text after each label, in nats: (texts, labels).

    Args:
        model: on its device, in evaluation mode.
        documents: token ids of each text, the end-of-text token last.
        begin_ids: the first input of a text with each label.
        batch_size: texts that are read side by side; changes the scores by rounding only.
        progress: show on standard error how far it is.
    """
    window = max(1, min(WINDOW, LOGITS // (batch_size * model.vocab_size)))
    scores = np.zeros((len(documents), len(begin_ids)))
    device = model.embedding.weight.device
    with Progress("scored text", len(documents) * len(begin_ids), show=progress) as bar:
        done = 0
        for rows in batch_by_length(documents, batch_size):
            batch = [documents[row] for row in rows]
            for label, begin in enumerate(begin_ids):
                total = torch.zeros(len(rows), dtype=sum_dtype(device), device=device)
                state = model.zero_state(len(rows))
                for x, y, _ in document_windows(batch, [begin] * len(batch), window=window, device=device):
                    state = _first(state, len(x))
                    logits, state = model(x, state)  # (rows, time, vocab_size)
                    nats = logits.logsumexp(-1) - logits.gather(2, y.clamp(min=0)[..., None])[..., 0]
                    total[: len(x)] -= (nats * (y >= 0)).sum(1, dtype=total.dtype)
                scores[rows, label] = total.cpu().numpy()
                bar.update(done := done + len(rows))
    return scores


@torch.inference_mode()
def pooled_states(
    model: LSTMLanguageModel,
    documents: Sequence[Tokens],
    begin_id: int,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> NDArray[np.float32]:
    """Return what a head reads of each text: (texts, 3 x hidden_size).

    They are the output of the last LSTM layer after the text's last token, and its mean and its largest values over
    all tokens (concat pooling: Howard and Ruder 2018, "Universal Language Model Fine-tuning", section 3.3).

    Args:
        model: on its device, in evaluation mode.
        documents: token ids of each text, the end-of-text token last.
        begin_id: the first input of a text.
        batch_size: texts that are read side by side; changes the values by rounding only.
        progress: show on standard error how far it is.
    """
    size = model.config.hidden_size
    pooled = np.zeros((len(documents), 3 * size), dtype=np.float32)
    with Progress("read text", len(documents), show=progress) as bar:
        done = 0
        for rows in batch_by_length(documents, batch_size):
            pooled[rows] = _pool(model, [documents[row] for row in rows], begin_id).cpu().numpy()
            bar.update(done := done + len(rows))
    return pooled


def _pool(model: LSTMLanguageModel, batch: Sequence[Tokens], begin_id: int) -> Tensor:
    """Return the pooled states (texts, 3 x hidden_size) of texts sorted by falling length."""
    size, device = model.config.hidden_size, model.embedding.weight.device
    lengths = torch.tensor([len(document) for document in batch], device=device)[:, None]
    last, total = torch.zeros(len(batch), size, device=device), torch.zeros(len(batch), size, device=device)
    largest = torch.full((len(batch), size), -torch.inf, device=device)
    hidden, cell = model.zero_state(len(batch))
    states = [(hidden[i : i + 1], cell[i : i + 1]) for i in range(len(model.layers))]
    for x, y, start in document_windows(batch, [begin_id] * len(batch), window=WINDOW, device=device):
        live = len(x)  # the others have ended
        output, states = model.run_layers(model.embed(x), [_first(state, live) for state in states], None)
        output, read = output.float(), (y >= 0)[..., None]  # (live, time, hidden_size), (live, time, 1)
        total[:live] += (output * read).sum(1)
        largest[:live] = torch.maximum(largest[:live], output.masked_fill(~read, -torch.inf).amax(1))
        # the output after the last token, of the texts that end in this window
        place = (lengths[:live, 0] - 1 - start).clamp(max=x.shape[1] - 1)
        ends = lengths[:live] <= start + x.shape[1]
        last[:live] = torch.where(ends, output[torch.arange(live, device=device), place], last[:live])
    return torch.cat([last, total / lengths, largest], 1)


def _first(state: State, rows: int) -> State:
    """Return the state of the first rows: the texts that have not ended."""
    return state[0][:, :rows], state[1][:, :rows]
