"""`ShardKernels`: the steps around a backend's row kernels where ranks hold the vocabulary's columns.

A rank's message is a header of three integers (digest of the call, first column, number of columns), as wide as the
numbers that follow, and `numbers_per_token` numbers [numbers, ...]: see csrc/shards.h.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mixce_kernels.backends.results import Results
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions

HEADER = 3
# What a local target is where the whole vocabulary's is ignored.
IGNORED = -100


class Columns(NamedTuple):
    """The range of the vocabulary that a rank holds."""

    start: int
    number: int


class ShardRows(NamedTuple):
    """Results of the row kernels on a rank's columns, with eta = 1 and, of a smoothed loss, a smoothing of 1."""

    results: Results  # with statistics where there is smoothing
    largest_state: Tensor | None  # [STATE_WIDTH, ...] without the softcap, with statistics and a softcap


class ShardKernels(Protocol):
    """Three functions a token, each a launch on a GPU; a module may be one."""

    def localize_targets(
        self,
        targets: Tensor,  # [...], of the whole vocabulary
        columns: Columns,
        ignore_index: int,
        elsewhere: int,
    ) -> Tensor:
        """Targets [...] int64 from the rank's first column on: IGNORED, or `elsewhere` for those of other ranks."""

    def write_message(
        self,
        message: Tensor,  # [HEADER + numbers_per_token * N], written
        digest: int,
        columns: Columns,
        targets: Tensor,  # [...], of the whole vocabulary
        rows: ShardRows | None,  # None without a column
        options: TokenOptions,
        with_stats: bool,
    ) -> None:
        """What the rank tells the others."""

    def merge_messages(
        self,
        messages: Tensor,  # [ranks, HEADER + numbers_per_token * N], contiguous
        targets: Tensor,  # [...], of the whole vocabulary
        mixture: Mixture,  # eta of any float type, any strides
        options: TokenOptions,
        results: Results,  # written
        temperature: Tensor | None,  # [...] of any strides; None: 1
    ) -> int | None:
        """Loss, state and statistics of the whole rows, NaN where not just one rank holds the target.

        A backend that checks targets returns the first such row, having written nothing; None: there is none, or it is
        not known here.
        """


def numbers_per_token(options: TokenOptions, with_stats: bool) -> int:
    """How many of them a message has."""
    return 3 + (options.label_smoothing > 0) + 2 * with_stats + (with_stats and options.softcap is not None)


def integers(dtype: torch.dtype) -> torch.dtype:
    """The integers of a header, as wide as the numbers of a message."""
    return torch.int64 if dtype == torch.float64 else torch.int32
