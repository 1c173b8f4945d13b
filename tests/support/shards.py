"""How the tests split a vocabulary over ranks, and what they make of the ranks' parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Columns of each of k ranks: as torch.chunk splits them (the last ranks may have fewer, or none), from few to many, and
# with a rank that has none.
SPLITS: dict[str, Callable[[int, int], list[int]]] = {
    "even": lambda size, k: [min(-(-size // k), max(size - rank * -(-size // k), 0)) for rank in range(k)],
    "uneven": lambda size, k: [size * (rank + 1) ** 2 // k**2 - size * rank**2 // k**2 for rank in range(k)],
    "empty": lambda size, k: [0, *SPLITS["uneven"](size, k - 1)] if k > 1 else [size],
}
PADDING = 3  # columns beyond the vocabulary, of every rank that has its end or nothing of it


def column_range(split: str, vocab_size: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """The first column of this rank, and the one after its last."""
    numbers = SPLITS[split](vocab_size, group.size())
    start = sum(numbers[: group.rank()])
    return start, start + numbers[group.rank()]


def padded(shard: Tensor, end: int, vocab_size: int) -> Tensor:
    """The columns of a shard [..., columns], with columns of junk after the end of the vocabulary."""
    junk = shard.new_full((*shard.shape[:-1], PADDING if end == vocab_size else 0), 1e4)
    return torch.cat((shard.detach(), junk), -1)


def everyone(group: dist.ProcessGroup, value: Any) -> list[Any]:
    """The ranks' values."""
    values = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
