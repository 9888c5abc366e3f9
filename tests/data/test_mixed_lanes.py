"""Lanes of several sources: their shares, their passes, and an order that is a function of seed and step."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
import torch

from textgen.data.lanes import LaneSampler, build_loader, keeps_label
from textgen.data.mixed_lanes import Mixture, _Passes, _SharedLane, build_mixed_loader
from textgen.data.split import Split
from textgen.errors import TextgenError
from textgen.noise import permutation

SOURCE = 1 << 24  # tokens of source i are i * SOURCE + their place in its split, plus 2
SEED = 7


def split_of(source: int, lengths: list[int], labels: list[int] | None = None) -> Split:
    """Return a split in which every token can be told from any other; a document ends with a token like all others."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(offsets[-1], dtype=np.uint32) + np.uint32(source * SOURCE)
    begin_ids = None if labels is None else np.array(labels, dtype=np.uint32)
    return Split(tokens, offsets, np.ones(len(lengths), dtype=np.uint32), begin_ids)


def random_lengths(count: int, *, longest: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(2, longest) for _ in range(count)]


def mixture_of(
    weights: dict[str, float], lengths: list[list[int]], *, batch_size: int, seq_len: int
) -> tuple[Mixture, dict[str, Split]]:
    splits = {name: split_of(i, its) for i, (name, its) in enumerate(zip(weights, lengths, strict=True))}
    return Mixture(splits, weights, batch_size=batch_size, seq_len=seq_len), splits


def read(mixture: Mixture, steps: range, *, micro_batches: int = 1, seed: int = SEED) -> list[dict[str, torch.Tensor]]:
    sampler = LaneSampler(batch_size=mixture.batch_size, micro_batches=micro_batches, steps=steps)
    return list(build_mixed_loader(mixture, sampler, seed=seed))


MIXTURES: list[tuple[dict[str, float], int, int]] = [
    ({"a": 0.7, "b": 0.3}, 128, 16),
    ({"a": 0.5, "b": 0.5}, 8, 16),
    ({"a": 3, "b": 2, "c": 1.5}, 8, 32),
    ({"a": 0.9, "b": 0.097, "c": 0.003}, 32, 16),
    ({"a": 0.001, "b": 0.999}, 32, 16),
    ({"a": 1, "b": 1, "c": 1}, 2, 16),
    ({"a": 1, "b": 1}, 1, 16),
]


