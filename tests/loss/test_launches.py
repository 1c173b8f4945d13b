"""Launches of a call: the row kernels, one for the reduction, and no operators of PyTorch beside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixce_kernels import fused_linear_mixce_loss, fused_mixce_loss
from support.launches import N_ROWS, REDUCTIONS, launches_of_eager

VOCAB = 50


def _inputs() -> tuple[Tensor, Tensor]:
    targets = torch.randint(VOCAB, (N_ROWS,))
    targets[2] = -100
    return torch.randn(N_ROWS, VOCAB, requires_grad=True), targets


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("stats", [False, True])
def test_forward_and_backward(name: str, stats: bool) -> None:
    keywords, reduces, _ = REDUCTIONS[name]
    logits, targets = _inputs()
    with launches_of_eager() as forward:
        found = fused_mixce_loss(logits, targets, 0.3, return_stats=stats, backend="cpu", **keywords)
    loss = found[0] if isinstance(found, tuple) else found
    assert forward.torch == []
    assert forward.ours == (["forward", "reduce"] if reduces else ["forward"])
    upstream = torch.full_like(loss, 2.0)
    with launches_of_eager() as backward:
        torch.autograd.grad(loss, logits, upstream)
    assert backward.torch == []
    assert backward.ours == ["logits_grad"]


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("inplace", [False, True])
def test_grad_in_forward(name: str, inplace: bool) -> None:
    """The factors of tokens come before their rows; a backward reads one of them each and, where it is 1, no row."""
    keywords, reduces, has_factors = REDUCTIONS[name]
    leaf, targets = _inputs()
    logits = leaf * 1.0
    with launches_of_eager() as forward:
        loss = fused_mixce_loss(
            logits, targets, 0.3, grad_in_forward=True, inplace_backward=inplace, backend="cpu", **keywords
        )
    assert isinstance(loss, Tensor)
    assert forward.torch == []
    factors = ["reduce"] if has_factors else []
    assert forward.ours == [*factors, "forward", *(["reduce"] if reduces else [])]
    upstream = torch.ones_like(loss)
    with launches_of_eager() as backward:
        torch.autograd.grad(loss, logits, upstream)
    assert backward.torch == []
    assert backward.ours == ["scale_rows_"]


def test_a_tensor_eta_is_copied_once() -> None:
    logits, targets = _inputs()
    with launches_of_eager() as forward:
        fused_mixce_loss(logits, targets, torch.tensor(0.3), backend="cpu")
    assert forward.torch == ["clone"]
    assert forward.ours == ["forward", "reduce"]


@pytest.mark.parametrize("name", REDUCTIONS)
def test_linear(name: str) -> None:
    """Beside a chunk's products: ignored rows are left out, results take their place, a backward finds its factor."""
    keywords, reduces, _ = REDUCTIONS[name]
    hidden, weight = torch.randn(N_ROWS, 8, requires_grad=True), torch.randn(VOCAB, 8, requires_grad=True)
    targets = torch.randint(VOCAB, (N_ROWS,))
    with launches_of_eager() as forward:
        loss = fused_linear_mixce_loss(hidden, weight, targets, 0.3, backend="cpu", **keywords)
    assert isinstance(loss, Tensor)
    summed = keywords.get("reduction") != "none"
    # Some products are sums of products, by the CPU.
    small = [name for name in forward.torch if name not in ("mm", "zero_", "add_")]
    assert small == ["ne", "where", "copy_", "copy_"]
    if summed:
        assert forward.ours == [*([] if name == "sum" else ["reduce"]), "forward", "reduce"]
    else:
        assert forward.ours == (["forward", "reduce"] if reduces else ["forward"])
    upstream = torch.ones_like(loss)
    with launches_of_eager() as backward:
        torch.autograd.grad(loss, (hidden, weight), upstream)
    if summed:
        assert backward.torch == ["ne", "any", "where"]
        assert backward.ours == ["scale_rows_", "scale_rows_"]
