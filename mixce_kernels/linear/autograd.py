"""The derivatives of the linear loss's operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixce_kernels import backends
from mixce_kernels.autocast import without_autocast
from mixce_kernels.linear import ops
from mixce_kernels.linear.chunks import LinearCall
from mixce_kernels.linear.ops import LinearForward, LinearForwardWithGrad, LinearGrad
from mixce_kernels.operators import Differentiable, Fields, given, is_plain, without_none
from mixce_kernels.reduction import NO_REDUCTION
from mixce_kernels.reference import linear_logits

Grads = dict[str, Tensor | None]
# Nothing else is differentiated.
NAMES = ("hidden", "weight", "bias")


def _forward_context(ctx: Any, args: LinearForward, output: tuple[Tensor | None, ...]) -> None:
    _, token_scale, state, *_ = output
    _keep(ctx, ops.LINEAR_FORWARD.fields, args, output, state, token_scale)


def _keep(ctx: Any, fields: Fields[Any], args: Any, output: tuple[Tensor | None, ...], *others: Tensor | None) -> None:
    """Keeps the arguments but the reduction, and others, for a backward that gets a gradient of the loss alone."""
    ctx.mark_non_differentiable(*[one for one in output[1:] if one is not None])
    ctx.set_materialize_grads(False)
    fields.save(ctx, args._replace(call=args.call._replace(reduction=NO_REDUCTION)), *others)


def _forward_backward(ctx: Any, grad_loss: Tensor | None, *_unused: None) -> Grads:
    if grad_loss is None:
        return {}
    args, (state, token_scale) = ops.LINEAR_FORWARD.fields.saved(ctx)
    return _computed_grads(ctx, args.call, state, grad_loss, given(token_scale))


def _with_grad_context(ctx: Any, args: LinearForwardWithGrad, output: tuple[Tensor | None, ...]) -> None:
    _, token_scale, state, _, _, *grads = output
    ctx.spent = False
    _keep(ctx, ops.LINEAR_FORWARD_WITH_GRAD.fields, args, output, state, token_scale, *grads)


def _with_grad_backward(ctx: Any, grad_loss: Tensor | None, *_unused: None) -> Grads:
    if grad_loss is None:
        return {}
    args, (state, token_scale, *grads) = ops.LINEAR_FORWARD_WITH_GRAD.fields.saved(ctx)
    call = args.call
    if ctx.spent or torch.is_grad_enabled():
        # The gradients of forward were scaled by an earlier backward, or a graph of them is asked for.
        return _computed_grads(ctx, call, state, grad_loss, given(token_scale))
    valid = call.targets != call.options.ignore_index
    # A batch that has no valid token has gradient 0, which NaN or infinity must not multiply, nor a row without one.
    factor = torch.where(valid.any(), grad_loss, 1.0)
    in_place = all(is_plain(tensor) for tensor in (grads[0], grad_loss))
    # Before they are scaled, so that nothing scales them twice.
    ctx.spent = in_place
    found: Grads = {}
    for name, grad, needed in zip(NAMES, grads, wanted_grads(ctx), strict=True):
        if not needed:
            continue
        of_rows = name == "hidden"
        if in_place:
            scaled = _scaled_in_place(grad, factor, call, of_rows)
        else:
            scaled = _scaled(grad, torch.where(valid, grad_loss, 1.0) if of_rows else factor)
        found[name] = scaled.to(getattr(call, name).dtype)
    return found


def wanted_grads(ctx: Any) -> list[bool]:
    """Which of the gradients by hidden states, weight and bias are needed: they come first among the arguments."""
    return list(ctx.needs_input_grad[: len(NAMES)])


def _scaled(grad: Tensor, scale: Tensor) -> Tensor:
    """For a gradient that is traced, since a compiler wants no output of the forward written to, or batched."""
    scale = scale.unsqueeze(-1) if 0 < scale.dim() < grad.dim() else scale
    return grad * scale.to(grad.dtype)


def _scaled_in_place(grad: Tensor, factor: Tensor, call: LinearCall, of_rows: bool) -> Tensor:
    """The gradient multiplied in its own memory, the hidden states' (`of_rows`) where its tokens are not ignored."""
    rows = grad.unsqueeze(0) if grad.dim() == 1 else grad
    # Not by the operator, which would tell autograd: `ctx.spent` does, and lets a second backward pass.
    if rows.numel() > 0:
        kernels = backends.get(backends.name_of(call.backend))
        kernels.scale_rows_(rows, factor, call.targets if of_rows else None, call.options.ignore_index)
    # With a version of its own: whoever accumulates into it has not changed a saved tensor.
    return grad.data


def _computed_grads(ctx: Any, call: LinearCall, state: Tensor, grad_loss: Tensor, token_scale: Tensor | None) -> Grads:
    """The gradients of sum(grad_loss * token_scale * losses), computed anew."""
    wanted = wanted_grads(ctx)
    if torch.is_grad_enabled():
        upstream = grad_loss if token_scale is None else grad_loss * token_scale
        vocabulary = backends.vocabulary(call.backend)

        def results_of(logits: Tensor) -> list[tuple[Tensor, Tensor]]:
            losses, _ = vocabulary.token_losses(logits, call.targets, call.mixture, call.options)
            return [(losses, upstream)]

        return differentiable_grads(call, results_of, wanted)
    args = LinearGrad(call, state, grad_loss, token_scale, wanted)
    grads = ops.LINEAR_GRAD.dispatched(*ops.LINEAR_GRAD.fields.flat(args))
    return {
        name: grad.to(getattr(call, name).dtype) for name, grad, want in zip(NAMES, grads, wanted, strict=True) if want
    }


def differentiable_grads(
    call: LinearCall, results_of: Callable[[Tensor], list[tuple[Tensor, Tensor]]], wanted: list[bool]
) -> Grads:
    """The gradients with a graph of their own, by PyTorch through the plain formula on all logits at once.

    `results_of` gives of the logits what is differentiated and, of each, the upstream gradient.
    """
    vocabulary = backends.vocabulary(call.backend)
    with without_autocast(call.hidden):
        # Views of their own: autograd.grad below must stop here.
        leaves = {
            name: getattr(call, name).view_as(getattr(call, name))
            for name, want in zip(NAMES, wanted, strict=True)
            if want
        }
        one = call._replace(**leaves)
        hidden = vocabulary.shared(one.hidden, call.dtype)
        valid = call.targets != call.options.ignore_index
        results, upstream = zip(
            *results_of(linear_logits(hidden, one.weight, one.bias, valid, call.compute_dtype)), strict=True
        )
        grads = [grad.to(result.dtype).expand(result.shape) for result, grad in zip(results, upstream, strict=True)]
        found = torch.autograd.grad(results, list(leaves.values()), grads, create_graph=True)
        return dict(zip(leaves, found, strict=True))


def looped(operator: Differentiable[Any], size: int, dims: dict[str, int | None], args: Any) -> Any:
    """`torch.vmap` of an operator that sums over tokens: a call for each entry."""
    names, values = operator.fields.names, operator.fields.flat(args)
    results = []
    for i in range(size):
        entry = (
            value.select(dim, i) if isinstance(dim := dims[name], int) else value
            for name, value in zip(names, values, strict=True)
        )
        results.append(without_none(operator(operator.fields.of(tuple(entry)))))
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


linear_forward = Differentiable(ops.LINEAR_FORWARD, _forward_context, _forward_backward, looped)
linear_forward_with_grad = Differentiable(ops.LINEAR_FORWARD_WITH_GRAD, _with_grad_context, _with_grad_backward, looped)
