"""The public functions of `DTensor` arguments: each rank's part by the functions of plain tensors.

The loss is a `DTensor`: replicated, or with "none" placed as the tokens are. So are log-probabilities.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from mixce_kernels import backends
from mixce_kernels.checks import check_logprob_values, check_targets_in_range, check_values
from mixce_kernels.dtensor_parts import Tokens, parts_of_hidden, parts_of_logits
from mixce_kernels.linear import logprobs as linear_logprobs
from mixce_kernels.linear import loss as linear_loss
from mixce_kernels.logits import logprobs as logits_logprobs
from mixce_kernels.logits import loss as logits_loss
from mixce_kernels.logits.overwriting import check_overwritable
from mixce_kernels.mixture import check_weighting
from mixce_kernels.options import LinearOptions, LogprobOptions, LossOptions, check_eta
from mixce_kernels.parallel import logprobs as parallel_logprobs
from mixce_kernels.parallel import loss as parallel_loss
from mixce_kernels.parallel.collectives import sum_over, total
from mixce_kernels.stats import MixCEStats
from mixce_kernels.weightings import is_built_in


def mixce_loss(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    eta: float | Tensor,
    options: LossOptions,
) -> Any:
    """`fused_mixce_loss` of logits that are a DTensor."""
    options.for_tokens()
    if options.inplace_backward:
        check_overwritable(logits)
    named = "targets, eta or token_weights"
    parts = parts_of_logits(logits, targets, named, inplace_backward=options.inplace_backward)
    local, tokens, sharding, _ = parts
    _check_values(tokens, targets, eta, options, logits.shape[-1], local)
    eta, options = _local_options(tokens, targets, eta, options)
    if sharding is None:
        found = logits_loss.mixce_loss(local, tokens.local(targets), eta, options)
    else:
        found = parallel_loss.mixce_loss(local, tokens.local(targets), eta, options, sharding)
    parts.tell_overwritten(logits)
    return _result(tokens, found, options)


def linear_mixce_loss(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [...]
    eta: float | Tensor,
    options: LossOptions,
    linear: LinearOptions,
) -> Any:
    """`fused_linear_mixce_loss` of hidden states and a weight that are DTensors."""
    options.for_tokens()
    local, tokens, sharding = parts_of_hidden(hidden, weight, bias, targets)
    _check_values(tokens, targets, eta, options, weight.shape[0], local[0])
    eta, options = _local_options(tokens, targets, eta, options)
    if sharding is None:
        found = linear_loss.linear_mixce_loss(*local, tokens.local(targets), eta, options, linear)
    else:
        found = parallel_loss.linear_mixce_loss(*local, tokens.local(targets), eta, options, linear, sharding)
    return _result(tokens, found, options)


def token_logprobs(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    options: LogprobOptions,
) -> Any:
    """`fused_token_logprobs` of logits that are a DTensor."""
    options.for_tokens()
    if options.inplace_backward:
        check_overwritable(logits)
    named = "targets or temperature"
    parts = parts_of_logits(logits, targets, named, inplace_backward=options.inplace_backward)
    local, tokens, sharding, _ = parts
    options = _local_temperature(tokens, targets, options, logits.shape[-1], local)
    if sharding is None:
        found = logits_logprobs.token_logprobs(local, tokens.local(targets), options)
    else:
        found = parallel_logprobs.token_logprobs(local, tokens.local(targets), options, sharding)
    parts.tell_overwritten(logits)
    return _of_tokens(tokens, found)


def linear_token_logprobs(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [...]
    options: LogprobOptions,
    linear: LinearOptions,
) -> Any:
    """`fused_linear_token_logprobs` of hidden states and a weight that are DTensors."""
    options.for_tokens()
    local, tokens, sharding = parts_of_hidden(hidden, weight, bias, targets)
    options = _local_temperature(tokens, targets, options, weight.shape[0], local[0])
    if sharding is None:
        found = linear_logprobs.linear_token_logprobs(*local, tokens.local(targets), options, linear)
    else:
        found = parallel_logprobs.linear_token_logprobs(*local, tokens.local(targets), options, linear, sharding)
    return _of_tokens(tokens, found)


def _of_tokens(tokens: Tokens, found: Any) -> Any:
    """Log-probabilities, and entropies, of the rank's tokens as DTensors of the whole."""
    return tuple(map(tokens.whole, found)) if isinstance(found, tuple) else tokens.whole(found)


