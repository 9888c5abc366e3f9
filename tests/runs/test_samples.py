"""samples.md is written by one function and read by another."""

from __future__ import annotations

from pathlib import Path

from textgen.runs.samples import SAMPLES_NAME, SampledText, SavedSample, read_samples, save_samples

TEXT = " it\nin *two* lines: ü"


def test_samples_are_read_as_they_were_saved(tmp_path: Path) -> None:
    assert read_samples(tmp_path) == []
    save_samples(tmp_path, 4, [SampledText(0.8, "i love", TEXT), SampledText(1.0, "", " you")])
    assert (tmp_path / SAMPLES_NAME).read_text(encoding="utf-8") == (
        f"## step 4\n\n- temperature 0.8: **i love**{TEXT}\n- temperature 1.0: **** you\n\n"
    )
    assert read_samples(tmp_path) == [
        SavedSample(4, "0.8", "i love", f"{TEXT}\n"), SavedSample(4, "1.0", "", " you\n\n")
    ]  # fmt: skip


def test_samples_of_this_step_and_later_ones_are_replaced(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save_samples(tmp_path, step, [SampledText(0.8, "i love", f" {step}")])
    save_samples(tmp_path, 4, [SampledText(0.8, "i love", " four")])
    assert [(sample.step, sample.text.strip()) for sample in read_samples(tmp_path)] == [(2, "2"), (4, "four")]


def test_a_byte_that_is_not_utf8_costs_its_sample_one_character(tmp_path: Path) -> None:
    (tmp_path / SAMPLES_NAME).write_bytes(b"## step 2\n\n- temperature 0.8: **a\xff** b\n\n")
    (sample,) = read_samples(tmp_path)
    assert sample.prompt == "a\ufffd"
