"""What is measured of the loss with a linear head: shapes and settings, and the sizes that suit a machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from harness.allocators import CACHING, DEFAULT, WARM

# In the CSV's column of the allocator: the line holds a peak, measured for itself (see PEAK_ENVIRONMENT).
PEAKS = "peaks"

Shape = tuple[str, int, int, int]  # dtype, N, D, V

# The shapes of the goals that the package sets itself on a CPU: GPT-2's head and one of Llama 3's vocabulary.
GOAL_SHAPES: tuple[Shape, ...] = (("float32", 2048, 768, 50257), ("float32", 1024, 768, 128256))
HALF_SHAPE: Shape = ("bfloat16", 2048, 768, 50257)
FULL_SHAPES: tuple[Shape, ...] = (
    ("float32", 512, 768, 50257),
    ("float32", 1024, 2048, 50257),
    ("bfloat16", 512, 768, 50257),
    ("bfloat16", 1024, 768, 128256),
)
GPU_ROWS, GPU_HIDDEN_SIZE, GPU_VOCABULARIES = 8192, 4096, (32000, 128256)
# Peak memory against the vocabulary, of one N and D.
SWEEP_VOCABULARIES = (8192, 32000, 50257, 128256, 256000)
SWEEP_ROWS, SWEEP_HIDDEN_SIZE = 1024, 256
# Bytes of the plain formula for each logit: those of the inputs' type, the float32 copy, log-softmax, two gradients.
PLAIN_BYTES = 24


@dataclass(frozen=True)
class LinearCell:
    """One shape in one setting; all contenders of a cell take turns in one process."""

    dtype: str
    rows: int
    hidden_size: int
    vocab: int
    threads: int
    allocator: str
    # Whether contenders that no goal needs take part, and the forward is timed by itself.
    all: bool = True

    def __str__(self) -> str:
        shape = f"{self.dtype} {self.rows} x {self.hidden_size} x {self.vocab}"
        return f"{shape}, {self.threads} thread{'s' * (self.threads > 1)}"


def linear_shapes(device: torch.device, full: bool, only: dict[str, list[int]], dtypes: list[str]) -> list[Shape]:
    """The shapes that are timed.

    Args:
        device: where the inputs will be.
        full: those of FULL_SHAPES too, on a CPU; float32 too on a GPU.
        only: rows, hidden sizes and vocabularies instead of the usual ones, under "rows", "hidden_size" and "vocab".
        dtypes: only these; empty for the usual ones.
    """
    if device.type == "cpu" and not any(only.values()):
        usual = [*GOAL_SHAPES, HALF_SHAPE, *(FULL_SHAPES if full or dtypes else ())]
        return [shape for shape in usual if not dtypes or shape[0] in dtypes]
    on_gpu = device.type == "cuda"
    _, rows, hidden_size, vocab = GOAL_SHAPES[0]
    return [
        (dtype, n, d, v)
        for dtype in dtypes or (["bfloat16", *(["float32"] if full else [])] if on_gpu else ["float32"])
        for d in only["hidden_size"] or [GPU_HIDDEN_SIZE if on_gpu else hidden_size]
        for v in only["vocab"] or (GPU_VOCABULARIES if on_gpu else [vocab])
        for n in only["rows"] or [_rows_that_fit(device, v) if on_gpu else rows]
    ]


def linear_cells(
    device: torch.device, shapes: list[Shape], threads: list[int], allocators: list[str], full: bool
) -> list[LinearCell]:
    """The cells that are timed, in the order of measurement."""
    most = threads[-1]
    if device.type == "cuda":
        return [LinearCell(*shape, most, CACHING) for shape in shapes]
    found = []
    if WARM in allocators:
        found += [LinearCell(*shape, most, WARM) for shape in shapes]
        found += [LinearCell(*shape, count, WARM, all=False) for count in threads[:-1] for shape in shapes[:1]]
    if DEFAULT in allocators:
        alone = WARM not in allocators
        found += [LinearCell(*shape, most, DEFAULT, all=full or alone) for shape in shapes]
    return found


def peak_cells(timed: Iterable[LinearCell], sweep: list[int], threads: int) -> list[LinearCell]:
    """The cells whose peaks are measured: those that are timed, and a sweep over vocabularies."""
    shapes = {(cell.dtype, cell.rows, cell.hidden_size, cell.vocab): None for cell in timed}
    types = dict.fromkeys(dtype for dtype, *_ in shapes)
    swept: dict[Shape, None] = {(dtype, SWEEP_ROWS, SWEEP_HIDDEN_SIZE, v): None for dtype in types for v in sweep}
    return [LinearCell(*shape, threads, PEAKS) for shape in {**swept, **shapes}]


def _rows_that_fit(device: torch.device, vocab: int) -> int:
    """GPU_ROWS, or the power of two below at which the plain formula fits, with as much left for all else."""
    free, _ = torch.cuda.mem_get_info(device)
    rows = GPU_ROWS
    while rows > 1 and rows * vocab * PLAIN_BYTES > free / 2:
        rows //= 2
    return rows
