"""Weightings: the f of a token's weight w = eta + (1 - eta) f, a function of the token's statistics.

A token's loss is w * ce, and no gradient goes through w. The weighting of MixCE is `Probability`, the default; the
others are the reweightings of supervised fine-tuning that need no more than the sums of one pass over the vocabulary.
The kernels know each of them. Any other function of `MixCEStats` serves as well, after a pass for the statistics.

    fused_mixce_loss(logits, targets, eta=0.0, weighting=Power(0.5))
    fused_mixce_loss(logits, targets, eta=0.1, weighting=lambda stats: stats.q.sqrt())

q and the entropy are those after softcap and scale, without label smoothing. 0^0 is 1, and f is NaN where q is.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeGuard

import torch
from torch import Tensor

from mixce_kernels.stats import MixCEStats
from mixce_kernels.values import as_float, token_tensor

__all__ = [
    "Band",
    "CollisionPower",
    "Entropy",
    "Focal",
    "Power",
    "Probability",
    "TaiLr",
    "Variance",
    "Weighting",
    "parse",
]


class _Range(NamedTuple):
    """The numbers that a parameter may be: from `low`, unless it is `above` that, to `high`; finite ones."""

    words: str
    low: float
    high: float = math.inf
    above: bool = False

    def holds(self, value: Any) -> Any:
        """Whether a number is one of these, or which of a tensor's numbers are."""
        not_below = value > self.low if self.above else value >= self.low
        return not_below & (value <= self.high) & (value < math.inf)


_NOT_NEGATIVE = _Range("finite and not negative", 0.0)
_POSITIVE = _Range("positive and finite", 0.0, above=True)
_SHARE = _Range("in [0, 1]", 0.0, 1.0)


