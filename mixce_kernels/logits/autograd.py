"""The derivatives of the operators on logits."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mixce_kernels import backends
from mixce_kernels.backends.layout import layout_of, materialized
from mixce_kernels.logits import ops
from mixce_kernels.logits.ops import Forward, ForwardWithGrad, LogitsGrad, LogitsGradInplace, ScaleRows
from mixce_kernels.logits.overwriting import Overwrite
from mixce_kernels.operators import Differentiable, given, is_plain, without_none

Grads = dict[str, Tensor | None]
_MAY_BE_ONE_NUMBER = frozenset(("grad_loss", "token_scale", "grad_logprobs", "grad_entropy"))


def _forward_context(ctx: Any, args: Forward, output: tuple[Tensor | None, ...]) -> None:
    ctx.overwrite = Overwrite.of(args.inplace_backward)
    _keep(ctx, args, output)


def _keep(ctx: Any, args: Forward | ForwardWithGrad, output: tuple[Tensor | None, ...]) -> None:
    """Keeps what `_kept` needs for a backward that gets a gradient of the loss alone."""
    _, token_scale, state, *_ = output
    ctx.mark_non_differentiable(*[one for one in output[1:] if one is not None])
    ctx.set_materialize_grads(False)
    mixture = args.mixture
    if mixture.eta is None and mixture.parameters is None:
        ctx.save_for_backward(args.logits, args.targets, state, token_scale)
    else:
        ctx.save_for_backward(args.logits, args.targets, state, token_scale, *mixture.tensors())
        mixture = mixture.with_tensors(None, None)
    ctx.constants = mixture, args.options, args.backend


def _kept(ctx: Any, grad_loss: Tensor) -> LogitsGrad:
    """The gradient's arguments, for the upstream gradient of the loss."""
    logits, targets, state, token_scale, *tensors = ctx.saved_tensors
    mixture, options, backend = ctx.constants
    mixture = mixture.with_tensors(*tensors) if tensors else mixture
    return LogitsGrad(logits, targets, state, grad_loss, given(token_scale), mixture, options, backend)


def _forward_backward(ctx: Any, grad_loss: Tensor | None, *_unused: None) -> Grads:
    if grad_loss is None:
        return {}
    args = _kept(ctx, grad_loss)
    if ctx.overwrite.allowed(args.logits) and is_plain(grad_loss) and not torch.is_grad_enabled():
        ops.logits_grad_(
            LogitsGradInplace(
                args.logits, args.targets, args.state, materialized(grad_loss), args.token_scale, args.options,
                args.backend,
            )
        )  # fmt: skip
        return {"logits": args.logits.detach()}
    return {"logits": logits_grad(args)}


def _logits_grad_context(ctx: Any, args: LogitsGrad, output: Tensor) -> None:
    ops.LOGITS_GRAD.fields.save(ctx, args)


def _logits_grad_backward(ctx: Any, grad_output: Tensor) -> Grads:
    """The second derivative, by PyTorch through the plain formula; the token's weight stays fixed, as in the first."""
    args, _ = ops.LOGITS_GRAD.fields.saved(ctx)
    logits, grad_loss = args.logits, args.grad_loss
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not create_graph:
            logits, grad_loss = logits.detach(), grad_loss.detach()
        # Views of their own: autograd.grad below must stop here.
        logits, grad_loss = (tensor.view_as(tensor).requires_grad_() for tensor in (logits, grad_loss))
        losses, _ = backends.vocabulary(args.backend).token_losses(logits, args.targets, args.mixture, args.options)
        upstream = grad_loss if args.token_scale is None else grad_loss * args.token_scale
        upstream = upstream.to(losses.dtype).expand(losses.shape)
        (grad_logits,) = torch.autograd.grad(losses, logits, upstream, create_graph=True)
        grad_logits, grad_grad_loss = torch.autograd.grad(
            grad_logits, (logits, grad_loss), grad_output, create_graph=create_graph, allow_unused=True
        )
    return {"logits": grad_logits, "grad_loss": grad_grad_loss}


def _with_grad_context(ctx: Any, args: ForwardWithGrad, output: tuple[Tensor | None, ...]) -> None:
    *_, ctx.grad_logits = output
    _keep(ctx, args, output)


