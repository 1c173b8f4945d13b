"""Correct first: the oracle's results, and how far from them a contender may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.contenders import IGNORE_INDEX
from mixce_kernels import MixCEStats, mixce_loss_reference
from mixce_kernels.weightings import PROBABILITY, Weighting

# The logits repeat after this many rows: the oracle computes these alone, and the check is of the shape that is timed.
PERIOD = 32

# (logits [N, V], targets [N], eta) -> losses and weights [N]
LossesOf = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


class FewRows:
    """The rows that repeat, of which the oracle computes the results, and how they make up all of them."""

    def __init__(self, dtype: torch.dtype, rows: int, vocab: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.period = min(PERIOD, rows)
        few = torch.randn(self.period, vocab, generator=generator) * 2
        self.few_targets = torch.randint(vocab, (self.period,), generator=generator)
        # Random logits never reach a confident token: every second row is one, and every fourth is all but certain.
        for rows_of, more in ((slice(0, None, 4), 15.0), (slice(2, None, 4), 25.0)):
            few[rows_of].scatter_add_(1, self.few_targets[rows_of, None], torch.full((len(few[rows_of]), 1), more))
        self.index = torch.arange(rows) % self.period
        self.few = few.to(dtype)
        self.few_masked = self.few_targets.clone()
        self.few_masked[1 :: max(self.period // 4, 4)] = IGNORE_INDEX


class Expected:
    """Loss and gradient in float64, and how far from them a result may be.

    The largest error may be twice that of a plain formula in float32, plus one ulp of the result's type at the largest
    magnitude, plus two float32 epsilons of the largest factor (upstream gradient times weight) of a token. The mean of
    the losses may be as far off as a token's loss is, whatever cancels in the plain formula's.
    """

    def __init__(
        self, inputs: FewRows, eta: float, oracle: LossesOf | None = None, plain: LossesOf | None = None
    ) -> None:
        self._ends = torch.cat([inputs.index[: inputs.period], inputs.index[-inputs.period :]])
        valid = inputs.few_masked != IGNORE_INDEX
        times = torch.bincount(inputs.index, minlength=inputs.period).double()  # [period]
        share = torch.where(valid, 1.0, 0.0) / (times * valid).sum()  # [period]
        self.loss, losses, self.grad, weight = _loss_and_grad(
            oracle or oracle_losses, inputs, eta, share, torch.float64
        )
        loss, rounded_losses, grad, _ = _loss_and_grad(plain or plain_losses, inputs, eta, share, torch.float32)
        slack = 2 * torch.finfo(torch.float32).eps * weight
        token_error = float((rounded_losses.double() - losses)[valid].abs().max())
        self._loss_allowed = 2 * max(abs(loss - self.loss), token_error) + slack
        grad = grad.to(inputs.few.dtype)
        grad_error = float((grad.double() - self.grad).abs().max())
        self.grad_allowed = 2 * grad_error + ulp(float(self.grad.abs().max()), grad.dtype) + slack * float(share.max())

    def compare(self, loss: Tensor, grad: Tensor | None = None) -> Errors:
        """The errors of a loss and of the first and last `period` rows of a gradient [N, V]."""
        loss_error = abs(float(loss.detach()) - self.loss)
        # Some contenders' loss is of the logits' type.
        dtype = max(torch.float32, loss.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        loss_allowed = self._loss_allowed + ulp(abs(self.loss), dtype)
        grad_error = 0.0
        if grad is not None:
            ends = torch.cat([grad[: len(self.grad)], grad[-len(self.grad) :]]).cpu().double()
            grad_error = float((ends - self.grad[self._ends]).abs().max())
        return Errors(loss_error, loss_allowed, grad_error, self.grad_allowed)


def _loss_and_grad(
    losses_of: LossesOf,
    inputs: FewRows,
    eta: float,
    share: Tensor,  # [period], a token's part of the mean, 0 where ignored
    dtype: torch.dtype,
) -> tuple[float, Tensor, Tensor, float]:
    """The mean loss of all rows, computed in `dtype`.

    Also the losses [period], the mean's gradient [period, V] and the largest weight of a token.
    """
    leaf = inputs.few.to(dtype).requires_grad_()
    token_losses, weights = losses_of(leaf, inputs.few_masked, eta)
    (grad,) = torch.autograd.grad(token_losses, leaf, share.to(dtype))
    token_losses = token_losses.detach()
    losses, valid = token_losses[inputs.index], share[inputs.index] > 0
    if eta == 1.0:
        # PyTorch's own mean for cross-entropy, which adds up in another order than a sum does.
        loss = F.nll_loss(-losses.unsqueeze(-1), torch.where(valid, 0, IGNORE_INDEX), ignore_index=IGNORE_INDEX)
    else:
        loss = (losses * valid).sum() / valid.sum()
    return float(loss), token_losses, grad, float(weights.max())


def oracle_losses(
    logits: Tensor, targets: Tensor, eta: float, weighting: Weighting = PROBABILITY
) -> tuple[Tensor, Tensor]:
    """Losses and weights [N] of the package's oracle."""
    result = mixce_loss_reference(
        logits, targets, eta, ignore_index=IGNORE_INDEX, weighting=weighting, reduction="none", return_stats=True
    )
    assert isinstance(result, tuple)
    return result[0], result[1].weight


def plain_losses(
    logits: Tensor, targets: Tensor, eta: float, weighting: Weighting = PROBABILITY
) -> tuple[Tensor, Tensor]:
    """Losses and weights [N] by PyTorch's own cross-entropy: the measure of what rounding costs."""
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    with torch.no_grad():
        log_p = F.log_softmax(logits, -1)
        p = log_p.exp()
        none = torch.zeros_like(nll)
        stats = MixCEStats(nll, torch.exp(-nll), none, none, -(p * log_p).sum(-1), p.square().sum(-1), none)
        weights = eta + (1.0 - eta) * weighting(stats)
    return weights * nll, weights


def results_of(program: Any, inputs: Any) -> list[Tensor]:
    """Loss and gradients of one call at full size, with some tokens ignored."""
    inputs.restore()
    results: list[Tensor] = []
    for step in program.steps(inputs, inputs.masked_targets, results):
        step()
    return results


@dataclass(frozen=True)
class Errors:
    """How far a contender's results are from the oracle's, and how far they may be."""

    loss: float
    loss_allowed: float
    grad: float
    grad_allowed: float

    def wrong(self) -> str | None:
        """A sentence, or None if the results are right; a NaN is not."""
        if not self.loss <= self.loss_allowed:
            return f"wrong: the loss is off by {self.loss:.2e}, {self.loss_allowed:.2e} allowed"
        if not self.grad <= self.grad_allowed:
            return f"wrong: the gradient is off by {self.grad:.2e}, {self.grad_allowed:.2e} allowed"
        return None


def ulp(magnitude: float, dtype: torch.dtype) -> float:
    """The distance between neighbours of `dtype` at `magnitude`."""
    info = torch.finfo(dtype)
    if magnitude < info.tiny:
        return info.tiny * info.eps
    return float(2.0 ** math.floor(math.log2(magnitude)) * info.eps)
