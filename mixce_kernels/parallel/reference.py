"""The plain formula of a vocabulary whose columns lie on several ranks: for `reference`, and for second derivatives.

Every sum over the vocabulary is an all-reduce with a derivative of its own.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mixce_kernels.backends.shards import Columns
from mixce_kernels.logprobs_reference import expected, finished
from mixce_kernels.options import TokenOptions
from mixce_kernels.parallel.collectives import largest, sum_over, total
from mixce_kernels.parallel.shard import Shard
from mixce_kernels.reference import exponents, mixture
from mixce_kernels.stats import MixCEStats
from mixce_kernels.weightings import Weighting


def sharded_token_losses(
    shard: Shard,
    logits: Tensor,  # [..., columns]
    targets: Tensor,  # [...], of the whole vocabulary
    eta: float | Tensor,
    weighting: Weighting,
    options: TokenOptions,
) -> tuple[Tensor, MixCEStats]:
    """Each token's loss [...], differentiable any number of times, and its detached statistics.

    A target that no rank holds gives NaN in its row alone.
    """
    group = shard.group
    columns, valid, here, index = _places(shard, logits, targets, options)
    logits = logits[..., : columns.number]
    m, d = exponents(logits, valid, options, largest=lambda z: _largest(z, group))
    # From here on a token has a few numbers, in float64.
    e = d.exp()
    sum_exp = sum_over(group, e.sum(-1).double())
    s = sum_exp.log()
    nll = s - sum_over(group, _at(d, index))
    held = total(here.to(s.dtype), group)
    uniform_ce = nll
    if options.label_smoothing > 0.0:
        vocab_size = total(torch.tensor(columns.number, dtype=torch.float64, device=logits.device), group)
        uniform_ce = s - sum_over(group, d.sum(-1)) / vocab_size
    lse = m + s
    with torch.no_grad():
        entropy = s - total(torch.where(e == 0.0, 0.0, e * d).sum(-1).double(), group) / sum_exp
        collision = total(e.square().sum(-1).double(), group) / sum_exp.square()
        raw = logits.to(d.dtype)
        is_largest = raw == _largest(raw, group).unsqueeze(-1)
        positions = torch.arange(columns.number, device=logits.device) + columns.start
        first = -_largest(torch.where(is_largest, -positions.double(), -torch.inf), group)
        correct = (first == targets) & ~nll.isnan() & valid & (held == 1)
        stacked = torch.stack((nll, torch.exp(-nll), torch.ones_like(nll), lse, entropy, collision))
        stacked = torch.where(valid, torch.where(held == 1, stacked, torch.nan), 0.0).to(d.dtype)
        stats = MixCEStats.of(stacked, correct)
    loss, weight = mixture(nll, uniform_ce, lse, eta, weighting, stats, options)
    loss = loss * torch.where(valid & (held != 1), torch.nan, 1.0)
    weight = torch.where(valid, weight, 0.0)
    return torch.where(valid, loss, 0.0).to(d.dtype), stats._replace(weight=weight.to(d.dtype))


def sharded_token_logprobs(
    shard: Shard,
    logits: Tensor,  # [..., columns]
    targets: Tensor,  # [...], of the whole vocabulary
    temperature: Tensor | None,  # [...]
    options: TokenOptions,
) -> tuple[Tensor, Tensor]:
    """Each token's log-probability and the entropy [...], both differentiable any number of times.

    A target that no rank holds gives NaN in its row alone.
    """
    group = shard.group
    columns, valid, here, index = _places(shard, logits, targets, options)
    logits = logits[..., : columns.number]
    _, d = exponents(logits, valid, options, temperature, largest=lambda z: _largest(z, group))
    # From here on a token has a few numbers, in float64.
    e = d.exp()
    sum_exp = sum_over(group, e.sum(-1).double())
    s = sum_exp.log()
    logprobs = sum_over(group, _at(d, index)) - s
    entropy = s - sum_over(group, expected(e, d).sum(-1).double()) / sum_exp
    known = total(here.to(s.dtype), group) == 1
    return finished(logprobs, valid, known, d.dtype), finished(entropy, valid, known, d.dtype)


def _places(
    shard: Shard, logits: Tensor, targets: Tensor, options: TokenOptions
) -> tuple[Columns, Tensor, Tensor, Tensor]:
    """The rank's columns, which tokens are not ignored, whose target is here, and where `_at` reads it."""
    columns = shard.columns(logits.shape[-1])
    valid = targets != options.ignore_index
    local = targets.long() - columns.start
    here = valid & (local >= 0) & (local < columns.number)
    return columns, valid, here, torch.where(here, local, columns.number).unsqueeze(-1)


def _at(d: Tensor, index: Tensor) -> Tensor:
    """The entries [...] at an index [..., 1] of d [..., columns], 0 at one past the last."""
    # A column for a rank that holds none: its gather must have something to read.
    padded = torch.cat((d, d.new_zeros((*d.shape[:-1], 1))), -1)
    return padded.gather(-1, index).squeeze(-1)


def _largest(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The largest of the entries [..., columns] of all ranks, [...], detached."""
    own = tensor.detach().amax(-1) if tensor.shape[-1] > 0 else tensor.new_full(tensor.shape[:-1], -torch.inf)
    return largest(own, group)
