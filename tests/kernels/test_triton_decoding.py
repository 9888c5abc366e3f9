"""Triton's kernels of a decoding step against torch's operators, on values that are hard on them.

On a GPU they run there, elsewhere in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from textgen.config import ModelConfig
from textgen.decoding import pieces
from textgen.kernels import fused_decoding as plain
from textgen.kernels.fused_decoding import Rows, Weights
from textgen.noise import hash_bits

# the interpreter's numpy warns where a GPU divides without a word
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in divide:RuntimeWarning")

EOS, UNK = 2, 0


@pytest.fixture
def fused(triton_device: str) -> ModuleType:
    """Return the module of the kernels; tensors are made where they run."""
    from textgen.kernels import triton_decoding

    torch.manual_seed(0)
    return triton_decoding


@pytest.fixture(autouse=True)
def on_device(triton_device: str):  # type: ignore[no-untyped-def]
    with torch.device(triton_device):
        yield


def random_norm(size: int) -> torch.nn.LayerNorm:
    norm = torch.nn.LayerNorm(size)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm


def random_matrix(outputs: int, size: int) -> Tensor:
    return torch.randn(outputs, size) * size**-0.5


def assert_close(mine: Tensor, wanted: Tensor) -> None:
    """Sums of the same products in another order: a few units of the last place of the largest term."""
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


# one row, rows of each tile, sizes that fill no tile and no block
SHAPES = [(1, 40), (3, 64), (16, 130), (17, 72), (65, 24), (512, 8)]


@pytest.mark.parametrize(("rows", "size", "int8"), [*((*shape, False) for shape in SHAPES), (3, 64, True)])
def test_first_layer_is_that_of_operators(fused: ModuleType, rows: int, size: int, int8: bool) -> None:
    weights = Weights.of([random_matrix(4 * size, size)], torch.randn(50, 4 * size).bfloat16(), int8=int8)
    hidden, cell, tokens = torch.randn(rows, size), torch.randn(rows, size), torch.randint(50, (rows,))
    cell[0, 0], hidden[-1, -1] = 200.0, -1.0
    arguments = (None, hidden, cell, weights, tokens)
    for mine, wanted in zip(fused.layer(*arguments, residual=False), plain.layer(*arguments, residual=False)):  # noqa: B905
        assert_close(mine, wanted)


@pytest.mark.parametrize(
    ("norm", "residual", "int8"),
    [(False, False, False), (True, False, False), (True, True, False), (False, True, True)],
)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_later_layer_is_that_of_operators(
    fused: ModuleType, rows: int, size: int, norm: bool, residual: bool, int8: bool
) -> None:
    parts = [random_matrix(4 * size, size), random_matrix(4 * size, size)]
    weights = Weights.of(parts, torch.randn(4 * size), norm=random_norm(size) if norm else None, int8=int8)
    x, hidden, cell = torch.randn(3, rows, size).unbind()
    x[-1] = 1.0  # a row without variance
    before = [part.clone() for part in (x, hidden, cell)]
    arguments = (x, hidden, cell, weights, None)
    mine, wanted = fused.layer(*arguments, residual=residual), plain.layer(*arguments, residual=residual)
    for part, other in zip(mine, wanted, strict=True):
        assert_close(part, other)
    assert all(torch.equal(part, old) for part, old in zip((x, hidden, cell), before, strict=True))


@pytest.mark.parametrize(("rows", "size"), [(1, 40), (17, 72), (65, 32), (70, 96)])
def test_a_layer_reads_no_further_than_its_rows(fused: ModuleType, rows: int, size: int) -> None:
    weights = Weights.of([random_matrix(4 * size, size), random_matrix(4 * size, size)], torch.randn(4 * size))
    x, hidden, cell = torch.full((3, rows + 4, size), math.nan)[:, :rows].normal_().unbind()
    arguments = (x, hidden, cell, weights, None)
    mine, wanted = fused.layer(*arguments, residual=False), plain.layer(*arguments, residual=False)
    for part, other in zip(mine, wanted, strict=True):
        assert_close(part, other)


@pytest.mark.parametrize(("norm", "int8"), [(False, True), (True, False)])
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_projection_is_that_of_operators(fused: ModuleType, rows: int, size: int, norm: bool, int8: bool) -> None:
    weights = Weights.of(
        [random_matrix(33, size)], torch.randn(33), norm=random_norm(size) if norm else None, int8=int8
    )
    x = torch.randn(rows, size)
    assert_close(fused.linear(x, weights), plain.linear(x, weights))


@pytest.mark.parametrize("rows", [2, 20, 70])
def test_a_row_has_the_same_bits_in_every_place_of_a_tile(fused: ModuleType, rows: int) -> None:
    parts = [random_matrix(128, 32), random_matrix(128, 32)]
    weights = Weights.of(parts, torch.randn(128), norm=random_norm(32))
    x, hidden, cell = (part.expand(rows, 32).contiguous() for part in torch.randn(3, 32).unbind())
    for part in fused.layer(x, hidden, cell, weights, None, residual=True):
        assert torch.equal(part, part[:1].expand(rows, 32))


# --- the draw --------------------------------------------------------------------------------------------------------


def rows_of(rows: int, size: int, *, everything: bool = False, seed: int = 0) -> Rows:
    """Return settings of rows: temperatures 0, 0.5, 1 and 1e-30 in turn, or every setting that kernels know."""
    key = hash_bits(seed, torch.arange(rows), device=torch.get_default_device())
    settings = Rows(
        vocab_size=size,
        key=key,
        step=torch.arange(rows),
        temperature=torch.tensor([0.0, 0.5, 1.0, 1e-30]).repeat(rows // 4 + 1)[:rows, None],
    )
    if not everything:
        return settings
    token = torch.arange(size).expand(rows, size)
    return dataclasses.replace(
        settings,
        bias=torch.randn(rows, size) * (token % 2),
        seen=token % 3 == 0,
        repetition_penalty=torch.full((rows, 1), 1.3),
        counts=(token % 5).int(),
        presence_penalty=torch.full((rows, 1), 0.3),
        frequency_penalty=torch.full((rows, 1), -0.2),
        banned=token % 7 == 0,
        min_new_tokens=torch.full((rows, 1), rows // 2),
        history=torch.arange(rows * 1024).view(rows, 1024),
        unlabelled=torch.zeros(rows, dtype=torch.int64),
    )


def copy(settings: Rows) -> Rows:
    values = vars(settings).items()
    return Rows(**{name: value.clone() if isinstance(value, Tensor) else value for name, value in values})


def hostile_logits(rows: int, size: int, kind: str) -> Tensor:
    logits = torch.randn(rows, size) * 2
    if kind == "ties":
        logits = torch.zeros(rows, size)
    elif kind == "equal pairs":
        logits = logits.round()
    elif kind == "huge":
        logits *= 1e30
    elif kind == "half banned":
        logits[:, ::2] = -math.inf
    elif kind == "one left":
        logits.fill_(-math.inf)[:, size // 2] = 1.0
    elif kind == "none left":
        logits.fill_(-math.inf)
    return logits


KINDS = ["random", "ties", "equal pairs", "huge", "half banned", "one left", "none left"]


def drawn_by(module: ModuleType, logits: Tensor, settings: Rows, *, last: ModuleType | None = None) -> Tensor:
    """Return what `pick` of a module, and `draw` of the last one, draw from logits."""
    out = torch.full((len(logits),), -1)
    picks = module.pick(logits, settings)
    (last or module).draw(picks, copy(settings), eos_id=EOS, ended=None, out=out)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "size"), [(1, 63), (4, 1025)])
def test_draw_from_given_logits_is_that_of_operators(fused: ModuleType, rows: int, size: int, kind: str) -> None:
    logits, settings = hostile_logits(rows, size, kind), rows_of(rows, size)
    for changed in (settings, dataclasses.replace(settings, key=None), dataclasses.replace(settings, temperature=None)):
        assert torch.equal(drawn_by(fused, logits, changed), drawn_by(plain, logits, changed))


def test_512_rows_are_picked_as_by_operators(fused: ModuleType) -> None:
    logits, settings = hostile_logits(512, 9, "equal pairs"), rows_of(512, 9)
    assert torch.equal(drawn_by(fused, logits, settings, last=plain), drawn_by(plain, logits, settings))


@pytest.mark.parametrize(
    ("rows", "size", "everything", "kind"),
    [
        *((5, 130, everything, kind) for everything in (False, True) for kind in KINDS),
        (1, 70, True, "ties"),
        (20, 70, True, "random"),
        (512, 9, False, "equal pairs"),
    ],
)
def test_output_layer_draws_as_operators_do(
    fused: ModuleType, rows: int, size: int, everything: bool, kind: str
) -> None:
    """With what a step records: log-probabilities, ended rows, counts, history."""
    # no weight but the bias, so that both draw from the same logits bit for bit
    logits = hostile_logits(1, size, kind)[0]
    weights = Weights.of([torch.zeros(size, 8)], logits)
    x, settings = torch.randn(rows, 8), rows_of(rows, size, everything=everything)
    results = []
    for module in (fused, plain):
        mine, out, ended = copy(settings), torch.full((rows,), -1), torch.arange(rows) % 3 == 1
        kept, picks, sums = module.output(
            x, weights, mine, unk_id=UNK, eos_id=EOS, keep=True, logprobs=kind != "none left"
        )
        logprobs = module.draw(picks, mine, eos_id=EOS, ended=ended, out=out, logits=kept, sums=sums)
        results.append((kept, out, ended, logprobs, mine))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2])
    for part, wanted in zip(results[0][3] or (), results[1][3] or (), strict=True):
        assert_close(part, wanted)
    for name, value in vars(results[1][4]).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(results[0][4], name), value), name


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", ["one nan", "all nan"])
@pytest.mark.parametrize("size", [64, 130])
def test_a_row_of_nan_draws_a_token_of_the_vocabulary(fused: ModuleType, size: int, kind: str) -> None:
    """Other rows draw as without it, and what a draw counts is written inside the arrays."""
    rows, bad = 5, 2
    others = torch.arange(rows) != bad
    settings = rows_of(rows, size, everything=True)
    logits = torch.randn(rows, size)
    weights = Weights.of([torch.zeros(size, 8)], torch.randn(size))
    wrong, bias = slice(5, 6) if kind == "one nan" else slice(None), torch.zeros(rows, size)
    for changed in (settings, dataclasses.replace(settings, temperature=None)):
        drawn = []
        for value in (0.0, math.nan):
            logits[bad, wrong] = bias[bad, wrong] = value
            mine = copy(dataclasses.replace(changed, bias=bias))
            _, of_output, _ = fused.output(
                torch.zeros(rows, 8), weights, mine, unk_id=UNK, eos_id=EOS, keep=False, logprobs=False
            )
            for picks in (of_output, fused.pick(logits, mine)):
                counts = torch.zeros(rows + 1, size, dtype=torch.int32)
                out = torch.full((rows,), -1)
                fused.draw(picks, dataclasses.replace(mine, counts=counts), eos_id=EOS, ended=None, out=out)
                assert out.min() >= 0
                assert out.max() < size
                assert counts.sum(1).tolist() == [1] * rows + [0]
                drawn.append(out[others])
        assert torch.equal(drawn[0], drawn[2])
        assert torch.equal(drawn[1], drawn[3])


@pytest.mark.parametrize("rows", [1, 33])
def test_output_layer_picks_the_same_tokens_of_a_product(fused: ModuleType, rows: int) -> None:
    weights = Weights.of([random_matrix(300, 40) * 3], torch.randn(300), norm=random_norm(40))
    x, drawn = torch.randn(rows, 40), []
    for module in (fused, plain):
        settings, out = copy(rows_of(rows, 300)), torch.full((rows,), -1)
        logits, picks, sums = module.output(x, weights, settings, unk_id=UNK, eos_id=EOS, keep=False, logprobs=False)
        assert logits is None
        assert sums is None
        module.draw(picks, settings, eos_id=EOS, ended=None, out=out)
        drawn.append(out)
    assert torch.equal(*drawn)


def test_texts_by_kernels_are_those_by_operators(fused: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole decoder, with prompts side by side, and rows of all settings that end and come."""
    from tests.decoding import test_fused as decoder_tests

    tokenizer = decoder_tests.Tokenizer(
        decoder_tests.train_tokenizer(decoder_tests.TEXTS, vocab_size=400, model_type="char")
    )
    # of few programs, as the interpreter takes 10 ms for each; sizes fill no block
    shape = ModelConfig(embedding_dim=12, hidden_size=12, num_layers=2, layer_norm=True, residual=True)
    model = decoder_tests.build(shape, tokenizer).to(torch.get_default_device())
    requests = decoder_tests.requests_for(decoder_tests.SETTINGS, 10, [1, 3, 6])
    monkeypatch.setattr(pieces, "TOKENS", 8)
    by_kernels, by_operators = decoder_tests.FusedDecoder(model, fused), decoder_tests.FusedDecoder(model, None)
    drawn, wanted = (
        decoder_tests.samples(decoder_tests.SingleSteps.of, decoder, tokenizer, requests, batch_size=5)
        for decoder in (by_kernels, by_operators)
    )
    assert {i: sample.text for i, sample in drawn.items()} == {i: sample.text for i, sample in wanted.items()}
    assert by_kernels.description.endswith("fused kernels: layer, linear, output, pick, draw")