class Weighting:
    """A weighting that the kernels know: callable on `MixCEStats`, by the formula in its class's docstring.

    Its parameters are numbers, or floating tensors that broadcast to targets' shape: these are read on the device, as
    eta is, and must not require a gradient. `repr` gives what `parse` reads.
    """

    ranges: ClassVar[dict[str, _Range]] = {}
    # Whether f is made from the entropy or the collision probability: sums that the loss alone does not need.
    needs_sums: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the parameters that are numbers.

        Raises:
            TypeError: a parameter is neither a number nor a tensor.
            ValueError: a number is out of range.
        """
        for name, allowed in self.ranges.items():
            value = getattr(self, name)
            if not isinstance(value, Tensor) and not allowed.holds(as_float(name, value)):
                raise ValueError(f"expected {name} to be {allowed.words}, got {value}")

    def __call__(self, stats: MixCEStats) -> Tensor:
        """The tokens' f [...], in the dtype of their statistics."""
        raise NotImplementedError

    def parameters(self) -> tuple[float | Tensor, ...]:
        """The parameters in their order."""
        return tuple(getattr(self, name) for name in self.ranges)

    def to(self, device: torch.device) -> Weighting:
        """With its tensors on a device, without waiting for them."""
        return self._with_tensors(lambda _, tensor: tensor.to(device, non_blocking=True))

    def on_tokens(self, targets: Tensor, place: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Weighting:
        """With every tensor among the parameters as `place` has it after it was checked, of targets' shape [...].

        Raises:
            TypeError: a tensor is not floating.
            ValueError: a tensor requires grad, lies elsewhere or does not broadcast.
        """
        return self._with_tensors(lambda name, tensor: place(token_tensor(name, tensor, targets)))

    def _with_tensors(self, change: Callable[[str, Tensor], Tensor]) -> Weighting:
        changed = {
            name: change(name, value) for name in self.ranges if isinstance(value := getattr(self, name), Tensor)
        }
        if not changed:
            return self
        return dataclasses.replace(self, **changed)  # type: ignore[type-var]  # only dataclasses have parameters

    def check_values(self) -> None:
        """Reads the tensors among the parameters; raises ValueError where an entry is out of range."""
        for name, allowed in self.ranges.items():
            value = getattr(self, name)
            if isinstance(value, Tensor) and not allowed.holds(value).all():
                raise ValueError(f"expected every entry of {name} to be {allowed.words}, got one that is not")


CustomWeighting = Callable[[MixCEStats], Tensor]


@dataclass(frozen=True)
class Probability(Weighting):
    """f = q: MixCE (Zhang et al., ACL 2023, arXiv 2305.16958), and with eta = 0 DFT (arXiv 2508.05629)."""

    def __call__(self, stats: MixCEStats) -> Tensor:
        return stats.q


@dataclass(frozen=True)
class Power(Weighting):
    """f = q^alpha, alpha >= 0: the gradient of (1 - q^alpha) / alpha.

    Source: "Beyond Log Likelihood" (arXiv 2510.00526). The values of the two losses differ, their gradients do not.
    """

    alpha: float | Tensor

    ranges: ClassVar[dict[str, _Range]] = {"alpha": _NOT_NEGATIVE}

    def __call__(self, stats: MixCEStats) -> Tensor:
        return _power_of_q(stats.nll, _wide(stats.nll, self.alpha))


@dataclass(frozen=True)
class TaiLr(Weighting):
    """f = max(q / (gamma + (1 - gamma) q), floor), gamma and floor in [0, 1]: 1 for gamma = 0, q for gamma = 1.

    Source: "Tailoring Language Generation Models under Total Variation Distance" (ICLR 2023).
    """

    gamma: float | Tensor
    floor: float | Tensor = 0.0

    ranges: ClassVar[dict[str, _Range]] = {"gamma": _SHARE, "floor": _SHARE}

    def __call__(self, stats: MixCEStats) -> Tensor:
        q, gamma = stats.q.double(), _wide(stats.q, self.gamma)
        share = torch.where((gamma == 0) & ~q.isnan(), 1.0, q / (gamma + (1 - gamma) * q))
        return torch.maximum(share, _wide(q, self.floor)).to(stats.q.dtype)


@dataclass(frozen=True)
class Band(Weighting):
    """f = 1 where low <= q <= high, else 0; q is compared as the statistics have it.

    Sources: ProFit (arXiv 2601.09195) and the thresholds of "Beyond Log Likelihood" (arXiv 2510.00526). Tokens outside
    of the band stay in the divisor of reduction "mean".
    """

    low: float | Tensor = 0.0
    high: float | Tensor = 1.0

    ranges: ClassVar[dict[str, _Range]] = {"low": _SHARE, "high": _SHARE}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.low, Tensor) and not isinstance(self.high, Tensor) and self.low > self.high:
            raise ValueError(f"expected low <= high, got low={self.low} and high={self.high}")

    def __call__(self, stats: MixCEStats) -> Tensor:
        q = stats.q
        within = (q >= _like(q, self.low)) & (q <= _like(q, self.high))
        return torch.where(q.isnan(), q, within.to(q.dtype))


@dataclass(frozen=True)
class Focal(Weighting):
    """f = (1 - q)^gamma, gamma >= 0: the factor of the focal loss (arXiv 1708.02002), here without a gradient."""

    gamma: float | Tensor

    ranges: ClassVar[dict[str, _Range]] = {"gamma": _NOT_NEGATIVE}

    def __call__(self, stats: MixCEStats) -> Tensor:
        return _power(_not_q(stats.nll), _wide(stats.q, self.gamma)).to(stats.q.dtype)


@dataclass(frozen=True)
class Variance(Weighting):
    """f = q (1 - q), the variance of whether the target is drawn: CHORD's phi (arXiv 2508.11408)."""

    def __call__(self, stats: MixCEStats) -> Tensor:
        return (stats.q * _not_q(stats.nll)).to(stats.q.dtype)


@dataclass(frozen=True)
class Entropy(Weighting):
    """f = (H / scale)^alpha, H the entropy of the row in nats, alpha >= 0, scale > 0.

    Source: EAFT (arXiv 2601.02151), which takes the entropy of the 20 likeliest tokens and a scale of 3, about log 20.
    """

    alpha: float | Tensor = 1.0
    scale: float | Tensor = 3.0

    ranges: ClassVar[dict[str, _Range]] = {"alpha": _NOT_NEGATIVE, "scale": _POSITIVE}
    needs_sums: ClassVar[bool] = True

    def __call__(self, stats: MixCEStats) -> Tensor:
        share = stats.entropy.double().clamp(min=0.0) / _wide(stats.q, self.scale)
        factor = _power(share, _wide(stats.q, self.alpha)).to(stats.q.dtype)
        return torch.where(stats.q.isnan(), stats.q, factor)


