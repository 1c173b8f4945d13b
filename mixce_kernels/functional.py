"""`fused_mixce_loss`: checks, picks a backend, calls the operator, weighs and reduces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mixce_kernels import backends
from mixce_kernels.backends.layout import check_overwritable, layout_of, materialized, overlaps_itself
from mixce_kernels.logits import autograd
from mixce_kernels.options import (
    TokenOptions,
    accumulate_dtype,
    check_eta,
    check_reduction,
    check_tensors,
    check_token_options,
    check_values,
    has_dtensor,
)
from mixce_kernels.reduction import Reduction
from mixce_kernels.reference import mixce_loss_reference
from mixce_kernels.stats import MixCEStats


def fused_mixce_loss(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    eta: float | Tensor = 0.5,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,  # [...]
    num_items_in_batch: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace_backward: bool = False,
    grad_in_forward: bool = False,
    return_stats: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, MixCEStats]:
    """The mixture of forward and reverse cross-entropy of next-token logits, fused into one pass over the vocabulary.

    With nll = -log softmax(z)[target] and q = exp(-nll), the model's probability of the target, a token's loss is

        (eta + (1 - eta) * stopgrad(q)) * ce + z_loss * logsumexp(z)^2,

    where ce is nll (label-smoothed where asked) and z = softcap * tanh(logit_scale * logits / softcap), or
    logit_scale * logits without a softcap. eta = 1 is `torch.nn.functional.cross_entropy`; eta = 0 is the reverse
    cross-entropy approximation, known as dynamic fine-tuning (DFT). Source: Zhang et al., "MixCE", ACL 2023
    (arXiv 2305.16958): the self-reweighted mixture.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64, unnormalised. Leading dimensions may be strided, as in
            `logits[:, :-1]`: rows are read where they lie as long as two strides reach them all, and are made
            contiguous otherwise. Arithmetic is float32 (float64 for float64 logits), also under autocast.
        targets: [...], int64 or int32, class indices in [0, V) or `ignore_index`.
        eta: mixing ratio in [0, 1]: a number, or a floating tensor that broadcasts to targets' shape and is read on
            the device, so that a schedule neither recompiles nor synchronises. A number that misses the range by at
            most 1e-6 is its end. Must not require a gradient; the forward's values count, also where the tensor is
            overwritten before backward.
        ignore_index: tokens with this target have loss, gradient and statistics 0; their logits are not read.
        reduction: "none" gives targets' shape, "sum" the sum, "mean" the sum divided by the number of valid tokens
            (by the sum of their weights, with `token_weights`). A divisor of 0 counts as 1: a batch whose every
            token is ignored has loss 0 and gradient 0.
        token_weights: [...], floating, factors of the tokens' losses; must not require a gradient.
        num_items_in_batch: replaces the divisor of "mean": for gradient accumulation and data parallelism. A number or
            a tensor of one element on any device; must not require a gradient.
        label_smoothing: in [0, 1], as in `torch.nn.functional.cross_entropy`. q and the weight stay unsmoothed.
        z_loss: factor of logsumexp(z)^2, which is not weighted by eta or q.
        softcap: bound of the capped logits, or None.
        logit_scale: factor of the logits (1 / temperature), positive.
        inplace_backward: the gradient overwrites the logits' memory in backward instead of allocating as much again.
            Whoever saved the logits for a later backward then gets PyTorch's error. Without a gradient to compute,
            logits are never touched. A leaf, or a view of one, is refused. This has no effect under `torch.compile`,
            which plans memory itself, under `torch.func`, and under hooks on saved tensors, whose copies autograd does
            not watch; within a checkpoint it has where nothing else needs the logits.
        grad_in_forward: the gradient is computed together with the loss: one read and one write of the logits in all,
            where a row fits on the chip. An upstream gradient other than 1 multiplies it in backward: for half
            precision a second rounding. With `inplace_backward`, forward itself overwrites the logits.
        return_stats: also return the tokens' statistics, from the same pass.
        validate: check the values of targets and of a tensor eta, synchronising with a GPU. On the CPU targets are
            always checked.
        backend: "cpu", "cuda", "triton" or "reference"; None picks the best that can serve, or `MIXCE_BACKEND` of the
            environment.

    Returns:
        The loss, float32 (float64 for float64 logits); with `return_stats`, a pair of it and `MixCEStats`. Of a
        `DTensor` they are DTensors: the loss replicated, results of tokens placed as the tokens are.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, range, placement or combination is wrong.
        IndexError: a target is out of range, on the CPU or with `validate`. On a GPU, without `validate`, that row's
            loss and gradient are NaN.
        RuntimeError: the backend asked for cannot serve these logits.
    """
    options = check_token_options(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    if inplace_backward and isinstance(logits, Tensor) and not autograd.is_transformed():
        check_overwritable(logits)
    keywords: dict[str, Any] = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "reduction": reduction,
        "token_weights": token_weights,
        "num_items_in_batch": num_items_in_batch,
        "inplace_backward": inplace_backward,
        "grad_in_forward": grad_in_forward,
        "return_stats": return_stats,
        "validate": validate,
    }
    if has_dtensor(logits, targets, eta, token_weights):
        from mixce_kernels import dtensors

        return dtensors.mixce_loss(logits, targets, eta, backend=backend, **keywords)
    check_tensors(logits, targets)
    eta = check_eta(eta, targets)
    check_reduction(reduction, targets, token_weights, num_items_in_batch)
    backend = backends.resolve(backend, logits)
    if backend == "reference":
        return mixce_loss_reference(logits, targets, eta, **keywords)
    if validate:
        check_values(targets, eta, ignore_index, logits.shape[-1])
    reduced = Reduction.of(reduction, targets, options.ignore_index, token_weights, num_items_in_batch)
    return fused_loss(logits, targets, eta, options, reduced, inplace_backward, grad_in_forward, return_stats, backend)


def fused_loss(
    logits: Tensor,  # [..., V], or the columns of a shard
    targets: Tensor,  # [...]
    eta: float | Tensor,  # a number or of targets' shape
    options: TokenOptions,
    reduced: Reduction,
    inplace_backward: bool,
    grad_in_forward: bool,
    return_stats: bool,
    backend: str,  # its name or address, not `reference`
) -> Tensor | tuple[Tensor, MixCEStats]:
    """The loss by a backend's kernels, of arguments that were checked before."""
    if not torch.compiler.is_compiling():
        logits = materialized(logits)
    if logits.shape[-1] > 0 and layout_of(logits) is None:
        logits = logits.contiguous()
    eta_tensor, eta_value = (eta, 0.0) if isinstance(eta, Tensor) else (None, eta)
    wants_grad = logits.requires_grad and torch.is_grad_enabled()
    # A tensor that wraps another, such as one that a collective has yet to fill, is for the dispatcher to unwrap.
    wrapped = any(isinstance(one, Tensor) and type(one) not in (Tensor, Parameter) for one in (logits, targets, eta))
    inplace = inplace_backward and wants_grad and not wrapped and not autograd.is_transformed()
    if inplace and overlaps_itself(logits):
        raise ValueError("expected logits whose rows do not share memory for inplace_backward, got expanded logits")

    if grad_in_forward and wants_grad:
        # The gradient is final only if every factor of a token is known before the kernel runs.
        overwrite = inplace and autograd.hooks_on_saved_tensors() is None
        call = autograd.forward_with_grad_inplace if overwrite else autograd.forward_with_grad
        loss, _, stats, correct, *_ = call(
            logits, targets, reduced.token_scale(targets), eta_tensor, eta_value, *options, return_stats, backend
        )
        loss = reduced.sum_of(loss)
    else:
        loss, _, stats, correct = autograd.forward(
            logits, targets, eta_tensor, eta_value, *options, return_stats, inplace, backend
        )
        loss = reduced.apply(loss)
    loss = loss.to(accumulate_dtype(logits.dtype))
    return (loss, MixCEStats.of(stats, correct)) if return_stats else loss
