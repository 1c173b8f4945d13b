"""The loss of one token: the transcription of `csrc/mixce_math.h` in PyTorch, over any number of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixce_kernels.options import TokenOptions


class TokenTerms(NamedTuple):
    """Of each token [...]: its loss, its statistics and the numbers from which its gradient is made."""

    loss: Tensor
    nll: Tensor
    q: Tensor
    weight: Tensor
    lse: Tensor
    a: Tensor
    c: Tensor
    t: Tensor


def token_terms(
    m: Tensor,  # [...]
    s: Tensor,  # [...]
    d_target: Tensor,  # [...]
    mean_shifted: Tensor | float,  # [...]
    eta: Tensor | float,  # [...]
    vocab_size: Tensor | int,  # not read without label smoothing
    options: TokenOptions,
) -> TokenTerms:
    """The mixture of Zhang et al. 2023 (arXiv 2305.16958), with label smoothing and z-loss.

    m is the largest z, s is log sum exp(z - m), d_target is z_target - m, mean_shifted the mean of z - m; float64. The
    gradient is dloss/dz_j = a * p_j - c, and t at the target.
    """
    smoothing, z_loss = options.label_smoothing, options.z_loss
    lse = m + s
    nll = s - d_target
    ce = nll
    if smoothing > 0:
        # As nll + smoothing * (z_target - mean z), but without inf - inf where both are -inf.
        ce = smoothing * (s - mean_shifted) + ((1 - smoothing) * nll if smoothing < 1 else 0)
    log_q = -nll
    q = torch.exp(log_q)
    weight = eta + (1 - eta) * q
    # A weight of 0 is the limit of q log q, also where ce is infinite.
    loss = torch.where(weight == 0, 0.0, weight * ce)
    a = weight
    # expm1: q - 1 has no digits left for q near 1, the tokens that the mixture weighs most.
    t = weight * torch.expm1(log_q)
    c = torch.zeros_like(weight)
    if smoothing > 0:
        c = weight * smoothing / vocab_size
        t = t + weight * smoothing - c
    if z_loss > 0:
        z_slope = 2 * z_loss * lse
        loss = loss + z_loss * lse * lse
        a = a + z_slope
        t = t + z_slope * q
    return TokenTerms(loss, nll, q, weight, lse, a, c, t)
