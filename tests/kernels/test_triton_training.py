"""The Triton kernels of a training step against their plain twins, interpreted where there is no GPU."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from textgen.config import ModelConfig
from textgen.kernels import fused
from textgen.model import lstm
from textgen.model.lstm import DropoutMasks, LSTMLanguageModel, cross_entropy_of_logits

# numpy, which interprets kernels, warns of infinities that are meant
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAN, INF = float("nan"), float("inf")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SEEDS_AND_STEPS = [(0, 0), (1, 16), (42, 1), ((1 << 63) - 1, 123_456), (1 << 40, 1 << 33)]


@pytest.fixture(scope="module")
def kernels(triton_device: str) -> ModuleType:
    from textgen.kernels import triton_training

    return triton_training


def small_model(size: int, *, dropout: float = 0.0, weight_drop: float = 0.0) -> LSTMLanguageModel:
    shape = ModelConfig(embedding_dim=size, hidden_size=size, num_layers=1, dropout=dropout, weight_drop=weight_drop)
    return LSTMLanguageModel(shape, 20)


# --- masks -----------------------------------------------------------------------------------------------------------


def time_first(x: Tensor) -> Tensor:
    """Return an equal tensor in the order in memory of cuDNN's output."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize(("seed", "step", "dtype"), [(*pair, FLOATS[i % 3]) for i, pair in enumerate(SEEDS_AND_STEPS)])
def test_dropout_and_its_gradient_have_the_bits_of_the_twin(
    kernels: ModuleType, triton_device: str, seed: int, step: int, dtype: torch.dtype
) -> None:
    """Of sizes that fill no block, with more time steps than one program has, and one."""
    torch.manual_seed(0)
    for (batch, time, size), dropout, order in (
        ((1, 1, 1), 0.5, Tensor.contiguous),
        ((2, 17, 257), 0.2, time_first),
        ((3, 2, 256), 0.999, Tensor.contiguous),
    ):
        lanes = torch.arange(batch) * 1_000_003 + (1 << 35)
        x, grad = torch.randn(batch, time, size).to(dtype), torch.randn(batch, time, size).to(dtype)
        x[0, 0, 0] = INF
        twin_x = x.clone().requires_grad_()
        wanted = small_model(size, dropout=dropout)._drop(twin_x, DropoutMasks(seed, step, lanes), 3)
        wanted.backward(grad)
        ours_x = order(x.to(triton_device)).requires_grad_()
        for given in (step, torch.tensor(step, device=triton_device)):  # from a CUDA graph the step is a tensor
            ours_x.grad = None
            seen = kernels.drop(ours_x, lanes.to(triton_device), step=given, seed=seed, site=3, dropout=dropout)
            seen.backward(grad.to(triton_device))
            assert seen.dtype == dtype
            assert seen.stride() == ours_x.stride()
            torch.testing.assert_close(seen.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
            assert twin_x.grad is not None
            assert ours_x.grad is not None
            assert torch.equal(ours_x.grad.cpu(), twin_x.grad)


def test_dropout_takes_views_whose_elements_overlap(kernels: ModuleType, triton_device: str) -> None:
    """As the gradient of a sum is."""
    lanes, x = torch.arange(3, device=triton_device), torch.randn(40, device=triton_device)
    for view in (x.expand(3, 5, 40), x[0].expand(3, 5, 40), x.view(1, 8, 5).transpose(1, 2).expand(3, 5, 8)):
        masks = {"step": 2, "seed": 1, "site": 0, "dropout": 0.4}
        seen, wanted = kernels.drop(view, lanes, **masks), kernels.drop(view.clone(), lanes, **masks)
        assert torch.equal(seen, wanted)
        assert 0 < (seen == 0).float().mean() < 1


def test_a_process_drops_for_its_lanes_what_one_process_drops_for_them(kernels: ModuleType, triton_device: str) -> None:
    x, lanes = torch.ones(8, 3, 70, device=triton_device), torch.arange(8, device=triton_device)
    masks = {"step": 9, "seed": 7, "site": 1, "dropout": 0.5}
    whole = kernels.drop(x, lanes, **masks)
    assert torch.equal(kernels.drop(x[4:], lanes[4:], **masks), whole[4:])
    assert not torch.equal(whole[:4], whole[4:])
    assert (whole == whole[:, :1]).all()  # the same units at all time steps
    assert not torch.equal(kernels.drop(x, lanes, **masks | {"site": 2}), whole)


@pytest.mark.parametrize(("seed", "step"), SEEDS_AND_STEPS)
def test_weight_masks_have_the_bits_of_the_twin(kernels: ModuleType, triton_device: str, seed: int, step: int) -> None:
    for size, share, layer in ((1, 0.3, 0), (3, 0.5, 1), (64, 0.002, 2), (33, 0.999, 5)):
        model = small_model(size, weight_drop=share)
        wanted = model.weight_mask(DropoutMasks(seed, step, torch.arange(2)), layer)
        assert wanted is not None
        dropped = min(round(256 * share), 255)
        for given in (step, torch.tensor(step, device=triton_device)):
            if dropped == 0:
                continue
            seen = kernels.weight_mask(
                size, step=given, seed=seed, site=-2 - layer, dropped=dropped, device=torch.device(triton_device)
            )
            assert seen.dtype == wanted.dtype
            assert torch.equal(seen.cpu(), wanted)


# --- cross-entropy ---------------------------------------------------------------------------------------------------


def both(
    kernels: ModuleType, device: str, logits: Tensor, bias: Tensor, targets: Tensor, *, gradient: bool = True
) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]:
    """Return nats, gradients of logits and of the bias (1 more, as it is added to), of the kernel and of the twin."""
    found = []
    twin_sum, sums = (torch.ones_like(bias) if gradient else None for _ in range(2))
    nats, grad = cross_entropy_of_logits(logits.clone(), bias, targets, twin_sum)
    found.append((nats, grad, twin_sum))
    ours, total = logits.to(device, copy=True), None if sums is None else sums.to(device)
    rows = kernels.cross_entropy(ours, bias.to(device), targets.to(device), total)
    assert rows.shape == targets.shape
    found.insert(0, (rows.sum().cpu(), ours.cpu(), None if total is None else total.cpu()))
    return found[0], found[1]


