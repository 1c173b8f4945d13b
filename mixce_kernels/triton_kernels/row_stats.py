"""Pass 1 over a row of logits: its statistics.

Each thread is a lane with statistics of its own, which are merged at the row's end. They travel as tuples of tensors
[CTAS, LANES], or [CTAS, 1] for a row, as every program of a cluster knows it:

    m                the largest (capped) logit
    sum_exp          of exp(z - m)
    sum_shifted      of z - m, where SMOOTH
    sum_exp_shifted  of exp(z - m) * (z - m), where STATS
    sum_exp_squared  of exp(z - m)^2, where STATS
    count            of logits, where SMOOTH
    beaten           of logits that come before the target, where STATS
"""

import triton
import triton.language as tl

from mixce_kernels.triton_kernels.jit import bound
from mixce_kernels.triton_kernels.mixce_math import capped, finite, raise_maximum
from mixce_kernels.triton_kernels.row_layout import rotated, tile_index

# Statistics that a program leaves of its part of a row.
PARTIALS = tl.constexpr(7)


@triton.jit
def empty_lanes(CTAS: tl.constexpr, LANES: tl.constexpr, dtype: tl.constexpr):
    """Statistics of no logits."""
    zeros = tl.zeros((CTAS, LANES), dtype)
    return zeros - float("inf"), zeros, zeros, zeros, zeros, zeros, tl.zeros((CTAS, LANES), tl.int32)


@triton.jit
def lane_sum(values):
    """[CTAS, STACK, LANES, VECTOR] to [CTAS, LANES]: within a thread where LANES is a program's number of threads."""
    return tl.sum(tl.sum(values, axis=3), axis=1)


@triton.jit
def tile_max(z):
    """The lanes' largest of a tile."""
    return tl.max(tl.max(z, axis=3), axis=1)


@triton.jit
def tile_lanes(
    x,
    z,  # of x, capped where asked for; -inf where not valid
    m,  # [CTAS, LANES], no less than the lanes' largest z
    columns,
    valid,  # None: all of them
    target_column,
    x_target,
    rate,
    SMOOTH: tl.constexpr,
    STATS: tl.constexpr,
):
    """The statistics of one tile."""
    d = z - finite(m)[:, None, :, None]
    e = tl.exp2(d * rate)
    sum_exp = lane_sum(e)
    sum_shifted, sum_exp_shifted, sum_exp_squared, count, beaten = sum_exp, sum_exp, sum_exp, sum_exp, sum_exp
    if SMOOTH:
        if valid is None:
            sum_shifted = lane_sum(d)
            # A sum, because Triton 3.7 cannot plan clusters where a loop adds a constant tensor.
            count = lane_sum(tl.full(x.shape, 1.0, m.dtype))
        else:
            sum_shifted = lane_sum(tl.where(valid, d, 0.0))
            count = lane_sum(valid.to(m.dtype))
    if STATS:
        sum_exp_shifted = lane_sum(e * tl.maximum(d, -1e30))
        sum_exp_squared = lane_sum(e * e)
        x = x.to(m.dtype)
        beats = (x > x_target) | ((x == x_target) & (columns < target_column))
        if valid is not None:
            beats = beats & valid
        beaten = lane_sum(beats.to(tl.int32))
    return m, sum_exp, sum_shifted, sum_exp_shifted, sum_exp_squared, count, beaten


@triton.jit
def sum_of_lanes(first, second, SMOOTH: tl.constexpr, STATS: tl.constexpr):
    """The statistics of both, relative to the same m."""
    m, sum_exp, sum_shifted, sum_exp_shifted, sum_exp_squared, count, beaten = first
    if SMOOTH:
        sum_shifted += second[2]
        count += second[5]
    if STATS:
        sum_exp_shifted += second[3]
        sum_exp_squared += second[4]
        beaten += second[6]
    return m, sum_exp + second[1], sum_shifted, sum_exp_shifted, sum_exp_squared, count, beaten


