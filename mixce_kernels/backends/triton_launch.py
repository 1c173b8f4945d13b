"""Launch configurations of the Triton kernels: pure functions of a call's sizes, and the only place for a tile.

Arguments have the names of the kernels' parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

# The widest access there is: the fewest instructions a byte.
VECTOR_BYTES = 16
# Programs of a cluster: more of them are not portable.
MAX_CTAS = 8
# Vectors a thread has in flight, to hide memory's latency: one exponential for the running maximum to so many logits.
_STACK = {2: 4, 4: 8, 8: 2}
# A row's rest is less than a step, so a small program has less of it, and its threads synchronise less.
_WARPS = 4
# A held row past the largest cluster, or without clusters: twice the threads have twice the registers.
_WIDE_WARPS = 8
# Below so many steps the rest would be most of the row: a smaller program has more steps.
_MIN_STEPS = 4
# Vectors of a held row in a thread's registers: 96 of the 255. Of more some compiler of Triton 3.6 to 3.9 spills. A
# multiprocessor has registers for two programs of 128 threads then: one loads while the other computes.
_MAX_HELD = 24
# Of those some compiler spills in clusters of 4 and 8, for sm_100 and later, and for gfx942.
_MAX_HELD_SPARING = 20
# And for sm_120 and gfx942 of those, in float64.
_MAX_HELD_FLOAT64 = 16
# And with a softcap, statistics or label smoothing, which need registers of their own.
_MAX_HELD_WITH_OPTIONS = 16
# Logits of a thread's block in such a row, and in any with a softcap or label smoothing, so that registers suffice.
_BLOCK_WITH_OPTIONS = 16
# In float64 they are also too much code for Triton's pass "plan CTA", which gives up after 10000 steps: no clusters.
_MAX_HELD_WITH_OPTIONS_FLOAT64 = 4
# Two programs for a multiprocessor with few rows; more of them would only repeat the reading of a row's terms.
_TILE_PROGRAMS = 256
# Registers per thread: the hardware's maximum. With this limit ptxas does not spill to raise occupancy.
_MAX_REGISTERS = 255


@dataclass(frozen=True)
class RowConfig:
    """A row for each program, or for each cluster of `n_ctas` programs: `n_steps` of its body and a rest of `rest`.

    A thread is a lane and takes `stack` vectors at once. A held row, with its gradient, stays in registers.
    """

    stack: int
    lanes: int
    vector: int
    num_warps: int
    n_ctas: int
    n_steps: int
    rest: int
    held: bool
    max_registers: int | None

    @property
    def step(self) -> int:
        """Logits in a step."""
        return self.n_ctas * self.lanes * self.vector

    def arguments(self) -> dict[str, Any]:
        """The arguments of `forward_kernel` and of its launch."""
        return {
            "n_steps": self.n_steps,
            "HELD": self.n_steps if self.held else None,
            "CTAS": self.n_ctas,
            "STACK": self.stack,
            "LANES": self.lanes,
            "VECTOR": self.vector,
            "REST": self.rest,
            "num_warps": self.num_warps,
            "num_ctas": self.n_ctas,
            **register_arguments(self.max_registers),
        }


@dataclass(frozen=True)
class TileConfig:
    """`n_tiles` programs a row: each takes `tile_steps` of the `n_steps` of its body, the last one the rest, too."""

    n_tiles: int
    tile_steps: int
    n_steps: int
    rest: int
    stack: int
    lanes: int
    vector: int
    num_warps: int
    max_registers: int | None

    def arguments(self) -> dict[str, Any]:
        """The arguments of `logits_grad_kernel` and `scale_rows_kernel`, and of their launches."""
        return {
            "n_steps": self.n_steps,
            "n_tiles": self.n_tiles,
            "tile_steps": self.tile_steps,
            "LANES": self.lanes,
            "VECTOR": self.vector,
            "REST": self.rest,
            "num_warps": self.num_warps,
            **register_arguments(self.max_registers),
        }


@dataclass(frozen=True)
class MergeConfig:
    """A warp for each row, which takes all of its `n_tiles` at once."""

    n_tiles: int
    tiles: int  # a power of two

    def arguments(self) -> dict[str, Any]:
        """The arguments of `merge_kernel` and of its launch."""
        return {"n_tiles": self.n_tiles, "TILES": self.tiles, "num_warps": 1}


@dataclass(frozen=True)
class ReductionConfig:
    """One program, which takes `block` tokens at once."""

    block: int
    num_warps: int
    max_registers: int | None

    def arguments(self) -> dict[str, Any]:
        """The arguments of `reduction_kernel` and of its launch."""
        return {"BLOCK": self.block, "num_warps": self.num_warps, **register_arguments(self.max_registers)}


def reduction_config(warp_size: int = 32) -> ReductionConfig:
    """The launch of the reduction: sixteen tokens a thread, so that its loads are under way together."""
    return ReductionConfig(16 * 8 * 32, num_warps=8, max_registers=_MAX_REGISTERS if warp_size == 32 else None)


def row_config(
    vocab_size: int,
    itemsize: int,
    with_grad: bool,
    with_stats: bool = False,
    with_options: bool = False,
    warp_size: int = 32,
    arch: int = 0,
) -> RowConfig:
    """The launch of the forward kernel; `with_options` says whether there is a softcap or label smoothing.

    `arch` is NVIDIA's, 90 for sm_90, and 0 elsewhere: clusters exist from 90 on.

    With a gradient and a row that fits the registers of a program or a cluster, the row is read once.
    """
    vector = VECTOR_BYTES // itemsize
    num_warps = _warps(vocab_size, vector, warp_size)
    n_ctas, held = 1, False
    stack = _stack(itemsize, with_options)
    if with_grad:
        max_ctas = MAX_CTAS if arch >= 90 else 1
        max_held = _MAX_HELD_SPARING if arch >= 100 or warp_size == 64 else _MAX_HELD
        if itemsize == 8:
            max_held = _MAX_HELD_FLOAT64
        if with_stats or with_options:
            max_held = _MAX_HELD_WITH_OPTIONS
            if itemsize == 8:
                max_ctas, max_held = 1, _MAX_HELD_WITH_OPTIONS_FLOAT64
        shapes = [(num_warps, 1), (_WARPS, 1)]
        shapes += [(_WARPS, ctas) for ctas in (2, 4, 8) if ctas <= max_ctas] + [(_WIDE_WARPS, max_ctas)]
        for warps, ctas in shapes:
            n_steps = _steps(vocab_size, ctas * warps * warp_size * vector, vector)
            if n_steps <= (min(max_held, _MAX_HELD_SPARING) if ctas > 2 else max_held):
                num_warps, n_ctas, held = warps, ctas, True
                stack = _stack(itemsize, with_stats or with_options)
                break
    lanes = num_warps * warp_size
    step = n_ctas * lanes * vector
    n_steps = _steps(vocab_size, step, vector)
    rest = _rest(vocab_size, n_steps * step, n_ctas * lanes)
    max_registers = _MAX_REGISTERS if (with_stats or with_options or with_grad) and warp_size == 32 else None
    return RowConfig(stack, lanes, vector, num_warps, n_ctas, n_steps, rest, held, max_registers)


def split_config(
    n_rows: int,
    vocab_size: int,
    itemsize: int,
    multiprocessors: int,
    with_stats: bool = False,
    with_options: bool = False,
    warp_size: int = 32,
) -> TileConfig | None:
    """The launch of a forward of rows fewer than the multiprocessors, in tiles; None for one program a row.

    Tiles of as many blocks as leave the busiest of two programs a multiprocessor the least. A row too short for a
    program of all warps is not worth a second launch.
    """
    config = tile_config(1, vocab_size, itemsize, with_options, warp_size)
    if not 0 < n_rows < multiprocessors or config.num_warps < _WARPS:
        return None
    n_blocks = -(-config.n_steps // config.stack)
    at_once = 2 * multiprocessors

    def busiest(blocks: int) -> int:
        return -(-n_rows * -(-n_blocks // blocks) // at_once) * blocks

    blocks = min((-(-n_blocks // n_tiles) for n_tiles in range(1, at_once + 1)), key=busiest)
    n_tiles = -(-n_blocks // blocks)
    if n_tiles <= 1:
        return None
    max_registers = _MAX_REGISTERS if (with_stats or with_options) and warp_size == 32 else None
    return replace(config, n_tiles=n_tiles, tile_steps=blocks * config.stack, max_registers=max_registers)


def merge_config(n_tiles: int, warp_size: int = 32) -> MergeConfig:
    """The launch of what merges the tiles of a split forward."""
    return MergeConfig(n_tiles, max(1 << (n_tiles - 1).bit_length(), warp_size))


def tile_config(
    n_rows: int, vocab_size: int, itemsize: int, with_softcap: bool = False, warp_size: int = 32
) -> TileConfig:
    """The launch of the kernels without a sum over the row: tiles of a row are programs of their own."""
    vector = VECTOR_BYTES // itemsize
    num_warps = _warps(vocab_size, vector, warp_size)
    lanes = num_warps * warp_size
    step = lanes * vector
    stack = _stack(itemsize, with_softcap)
    n_steps = _steps(vocab_size, step, vector)
    n_blocks = max(-(-n_steps // stack), 1)
    blocks_per_tile = -(-n_blocks // min(n_blocks, -(-_TILE_PROGRAMS // n_rows)))
    n_tiles = -(-n_blocks // blocks_per_tile)
    rest = _rest(vocab_size, n_steps * step, lanes)
    max_registers = _MAX_REGISTERS if with_softcap and warp_size == 32 else None
    return TileConfig(n_tiles, blocks_per_tile * stack, n_steps, rest, stack, lanes, vector, num_warps, max_registers)


def register_arguments(max_registers: int | None) -> dict[str, int]:
    """The argument of a launch that limits registers per thread."""
    return {} if max_registers is None else {"maxnreg": max_registers}


def _steps(vocab_size: int, step: int, vector: int) -> int:
    """Whole steps after a row's first 16-byte boundary, wherever that is."""
    return max(vocab_size - (vector - 1), 0) // step


def _stack(itemsize: int, with_options: bool) -> int:
    """Vectors of a block in a thread."""
    stack = _STACK[itemsize]
    return min(stack, _BLOCK_WITH_OPTIONS * itemsize // VECTOR_BYTES) if with_options else stack


def _rest(vocab_size: int, body_size: int, lanes: int) -> int:
    """The tile that holds what is left beside the body, at least an element a lane."""
    return max(1 << (vocab_size - body_size - 1).bit_length(), lanes)


def _warps(vocab_size: int, vector: int, warp_size: int) -> int:
    num_warps = _WARPS
    while num_warps > 1 and _steps(vocab_size, num_warps * warp_size * vector, vector) < _MIN_STEPS:
        num_warps //= 2
    return num_warps
