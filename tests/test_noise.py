"""Counter-based noise against an independent implementation in Python's big integers."""

from __future__ import annotations

import math

import pytest
import torch

from textgen.noise import hash_bits, permutation, uniform

MASK = (1 << 64) - 1


def splitmix64(bits: int) -> int:
    """Return SplitMix64's output for a state, as its paper writes it, in integers without bounds."""
    bits = (bits + 0x9E3779B97F4A7C15) & MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
    return bits ^ (bits >> 31)


def hash_exactly(seed: int, *coordinates: int) -> int:
    bits = splitmix64(seed)
    for coordinate in coordinates:
        bits = splitmix64(bits ^ (coordinate & MASK))
    return bits


def chi_square(counts: torch.Tensor) -> float:
    """Return how many standard deviations the chi-square statistic of equally likely cells is off its mean."""
    expected = counts.sum() / counts.numel()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.numel() - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_the_reference_is_splitmix64() -> None:
    # first outputs of the generator with seed 1234567, as published with its C source (Vigna) and in Rosetta Code
    state = 1234567
    seen = []
    for _ in range(3):
        seen.append(splitmix64(state))
        state = (state + 0x9E3779B97F4A7C15) & MASK
    assert seen == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize(
    "coordinates",
    [(0,), (42,), ((1 << 63) - 1,), (42, 0), (42, 7, 123456789), (1, -1), (3, 1 << 40, -(1 << 63), 5)],
)
def test_hash_equals_big_integer_arithmetic(coordinates: tuple[int, ...]) -> None:
    assert int(hash_bits(*coordinates)) & MASK == hash_exactly(*coordinates)


def test_pinned_values_never_change() -> None:
    # a change of these changes every mask, order and sample of runs that exist
    assert [int(bits) & MASK for bits in hash_bits(42, torch.arange(3))] == [
        0x57E1FABA65107204,
        0xF34FE9248C9342E5,
        0x725395388690AE46,
    ]
    assert uniform(42, torch.arange(3)).tolist() == [0.3432919383049011, 0.9504380822181702, 0.44658786058425903]
    assert permutation(42, 0, 10).tolist() == [9, 7, 6, 1, 2, 4, 3, 5, 8, 0]
    assert permutation(42, 1, 10).tolist() == [0, 3, 4, 6, 5, 2, 8, 7, 1, 9]


def test_uniform_is_the_top_23_bits_and_a_half_exactly() -> None:
    drawn = uniform(5, torch.arange(2000)).tolist()
    assert drawn == [((hash_exactly(5, i) >> 41) + 0.5) / 2**23 for i in range(2000)]


def test_extreme_hashes_stay_strictly_inside_the_unit_interval() -> None:
    # the two ends of what 23 bits can say, in the dtype and the order of operations of `uniform`
    ends = (torch.tensor([0, (1 << 23) - 1]).to(torch.float32) + 0.5) * 2.0**-23
    assert ends.tolist() == [2**-24, 1 - 2**-24]
    drawn = uniform(0, torch.arange(3_000_000))
    assert 0 < float(drawn.min()) < 1e-5
    assert 1 - 1e-5 < float(drawn.max()) < 1
    assert drawn.dtype == torch.float32


@pytest.mark.parametrize("place", [0, 1, 2])
def test_uniform_fills_its_bins_evenly_along_any_coordinate(place: int) -> None:
    coordinates: list[torch.Tensor | int] = [3, 3, 3]
    coordinates[place] = torch.arange(200_000)
    counts = torch.bincount((uniform(1, *coordinates) * 256).long(), minlength=256)
    assert abs(chi_square(counts.double())) < 4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 0, 0), (1, 0, 1)),  # neighbours in the last coordinate
        ((1, 0, 0), (1, 1, 0)),
        ((1, 0, 0), (2, 0, 0)),  # neighbouring seeds
        ((1, 0, 1), (1, 1, 0)),  # coordinates exchanged
        ((1, 1, 0), (0, 1, 1)),  # seed and coordinate exchanged
    ],
)
def test_streams_of_other_coordinates_are_independent(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    items = torch.arange(200_000)
    a, b = ((uniform(seed, *rest, items) * 16).long() for seed, *rest in (one, other))
    assert abs(chi_square(torch.bincount(a * 16 + b, minlength=256).double())) < 4


def test_a_broadcast_draw_equals_one_by_one() -> None:
    lanes, units = torch.arange(5)[:, None], torch.arange(7)
    block = uniform(9, 3, lanes, 2, units)
    assert block.shape == (5, 7)
    for lane in range(5):
        for unit in range(7):
            assert float(block[lane, unit]) == float(uniform(9, 3, lane, 2, unit))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000, (1 << 18) + 1])  # the last one: more than one block
def test_permutation_is_a_permutation(count: int) -> None:
    order = permutation(7, 2, count)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(count))


def test_permutation_sorts_items_by_their_hash() -> None:
    def signed(bits: int) -> int:
        return bits - (1 << 64) if bits >> 63 else bits

    assert permutation(7, 2, 500).tolist() == sorted(range(500), key=lambda item: signed(hash_exactly(7, 2, item)))


def test_permutation_is_a_pure_function_of_seed_and_epoch() -> None:
    first = permutation(7, 2, 1000)
    torch.manual_seed(0)
    assert torch.equal(first, permutation(7, 2, 1000))
    for seed, epoch in ((7, 3), (8, 2), (2, 7)):
        assert int((first == permutation(seed, epoch, 1000)).sum()) < 20  # by chance 1 stays in place


def test_every_item_comes_everywhere() -> None:
    places = torch.stack([permutation(1, epoch, 8) for epoch in range(4000)])  # (epochs, place)
    for place in range(8):
        assert abs(chi_square(torch.bincount(places[:, place], minlength=8).double())) < 4
