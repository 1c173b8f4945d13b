"""The operators of `torch.library`: schema, and shapes for the compiler; a backend does the arithmetic.

    forward             logits -> loss, state, stats, correct              (one read of the logits)
    logits_grad         logits, state, grad_loss -> grad_logits            (one read, one write)
    forward_with_grad   both at once, for an upstream gradient known in advance

The last multiplies the loss by that upstream gradient too. A name that ends in `_` writes the gradient over the logits.
`state` is [5, ...]: m, s, a, c, t of each token, and `stats` is [5, ...]: nll, q, weight, lse, entropy, empty unless
asked for, as is `correct`. `backend` is a name or the address of a backend's shard of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mixce_kernels import backends
from mixce_kernels.backends.results import empty_results
from mixce_kernels.options import TokenOptions

ETA = "Tensor? eta, float eta_value"
OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float? softcap, float logit_scale"
RESULTS = "Tensor loss, Tensor state, Tensor stats, Tensor correct"

library = torch.library.Library("mixce_kernels", "DEF")
library.define(
    f"forward(Tensor logits, Tensor targets, {ETA}, {OPTIONS}, bool with_stats, bool inplace_backward, str backend)"
    f" -> ({RESULTS})"
)
library.define(
    f"logits_grad(Tensor logits, Tensor targets, Tensor state, Tensor grad_loss, {ETA}, {OPTIONS}, str backend)"
    " -> Tensor"
)
library.define(
    f"logits_grad_(Tensor(a!) logits, Tensor targets, Tensor state, Tensor grad_loss, {OPTIONS}, str backend) -> ()"
)
library.define(
    f"forward_with_grad(Tensor logits, Tensor targets, Tensor grad_loss, {ETA}, {OPTIONS}, bool with_stats,"
    f" str backend) -> ({RESULTS}, Tensor grad_logits)"
)
library.define(
    f"forward_with_grad_(Tensor(a!) logits, Tensor targets, Tensor grad_loss, {ETA}, {OPTIONS}, bool with_stats,"
    f" str backend) -> ({RESULTS})"
)
library.define("scale_rows_(Tensor(a!) grad_logits, Tensor grad_loss, str backend) -> ()")


# Each function below takes its schema's arguments in order; `rest` is the five options and the flags after them.


def forward(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    eta: Tensor | None,  # [...]
    eta_value: float,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *options, with_stats, _, backend = rest
    results = empty_results(logits, targets, with_stats)
    backends.get(backend).forward(logits, targets, eta, eta_value, TokenOptions(*options), results, None, None)
    return results


def logits_grad(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    state: Tensor,  # [5, ...]
    grad_loss: Tensor,  # [...]
    eta: Tensor | None,  # [...], for the second derivative alone
    eta_value: float,
    *rest: Any,
) -> Tensor:
    *options, backend = rest
    grad_logits = _empty_grad(logits)
    backends.get(backend).logits_grad(logits, targets, state, grad_loss, TokenOptions(*options), grad_logits)
    return grad_logits


def logits_grad_(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    state: Tensor,  # [5, ...]
    grad_loss: Tensor,  # [...]
    *rest: Any,
) -> None:
    *options, backend = rest
    backends.get(backend).logits_grad(logits, targets, state, grad_loss, TokenOptions(*options), logits)
    increment_version(logits)


def forward_with_grad(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    grad_loss: Tensor,  # [...]
    eta: Tensor | None,  # [...]
    eta_value: float,
    *rest: Any,
) -> tuple[Tensor, ...]:
    grad_logits = _empty_grad(logits)
    return *_forward_into(logits, targets, grad_loss, eta, eta_value, rest, grad_logits), grad_logits


def forward_with_grad_(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    grad_loss: Tensor,  # [...]
    eta: Tensor | None,  # [...]
    eta_value: float,
    *rest: Any,
) -> tuple[Tensor, ...]:
    results = _forward_into(logits, targets, grad_loss, eta, eta_value, rest, logits)
    increment_version(logits)
    return results


def _forward_into(
    logits: Tensor,
    targets: Tensor,
    grad_loss: Tensor,
    eta: Tensor | None,
    eta_value: float,
    rest: tuple[Any, ...],
    grad_logits: Tensor,
) -> tuple[Tensor, ...]:
    *options, with_stats, backend = rest
    results = empty_results(logits, targets, with_stats)
    serve = backends.get(backend).forward
    serve(logits, targets, eta, eta_value, TokenOptions(*options), results, grad_loss, grad_logits)
    loss, *others = results
    return loss * grad_loss, *others


def scale_rows_(grad_logits: Tensor, grad_loss: Tensor, backend: str) -> None:
    backends.get(backend).scale_rows_(grad_logits, grad_loss)
    increment_version(grad_logits)


def _empty_grad(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


for _kernel in (forward, logits_grad, logits_grad_, forward_with_grad, forward_with_grad_, scale_rows_):
    library.impl(_kernel.__name__, _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("mixce_kernels::forward", lib=library)
def _(logits: Tensor, targets: Tensor, eta: Tensor | None, eta_value: float, *rest: Any) -> tuple[Tensor, ...]:
    return empty_results(logits, targets, with_stats=rest[-3])


@torch.library.register_fake("mixce_kernels::logits_grad", lib=library)
def _(logits: Tensor, *rest: Any) -> Tensor:
    return _empty_grad(logits)


@torch.library.register_fake("mixce_kernels::forward_with_grad", lib=library)
def _(logits: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return *_empty_weighted_results(logits, targets, *rest), _empty_grad(logits)


@torch.library.register_fake("mixce_kernels::forward_with_grad_", lib=library)
def _empty_weighted_results(logits: Tensor, targets: Tensor, grad_loss: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    loss, *others = empty_results(logits, targets, with_stats=rest[-2])
    return loss * grad_loss, *others


@torch.library.register_fake("mixce_kernels::logits_grad_", lib=library)
@torch.library.register_fake("mixce_kernels::scale_rows_", lib=library)
def _(*_args: Any) -> None:
    return None
