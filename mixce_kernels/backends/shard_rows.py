"""What a shard's rows of logits are to the other ranks, a few numbers a token, and what these make together."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mixce_kernels.agreement import Columns
from mixce_kernels.backends.results import empty_results
from mixce_kernels.options import TokenOptions, accumulate_dtype

if TYPE_CHECKING:
    from mixce_kernels.backends import Backend

# What the kernels are told instead of a target: that its row is ignored, or that it is none of the shard's columns.
IGNORED = -100
_ELSEWHERE = -1


class Rows(NamedTuple):
    """What the ranks' numbers make together, each [...] float64."""

    m: Tensor  # as the kernels have it: of capped logits, or of logits before their scale
    scaled_m: Tensor
    s: Tensor
    d_target: Tensor
    mean_shifted: Tensor | float
    entropy: Tensor | None
    correct: Tensor | None
    holders: Tensor  # the number of ranks that hold the target


def part_of(
    backend: Backend, logits: Tensor, targets: Tensor, options: TokenOptions, columns: Columns, with_stats: bool
) -> Tensor:
    """A rank's numbers of each token, [3 to 6, ...].

    m, the largest logit; s = log sum exp(z - m); z_y - m, infinite where the rank does not hold the target; with label
    smoothing the mean of z - m; with statistics the entropy, whose sign is minus where the target is not the first of
    the rank's largest logits, and with a softcap, which may make different logits equal, the largest before it.
    """
    dtype = accumulate_dtype(logits.dtype)
    smooth = options.label_smoothing > 0
    raw = with_stats and options.softcap is not None
    part = logits.new_empty((3 + smooth + with_stats + raw, *targets.shape), dtype=dtype)
    if columns.number == 0:
        nothing = (-torch.inf, -torch.inf, torch.inf, *(0.0,) * (smooth + with_stats), *(-torch.inf,) * raw)
        for out, value in zip(part, nothing, strict=True):
            out.fill_(value)
        return part
    held = local_targets(targets, columns, options.ignore_index)
    here = held != _ELSEWHERE
    # The kernels of a forward want a target: any will do where the row's is elsewhere.
    asked = torch.where(here, held, 0)
    loss, state, stats, correct = results = empty_results(logits, targets, smooth or with_stats)
    # With eta = 1 the loss is the cross-entropy: nll, or with a smoothing of 1 what the mean is made from.
    alone = TokenOptions(IGNORED, float(smooth), 0.0, options.softcap, options.logit_scale)
    backend.forward(narrowed(logits, columns.number), asked, None, 1.0, alone, results, None, None)
    m, s = state[0], state[1].double()
    nll = stats[0] if smooth or with_stats else loss
    masked = m == -torch.inf
    part[0], part[1] = m, s
    part[2] = torch.where(here, torch.where(masked, 0.0, s - nll), torch.inf)
    if smooth:
        part[3] = torch.where(masked, 0.0, s - loss)
    if with_stats:
        part[3 + smooth] = torch.copysign(stats[4], torch.where(correct, 1.0, -1.0))
    if raw:
        part[-1] = narrowed(logits, columns.number).amax(-1)
    return part


def merged(parts: Tensor, ranges: Tensor, options: TokenOptions, with_stats: bool) -> Rows:
    """The rows of all ranks' numbers [k, 3 to 6, ...], whose columns start at ranges[:, 0] and number ranges[:, 1]."""
    scale = options.logit_scale if options.softcap is None else 1.0
    starts, counts = (one.double().reshape(-1, *(1,) * (parts.dim() - 2)) for one in ranges.unbind(1))
    m_of, s_of, d_of, *others = parts.double().unbind(1)
    m = m_of.amax(0)
    shift = scale * (m_of - m)  # -inf for a rank without a finite logit
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
        entropies = others[1 if options.label_smoothing > 0 else 0]
        entropy = torch.where(shares == 0, 0.0, shares * (entropies.abs() - log_shares)).sum(0)
        # A rank's largest logit beats the target's where it is larger, or as large and comes before it.
        largest_of = m_of if options.softcap is None else others[-1]
        largest = torch.where(held, largest_of, -torch.inf).amax(0)
        start = torch.where(held, starts, 0.0).sum(0)
        beaten = (largest_of > largest) | ((largest_of == largest) & (starts < start) & (counts > 0))
        correct = (held & ~entropies.signbit()).any(0) & ~beaten.any(0)
    return Rows(m, scale * m, s, d_target, mean_shifted, entropy, correct, held.sum(0))


def local_targets(targets: Tensor, columns: Columns, ignore_index: int) -> Tensor:
    """The targets as columns of the shard, or `_ELSEWHERE`, or `IGNORED`."""
    local = targets.long() - columns.start
    local = torch.where((local >= 0) & (local < columns.number), local, _ELSEWHERE)
    return torch.where(targets == ignore_index, IGNORED, local)


def narrowed(logits: Tensor, n_columns: int) -> Tensor:
    """The logits without their padding, where they lie."""
    return logits if n_columns == logits.shape[-1] else logits[..., :n_columns]
