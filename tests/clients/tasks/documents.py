"""Figures of a document that ends with `</s>`, which is a token and no text."""

from __future__ import annotations

from typing import Any


def bits_of_document(doc: dict[str, Any], results: list[float]) -> dict[str, tuple[float, int]]:
    """Return nats and bytes of a document, its end without bytes, for lm-eval's `bits_per_byte`."""
    return {"bits_per_byte": (results[0], len(doc["text"].encode()))}
