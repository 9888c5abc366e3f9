"""Whole documents side by side: those of similar length in a batch, read in windows of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tokens = NDArray[np.integer[Any]]


def batch_by_length(documents: Sequence[Tokens], batch_size: int) -> list[list[int]]:
    """Return the places of documents in batches of similar length, the longest first."""
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def document_windows(
    documents: Sequence[Tokens], first: Sequence[int], *, window: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield the windows of documents, those that have not ended.

    Args:
        documents: token ids, sorted by falling length.
        first: the input before each document's first token.
        window: tokens of each document in a window.
        device: of the tensors.

    Yields:
        Inputs and targets (rows, time) int64, -1 where a target is behind a document's end; and the place of the
        window's first target in the documents.
    """
    longest = len(documents[0])
    for start in range(0, longest, window):
        rows = sum(len(document) > start for document in documents)  # the shorter ones have ended
        tokens = np.full((rows, min(window, longest - start) + 1), -1, dtype=np.int64)
        tokens[:, 0] = first[:rows] if start == 0 else [document[start - 1] for document in documents[:rows]]
        for row, document in enumerate(documents[:rows]):
            part = document[start : start + window]
            tokens[row, 1 : 1 + len(part)] = part
        both = torch.from_numpy(tokens).to(device)
        yield both[:, :-1].clamp(min=0), both[:, 1:], start