def _with_grad_backward(ctx: Any, grad_loss: Tensor | None, *_unused: None) -> Grads:
    if grad_loss is None:
        return {}
    args = _kept(ctx, grad_loss)
    if ctx.grad_logits is None or torch.is_grad_enabled():
        # The gradient of forward is spent, or a graph of it is asked for: compute it anew.
        return {"logits": logits_grad(args)}
    grad_logits, ctx.grad_logits = ctx.grad_logits, None
    ignore_index = args.options.ignore_index
    if not is_plain(grad_logits) or not is_plain(grad_loss):
        # Traced: a compiler plans the memory itself, and wants no output of the forward written to. Or batched.
        return {"logits": _scaled(grad_logits, grad_loss, args.targets, ignore_index)}
    ops.scale_rows_(ScaleRows(grad_logits, materialized(grad_loss), args.targets, ignore_index, args.backend))
    return {"logits": grad_logits}


def _scaled(grad_logits: Tensor, grad_loss: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """`ops.scale_rows_` by PyTorch: NaN or infinity must not multiply the gradient of an ignored row, which is 0."""
    factor = torch.where(targets == ignore_index, 1.0, grad_loss)
    return (grad_logits * factor.unsqueeze(-1)).to(grad_logits.dtype)


class _ForwardWithGradInplace(torch.autograd.Function):
    """`ops.forward_with_grad_` as a node of the graph: the gradient lies in the logits' memory from the forward on.

    `torch.library.register_autograd` refuses operators that write to an argument, hence a node of its own.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, args: ForwardWithGrad) -> tuple[Tensor | None, ...]:
        results = ops.forward_with_grad_(args)
        ctx.mark_non_differentiable(*[one for one in results[1:] if one is not None])
        ctx.set_materialize_grads(False)
        # Saved after the write: whoever saved the logits before it gets PyTorch's error, and so does a second backward.
        ctx.save_for_backward(logits, args.targets)
        ctx.ignore_index, ctx.backend = args.options.ignore_index, args.backend
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_unused: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, None
        grad_logits, targets = ctx.saved_tensors
        if not is_plain(grad_loss):  # batched
            return _scaled(grad_logits, grad_loss, targets, ctx.ignore_index), None
        ops.scale_rows_(ScaleRows(grad_logits, materialized(grad_loss), targets, ctx.ignore_index, ctx.backend))
        return grad_logits.detach(), None


def forward_with_grad_inplace(args: ForwardWithGrad) -> Any:
    """`forward_with_grad`, whose gradient lies in the logits' memory."""
    fields = ops.FORWARD_WITH_GRAD_.fields
    values = fields.flat(args)
    args = fields.of(tuple(materialized(value) if isinstance(value, Tensor) else value for value in values))
    return _ForwardWithGradInplace.apply(args.logits, args)


def folded(
    operator: Differentiable[Any], size: int, dims: dict[str, int | None], args: Any, *, out_dims: tuple[int, ...]
) -> Any:
    """`torch.vmap` of an operator over tokens, whose leading dimensions are any: one call, with one dimension more.

    `out_dims` are where that is in the results, of which those that were not asked for are [0]. The body of the loss
    reduces nothing in an operator that `torch.func` transforms.
    """
    fields = operator.fields
    values = dict(zip(fields.names, fields.flat(args), strict=True))
    tensors = {
        # The dimensions of tokens come after those of the state and the parameters.
        name: _with_dim(value, dims[name], size, at=int(name in ("state", "entropy_state", "parameters")))
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    shape = tensors["targets"].shape
    for name in tensors.keys() & _MAY_BE_ONE_NUMBER:
        # One number for all tokens of an entry of the batch becomes one for each.
        tensors[name] = tensors[name].reshape(tensors[name].shape + (1,) * (len(shape) - tensors[name].dim()))
        tensors[name] = tensors[name].expand(shape)
    if layout_of(tensors["logits"]) is None:
        tensors["logits"] = tensors["logits"].contiguous()
    result = operator(fields.of(tuple((values | tensors).values())))
    if isinstance(result, Tensor):
        return result, 0
    result = without_none(result)
    return result, tuple(None if one.shape == (0,) else dim for one, dim in zip(result, out_dims, strict=True))


def _with_dim(tensor: Tensor, dim: int | None, size: int, at: int) -> Tensor:
    """The tensor with the dimension of the batch at `at`, where it is at `dim` now or, for None, missing."""
    if dim is not None:
        return tensor.movedim(dim, at)
    return tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])


# The loss, token_scale, state, statistics, and `correct`.
_folded = functools.partial(folded, out_dims=(0, 0, 1, 1, 0))
forward = Differentiable(ops.FORWARD, _forward_context, _forward_backward, _folded)
logits_grad = Differentiable(ops.LOGITS_GRAD, _logits_grad_context, _logits_grad_backward, _folded)
forward_with_grad = Differentiable(ops.FORWARD_WITH_GRAD, _with_grad_context, _with_grad_backward, _folded)
