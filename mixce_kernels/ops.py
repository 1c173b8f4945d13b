"""The operators of `torch.library`: schema, shapes for the compiler, and autograd; a backend does the arithmetic.

    forward             logits -> loss, state, stats, correct              (one read of the logits)
    logits_grad         logits, state, grad_loss -> grad_logits            (one read, one write)
    forward_with_grad   both at once, for an upstream gradient known in advance

A name that ends in `_` writes the gradient over the logits. `state` is [5, ...]: m, s, a, c, t of each token, and
`stats` is [5, ...]: nll, q, weight, lse, entropy, empty unless asked for, as is `correct`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mixce_kernels import backends
from mixce_kernels.options import TokenOptions, accumulate_dtype
from mixce_kernels.reference import token_losses

_ETA = "Tensor? eta, float eta_value"
_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float? softcap, float logit_scale"
_RESULTS = "Tensor loss, Tensor state, Tensor stats, Tensor correct"

_library = torch.library.Library("mixce_kernels", "DEF")
_library.define(
    f"forward(Tensor logits, Tensor targets, {_ETA}, {_OPTIONS}, bool with_stats, bool inplace_backward, str backend)"
    f" -> ({_RESULTS})"
)
_library.define(
    f"logits_grad(Tensor logits, Tensor targets, Tensor state, Tensor grad_loss, {_ETA}, {_OPTIONS}, str backend)"
    " -> Tensor"
)
_library.define(
    f"logits_grad_(Tensor(a!) logits, Tensor targets, Tensor state, Tensor grad_loss, {_OPTIONS}, str backend) -> ()"
)
_library.define(
    f"forward_with_grad(Tensor logits, Tensor targets, Tensor grad_loss, {_ETA}, {_OPTIONS}, bool with_stats,"
    f" str backend) -> ({_RESULTS}, Tensor grad_logits)"
)
_library.define(
    f"forward_with_grad_(Tensor(a!) logits, Tensor targets, Tensor grad_loss, {_ETA}, {_OPTIONS}, bool with_stats,"
    f" str backend) -> ({_RESULTS})"
)
_library.define("scale_rows_(Tensor(a!) grad_logits, Tensor grad_loss, str backend) -> ()")



# Each function below takes its schema's arguments in order; `rest` is the five options and the flags after them.


def _forward(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    eta: Tensor | None,  # [...]
    eta_value: float,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *options, with_stats, _, backend = rest
    results = _empty_results(logits, targets, with_stats)
    backends.get(backend).forward(logits, targets, eta, eta_value, TokenOptions(*options), results, None, None)
    return results


def _logits_grad(
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


def _logits_grad_(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    state: Tensor,  # [5, ...]
    grad_loss: Tensor,  # [...]
    *rest: Any,
) -> None:
    *options, backend = rest
    backends.get(backend).logits_grad(logits, targets, state, grad_loss, TokenOptions(*options), logits)
    increment_version(logits)


def _forward_with_grad(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    grad_loss: Tensor,  # [...]
    eta: Tensor | None,  # [...]
    eta_value: float,
    *rest: Any,
) -> tuple[Tensor, ...]:
    grad_logits = _empty_grad(logits)
    return *_forward_into(logits, targets, grad_loss, eta, eta_value, rest, grad_logits), grad_logits


def _forward_with_grad_(
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
    results = _empty_results(logits, targets, with_stats)
    serve = backends.get(backend).forward
    serve(logits, targets, eta, eta_value, TokenOptions(*options), results, grad_loss, grad_logits)
    results[0].mul_(grad_loss)
    return results


def _scale_rows_(grad_logits: Tensor, grad_loss: Tensor, backend: str) -> None:
    backends.get(backend).scale_rows_(grad_logits, grad_loss)
    increment_version(grad_logits)


def _empty_results(logits: Tensor, targets: Tensor, with_stats: bool) -> tuple[Tensor, ...]:
    shape, dtype = targets.shape, accumulate_dtype(logits.dtype)
    loss = logits.new_empty(shape, dtype=dtype)
    state = logits.new_empty((5, *shape), dtype=dtype)
    stats = logits.new_empty((5, *shape) if with_stats else (0,), dtype=dtype)
    correct = logits.new_empty(shape if with_stats else (0,), dtype=torch.bool)
    return loss, state, stats, correct


def _empty_grad(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


for _name, _function in {
    "forward": _forward,
    "logits_grad": _logits_grad,
    "logits_grad_": _logits_grad_,
    "forward_with_grad": _forward_with_grad,
    "forward_with_grad_": _forward_with_grad_,
    "scale_rows_": _scale_rows_,
}.items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("mixce_kernels::forward", lib=_library)
def _(logits: Tensor, targets: Tensor, eta: Tensor | None, eta_value: float, *rest: Any) -> tuple[Tensor, ...]:
    return _empty_results(logits, targets, with_stats=rest[-3])


@torch.library.register_fake("mixce_kernels::logits_grad", lib=_library)
def _(logits: Tensor, *rest: Any) -> Tensor:
    return _empty_grad(logits)


@torch.library.register_fake("mixce_kernels::forward_with_grad", lib=_library)
def _(logits: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return *_empty_results(logits, targets, with_stats=rest[-2]), _empty_grad(logits)


@torch.library.register_fake("mixce_kernels::forward_with_grad_", lib=_library)
def _(logits: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _empty_results(logits, targets, with_stats=rest[-2])


@torch.library.register_fake("mixce_kernels::logits_grad_", lib=_library)
@torch.library.register_fake("mixce_kernels::scale_rows_", lib=_library)
def _(*_args: Any) -> None:
    return None


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, eta, ctx.eta_value, *ctx.options, _, ctx.inplace, ctx.backend = inputs
    _, state, stats, correct = output
    ctx.mark_non_differentiable(state, stats, correct)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, state, eta)


def _forward_backward(ctx: Any, grad_loss: Tensor | None, *_unused: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (len(ctx.options) + 6)
    if grad_loss is None:
        return None, *nothing
    logits, targets, state, eta = ctx.saved_tensors
    if ctx.inplace and not torch.is_grad_enabled():
        _ops.logits_grad_(logits, targets, state, grad_loss, *ctx.options, ctx.backend)
        return logits.detach(), *nothing
    grad_logits = _ops.logits_grad(
        logits, targets, state, grad_loss, eta, ctx.eta_value, *ctx.options, ctx.backend
    )
    return grad_logits, *nothing


def _logits_grad_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, targets, _, grad_loss, eta, ctx.eta_value, *ctx.options, _ = inputs
    ctx.save_for_backward(logits, targets, grad_loss, eta)


def _logits_grad_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The second derivative: PyTorch differentiates the plain formula twice, the token's weight held fixed as in the first."""
    logits, targets, grad_loss, eta = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not create_graph:
            logits, grad_loss = logits.detach(), grad_loss.detach()
        # Views of their own: autograd.grad below must stop here.
        logits, grad_loss = (tensor.view_as(tensor).requires_grad_() for tensor in (logits, grad_loss))
        loss, _ = token_losses(logits, targets, ctx.eta_value if eta is None else eta, TokenOptions(*ctx.options))
        (grad_logits,) = torch.autograd.grad(loss, logits, grad_loss, create_graph=True)
        grads = torch.autograd.grad(
            grad_logits, (logits, grad_loss), grad_output, create_graph=create_graph, allow_unused=True
        )
    grad_logits, grad_grad_loss = grads
    return grad_logits, None, None, grad_grad_loss, *(None,) * (len(ctx.options) + 3)


