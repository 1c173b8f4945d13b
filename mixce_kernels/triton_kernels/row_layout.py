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
def held_tiles(ptr, N: tl.constexpr, SHAPE: tl.constexpr):
    """N tiles, one after another in memory, in registers."""
    tiles = ()
    for i in tl.static_range(N):
        tile = tl.load(ptr + i * (SHAPE[0] * SHAPE[1] * SHAPE[2] * SHAPE[3]) + tile_index(SHAPE))
        tiles = tiles + (tile,)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def rotated(tiles, PTX: tl.constexpr):
    """The tiles with the first one behind the others.

    Triton 3.7 cannot compile the reductions of a cluster where a loop hands on a tensor as it is: PTX moves it.
    """
    result = ()
    for i in tl.static_range(len(tiles)):
        result = result + (moved(tiles[(i + 1) % len(tiles)], PTX),)  # type: ignore[assignment]  # noqa: RUF005
    return result


@triton.jit
def moved(x, PTX: tl.constexpr):
    """The same numbers in other registers."""
    if PTX:
        if x.dtype.primitive_bitwidth == 16:
            x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)
        elif x.dtype.primitive_bitwidth == 32:
            x = tl.inline_asm_elementwise("mov.f32 $0, $1;", "=f,f", [x], dtype=x.dtype, is_pure=True, pack=1)
        else:
            x = tl.inline_asm_elementwise("mov.f64 $0, $1;", "=d,d", [x], dtype=x.dtype, is_pure=True, pack=1)
    return x
