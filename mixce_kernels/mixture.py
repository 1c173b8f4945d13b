"""`Mixture`: eta and the weighting of a call, as operators and kernels get them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixce_kernels.stats import MixCEStats
from mixce_kernels.values import concrete, describe
from mixce_kernels.weightings import KINDS, PROBABILITY, CustomWeighting, Weighting, is_built_in

# The most parameters that a weighting has.
N_PARAMETERS = 2


class Mixture(NamedTuple):
    """What a token's weight eta + (1 - eta) f is made from; see `weightings`."""

    eta: Tensor | None = None  # [...]
    eta_value: float = 1.0  # used where eta is None
    weighting: int = 0  # its place in weightings.KINDS
    parameters: Tensor | None = None  # [N_PARAMETERS, ...] of the type of arithmetic
    first: float = 0.0  # the parameters where these are None
    second: float = 0.0

    @classmethod
    def of(cls, eta: float | Tensor, weighting: Weighting, targets: Tensor, dtype: torch.dtype) -> Mixture:
        """From eta and a weighting that were checked, for tokens `targets` [...] and arithmetic in `dtype`."""
        eta_tensor, eta_value = (eta, 0.0) if isinstance(eta, Tensor) else (None, eta)
        if weighting is PROBABILITY:
            return cls(eta_tensor, eta_value)
        kind, values = KINDS.index(type(weighting)), weighting.parameters()
        if not values:
            return cls(eta_tensor, eta_value, kind)
        if any(isinstance(value, Tensor) for value in values):
            # One tensor, and a copy: the forward's weights count, also where one is overwritten before backward.
            rows = [
                value.to(dtype).expand(targets.shape)
                if isinstance(value, Tensor)
                else torch.full(targets.shape, concrete(value), dtype=dtype, device=targets.device)
                for value in (*values, *(0.0,) * (N_PARAMETERS - len(values)))
            ]
            return cls(eta_tensor, eta_value, kind, torch.stack(rows))
        first, second, *_ = (*(float(concrete(value)) for value in values), *(0.0,) * N_PARAMETERS)
        return cls(eta_tensor, eta_value, kind, None, first, second)

    def tensors(self) -> tuple[Tensor | None, Tensor | None]:
        """Eta and the parameters, None for those that are numbers."""
        return self.eta, self.parameters

    def with_tensors(self, eta: Tensor | None, parameters: Tensor | None) -> Mixture:
        """With other tensors in their places."""
        return self._replace(eta=eta, parameters=parameters)

    def facts(self) -> dict[str, float | Tensor]:
        """What the ranks of a group must have in common, by name; the values of tensors are not compared."""
        first, second = (self.first, self.second) if self.parameters is None else (self.parameters,) * 2
        return {"eta": self.eta_of_tokens(), "weighting": self.weighting, "first": first, "second": second}

    def flat(self) -> Mixture:
        """For tokens [N] in place of [...]."""
        eta, parameters = self.tensors()
        return self.with_tensors(
            None if eta is None else eta.reshape(-1),
            None if parameters is None else parameters.reshape(N_PARAMETERS, -1),
        )

    def of_rows(self, rows: slice | Tensor) -> Mixture:
        """For some of the tokens [N]."""
        eta, parameters = self.tensors()
        return self.with_tensors(
            None if eta is None else eta[rows], None if parameters is None else parameters[:, rows]
        )

    def eta_of_tokens(self) -> float | Tensor:
        """Eta as the plain formula takes it."""
        return self.eta_value if self.eta is None else self.eta

    def function(self) -> Weighting:
        """The weighting, as the plain formula takes it."""
        kind = KINDS[self.weighting]
        values = (self.first, self.second) if self.parameters is None else self.parameters.unbind()
        return kind(*values[: len(kind.ranges)])


def check_weighting(weighting: CustomWeighting, targets: Tensor) -> CustomWeighting:
    """The weighting, whose tensors have targets' shape [...] where it is one of `weightings`.

    Raises:
        TypeError: it is not callable, or a class; a tensor is not floating.
        ValueError: a tensor requires grad, lies elsewhere or does not broadcast.
    """
    if weighting is PROBABILITY:
        return weighting
    check_is_weighting(weighting)
    return weighting.on_tokens(targets) if is_built_in(weighting) else weighting


def check_is_weighting(weighting: object) -> None:
    """Raises TypeError unless it is one of `weightings` or another function."""
    if isinstance(weighting, type):
        raise TypeError(f"expected weighting to be an instance, got the class {weighting.__name__}")
    if not callable(weighting):
        raise TypeError(
            "expected weighting to be one of mixce_kernels.weightings or a function of MixCEStats, got "
            f"{describe(weighting)}"
        )


def unweighted(stats: MixCEStats) -> MixCEStats:
    """Statistics as a weighting gets them: `weight`, which follows from it, is NaN."""
    return stats._replace(weight=torch.full_like(stats.weight, torch.nan))


def factor_of(weighting: CustomWeighting, stats: MixCEStats, *, validate: bool) -> Tensor:
    """What a function of the caller's makes of the statistics [...], without a graph.

    Raises:
        TypeError: the result is no tensor of the statistics' dtype.
        ValueError: the result has another shape or device, or requires a gradient; with `validate`, an entry is
            negative.
    """
    stats = unweighted(stats)
    with torch.no_grad():
        factor = weighting(stats)
    if not isinstance(factor, Tensor) or factor.dtype != stats.q.dtype:
        raise TypeError(f"expected the weighting's result to be a tensor of {stats.q.dtype}, got {describe(factor)}")
    if factor.shape != stats.q.shape:
        raise ValueError(
            f"expected the weighting's result of targets' shape {list(stats.q.shape)}, got {list(factor.shape)}"
        )
    if factor.device != stats.q.device:
        raise ValueError(f"expected the weighting's result on {stats.q.device}, got {factor.device}")
    if factor.requires_grad:
        raise ValueError("expected the weighting's result without requires_grad, got one with: no gradient goes there")
    if validate and (stats.valid & (factor < 0)).any():
        raise ValueError("expected the weighting's result to be nowhere negative, got a negative entry")
    return factor
