"""The derivatives of the operators, and the way an eager call reaches them."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_in_torch_dispatch_mode

from mixce_kernels.backends.layout import layout_of, materialized
from mixce_kernels.logits import ops
from mixce_kernels.options import TokenOptions
from mixce_kernels.parallel.reference import token_losses_of


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, eta, ctx.eta_value, *ctx.options, _, inplace, ctx.backend = inputs
    _, state, stats, correct = output
    ctx.overwrite = Overwrite.of(inplace)
    ctx.mark_non_differentiable(state, stats, correct)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, state, eta)


def _forward_backward(ctx: Any, grad_loss: Tensor | None, *_unused: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (len(ctx.options) + 6)
    if grad_loss is None:
        return None, *nothing
    logits, targets, state, eta = ctx.saved_tensors
    if ctx.overwrite.allowed(logits) and is_plain(grad_loss) and not torch.is_grad_enabled():
        ops.logits_grad_(logits, targets, state, materialized(grad_loss), *ctx.options, ctx.backend)
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
        return _scaled(grad_logits, grad_loss), *nothing
    ops.scale_rows_(grad_logits, materialized(grad_loss), ctx.backend)
    return grad_logits, *nothing


def _scaled(grad_logits: Tensor, grad_loss: Tensor) -> Tensor:
    return (grad_logits * grad_loss.unsqueeze(-1)).to(grad_logits.dtype)


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor has memory of its own, and is none that a compiler traces or a transformation batches."""
    batched = torch._C._functorch.is_batchedtensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor)
    return type(tensor) is Tensor and not batched


def is_transformed() -> bool:
    """Whether the call is being compiled or transformed by torch.func: memory is then not ours to write over."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class Overwrite(enum.Enum):
    """Whether a backward may write the gradient over the logits that its forward saved."""

    NEVER = enum.auto()
    # Autograd keeps the logits and counts their versions: whoever else saved them gets its error.
    WATCHED = enum.auto()
    # Hooks give the logits back, and what they give to others has no versions. A checkpoint recomputes the logits for
    # all that saved them: the memory is free once nobody else refers to it.
    RECOMPUTED = enum.auto()

    @classmethod
    def of(cls, inplace: bool) -> Overwrite:
        """For a forward that runs now."""
        if not inplace:
            return cls.NEVER
        hooks = hooks_on_saved_tensors()
        if hooks is None:
            return cls.WATCHED
        _, unpack = hooks
        recomputes = getattr(unpack, "__module__", None) == "torch.utils.checkpoint"
        return cls.RECOMPUTED if recomputes else cls.NEVER

    def allowed(self, logits: Tensor) -> bool:
        """For the logits as they came back."""
        return self is Overwrite.WATCHED or (
            self is Overwrite.RECOMPUTED and _references(logits) <= _references(logits.new_empty(1))
        )


def hooks_on_saved_tensors() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The hooks under which autograd saves tensors now, as a checkpoint's; None where it keeps them as they are."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _references(tensor: Tensor) -> int:
    """The number of references to the tensor's memory, its own included."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


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
        grad_loss = _of_valid_rows(grad_loss, targets, ctx.ignore_index)
        if not is_plain(grad_loss):  # batched
            return _scaled(grad_logits, grad_loss), *(None,) * ctx.n_inputs
        ops.scale_rows_(grad_logits, materialized(grad_loss), ctx.backend)
        return grad_logits.detach(), *(None,) * ctx.n_inputs


def forward_with_grad_inplace(*args: Any) -> tuple[Tensor, ...]:
    """`forward_with_grad`, whose gradient lies in the logits' memory."""
    return ForwardWithGradInplace.apply(*_materialized(args))


