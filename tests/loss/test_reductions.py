"""What the reductions mean: identities that hold whatever the loss of a token is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixce_kernels import backends, fused_mixce_loss
from mixce_kernels.reduction import Reduction
from support.cases import MODES
from support.inputs import computed

EVERY_MODE = pytest.mark.parametrize("mode", MODES)
# Two roundings on either side of each identity.
EPSILON = 4 * torch.finfo(torch.float32).eps


def inputs(device: str, rows: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [rows, 60], targets with some ignored, weights."""
    targets = torch.randint(60, (rows,), device=device)
    targets[1::5] = -100
    return torch.randn(rows, 60, device=device), targets, torch.rand(rows, device=device) + 0.5


def grads(logits: Tensor, *args: Tensor, **keywords: object) -> tuple[Tensor, Tensor]:
    """Loss and gradient."""
    leaf = computed(logits.clone())
    loss = fused_mixce_loss(leaf, *args, **keywords)
    return loss.detach(), *torch.autograd.grad(loss, leaf, torch.ones_like(loss))


@EVERY_MODE
@pytest.mark.parametrize("weighted", [False, True])
def test_sum_and_mean_of_none(backend: str, device: str, mode: str, weighted: bool) -> None:
    """The sum of the tokens; divided by the number of valid ones, or by the sum of their weights."""
    logits, targets, weights = inputs(device)
    keywords = {"backend": backend, "token_weights": weights if weighted else None, **MODES[mode]}
    tokens, token_grad = grads(logits, targets, 0.3, reduction="none", **keywords)
    total, total_grad = grads(logits, targets, 0.3, reduction="sum", **keywords)
    mean, mean_grad = grads(logits, targets, 0.3, reduction="mean", **keywords)
    valid = targets != -100
    divisor = weights[valid].sum() if weighted else valid.sum()
    torch.testing.assert_close(total, tokens.sum(), rtol=EPSILON, atol=0)
    torch.testing.assert_close(mean, tokens.sum() / divisor, rtol=EPSILON, atol=0)
    torch.testing.assert_close(total_grad, token_grad, rtol=EPSILON, atol=1e-10)
    torch.testing.assert_close(mean_grad, token_grad / divisor, rtol=EPSILON, atol=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_eta_1_is_cross_entropy(backend: str, device: str, smoothing: float) -> None:
    """`torch.nn.functional.cross_entropy`, for every reduction and its class weights' divisor."""
    logits, targets, _ = inputs(device)
    class_weights = torch.rand(60, device=device)
    weights = class_weights[targets.clamp(min=0)]
    for reduction in ("none", "mean", "sum"):
        for keywords, theirs in (({}, {}), ({"token_weights": weights}, {"weight": class_weights})):
            if theirs and smoothing:
                continue  # PyTorch weighs the smoothed classes one by one
            leaf = computed(logits.clone())
            expected = torch.nn.functional.cross_entropy(
                leaf, targets, reduction=reduction, label_smoothing=smoothing, **theirs
            )
            (expected_grad,) = torch.autograd.grad(expected, leaf, torch.ones_like(expected))
            loss, grad = grads(
                logits, targets, 1.0, reduction=reduction, label_smoothing=smoothing, backend=backend, **keywords
            )
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=2e-7)


def test_weight_of_zero_is_no_ignored_token(backend: str, device: str) -> None:
    """It adds nothing to loss and gradient, in numbers as large as they like."""
    logits, targets, weights = inputs(device)
    weights[3] = 0
    loss, grad = grads(logits, targets, 0.3, reduction="none", token_weights=weights, backend=backend)
    assert loss[3] == 0
    assert (grad[3] == 0).all()


@EVERY_MODE
@pytest.mark.parametrize("kind", [int, float, torch.tensor])
def test_gradient_accumulation(backend: str, device: str, mode: str, kind: type) -> None:
    """Micro-batches divided by the number of items of the whole batch add up to the whole batch's mean."""
    logits, targets, _ = inputs(device)
    whole, whole_grad = grads(logits, targets, 0.3, backend=backend)
    items = kind(int((targets != -100).sum()))
    parts = [
        grads(logits[i : i + 4], targets[i : i + 4], 0.3, backend=backend, num_items_in_batch=items, **MODES[mode])
        for i in range(0, 12, 4)
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, rtol=EPSILON, atol=0)
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), whole_grad, rtol=EPSILON, atol=1e-9)


