"""Launch configurations of the Triton kernels: pure functions, so no GPU is asked."""

from __future__ import annotations

import dataclasses

import pytest

from mixce_kernels.triton_kernels.launch import VECTOR_BYTES, row_config, tile_config

VOCAB_SIZES = (1, 7, 32, 1000, 4096, 4097, 16384, 16385, 32000, 50257, 128256, 256000, 1_000_000)


@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("with_stats", [False, True])
def test_row_config_is_a_launch(
    vocab_size: int, itemsize: int, with_grad: bool, with_stats: bool, warp_size: int
) -> None:
    config = row_config(vocab_size, itemsize, with_grad, with_stats, warp_size)
    assert config.lanes == config.num_warps * warp_size
    assert config.num_warps * warp_size <= 1024
    assert config.max_registers is None or config.max_registers * config.lanes <= 65536
    assert config.vector * itemsize == VECTOR_BYTES
    # Edges are up to two vectors: each has a lane of its own.
    assert config.lanes >= 2 * config.vector
    assert config.one_block == (vocab_size <= config.block)
    assert config.block & (config.block - 1) == 0
    # The running maximum costs at most 1/16 of an exponential a logit; in float64 registers are dearer.
    assert vocab_size <= config.block or config.stack * config.vector >= (4 if itemsize == 8 else 16)


@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("n_rows", [1, 8, 1024, 100_000])
def test_tiles_cover_the_row_once(n_rows: int, vocab_size: int, itemsize: int, warp_size: int) -> None:
    config = tile_config(n_rows, vocab_size, itemsize, warp_size)
    assert config.n_tiles * config.tile_size >= vocab_size
    assert (config.n_tiles - 1) * config.tile_size < vocab_size
    assert config.tile_size % config.block == 0
    assert config.block % config.step == 0
    assert config.step == config.num_warps * warp_size * config.vector


def test_many_rows_take_a_program_each_and_few_are_split() -> None:
    assert tile_config(1 << 16, 50257, 2).n_tiles == 1
    assert tile_config(8, 50257, 2).n_tiles > 1


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        row_config(50257, 2, False).stack = 1  # type: ignore[misc]
    assert row_config(50257, 2, False) == row_config(50257, 2, False)