@pytest.fixture
def plain_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the twin compute by torch's operators, not by code that is compiled for the CPU."""
    monkeypatch.setattr(lstm.training_kernels, "compiled_code", lambda: None)


@pytest.mark.usefixtures("plain_loss")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 340), (16, 512), (17, 511), (37, 1000), (9, 2051), (130, 7)])
def test_cross_entropy_and_its_gradients_are_those_of_the_twin(
    kernels: ModuleType, triton_device: str, dtype: torch.dtype, rows: int, size: int
) -> None:
    torch.manual_seed(rows)
    logits, bias, targets = torch.randn(rows, size) * 5, torch.randn(size), torch.randint(0, size, (rows,))
    targets[rows // 2 + 1 :: 3] = -1  # not scored
    targets[0] = size - 1
    logits[rows // 3] = 3.0  # equal
    logits[rows // 4] *= 1000  # exp would overflow
    ours, twin = both(kernels, triton_device, logits.to(dtype), bias, targets)
    torch.testing.assert_close(ours[0], twin[0], rtol=5e-6, atol=1e-6)
    # a rounding of the last bit may fall to either side
    torch.testing.assert_close(ours[1].float(), twin[1].float(), rtol=torch.finfo(dtype).eps + 1e-5, atol=1e-6)
    assert ours[2] is not None
    torch.testing.assert_close(ours[2], twin[2], rtol=1e-5, atol=1e-5)
    assert (ours[1][targets == -1] == 0).all()
    untouched, _ = both(kernels, triton_device, logits.to(dtype), bias, targets, gradient=False)
    assert torch.equal(untouched[0], ours[0])
    assert torch.equal(untouched[1], logits.to(dtype))


@pytest.mark.usefixtures("plain_loss")
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", FLOATS)
def test_hostile_logits_make_the_nats_of_the_twin(
    kernels: ModuleType, triton_device: str, dtype: torch.dtype, value: float
) -> None:
    """One value among others, at the target and beside it; a whole row; and in a row that is not scored."""
    for place, target in ((3, 5), (5, 5), (slice(None), 5), (slice(5, 20), 2), (3, -1)):
        logits = torch.randn(4, 20).to(dtype)
        logits[2, place] = value
        ours, twin = both(kernels, triton_device, logits, torch.zeros(20), torch.tensor([1, 2, target, 19]))
        torch.testing.assert_close(ours[0], twin[0], equal_nan=True, rtol=5e-6, atol=1e-6)
        close = {"rtol": 2 * torch.finfo(dtype).eps + 1e-5, "atol": 1e-6}
        torch.testing.assert_close(ours[1].float(), twin[1].float(), equal_nan=True, **close)
        assert ours[1][[0, 1, 3]].isfinite().all()  # other rows do not suffer


@pytest.mark.usefixtures("plain_loss")
def test_columns_that_cannot_occur_leave_the_others_alone(kernels: ModuleType, triton_device: str) -> None:
    """The first block of a program's columns holds -inf alone, or the later ones do."""
    logits = torch.randn(3, 1100)
    logits[1, :600], logits[2, 400:] = -INF, -INF
    ours, twin = both(kernels, triton_device, logits, torch.zeros(1100), torch.tensor([5, 700, 9]))
    assert ours[0].isfinite()
    torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-6)


def test_a_target_beyond_the_vocabulary_is_no_number(kernels: ModuleType, triton_device: str) -> None:
    """A kernel can raise no error. The training ends with a loss that is not finite."""
    logits, targets = torch.randn(3, 20, device=triton_device), torch.tensor([0, 20, 19], device=triton_device)
    nats = kernels.cross_entropy(logits, torch.zeros(20, device=triton_device), targets, None)
    assert nats.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("hostile", ["columns", "low bias", "no rows"])
def test_what_the_kernel_is_not_for_is_left_to_torch(kernels: ModuleType, triton_device: str, hostile: str) -> None:
    size = 6
    logits = torch.randn(size, 3).T if hostile == "columns" else torch.randn(0 if hostile == "no rows" else 3, size)
    bias = torch.zeros(size, dtype=torch.bfloat16 if hostile == "low bias" else torch.float32)
    before = logits.clone()
    arguments = (logits, bias, torch.zeros(len(logits), dtype=torch.int64))
    assert kernels.cross_entropy(*(tensor.to(triton_device) for tensor in arguments), None) is None
    assert torch.equal(logits, before)


# --- whether they are used --------------------------------------------------------------------------------------------


def test_a_cpu_does_not_ask_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_on_gpu", None)  # cannot be called
    assert fused.kernels(torch.device("cpu")) is None


def test_without_triton_a_line_of_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "textgen.kernels.triton_training", None)  # an import of it raises ImportError
    fused._on_gpu.cache_clear()
    with caplog.at_level(logging.INFO, logger="textgen"):
        for _ in range(3):
            assert fused.kernels(torch.device("cuda")) is None
    fused._on_gpu.cache_clear()
    assert len(caplog.messages) == 1
    assert "torch's operators take their place" in caplog.text
