"""What is measured of log-probabilities: shapes and settings, from logits and from hidden states."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from harness.allocators import CACHING
from linear.plan import linear_shapes
from vocab.plan import shapes

# What the results are computed from.
LOGITS, HIDDEN = "logits", "hidden"
LEVELS = (LOGITS, HIDDEN)
DTYPES = ("float32", "bfloat16")

# The shape of the goals that the package sets itself on a CPU.
GOAL_SHAPE = ("float32", 1024, 50257)
# Logits repeat after 32 rows: errors need no more of them than show that.
ERROR_ROWS = 64
# GPT-2's head, with so few tokens that both types take half a minute on two cores.
HIDDEN_ROWS, HIDDEN_SIZE = 256, 768


@dataclass(frozen=True)
class LogprobCell:
    """One shape in one setting; all contenders of a cell take turns in one process."""

    level: str
    dtype: str
    rows: int
    hidden_size: int | None  # None: logits are given
    vocab: int
    threads: int
    allocator: str
    timed: bool = True  # or errors alone

    def __str__(self) -> str:
        given = "" if self.hidden_size is None else f"{self.hidden_size} x "
        shape = f"{self.level} {self.dtype} {self.rows} x {given}{self.vocab}"
        return f"{shape}, {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass(frozen=True)
class Sizes:
    """The sizes that were asked for; 0 or empty for the usual ones."""

    dtypes: list[str]
    rows: int
    hidden_size: int
    vocab: int


def logprob_cells(
    device: torch.device, levels: Iterable[str], sizes: Sizes, threads: list[int], allocators: list[str]
) -> list[LogprobCell]:
    """The cells, in the order of measurement.

    Args:
        device: where the tensors will be.
        levels: of LEVELS.
        sizes: instead of the usual ones.
        threads: empty for one with logits and for all cores with hidden states.
        allocators: the regimes on a CPU.
    """
    on_gpu = device.type == "cuda"
    found = []
    for level in levels:
        shape_of = _of_logits if level == LOGITS else _of_hidden
        for allocator in [CACHING] if on_gpu else allocators:
            for count in threads or [1 if level == LOGITS and not on_gpu else torch.get_num_threads()]:
                for dtype in sizes.dtypes or DTYPES:
                    rows, hidden_size, vocab = shape_of(device, dtype, sizes)
                    # On a CPU the usual run times logits of the goals' type alone.
                    timed = level == HIDDEN or on_gpu or bool(sizes.dtypes) or dtype == GOAL_SHAPE[0]
                    found.append(LogprobCell(level, dtype, rows, hidden_size, vocab, count, allocator, timed))
    return found


def _of_logits(device: torch.device, dtype: str, sizes: Sizes) -> tuple[int, int | None, int]:
    vocab = sizes.vocab or GOAL_SHAPE[2]
    if device.type == "cuda":
        ((_, rows, _),) = shapes(device, False, [vocab], [dtype], sizes.rows)
        return rows, None, vocab
    usual = GOAL_SHAPE[1] if dtype == GOAL_SHAPE[0] or sizes.dtypes else ERROR_ROWS
    return sizes.rows or usual, None, vocab


def _of_hidden(device: torch.device, dtype: str, sizes: Sizes) -> tuple[int, int | None, int]:
    if device.type == "cuda":
        given = {"rows": sizes.rows, "hidden_size": sizes.hidden_size, "vocab": sizes.vocab}
        only = {name: [size] if size else [] for name, size in given.items()}
        _, rows, hidden_size, vocab = linear_shapes(device, False, only, [dtype])[0]
        return rows, hidden_size, vocab
    return sizes.rows or HIDDEN_ROWS, sizes.hidden_size or HIDDEN_SIZE, sizes.vocab or GOAL_SHAPE[2]
