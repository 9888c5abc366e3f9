"""What a processor multiplies fast, by what Linux tells of it."""

from __future__ import annotations

import pytest

from textgen import hardware


@pytest.mark.parametrize(
    ("vendor", "flags", "wanted"),
    [
        ("AuthenticAMD", {"avx512f", "avx512_bf16"}, True),  # Zen 4 and 5
        ("AuthenticAMD", {"avx512f", "avx512_bf16", "avx512_fp16"}, True),
        ("GenuineIntel", {"avx512f", "avx512_bf16"}, True),  # Cooper Lake
        ("GenuineIntel", {"avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16"}, True),  # Sapphire Rapids
        ("GenuineIntel", {"avx512f", "avx512_bf16", "avx512_fp16"}, False),  # the same where AMX is hidden
        ("GenuineIntel", {"avx2"}, False),
        ("", set(), False),
    ],
)
def test_bfloat16_is_taken_where_it_is_faster(
    vendor: str, flags: set[str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "processor_flags", lambda: frozenset(flags))
    monkeypatch.setattr(hardware, "processor_vendor", lambda: vendor)
    assert hardware.has_bfloat16(use_cpu=True) == wanted
