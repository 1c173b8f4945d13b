"""The body of the loss of logits: checks the tensors, picks a backend, calls the operator, weighs and reduces."""

from __future__ import annotations

import torch
from torch import Tensor

from mixce_kernels import backends, reference
from mixce_kernels.backends.layout import layout_of, materialized, overlaps_itself
from mixce_kernels.checks import check_tensors, check_values, is_unwrapped
from mixce_kernels.logits import autograd
from mixce_kernels.logits.ops import Forward, ForwardWithGrad
from mixce_kernels.logits.overwriting import check_overwritable, hooks_on_saved_tensors, is_transformed
from mixce_kernels.mixture import Mixture, check_weighting, factor_of
from mixce_kernels.options import LossOptions, TokenOptions, accumulate_dtype, check_eta
from mixce_kernels.reduction import NO_REDUCTION, Reduction
from mixce_kernels.stats import MixCEStats
from mixce_kernels.weightings import CustomWeighting, Given, is_built_in


def mixce_loss(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    eta: float | Tensor,
    options: LossOptions,
) -> Tensor | tuple[Tensor, MixCEStats]:
    """`fused_mixce_loss` of plain tensors."""
    token_options = options.for_tokens()
    if options.inplace_backward:
        check_overwritable(logits)
    check_tensors(logits, targets)
    eta = check_eta(eta, targets)
    weighting = check_weighting(options.weighting, targets)
    options.check_reduction(targets)
    backend = backends.resolve(options.backend, logits)
    if backend == "reference":
        return reference.loss_of_logits(logits, targets, eta, options)
    if options.validate:
        check_values(targets, eta, weighting, token_options.ignore_index, logits.shape[-1])
    return fused_loss(logits, targets, eta, weighting, options, token_options, backend)


def fused_loss(
    logits: Tensor,  # [..., V], or the columns of a part of the vocabulary
    targets: Tensor,  # [...]
    eta: float | Tensor,  # a number or of targets' shape
    weighting: CustomWeighting,
    options: LossOptions,
    token_options: TokenOptions,
    backend: str,  # what `backends.vocabulary` takes
) -> Tensor | tuple[Tensor, MixCEStats]:
    """The loss by a backend's kernels, of arguments that were checked before."""
    reduction = Reduction.of(options, targets)
    logits = readable(logits)
    # What a transformation batches are tokens' losses: PyTorch reduces them.
    functional = torch._C._are_functorch_transforms_active()
    in_kernels = NO_REDUCTION if functional else reduction
    wants_grad = logits.requires_grad and torch.is_grad_enabled()
    inplace = options.inplace_backward and wants_grad and may_overwrite(logits, targets, eta)
    if not is_built_in(weighting):
        found = _statistics(logits, targets, token_options, backend)
        weighting = Given(factor_of(weighting, found, validate=options.validate))
    mixture = Mixture.of(eta, weighting, targets, accumulate_dtype(logits.dtype))
    with_stats = options.return_stats or weighting.needs_sums

    if options.grad_in_forward and wants_grad and not functional:
        # The gradient is final only if every factor of a token is known before the kernel runs.
        overwrite = inplace and hooks_on_saved_tensors() is None
        call = autograd.forward_with_grad_inplace if overwrite else autograd.forward_with_grad
        loss, _, _, stats, correct, *_ = call(
            ForwardWithGrad(logits, targets, mixture, token_options, in_kernels, with_stats, backend)
        )
    else:
        loss, _, _, stats, correct = autograd.forward(
            Forward(
                logits, targets, mixture, token_options, in_kernels, wants_grad or functional, with_stats, inplace,
                backend,
            )
        )  # fmt: skip
    if functional:
        loss = reduction.apply(loss, targets, token_options.ignore_index)
    return (loss, MixCEStats.of(stats, correct)) if options.return_stats else loss


def _statistics(logits: Tensor, targets: Tensor, token_options: TokenOptions, backend: str) -> MixCEStats:
    """The tokens' statistics, by a pass of their own without a graph: what a function of the caller's weighs by."""
    with torch.no_grad():
        call = Forward(
            logits.detach(), targets, Mixture(), token_options, NO_REDUCTION, with_state=False, with_stats=True,
            inplace_backward=False, backend=backend,
        )  # fmt: skip
        _, _, _, stats, correct = autograd.forward(call)
    return MixCEStats.of(stats, correct)


def readable(logits: Tensor) -> Tensor:
    """The logits as the kernels can read them: what their memory holds, in rows that two strides reach."""
    if not torch.compiler.is_compiling():
        logits = materialized(logits)
    if not logits.is_contiguous() and logits.shape[-1] > 0 and layout_of(logits) is None:
        logits = logits.contiguous()
    return logits


def may_overwrite(logits: Tensor, *others: object) -> bool:
    """Whether the gradient may take the logits' memory; raises ValueError where rows share it."""
    # A tensor that wraps another, such as one that a collective has yet to fill, is for the dispatcher to unwrap.
    if is_transformed() or not is_unwrapped(logits, *others):
        return False
    if overlaps_itself(logits):
        raise ValueError("expected logits whose rows do not share memory for inplace_backward, got expanded logits")
    return True