@pytest.mark.parametrize(("weights", "batch_size", "seq_len"), MIXTURES)
def test_shares_of_the_tokens_are_the_weights(weights: dict[str, float], batch_size: int, seq_len: int) -> None:
    """Within one percentage point over 1,000 steps, also if the documents of a source are much longer."""
    lengths = [random_lengths(900 // (i + 1), longest=40 * (1 + 4 * i), seed=i) for i in range(len(weights))]
    mixture, _ = mixture_of(weights, lengths, batch_size=batch_size, seq_len=seq_len)
    drawn = sum(torch.bincount(b["tokens"].flatten() // SOURCE, minlength=8) for b in read(mixture, range(1000)))
    for i, (name, weight) in enumerate(weights.items()):
        share = weight / sum(weights.values())
        assert mixture.shares[name] == pytest.approx(share)
        assert abs(int(drawn[i]) / int(drawn.sum()) - share) < 0.01, name
        if weight < 0.01:  # a share of a lane is held by documents, far closer than a lane
            assert int(drawn[i]) / int(drawn.sum()) == pytest.approx(share, rel=0.1)


def test_equal_decimals_make_whole_lanes() -> None:
    for weights, lanes in (({"a": 0.7, "b": 0.3}, [7, 3]), ({"a": 0.1, "b": 0.1, "c": 0.8}, [1, 1, 8])):
        mixture, _ = mixture_of(weights, [[1000]] * len(weights), batch_size=10, seq_len=8)
        assert [source.lanes for source in mixture.sources] == lanes
        assert mixture.num_shared == 0


@pytest.mark.parametrize(("weights", "batch_size", "seq_len"), MIXTURES)
def test_a_pass_reads_no_token_twice_and_nearly_all(weights: dict[str, float], batch_size: int, seq_len: int) -> None:
    """Own lanes and shared ones divide a pass of each source between them, and sources pass at their own pace."""
    lengths = [random_lengths(500 // (i + 1), longest=90, seed=i) for i in range(len(weights))]
    mixture, splits = mixture_of(weights, lengths, batch_size=batch_size, seq_len=seq_len)
    batches = read(mixture, range(400))
    for i, source in enumerate(mixture.sources):
        split = splits[source.name]
        order = permutation(SEED, 0, split.num_documents).tolist()
        stream = np.concatenate([split.document(d) for d in order]).astype(np.int64)
        own = int((split.num_tokens - 1) // source.width) * source.lanes
        # of the first pass: targets of the lanes of its own, and all that shared lanes read before they come again
        of_lanes = [b["targets"][source.first : source.first + source.lanes] for b in batches]
        first = torch.cat([t.flatten() for t in of_lanes[: mixture.windows_per_pass(source)]]) if source.lanes else []
        shared = torch.stack([b["tokens"][mixture.first_shared :] for b in batches], 1).flatten(1)
        of_shared = [[t for t in lane.tolist() if t // SOURCE == i] for lane in shared]
        for place, lane in enumerate(of_shared if source.part else []):
            left = len(stream) - own
            wanted = stream[own + left * place // mixture.num_shared : own + left * (place + 1) // mixture.num_shared]
            assert lane[: len(wanted)] == wanted[: len(lane)].tolist()
        if source.lanes:
            counts = Counter(torch.as_tensor(first).tolist())
            assert set(counts.values()) == {1}
            assert counts.keys() <= set(stream[1 : own + 1].tolist())
            assert len(counts) > own - source.lanes * seq_len


def test_sources_take_turns_by_whole_documents_in_a_shared_lane() -> None:
    mixture, splits = mixture_of(
        {"a": 1, "b": 2}, [random_lengths(300, longest=30), random_lengths(300, longest=90)], batch_size=1, seq_len=8
    )
    tokens = torch.cat([b["tokens"].flatten() for b in read(mixture, range(300))]).tolist()
    starts = {int(its.tokens[o]) for its in splits.values() for o in its.offsets[:-1]}
    turns = [(b, a) for a, b in pairwise(tokens) if b != a + 1]
    assert len(turns) > 20
    assert all(later in starts for later, _ in turns)
    ends = {int(its.tokens[o - 1]) for its in splits.values() for o in its.offsets[1:]}
    assert all(earlier in ends for _, earlier in turns)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("first", [1, 37, 90])
def test_the_order_is_a_function_of_the_step(micro_batches: int, first: int) -> None:
    """Read from any step on, in any micro-batches, back again too: the same windows."""
    lengths = [random_lengths(40, longest=50), random_lengths(90, longest=20, seed=1), random_lengths(9, longest=30)]
    mixture, _ = mixture_of({"a": 0.55, "b": 0.35, "c": 0.1}, lengths, batch_size=8, seq_len=4)
    assert mixture.num_shared == 2
    whole = read(mixture, range(120))
    assert len({tuple(b["windows"].tolist()) for b in whole}) == 120  # passes go on independently
    part = read(mixture, range(first, 120), micro_batches=micro_batches)
    for step, batch in enumerate(whole[first:]):
        cut = part[step * micro_batches : (step + 1) * micro_batches]
        for name in batch:
            assert torch.equal(torch.cat([b[name] for b in cut]), batch[name]), (step, name)
    others = read(mixture, range(120), seed=SEED + 1)
    assert not all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(whole, others, strict=True))

    sampler = LaneSampler(batch_size=8, micro_batches=1, steps=range(50, 60))
    loader = build_mixed_loader(mixture, sampler, seed=SEED)
    ahead = list(loader)
    sampler.steps = range(10, 60)  # timed steps are read again
    again = list(loader)
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(again, whole[10:60], strict=True))
    assert torch.equal(ahead[-1]["tokens"], again[-1]["tokens"])


@pytest.mark.parametrize("longest", [3, 30, 400])
@pytest.mark.parametrize("weights", [{"a": 1, "b": 1}, {"a": 0.37, "b": 1, "c": 0.1}, {"a": 1, "b": 0.001, "c": 2.2}])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_turns_from_any_place_are_those_from_the_start(
    weights: dict[str, float], longest: int, batch_size: int
) -> None:
    """And few turns before the place are taken, however far it is."""
    lengths = [[*random_lengths(200 // (1 + 9 * i), longest=longest, seed=i), 300] for i in range(len(weights))]
    mixture, _ = mixture_of(weights, lengths, batch_size=batch_size, seq_len=4)
    draw = random.Random(longest)
    for place in range(mixture.num_shared):
        passes = {source.name: _Passes(source, seq_len=4, seed=SEED) for source in mixture.sources}
        lane = _SharedLane(mixture, place, passes, seed=SEED)
        turns = list(islice(lane.turns(), 3000))
        assert max(turn.number for turn in turns) >= 3
        for i in (0, 1, *draw.sample(range(2950), 60)):
            start = draw.randrange(turns[i].position, turns[i].after)
            again = list(islice(lane.turns(start), 20))
            first = turns.index(again[0])
            assert again == turns[first : first + 20]
            assert start - len(weights) * 2 * 400 < again[0].position <= start


@pytest.mark.parametrize("labels", [None, [10 * SOURCE + i for i in range(9)]])
def test_a_step_back_inside_one_long_document_reads_the_same(labels: list[int] | None) -> None:
    """Timed steps are read again from the first one: here before a document ends that the last of them read."""
    splits = {name: split_of(i, [200] * 9, labels) for i, name in enumerate("ab")}
    mixture = Mixture(splits, {"a": 1, "b": 1}, batch_size=1, seq_len=16)
    whole = read(mixture, range(40))
    sampler = LaneSampler(batch_size=1, micro_batches=1, steps=range(40))
    loader = build_mixed_loader(mixture, sampler, seed=SEED)
    for timed in range(1, 40):
        sampler.steps = range(timed)
        list(loader)
        sampler.steps = range(40)
        for wanted, batch in zip(whole, loader, strict=True):
            assert all(torch.equal(batch[name], wanted[name]) for name in wanted), timed


def test_targets_follow_inputs_and_windows_follow_each_other() -> None:
    mixture, _ = mixture_of(
        {"a": 2.5, "b": 1.5}, [random_lengths(60, longest=40), random_lengths(30, longest=70)], batch_size=4, seq_len=6
    )
    batches = read(mixture, range(150))
    for step, (batch, after) in enumerate(pairwise(batches), start=1):
        assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
        goes_on = ~torch.from_numpy(mixture.begun(step))
        assert torch.equal(batch["targets"][goes_on, -1], after["tokens"][goes_on, 0])
        assert torch.equal(after["windows"] == 0, ~goes_on)
    assert mixture.begun(0).all()
    assert not mixture.begun(1).any()
    assert mixture.passes(150)["b"] == 150 / mixture.windows_per_pass(mixture.sources[1])


def test_one_source_in_a_list_is_read_as_if_it_were_alone() -> None:
    split = split_of(0, random_lengths(60, longest=40))
    mixture = Mixture({"a": split}, {"a": 0.3}, batch_size=4, seq_len=6)
    sampler = LaneSampler(batch_size=4, micro_batches=1, steps=range(100))
    for ours, theirs in zip(read(mixture, range(100)), build_loader(split, sampler, seq_len=6, seed=SEED), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_labels_are_inputs_in_shared_lanes_too() -> None:
    lengths = [5, 9, 4, 7, 12, 3] * 20
    split = split_of(0, lengths, labels=[10 * SOURCE + i for i in range(len(lengths))])
    plain, labelled = (
        torch.cat([b["tokens"].flatten() for b in read(mixture, range(60))])
        for mixture in (
            Mixture({"a": its, "b": split_of(1, lengths)}, {"a": 1, "b": 1}, batch_size=1, seq_len=8)
            for its in (split_of(0, lengths), split)
        )
    )
    starts = {int(split.tokens[offset]): i for i, offset in enumerate(split.offsets[:-1].tolist())}
    replaced = 0
    for place in range(len(plain) - 1):
        document = starts.get(int(plain[place + 1]))
        kept = document is not None and bool(keeps_label(SEED, 0, torch.tensor(document)))
        if kept and place < len(split.tokens):  # in the first pass
            assert labelled[place] == 10 * SOURCE + document  # type: ignore[operator]
            replaced += 1
        elif document is None:
            assert labelled[place] == plain[place]
    assert replaced > 15


def test_a_source_of_one_document_shares_lanes() -> None:
    mixture, _ = mixture_of({"a": 2.5, "b": 0.5}, [[5000], [300]], batch_size=3, seq_len=8)
    drawn = sum(torch.bincount(b["tokens"].flatten() // SOURCE, minlength=2) for b in read(mixture, range(1000)))
    assert int(drawn[1]) / int(drawn.sum()) == pytest.approx(0.5 / 3, abs=0.01)  # type: ignore[index, union-attr]


def test_a_tiny_part_of_a_lane_is_read_from_a_tiny_end_of_the_stream() -> None:
    mixture, _ = mixture_of({"a": 2.0001, "b": 0.9999}, [[10_000], [400] * 9], batch_size=3, seq_len=8)
    assert mixture.num_shared == 1
    assert len(read(mixture, range(500))) == 500


def test_a_source_with_too_few_tokens_is_refused_by_name() -> None:
    with pytest.raises(TextgenError) as refused:
        mixture_of({"a": 1, "small": 1}, [[1000], [20, 11]], batch_size=8, seq_len=8)
    assert str(refused.value) == (
        "source `small`: 31 tokens are too few for weight 1, which is 4 of 8 lanes x seq_len 8: 33 would do"
    )
    mixture_of({"a": 1, "small": 1}, [[1000], [20, 13]], batch_size=8, seq_len=8)
