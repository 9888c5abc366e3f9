"""metrics.jsonl is read by three functions, which differ in what they do with a damaged line."""

from __future__ import annotations

from pathlib import Path

import pytest

from textgen.runs.metrics_file import METRICS_NAME, read_metrics, read_metrics_lenient, read_metrics_strict

FIRST, LAST = {"step": 1, "tokens": 10}, {"step": 2, "tokens": 20}

DAMAGED = [b'{"step": 2, "tok', b"\xff\xfe", b"[" * 100_000, b"[1]", b"3"]


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: repr(line[:8]))
def test_a_damaged_line_ends_is_refused_or_is_left_out(tmp_path: Path, line: bytes) -> None:
    (tmp_path / METRICS_NAME).write_bytes(b'{"step": 1, "tokens": 10}\n' + line + b'\n{"step": 2, "tokens": 20}\n')
    assert read_metrics(tmp_path) == [FIRST]
    with pytest.raises(ValueError, match=r"metrics.jsonl` line 2 is no"):
        read_metrics_strict(tmp_path)
    assert read_metrics_lenient(tmp_path) == ([FIRST, LAST], 1)


def test_a_last_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / METRICS_NAME).write_text('{"step": 1, "tokens": 10}\n{"step": 2, "tok')
    assert read_metrics(tmp_path) == read_metrics_strict(tmp_path) == [FIRST]
    assert read_metrics_lenient(tmp_path) == ([FIRST], 1)


def test_only_the_reports_readers_have_all_numbers_as_floats(tmp_path: Path) -> None:
    """Rows are written again when a training goes on: a step stays `1`."""
    (tmp_path / METRICS_NAME).write_text('{"step": 1}\n')
    assert repr(read_metrics(tmp_path)) == "[{'step': 1}]"
    assert repr(read_metrics_strict(tmp_path)) == "[{'step': 1.0}]"
    assert repr(read_metrics_lenient(tmp_path)) == "([{'step': 1.0}], 0)"
    (tmp_path / METRICS_NAME).write_text(f'{{"step": 1, "valid/loss": {"9" * 5000}}}\n')
    assert read_metrics_strict(tmp_path) == [{"step": 1, "valid/loss": float("inf")}]


def test_a_run_without_metrics_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == read_metrics_strict(tmp_path) == []
    assert read_metrics_lenient(tmp_path) == ([], 0)
