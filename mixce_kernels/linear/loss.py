"""The body of the loss of hidden states: checks the tensors, picks a backend, calls the operator, reduces."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixce_kernels import backends, reference
from mixce_kernels.autocast import autocast_dtype
from mixce_kernels.backends.results import STATS_WIDTH
from mixce_kernels.checks import check_linear_tensors, check_values
from mixce_kernels.linear import autograd, tiles
from mixce_kernels.linear.chunks import LinearCall
from mixce_kernels.linear.ops import LinearForward, LinearForwardWithGrad
from mixce_kernels.mixture import Mixture, check_weighting, factor_of
from mixce_kernels.options import LinearOptions, LossOptions, TokenOptions, accumulate_dtype, check_eta
from mixce_kernels.reduction import NO_REDUCTION, Reduction
from mixce_kernels.stats import MixCEStats
from mixce_kernels.weightings import CustomWeighting, Given, is_built_in


class Checked(NamedTuple):
    """What the checks of a call find."""

    token_options: TokenOptions
    compute_dtype: torch.dtype  # of the products' operands
    eta: float | Tensor  # a number or of targets' shape
    weighting: CustomWeighting


def linear_mixce_loss(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [...]
    eta: float | Tensor,
    options: LossOptions,
    linear: LinearOptions,
) -> Tensor | tuple[Tensor, MixCEStats]:
    """`fused_linear_mixce_loss` of plain tensors and a whole weight."""
    found = checked(hidden, weight, bias, targets, eta, options, linear)
    backend = resolve(hidden, weight, options, linear, found)
    if backend == "reference":
        return reference.loss_of_hidden(hidden, weight, bias, targets, found.eta, options)
    if options.validate:
        check_values(targets, found.eta, found.weighting, found.token_options.ignore_index, weight.shape[0])
    return fused_loss(hidden, weight, bias, targets, options, linear, found, backend=backend)


def checked(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [...]
    eta: float | Tensor,
    options: LossOptions,
    linear: LinearOptions,
    *,
    sharded: bool = False,
) -> Checked:
    """Checks whatever needs no backend; raises as `fused_linear_mixce_loss` does."""
    token_options = options.for_tokens()
    compute_dtype = check_linear_tensors(hidden, weight, bias, targets, autocast_dtype(hidden), sharded=sharded)
    eta = check_eta(eta, targets)
    weighting = check_weighting(options.weighting, targets)
    options.check_reduction(targets)
    linear.check(options.backend, sharded=sharded)
    return Checked(token_options, compute_dtype, eta, weighting)


def resolve(hidden: Tensor, weight: Tensor, options: LossOptions, linear: LinearOptions, found: Checked) -> str:
    """The backend that serves; raises RuntimeError where that of path "tiles" or a named one cannot."""
    if linear.path == "tiles":
        reason = tiles.unavailable(hidden, weight)
        if reason is not None:
            raise RuntimeError(f"path 'tiles' cannot serve this call: {reason}")
        return "triton"
    like_logits = hidden.new_empty((), dtype=accumulate_dtype(found.compute_dtype)).expand(1, weight.shape[0])
    return backends.resolve(options.backend, like_logits)


def fused_loss(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D], or the rows of a part of the vocabulary
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [...]
    options: LossOptions,
    linear: LinearOptions,
    found: Checked,
    *,
    backend: str,  # what `backends.vocabulary` takes
) -> Tensor | tuple[Tensor, MixCEStats]:
    """The loss by a backend's kernels, of arguments that were checked before."""
    reduction = Reduction.of(options, targets)
    call = LinearCall(
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        weight=weight,
        bias=bias,
        targets=targets.reshape(-1),
        mixture=Mixture(),
        options=found.token_options,
        reduction=reduction._replace(weights=None if reduction.weights is None else reduction.weights.reshape(-1)),
        compute_dtype=found.compute_dtype,
        max_chunk_bytes=linear.max_chunk_bytes,
        # Counting the rows that are left needs the host: on a GPU it synchronises.
        drop_ignored=options.validate or backends.vocabulary(backend).kernels.checks_targets,
        path=linear.path,
        backend=backend,
    )
    weighting = found.weighting
    if not is_built_in(weighting):
        weighting = Given(factor_of(weighting, _statistics(call, targets), validate=options.validate))
    mixture = Mixture.of(found.eta, weighting, targets, accumulate_dtype(found.compute_dtype))
    call = call._replace(mixture=mixture.flat())
    with_stats = options.return_stats or weighting.needs_sums
    wanted = [one is not None and one.requires_grad and torch.is_grad_enabled() for one in (hidden, weight, bias)]
    if linear.path == "chunks" and reduction.sums and any(wanted):
        found_results = autograd.linear_forward_with_grad(LinearForwardWithGrad(call, with_stats, wanted))
        loss, _, _, stats, correct, *_ = found_results
    else:
        loss, _, _, stats, correct = autograd.linear_forward(LinearForward(call, with_stats))
        loss = loss if reduction.sums else loss.reshape(targets.shape)
    return (loss, _of_tokens(stats, correct, targets)) if options.return_stats else loss


def _statistics(call: LinearCall, targets: Tensor) -> MixCEStats:
    """The tokens' statistics, by a pass of their own without a graph: what a function of the caller's weighs by."""
    call = call._replace(
        hidden=call.hidden.detach(), weight=call.weight.detach(),
        bias=None if call.bias is None else call.bias.detach(), reduction=NO_REDUCTION,
    )  # fmt: skip
    with torch.no_grad():
        _, _, _, stats, correct = autograd.linear_forward(LinearForward(call, with_stats=True))
    return _of_tokens(stats, correct, targets)


def _of_tokens(stats: Tensor, correct: Tensor, targets: Tensor) -> MixCEStats:
    """Statistics [STATS_WIDTH, N] of tokens `targets` [...]."""
    return MixCEStats.of(stats.reshape(STATS_WIDTH, *targets.shape), correct.reshape(targets.shape))
