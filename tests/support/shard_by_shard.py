"""The ranks of a split vocabulary one after another, in one process and without a process group."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import torch
from torch import Tensor

from mixce_kernels import backends
from mixce_kernels.backends.results import Results, empty_results
from mixce_kernels.backends.shards import Columns
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions
from mixce_kernels.parallel import backend as parallel
from mixce_kernels.parallel.shard import Shard
from mixce_kernels.reduction import NO_REDUCTION
from support.shards import PADDING, SPLITS


class _ToldError(Exception):
    """A rank has come to where it meets the others, with its message."""


def split_columns(split: str, vocab_size: int, ranks: int) -> list[Columns]:
    """The ranks' columns by a name of SPLITS."""
    numbers = SPLITS[split](vocab_size, ranks)
    return [Columns(sum(numbers[:rank]), number) for rank, number in enumerate(numbers)]


def shard_by_shard(
    backend: str,
    columns: Sequence[Columns],
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    mixture: Mixture,
    options: TokenOptions,
    grad_loss: Tensor,  # [...]
    *,
    with_stats: bool,
    padded: bool = False,
    in_forward: bool = False,
) -> tuple[Results, list[Tensor]]:
    """The results, the same on every rank bit for bit, and the gradient of each rank's columns."""
    ranks, shards = [], []
    for start, number in columns:
        shard = logits.detach()[..., start : start + number]
        vocab_size = None
        if padded:
            shard = torch.cat((shard, shard.new_full((*shard.shape[:-1], PADDING), 1e4)), -1)
            vocab_size = start + number
        shards.append(shard)
        ranks.append(parallel.ShardBackend(backends.get(backend), Shard("", start, vocab_size, check_group=False)))

    def forward(rank: int, gather: object, results: Results, grad: Tensor | None) -> None:
        scale = None if grad is None else grad_loss.double()
        with mock.patch.object(parallel, "all_gather", gather), mock.patch.object(Shard, "group", None):
            ranks[rank].forward(shards[rank], targets, mixture, options, NO_REDUCTION, results, scale, grad)

    def memory(shard: Tensor) -> Results:
        return empty_results(shard, targets, NO_REDUCTION, with_state=True, with_stats=with_stats)

    told: list[Tensor] = []

    def tell(message: Tensor, group: None) -> Tensor:
        told.append(message)
        raise _ToldError

    for rank, shard in enumerate(shards):
        try:
            forward(rank, tell, memory(shard), None)
        except _ToldError:
            continue
    found, grads = [], []
    for rank, shard in enumerate(shards):
        results, grad = memory(shard), torch.full_like(shard, torch.nan)
        forward(rank, lambda message, group: torch.stack(told), results, grad if in_forward else None)
        if not in_forward:
            ranks[rank].logits_grad(shard, targets, results.state, grad_loss, None, options, grad)
        number = columns[rank].number
        assert (grad[..., number:] == 0).all(), "padding has a gradient"
        found.append(results)
        grads.append(grad[..., :number])
    for results in found:
        for one, same in zip(results, found[0], strict=True):
            assert (one is None) == (same is None)
            if one is not None:
                torch.testing.assert_close(one, same, rtol=0, atol=0, equal_nan=True)
    return found[0], grads
