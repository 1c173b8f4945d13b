"""What PyTorch's own checks say of the gradient, once and twice differentiated, and what surrounds it in autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from conftest import INTERPRETED
from mixce_kernels import fused_mixce_loss, mixce_loss_reference
from support.cases import MODES
from support.inputs import computed

# An interpreter is too slow for the hundreds of calls of a numerical derivative.
pytestmark = pytest.mark.skipif(INTERPRETED, reason="checked natively")

OPTIONS = {
    "default": {},
    "smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.05},
    "softcap": {"softcap": 2.0},
    "scale": {"logit_scale": 1.7},
    "all": {"label_smoothing": 0.2, "z_loss": 0.05, "softcap": 2.0, "logit_scale": 1.7},
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
REUSABLE = pytest.mark.parametrize("mode", ["plain", "grad_in_forward"])
EVERY_REDUCTION = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


@pytest.fixture(autouse=True)
def tensors_on_the_device(device: str) -> Iterator[None]:
    """Tensors are made where the backend under test runs."""
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        yield


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Float64 logits [2, 3, 7], targets with one ignored, and an upstream gradient [2, 3] of its own per token."""
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    return logits, torch.tensor([[0, 6, -100], [3, 3, 1]]), upstream


def cross_entropy(backend: str, mode: str, targets: Tensor, **options: Any) -> Callable[[Tensor], Tensor]:
    """The loss as a function of the logits alone, with eta = 1, where no weight is held fixed."""
    return lambda logits: fused_mixce_loss(logits, targets, 1.0, backend=backend, **MODES[mode], **options)


@EVERY_OPTION
@EVERY_REDUCTION
@REUSABLE
def test_gradcheck(backend: str, mode: str, reduction: str, options: dict[str, float]) -> None:
    """The derivative of what forward computes, by differences, is what backward computes."""
    logits, targets, _ = inputs()
    weights = torch.tensor([[0.5, 1.0, 2.0], [0.0, 3.0, 1.0]])
    loss = cross_entropy(backend, mode, targets, reduction=reduction, token_weights=weights, **options)
    assert gradcheck(loss, logits)


@EVERY_OPTION
@pytest.mark.parametrize("mode", ["inplace", "inplace_grad_in_forward"])
def test_directional_derivative_in_place(kernels: str, mode: str, options: dict[str, float]) -> None:
    """Gradcheck runs backward more than once a forward, which these modes refuse: so by hand, along one direction."""
    logits, targets, _ = inputs()
    loss = cross_entropy(kernels, mode, targets, **options)
    written = computed(logits.detach().clone())
    (grad,) = torch.autograd.grad(loss(written), written)
    direction = torch.randn_like(grad)
    ahead, behind = (loss(logits.detach() + sign * 1e-6 * direction) for sign in (1, -1))
    torch.testing.assert_close((grad * direction).sum(), (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)


@EVERY_OPTION
@pytest.mark.parametrize("mode", MODES)
def test_the_weight_is_held_fixed(backend: str, mode: str, options: dict[str, float]) -> None:
    """At eta < 1 the gradient is that of the cross-entropy with the tokens weighted by their w, z_loss beside it."""
    logits, targets, upstream = inputs()
    upstream = upstream.detach()
    keywords = {"backend": backend, "reduction": "none"}
    eta = torch.rand(2, 3, dtype=torch.float64)
    _, stats = fused_mixce_loss(logits.detach(), targets, eta, return_stats=True, **keywords, **options)
    without_z_loss = {name: value for name, value in options.items() if name != "z_loss"}
    weighted = fused_mixce_loss(logits, targets, 1.0, token_weights=stats.weight, **keywords, **without_z_loss)
    if "z_loss" in options:
        z_loss = fused_mixce_loss(logits, targets, 1.0, **keywords, **options)
        weighted = weighted + z_loss - fused_mixce_loss(logits, targets, 1.0, **keywords, **without_z_loss)
    (expected,) = torch.autograd.grad(weighted, logits, upstream)
    written = computed(logits.detach().clone())
    loss = fused_mixce_loss(written, targets, eta, **keywords, **MODES[mode], **options)
    torch.testing.assert_close(loss, weighted, rtol=1e-13, atol=1e-14)
    (grad,) = torch.autograd.grad(loss, written, upstream)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)


@EVERY_OPTION
@EVERY_REDUCTION
@REUSABLE
def test_gradgradcheck(backend: str, mode: str, reduction: str, options: dict[str, float]) -> None:
    """The second derivative, by the logits and by the upstream gradient."""
    logits, targets, upstream = inputs()
    loss = cross_entropy(backend, mode, targets, reduction=reduction, **options)
    assert gradgradcheck(loss, logits, upstream if reduction == "none" else torch.tensor(1.7).double().requires_grad_())


