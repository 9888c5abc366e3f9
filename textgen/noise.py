"""Counter-based random numbers: a hash of coordinates instead of a generator with a state.

The number at (seed, step, lane) is the same on any device, in any batch and on any process, and a stream continues
without a saved state (docs/decisions/0003). The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014), applied once per coordinate.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def _as_signed(value: int) -> int:
    """Return the int64 with the same bits as the unsigned 64-bit `value`."""
    return value - (1 << 64) if value >= 1 << 63 else value


_INCREMENT = _as_signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _as_signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _as_signed(0x94D049BB133111EB)
_BLOCK = 1 << 18  # items of a permutation that are hashed at a time


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Shift int64 right and fill with zeros; torch's `>>` copies the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """Return SplitMix64's finaliser of int64 `bits`; multiplication wraps modulo 2^64 on every device."""
    bits = bits + _INCREMENT
    bits = (bits ^ _shift_right(bits, 30)) * _MULTIPLIER_1
    bits = (bits ^ _shift_right(bits, 27)) * _MULTIPLIER_2
    return bits ^ _shift_right(bits, 31)


def hash_bits(seed: int | Tensor, *coordinates: Tensor | int, device: torch.device | None = None) -> Tensor:
    """Hash the seed and integer coordinates to 64 bits.

    Args:
        seed: any integer from 0 below 2^63, or an int64 tensor of them.
        coordinates: int64 tensors of shapes that broadcast together, or integers; their order matters.
        device: the result's device; None: that of the first tensor, or the CPU.

    Returns:
        int64 of the broadcast shape, all 64 bits random.
    """
    if device is None:
        tensors = (c.device for c in (*coordinates, seed) if isinstance(c, Tensor))
        device = next(tensors, torch.device("cpu"))
    bits = _mix(seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=device))
    for coordinate in coordinates:
        if isinstance(coordinate, Tensor):
            coordinate = coordinate.to(device, torch.int64)
        bits = _mix(bits ^ coordinate)  # an integer is an argument of the kernel: no copy to the GPU
    return bits


def uniform(seed: int | Tensor, *coordinates: Tensor | int, device: torch.device | None = None) -> Tensor:
    """Draw float32 strictly between 0 and 1 at the coordinates (see `hash_bits`).

    A value is 23 random bits plus a half, divided by 2^23: exact in float32, and never 0 or 1.
    """
    bits = hash_bits(seed, *coordinates, device=device)
    return (_shift_right(bits, 41).to(torch.float32) + 0.5) * 2.0**-23


@functools.cache  # never freed: a CUDA graph keeps the address
def item_bits(count: int, device: torch.device) -> Tensor:
    """Return a 32-bit hash of each number below `count`, int32 (count,); the first 128,000 are all different."""
    return hash_bits(0, torch.arange(count, device=device)).to(torch.int32)


def exponential(keys: Tensor, count: int) -> Tensor:
    """Draw float32 from the exponential distribution, `count` for each key, by two rounds of 32-bit mixing.

    The value at (key, i) depends on nothing else. The bits of both are hashes already (`hash_bits`), so that two
    multiplications between shifts are enough; the multipliers are those of Wellons' "lowbias32" (2018). The value is
    -log(1 - u) for a u of 31 bits: the smallest value is 2^-32, the largest 16.6.

    Args:
        keys: (rows,) int64, as `hash_bits` returns them.
        count: values per key, at most 128,000.

    Returns:
        (rows, count), all above 0.
    """
    bits = keys.to(torch.int32)[:, None] ^ item_bits(count, keys.device)  # (rows, count)
    bits = bits.mul_(0x7FEB352D)
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)  # an unsigned shift
    bits = bits.mul_(-0x7B935975)  # 0x846ca68b as a signed integer
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    minus_u = bits.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(-(2.0**-31))  # u rounds to 1 near the end
    return minus_u.clamp_(min=2.0**-24 - 1).log1p_().neg_()


def permutation(seed: int, epoch: int, count: int, *, shard: int | None = None) -> Tensor:
    """Return the order of `count` items in an epoch, or in a shard of it: int64 (count,), a function of its arguments.

    Items are sorted by their hash, so that the order does not depend on a library's shuffle algorithm. The item's index
    replaces the low bits of its 64-bit hash. So all keys are different, any sort gives the same order, and keys are
    sorted in place. Peak memory is 8 bytes per item, which is the result, and a block's temporaries.
    """
    coordinates = () if shard is None else (shard,)
    index_bits = max(count - 1, 0).bit_length()
    keys = torch.empty(count, dtype=torch.int64)
    for start in range(0, count, _BLOCK):
        items = torch.arange(start, min(start + _BLOCK, count), dtype=torch.int64)
        bits = hash_bits(seed, epoch, *coordinates, items)
        keys[start : start + _BLOCK] = (bits >> index_bits << index_bits) | items
    keys.numpy().sort()  # torch's sort makes a copy, and indices that are not needed
    return keys.bitwise_and_((1 << index_bits) - 1)
