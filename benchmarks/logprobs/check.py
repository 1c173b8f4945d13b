"""Correct first, for log-probabilities and entropies: inputs, their results in float64, and how far off one may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.check import ulp
from linear.check import LinearInputs
from logprobs.plan import LogprobCell
from vocab.check import Inputs

RESULTS = ("logprobs", "entropy")
HALF_TYPES = (torch.bfloat16, torch.float16)


def plain_results(logits: Tensor, targets: Tensor, count: int = len(RESULTS)) -> tuple[Tensor, ...]:
    """The first `count` of RESULTS, [N] each, as one writes them in PyTorch."""
    log_p = F.log_softmax(logits, -1)
    logprobs = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return (logprobs,) if count == 1 else (logprobs, -(log_p.exp() * log_p).sum(-1))


class LogitsInputs(Inputs):
    """Logits, targets and upstream gradients of one shape; logits and upstream gradients repeat after some rows."""

    leaf_names = ("logits",)

    def __init__(self, dtype: torch.dtype, rows: int, vocab: int, device: torch.device) -> None:
        super().__init__(dtype, rows, vocab, device)
        self.leaves: tuple[Tensor, ...] = (self.logits,)
        self.few_upstreams = _upstreams(self.period, torch.device("cpu"))  # of log-probabilities and of entropies
        self.upstreams = self.few_upstreams.to(device)[:, self.index.to(device)]  # [2, N]
        # The factor of a rounding error in a leaf's gradient.
        self.largest = (1.0,)
        self.largest_logit = float(self.few.abs().max())

    @property
    def gradients_nbytes(self) -> int:
        """Bytes of the gradient."""
        return self.nbytes

    def exact(self, count: int) -> list[Tensor]:
        """In float64, of the rows that repeat: the first `count` of RESULTS, and the gradient through them."""
        return self._of_few(count, self.few.double())

    def plain(self, count: int, rounds: bool) -> list[Tensor]:
        """The same in float32, or in the logits' type; the gradient is of the logits' type."""
        *results, grad = self._of_few(count, self.few if rounds else self.few.float())
        return [*results, grad.to(self.few.dtype)]

    def _of_few(self, count: int, logits: Tensor) -> list[Tensor]:
        logits = logits.clone().requires_grad_()
        return _with_gradients(plain_results(logits, self.few_targets, count), (logits,), self.few_upstreams)


class HiddenInputs(LinearInputs):
    """Hidden states, weight, targets and upstream gradients of one shape; all but the weight repeat after some rows."""

    leaf_names = ("hidden", "weight")

    def __init__(self, dtype: torch.dtype, rows: int, hidden_size: int, vocab: int, device: torch.device) -> None:
        super().__init__(dtype, rows, hidden_size, vocab, device)
        self.leaves: tuple[Tensor, ...] = (self.hidden, self.weight)
        self.few_upstreams = _upstreams(self.period, device)
        self.upstreams = self.few_upstreams[:, self.index]
        # The factor of a rounding error in a leaf's gradient: what a logit's gradient is multiplied with.
        self.largest = (float(self.weight.detach().abs().max()), float(self.few.abs().max()))
        with torch.no_grad():
            self.largest_logit = float((self.few @ self.weight.T).abs().max())

    def exact(self, count: int) -> list[Tensor]:
        """In float64, of the rows that repeat: the first `count` of RESULTS, and the gradients through them.

        The gradient of the weight is that of all rows.
        """
        few, weight = self.few.double(), self.weight.detach().double()
        logits = (few @ weight.T).requires_grad_()
        *results, grad_logits = _with_gradients(
            plain_results(logits, self.targets[: self.period], count), (logits,), self.few_upstreams
        )
        times = torch.bincount(self.index, minlength=self.period).double()
        return [*results, grad_logits @ weight, (grad_logits * times.unsqueeze(-1)).T @ few]

    def plain(self, count: int, rounds: bool) -> list[Tensor]:
        """The same of all rows in float32, of logits in float32 or rounded to the inputs' type."""
        hidden, weight = (one.detach().float().requires_grad_() for one in self.leaves)
        logits = F.linear(hidden, weight)
        if rounds:
            logits = logits.to(self.weight.dtype).float()
        *results, grad_hidden, grad_weight = _with_gradients(
            plain_results(logits, self.targets, count), (hidden, weight), self.upstreams
        )
        return [*results, grad_hidden.to(self.hidden.dtype), grad_weight.to(self.weight.dtype)]