@EVERY_OPTION
@REUSABLE
@pytest.mark.parametrize("eta", [0.0, 0.3, torch.tensor([[0.1, 0.5, 0.9]])], ids=["0", "0.3", "tensor"])
def test_double_backward_is_the_reference_s(
    kernels: str, mode: str, eta: float | Tensor, options: dict[str, float]
) -> None:
    """At eta < 1 too: of a gradient penalty, by the logits and by the upstream gradient."""
    logits, targets, upstream = inputs()
    results = []
    for loss in (
        mixce_loss_reference(logits, targets, eta, reduction="none", **options),
        fused_mixce_loss(logits, targets, eta, reduction="none", backend=kernels, **MODES[mode], **options),
    ):
        (grad,) = torch.autograd.grad(loss, logits, upstream, create_graph=True)
        penalty = (grad * torch.linspace(-1, 1, grad.numel(), dtype=grad.dtype).view_as(grad)).sum() + grad.norm()
        results.append((grad, *torch.autograd.grad(penalty, (logits, upstream))))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@REUSABLE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_penalty_of_a_model(kernels: str, mode: str, dtype: torch.dtype) -> None:
    """create_graph through a layer, for the types that people train in."""
    targets = torch.tensor([0, 5, -100, 2])
    hidden = torch.randn(4, 8).to(dtype)
    results = []
    for function, keywords in ((mixce_loss_reference, {}), (fused_mixce_loss, {"backend": kernels, **MODES[mode]})):
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 10).to(dtype)
        loss = function(layer(hidden), targets, 0.3, **keywords)
        grads = torch.autograd.grad(loss, tuple(layer.parameters()), create_graph=True)
        (loss + sum(grad.float().square().sum() for grad in grads)).backward()
        results.append(torch.cat([parameter.grad.float().flatten() for parameter in layer.parameters()]))
    scale = results[0].abs().max().item()
    # Each path rounds a handful of intermediate results to the type.
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=8 * torch.finfo(dtype).eps * scale)


@pytest.mark.parametrize("mode", ["inplace", "inplace_grad_in_forward"])
def test_create_graph_in_place(kernels: str, mode: str) -> None:
    """A graph of the gradient needs the logits: where they are gone PyTorch raises; else all is as out of place."""
    logits, targets, _ = inputs()
    reference = logits.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(mixce_loss_reference(reference, targets, 0.3), reference, create_graph=True)
    (expected_second,) = torch.autograd.grad(expected.square().sum(), reference)
    logits = computed(logits.detach())
    loss = fused_mixce_loss(logits, targets, 0.3, backend=kernels, **MODES[mode])
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-13)
    if mode == "inplace_grad_in_forward":
        with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
            torch.autograd.grad(grad.square().sum(), logits)
        return
    (second,) = torch.autograd.grad(grad.square().sum(), logits)
    torch.testing.assert_close(second, expected_second, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_autocast_reads_logits_as_they_are(backend: str, mode: str, dtype: torch.dtype) -> None:
    """The same bits as without it: a float32 loss, and a gradient of the logits' type."""
    values, targets = torch.randn(5, 70).to(dtype), torch.tensor([1, 2, -100, 4, 69])
    results = []
    for enabled in (False, True):
        logits = computed(values.clone())
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = fused_mixce_loss(logits, targets, 0.3, backend=backend, **MODES[mode])
        assert loss.dtype == torch.float32
        results.append((loss, *torch.autograd.grad(loss, logits)))
    assert results[1][1].dtype == dtype
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_checkpoint(kernels: str, mode: str) -> None:
    """Recomputed under activation checkpointing, the gradients are the same."""
    hidden, targets = torch.randn(5, 8), torch.tensor([1, 2, -100, 4, 9])
    layer = torch.nn.Linear(8, 10)

    def head(states: Tensor) -> Tensor:
        return fused_mixce_loss(layer(states), targets, backend=kernels, **MODES[mode])

    expected = torch.autograd.grad(head(hidden), tuple(layer.parameters()))
    loss = torch.utils.checkpoint.checkpoint(head, hidden.requires_grad_(), use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(loss, tuple(layer.parameters())), expected)


@pytest.mark.parametrize("mode", MODES)
def test_func_grad(kernels: str, mode: str) -> None:
    """torch.func.grad sees the same gradient in every mode, and its argument is not written over."""
    logits, targets, _ = inputs()
    logits = logits.detach()
    before = logits.clone()

    def loss(logits: Tensor) -> Tensor:
        return fused_mixce_loss(logits, targets, 0.3, backend=kernels, **MODES[mode])

    expected = torch.func.grad(lambda logits: mixce_loss_reference(logits, targets, 0.3))(logits)
    torch.testing.assert_close(torch.func.grad(loss)(logits), expected)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("mode", MODES)
def test_forward_mode_is_refused(kernels: str, mode: str) -> None:
    """It is not implemented, and does not vanish."""
    logits, targets, _ = inputs()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits.detach(), torch.ones_like(logits))
        with pytest.raises(RuntimeError, match=r"forward mode|jvp"):
            fused_mixce_loss(dual, targets, backend=kernels, **MODES[mode])


def test_batched_upstream_gradients_of_a_scalar(kernels: str) -> None:
    """The gradient that forward computed is multiplied by each of them."""
    logits, targets, _ = inputs()
    upstream = torch.tensor([1.0, -2.0], dtype=torch.float64)
    loss = fused_mixce_loss(logits, targets, 0.3, grad_in_forward=True, backend=kernels)
    (batched,) = torch.autograd.grad(loss, logits, upstream, is_grads_batched=True, retain_graph=True)
    for one, factor in zip(batched, upstream, strict=True):
        (expected,) = torch.autograd.grad(loss, logits, factor, retain_graph=True)
        torch.testing.assert_close(one, expected)
