"""`ShardKernels` of the backend `triton`: the kernels of `triton_kernels/shards.py`."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from mixce_kernels.backends.devices import WARP_SIZE, on_device
from mixce_kernels.backends.results import Results
from mixce_kernels.backends.shards import HEADER, Columns, ShardRows, integers
from mixce_kernels.backends.triton_arguments import (
    Launch,
    kernels,
    loss_arguments,
    mixture_arguments,
    of_tokens,
    statistics_arguments,
)
from mixce_kernels.backends.triton_launch import register_arguments
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions

# Few, so that the tokens of a batch reach every multiprocessor: a thread waits for memory most of the time.
TOKENS = 64
_WARPS = 2
# Registers per thread: the hardware's maximum, or some compiler spills to raise occupancy.
_MAX_REGISTERS = 255


def localize_targets(targets: Tensor, columns: Columns, ignore_index: int, elsewhere: int) -> Tensor:
    """Targets from the rank's first column on: see `ShardKernels`."""
    local = targets.new_empty(targets.shape, dtype=torch.int64)
    if targets.numel() > 0:
        with on_device(targets):
            _localize_launch(targets.numel(), columns, ignore_index, elsewhere)(
                targets_ptr=targets.contiguous(), local_ptr=local
            )
    return local


def write_message(
    message: Tensor,
    digest: int,
    columns: Columns,
    targets: Tensor,
    rows: ShardRows | None,
    options: TokenOptions,
    with_stats: bool,
) -> None:
    """What the rank tells the others: see `ShardKernels`."""
    results = None if rows is None else rows.results
    losses, state, stats, correct = _addresses(results, message)
    with on_device(message):
        _message_launch(targets.numel(), columns, options, with_stats)(
            targets_ptr=targets.contiguous(),
            loss_ptr=losses,
            state_ptr=state,
            stats_ptr=stats,
            correct_ptr=correct,
            largest_state_ptr=message if rows is None or rows.largest_state is None else rows.largest_state,
            message_ptr=message,
            header_ptr=message[:HEADER].view(integers(message.dtype)),
            digest=digest,
        )


def merge_messages(
    messages: Tensor,
    targets: Tensor,
    mixture: Mixture,
    options: TokenOptions,
    results: Results,
    temperature: Tensor | None,
) -> None:
    """Loss, state and statistics of the whole rows: see `ShardKernels`."""
    if targets.numel() == 0:
        return
    mixed = mixture_arguments(mixture, messages)
    has_eta = mixed.pop("HAS_ETA")
    ranks, length = messages.shape
    losses, _, stats, correct = _addresses(results, messages)
    with on_device(messages):
        _merge_launch(targets.numel(), ranks, length, options, results.stats is not None, has_eta)(
            messages_ptr=messages,
            headers_ptr=messages.view(integers(messages.dtype)),
            targets_ptr=targets.contiguous(),
            loss_ptr=losses,
            state_ptr=results.state,
            stats_ptr=stats,
            correct_ptr=correct,
            entropy_state_ptr=results.entropy_state,
            temperature_ptr=of_tokens(temperature, targets),
            **mixed,
        )


def _addresses(results: Results | None, anything: Tensor) -> list[Tensor]:
    """Losses, state, statistics and `correct`; of what there is not, any address will do."""
    found = (None,) * 4 if results is None else (results.losses, results.state, results.stats, results.correct)
    return [anything if one is None else one for one in found]


def launch_options(warp_size: int) -> dict[str, int]:
    """The options of all launches on devices with warps of this size."""
    return {"num_warps": _WARPS, **register_arguments(_MAX_REGISTERS if warp_size == 32 else None)}


@functools.lru_cache(maxsize=256)
def _localize_launch(n_tokens: int, columns: Columns, ignore_index: int, elsewhere: int) -> Launch:
    return _launch("localize_targets", n_tokens, _columns(columns), ignore_index=ignore_index, elsewhere=elsewhere)


@functools.lru_cache(maxsize=256)
def _message_launch(n_tokens: int, columns: Columns, options: TokenOptions, with_stats: bool) -> Launch:
    return _launch(
        "write_message", n_tokens, _columns(columns), COLUMNS=columns.number > 0, **_constants(options, with_stats)
    )


@functools.lru_cache(maxsize=256)
def _merge_launch(
    n_tokens: int, n_ranks: int, length: int, options: TokenOptions, with_stats: bool, has_eta: bool
) -> Launch:
    return _launch(
        "merge_messages",
        n_tokens,
        loss_arguments(options),
        n_ranks=n_ranks,
        length=length,
        ignore_index=options.ignore_index,
        diff_scale=statistics_arguments(options, with_stats)["diff_scale"],
        HAS_ETA=has_eta,
        **_constants(options, with_stats),
    )


def _columns(columns: Columns) -> dict[str, int]:
    return {"start": columns.start, "n_columns": columns.number}


def _constants(options: TokenOptions, with_stats: bool) -> dict[str, bool]:
    return {name: statistics_arguments(options, with_stats)[name] for name in ("CAP", "SMOOTH", "STATS")}


def _launch(name: str, n_tokens: int, arguments: Mapping[str, float], **others: float) -> Launch:
    arguments = {**arguments, **others, "n_tokens": n_tokens, "TOKENS": TOKENS, **launch_options(WARP_SIZE)}
    # Without a token a message still has its header.
    return Launch(getattr(kernels("shards"), f"{name}_kernel"), (max(-(-n_tokens // TOKENS), 1),), arguments)
