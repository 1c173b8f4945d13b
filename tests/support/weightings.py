"""The weightings that the table of cases tries: what the package is given, and what two other hands make of it.

Written from the papers' formulas; only `given` is the package's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.oracle import np


class Weighting(NamedTuple):
    """f of a token, from nll, q, the entropy and the collision probability."""

    # From the module, which some programs may not import before they say so, and a parameter for each token.
    given: Callable[[Any, Tensor], Any]
    oracle: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], Any]
    plain: Callable[[Tensor, Tensor, Tensor, Tensor], Any]  # as one would write it in PyTorch
    per_token: bool = False  # whether `oracle` and `plain` take a parameter for each token, first


def _tailr(gamma: float, floor: float) -> Weighting:
    return Weighting(
        lambda weightings, _: weightings.TaiLr(gamma, floor),
        lambda nll, q, entropy, collision: np.maximum(
            np.ones_like(q) if gamma == 0 else q / (gamma + (1 - gamma) * q), floor
        ),
        lambda nll, q, entropy, collision: (q / (gamma + (1 - gamma) * q)).clamp(min=floor),
    )


def _power(alpha: float) -> Weighting:
    return Weighting(
        lambda weightings, _: weightings.Power(alpha),
        lambda nll, q, entropy, collision: np.exp(-alpha * nll) if alpha else np.ones_like(q),
        lambda nll, q, entropy, collision: q**alpha,
    )


def _focal(gamma: float) -> Weighting:
    return Weighting(
        lambda weightings, _: weightings.Focal(gamma),
        lambda nll, q, entropy, collision: (-np.expm1(-nll)) ** gamma,
        lambda nll, q, entropy, collision: (1 - q) ** gamma,
    )


def _entropy(alpha: float, scale: float) -> Weighting:
    return Weighting(
        lambda weightings, _: weightings.Entropy(alpha, scale),
        lambda nll, q, entropy, collision: (np.maximum(entropy, 0) / scale) ** alpha,
        lambda nll, q, entropy, collision: (entropy / scale) ** alpha,
    )


# q is compared as a float32, the type of the statistics.
def _band(low: float, high: float) -> Weighting:
    return Weighting(
        lambda weightings, _: weightings.Band(low, high),
        lambda nll, q, entropy, collision: ((q >= low) & (q <= high)).astype(q.dtype),
        lambda nll, q, entropy, collision: ((q >= low) & (q <= high)).to(q.dtype),
    )


WEIGHTINGS = {
    "probability": Weighting(
        lambda weightings, _: weightings.Probability(), lambda nll, q, *_: q, lambda nll, q, *_: q
    ),
    "power_0": _power(0.0),
    "power_0.3": _power(0.3),
    "power_4": _power(4.0),
    "power_per_token": Weighting(
        lambda weightings, alpha: weightings.Power(alpha),
        lambda alpha, nll, q, *_: np.where(alpha == 0, 1, q**alpha),
        lambda alpha, nll, q, *_: q**alpha,
        per_token=True,
    ),
    "tailr_0": _tailr(0.0, 0.0),
    "tailr_0.2": _tailr(0.2, 0.0),
    "tailr_floor": _tailr(0.7, 0.3),
    "band": _band(1e-3, 0.75),
    "band_from_0": _band(0.0, 0.5),
    "focal_0": _focal(0.0),
    "focal_0.5": _focal(0.5),
    "focal_2": _focal(2.0),
    "variance": Weighting(
        lambda weightings, _: weightings.Variance(),
        lambda nll, q, *_: -q * np.expm1(-nll),
        lambda nll, q, *_: q * (1 - q),
    ),
    "entropy": _entropy(1.0, 3.0),
    "entropy_0": _entropy(0.0, 2.0),
    "entropy_0.5": _entropy(0.5, 1.5),
    "entropy_per_token": Weighting(
        lambda weightings, scale: weightings.Entropy(1.5, scale),
        lambda scale, nll, q, h, _: (np.maximum(h, 0) / scale) ** 1.5,
        lambda scale, nll, q, h, _: (h.clamp(min=0) / scale) ** 1.5,
        per_token=True,
    ),
    "collision": Weighting(
        lambda weightings, _: weightings.CollisionPower(),
        lambda nll, q, h, collision: np.exp(-collision * nll),
        lambda nll, q, h, collision: q**collision,
    ),
    # A function of the caller's.
    "custom": Weighting(
        lambda weightings, _: lambda stats: stats.q.sqrt() * stats.entropy.clamp(min=0.0),
        lambda nll, q, h, _: np.sqrt(q) * np.maximum(h, 0),
        lambda nll, q, h, _: q.sqrt() * h.clamp(min=0),
    ),
}


def of_tokens(name: str, parameters: Tensor) -> Any:
    """What the package is given, with a parameter for each token where there are such."""
    return WEIGHTINGS[name].given(importlib.import_module("mixce_kernels.weightings"), parameters)


def oracle_of(name: str, parameters: Tensor) -> Any:
    """The oracle's f, with a parameter for each token [N] where there are such."""
    weighting = WEIGHTINGS[name]
    if not weighting.per_token:
        return weighting.oracle
    each = parameters.reshape(-1).double().numpy()
    return lambda nll, *others: weighting.oracle(each.astype(nll.dtype), nll, *others)


def plain_of(name: str, parameters: Tensor) -> Any:
    """The plain formula's f, with a parameter for each token [N] where there are such."""
    weighting = WEIGHTINGS[name]
    if not weighting.per_token:
        return weighting.plain
    return lambda nll, *others: weighting.plain(parameters.reshape(-1).to(nll.dtype), nll, *others)


def parameters_of_tokens(shape: list[int], generator: torch.Generator) -> Tensor:
    """A parameter for each token."""
    return 0.2 + torch.rand(shape, generator=generator)
