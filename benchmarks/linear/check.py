"""Correct first, for a loss of hidden states and a head's weight: inputs, oracle, and how far from it one may be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.check import PERIOD, oracle_losses, plain_losses, ulp
from harness.contenders import IGNORE_INDEX

# Of the vocabulary: the oracle's gradient of the weight is made in pieces of this many rows.
PIECE = 8192


class LinearInputs:
    """Hidden states, weight and targets of one shape, and what the oracle says of them.

    The hidden states repeat after `period` rows, so that a float64 oracle of the very shape that is timed needs the
    logits of these rows alone.
    """

    def __init__(self, dtype: torch.dtype, rows: int, hidden_size: int, vocab: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.device = device
        self.period = min(PERIOD, rows)
        weight = torch.empty(vocab, hidden_size, device=device).normal_(
            0.0, 2.0 * hidden_size**-0.5, generator=generator
        )
        few = torch.empty(self.period, hidden_size, device=device).normal_(generator=generator)
        few_targets = torch.randint(vocab, (self.period,), device=device, generator=generator)
        # Random logits never reach a confident token: every second row is one, and every fourth is all but certain.
        for rows_of, more in ((slice(0, None, 4), 15.0), (slice(2, None, 4), 25.0)):
            towards = weight[few_targets[rows_of]]
            few[rows_of] += more * towards / towards.square().sum(-1, keepdim=True)
        self.index = torch.arange(rows, device=device) % self.period
        self.few = few.to(dtype)  # [period, D]
        self.few_masked = few_targets.clone()
        self.few_masked[1 :: max(self.period // 4, 4)] = IGNORE_INDEX
        self.pristine = self.few[self.index]  # [N, D]
        self.hidden = self.pristine.clone().requires_grad_()  # [N, D]
        self.weight = weight.to(dtype).requires_grad_()  # [V, D]
        self.targets = few_targets[self.index]  # [N]
        self.masked_targets = self.few_masked[self.index]  # [N], some ignored: for the check alone
        self._expected: dict[tuple[float, bool], LinearExpected] = {}

    def expected(self, eta: float, rounds_logits: bool) -> LinearExpected:
        """The oracle's results with this eta, and how far off a contender may be."""
        rounds_logits = rounds_logits and self.weight.dtype in (torch.bfloat16, torch.float16)
        if (eta, rounds_logits) not in self._expected:
            self._expected[eta, rounds_logits] = LinearExpected(self, eta, rounds_logits)
        return self._expected[eta, rounds_logits]

    @property
    def gradients_nbytes(self) -> int:
        """Bytes of both gradients, which every contender has to return."""
        return sum(one.numel() * one.element_size() for one in (self.hidden, self.weight))

    def restore(self) -> None:
        """Puts back the hidden states, also for contenders that leave them: all find the caches in the same state."""
        with torch.no_grad():
            self.hidden.copy_(self.pristine)


