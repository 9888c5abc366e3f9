"""Counter-based random numbers: a hash of coordinates instead of a generator with a state.

The number at (seed, step, lane) is the same on any device, in any batch and on any process, and nothing has to be
saved to continue a stream. The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014), applied once per coordinate.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _as_signed(value: int) -> int:
    """Return the int64 with the same bits as the unsigned 64-bit `value`."""
    return value - (1 << 64) if value >= 1 << 63 else value


_INCREMENT = _as_signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _as_signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _as_signed(0x94D049BB133111EB)
_BLOCK = 1 << 18  # items of a permutation hashed at a time


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Shift int64 right filling with zeros; torch's `>>` copies the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """Return SplitMix64's finaliser of int64 `bits`; multiplication wraps modulo 2^64 on every device."""
    bits = bits + _INCREMENT
    bits = (bits ^ _shift_right(bits, 30)) * _MULTIPLIER_1
    bits = (bits ^ _shift_right(bits, 27)) * _MULTIPLIER_2
    return bits ^ _shift_right(bits, 31)


def hash_bits(seed: int, *coordinates: Tensor | int, device: torch.device | None = None) -> Tensor:
    """Hash the seed and integer coordinates to 64 bits.

    Args:
        seed: any integer from 0 below 2^63.
        coordinates: int64 tensors of shapes that broadcast together, or integers; their order matters.
        device: where the result is made; by default where the first tensor lies.

    Returns:
        int64 of the broadcast shape, all 64 bits random.
    """
    if device is None:
        device = next((c.device for c in coordinates if isinstance(c, Tensor)), torch.device("cpu"))
    bits = _mix(torch.full((), seed, dtype=torch.int64, device=device))
    for coordinate in coordinates:
        bits = _mix(bits ^ torch.as_tensor(coordinate, dtype=torch.int64, device=device))
    return bits


def uniform(seed: int, *coordinates: Tensor | int, device: torch.device | None = None) -> Tensor:
    """Draw float32 strictly between 0 and 1 at the coordinates (see `hash_bits`).

    23 random bits and a half: every value is exact in float32, and neither 0 nor 1 can come out.
    """
    bits = hash_bits(seed, *coordinates, device=device)
    return (_shift_right(bits, 41).to(torch.float32) + 0.5) * 2.0**-23


def permutation(seed: int, epoch: int, count: int) -> Tensor:
    """Return the order of `count` items in an epoch: int64 (count,), a pure function of its arguments.

    Items are sorted by their hash, so that no library's shuffle algorithm is involved. The low bits of each 64-bit hash
    make room for the item's index: the keys are all different, so any sort gives the same order, and they are sorted
    in place. At its peak this holds 8 bytes an item, the result itself, and a block's temporaries.
    """
    index_bits = max(count - 1, 0).bit_length()
    keys = torch.empty(count, dtype=torch.int64)
    for start in range(0, count, _BLOCK):
        items = torch.arange(start, min(start + _BLOCK, count), dtype=torch.int64)
        keys[start : start + _BLOCK] = (hash_bits(seed, epoch, items) >> index_bits << index_bits) | items
    keys.numpy().sort()  # torch's sort makes copies, and indices nobody needs
    return keys.bitwise_and_((1 << index_bits) - 1)
