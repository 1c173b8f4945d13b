"""The derivatives of the operators, and the way an eager call reaches them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_in_torch_dispatch_mode

from mixce_kernels import ops
from mixce_kernels.options import TokenOptions
from mixce_kernels.sharded_reference import token_losses_of


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
        ops.logits_grad_(logits, targets, state, grad_loss, *ctx.options, ctx.backend)
        return logits.detach(), *nothing
    grad_logits = logits_grad(logits, targets, state, grad_loss, eta, ctx.eta_value, *ctx.options, ctx.backend)
    return grad_logits, *nothing


def _logits_grad_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, targets, _, grad_loss, eta, ctx.eta_value, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(logits, targets, grad_loss, eta)


def _logits_grad_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The second derivative, by PyTorch through the plain formula; the token's weight stays fixed, as in the first."""
    logits, targets, grad_loss, eta = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not create_graph:
            logits, grad_loss = logits.detach(), grad_loss.detach()
        # Views of their own: autograd.grad below must stop here.
        logits, grad_loss = (tensor.view_as(tensor).requires_grad_() for tensor in (logits, grad_loss))
        eta = ctx.eta_value if eta is None else eta
        loss, _ = token_losses_of(ctx.backend)(logits, targets, eta, TokenOptions(*ctx.options))
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
        scaled = token_scale * grad_loss
        grad_logits = logits_grad(logits, targets, state, scaled, eta, ctx.eta_value, *ctx.options, ctx.backend)
        return grad_logits, *nothing
    grad_logits, ctx.grad_logits = ctx.grad_logits, None
    grad_loss = _of_valid_rows(grad_loss, targets, ctx.options[0])
    if not is_plain(grad_logits) or not is_plain(grad_loss):
        # Traced: a compiler plans the memory itself, and wants no output of the forward written to. Or batched.
        return (grad_logits * grad_loss.unsqueeze(-1)).to(grad_logits.dtype), *nothing
    ops.scale_rows_(grad_logits, grad_loss, ctx.backend)
    return grad_logits, *nothing


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor has memory of its own, and is none that a compiler traces or a transformation batches."""
    batched = torch._C._functorch.is_batchedtensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor)
    return type(tensor) is Tensor and not batched


def is_transformed() -> bool:
    """Whether the call is being compiled or transformed by torch.func: memory is then not ours to write over."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _of_valid_rows(grad_loss: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """The upstream gradient, 1 where ignored: the gradient there is 0, which NaN or infinity must not multiply."""
    return torch.where(targets == ignore_index, 1.0, grad_loss)


class ForwardWithGradInplace(torch.autograd.Function):
    """`ops.forward_with_grad_` as a node of the graph: the gradient lies in the logits' memory from the forward on.

    `torch.library.register_autograd` refuses operators that write to an argument, hence a node of its own.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        results = ops.forward_with_grad_(logits, *rest)
        ctx.backend = rest[-1]
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        ctx.n_inputs = len(rest)
        # Saved after the write: whoever saved the logits before it gets PyTorch's error, and so does a second backward.
        ctx.save_for_backward(logits, rest[0])
        ctx.ignore_index = rest[4]
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_unused: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, *(None,) * ctx.n_inputs
        grad_logits, targets = ctx.saved_tensors
        ops.scale_rows_(grad_logits, _of_valid_rows(grad_loss, targets, ctx.ignore_index), ctx.backend)
        return grad_logits.detach(), *(None,) * ctx.n_inputs


class Differentiable:
    """An operator with its derivative, called through the dispatcher only where somebody listens there.

    A compiler, a dispatch mode or a tensor subclass needs the dispatcher; an eager call of plain tensors would only pay
    for it, tens of microseconds a call.
    """

    def __init__(self, kernel: Callable[..., Any], context: Callable[..., None], backward: Callable[..., Any]) -> None:
        def kernel_with_context(ctx: Any, *args: Any) -> Any:
            output = kernel(*args)
            context(ctx, args, output)
            return output

        name = kernel.__name__
        torch.library.register_autograd(f"mixce_kernels::{name}", backward, setup_context=context, lib=ops.library)
        self.kernel = kernel
        self.operator = getattr(torch.ops.mixce_kernels, name)
        self.node = _function(name, forward=kernel_with_context, backward=backward)
        # The form that torch.func asks for; it inspects its own signature at each call, which is slow.
        self.transformable_node = _function(name, forward=kernel, setup_context=context, backward=backward)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or (is_in_torch_dispatch_mode() and not _collectives_are_watched()):
            return self.operator(*args)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if any(type(tensor) not in (Tensor, Parameter) for tensor in tensors):
            return self.operator(*args)
        if torch._C._are_functorch_transforms_active():
            return self.transformable_node.apply(*args)
        differentiate = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        # In forward mode a node says that it has no such derivative; a kernel would lose it silently.
        differentiate = differentiate or forward_ad._current_level >= 0
        return (self.node.apply if differentiate else self.kernel)(*args)


def _collectives_are_watched() -> bool:
    """Whether the dispatch modes are those of CommDebugMode, which sees no collective inside of an operator."""
    return all(type(mode).__name__ == "CommDebugMode" for mode in _get_current_dispatch_mode_stack())


def _function(name: str, **methods: Callable[..., Any]) -> Any:
    return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})


forward = Differentiable(ops.forward, _forward_context, _forward_backward)
logits_grad = Differentiable(ops.logits_grad, _logits_grad_context, _logits_grad_backward)
forward_with_grad = Differentiable(ops.forward_with_grad, _with_grad_context, _with_grad_backward)
