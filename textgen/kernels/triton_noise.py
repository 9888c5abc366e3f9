"""The hash of `noise` in Triton, for the kernels of training and of decoding.

Import this module only where Triton is installed.
"""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401 - the interpreter looks for it in the module of each kernel


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def mix(bits):  # type: ignore[no-untyped-def]
    """Return `noise._mix`; bits are uint64."""
    bits += 0x9E3779B97F4A7C15
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)