def _materialized(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(materialized(arg) if isinstance(arg, Tensor) else arg for arg in args)


class Differentiable:
    """An operator with its derivative, called through the dispatcher only where somebody listens there.

    A compiler, a dispatch mode or a tensor subclass needs the dispatcher; an eager call of plain tensors would only pay
    for it, tens of microseconds a call.
    """

    def __init__(
        self,
        kernel: Callable[..., Any],
        context: Callable[..., None],
        backward: Callable[..., Any],
        vmap: Callable[..., Any],
    ) -> None:
        """Takes what the operator does, its derivative, and how `torch.vmap` calls it: see `folded` and `looped`."""

        def kernel_with_context(ctx: Any, *args: Any) -> Any:
            output = kernel(*args)
            context(ctx, args, output)
            return output

        def batched(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
            return vmap(self, info.batch_size, in_dims, args)

        name = kernel.__name__
        torch.library.register_autograd(f"mixce_kernels::{name}", backward, setup_context=context, lib=ops.library)
        torch.library.register_vmap(f"mixce_kernels::{name}", batched, lib=ops.library)
        self.kernel = kernel
        self.operator = getattr(torch.ops.mixce_kernels, name)
        self.node = _function(name, forward=kernel_with_context, backward=backward)
        # The form that torch.func asks for; it inspects its own signature at each call, which is slow.
        self.transformable_node = _function(
            name, forward=kernel, setup_context=context, backward=backward, vmap=batched
        )

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or (is_in_torch_dispatch_mode() and not _collectives_are_watched()):
            return self.operator(*args)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if any(type(tensor) not in (Tensor, Parameter) or _is_batch_of_grads(tensor) for tensor in tensors):
            return self.operator(*args)
        if torch._C._are_functorch_transforms_active():
            return self.transformable_node.apply(*args)
        args = _materialized(args)
        differentiate = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        # In forward mode a node says that it has no such derivative; a kernel would lose it silently.
        differentiate = differentiate or forward_ad._current_level >= 0
        return (self.node.apply if differentiate else self.kernel)(*args)


def folded(
    call: Callable[..., Any], size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], *, state: int | None = None
) -> Any:
    """`torch.vmap` of an operator over tokens, whose leading dimensions are any: one call, with one dimension more.

    `state` is the position of an argument [5, ...], whose dimensions of tokens come after its own.
    """
    tensors = [
        _with_dim(arg, dim, size, int(i == state)) if isinstance(arg, Tensor) else arg
        for i, (arg, dim) in enumerate(zip(args, in_dims, strict=True))
    ]
    logits, *rest = tensors
    result = call(logits if layout_of(logits) is not None else logits.contiguous(), *rest)
    if isinstance(result, Tensor):
        return result, 0
    # Loss, state, statistics, correct, and the gradient; statistics that were not asked for are empty.
    dims = (0, 1, 1, 0, 0)
    out_dims = tuple(None if one.shape == (0,) else dim for one, dim in zip(result, dims, strict=False))
    return tuple(result), out_dims


def _with_dim(tensor: Tensor, dim: int | None, size: int, at: int) -> Tensor:
    """The tensor with the dimension of the batch at `at`, where it is at `dim` now or, for None, missing."""
    if dim is not None:
        return tensor.movedim(dim, at)
    return tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])


def looped(call: Callable[..., Any], size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """`torch.vmap` of an operator that sums over tokens: a call for each entry."""
    results = [
        call(*(arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(size)
    ]
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def _is_batch_of_grads(tensor: Tensor) -> bool:
    """Whether these are upstream gradients of `torch.autograd.grad(is_grads_batched=True)`."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def _collectives_are_watched() -> bool:
    """Whether the dispatch modes are those of CommDebugMode, which sees no collective inside of an operator."""
    return all(type(mode).__name__ == "CommDebugMode" for mode in _get_current_dispatch_mode_stack())


def _function(name: str, **methods: Callable[..., Any]) -> Any:
    return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})


forward = Differentiable(ops.forward, _forward_context, _forward_backward, folded)
logits_grad = Differentiable(
    ops.logits_grad, _logits_grad_context, _logits_grad_backward, functools.partial(folded, state=2)
)
forward_with_grad = Differentiable(ops.forward_with_grad, _with_grad_context, _with_grad_backward, folded)
