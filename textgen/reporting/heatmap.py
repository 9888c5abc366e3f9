"""A page that colours each token of texts by its cost: one file, without scripts, readable without colours."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from textgen.console import escape_controls
from textgen.files import write_atomic

# Bits at which a token gets the next colour. A token of 1 bit was as likely as heads, one of 14 bits 1 of 16,000.
BORDERS = (1, 2, 4, 6, 8, 11, 14)


@dataclass(frozen=True)
class HeatToken:
    """A token of a text."""

    name: str
    """its text; empty for the end of the text"""
    logprob: float
    rank: int
    alternatives: Sequence[tuple[str, float]]
    """the likeliest tokens at its place, with their log-probabilities"""

    @property
    def bits(self) -> float:
        """Return minus the logarithm of the probability to base 2."""
        return -self.logprob / math.log(2) + 0.0  # not -0.0

    @property
    def level(self) -> int:
        """Return the number of the token's colour, 0 for the cheapest tokens."""
        return bisect_right(BORDERS, self.bits)

    @property
    def shown(self) -> str:
        """Return the text as the page shows it: line breaks are visible, control characters are codes."""
        return escape_controls(self.name).replace("\n", "↵\n") if self.name else "(end)"

    @property
    def others(self) -> str:
        """Return the alternatives in words."""
        return ", ".join(
            f"“{escape_controls(name) or '(end)'}” {math.exp(value):.1%}" for name, value in self.alternatives
        )


@dataclass(frozen=True)
class HeatText:
    """A text and its figures."""

    title: str
    figures: str
    tokens: Sequence[HeatToken]


def write_heatmap(path: Path, texts: Iterable[HeatText]) -> None:
    """Write the page of texts, which are asked for one by one.

    Raises:
        OSError: the page cannot be written.
    """
    import jinja2

    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = page.from_string(Path(__file__).with_name("heatmap_page.html").read_text(encoding="utf-8"))
    borders = [0, *BORDERS]
    names = [f"{low}–{high}" for low, high in zip(borders, BORDERS, strict=False)] + [f"{BORDERS[-1]} and more"]
    write_atomic(path, template.generate(texts=texts, levels=names))
