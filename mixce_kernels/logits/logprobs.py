"""The body of tokens' log-probabilities from logits: checks the tensors, picks a backend, calls the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from mixce_kernels import backends, logprobs_reference
from mixce_kernels.checks import check_logprob_values, check_tensors
from mixce_kernels.logits import logprobs_ops
from mixce_kernels.logits.logprobs_ops import TokenLogprobs
from mixce_kernels.logits.loss import may_overwrite, readable
from mixce_kernels.logits.overwriting import check_overwritable
from mixce_kernels.options import LogprobOptions, TokenOptions


def token_logprobs(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    options: LogprobOptions,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fused_token_logprobs` of plain tensors."""
    token_options = options.for_tokens()
    if options.inplace_backward:
        check_overwritable(logits)
    check_tensors(logits, targets)
    temperature = options.temperature_of_tokens(targets)
    backend = backends.resolve(options.backend, logits)
    if backend == "reference":
        return logprobs_reference.logprobs_of_logits(logits, targets, options)
    if options.validate:
        check_logprob_values(targets, temperature, token_options.ignore_index, logits.shape[-1])
    return fused_logprobs(logits, targets, temperature, options, token_options, backend)


def fused_logprobs(
    logits: Tensor,  # [..., V], or the columns of a part of the vocabulary
    targets: Tensor,  # [...]
    temperature: Tensor | None,  # [...]
    options: LogprobOptions,
    token_options: TokenOptions,
    backend: str,  # what `backends.vocabulary` takes
) -> Tensor | tuple[Tensor, Tensor]:
    """The log-probabilities by a backend's kernels, of arguments that were checked before."""
    logits = readable(logits)
    wants_grad = logits.requires_grad and torch.is_grad_enabled()
    inplace = options.inplace_backward and wants_grad and may_overwrite(logits, targets, temperature)
    logprobs, entropy, *_ = logprobs_ops.forward(
        TokenLogprobs(
            logits, targets, temperature, token_options,
            with_state=wants_grad or torch._C._are_functorch_transforms_active(),
            with_entropy=options.return_entropy, inplace_backward=inplace, backend=backend,
        )
    )  # fmt: skip
    return (logprobs, entropy) if options.return_entropy else logprobs
