"""Loss, gradient and statistics of a case by the public function, held to the oracle by the accuracy rule."""

from __future__ import annotations

import torch
from torch import Tensor

from mixce_kernels import MixCEStats, fused_mixce_loss
from support.cases import Case
from support.inputs import Inputs, build
from support.numerics import accumulate_dtype, assert_accurate, plain_loss_and_grad, to_numpy
from support.oracle import TokenResults, np


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
        upstream if spent is None else inputs.token_upstream, spent, inputs.plain_weighting(),
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


def weight_of(inputs: Inputs, stats: MixCEStats, dtype: np.dtype) -> np.ndarray:
    """The weights [N] that returned statistics stand for: some weightings magnify the roundings of these."""
    given = (to_numpy(one.reshape(-1), dtype) for one in (stats.nll, stats.q, stats.entropy, stats.collision))
    with np.errstate(all="ignore"):
        factor = inputs.oracle_weighting()(*given)
    eta = to_numpy(inputs.flat_eta, dtype)
    valid = inputs.flat_targets.cpu().numpy() != inputs.case.options.ignore_index
    weight = np.where(valid, eta + (1 - eta) * factor, 0)
    return np.where(np.isnan(to_numpy(stats.q.reshape(-1), dtype)), np.nan, weight)


def check_statistics(case: Case, stats: MixCEStats) -> None:
    """Each within float32's rounding of the oracle's; 0 where ignored, NaN where the row is."""
    inputs = build(case)
    expected = inputs.oracle()
    assert isinstance(stats, MixCEStats)
    dtype = accumulate_dtype(case.dtype)
    epsilon = torch.finfo(dtype).eps
    # nll, lse and entropy are differences of numbers as large as the row's finite logits: that is what a float32 of
    # theirs may be off by, and q and the weight, as exp(-nll), by as much relative to themselves.
    finite = inputs.flat_logits.double().nan_to_num(0, 0, 0).abs()
    spread = float(finite.max()) if finite.numel() else 0.0
    spread = min(spread, case.options.softcap or spread) * case.options.logit_scale + np.log(case.shape[-1]) + 1
    for name in ("nll", "q", "weight", "lse", "entropy", "collision"):
        result = getattr(stats, name)
        assert not result.requires_grad
        assert result.dtype == dtype
        assert result.shape == inputs.targets.shape
        wide = getattr(expected, name)
        if name == "weight" and case.weighting != "probability":
            wide = weight_of(inputs, stats, wide.dtype)
        magnitude = np.abs(wide) if name in ("q", "weight", "collision") else 1.0
        got = to_numpy(result.reshape(-1), wide.dtype)
        if name == "lse":
            # Of a row without a distribution it may be NaN or the limit, +-inf.
            got, wide = (np.where(np.isnan(expected.nll), 0, values) for values in (got, wide))
        assert (np.isnan(got) == np.isnan(wide)).all(), name
        assert (np.isposinf(got) == np.isposinf(wide)).all(), name
        finite_entries = np.isfinite(wide)
        error = np.abs(np.where(finite_entries, got, 0) - np.where(finite_entries, wide, 0))
        bound = np.broadcast_to(8 * epsilon * spread * magnitude + 1e-37, error.shape)
        assert (error <= bound)[finite_entries].all(), f"{name}: {error[finite_entries].max()} of {bound.max()}"
    assert stats.correct.dtype == torch.bool
    assert stats.correct.shape == inputs.targets.shape
    assert (stats.correct.reshape(-1).cpu().numpy() == expected.correct).all()
