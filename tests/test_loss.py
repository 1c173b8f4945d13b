"""Loss, gradient and statistics of every case on every backend, held to the oracle by the accuracy rule."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from cases import BFLOAT16, Case
from conftest import INTERPRETED
from inputs import Inputs, build
from numerics import accumulate_dtype, assert_accurate, plain_loss_and_grad
from oracle import TokenResults, np
from torch import Tensor

from mixce_kernels import fused_mixce_loss

# An interpreted kernel costs by the operation: every fifth case that is not large.
INTERPRETED_CASES = [case for case in cases.ALL if math.prod(case.shape) <= 60_000][::5]


def run(inputs: Inputs, backend: str) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the public function."""
    loss = fused_mixce_loss(inputs.logits, inputs.targets, inputs.eta, backend=backend, **inputs.keywords)
    (grad,) = torch.autograd.grad(loss, inputs.logits, inputs.upstream)
    return loss, grad


def check(inputs: Inputs, expected: TokenResults, loss: Tensor, grad: Tensor, extra_ulps: int = 0) -> None:
    """Holds loss and gradient to the rule. `inputs` are fresh ones: a mode may have overwritten those of the call."""
    case = inputs.case
    vocab_size = inputs.logits.shape[-1]
    upstream = inputs.factors * inputs.token_upstream
    spent = inputs.factors if "grad_in_forward" in case.mode else None
    plain_eta = inputs.flat_eta.to(accumulate_dtype(case.dtype))
    plain_losses, plain_grad = plain_loss_and_grad(
        inputs.flat_logits, inputs.flat_targets, plain_eta, case.options,
        upstream if spent is None else inputs.token_upstream, spent,
    )  # fmt: skip

    wide = expected.loss.dtype.type
    factors = inputs.factors.numpy().astype(wide)
    upstream = upstream.numpy().astype(wide)
    slopes = np.abs(expected.weight) + 2 * case.options.z_loss * np.abs(expected.lse)
    slopes = np.where(np.isfinite(slopes), slopes, 0)
    valid = inputs.flat_targets.numpy() != case.options.ignore_index
    losses = np.where(valid, expected.loss * factors, 0)
    grads = np.where(valid[:, None], expected.grad * upstream[:, None], 0)
    grads = np.where(np.isnan(expected.grad), np.nan, grads)

    assert loss.dtype == accumulate_dtype(case.dtype)
    if case.reduction == "none":
        assert loss.shape == inputs.targets.shape
        plain_loss = plain_losses * inputs.factors.to(plain_losses.dtype)
        scale = float((np.abs(factors) * slopes).max(initial=0))
        assert_accurate("loss", loss.reshape(-1), losses, plain_loss, scale)
    else:
        # A sum may be as far off as its tokens are, whatever cancels.
        assert loss.shape == ()
        errors = np.abs(plain_losses.double().numpy() - expected.loss)
        least = float((np.abs(factors) * np.where(np.isfinite(errors), errors, 0).max(initial=0)).sum())
        plain_loss = (plain_losses * inputs.factors.to(plain_losses.dtype)).sum().reshape(1)
        scale = float((np.abs(factors) * slopes).sum())
        assert_accurate("loss", loss.reshape(1), losses.sum().reshape(1), plain_loss, scale, least_plain_error=least)
    assert grad.dtype == case.dtype
    assert grad.shape == inputs.logits.shape
    assert_accurate(
        "gradient", grad.reshape(-1, vocab_size), grads, plain_grad, float((np.abs(upstream) * slopes).max(initial=0)),
        extra_ulps=extra_ulps,
    )  # fmt: skip


@pytest.mark.parametrize("case", INTERPRETED_CASES if INTERPRETED else cases.ALL, ids=str)
def test_loss_and_gradient(case: Case, backend: str, device: str) -> None:
    """Every case of the table."""
    loss, grad = run(build(case).to(device), backend)
    inputs = build(case)
    # The interpreter truncates where a device rounds to bfloat16.
    truncation = 1 if INTERPRETED and case.dtype == BFLOAT16 else 0
    check(inputs, inputs.oracle(), loss.cpu(), grad.cpu(), truncation)
