"""Rows of logits in memory: where a row begins, and its tiles.

A row's body is the part that can be taken in whole steps, one 16-byte vector a thread, from the row's first 16-byte
boundary on. The rest, less than a step and a vector before and after the body, is taken element by element.

A tile is [CTAS, STACK, LANES, VECTOR]: STACK vectors for each thread of the CTAS programs that share a row, which are a
thread-block cluster. CTAS is 1 for a program on its own; the rest's tile has vectors of one element.
"""

import triton
import triton.language as tl


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """The 64-bit offset of a row's first element."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def head_of(row_ptr, VECTOR: tl.constexpr):
    """The elements before the row's first 16-byte boundary."""
    return ((-row_ptr.to(tl.int64) & 15).to(tl.int32) * VECTOR) // 16


@triton.jit
def tile_index(SHAPE: tl.constexpr):
    """Offsets of a tile's elements: each program's follow one another, and each thread's within a vector."""
    cta = tl.arange(0, SHAPE[0])[:, None, None, None]
    stack = tl.arange(0, SHAPE[1])[None, :, None, None]
    lane = tl.arange(0, SHAPE[2])[None, None, :, None]
    i = tl.arange(0, SHAPE[3])[None, None, None, :]
    return cta * (SHAPE[1] * SHAPE[2] * SHAPE[3]) + stack * (SHAPE[2] * SHAPE[3]) + lane * SHAPE[3] + i


@triton.jit
def rest_of(head, body_size, end, SHAPE: tl.constexpr):
    """Columns of the elements outside the body, and which of them exist: those before `end`, none for an end of 0."""
    i = tile_index(SHAPE)
    return tl.where(i < head, i, body_size + i), i < end - body_size


@triton.jit
def held_tiles(row_ptr, head, HELD: tl.constexpr, SHAPE: tl.constexpr):
    """HELD steps of a row's body in registers: tiles of a block each, then of a step each."""
    body_ptr = tl.multiple_of(row_ptr + head, 16)
    STEP: tl.constexpr = SHAPE[0] * SHAPE[2] * SHAPE[3]
    tiles = ()
    for i in tl.static_range(HELD // SHAPE[1]):
        block = tl.load(body_ptr + i * SHAPE[1] * STEP + tile_index(SHAPE))
        tiles = tiles + (block,)  # type: ignore[assignment]  # noqa: RUF005
    for i in tl.static_range(HELD // SHAPE[1] * SHAPE[1], HELD):
        step = tl.load(body_ptr + i * STEP + tile_index((SHAPE[0], 1, SHAPE[2], SHAPE[3])))
        tiles = tiles + (step,)  # type: ignore[assignment]  # noqa: RUF005
    return tiles