def _with_grad_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, token_scale, eta, ctx.eta_value, *ctx.options, _, ctx.backend = inputs
    _, state, stats, correct, grad_logits = output
    ctx.mark_non_differentiable(state, stats, correct, grad_logits)
    ctx.set_materialize_grads(False)
    ctx.grad_logits = grad_logits
    ctx.save_for_backward(logits, targets, state, token_scale, eta)


def _with_grad_backward(ctx: Any, grad_loss: Tensor | None, *_unused: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (len(ctx.options) + 6)
    if grad_loss is None:
        return None, *nothing
    logits, targets, state, token_scale, eta = ctx.saved_tensors
    if ctx.grad_logits is None or torch.is_grad_enabled():
        # The gradient of forward is spent, or a graph of it is asked for: compute it anew.
        grad_logits = _ops.logits_grad(
            logits, targets, state, token_scale * grad_loss, eta, ctx.eta_value, *ctx.options, ctx.backend
        )
        return grad_logits, *nothing
    grad_logits, ctx.grad_logits = ctx.grad_logits, None
    _ops.scale_rows_(grad_logits, grad_loss, ctx.backend)
    return grad_logits, *nothing


class GradOverLogits(torch.autograd.Function):
    """`forward_with_grad_` as a node of the graph: the gradient lies in the logits' memory from the forward on.

    Not expressible by `torch.library.register_autograd`, which refuses operators that write to an argument.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        results = _ops.forward_with_grad_(logits, *rest)
        ctx.backend = rest[-1]
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        ctx.n_inputs = len(rest)
        # Saved after the write: whoever saved the logits before it gets PyTorch's error, and so does a second backward.
        ctx.save_for_backward(logits)
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_unused: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, *(None,) * ctx.n_inputs
        (grad_logits,) = ctx.saved_tensors
        _ops.scale_rows_(grad_logits, grad_loss, ctx.backend)
        return grad_logits.detach(), *(None,) * ctx.n_inputs


torch.library.register_autograd("mixce_kernels::forward", _forward_backward, setup_context=_forward_context, lib=_library)
torch.library.register_autograd(
    "mixce_kernels::logits_grad", _logits_grad_backward, setup_context=_logits_grad_context, lib=_library
)
torch.library.register_autograd(
    "mixce_kernels::forward_with_grad", _with_grad_backward, setup_context=_with_grad_context, lib=_library
)

_ops = torch.ops.mixce_kernels
