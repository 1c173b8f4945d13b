"""Launch configurations: pure functions of a call's sizes, the only place where a tile is chosen."""

from __future__ import annotations

from dataclasses import dataclass

VECTOR_BYTES = 16
# Logits a thread holds at once: enough loads in flight, one exponential for the running maximum to so many, no spills.
_PER_THREAD = {2: 32, 4: 32, 8: 4}
# A row's last block wastes less, and its threads synchronise less, in a small program; rows are many.
_ROW_WARPS = 4
# With a gradient: up to here the whole row stays in registers, beyond it few rows at a time share L2.
_ONE_BLOCK_WARPS = 16
_GRAD_WARPS = 8
_TILE_WARPS = 8
# Enough programs to fill any GPU several times over; more of them would only repeat the reading of a row's terms.
_TILE_PROGRAMS = 2048
_REGISTERS = 65536  # of an NVIDIA multiprocessor


@dataclass(frozen=True)
class RowConfig:
    """One program a row: blocks of stack * lanes * vector logits, a lane to a thread."""

    stack: int
    lanes: int
    vector: int
    num_warps: int
    one_block: bool
    max_registers: int | None

    @property
    def block(self) -> int:
        """Logits in a block."""
        return self.stack * self.lanes * self.vector


@dataclass(frozen=True)
class TileConfig:
    """`n_tiles` programs a row: each takes `tile_size` logits in blocks of `block`, and the rest in steps of `step`."""

    n_tiles: int
    tile_size: int
    block: int
    step: int
    vector: int
    num_warps: int


def row_config(
    vocab_size: int, itemsize: int, with_grad: bool, with_stats: bool = False, warp_size: int = 32
) -> RowConfig:
    """The launch of the forward kernel.

    With a gradient and a row that fits the registers of one program, the row is read once.
    """
    vector = VECTOR_BYTES // itemsize
    max_stack = _PER_THREAD[itemsize] // vector
    num_warps, stack = _smallest(
        vocab_size, vector, max_stack, _ONE_BLOCK_WARPS if with_grad else _ROW_WARPS, warp_size
    )
    one_block = vocab_size <= stack * num_warps * warp_size * vector
    if with_grad and not one_block:
        num_warps = _GRAD_WARPS
    lanes = num_warps * warp_size
    # With statistics ptxas would sooner spill a few registers than run fewer programs at once, unless told a number.
    max_registers = min(255, _REGISTERS // lanes) if with_stats and warp_size == 32 else None
    return RowConfig(stack, lanes, vector, num_warps, one_block, max_registers)


def tile_config(n_rows: int, vocab_size: int, itemsize: int, warp_size: int = 32) -> TileConfig:
    """The launch of the kernels without a sum over the row: tiles of a row are programs of their own."""
    vector = VECTOR_BYTES // itemsize
    num_warps, stack = _smallest(vocab_size, vector, _PER_THREAD[itemsize] // vector, _TILE_WARPS, warp_size)
    step = num_warps * warp_size * vector
    block = stack * step
    n_blocks = -(-vocab_size // block)
    blocks_per_tile = -(-n_blocks // min(n_blocks, -(-_TILE_PROGRAMS // n_rows)))
    return TileConfig(-(-n_blocks // blocks_per_tile), blocks_per_tile * block, block, step, vector, num_warps)


def _smallest(vocab_size: int, vector: int, max_stack: int, max_warps: int, warp_size: int) -> tuple[int, int]:
    """Warps and vectors a thread of the smallest block that holds the row, or of the largest block."""
    num_warps, stack = 1, 1
    while stack * num_warps * warp_size * vector < vocab_size and stack < max_stack:
        stack *= 2
    while stack * num_warps * warp_size * vector < vocab_size and num_warps < max_warps:
        num_warps *= 2
    return num_warps, stack
