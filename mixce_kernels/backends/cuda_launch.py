"""Launch configurations of the CUDA kernels: pure functions of a call's sizes and the device, the only place for them.

The number of threads of a block, the vectors that a thread has under way and why stand in csrc/cuda/row_stats.cuh: the
kernels are compiled for them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

# Of a row, what a block must have at the least: kUnroll vectors of 16 bytes, two in float64, for each of its threads.
BLOCK_BYTES = 4 * 16 * 256
# More blocks in a cluster than this are not portable.
MAX_CLUSTER = 8
MIN_CLUSTER_ARCH = 90
# Shared memory that the driver keeps of each block.
_RESERVED_BYTES = 1024
VECTOR_BYTES = 16


class Device(NamedTuple):
    """What a launch depends on; `arch` is 90 for code compiled for compute capability 9.0, shared memory in bytes."""

    arch: int
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int


class RowLaunch(NamedTuple):
    """`parts` blocks a row, a cluster where they hold it: `held_bytes` of it stay in each one's shared memory."""

    parts: int
    held_bytes: int = 0


class ForwardLaunch(NamedTuple):
    """The launch of a forward, the partial statistics of its split rows, and whether its gradient is another kernel."""

    rows: RowLaunch
    n_partials: int = 0
    grad_apart: bool = False


@functools.lru_cache(maxsize=1024)
def rows_launch(n_rows: int, row_bytes: int, device: Device) -> RowLaunch:
    """The launch of kernels whose blocks need not meet, and of the forward alone.

    A row is one block's work, since every block pays for a prologue, and for a reduction in the forward. Rows fewer
    than the multiprocessors are split: into as few parts as leave the busiest multiprocessor the least.
    """
    if not 0 < n_rows < device.multiprocessors:
        return RowLaunch(1)
    most = max(1, min(row_bytes // BLOCK_BYTES, device.multiprocessors))

    def busiest(parts: int) -> float:
        return -(-n_rows * parts // device.multiprocessors) / parts

    return RowLaunch(min(range(1, most + 1), key=busiest))


@functools.lru_cache(maxsize=1024)
def grad_in_forward_launch(n_rows: int, row_bytes: int, state_bytes: int, device: Device) -> RowLaunch:
    """The launch of the forward with its gradient: the row stays on the chip between the passes where it can.

    The fewest blocks of a cluster whose shares fit two blocks to a multiprocessor, so that one reads while the other
    writes; else the fewest whose shares fit at all. Rows fewer than the multiprocessors get more blocks each. Where no
    cluster can hold the row, one block reads it again for pass 2, from L2 as far as that still has it.
    """
    clusters = [1, 2, 4, MAX_CLUSTER] if device.arch >= MIN_CLUSTER_ARCH else [1]
    wanted = 1
    while wanted < clusters[-1] and n_rows * wanted * 2 <= device.multiprocessors and wanted * BLOCK_BYTES < row_bytes:
        wanted *= 2
    half = device.shared_per_multiprocessor // 2 - _RESERVED_BYTES
    for limit in (min(half, device.shared_per_block), device.shared_per_block):
        for parts in clusters[clusters.index(wanted) :]:
            held_bytes = -(-row_bytes // (VECTOR_BYTES * parts)) * VECTOR_BYTES
            if held_bytes + state_bytes <= limit:
                return RowLaunch(parts, held_bytes)
    return RowLaunch(1)


@functools.lru_cache(maxsize=1024)
def forward_launch(
    n_rows: int, row_bytes: int, state_bytes: int, device: Device, *, with_grad: bool, aligned_alike: bool
) -> ForwardLaunch:
    """The launch of a forward, alone or with its gradient.

    Shared memory holds a row for pass 2 only where the gradient's rows lie as the logits' do to VECTOR_BYTES
    (`aligned_alike`). Rows that it does not hold are read twice; where they are also too few to keep the device busy,
    the gradient is another kernel's work, so that both kernels split them into more parts.
    """
    if with_grad:
        launch = grad_in_forward_launch(n_rows, row_bytes, state_bytes, device) if aligned_alike else RowLaunch(1)
        if launch.held_bytes or n_rows >= device.multiprocessors:
            return ForwardLaunch(launch)
    launch = rows_launch(n_rows, row_bytes, device)
    return ForwardLaunch(launch, n_partials=n_rows * launch.parts if launch.parts > 1 else 0, grad_apart=with_grad)
