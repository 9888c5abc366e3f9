"""The page of token costs: every colour can be read, and their order is visible without seeing the hue."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from textgen.reporting.heatmap import BORDERS, HeatText, HeatToken, write_heatmap


def luminance(colour: str) -> float:
    """Return the relative luminance of `#rrggbb` (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.fixture
def page(tmp_path: Path) -> str:
    hostile = "<script>alert(1)</script>\"'&\n\x00\u202e"
    tokens = [
        HeatToken(name, -bits * math.log(2), 7, [(hostile, -0.5), ("", -1.0)])
        for name, bits in ((hostile, 0.0), ("b", 0.99), ("c", 1.0), ("d", 5.0), ("e", 13.9), ("", 40.0))
    ]
    write_heatmap(tmp_path / "map.html", [HeatText("Text 1", "1 bit", tokens)])
    return (tmp_path / "map.html").read_text(encoding="utf-8")


def test_texts_are_escaped_and_nothing_is_loaded(page: str) -> None:
    assert "<script" not in page
    assert "\x00" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&amp;↵\n\\x00" in page
    assert not re.search(r"(src|href)=|url\(|@import", page)
    assert "default-src 'none'" in page


def test_a_token_has_the_colour_of_its_bits(page: str) -> None:
    assert re.findall(r'<span class="h(\d)(?: end)?" title', page) == ["0", "0", "1", "3", "6", "7"]
    assert "0.00 bits, rank 7; likeliest: “&lt;script" in page
    assert len(re.findall(r'<span class="h\d">', page)) == len(BORDERS) + 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_readable_and_ordered_by_lightness(page: str, scheme: str) -> None:
    blocks: Sequence[str] = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    values = dict(re.findall(r"--(\w+): (#\w{6})", blocks[scheme == "dark"]))
    levels = [values[f"h{level}"] for level in range(len(BORDERS) + 1)]
    assert all(contrast(values["text"], level) >= 4.5 for level in levels)
    assert contrast(values["soft"], values["page"]) >= 4.5
    lightness = [luminance(level) for level in levels]
    assert lightness == sorted(lightness, reverse=scheme == "light")
    assert all(contrast(one, other) > 1.08 for one, other in pairwise(levels))
