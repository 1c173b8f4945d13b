"""The options of the public functions in records, and their checks.

`LossOptions` and `LogprobOptions` travel from the public functions to their bodies, `TokenOptions` from there to the
kernels.
"""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixce_kernels.values import (
    as_float,
    check_constant,
    check_int64,
    concrete,
    describe,
    is_integer,
    option_number,
    token_tensor,
)
from mixce_kernels.weightings import PROBABILITY, CustomWeighting

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("none", "mean", "sum")
PATHS = ("chunks", "tiles")
# A schedule computed in floating point ends this far outside of [0, 1] at most.
ETA_ROUNDING = 1e-6


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of arithmetic, loss and statistics for logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class TokenOptions(NamedTuple):
    """The options that change a token's own numbers: the kernels know these and no others."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def moves_sure_tokens(self) -> bool:
        """Whether a token has a gradient where the model is sure of its target: from smoothing or z-loss."""
        return self.label_smoothing > 0 or self.z_loss > 0


class LossOptions(NamedTuple):
    """The options of a loss as they were given: see `fused_mixce_loss`, whose keywords they are, for each."""

    ignore_index: int = -100
    reduction: str = "mean"
    token_weights: Tensor | None = None
    num_items_in_batch: float | Tensor | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    weighting: CustomWeighting = PROBABILITY
    inplace_backward: bool = False
    grad_in_forward: bool = False
    return_stats: bool = False
    validate: bool = False
    backend: str | None = None

    def for_tokens(self) -> TokenOptions:
        """The options of a token, checked, as exact Python numbers.

        Raises:
            TypeError: an option is not a number.
            ValueError: an option is outside its range.
        """
        given = (self.ignore_index, self.label_smoothing, self.z_loss, self.softcap, self.logit_scale)
        # A compiler's symbols are other numbers at each call, and only numbers can be compared with earlier ones.
        if torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, given)):
            return _checked_for_tokens(*given)
        return _remembered_for_tokens(*given)

    def check_reduction_name(self) -> None:
        """Raises ValueError unless the reduction is one of REDUCTIONS."""
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"expected reduction 'none', 'mean' or 'sum', got {self.reduction!r}")

    def check_reduction(self, targets: Tensor) -> None:
        """Raises TypeError or ValueError unless the reduction, its weights and its divisor fit the targets [...]."""
        self.check_reduction_name()
        weights, divisor = self.token_weights, self.num_items_in_batch
        if weights is not None:
            if not isinstance(weights, Tensor) or not weights.is_floating_point():
                raise TypeError(f"expected token_weights to be a floating tensor, got {describe(weights)}")
            check_constant("token_weights", weights)
            if weights.shape != targets.shape:
                raise ValueError(
                    f"expected token_weights of targets' shape {list(targets.shape)}, got {list(weights.shape)}"
                )
            if weights.device != targets.device:
                raise ValueError(f"expected token_weights on {targets.device} with the logits, got {weights.device}")
        if divisor is None:
            return
        if self.reduction != "mean":
            raise ValueError(
                f"expected num_items_in_batch with reduction='mean' alone, got reduction={self.reduction!r}"
            )
        if isinstance(divisor, Tensor):
            check_constant("num_items_in_batch", divisor)
            if divisor.numel() != 1:
                raise ValueError(
                    "expected num_items_in_batch to be a number or a tensor of one element, got a tensor of shape "
                    f"{list(divisor.shape)}"
                )
        elif not 0.0 <= as_float("num_items_in_batch", divisor) < math.inf:
            raise ValueError(f"expected num_items_in_batch to be finite and not negative, got {divisor}")


class LogprobOptions(NamedTuple):
    """The options of log-probabilities as they were given: see `fused_token_logprobs`, whose keywords they are."""

    temperature: float | Tensor = 1.0
    ignore_index: int = -100
    softcap: float | None = None
    logit_scale: float = 1.0
    return_entropy: bool = False
    inplace_backward: bool = False
    validate: bool = False
    backend: str | None = None

    def for_tokens(self) -> TokenOptions:
        """The options of a token, checked, as exact Python numbers; a temperature that is a number is among them.

        Raises:
            TypeError: an option is not a number.
            ValueError: an option is outside its range.
        """
        options = LossOptions(
            ignore_index=self.ignore_index, softcap=self.softcap, logit_scale=self.logit_scale
        ).for_tokens()  # fmt: skip
        if isinstance(self.temperature, Tensor):
            return options
        temperature = option_number("temperature", self.temperature)
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"expected temperature to be a positive finite number, got {temperature}")
        if temperature == 1.0:
            return options
        # softcap * tanh(logit_scale * x / softcap) / temperature, as a softcap and a scale of their own.
        softcap, logit_scale = options.softcap, options.logit_scale / temperature
        if softcap is not None:
            softcap /= temperature
        if not all(0.0 < number < math.inf for number in (logit_scale, softcap or 1.0)):
            raise ValueError(f"expected temperature that logits can be divided by, got {temperature}")
        return options._replace(softcap=softcap, logit_scale=logit_scale)

    def temperature_of_tokens(self, targets: Tensor) -> Tensor | None:
        """A temperature that is a tensor, of targets' shape [...]; later writes to it do not change the result.

        Raises:
            TypeError: it is not floating.
            ValueError: it requires grad, lies elsewhere or does not broadcast.
        """
        if not isinstance(self.temperature, Tensor):
            return None
        temperature = self.temperature.clone() if torch.is_grad_enabled() else self.temperature
        return token_tensor("temperature", temperature, targets)


class LinearOptions(NamedTuple):
    """What a function of hidden states is told besides: see `fused_linear_mixce_loss`."""

    max_chunk_bytes: int | None = None
    path: str = "chunks"

    def check(self, backend: str | None, *, sharded: bool = False) -> None:
        """Raises TypeError or ValueError unless the path is known and can serve, and the budget is a positive int."""
        if self.max_chunk_bytes is not None:
            if not is_integer(self.max_chunk_bytes):
                raise TypeError(f"expected max_chunk_bytes to be None or an int, got {describe(self.max_chunk_bytes)}")
            if self.max_chunk_bytes <= 0:
                raise ValueError(f"expected max_chunk_bytes to be positive, got {self.max_chunk_bytes}")
            check_int64("max_chunk_bytes", self.max_chunk_bytes)
        if self.path not in PATHS:
            raise ValueError(f"expected path 'chunks' or 'tiles', got {self.path!r}")
        if self.path == "tiles" and backend not in (None, "triton"):
            raise ValueError(f"expected backend 'triton' or None with path='tiles', got {backend!r}")
        if self.path == "tiles" and sharded:
            raise ValueError("expected path 'chunks' with a sharded weight, got 'tiles'")


_PLAIN = frozenset((int, float, type(None)))


def _checked_for_tokens(
    ignore_index: Any, label_smoothing: Any, z_loss: Any, softcap: Any, logit_scale: Any
) -> TokenOptions:
    if not isinstance(ignore_index, numbers.Integral):
        raise TypeError(f"expected ignore_index to be an int, got {describe(ignore_index)}")
    ignore_index = concrete(int(ignore_index))
    check_int64("ignore_index", ignore_index)
    label_smoothing = option_number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"expected label_smoothing in [0, 1], got {label_smoothing}")
    z_loss = option_number("z_loss", z_loss)
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"expected z_loss to be finite and not negative, got {z_loss}")
    softcap = None if softcap is None else option_number("softcap", softcap)
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"expected softcap to be None or a positive finite number, got {softcap}")
    logit_scale = option_number("logit_scale", logit_scale)
    if not 0.0 < logit_scale < math.inf:
        raise ValueError(f"expected logit_scale to be a positive finite number, got {logit_scale}")
    return TokenOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale)


# Typed, since -100.0 equals -100 and is no class index.
_remembered_for_tokens = functools.lru_cache(maxsize=256, typed=True)(_checked_for_tokens)


def check_eta_number(eta: float) -> float:
    """Eta as a Python float; the end of [0, 1] that it misses by a rounding.

    Raises:
        TypeError: it is not a number.
        ValueError: it is outside [0, 1] by more than a rounding, or NaN.
    """
    eta = as_float("eta", eta)
    if not -ETA_ROUNDING <= eta <= 1.0 + ETA_ROUNDING:
        raise ValueError(f"expected eta in [0, 1], got {eta}")
    if eta < 0.0:
        return 0.0
    return 1.0 if eta > 1.0 else eta


def check_eta(eta: float | Tensor, targets: Tensor) -> float | Tensor:
    """Eta as a Python float, or as a floating tensor of targets' shape [...] that later writes to eta do not change.

    Where a compiler traces the call a number becomes a tensor, too: data of the graph, which a schedule may change at
    every step.

    Raises:
        TypeError: eta is neither a number nor a floating tensor.
        ValueError: a number outside [0, 1], or a tensor that requires grad, lies elsewhere or does not broadcast.
    """
    if not isinstance(eta, Tensor):
        eta = check_eta_number(eta)
        if not torch.compiler.is_compiling():
            return eta
        # As a sum: `torch.full` would bake a number in that the compiler traces as a symbol.
        return (torch.zeros((), dtype=torch.float64, device=targets.device) + eta).expand(targets.shape)
    # A copy: the forward's weights count, also where eta is overwritten before backward.
    return token_tensor("eta", eta.clone() if torch.is_grad_enabled() else eta, targets)
