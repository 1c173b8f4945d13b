"""The bodies of log-probabilities of a vocabulary that is split over ranks: those of one device, with a shard."""

from __future__ import annotations

import torch
from torch import Tensor

from mixce_kernels import backends
from mixce_kernels.backends.vocabulary import CallFacts
from mixce_kernels.checks import check_logprob_values, check_shard_tensors
from mixce_kernels.linear import logprobs as linear_logprobs
from mixce_kernels.logits.logprobs import fused_logprobs
from mixce_kernels.logits.logprobs_ops import LOGPROBS
from mixce_kernels.logits.overwriting import check_overwritable
from mixce_kernels.options import LinearOptions, LogprobOptions, accumulate_dtype
from mixce_kernels.parallel.backend import address_of
from mixce_kernels.parallel.collectives import copy_to
from mixce_kernels.parallel.reference import sharded_token_logprobs
from mixce_kernels.parallel.shard import DigestOnly, Shard, Sharding
from mixce_kernels.reference import linear_logits


def token_logprobs(
    logits_shard: Tensor,  # [..., columns of this rank]
    targets: Tensor,  # [...], of the whole vocabulary
    options: LogprobOptions,
    sharding: Sharding,
) -> Tensor | tuple[Tensor, Tensor]:
    """`vocab_parallel_token_logprobs`."""
    token_options = options.for_tokens()
    check_shard_tensors(logits_shard, targets)
    if options.inplace_backward:
        check_overwritable(logits_shard)
    temperature = options.temperature_of_tokens(targets)
    shard = sharding.shard(DigestOnly())
    backend = backends.resolve(options.backend, logits_shard)
    if options.validate or backend == "reference":
        facts = CallFacts(
            targets.numel(), logits_shard.dtype, LOGPROBS, token_options, options.return_entropy,
            temperature=temperature,
        )  # fmt: skip
        _check_call(shard, facts, logits_shard.shape[-1], backend, options.validate, targets, logits_shard)
    if backend == "reference":
        return _reference(shard, logits_shard, targets, temperature, options)
    return fused_logprobs(logits_shard, targets, temperature, options, token_options, address_of(backend, shard))


def linear_token_logprobs(
    hidden: Tensor,  # [..., D], the same on every rank
    weight: Tensor,  # [columns of this rank, D]
    bias: Tensor | None,  # [columns of this rank]
    targets: Tensor,  # [...], of the whole vocabulary
    options: LogprobOptions,
    linear: LinearOptions,
    sharding: Sharding,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fused_linear_token_logprobs` with a group."""
    found = linear_logprobs.checked(hidden, weight, bias, targets, options, linear, sharded=True)
    shard = sharding.shard(DigestOnly(hidden_grad=hidden.requires_grad and torch.is_grad_enabled()))
    if options.validate or found.backend == "reference":
        facts = CallFacts(
            targets.numel(), found.compute_dtype, LOGPROBS, found.token_options, options.return_entropy,
            hidden.shape[-1], linear.max_chunk_bytes, found.temperature,
        )  # fmt: skip
        _check_call(shard, facts, weight.shape[0], found.backend, options.validate, targets, weight)
    if found.backend == "reference":
        # Added up in the type of accumulation, and rounded once.
        wide = copy_to(shard.group, hidden.to(accumulate_dtype(found.compute_dtype)))
        valid = targets != found.token_options.ignore_index
        logits = linear_logits(wide, weight, bias, valid, found.compute_dtype)
        return _reference(shard, logits, targets, found.temperature, options)
    return linear_logprobs.fused_logprobs(
        hidden, weight, bias, targets, options, linear, found, backend=address_of(found.backend, shard)
    )


def _check_call(
    shard: Shard, facts: CallFacts, width: int, backend: str, validate: bool, targets: Tensor, values: Tensor
) -> None:
    """What no kernel checks, of this rank's columns or rows of the weight: see `Shard.check_call`."""
    reads_targets = validate or values.device.type == "cpu"
    signature = shard.signature(width, facts, reference=backend == "reference", validate=reads_targets)

    def check(vocab_size: int) -> None:
        temperature = facts.temperature if validate else None
        check_logprob_values(targets, temperature, facts.options.ignore_index, vocab_size)

    shard.check_call(signature, values, check)


def _reference(
    shard: Shard, logits: Tensor, targets: Tensor, temperature: Tensor | None, options: LogprobOptions
) -> Tensor | tuple[Tensor, Tensor]:
    logprobs, entropy = sharded_token_logprobs(shard, logits, targets, temperature, options.for_tokens())
    return (logprobs, entropy) if options.return_entropy else logprobs
