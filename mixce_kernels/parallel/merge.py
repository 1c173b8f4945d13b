"""What a shard's rows of logits are to the other ranks, a few numbers a token, and what these make together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixce_kernels.backends.base import Backend
from mixce_kernels.backends.results import empty_results
from mixce_kernels.options import TokenOptions
from mixce_kernels.parallel.agreement import Columns
from mixce_kernels.reduction import NO_REDUCTION
from mixce_kernels.stats import MixCEStats

# What the kernels of a forward are told instead of a target that is ignored.
_IGNORED = -100


class MergedStats(NamedTuple):
    """What the ranks' numbers make together, each [...] float64."""

    m: Tensor  # as the kernels have it: of capped logits, or of logits before their scale
    scaled_m: Tensor
    s: Tensor
    d_target: Tensor
    mean_shifted: Tensor | float
    entropy: Tensor | None
    correct: Tensor | None
    holders: Tensor  # the number of ranks that hold the target


def numbers_per_token(options: TokenOptions, with_stats: bool) -> int:
    """How many of them `write_part` writes."""
    return 3 + (options.label_smoothing > 0) + with_stats + (with_stats and options.softcap is not None)


def write_part(
    part: Tensor,  # [3 to 6, ...]
    backend: Backend,
    logits: Tensor,  # [..., columns]
    targets: Tensor,  # [...], of the whole vocabulary
    ignored: Tensor,  # [...] bool
    options: TokenOptions,
    columns: Columns,
    with_stats: bool,
) -> None:
    """Writes a rank's numbers of each token.

    m, the largest logit; s = log sum exp(z - m); z_y - m, infinite where the rank does not hold the target; with label
    smoothing the mean of z - m; with statistics the entropy and whether the target is the first of the rank's
    largest logits (`with_correct`), and with a softcap, which may make different logits equal, the largest before it.
    """
    smooth = options.label_smoothing > 0
    raw = with_stats and options.softcap is not None
    if columns.number == 0:
        nothing = (-torch.inf, -torch.inf, torch.inf, *(0.0,) * (smooth + with_stats), *(-torch.inf,) * raw)
        for out, value in zip(part, nothing, strict=True):
            out.fill_(value)
        return
    # The kernels of a forward want a target: any column will do where it is elsewhere.
    local = local_targets(targets, columns)
    nearest = local.clamp(0, columns.number - 1)
    asked = nearest.masked_fill(ignored, _IGNORED)
    results = empty_results(logits, targets, NO_REDUCTION, with_state=True, with_stats=smooth or with_stats)
    loss, state, stats, correct = results.loss, results.state, results.stats, results.correct
    assert state is not None
    # With eta = 1 the loss is the cross-entropy: nll, or with a smoothing of 1 what the mean is made from.
    alone = TokenOptions(_IGNORED, float(smooth), 0.0, options.softcap, options.logit_scale)
    logits = narrowed(logits, columns.number)
    backend.forward(logits, asked, None, 1.0, alone, NO_REDUCTION, results, None, None)
    m_and_s = part[:2].copy_(state[:2])
    # Some kernels' m is finite in a row of -inf. Such a row has no differences; a NaN among its logits shows in s.
    m_and_s[0].masked_fill_(m_and_s[1] == -torch.inf, -torch.inf)
    nll = loss if stats is None else stats[0]
    torch.sub(m_and_s[1], nll, out=part[2]).nan_to_num_(0.0, torch.inf, -torch.inf).masked_fill_(
        nearest != local, torch.inf
    )
    if smooth:
        torch.sub(m_and_s[1], loss, out=part[3]).nan_to_num_(0.0, torch.inf, -torch.inf)
    if with_stats and stats is not None and correct is not None:
        part[3 + smooth] = with_correct(MixCEStats.of(stats, correct))
    if raw:
        part[-1] = logits.amax(-1)


def merged(parts: Tensor, ranges: Tensor, options: TokenOptions, with_stats: bool) -> MergedStats:
    """The rows of all ranks' numbers [k, 3 to 6, ...], whose columns start at ranges[:, 0] and number ranges[:, 1]."""
    scale = options.logit_scale if options.softcap is None else 1.0
    starts, counts = (one.reshape(-1, *(1,) * (parts.dim() - 2)) for one in ranges.unbind(1))
    m_of, s_of, d_of, *others = parts.double().unbind(1)
    m = m_of.amax(0)
    shift = m_of - m  # -inf for a rank without a finite logit
    if scale != 1:
        shift = scale * shift
    log_sums = s_of + shift
    s = log_sums.exp().sum(0).log()
    held = d_of != torch.inf
    d_target = torch.where(held, d_of + shift, 0.0).sum(0)
    mean_shifted: Tensor | float = 0.0
    if options.label_smoothing > 0:
        mean_shifted = torch.where(counts == 0, 0.0, counts * (others[0] + shift)).sum(0) / counts.sum()
    entropy = correct = None
    if with_stats:
        log_shares = log_sums - s
        shares = log_shares.exp()
        entropies, are_largest = without_correct(others[1 if options.label_smoothing > 0 else 0])
        entropy = torch.where(shares == 0, 0.0, shares * (entropies - log_shares)).sum(0)
        # A rank's largest logit beats the target's where it is larger, or as large and comes before it.
        largest_of = m_of if options.softcap is None else others[-1]
        largest = torch.where(held, largest_of, -torch.inf).amax(0)
        start = torch.where(held, starts, 0).sum(0)
        beaten = (largest_of > largest) | ((largest_of == largest) & (starts < start) & (counts > 0))
        correct = (held & are_largest).any(0) & ~beaten.any(0)
    return MergedStats(m, m if scale == 1 else scale * m, s, d_target, mean_shifted, entropy, correct, held.sum(0))


def with_correct(stats: MixCEStats) -> Tensor:
    """Entropy [...] and `correct` in one number: an entropy is not negative, so minus says that it is not correct."""
    return torch.copysign(stats.entropy, stats.correct.to(stats.entropy.dtype) - 0.5)


def without_correct(number: Tensor) -> tuple[Tensor, Tensor]:
    """The entropy and `correct` [...] of `with_correct`."""
    return number.abs(), ~number.signbit()


def local_targets(targets: Tensor, columns: Columns) -> Tensor:
    """The targets [...] counted from the shard's first column: those of other shards are outside of its columns."""
    return targets.long() - columns.start


def narrowed(logits: Tensor, n_columns: int) -> Tensor:
    """The logits without their padding, where they lie."""
    return logits if n_columns == logits.shape[-1] else logits[..., :n_columns]
