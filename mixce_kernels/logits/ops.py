"""The operators of the loss of logits: their arguments, and the shapes of their results; a backend does the arithmetic.

    forward             logits -> loss, token_scale, state, stats, correct         (one read of the logits)
    logits_grad         logits, state, grad_loss, token_scale -> grad_logits       (one read, one write)
    forward_with_grad   both at once, for an upstream gradient of 1

The loss is reduced, and `token_scale` is what a token's own has for a factor in it. A name that ends in `_` writes the
gradient over the logits. Results are those of `backends.results.Results`; `backend` is what `backends.vocabulary`
takes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import increment_version

from mixce_kernels import backends
from mixce_kernels.backends.results import Results, empty_results
from mixce_kernels.mixture import Mixture
from mixce_kernels.operators import Operator
from mixce_kernels.options import TokenOptions
from mixce_kernels.reduction import Reduction

RESULTS = "Tensor loss, Tensor token_scale, Tensor state, Tensor stats, Tensor correct"


class Forward(NamedTuple):
    """The arguments of `forward`."""

    logits: Tensor  # [..., V]
    targets: Tensor  # [...]
    mixture: Mixture
    options: TokenOptions
    reduction: Reduction
    with_state: bool  # whether a gradient may follow
    with_stats: bool
    inplace_backward: bool
    backend: str


class LogitsGrad(NamedTuple):
    """The arguments of `logits_grad`; the mixture is for the second derivative alone."""

    logits: Tensor  # [..., V]
    targets: Tensor  # [...]
    state: Tensor  # [STATE_WIDTH, ...]
    grad_loss: Tensor  # [] or [...]
    token_scale: Tensor | None  # [] or [...]
    mixture: Mixture
    options: TokenOptions
    backend: str


class LogitsGradInplace(NamedTuple):
    """The arguments of `logits_grad_`, which has no derivative."""

    logits: Tensor  # [..., V]
    targets: Tensor  # [...]
    state: Tensor  # [STATE_WIDTH, ...]
    grad_loss: Tensor  # [] or [...]
    token_scale: Tensor | None  # [] or [...]
    options: TokenOptions
    backend: str


class ForwardWithGrad(NamedTuple):
    """The arguments of `forward_with_grad` and `forward_with_grad_`."""

    logits: Tensor  # [..., V]
    targets: Tensor  # [...]
    mixture: Mixture
    options: TokenOptions
    reduction: Reduction
    with_stats: bool
    backend: str


class ScaleRows(NamedTuple):
    """The arguments of `scale_rows_`."""

    grad_logits: Tensor  # [..., V]
    grad_loss: Tensor  # [] or [...]
    targets: Tensor  # [...]
    ignore_index: int
    backend: str


def forward(args: Forward) -> tuple[Tensor | None, ...]:
    results = _empty_results(args, args.with_state)
    kernels = backends.vocabulary(args.backend).kernels
    kernels.forward(args.logits, args.targets, args.mixture, args.options, args.reduction, results, None, None)
    return results.returned()


def logits_grad(args: LogitsGrad) -> Tensor:
    grad_logits = _empty_grad(args)
    _write_grad(args, grad_logits)
    return grad_logits


def logits_grad_(args: LogitsGradInplace) -> None:
    _write_grad(args, args.logits)
    increment_version(args.logits)


def forward_with_grad(args: ForwardWithGrad) -> tuple[Tensor | None, ...]:
    grad_logits = _empty_grad(args)
    return *_forward_into(args, grad_logits), grad_logits


def forward_with_grad_(args: ForwardWithGrad) -> tuple[Tensor | None, ...]:
    results = _forward_into(args, args.logits)
    increment_version(args.logits)
    return results


def scale_rows_(args: ScaleRows) -> None:
    kernels = backends.vocabulary(args.backend).kernels
    kernels.scale_rows_(args.grad_logits, args.grad_loss, args.targets, args.ignore_index)
    increment_version(args.grad_logits)


def _write_grad(args: LogitsGrad | LogitsGradInplace, grad_logits: Tensor) -> None:
    kernels = backends.vocabulary(args.backend).kernels
    kernels.logits_grad(
        args.logits, args.targets, args.state, args.grad_loss, args.token_scale, args.options, grad_logits
    )


def _forward_into(args: ForwardWithGrad, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
    kernels = backends.vocabulary(args.backend).kernels
    results = _empty_results(args)
    token_scale = results.token_scale
    if token_scale is not None:
        # Every factor of a token must be known before its row is read.
        kernels.reduce(args.targets, args.options.ignore_index, args.reduction, None, None, token_scale)
    kernels.forward(
        args.logits, args.targets, args.mixture, args.options, args.reduction,
        results._replace(token_scale=None), token_scale, grad_logits,
    )  # fmt: skip
    return results.returned()


def _empty_results(args: Forward | ForwardWithGrad, with_state: bool = True) -> Results:
    return empty_results(args.logits, args.targets, args.reduction, with_state=with_state, with_stats=args.with_stats)


def _empty_grad(args: LogitsGrad | ForwardWithGrad) -> Tensor:
    return args.logits.new_empty(args.logits.shape)


FORWARD = Operator(forward, RESULTS, lambda args: _empty_results(args, args.with_state).returned())
LOGITS_GRAD = Operator(logits_grad, "Tensor", _empty_grad)
LOGITS_GRAD_ = Operator(logits_grad_, "", writes="logits")
FORWARD_WITH_GRAD = Operator(
    forward_with_grad,
    f"{RESULTS}, Tensor grad_logits",
    lambda args: (*_empty_results(args).returned(), _empty_grad(args)),
)
FORWARD_WITH_GRAD_ = Operator(
    forward_with_grad_, RESULTS, lambda args: _empty_results(args).returned(), writes="logits"
)
SCALE_ROWS_ = Operator(scale_rows_, "", writes="grad_logits")
