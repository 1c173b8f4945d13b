"""The body of tokens' log-probabilities from hidden states: checks the tensors, picks a backend, calls the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixce_kernels import backends, logprobs_reference
from mixce_kernels.autocast import autocast_dtype
from mixce_kernels.checks import check_linear_tensors, check_logprob_values
from mixce_kernels.linear import logprobs_ops
from mixce_kernels.linear.chunks import LinearCall
from mixce_kernels.linear.logprobs_ops import LinearTokenLogprobs
from mixce_kernels.logits.logprobs_ops import LOGPROBS
from mixce_kernels.options import LinearOptions, LogprobOptions, TokenOptions, accumulate_dtype
from mixce_kernels.reduction import NO_REDUCTION


class Checked(NamedTuple):
    """What the checks of a call find."""

    token_options: TokenOptions
    compute_dtype: torch.dtype  # of the products' operands
    temperature: Tensor | None  # of targets' shape
    backend: str


def linear_token_logprobs(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [...]
    options: LogprobOptions,
    linear: LinearOptions,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fused_linear_token_logprobs` of plain tensors and a whole weight."""
    found = checked(hidden, weight, bias, targets, options, linear)
    if found.backend == "reference":
        return logprobs_reference.logprobs_of_hidden(hidden, weight, bias, targets, options)
    if options.validate:
        check_logprob_values(targets, found.temperature, found.token_options.ignore_index, weight.shape[0])
    return fused_logprobs(hidden, weight, bias, targets, options, linear, found, backend=found.backend)


def checked(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [...]
    options: LogprobOptions,
    linear: LinearOptions,
    *,
    sharded: bool = False,
) -> Checked:
    """Checks the arguments and finds the backend that serves; raises as `fused_linear_token_logprobs` does."""
    token_options = options.for_tokens()
    compute_dtype = check_linear_tensors(hidden, weight, bias, targets, autocast_dtype(hidden), sharded=sharded)
    temperature = options.temperature_of_tokens(targets)
    linear.check(options.backend, sharded=sharded)
    like_logits = hidden.new_empty((), dtype=accumulate_dtype(compute_dtype)).expand(1, weight.shape[0])
    return Checked(token_options, compute_dtype, temperature, backends.resolve(options.backend, like_logits))


def fused_logprobs(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D], or the rows of a part of the vocabulary
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [...]
    options: LogprobOptions,
    linear: LinearOptions,
    found: Checked,
    *,
    backend: str,  # what `backends.vocabulary` takes
) -> Tensor | tuple[Tensor, Tensor]:
    """The log-probabilities by a backend's kernels, of arguments that were checked before."""
    call = LinearCall(
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        weight=weight,
        bias=bias,
        targets=targets.reshape(-1),
        mixture=LOGPROBS,
        options=found.token_options,
        reduction=NO_REDUCTION,
        compute_dtype=found.compute_dtype,
        max_chunk_bytes=linear.max_chunk_bytes,
        # Counting the rows that are left needs the host: on a GPU it synchronises.
        drop_ignored=options.validate or backends.vocabulary(backend).kernels.checks_targets,
        path=linear.path,
        backend=backend,
    )
    differentiated = any(one is not None and one.requires_grad for one in (hidden, weight, bias))
    temperature = None if found.temperature is None else found.temperature.reshape(-1)
    logprobs, entropy, *_ = logprobs_ops.forward(
        LinearTokenLogprobs(
            call,
            temperature,
            with_state=(differentiated and torch.is_grad_enabled()) or torch._C._are_functorch_transforms_active(),
            with_entropy=options.return_entropy,
        )
    )
    logprobs = logprobs.reshape(targets.shape)
    return (logprobs, entropy.reshape(targets.shape)) if options.return_entropy else logprobs
