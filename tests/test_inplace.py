"""The modes that write over the logits: what is written, when, and what PyTorch is told about it."""

from __future__ import annotations

import pytest
import torch
from cases import MODES, Case
from inputs import build
from torch import Tensor

from mixce_kernels import fused_mixce_loss

INPLACE = pytest.mark.parametrize("mode", ["inplace", "inplace_grad_in_forward"])
# What PyTorch says when a tensor that was saved for backward has been written to.
MODIFIED = "modified by an inplace operation"


def inputs(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits [5, 300], not a leaf, and targets with one ignored."""
    leaf = torch.randn(5, 300, device=device, dtype=dtype, requires_grad=True)
    return leaf * 2, torch.tensor([0, 299, -100, 7, 8], device=device)


@INPLACE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("leaf", [True, False])
def test_gradient_lies_in_the_logits_memory(
    kernels: str, device: str, mode: str, dtype: torch.dtype, leaf: bool
) -> None:
    """The gradient that arrives is a view of the logits, and they hold it."""
    logits, targets = inputs(device, dtype)
    logits = logits.detach().requires_grad_() if leaf else logits
    expected = logits.detach().clone().requires_grad_()
    (plain,) = torch.autograd.grad(fused_mixce_loss(expected, targets, backend=kernels), expected)
    loss = fused_mixce_loss(logits, targets, backend=kernels, **MODES[mode])
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.data_ptr() == logits.data_ptr()
    assert not grad.requires_grad
    assert torch.equal(grad, logits.detach())
    # The same arithmetic, but for the order of the factors.
    torch.testing.assert_close(grad, plain, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


@INPLACE
def test_leaf_gradient_arrives_through_a_linear_layer(kernels: str, device: str, mode: str) -> None:
    """In a model, as in a training loop, the weights' gradients are those of the plain mode."""
    hidden, targets = torch.randn(6, 16, device=device), torch.tensor([0, 1, 99, -100, 5, 6], device=device)
    grads = []
    for keywords in ({}, MODES[mode]):
        torch.manual_seed(0)
        layer = torch.nn.Linear(16, 100).to(device)
        fused_mixce_loss(layer(hidden), targets, backend=kernels, **keywords).backward()
        grads.append([parameter.grad for parameter in layer.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "detached", "forward_alone"])
def test_logits_are_untouched_without_a_gradient_to_compute(backend: str, device: str, mode: str, how: str) -> None:
    """Nothing is written, and nothing counted as written."""
    logits, targets = inputs(device)
    logits = logits.detach().requires_grad_(how != "detached")
    before, version = logits.detach().clone(), logits._version
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(how, torch.enable_grad)
    with context():
        loss = fused_mixce_loss(logits, targets, backend=backend, **MODES[mode])
    if how == "forward_alone" and mode == "inplace_grad_in_forward":
        return  # forward itself overwrites them: there was a gradient to compute
    assert torch.equal(logits.detach(), before)
    assert logits._version == version
    assert loss.requires_grad == (how == "forward_alone")


@INPLACE
def test_another_graph_that_saved_the_logits_raises(kernels: str, device: str, mode: str) -> None:
    """Whoever needs the logits' values afterwards gets PyTorch's error instead of a gradient of garbage."""
    logits, targets = inputs(device)
    other = logits.square().sum()
    fused_mixce_loss(logits, targets, backend=kernels, **MODES[mode]).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        other.backward()


def test_grad_in_forward_in_place_is_told_in_forward(kernels: str, device: str) -> None:
    """The logits are gone after the forward, and a graph that saved them before knows."""
    logits, targets = inputs(device)
    other = logits.square().sum()
    fused_mixce_loss(logits, targets, backend=kernels, inplace_backward=True, grad_in_forward=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        other.backward()


@INPLACE
@pytest.mark.parametrize("upstream", [1.0, 2.0])
def test_second_backward_raises_in_place(kernels: str, device: str, mode: str, upstream: float) -> None:
    """The logits are spent: PyTorch's error, not the gradient of a gradient."""
    logits, targets = inputs(device)
    loss = fused_mixce_loss(logits, targets, backend=kernels, **MODES[mode])
    factor = torch.tensor(upstream, device=device)
    torch.autograd.grad(loss, logits, factor, retain_graph=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        torch.autograd.grad(loss, logits, factor, retain_graph=True)


@pytest.mark.parametrize("mode", ["plain", "grad_in_forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_backward_is_right_out_of_place(backend: str, device: str, mode: str, dtype: torch.dtype) -> None:
    """With `retain_graph`, every time, whatever was done to the gradient handed out first."""
    logits, targets = inputs(device, dtype)
    loss = fused_mixce_loss(logits, targets, 0.3, backend=backend, **MODES[mode])
    (first,) = torch.autograd.grad(loss, logits, torch.tensor(1.0, device=device), retain_graph=True)
    kept = first.clone()
    first.fill_(torch.nan)
    for factor in (1.0, -2.0, 4.0):
        (again,) = torch.autograd.grad(loss, logits, torch.tensor(factor, device=device), retain_graph=True)
        # Powers of two: exact.
        torch.testing.assert_close(again, kept * factor, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["sliced", "transposed", "sliced_columns", "unaligned"])
def test_memory_around_the_logits_is_untouched(kernels: str, device: str, mode: str, layout: str) -> None:
    """What lies between and around strided rows stays, to the bit."""
    shape = (3, 4, 129) if layout in ("sliced", "transposed") else (5, 129)
    case = Case("around", shape=shape, layout=layout, mode=mode, ignored="none")
    moved = build(case).to(device)
    outside = torch.ones_like(moved.memory, dtype=torch.bool)
    view = moved.logits.detach()
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    # A value that arithmetic would change; the fixture's NaN would hide a write of NaN.
    moved.memory[outside] = 1.0 / 3
    before = moved.memory[outside].clone()
    loss = fused_mixce_loss(moved.logits, moved.targets, moved.eta, backend=kernels, **moved.keywords)
    (grad,) = torch.autograd.grad(loss, moved.logits)
    assert torch.equal(moved.memory[outside], before)
    assert grad.isfinite().all()
    if "inplace" in mode:
        assert torch.equal(moved.logits.detach(), grad)


@INPLACE
def test_sliced_logits_of_a_model(kernels: str, device: str, mode: str) -> None:
    """`logits[:, :-1]` of a layer's output: the last position's gradient is 0, the others' that of the plain mode."""
    hidden = torch.randn(2, 5, 16, device=device)
    targets = torch.randint(100, (2, 4), device=device)
    grads = []
    for keywords in ({}, MODES[mode]):
        torch.manual_seed(0)
        layer = torch.nn.Linear(16, 100).to(device)
        fused_mixce_loss(layer(hidden)[:, :-1], targets, backend=kernels, **keywords).backward()
        grads.append([parameter.grad for parameter in layer.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("mode", ["inplace", "grad_in_forward", "inplace_grad_in_forward"])
def test_loss_without_upstream_gradient(kernels: str, device: str, mode: str) -> None:
    """The statistics alone carry no gradient, and a loss that nobody uses gives none."""
    logits, targets = inputs(device)
    loss, stats = fused_mixce_loss(logits, targets, backend=kernels, return_stats=True, **MODES[mode])
    assert loss.requires_grad
    assert not any(statistic.requires_grad for statistic in stats)


def test_gradient_accumulates_into_a_leaf(kernels: str, device: str) -> None:
    """Two plain calls on one leaf add up; the gradient of the first is not a buffer of the second."""
    logits, targets = inputs(device)
    leaf = logits.detach().requires_grad_()
    for _ in range(2):
        fused_mixce_loss(leaf, targets, backend=kernels, grad_in_forward=True).backward()
    (once,) = torch.autograd.grad(fused_mixce_loss(leaf, targets, backend=kernels), leaf)
    torch.testing.assert_close(leaf.grad, 2 * once)
