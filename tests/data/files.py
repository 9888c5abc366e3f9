"""Files of texts: written for a test, read as training reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from textgen.config import DataConfig
from textgen.data.documents import read_files
from textgen.data.tally import Tally
from textgen.errors import TextgenError


def write_jsonl(path: Path, texts: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), newline="")
    return path


def write_parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def read(path: Path, **settings: Any) -> list[str]:
    """Return the documents of a file, those without text too."""
    return list(read_files([str(path)], DataConfig(**settings), Tally()))


def refusal(path: Path, **settings: Any) -> str:
    """Return the message that reading a file is refused with: always one line."""
    with pytest.raises(TextgenError) as caught:
        read(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)