class LinearExpected:
    """Loss and gradients in float64, and how far from them a result may be.

    The largest error may be twice that of the plain formula computed in float32 from the same hidden states and weight,
    plus one ulp of the result's type at the largest magnitude, plus what two float32 epsilons of the largest factor
    (upstream gradient times token weight) of a logit's gradient come to. A contender that by its nature makes logits of
    the inputs' half-precision type is held to the plain formula on such logits instead.
    """

    def __init__(self, inputs: LinearInputs, eta: float, rounds_logits: bool) -> None:
        self._index = inputs.index
        self._few = inputs.few.double()  # [period, D]
        valid = inputs.few_masked != IGNORE_INDEX
        times = torch.bincount(inputs.index, minlength=inputs.period).double()  # [period]
        share = valid / (times * valid).sum()  # [period], a token's part of the mean
        weight = inputs.weight.detach().double()
        logits = (self._few @ weight.T).requires_grad_()  # [period, V]
        losses, factors = oracle_losses(logits, inputs.few_masked, eta)
        (grad_logits,) = torch.autograd.grad(losses, logits, share)
        losses = losses.detach()
        self._grad_hidden = grad_logits @ weight  # [period, D]
        self._grad_logits_of_all = grad_logits * times.unsqueeze(-1)  # [period, V]
        self._loss = float((losses * times * share).sum())
        del weight, logits, grad_logits

        loss, rounded_losses, grads = _plain(inputs, eta, rounds_logits)
        found = self._distances(*grads)
        slack = 2 * torch.finfo(torch.float32).eps * float(factors.max())
        token_error = float((rounded_losses.double() - losses[self._index])[valid[self._index]].abs().max())
        self._loss_allowed = 2 * max(abs(loss - self._loss), token_error) + slack
        largest = (float(inputs.weight.detach().abs().max()), float(inputs.few.abs().max()))
        self._grads_allowed = [
            2 * error + ulp(magnitude, grad.dtype) + slack * float(share.max()) * most
            for (error, magnitude), grad, most in zip(found, grads, largest, strict=True)
        ]

    def compare(self, loss: Tensor, *grads: Tensor) -> LinearErrors:
        """The errors of a loss, and of both gradients [N, D] and [V, D] or of none."""
        # Some contenders' loss is of the inputs' type.
        dtype = max(torch.float32, loss.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        of_loss = (abs(float(loss.detach()) - self._loss), self._loss_allowed + ulp(abs(self._loss), dtype))
        errors = [error for error, _ in self._distances(*grads)] if grads else [0.0, 0.0]
        return LinearErrors(*of_loss, errors[0], self._grads_allowed[0], errors[1], self._grads_allowed[1])

    def _distances(self, grad_hidden: Tensor, grad_weight: Tensor) -> list[tuple[float, float]]:
        """Of each gradient, the largest error and the oracle's largest magnitude."""
        of_hidden = [(grad_hidden, self._grad_hidden[self._index])]
        found = []
        for pieces in (of_hidden, self._weight_pieces(grad_weight)):
            # Tensors, since Python's max loses a NaN.
            both = [torch.stack([(got.double() - want).abs().max(), want.abs().max()]) for got, want in pieces]
            error, magnitude = torch.stack(both).amax(0).tolist()
            found.append((error, magnitude))
        return found

    def _weight_pieces(self, grad_weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for got, grad_logits in zip(
            grad_weight.split(PIECE), self._grad_logits_of_all.split(PIECE, dim=1), strict=True
        ):
            yield got, grad_logits.T @ self._few


def _plain(inputs: LinearInputs, eta: float, rounds_logits: bool) -> tuple[float, Tensor, tuple[Tensor, Tensor]]:
    """The plain formula in float32 at full size: mean loss, losses [N], and gradients in the inputs' type."""
    dtype = torch.float64 if inputs.weight.dtype == torch.float64 else torch.float32
    hidden, weight = (one.detach().to(dtype).requires_grad_() for one in (inputs.hidden, inputs.weight))
    logits = F.linear(hidden, weight)
    if rounds_logits:
        logits = logits.to(inputs.weight.dtype).to(dtype)
    losses, _ = plain_losses(logits, inputs.masked_targets, eta)
    loss = losses.sum() / (inputs.masked_targets != IGNORE_INDEX).sum()
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    return (
        float(loss.detach()),
        losses.detach(),
        (grad_hidden.to(inputs.hidden.dtype), grad_weight.to(inputs.weight.dtype)),
    )


@dataclass(frozen=True)
class LinearErrors:
    """How far a contender's results are from the oracle's, and how far they may be."""

    loss_error: float
    loss_allowed: float
    grad_hidden_error: float
    grad_hidden_allowed: float
    grad_weight_error: float
    grad_weight_allowed: float

    def wrong(self) -> str | None:
        """A sentence, or None if the results are right; a NaN is not."""
        for name, error, allowed in (
            ("loss", self.loss_error, self.loss_allowed),
            ("gradient of hidden", self.grad_hidden_error, self.grad_hidden_allowed),
            ("gradient of weight", self.grad_weight_error, self.grad_weight_allowed),
        ):
            if not error <= allowed:
                return f"wrong: the {name} is off by {error:.2e}, {allowed:.2e} allowed"
        return None
