"""An embedding that starts from the neighbours that each token has in the training text.

Tokens with the same neighbours are used alike, and a training would move their embeddings towards each other. Here they
are near each other from the first step on. docs/decisions/0040-an-embedding-starts-from-neighbours.md has the figures.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_TOKENS = 4_000_000
"""of text, in which neighbours are counted: 1.3 s. With a million `quick` was 0.003 bits per byte worse"""
PLACES = {-1: 1.0, 1: 1.0, -2: 0.6, 2: 0.6}
"""places of the counted neighbours, relative to a token, and the weight of each"""
MAX_NEIGHBOURS = 512
"""the most frequent tokens, which alone are counted as neighbours; 1,024 gave as much"""
MAX_COUNTS = 1 << 24
"""of one place: a vocabulary above 32,768 tokens has fewer neighbours"""
LENGTH = 4.0
"""of an embedding. Random ones have 1. For `quick`, 3 and 5 were better than 2 and 8 (2026-11-30)"""


@torch.no_grad()
def embed_by_neighbours(
    tokens: NDArray[np.int32], *, vocab_size: int, embedding_dim: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return embeddings whose directions are similar for tokens with similar neighbours.

    For each place beside a token, its positive pointwise mutual information with the most frequent tokens is counted
    (Bullinaria and Levy 2007, "Extracting semantic representations from word co-occurrence statistics"). The places
    side by side are a matrix. Its singular vectors, weighted by the roots of the singular values, are the embeddings
    (Levy, Goldberg and Dagan 2015, "Improving Distributional Similarity with Lessons Learned from Word Embeddings",
    section 3.3). A random rotation spreads the strong ones over all dimensions.

    Args:
        tokens: (count,), text of the training. The counting takes some 20 bytes a token.
        vocab_size: number of tokens; `tokens` are below it.
        embedding_dim: size of an embedding.
        generator: for the decomposition, which is a randomized one, and the rotation.

    Returns:
        Embeddings (vocab_size, embedding_dim) of length `LENGTH`, and which tokens have one (vocab_size,): a token
        without a counted neighbour has a row of zeros.
    """
    counts = np.bincount(tokens, minlength=vocab_size)
    width = min(MAX_NEIGHBOURS, vocab_size, MAX_COUNTS // vocab_size)
    column = np.full(vocab_size, -1, dtype=np.int32)
    column[np.argsort(-counts, kind="stable")[:width]] = np.arange(width)
    columns = column[tokens]
    information = torch.cat(
        [weight * _information(tokens, columns, place, (vocab_size, width)) for place, weight in PLACES.items()], dim=1
    )
    rank = min(embedding_dim, *information.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
        vectors, values, _ = torch.svd_lowrank(information, q=rank)
    rows = LENGTH * torch.nn.functional.normalize(vectors * values.sqrt())  # (vocab_size, rank)
    rotation, _ = torch.linalg.qr(torch.randn(embedding_dim, embedding_dim, generator=generator))
    return rows @ rotation[:rank], information.any(dim=1)


def _information(tokens: NDArray[np.int32], columns: NDArray[np.int32], place: int, shape: tuple[int, int]) -> Tensor:
    """Return the positive pointwise mutual information of tokens and their neighbours at a place: `shape`, float32."""
    own, beside = (tokens[:-place], columns[place:]) if place > 0 else (tokens[-place:], columns[:place])
    kept = beside >= 0
    pairs = np.bincount(own[kept] * shape[1] + beside[kept], minlength=math.prod(shape))
    counts = torch.from_numpy(pairs.reshape(shape)).float()
    expected = (counts.sum(1, keepdim=True) + 1) * (counts.sum(0, keepdim=True) + 1) / counts.sum().clamp(min=1)
    return (counts / expected).log_().clamp_(min=0)
