"""The operators of the loss of logits: their arguments, and the shapes of their results; a backend does the arithmetic.

    forward             logits -> loss, state, stats, correct              (one read of the logits)
    logits_grad         logits, state, grad_loss -> grad_logits            (one read, one write)
    forward_with_grad   both at once, for an upstream gradient known in advance

The last multiplies the loss by that upstream gradient, too. A name that ends in `_` writes the gradient over the
logits. State and statistics are those of `backends.results.Results`; `backend` is what `backends.vocabulary` takes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import increment_version

from mixce_kernels import backends
from mixce_kernels.backends.results import Results, empty_results
from mixce_kernels.operators import Operator
from mixce_kernels.options import TokenOptions

RESULTS = "Tensor loss, Tensor state, Tensor stats, Tensor correct"


class Forward(NamedTuple):
    """The arguments of `forward`."""

    logits: Tensor  # [..., V]
    targets: Tensor  # [...]
    eta: Tensor | None  # [...]
    eta_value: float  # used where eta is None
    options: TokenOptions
    with_stats: bool
    inplace_backward: bool
    backend: str


class LogitsGrad(NamedTuple):
    """The arguments of `logits_grad`; eta is for the second derivative alone."""

    logits: Tensor  # [..., V]
    targets: Tensor  # [...]
    state: Tensor  # [STATE_WIDTH, ...]
    grad_loss: Tensor  # [...]
    eta: Tensor | None  # [...]
    eta_value: float
    options: TokenOptions
    backend: str


class LogitsGradInplace(NamedTuple):
    """The arguments of `logits_grad_`, which has no derivative."""

    logits: Tensor  # [..., V]
    targets: Tensor  # [...]
    state: Tensor  # [STATE_WIDTH, ...]
    grad_loss: Tensor  # [...]
    options: TokenOptions
    backend: str


class ForwardWithGrad(NamedTuple):
    """The arguments of `forward_with_grad` and `forward_with_grad_`."""

    logits: Tensor  # [..., V]
    targets: Tensor  # [...]
    grad_loss: Tensor  # [...]
    eta: Tensor | None  # [...]
    eta_value: float
    options: TokenOptions
    with_stats: bool
    backend: str


class ScaleRows(NamedTuple):
    """The arguments of `scale_rows_`."""

    grad_logits: Tensor  # [..., V]
    grad_loss: Tensor  # [...]
    backend: str


def forward(args: Forward) -> Results:
    results = empty_results(args.logits, args.targets, args.with_stats)
    kernels = backends.vocabulary(args.backend).kernels
    kernels.forward(args.logits, args.targets, args.eta, args.eta_value, args.options, results, None, None)
    return results


def logits_grad(args: LogitsGrad) -> Tensor:
    grad_logits = _empty_grad(args)
    _write_grad(args, grad_logits)
    return grad_logits


def logits_grad_(args: LogitsGradInplace) -> None:
    _write_grad(args, args.logits)
    increment_version(args.logits)


def forward_with_grad(args: ForwardWithGrad) -> tuple[Tensor, ...]:
    grad_logits = _empty_grad(args)
    return *_forward_into(args, grad_logits), grad_logits


def forward_with_grad_(args: ForwardWithGrad) -> Results:
    results = _forward_into(args, args.logits)
    increment_version(args.logits)
    return results


def scale_rows_(args: ScaleRows) -> None:
    backends.vocabulary(args.backend).kernels.scale_rows_(args.grad_logits, args.grad_loss)
    increment_version(args.grad_logits)


def _write_grad(args: LogitsGrad | LogitsGradInplace, grad_logits: Tensor) -> None:
    kernels = backends.vocabulary(args.backend).kernels
    kernels.logits_grad(args.logits, args.targets, args.state, args.grad_loss, args.options, grad_logits)


def _forward_into(args: ForwardWithGrad, grad_logits: Tensor) -> Results:
    results = empty_results(args.logits, args.targets, args.with_stats)
    kernels = backends.vocabulary(args.backend).kernels
    kernels.forward(
        args.logits, args.targets, args.eta, args.eta_value, args.options, results, args.grad_loss, grad_logits
    )
    return results._replace(loss=results.loss * args.grad_loss)


def _empty_grad(args: LogitsGrad | ForwardWithGrad) -> Tensor:
    return args.logits.new_empty(args.logits.shape)


def _empty_weighted_results(args: ForwardWithGrad) -> Results:
    results = empty_results(args.logits, args.targets, args.with_stats)
    return results._replace(loss=results.loss * args.grad_loss)


FORWARD = Operator(forward, RESULTS, lambda args: empty_results(args.logits, args.targets, args.with_stats))
LOGITS_GRAD = Operator(logits_grad, "Tensor", _empty_grad)
LOGITS_GRAD_ = Operator(logits_grad_, "", writes="logits")
FORWARD_WITH_GRAD = Operator(
    forward_with_grad,
    f"{RESULTS}, Tensor grad_logits",
    lambda args: (*_empty_weighted_results(args), _empty_grad(args)),
)
FORWARD_WITH_GRAD_ = Operator(forward_with_grad_, RESULTS, _empty_weighted_results, writes="logits")
SCALE_ROWS_ = Operator(scale_rows_, "", writes="grad_logits")
