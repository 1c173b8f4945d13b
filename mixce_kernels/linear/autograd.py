"""The derivatives of the linear loss's operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixce_kernels import backends
from mixce_kernels.autocast import without_autocast
from mixce_kernels.linear import ops
from mixce_kernels.linear.chunks import LinearCall
from mixce_kernels.linear.ops import LinearForward, LinearForwardWithGrad, LinearGrad
from mixce_kernels.operators import Differentiable, is_plain
from mixce_kernels.reference import linear_logits

Grads = dict[str, Tensor | None]
# Nothing else is differentiated.
_NAMES = ("hidden", "weight", "bias")


def _forward_context(ctx: Any, args: LinearForward, output: tuple[Tensor, ...]) -> None:
    _, state, stats, correct = output
    ctx.mark_non_differentiable(state, stats, correct)
    ctx.set_materialize_grads(False)
    ops.LINEAR_FORWARD.fields.save(ctx, args, state)


def _forward_backward(ctx: Any, grad_loss: Tensor | None, *_unused: None) -> Grads:
    if grad_loss is None:
        return {}
    args, (state,) = ops.LINEAR_FORWARD.fields.saved(ctx)
    return _computed_grads(ctx, args.call, state, grad_loss)


def _with_grad_context(ctx: Any, args: LinearForwardWithGrad, output: tuple[Tensor, ...]) -> None:
    _, state, stats, correct, *grads = output
    ctx.mark_non_differentiable(state, stats, correct, *grads)
    ctx.set_materialize_grads(False)
    ctx.spent = False
    ops.LINEAR_FORWARD_WITH_GRAD.fields.save(ctx, args, state, *grads)


def _with_grad_backward(ctx: Any, grad_loss: Tensor | None, *_unused: None) -> Grads:
    if grad_loss is None:
        return {}
    args, (state, *grads) = ops.LINEAR_FORWARD_WITH_GRAD.fields.saved(ctx)
    call = args.call
    if ctx.spent or torch.is_grad_enabled():
        # The gradients of forward were scaled by an earlier backward, or a graph of them is asked for.
        return _computed_grads(ctx, call, state, args.token_scale * grad_loss)
    # A batch that has no valid token has gradient 0, which NaN or infinity must not multiply, nor a row without one.
    valid = call.targets != call.options.ignore_index
    row_factor = torch.where(valid, grad_loss, 1.0)
    factor = torch.where(valid.any(), grad_loss, 1.0)
    in_place = all(is_plain(tensor) for tensor in (grads[0], grad_loss))
    # Before they are scaled, so that nothing scales them twice.
    ctx.spent = in_place
    found: Grads = {}
    for name, grad, scale, needed in zip(_NAMES, grads, (row_factor, factor, factor), _wanted(ctx), strict=True):
        if needed:
            scaled = _scaled_in_place(grad, scale, call.backend) if in_place else _scaled(grad, scale)
            found[name] = scaled.to(getattr(call, name).dtype)
    return found


def _wanted(ctx: Any) -> list[bool]:
    """Which of the gradients by hidden states, weight and bias are needed: they come first among the arguments."""
    return list(ctx.needs_input_grad[: len(_NAMES)])


def _scaled(grad: Tensor, scale: Tensor) -> Tensor:
    """For a gradient that is traced, since a compiler wants no output of the forward written to, or batched."""
    scale = scale.unsqueeze(-1) if 0 < scale.dim() < grad.dim() else scale
    return grad * scale.to(grad.dtype)


def _scaled_in_place(grad: Tensor, scale: Tensor, backend: str) -> Tensor:
    """The gradient with its rows, or all of it, multiplied in its own memory; rows whose factor is 1 are not read."""
    rows = grad.unsqueeze(0) if grad.dim() == 1 else grad
    # Not by the operator, which would tell autograd: `ctx.spent` does, and lets a second backward pass.
    if rows.numel() > 0:
        backends.get(backends.name_of(backend)).scale_rows_(rows, scale.expand(rows.shape[0]))
    # With a version of its own: whoever accumulates into it has not changed a saved tensor.
    return grad.data


def _computed_grads(ctx: Any, call: LinearCall, state: Tensor, grad_loss: Tensor) -> Grads:
    """The gradients of sum(grad_loss * loss), computed anew."""
    wanted = _wanted(ctx)
    if torch.is_grad_enabled():
        return _differentiable_grads(call, grad_loss, wanted)
    grads = ops.LINEAR_GRAD.dispatched(*ops.LINEAR_GRAD.fields.flat(LinearGrad(call, state, grad_loss, wanted)))
    return {
        name: grad.to(getattr(call, name).dtype) for name, grad, want in zip(_NAMES, grads, wanted, strict=True) if want
    }


def _differentiable_grads(call: LinearCall, grad_loss: Tensor, wanted: list[bool]) -> Grads:
    """The gradients with a graph of their own, by PyTorch through the plain formula on all logits at once."""
    vocabulary = backends.vocabulary(call.backend)
    with without_autocast(call.hidden):
        # Views of their own: autograd.grad below must stop here.
        leaves = {
            name: getattr(call, name).view_as(getattr(call, name))
            for name, want in zip(_NAMES, wanted, strict=True)
            if want
        }
        one = call._replace(**leaves)
        hidden = vocabulary.shared(one.hidden, call.dtype)
        valid = call.targets != call.options.ignore_index
        logits = linear_logits(hidden, one.weight, one.bias, valid, call.compute_dtype)
        eta = call.eta_value if call.eta is None else call.eta
        loss, _ = vocabulary.token_losses(logits, call.targets, eta, call.options)
        found = torch.autograd.grad(loss, list(leaves.values()), grad_loss, create_graph=True)
        return dict(zip(leaves, found, strict=True))


def _looped(operator: Differentiable[Any], size: int, dims: dict[str, int | None], args: Any) -> Any:
    """`torch.vmap` of an operator that sums over tokens: a call for each entry."""
    names, values = operator.fields.names, operator.fields.flat(args)
    results = []
    for i in range(size):
        entry = (
            value.select(dim, i) if isinstance(dim := dims[name], int) else value
            for name, value in zip(names, values, strict=True)
        )
        results.append(operator(operator.fields.of(tuple(entry))))
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


linear_forward = Differentiable(ops.LINEAR_FORWARD, _forward_context, _forward_backward, _looped)
linear_forward_with_grad = Differentiable(
    ops.LINEAR_FORWARD_WITH_GRAD, _with_grad_context, _with_grad_backward, _looped
)