def test_num_items_tensor_of_one_element(backend: str, device: str) -> None:
    """Of any type and one dimension at most, as trainers pass it."""
    logits, targets, _ = inputs(device)
    expected = fused_mixce_loss(logits, targets, num_items_in_batch=7, backend=backend)
    for items in (torch.tensor(7), torch.tensor([7]), torch.tensor(7.0, dtype=torch.bfloat16), torch.tensor([7.0])):
        assert torch.equal(fused_mixce_loss(logits, targets, num_items_in_batch=items, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_weights_of_any_floating_type(backend: str, device: str, dtype: torch.dtype) -> None:
    """They are read in their own type, and the loss stays float32."""
    logits, targets, weights = inputs(device)
    weights = weights.to(dtype)
    loss = fused_mixce_loss(logits, targets, token_weights=weights, backend=backend)
    assert loss.dtype == torch.float32
    expected = fused_mixce_loss(logits, targets, token_weights=weights.float(), backend=backend)
    torch.testing.assert_close(loss, expected, rtol=EPSILON, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (1, 4), (3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_eta_broadcasts(backend: str, device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every shape that broadcasts to targets' means what PyTorch means by it, in its own digits."""
    logits, targets, _ = inputs(device)
    logits, targets = logits.view(3, 4, 60), targets.view(3, 4)
    eta = torch.rand(shape, device=device).to(dtype)
    loss = fused_mixce_loss(logits, targets, eta, reduction="none", backend=backend)
    for row, column in ((0, 0), (1, 2), (2, 3)):
        one = float(eta.expand(3, 4)[row, column])
        expected = fused_mixce_loss(logits, targets, one, reduction="none", backend=backend)[row, column]
        torch.testing.assert_close(loss[row, column], expected, rtol=EPSILON, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_many_tokens(kernels: str, device: str, kind: str, weighted: bool) -> None:
    """More tokens than a reduction takes at once, a part of a run included: summed in float64, rounded once."""
    n_tokens = 3 * 4096 + 5
    losses, targets, weights = torch.randn(n_tokens, device=device), torch.randint(2, (n_tokens,), device=device), None
    targets[::7] = -100
    losses[::7] = 0.0
    if weighted:
        weights = torch.rand(n_tokens, device=device).bfloat16() - 0.25
        weights[::7] = torch.nan
    factors = torch.where(targets == -100, 0.0, 1.0 if weights is None else weights.double()).double()
    divisor = math.fsum(factors.tolist()) if kind == "mean" else 1.0
    expected = math.fsum((losses.double() * factors).tolist()) / divisor
    loss, scale = losses.new_empty(()), factors.new_empty(n_tokens if weighted else ())
    backends.get(kernels).reduce(targets, -100, Reduction(kind, weights), losses, loss, scale)
    assert float(loss) == pytest.approx(expected, rel=torch.finfo(torch.float32).eps)
    wanted = factors / divisor if weighted else torch.full_like(scale, 1 / divisor)
    torch.testing.assert_close(scale, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.float16, torch.bfloat16, torch.float64])
def test_num_items_of_any_type(kernels: str, device: str, dtype: torch.dtype) -> None:
    logits, targets, _ = inputs(device)
    num_items = torch.tensor([7], device=device).to(dtype)
    loss = fused_mixce_loss(logits, targets, 0.3, num_items_in_batch=num_items, backend=kernels)
    torch.testing.assert_close(loss, fused_mixce_loss(logits, targets, 0.3, num_items_in_batch=7, backend=kernels))


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_type(kernels: str, device: str, dtype: torch.dtype) -> None:
    logits, targets, weights = inputs(device)
    weights = weights.to(dtype)
    loss = fused_mixce_loss(logits, targets, 0.3, token_weights=weights, backend=kernels)
    expected = fused_mixce_loss(logits, targets, 0.3, token_weights=weights.float(), backend=kernels)
    torch.testing.assert_close(loss, expected)


def test_what_the_reduction_reads_may_change_after_the_forward(kernels: str, device: str) -> None:
    """The gradient is that of the weights, and of the divisor, that the forward saw."""
    logits, targets, weights = inputs(device)
    num_items = torch.tensor(5.0, device=device)
    keywords = {"token_weights": weights, "num_items_in_batch": num_items, "backend": kernels}
    _, expected = grads(logits, targets, 0.3, **keywords)
    leaf = computed(logits.clone())
    loss = fused_mixce_loss(leaf, targets, 0.3, **keywords)
    weights.fill_(torch.nan)
    num_items.fill_(torch.nan)
    (found,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(found, expected)
