"""samples.md: the texts that a training sampled at each evaluation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from textgen.files import write_atomic

SAMPLES_NAME = "samples.md"

# A section is a heading, an empty line and its samples; the text of a sample may have any number of lines.
_HEADING = re.compile(r"(?m)^## step (\d{1,18})\n")
_SAMPLE = re.compile(r"(?ms)^- temperature (\S+): \*\*(.*?)\*\*(.*?)(?=^- temperature \S+: \*\*|\Z)")


class SampledText(NamedTuple):
    """A continuation of a prompt, as it was generated."""

    temperature: float
    prompt: str
    text: str


@dataclass(frozen=True)
class SavedSample:
    """A continuation of a prompt, as samples.md has it."""

    step: int
    temperature: str
    prompt: str
    text: str
    """up to the next sample, line breaks included"""


def save_samples(run_dir: Path, step: int, samples: Sequence[SampledText]) -> None:
    """Write the section of a step; sections of this step and later ones are replaced, earlier ones are kept.

    Raises:
        OSError: the file cannot be read or written; the old one is whole.
    """
    earlier = "".join(f"## step {number}\n{text}" for number, text in _read_sections(run_dir) if number < step)
    lines = [f"## step {step}\n", *(f"- temperature {t}: **{prompt}**{text}" for t, prompt, text in samples)]
    write_atomic(run_dir / SAMPLES_NAME, earlier + "\n".join(lines) + "\n\n")


def read_samples(run_dir: Path) -> list[SavedSample]:
    """Return all samples in the file's order; none if there is no file. Bytes that are not UTF-8 become U+FFFD."""
    return [
        SavedSample(step, *found) for step, section in _read_sections(run_dir) for found in _SAMPLE.findall(section)
    ]


def _read_sections(run_dir: Path) -> list[tuple[int, str]]:
    """Return step and text of each section."""
    path = run_dir / SAMPLES_NAME
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    _, *parts = _HEADING.split(text)
    return [(int(step), section) for step, section in zip(parts[::2], parts[1::2], strict=True)]
