"""The derivatives of the linear loss's operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixce_kernels import backends
from mixce_kernels.autocast import without_autocast
from mixce_kernels.linear import ops
from mixce_kernels.linear.ops import N_SHARED, Inputs
from mixce_kernels.logits.autograd import Differentiable, is_plain, looped
from mixce_kernels.parallel.collectives import copy_to
from mixce_kernels.parallel.reference import token_losses_of
from mixce_kernels.reference import linear_logits

# Hidden states, weight and bias come first among the arguments, and nothing else is differentiated.
_N_DIFFERENTIATED = 3


def _save(ctx: Any, inputs: tuple[Any, ...], *others: Tensor | None) -> None:
    """Keeps the tensors for backward, under whatever hooks there are, and the other arguments."""
    hidden, weight, bias, targets, eta, *ctx.rest = inputs[:N_SHARED]
    ctx.n_inputs = len(inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, eta, *others)


def _shared(ctx: Any) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """The arguments that the operators share, and the other saved tensors."""
    hidden, weight, bias, targets, eta, *others = ctx.saved_tensors  # once: a checkpoint's hooks recompute them
    return (hidden, weight, bias, targets, eta, *ctx.rest), tuple(others)


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, state, stats, correct = output
    ctx.mark_non_differentiable(state, stats, correct)
    _save(ctx, inputs, state)


def _forward_backward(ctx: Any, grad_loss: Tensor | None, *_unused: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * ctx.n_inputs
    shared, (state,) = _shared(ctx)
    return _all_grads(ctx, _computed_grads(ctx, shared, state, grad_loss))


def _with_grad_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, state, stats, correct, *grads = output
    ctx.mark_non_differentiable(state, stats, correct, *grads)
    ctx.spent = False
    _save(ctx, inputs, state, inputs[N_SHARED + 1], *grads)


def _with_grad_backward(ctx: Any, grad_loss: Tensor | None, *_unused: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * ctx.n_inputs
    shared, (state, token_scale, *grads) = _shared(ctx)
    if ctx.spent or torch.is_grad_enabled():
        # The gradients of forward were scaled by an earlier backward, or a graph of them is asked for.
        return _all_grads(ctx, _computed_grads(ctx, shared, state, token_scale * grad_loss))
    # A batch that has no valid token has gradient 0, which NaN or infinity must not multiply, nor a row without one.
    valid = shared[3] != Inputs(shared).options.ignore_index
    row_factor = torch.where(valid, grad_loss, 1.0)
    factor = torch.where(valid.any(), grad_loss, 1.0)
    in_place = all(is_plain(tensor) for tensor in (grads[0], grad_loss))
    # Before they are scaled, so that nothing scales them twice.
    ctx.spent = in_place
    found: list[Tensor | None] = []
    for one, grad, scale, needed in zip(
        shared, grads, (row_factor, factor, factor), ctx.needs_input_grad, strict=False
    ):
        if not needed:
            found.append(None)
        elif in_place:
            found.append(_scaled_in_place(grad, scale, Inputs(shared).backend_name).to(one.dtype))
        else:
            # Traced: a compiler plans the memory itself, and wants no output of the forward written to. Or batched.
            scale = scale.unsqueeze(-1) if scale.dim() < grad.dim() and scale.dim() > 0 else scale
            found.append((grad * scale.to(grad.dtype)).to(one.dtype))
    return _all_grads(ctx, found)


def _scaled_in_place(grad: Tensor, scale: Tensor, backend: str) -> Tensor:
    """The gradient with its rows, or all of it, multiplied in its own memory; rows whose factor is 1 are not read."""
    rows = grad.unsqueeze(0) if grad.dim() == 1 else grad
    # Not by the operator, which would tell autograd: `ctx.spent` does, and lets a second backward pass.
    if rows.numel() > 0:
        backends.get(backend).scale_rows_(rows, scale.expand(rows.shape[0]))
    # With a version of its own: whoever accumulates into it has not changed a saved tensor.
    return grad.data


def _computed_grads(ctx: Any, shared: tuple[Any, ...], state: Tensor, grad_loss: Tensor) -> list[Tensor | None]:
    """The gradients of sum(grad_loss * loss), computed anew."""
    wanted = list(ctx.needs_input_grad[:_N_DIFFERENTIATED])
    if torch.is_grad_enabled():
        return _differentiable_grads(Inputs(shared), grad_loss, wanted)
    grads = torch.ops.mixce_kernels.linear_grad(*shared, state, grad_loss, wanted)
    return [grad.to(one.dtype) if want else None for one, grad, want in zip(shared, grads, wanted, strict=False)]


def _differentiable_grads(inputs: Inputs, grad_loss: Tensor, wanted: list[bool]) -> list[Tensor | None]:
    """The gradients with a graph of their own, by PyTorch through the plain formula on all logits at once."""
    with without_autocast(inputs.hidden):
        # Views of their own: autograd.grad below must stop here.
        leaves = [
            one.view_as(one) if want and one is not None else one
            for one, want in zip((inputs.hidden, inputs.weight, inputs.bias), wanted, strict=True)
        ]
        hidden, weight, bias = leaves
        if inputs.shard is not None:
            hidden = copy_to(inputs.shard.group, hidden.to(inputs.dtype))
        valid = inputs.targets != inputs.options.ignore_index
        logits = linear_logits(hidden, weight, bias, valid, inputs.compute_dtype)
        eta = inputs.eta_value if inputs.eta is None else inputs.eta
        loss, _ = token_losses_of(inputs.backend)(logits, inputs.targets, eta, inputs.options)
        sources = [one for one, want in zip(leaves, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(loss, sources, grad_loss, create_graph=True))
        return [next(found) if want else None for want in wanted]


def _all_grads(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    return *grads, *(None,) * (ctx.n_inputs - _N_DIFFERENTIATED)


linear_forward = Differentiable(ops.linear_forward, _forward_context, _forward_backward, looped)
linear_forward_with_grad = Differentiable(ops.linear_forward_with_grad, _with_grad_context, _with_grad_backward, looped)