def _local_temperature(
    tokens: Tokens, targets: Tensor, options: LogprobOptions, vocab_size: int, like_logits: Tensor
) -> LogprobOptions:
    """The options for this rank's part, after a check of all tokens' values where one process does."""
    given = options.temperature
    if isinstance(given, DTensor) and given.shape != targets.shape:
        # A DTensor does not broadcast a dimension that is sharded.
        given = given.redistribute(placements=[Replicate()] * given.device_mesh.ndim)
    temperature = options._replace(temperature=given).temperature_of_tokens(targets)
    if tokens.split.leading and not torch.compiler.is_compiling():
        checks_targets = _reads_targets(options.backend, like_logits)
        if options.validate or checks_targets:
            whole = None if temperature is None or not options.validate else _whole(temperature)
            check_logprob_values(_whole(targets), whole, options.ignore_index, vocab_size)
    return options if temperature is None else options._replace(temperature=tokens.local(temperature))


def _check_values(
    tokens: Tokens, targets: Tensor, eta: float | Tensor, options: LossOptions, vocab_size: int, like_logits: Tensor
) -> None:
    """Checks the values of all tokens where one process does: no rank may raise alone, awaited by the others."""
    if not tokens.split.leading or torch.compiler.is_compiling():
        return
    eta = _whole(eta) if isinstance(eta, Tensor) else eta
    if options.validate:
        check_values(_whole(targets), eta, options.weighting, options.ignore_index, vocab_size)
    elif _reads_targets(options.backend, like_logits):
        check_targets_in_range(_whole(targets), options.ignore_index, vocab_size)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _reads_targets(backend: str | None, like_logits: Tensor) -> bool:
    """Whether the backend would raise for a target of its rank's own."""
    return like_logits.device.type == "cpu" and backends.checks_targets(backends.resolve(backend, like_logits))


def _local_options(
    tokens: Tokens, targets: Tensor, eta: float | Tensor, options: LossOptions
) -> tuple[float | Tensor, LossOptions]:
    """Eta and the options for this rank's part: what "mean" divides by is that of all tokens."""
    if isinstance(eta, DTensor) and eta.shape != targets.shape:
        # A DTensor does not broadcast a dimension that is sharded.
        eta = eta.redistribute(placements=[Replicate()] * eta.device_mesh.ndim)
    eta = check_eta(eta, targets)
    weighting = check_weighting(options.weighting, targets)
    if is_built_in(weighting):
        weighting = weighting.on_tokens(targets, tokens.local)
    options.check_reduction(targets)
    weights, divisor = options.token_weights, options.num_items_in_batch
    weights = None if weights is None else tokens.local(weights.detach())
    if isinstance(divisor, DTensor):
        divisor = divisor.full_tensor()
    elif options.reduction == "mean" and divisor is None and tokens.split.leading:
        valid = tokens.local(targets) != options.ignore_index
        divisor = torch.where(valid, 1.0 if weights is None else weights, 0.0).sum(dtype=torch.float64)
        for dim in tokens.split.leading:
            divisor = total(divisor, tokens.split.mesh.get_group(dim))
    options = options._replace(token_weights=weights, num_items_in_batch=divisor, weighting=weighting)
    return tokens.local(eta) if isinstance(eta, Tensor) else eta, options


def _result(tokens: Tokens, found: Any, options: LossOptions) -> Any:
    """What a function returned for this rank's part, as DTensors of the whole."""
    loss, stats = found if options.return_stats else (found, None)
    mesh = tokens.split.mesh
    if options.reduction == "none":
        loss = tokens.whole(loss)
    else:
        for dim in tokens.split.leading:
            loss = sum_over(mesh.get_group(dim), loss)
        loss = DTensor.from_local(loss, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return loss if stats is None else (loss, MixCEStats(*map(tokens.whole, stats)))