LogprobInputs = LogitsInputs | HiddenInputs


def inputs_of(cell: LogprobCell, device: torch.device) -> LogprobInputs:
    """The tensors of a cell."""
    dtype = getattr(torch, cell.dtype)
    if cell.hidden_size is None:
        return LogitsInputs(dtype, cell.rows, cell.vocab, device)
    return HiddenInputs(dtype, cell.rows, cell.hidden_size, cell.vocab, device)


class Oracle:
    """Log-probabilities, entropies and gradients in float64, and how far from them a contender's may be.

    The largest error may be twice that of the plain formula in float32 from the same inputs, plus one ulp of the
    result's type at the largest magnitude, plus what two float32 epsilons of the largest factor of a token come to: 1
    for a result, and for a gradient |upstream of its log-probability| + |upstream of its entropy|. A contender that by
    its nature rounds to the inputs' half-precision type is held to the plain formula with that rounding instead. One
    that adds up logits without a shift has their digits and no more: its factors are twice the largest logit as large.
    """

    def __init__(self, inputs: LogprobInputs) -> None:
        self._inputs = inputs
        self._exact: dict[int, list[Tensor]] = {}
        self._allowed: dict[tuple[int, bool, bool], list[float]] = {}

    def compare(
        self, results: Sequence[Tensor], count: int, *, rounds: bool = False, unshifted: bool = False
    ) -> LogprobErrors:
        """The errors of a call's results: the first `count` of RESULTS [N], and gradients where it computed some.

        `rounds` and `unshifted` are of its contender's nature.
        """
        names = (*RESULTS[:count], *(f"grad_{name}" for name in self._inputs.leaf_names))
        if len(results) not in (count, len(names)):
            raise ValueError(f"expected {', '.join(names[:count])} and no or all gradients, got {len(results)} tensors")
        exact = self._exact_of(count)
        allowed = self._allowed_of(count, rounds and self._inputs.pristine.dtype in HALF_TYPES, unshifted)
        known = zip(names, results, exact, allowed, strict=False)
        return LogprobErrors({name: (distance(got, want), most) for name, got, want, most in known})

    def _exact_of(self, count: int) -> list[Tensor]:
        if count not in self._exact:
            self._exact[count] = self._inputs.exact(count)
        return self._exact[count]

    def _allowed_of(self, count: int, rounds: bool, unshifted: bool) -> list[float]:
        key = (count, rounds, unshifted)
        if key not in self._allowed:
            upstream = float(self._inputs.few_upstreams[:count].abs().sum(0).max())
            factors = [*[1.0] * count, *(upstream * largest for largest in self._inputs.largest)]
            epsilons = 2 * torch.finfo(torch.float32).eps
            if unshifted:
                epsilons *= max(1.0, 2 * self._inputs.largest_logit)
            plain = self._inputs.plain(count, rounds)
            self._allowed[key] = [
                2 * distance(measure, exact) + ulp(float(exact.abs().max()), measure.dtype) + epsilons * factor
                for measure, exact, factor in zip(plain, self._exact_of(count), factors, strict=True)
            ]
        return self._allowed[key]


@dataclass(frozen=True)
class LogprobErrors:
    """By name of a result or gradient, its largest error and the largest that is allowed."""

    found: dict[str, tuple[float, float]]

    def wrong(self) -> str | None:
        """A sentence, or None if the results are right; a NaN is not."""
        for name, (error, allowed) in self.found.items():
            if not error <= allowed:
                return f"wrong: {name} is off by {error:.2e}, {allowed:.2e} allowed"
        return None


def distance(got: Tensor, exact: Tensor) -> float:
    """The largest error of `got`, whose rows may repeat those of `exact`."""
    exact = exact.to(got.device)
    parts = got.detach().split(len(exact))
    # Tensors, since Python's max loses a NaN.
    return float(torch.stack([(part.double() - exact[: len(part)]).abs().max() for part in parts]).max())


def _upstreams(period: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, period, generator=generator).to(device)


def _with_gradients(results: tuple[Tensor, ...], leaves: tuple[Tensor, ...], upstreams: Tensor) -> list[Tensor]:
    """Results, and the gradients of `leaves` through all of them."""
    given = [upstream.to(one.dtype) for one, upstream in zip(results, upstreams, strict=False)]
    grads = torch.autograd.grad(results, leaves, given)
    return [*(one.detach() for one in results), *grads]
