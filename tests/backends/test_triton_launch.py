"""Launches of the Triton kernels: their configurations and the places of their arguments; no GPU is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from mixce_kernels.backends.triton_arguments import Launch
from mixce_kernels.backends.triton_launch import MAX_CTAS, VECTOR_BYTES, row_config, split_config, tile_config

VOCAB_SIZES = (1, 7, 32, 1000, 4096, 4097, 16384, 16385, 32000, 50257, 128256, 256000, 1_000_000)


@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("with_stats", [False, True])
@pytest.mark.parametrize("arch", [0, 80, 90, 100])
def test_row_config_is_a_launch(
    vocab_size: int, itemsize: int, with_grad: bool, with_stats: bool, warp_size: int, arch: int
) -> None:
    config = row_config(vocab_size, itemsize, with_grad, with_stats, False, warp_size, arch)
    assert config.lanes == config.num_warps * warp_size
    assert config.lanes <= 512
    assert config.max_registers is None or config.max_registers * config.lanes <= 65536
    assert config.vector * itemsize == VECTOR_BYTES
    # Wherever a row begins, its body fits behind the first 16-byte boundary, and the rest holds what is left.
    assert config.n_steps * config.step <= max(vocab_size - (config.vector - 1), 0)
    assert config.rest >= vocab_size - config.n_steps * config.step
    assert config.rest % (config.n_ctas * config.lanes) == 0
    assert (config.rest & (config.rest - 1), config.stack & (config.stack - 1)) == (0, 0)
    # The running maximum costs at most 1/16 of an exponential a logit; in float64 registers are dearer.
    assert config.stack * config.vector >= (4 if itemsize == 8 else 16)
    # Clusters are for held rows alone, and registers hold no more than 24 vectors a thread, 20 in larger clusters.
    assert config.n_ctas <= (MAX_CTAS if arch >= 90 else 1)
    assert config.n_ctas == 1 or config.held
    assert with_grad or not config.held
    assert not config.held or config.n_steps <= (24 if config.n_ctas <= 2 else 20)


def test_which_rows_are_read_once() -> None:
    """bfloat16 with a gradient: in a program, in a cluster where there are clusters, in twice the threads elsewhere."""

    def shape(vocab_size: int, arch: int, with_options: bool = False) -> tuple[bool, int, int]:
        config = row_config(vocab_size, 2, True, False, with_options, arch=arch)
        return config.held, config.n_ctas, config.num_warps

    assert shape(24000, 90) == shape(24000, 80) == (True, 1, 4)
    assert shape(32000, 90) == shape(50257, 90) == (True, 2, 4)
    assert shape(32000, 80) == (True, 1, 8)
    assert shape(128256, 90) == (True, 8, 4)
    assert shape(262144, 90) == (True, 8, 8)
    assert shape(50257, 80) == (True, 1, 8)
    assert shape(128256, 80) == shape(1_000_000, 90) == (False, 1, 4)
    # With options fewer vectors are held, in the same ways.
    assert shape(50257, 90, True) == shape(50257, 100, True) == (True, 4, 4)
    assert shape(128256, 90, True) == shape(128256, 100, True) == (True, 8, 4)
    assert shape(262144, 90, True) == (True, 8, 8)
    assert shape(50257, 80, True) == (False, 1, 4)


@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("n_rows", [1, 8, 64, 1024, 100_000])
def test_tiles_cover_the_row_once(n_rows: int, vocab_size: int, itemsize: int, warp_size: int) -> None:
    config = tile_config(n_rows, vocab_size, itemsize, warp_size=warp_size)
    step = config.lanes * config.vector
    assert config.lanes == config.num_warps * warp_size
    assert config.n_tiles * config.tile_steps >= config.n_steps
    # The last tile alone ends with the body, and takes the rest.
    assert (config.n_tiles - 1) * config.tile_steps < max(config.n_steps, 1)
    assert config.tile_steps % config.stack == 0
    assert config.n_steps * step <= max(vocab_size - (config.vector - 1), 0)
    assert config.rest >= vocab_size - config.n_steps * step
    assert config.rest % config.lanes == 0


def test_many_rows_take_a_program_each_and_few_are_split() -> None:
    assert tile_config(1 << 16, 50257, 2).n_tiles == 1
    assert tile_config(8, 50257, 2).n_tiles > 1


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("n_rows", [1, 8, 64, 100, 131])
def test_tiles_of_a_split_forward(n_rows: int, vocab_size: int, itemsize: int) -> None:
    config = split_config(n_rows, vocab_size, itemsize, 132)
    if config is None:
        assert n_rows > 64 or tile_config(1, vocab_size, itemsize).n_steps <= 8
        return
    assert config.n_tiles > 1
    assert config.tile_steps % config.stack == 0
    # Each tile has steps of its own, and the last one ends with the body.
    assert (config.n_tiles - 1) * config.tile_steps < config.n_steps <= config.n_tiles * config.tile_steps


def test_which_forwards_are_split() -> None:
    """Rows fewer than the multiprocessors, so that two programs for each of those have work."""

    def programs(n_rows: int, vocab_size: int) -> int:
        config = split_config(n_rows, vocab_size, 2, 132)
        return n_rows * (1 if config is None else config.n_tiles)

    assert programs(8, 128256) == 256
    assert programs(1, 128256) == 32
    assert programs(64, 50257) == 256
    assert programs(132, 128256) == 132
    assert programs(8, 4096) == 8
    assert split_config(8, 128256, 2, 132, with_stats=True).max_registers == 255  # type: ignore[union-attr]


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        row_config(50257, 2, False).stack = 1  # type: ignore[misc]
    assert row_config(50257, 2, False) == row_config(50257, 2, False)


class PlainKernel:
    """What a launch asks of a kernel: its function, and a launcher of each grid."""

    def __init__(self) -> None:
        self.launches: list[Any] = []

    @staticmethod
    def fn(x_ptr: object, n_rows: int, stride: int, flag: bool) -> None:
        """Four parameters."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *values, **options: self.launches.append((grid, values, options))


def test_arguments_by_name_arrive_in_their_places() -> None:
    kernel = PlainKernel()
    launch = Launch(kernel, (3,), {"stride": 7, "num_warps": 4, "flag": False})
    launch(n_rows=2, x_ptr="x")
    launch(x_ptr="y", n_rows=5)
    assert kernel.launches == [((3,), (*values, 7, False), {"num_warps": 4}) for values in (("x", 2), ("y", 5))]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"x_ptr": "x"}, TypeError, r"expected the arguments \['x_ptr', 'n_rows'\], got \['x_ptr'\]"),
        ({"x_ptr": "x", "n_rows": 1, "stride": 7}, KeyError, "stride"),
        ({"x_ptr": "x", "rows": 1}, KeyError, "rows"),
    ],
)
def test_arguments_that_a_launch_does_not_take(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    kernel = PlainKernel()
    with pytest.raises(error, match=match):
        Launch(kernel, (3,), {"stride": 7, "flag": True})(**arguments)
    assert kernel.launches == []
