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
from mixce_kernels.options import LinearOptions, LossOptions, TokenOptions, accumulate_dtype, check_eta
from mixce_kernels.reduction import Reduction
from mixce_kernels.stats import MixCEStats


class Checked(NamedTuple):
    """What the checks of a call find."""

    token_options: TokenOptions
    compute_dtype: torch.dtype  # of the products' operands
    eta: float | Tensor  # a number or of targets' shape


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
        check_values(targets, found.eta, found.token_options.ignore_index, weight.shape[0])
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
    options.check_reduction(targets)
    linear.check(options.backend, sharded=sharded)
    return Checked(token_options, compute_dtype, eta)


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
    eta_tensor, eta_value = (found.eta.reshape(-1), 0.0) if isinstance(found.eta, Tensor) else (None, found.eta)
    call = LinearCall(
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        weight=weight,
        bias=bias,
        targets=targets.reshape(-1),
        eta=eta_tensor,
        eta_value=eta_value,
        options=found.token_options,
        reduction=reduction._replace(weights=None if reduction.weights is None else reduction.weights.reshape(-1)),
        compute_dtype=found.compute_dtype,
        max_chunk_bytes=linear.max_chunk_bytes,
        # Counting the rows that are left needs the host: on a GPU it synchronises.
        drop_ignored=options.validate or backends.vocabulary(backend).kernels.checks_targets,
        path=linear.path,
        backend=backend,
    )
    wanted = [one is not None and one.requires_grad and torch.is_grad_enabled() for one in (hidden, weight, bias)]
    if linear.path == "chunks" and reduction.sums and any(wanted):
        loss, _, _, stats, correct, *_ = autograd.linear_forward_with_grad(
            LinearForwardWithGrad(call, options.return_stats, wanted)
        )
    else:
        loss, _, _, stats, correct = autograd.linear_forward(LinearForward(call, options.return_stats))
        loss = loss if reduction.sums else loss.reshape(targets.shape)
    if not options.return_stats:
        return loss
    return loss, MixCEStats.of(stats.reshape(STATS_WIDTH, *targets.shape), correct.reshape(targets.shape))