@triton.jit
def add_body(
    lanes, x, columns, target_column, x_target, transform,
    SMOOTH: tl.constexpr, CAP: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Pass 1 over a tile of the body. A lane has a running maximum: one exponential for it serves all its logits."""
    z = x.to(lanes[0].dtype)
    if CAP:
        z, _ = capped(z, transform)
    m = tl.maximum(lanes[0], tile_max(z))
    tile = tile_lanes(x, z, m, columns, None, target_column, x_target, transform[0], SMOOTH, STATS)
    return sum_of_lanes(raise_maximum(lanes, m, transform[0], SMOOTH, STATS), tile, SMOOTH, STATS)


@triton.jit
def add_steps(
    lanes,
    logits_ptr,  # at the row's first logit
    head,
    first_step,
    end_step,
    target_column,
    x_target,
    transform,
    SMOOTH: tl.constexpr,
    CAP: tl.constexpr,
    STATS: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Pass 1 over some steps of a row in memory, in tiles of SHAPE and then of a step each."""
    STEP: tl.constexpr = SHAPE[0] * SHAPE[2] * SHAPE[3]
    in_block = tile_index(SHAPE)
    in_step = tile_index((SHAPE[0], 1, SHAPE[2], SHAPE[3]))
    body_ptr = tl.multiple_of(logits_ptr + head, 16)
    n_blocks = (end_step - first_step) // SHAPE[1]
    for block in range(bound(n_blocks)):
        begin = (first_step + block * SHAPE[1]) * STEP
        x = tl.load(body_ptr + begin + in_block)
        columns = head + begin + in_block
        lanes = add_body(lanes, x, columns, target_column, x_target, transform, SMOOTH, CAP, STATS)
    for step in range(bound(first_step + n_blocks * SHAPE[1]), bound(end_step)):
        x = tl.load(body_ptr + step * STEP + in_step)
        columns = head + step * STEP + in_step
        lanes = add_body(lanes, x, columns, target_column, x_target, transform, SMOOTH, CAP, STATS)
    return lanes


@triton.jit
def add_held(
    lanes, tiles, n_tiles, column, offsets, target_column, x_target, transform,
    SMOOTH: tl.constexpr, CAP: tl.constexpr, STATS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Pass 1 over tiles in registers, from `column` on; returns the tiles, too.

    With options a loop rotates them: code for each tile would spill, and be too much for Triton's pass "plan CTA".
    """
    if SMOOTH or CAP or STATS:
        if len(tiles) > 0:
            for i in range(bound(n_tiles)):
                columns = column + i * offsets.numel + offsets
                lanes = add_body(lanes, tiles[0], columns, target_column, x_target, transform, SMOOTH, CAP, STATS)
                tiles = rotated(tiles, PTX)
    else:
        for i in tl.static_range(len(tiles)):
            columns = column + i * offsets.numel + offsets
            lanes = add_body(lanes, tiles[i], columns, target_column, x_target, transform, SMOOTH, CAP, STATS)
    return lanes, tiles


@triton.jit
def add_rest(
    lanes, x, columns, valid, target_column, x_target, transform,
    SMOOTH: tl.constexpr, CAP: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Pass 1 over the rest, x being -inf where not valid.

    Its statistics have its own maximum, so that Triton lays them out as the body's, not the tile.
    """
    z = x.to(lanes[0].dtype)
    if CAP:
        z, _ = capped(z, transform)
        z = tl.where(valid, z, float("-inf"))
    tile = tile_lanes(x, z, tile_max(z), columns, valid, target_column, x_target, transform[0], SMOOTH, STATS)
    m = tl.maximum(lanes[0], tile[0])
    lanes = raise_maximum(lanes, m, transform[0], SMOOTH, STATS)
    return sum_of_lanes(lanes, raise_maximum(tile, m, transform[0], SMOOTH, STATS), SMOOTH, STATS)


@triton.jit
def merge_lanes(lanes, rate, SMOOTH: tl.constexpr, STATS: tl.constexpr):
    """The statistics [CTAS, 1] of lanes [CTAS, LANES]."""
    m = tl.max(lanes[0], axis=1)[:, None]
    _, sum_exp, sum_shifted, sum_exp_shifted, sum_exp_squared, count, beaten = raise_maximum(
        lanes, m, rate, SMOOTH, STATS
    )
    if SMOOTH:
        sum_shifted = tl.sum(sum_shifted, axis=1)[:, None]
        count = tl.sum(count, axis=1)[:, None]
    if STATS:
        sum_exp_shifted = tl.sum(sum_exp_shifted, axis=1)[:, None]
        sum_exp_squared = tl.sum(sum_exp_squared, axis=1)[:, None]
        beaten = tl.sum(beaten, axis=1)[:, None]
    return m, tl.sum(sum_exp, axis=1)[:, None], sum_shifted, sum_exp_shifted, sum_exp_squared, count, beaten


@triton.jit
def store_partials(lanes, ptr, stride, SMOOTH: tl.constexpr, STATS: tl.constexpr):
    """Leaves statistics at `ptr`, `stride` numbers from one to the next."""
    m, sum_exp, sum_shifted, sum_exp_shifted, sum_exp_squared, count, beaten = lanes
    tl.store(ptr, m)
    tl.store(ptr + stride, sum_exp)
    if SMOOTH:
        tl.store(ptr + 2 * stride, sum_shifted)
        tl.store(ptr + 3 * stride, count)
    if STATS:
        tl.store(ptr + 4 * stride, sum_exp_shifted)
        tl.store(ptr + 5 * stride, sum_exp_squared)
        tl.store(ptr + 6 * stride, beaten.to(m.dtype))


@triton.jit
def load_partials(ptr, n, i, SMOOTH: tl.constexpr, STATS: tl.constexpr):
    """Entries i of n that were left in memory [PARTIALS, n], as lanes; those past the n are of no logits."""
    valid = i < n
    m = tl.load(ptr + i, mask=valid, other=float("-inf"), cache_modifier=".cg")
    sum_exp = tl.load(ptr + n + i, mask=valid, other=0.0, cache_modifier=".cg")
    sum_shifted, count, sum_exp_shifted, sum_exp_squared, beaten = sum_exp, sum_exp, sum_exp, sum_exp, i
    if SMOOTH:
        sum_shifted = tl.load(ptr + 2 * n + i, mask=valid, other=0.0, cache_modifier=".cg")
        count = tl.load(ptr + 3 * n + i, mask=valid, other=0.0, cache_modifier=".cg")
    if STATS:
        sum_exp_shifted = tl.load(ptr + 4 * n + i, mask=valid, other=0.0, cache_modifier=".cg")
        sum_exp_squared = tl.load(ptr + 5 * n + i, mask=valid, other=0.0, cache_modifier=".cg")
        beaten = tl.load(ptr + 6 * n + i, mask=valid, other=0.0, cache_modifier=".cg").to(tl.int32)
    return m, sum_exp, sum_shifted, sum_exp_shifted, sum_exp_squared, count, beaten


@triton.jit
def exchange(
    lanes, partial_ptr, row, CTAS: tl.constexpr, LANES: tl.constexpr, SMOOTH: tl.constexpr, STATS: tl.constexpr
):
    """Every program's statistics [CTAS, 1] as lanes [CTAS, LANES] of each, through memory [N, PARTIALS, CTAS]."""
    partial_ptr += row * (PARTIALS * CTAS)
    store_partials(lanes, partial_ptr + tl.arange(0, CTAS)[:, None], CTAS, SMOOTH, STATS)
    # Triton has no barrier of a cluster. Release and acquire order the stores above and the loads below.
    tl.inline_asm_elementwise(
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; mov.b32 $0, 0;",
        "=r", [], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    i = tl.zeros((CTAS, LANES), tl.int32) + tl.arange(0, LANES)[None, :]
    return load_partials(partial_ptr, CTAS, i, SMOOTH, STATS)
