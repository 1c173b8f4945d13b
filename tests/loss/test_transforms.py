"""Batches that PyTorch makes: of upstream gradients, of calls under `torch.vmap`, of derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from conftest import INTERPRETED
from mixce_kernels import fused_linear_mixce_loss, fused_mixce_loss, mixce_loss_reference
from support.cases import MODES
from support.inputs import computed

pytestmark = pytest.mark.skipif(INTERPRETED, reason="checked natively")
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "logit_scale": 1.3}


@pytest.fixture(autouse=True)
def tensors_on_the_device(device: str) -> Iterator[None]:
    """Tensors are made where the backend under test runs."""
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        yield


def inputs(*batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 logits [*batch, 4, 9], targets with some ignored, and eta of each token."""
    logits = torch.randn(*batch, 4, 9, dtype=torch.float64)
    targets = torch.randint(9, (*batch, 4))
    targets.view(-1)[1::4] = -100
    return logits, targets, torch.rand(*batch, 4, dtype=torch.float64)


def linear_loss(hidden: Tensor, targets: Tensor, eta: float | Tensor, **options: Any) -> Any:
    """The loss from hidden states by a weight that shifts them."""
    return fused_linear_mixce_loss(hidden, torch.eye(9, dtype=hidden.dtype).roll(1, 0), targets, eta, **options)


LOSSES = pytest.mark.parametrize("loss", [fused_mixce_loss, linear_loss], ids=["plain", "linear"])


@LOSSES
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_batched_upstream_gradients(backend: str, mode: str, reduction: str, loss: Callable[..., Any]) -> None:
    """`is_grads_batched`: a Jacobian, a row of which is the gradient by that upstream gradient alone."""
    logits, targets, eta = inputs()
    keywords = {"reduction": reduction, "backend": backend, **OPTIONS, **MODES[mode]}
    upstream = torch.eye(4, dtype=torch.float64) if reduction == "none" else torch.tensor([1.0, -2.0]).double()
    copy = computed(logits.clone())
    (batched,) = torch.autograd.grad(loss(copy, targets, eta, **keywords), copy, upstream, is_grads_batched=True)
    for one, row in zip(batched, upstream, strict=True):
        copy = computed(logits.clone())
        (expected,) = torch.autograd.grad(loss(copy, targets, eta, **keywords), copy, row)
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-14)


@LOSSES
def test_jacobian_and_hessian(backend: str, loss: Callable[..., Any]) -> None:
    """Of `torch.autograd.functional`, by vectorised calls."""
    logits, targets, _ = inputs()

    def total(logits: Tensor) -> Tensor:
        return loss(logits, targets, 1.0, reduction="sum", backend=backend)

    def tokens(logits: Tensor) -> Tensor:
        return loss(logits, targets, 1.0, reduction="none", backend=backend)

    for derivative, function in (
        (torch.autograd.functional.jacobian, tokens),
        (torch.autograd.functional.hessian, total),
    ):
        torch.testing.assert_close(derivative(function, logits, vectorize=True), derivative(function, logits))


@LOSSES
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_vmap(backend: str, mode: str, reduction: str, loss: Callable[..., Any]) -> None:
    """Over a leading dimension, over one that lies elsewhere, over some arguments, and twice."""
    logits, targets, eta = inputs(3, 2)

    def call(logits: Tensor, targets: Tensor, eta: float | Tensor, return_stats: bool = False) -> Any:
        return loss(
            logits, targets, eta, reduction=reduction, return_stats=return_stats, backend=backend, **OPTIONS,
            **MODES[mode],
        )  # fmt: skip

    def each(logits: Tensor, targets: Tensor, eta: Tensor) -> Tensor:
        return torch.stack([call(*one) for one in zip(logits, targets, eta, strict=True)])

    close = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(vmap(call)(logits, targets, eta), each(logits, targets, eta), **close)
    twice = torch.stack([each(*one) for one in zip(logits, targets, eta, strict=True)])
    torch.testing.assert_close(vmap(vmap(call))(logits, targets, eta), twice, **close)
    moved = vmap(call, in_dims=(1, None, None))(logits.movedim(0, 1), targets[0], eta[0])
    torch.testing.assert_close(moved, torch.stack([call(one, targets[0], eta[0]) for one in logits]), **close)
    shared = vmap(call, in_dims=(None, 0, None))(logits[0], targets, 0.3)
    torch.testing.assert_close(shared, torch.stack([call(logits[0], one, 0.3) for one in targets]), **close)
    _, stats = vmap(lambda *arguments: call(*arguments, return_stats=True))(logits, targets, eta)
    _, expected = call(logits, targets, eta, return_stats=True)
    torch.testing.assert_close(tuple(stats), tuple(expected), **close)


@LOSSES
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_each_sample(backend: str, mode: str, loss: Callable[..., Any]) -> None:
    """`vmap(grad)`, and the gradient of a sum of losses under `vmap`."""
    logits, targets, eta = inputs(3)

    def call(logits: Tensor, targets: Tensor, eta: Tensor) -> Tensor:
        return loss(logits, targets, eta, backend=backend, **MODES[mode])

    expected = torch.stack(
        [
            grad(lambda logits, one=one, row=row: mixce_reference(loss, logits, one, row))(sample)
            for sample, one, row in zip(logits, targets, eta, strict=True)
        ]
    )
    torch.testing.assert_close(vmap(grad(call))(logits, targets, eta), expected)
    whole = grad(lambda logits: vmap(call)(logits, targets, eta).sum())(logits)
    torch.testing.assert_close(whole, expected)
    leaf = logits.clone().requires_grad_()
    vmap(call)(leaf, targets, eta).sum().backward()
    torch.testing.assert_close(leaf.grad, expected)


def mixce_reference(loss: Callable[..., Any], values: Tensor, targets: Tensor, eta: Tensor) -> Tensor:
    """The reference of either loss."""
    logits = values if loss is fused_mixce_loss else values @ torch.eye(9, dtype=values.dtype).roll(1, 0).T
    return mixce_loss_reference(logits, targets, eta)


@LOSSES
def test_validation_is_refused_under_vmap(backend: str, loss: Callable[..., Any]) -> None:
    """Values of a batch are for no single call to read."""
    logits, targets, eta = inputs(3)
    with pytest.raises(ValueError, match=r"expected validate=False under torch.vmap, got True"):
        vmap(lambda *arguments: loss(*arguments, validate=True, backend=backend))(logits, targets, eta)
