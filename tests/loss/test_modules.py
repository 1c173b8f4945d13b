"""`MixCELoss`: the function as a module."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

from mixce_kernels import MixCELoss, fused_mixce_loss
from support.cases import MODES
from support.inputs import computed

LOGITS, TARGETS = torch.randn(2, 3, 50), torch.tensor([[1, 2, -100], [0, 49, 7]])
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "logit_scale": 0.7, "ignore_index": 7}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("eta", [0.2, torch.tensor(0.2), torch.rand(2, 1)], ids=["number", "0d", "column"])
def test_module_is_the_function(backend: str, device: str, mode: str, reduction: str, eta: float) -> None:
    """Loss and gradient, to the bit."""
    eta = eta.to(device) if isinstance(eta, torch.Tensor) else eta
    targets = torch.where(TARGETS == -100, 7, TARGETS).to(device)
    weights = torch.rand(2, 3, device=device)
    keywords = {**OPTIONS, **MODES[mode], "reduction": reduction, "backend": backend}
    results = []
    for function in (
        MixCELoss(eta, **keywords),
        lambda *args, **rest: fused_mixce_loss(*args, eta, **keywords, **rest),
    ):
        logits = computed(LOGITS.to(device, copy=True))
        logits.retain_grad()
        loss = function(logits, targets, token_weights=weights)
        loss.sum().backward()
        results.append((loss.detach(), logits.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_batch_arguments(backend: str, device: str) -> None:
    """What belongs to a batch goes into the call."""
    logits, targets = LOGITS.to(device), TARGETS.to(device)
    module = MixCELoss(0.4, backend=backend, return_stats=True)
    loss, stats = module(logits, targets, num_items_in_batch=torch.tensor(11))
    expected, expected_stats = fused_mixce_loss(
        logits, targets, 0.4, num_items_in_batch=11, backend=backend, return_stats=True
    )
    assert torch.equal(loss, expected)
    assert all(torch.equal(*pair) for pair in zip(stats, expected_stats, strict=True))


def test_constructor_takes_every_option_with_the_function_s_default() -> None:
    """An option of the function that the module forgot, or gives another default, shows here."""
    function = inspect.signature(fused_mixce_loss).parameters
    constructor = inspect.signature(MixCELoss).parameters
    call = inspect.signature(MixCELoss.forward).parameters
    assert set(constructor) | set(call) - {"self"} == set(function)
    for name, parameter in constructor.items():
        assert parameter.default == function[name].default, name
    for name in set(call) - {"self", "logits", "targets"}:
        assert call[name].default == function[name].default, name


def test_eta_can_be_scheduled() -> None:
    """By assignment, a number or a tensor."""
    module = MixCELoss(1.0)
    for eta in (0.0, 0.5, torch.tensor(0.25)):
        module.eta = eta
        assert torch.equal(module(LOGITS, TARGETS), fused_mixce_loss(LOGITS, TARGETS, eta))


def test_repr_shows_what_differs_from_the_default() -> None:
    """And no more."""
    assert repr(MixCELoss()) == "MixCELoss(eta=0.5)"
    assert repr(MixCELoss(1.0, softcap=30.0, reduction="sum")) == "MixCELoss(eta=1.0, reduction=sum, softcap=30.0)"


def test_module_copies_and_pickles() -> None:
    """It goes into checkpoints and to other processes."""
    module = MixCELoss(torch.tensor(0.3), z_loss=1e-3)
    expected = module(LOGITS, TARGETS)
    assert torch.equal(copy.deepcopy(module)(LOGITS, TARGETS), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(LOGITS, TARGETS), expected)
    assert list(module.parameters()) == []