@dataclass(frozen=True)
class CollisionPower(Weighting):
    """f = q^c with c = sum_j p_j^2, the probability that two draws are the same token.

    Source: DEFT (arXiv 2602.11424), whose loss (1 - q^c) / c has this gradient.
    """

    needs_sums: ClassVar[bool] = True

    def __call__(self, stats: MixCEStats) -> Tensor:
        return _power_of_q(stats.nll, stats.collision)


@dataclass(frozen=True)
class Given(Weighting):
    """f as it is given: what a function of the caller's has found. The kernels know it, `parse` does not."""

    factor: float | Tensor

    ranges: ClassVar[dict[str, _Range]] = {"factor": _Range("finite", -math.inf)}

    def __call__(self, stats: MixCEStats) -> Tensor:
        return torch.where(stats.q.isnan(), stats.q, _like(stats.q, self.factor))


PROBABILITY = Probability()
# By these numbers the kernels know them: the twin of `Weighting` in csrc/params.h.
KINDS: tuple[type[Weighting], ...] = (
    Probability, Power, TaiLr, Band, Focal, Variance, Entropy, CollisionPower, Given
)  # fmt: skip


def is_built_in(weighting: object) -> TypeGuard[Weighting]:
    """Whether the kernels know it; a class of the caller's that derives from one of these is a function like others."""
    return type(weighting) in KINDS


def parse(text: str) -> Weighting:
    """The weighting that a string such as "Power(alpha=0.5)" or "Variance" names, for configurations.

    Args:
        text: the name of a class of this module, with its parameters as numbers in the manner of a call; the `repr` of
            a weighting whose parameters are numbers.

    Returns:
        The weighting.

    Raises:
        ValueError: the string names none, its parameters are not that weighting's, or one is out of range.
        TypeError: a parameter is not a number.
    """
    classes = {kind.__name__: kind for kind in KINDS if kind is not Given}
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
        kind = classes[call.func.id]  # type: ignore[attr-defined]  # or it is no name
        arguments = [ast.literal_eval(argument) for argument in call.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, KeyError, AttributeError, ValueError):
        raise ValueError(f"expected one of {', '.join(classes)} with numbers, got {text!r}") from None
    expected = list(kind.ranges)
    if len(arguments) > len(expected) or set(named) - set(expected[len(arguments) :]):
        raise ValueError(f"expected {kind.__name__} with the parameters {', '.join(expected) or 'none'}, got {text!r}")
    try:
        return kind(*arguments, **named)
    except TypeError as error:
        raise type(error)(f"expected {kind.__name__} with its parameters, got {text!r} ({error})") from None


def _like(tensor: Tensor, value: float | Tensor) -> Tensor:
    """A parameter as a tensor of another's dtype and device."""
    return value.to(tensor.dtype) if isinstance(value, Tensor) else tensor.new_full((), value)


def _wide(tensor: Tensor, value: float | Tensor) -> Tensor:
    """A parameter in float64, on another tensor's device: of one token this arithmetic costs nothing."""
    return value.double() if isinstance(value, Tensor) else tensor.new_full((), value, dtype=torch.float64)


def _not_q(nll: Tensor) -> Tensor:
    """1 - q in float64, with digits for a q near 1, and no less than 0 by a rounding."""
    return torch.expm1(-nll.double()).neg().clamp(min=0.0)


def _power_of_q(nll: Tensor, exponent: Tensor) -> Tensor:
    """q^exponent by log q, which has digits where q has none left."""
    log_factor = torch.where((exponent == 0) & ~nll.isnan(), 0.0, -exponent * nll.double())
    return torch.exp(log_factor).to(nll.dtype)


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    """base^exponent; NaN where the base is, also for an exponent of 0."""
    return torch.where(base.isnan(), base, base.pow(exponent))
