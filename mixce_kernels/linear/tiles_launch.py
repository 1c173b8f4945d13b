"""Launch configurations of the kernels from hidden states: pure functions, and the only place that chooses a tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mixce_kernels.backends.triton_launch import VECTOR_BYTES, register_arguments

# A running sum over so many tiles of a row stays accurate; what a split leaves is summed as a tree.
_SPLIT_TILES = 64
# What a merging program has at once of a row.
_MAX_SPLITS = 1024
# Programs to a multiprocessor that a launch should have at least, so that the last ones do not wait for one.
_WAVES = 4
# Of a merging program, for its threads' registers.
_MERGE_ELEMENTS = 1024
# Bytes of gradients by logits that the backward holds at once, for as long as a span is not narrower than the least: a
# gradient by hidden states, in float32, is read and written once a span.
_SCRATCH_BYTES = 64 * 2**20
_MIN_SPAN = 2048
# Partial gradients by hidden states are of N * D numbers each.
_MAX_GRAD_SPLITS = 8
# Columns of a tile by the size of an element. Half as many where a compiler of Triton 3.6 to 3.9 spills otherwise: with
# the options of the forward, with a softcap in the backward, and on sm_100, whose tiles come from tensor memory, with
# the forward's statistics alone.
_WIDTHS = {2: 128, 4: 64, 8: 32}
# Of rows that are not whole vectors each element has an address of its own, in registers.
_UNALIGNED_WIDTH = 64
# Registers per thread: the hardware's maximum. With this limit ptxas does not spill to raise occupancy.
_MAX_REGISTERS = 255
# Blocks of rows that programs take in turn before they take the next columns, so that both stay in L2.
_GROUP = 8


@dataclass(frozen=True)
class Tiles:
    """A tile of logits, `block_n` rows by `block_v` columns, summed over `block_d` elements of depth at a time."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    max_registers: int | None
    group: int = _GROUP

    def blocks(self) -> dict[str, int]:
        """The arguments of the kernels that compute tiles of logits."""
        return {"BLOCK_N": self.block_n, "BLOCK_V": self.block_v, "BLOCK_D": self.block_d}

    def arguments(self) -> dict[str, int]:
        """The arguments of every kernel that multiplies, and of its launch."""
        launch = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {"GROUP": self.group, **launch, **register_arguments(self.max_registers)}


@dataclass(frozen=True)
class ForwardConfig:
    """A program takes `split_size` columns of a block of rows; programs of `merge_rows` merge `n_splits` splits."""

    tiles: Tiles
    n_row_blocks: int
    n_splits: int
    split_size: int
    merge_splits: int
    merge_rows: int

    def merge_arguments(self) -> dict[str, int]:
        """The arguments of `linear_merge_kernel` and of its launch."""
        registers = register_arguments(self.tiles.max_registers)
        return {"SPLITS": self.merge_splits, "ROWS": self.merge_rows, "num_warps": 4, **registers}


@dataclass(frozen=True)
class GradConfig:
    """Spans of `span` columns, tile by tile, and their products, which sum over `block_k` at a time.

    Products are `block_out` elements of depth wide, and the one by weight as many columns high.

    `n_splits` parts of a span, `split_size` columns each, give partial gradients by hidden states.
    """

    tiles: Tiles
    n_row_blocks: int
    n_depth_blocks: int
    span: int
    block_k: int
    block_out: int
    n_splits: int
    split_size: int


def forward_config(
    n_rows: int,
    vocab_size: int,
    itemsize: int,
    with_options: bool = False,
    aligned: bool = True,
    arch: int = 0,
    multiprocessors: int = 132,
) -> ForwardConfig:
    """The launches of the forward; `with_options` says whether there are a softcap, label smoothing or statistics.

    `aligned` says whether rows of hidden and weight are whole vectors. `arch` is NVIDIA's, 90 for sm_90, 0 elsewhere.
    """
    tiles = _tiles(n_rows, itemsize, with_options or 100 <= arch < 120, aligned, arch)
    n_row_blocks = _cdiv(n_rows, tiles.block_n)
    n_tiles = _cdiv(vocab_size, tiles.block_v)
    wanted = max(_cdiv(n_tiles, _SPLIT_TILES), _cdiv(_WAVES * multiprocessors, n_row_blocks))
    split_tiles = _cdiv(n_tiles, min(wanted, n_tiles, _MAX_SPLITS))
    n_splits = _cdiv(n_tiles, split_tiles)
    merge_splits = _power_of_two(n_splits)
    merge_rows = max(_MERGE_ELEMENTS // merge_splits, 1)
    return ForwardConfig(tiles, n_row_blocks, n_splits, split_tiles * tiles.block_v, merge_splits, min(merge_rows, 128))


def grad_config(
    n_rows: int,
    vocab_size: int,
    depth: int,
    itemsize: int,
    with_softcap: bool = False,
    aligned: bool = True,
    arch: int = 0,
    multiprocessors: int = 132,
) -> GradConfig:
    """The launches of the backward."""
    tiles = _tiles(n_rows, itemsize, with_softcap, aligned, arch)
    n_row_blocks = _cdiv(n_rows, tiles.block_n)
    block_out = _WIDTHS[itemsize] if aligned else min(_WIDTHS[itemsize], _UNALIGNED_WIDTH)
    n_depth_blocks = _cdiv(depth, block_out)
    fitting = _SCRATCH_BYTES // (n_row_blocks * tiles.block_n * itemsize) // block_out * block_out
    span = min(max(fitting, _MIN_SPAN), _cdiv(vocab_size, block_out) * block_out)
    n_splits = max(min(multiprocessors // (n_row_blocks * n_depth_blocks), span // _MIN_SPAN, _MAX_GRAD_SPLITS), 1)
    split_size = _cdiv(_cdiv(span, n_splits), block_out) * block_out
    # A tile of the scratch is whole blocks of a product's sum, over positions or over columns.
    block_k = min(tiles.block_d, tiles.block_n)
    return GradConfig(
        tiles, n_row_blocks, n_depth_blocks, span, block_k, block_out, _cdiv(span, split_size), split_size
    )


def depth_arguments(depth: int, block: int, itemsize: int, aligned: bool) -> dict[str, Any]:
    """The arguments that say whether rows are whole blocks of depth, and how many elements are a vector of theirs."""
    return {"EVEN": depth % block == 0, "VECTOR": VECTOR_BYTES // itemsize if aligned else 1}


def _tiles(n_rows: int, itemsize: int, narrow: bool, aligned: bool, arch: int) -> Tiles:
    block_v = _WIDTHS[itemsize]
    max_registers = _MAX_REGISTERS if arch else None
    if itemsize == 8:
        return Tiles(32, block_v, 16, 4, 2, max_registers)
    block_n = 64 if n_rows > 16 else 16
    if not aligned:
        return Tiles(block_n, _UNALIGNED_WIDTH, 64 // itemsize, 8, 2, max_registers)
    if narrow:
        block_v //= 2
    if itemsize == 4:
        return Tiles(block_n, block_v, 32, 4, 3 if arch else 2, max_registers)
    # sm_120 has 99 KiB of shared memory a block, and AMD's have 64. Three tiles of each operand are under way or in
    # use; where products are not asynchronous Triton makes one fewer than its stages.
    block_d, num_stages = (64, 3 if arch >= 90 else 4) if 80 <= arch < 120 else (32, 4 if arch else 2)
    if n_rows > 64:
        return Tiles(128, block_v, block_d, 8, num_stages, max_registers)
    return Tiles(block_n, block_v, block_d, 4, num_stages, max_registers)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
