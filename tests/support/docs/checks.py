"""What the checks of the documentation's pages share: comparisons with plain formulas in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixce_kernels import backends, fused_mixce_loss, mixce_loss_reference
from support.docs.blocks import Namespace
from support.docs.models import shifted_loss

# Of the largest value, against the plain formula in float64.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def tolerance_of(*tensors: Tensor) -> float:
    return max(TOLERANCE.get(tensor.dtype, TOLERANCE[torch.float32]) for tensor in tensors)


def assert_near(got: Tensor, expected: Tensor, what: str = "", tolerance: float = 0.0) -> None:
    """Within the tolerance of the types that they were computed in, or a larger one."""
    tolerance = max(tolerance, tolerance_of(got, expected))
    assert got.shape == expected.shape, f"{what}: expected shape {list(expected.shape)}, got {list(got.shape)}"
    largest = expected.detach().abs().max().item() or 1.0
    error = (got.detach().double() - expected.detach().double()).abs().max().item()
    assert error <= tolerance * largest, f"{what}: {error} of {largest}"


def assert_far(got: Tensor, other: Tensor) -> None:
    """What a check has to tell apart, so that it can fail."""
    largest = other.detach().abs().max().item()
    difference = (got.detach().double() - other.detach().double()).abs().max().item()
    assert difference > 1e-3 * largest, f"a difference of {difference} beside {largest} tells nothing"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those that there are, by name."""
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_trained(model: nn.Module, loss: Tensor | None, loss_of: Callable[[Any], Tensor]) -> None:
    """The loss and the gradients of `model` are those of `loss_of`, a plain formula, in float64."""
    twin = copy.deepcopy(model).double()
    twin.zero_grad(set_to_none=True)
    expected = loss_of(twin)
    expected.backward()
    if loss is not None:
        assert_near(loss, expected, "loss")
    got, wanted = gradients(model), gradients(twin)
    assert got, "no parameter has a gradient"
    assert got.keys() == wanted.keys(), f"not in both: gradients of {sorted(got.keys() ^ wanted.keys())}"
    for name, grad in got.items():
        assert wanted[name].abs().max() > 0, f"a gradient of zeros tells nothing: {name}"
        assert_near(grad, wanted[name], name)


def assert_differentiated(loss: Tensor, loss_of: Callable[..., Tensor], *leaves: Tensor) -> None:
    """The loss and the gradients of its leaves are those of `loss_of(*leaves)`, a plain formula, in float64."""
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = loss_of(*twins)
    expected.backward()
    assert_near(loss, expected, "loss")
    for number, (leaf, twin) in enumerate(zip(leaves, twins, strict=True)):
        assert leaf.grad is not None, f"leaf {number} has no gradient"
        assert_near(leaf.grad, twin.grad, f"gradient of leaf {number}")


def has_kernels() -> bool:
    """Whether the package was built with its extension; without, the plain formula serves."""
    return backends.resolve(None, torch.empty(1, 1)) != "reference"


# Checks of blocks that stand on more than one page.


def check_call(names: Namespace) -> None:
    targets = names["targets"]
    assert_differentiated(names["loss"], lambda logits: mixce_loss_reference(logits, targets, 0.5), names["logits"])


def check_training_step(names: Namespace) -> None:
    assert_trained(names["model"], names["loss"], shifted_loss(names["tokens"]))


def check_in_place(names: Namespace) -> None:
    """The gradient lies where the logits lay, and whoever needs these raises."""
    check_training_step(names)
    if not has_kernels():
        return
    model, tokens = names["model"], names["tokens"]
    twin = copy.deepcopy(model).double()(tokens)[:, :-1]
    (grad,) = torch.autograd.grad(mixce_loss_reference(twin, tokens[:, 1:], 0.5), twin)
    assert_near(names["logits"], grad)
    logits = model(tokens)[:, :-1]
    other = logits.square().sum()
    fused_mixce_loss(logits, tokens[:, 1:], inplace_backward=True).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
