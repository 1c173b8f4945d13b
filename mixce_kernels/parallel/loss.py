"""The bodies of the losses of a vocabulary that is split over ranks: those of one device, with a shard."""

from __future__ import annotations

import torch
from torch import Tensor

from mixce_kernels import backends
from mixce_kernels.backends.vocabulary import CallFacts
from mixce_kernels.checks import check_shard_tensors, check_values
from mixce_kernels.linear import loss as linear_loss
from mixce_kernels.logits.loss import fused_loss
from mixce_kernels.logits.overwriting import check_overwritable
from mixce_kernels.mixture import Mixture, check_weighting, factor_of
from mixce_kernels.options import LinearOptions, LossOptions, accumulate_dtype, check_eta
from mixce_kernels.parallel.backend import address_of
from mixce_kernels.parallel.collectives import copy_to
from mixce_kernels.parallel.reference import sharded_token_losses
from mixce_kernels.parallel.shard import DigestOnly, Shard, Sharding
from mixce_kernels.reduction import Reduction
from mixce_kernels.reference import linear_logits
from mixce_kernels.stats import MixCEStats
from mixce_kernels.weightings import PROBABILITY, CustomWeighting, Given, is_built_in


def mixce_loss(
    logits_shard: Tensor,  # [..., columns of this rank]
    targets: Tensor,  # [...], of the whole vocabulary
    eta: float | Tensor,
    options: LossOptions,
    sharding: Sharding,
) -> Tensor | tuple[Tensor, MixCEStats]:
    """`vocab_parallel_mixce_loss`."""
    token_options = options.for_tokens()
    check_shard_tensors(logits_shard, targets)
    if options.inplace_backward:
        check_overwritable(logits_shard)
    sharding.check_range()
    eta = check_eta(eta, targets)
    weighting = check_weighting(options.weighting, targets)
    options.check_reduction(targets)
    shard = sharding.shard(DigestOnly.of_loss(options))
    backend = backends.resolve(options.backend, logits_shard)
    if options.validate or backend == "reference":
        mixture = _mixture_to_compare(eta, weighting, targets, logits_shard.dtype)
        facts = CallFacts(targets.numel(), logits_shard.dtype, mixture, token_options, options.return_stats)
        _check_call(shard, facts, logits_shard.shape[-1], backend, weighting, options.validate, targets, logits_shard)
    if backend == "reference":
        return _reference_loss(shard, logits_shard, targets, eta, weighting, options)
    return fused_loss(logits_shard, targets, eta, weighting, options, token_options, address_of(backend, shard))


def linear_mixce_loss(
    hidden: Tensor,  # [..., D], the same on every rank
    weight: Tensor,  # [columns of this rank, D]
    bias: Tensor | None,  # [columns of this rank]
    targets: Tensor,  # [...], of the whole vocabulary
    eta: float | Tensor,
    options: LossOptions,
    linear: LinearOptions,
    sharding: Sharding,
) -> Tensor | tuple[Tensor, MixCEStats]:
    """`fused_linear_mixce_loss` with a group."""
    checked = linear_loss.checked(hidden, weight, bias, targets, eta, options, linear, sharded=True)
    hidden_grad = hidden.requires_grad and torch.is_grad_enabled()
    shard = sharding.shard(DigestOnly.of_loss(options, hidden_grad=hidden_grad))
    backend = linear_loss.resolve(hidden, weight, options, linear, checked)
    if options.validate or backend == "reference":
        mixture = _mixture_to_compare(checked.eta, checked.weighting, targets, checked.compute_dtype)
        facts = CallFacts(
            targets.numel(), checked.compute_dtype, mixture, checked.token_options, options.return_stats,
            hidden.shape[-1], linear.max_chunk_bytes,
        )  # fmt: skip
        _check_call(shard, facts, weight.shape[0], backend, checked.weighting, options.validate, targets, weight)
    if backend == "reference":
        # Added up in the type of accumulation, and rounded once.
        wide = copy_to(shard.group, hidden.to(accumulate_dtype(checked.compute_dtype)))
        valid = targets != checked.token_options.ignore_index
        logits = linear_logits(wide, weight, bias, valid, checked.compute_dtype)
        return _reference_loss(shard, logits, targets, checked.eta, checked.weighting, options)
    return linear_loss.fused_loss(
        hidden, weight, bias, targets, options, linear, checked, backend=address_of(backend, shard)
    )


def _mixture_to_compare(
    eta: float | Tensor, weighting: CustomWeighting, targets: Tensor, dtype: torch.dtype
) -> Mixture:
    """The mixture before a function of the caller's was called: the ranks compare these."""
    known = weighting if is_built_in(weighting) else Given(0.0)
    return Mixture.of(eta, known, targets, accumulate_dtype(dtype))


def _check_call(
    shard: Shard,
    facts: CallFacts,
    width: int,
    backend: str,
    weighting: CustomWeighting,
    validate: bool,
    targets: Tensor,
    values: Tensor,
) -> None:
    """What no kernel checks, of this rank's columns or rows of the weight: see `Shard.check_call`."""
    reads_targets = validate or values.device.type == "cpu"
    signature = shard.signature(width, facts, reference=backend == "reference", validate=reads_targets)
    eta, ignore_index = facts.mixture.eta_of_tokens(), facts.options.ignore_index
    shard.check_call(signature, values, lambda size: check_values(targets, eta, weighting, ignore_index, size))


def _reference_loss(
    shard: Shard,
    logits: Tensor,
    targets: Tensor,
    eta: float | Tensor,
    weighting: CustomWeighting,
    options: LossOptions,
) -> Tensor | tuple[Tensor, MixCEStats]:
    token_options = options.for_tokens()
    if not is_built_in(weighting):
        _, found = sharded_token_losses(shard, logits.detach(), targets, eta, PROBABILITY, token_options)
        weighting = Given(factor_of(weighting, found, validate=options.validate))
    loss, stats = sharded_token_losses(shard, logits, targets, eta, weighting, token_options)
    loss = Reduction.of(options, targets).apply(loss, targets, token_options.ignore_index)
    return (loss, stats) if options.return_stats else loss
