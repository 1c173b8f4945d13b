"""Log-probabilities and entropies of tokens in plain PyTorch: the oracle, and the kernels' second derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from mixce_kernels.autocast import autocast_dtype
from mixce_kernels.checks import check_linear_tensors, check_logprob_values, check_tensors, is_batched
from mixce_kernels.options import LogprobOptions, TokenOptions
from mixce_kernels.reference import exponents, linear_logits, places


def logprobs_of_logits(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    options: LogprobOptions,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fused_token_logprobs` by PyTorch's autograd."""
    token_options = options.for_tokens()
    check_tensors(logits, targets)
    temperature = options.temperature_of_tokens(targets)
    readable = logits.device.type == "cpu" and not torch.compiler.is_compiling() and not is_batched(targets)
    if options.validate or readable:
        tensors = (targets, temperature if options.validate else None)
        check_logprob_values(*tensors, token_options.ignore_index, logits.shape[-1])
    logprobs, entropy = token_logprobs(logits, targets, temperature, token_options)
    return (logprobs, entropy) if options.return_entropy else logprobs


def logprobs_of_hidden(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [...]
    options: LogprobOptions,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fused_linear_token_logprobs` by PyTorch's autograd, with all logits in memory."""
    compute_dtype = check_linear_tensors(hidden, weight, bias, targets, autocast_dtype(hidden))
    valid = targets != options.for_tokens().ignore_index
    return logprobs_of_logits(linear_logits(hidden, weight, bias, valid, compute_dtype), targets, options)


def token_logprobs(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    temperature: Tensor | None,  # [...]
    options: TokenOptions,
) -> tuple[Tensor, Tensor]:
    """Each token's log-probability and the entropy [...], both differentiable any number of times.

    A target that is neither in [0, V) nor ignore_index gives NaN in its row alone.
    """
    valid, known, index = places(targets, logits.shape[-1], options)
    _, d = exponents(logits, valid, options, temperature)
    # From here on a token has a few numbers, in float64.
    e = d.exp()
    sum_exp = e.sum(-1).double()
    s = sum_exp.log()
    logprobs = d.gather(-1, index).squeeze(-1) - s
    entropy = s - expected(e, d).sum(-1) / sum_exp
    return finished(logprobs, valid, known, d.dtype), finished(entropy, valid, known, d.dtype)


def expected(e: Tensor, d: Tensor) -> Tensor:
    """exp(d) * d, and its derivative, with the limit 0 where d is -inf."""
    return e * torch.where(e == 0.0, 0.0, d)


def finished(numbers: Tensor, valid: Tensor, known: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of tokens [...] as they are returned: 0 where ignored, NaN where the target is out of range."""
    return torch.where(valid, numbers * torch.where(valid & ~known, torch.nan, 1.0), 0.0).to(dtype)
