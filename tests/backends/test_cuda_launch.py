"""Launch configurations of the CUDA kernels: pure functions, so no GPU is asked."""

from __future__ import annotations

import itertools
import re

import pytest

from mixce_kernels.backends.cuda_launch import (
    BLOCK_BYTES,
    MAX_CLUSTER,
    VECTOR_BYTES,
    Device,
    ForwardLaunch,
    RowLaunch,
    forward_launch,
    grad_in_forward_launch,
    rows_launch,
)
from support.paths import ROOT

DEVICES = {
    "A100": Device(80, 108, 166912, 167936),
    "A10": Device(86, 72, 101376, 102400),
    "H100": Device(90, 132, 232448, 233472),
    "B200": Device(100, 148, 232448, 233472),
    "RTX 5090": Device(120, 170, 101376, 102400),
}
STATE_BYTES = 304
ROW_BYTES = [
    itemsize * size for itemsize in (2, 4, 8) for size in (1, 7, 1000, 32000, 50257, 128256, 256000, 1_000_000)
]
ROWS = (1, 2, 8, 64, 107, 132, 1000, 100_000)

every_device = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)


@every_device
def test_few_rows_are_split_and_many_are_not(device: Device) -> None:
    for n_rows, row_bytes in itertools.product(ROWS, ROW_BYTES):
        launch = rows_launch(n_rows, row_bytes, device)
        assert launch.held_bytes == 0
        if n_rows >= device.multiprocessors:
            assert launch.parts == 1
            continue
        # A part keeps all threads of a block busy.
        assert launch.parts == 1 or launch.parts * BLOCK_BYTES <= row_bytes
        assert launch.parts <= device.multiprocessors
        most = min(row_bytes // BLOCK_BYTES, device.multiprocessors)
        busiest = [-(-n_rows * parts // device.multiprocessors) / parts for parts in range(1, most + 1)]
        assert not busiest or busiest[launch.parts - 1] == min(busiest)


@every_device
def test_a_held_row_fits_its_blocks(device: Device) -> None:
    clusters = (1, 2, 4, MAX_CLUSTER) if device.arch >= 90 else (1,)
    for n_rows, row_bytes in itertools.product(ROWS, ROW_BYTES):
        parts, held_bytes = grad_in_forward_launch(n_rows, row_bytes, STATE_BYTES, device)
        assert parts in clusters
        assert held_bytes % VECTOR_BYTES == 0
        if held_bytes:
            assert held_bytes + STATE_BYTES <= device.shared_per_block
            # The share of a row's vectors that the kernel gives a block, at most.
            assert -(-(row_bytes // VECTOR_BYTES) // parts) * VECTOR_BYTES <= held_bytes
        else:
            assert row_bytes > clusters[-1] * (device.shared_per_block - STATE_BYTES - VECTOR_BYTES)


@pytest.mark.parametrize(
    ("device", "n_rows", "vocab_size", "itemsize", "expected"),
    [
        # Two blocks a multiprocessor, each with a whole row.
        ("H100", 4096, 50257, 2, RowLaunch(1, 100528)),
        # A row of 256 KB: two blocks could hold it, four of a quarter each leave room for another cluster beside it.
        ("H100", 4096, 128256, 2, RowLaunch(4, 64128)),
        ("H100", 4096, 50257, 4, RowLaunch(2, 100528)),
        ("H100", 4096, 256000, 4, RowLaunch(8, 128000)),
        # 4 MB are more than a cluster can hold.
        ("H100", 4096, 1_000_000, 4, RowLaunch(1)),
        # Few rows: more blocks for each.
        ("H100", 64, 50257, 2, RowLaunch(2, 50272)),
        ("H100", 1, 50257, 2, RowLaunch(8, 12576)),
        # No clusters.
        ("A100", 4096, 50257, 2, RowLaunch(1, 100528)),
        ("A100", 4096, 128256, 2, RowLaunch(1)),
        # 99 KB a block.
        ("RTX 5090", 4096, 50257, 2, RowLaunch(4, 25136)),
        ("A10", 4096, 50257, 2, RowLaunch(1, 100528)),
    ],
)
def test_where_a_row_waits_for_its_gradient(
    device: str, n_rows: int, vocab_size: int, itemsize: int, expected: RowLaunch
) -> None:
    assert grad_in_forward_launch(n_rows, vocab_size * itemsize, STATE_BYTES, DEVICES[device]) == expected


@every_device
def test_a_forward_alone_splits_few_rows_and_merges_their_parts(device: Device) -> None:
    for n_rows, row_bytes in itertools.product(ROWS, ROW_BYTES):
        launch = forward_launch(n_rows, row_bytes, STATE_BYTES, device, with_grad=False, aligned_alike=False)
        rows = rows_launch(n_rows, row_bytes, device)
        assert launch == ForwardLaunch(rows, n_partials=n_rows * rows.parts if rows.parts > 1 else 0)


@every_device
def test_a_forward_with_gradient_is_two_kernels_where_few_rows_are_read_twice(device: Device) -> None:
    for n_rows, row_bytes, aligned in itertools.product(ROWS, ROW_BYTES, (True, False)):
        launch = forward_launch(n_rows, row_bytes, STATE_BYTES, device, with_grad=True, aligned_alike=aligned)
        held = grad_in_forward_launch(n_rows, row_bytes, STATE_BYTES, device) if aligned else RowLaunch(1)
        if held.held_bytes:
            assert launch == ForwardLaunch(held)
        elif n_rows >= device.multiprocessors:
            assert launch == ForwardLaunch(RowLaunch(1))
        else:
            alone = forward_launch(n_rows, row_bytes, STATE_BYTES, device, with_grad=False, aligned_alike=aligned)
            assert launch == alone._replace(grad_apart=True)


@pytest.mark.parametrize(
    ("device", "n_rows", "vocab_size", "aligned", "expected"),
    [
        # A cluster holds each row.
        ("H100", 64, 50257, True, ForwardLaunch(RowLaunch(2, 50272))),
        # Gradient rows that lie otherwise, few and many.
        ("H100", 64, 50257, False, ForwardLaunch(RowLaunch(2), n_partials=128, grad_apart=True)),
        ("H100", 132, 50257, False, ForwardLaunch(RowLaunch(1))),
        # 2 MB are more than a cluster can hold.
        ("H100", 1, 1_000_000, True, ForwardLaunch(RowLaunch(122), n_partials=122, grad_apart=True)),
        ("H100", 132, 1_000_000, True, ForwardLaunch(RowLaunch(1))),
        # Rows of less than two blocks' work: two kernels, a block a row each.
        ("H100", 64, 1000, False, ForwardLaunch(RowLaunch(1), grad_apart=True)),
        # No clusters.
        ("A100", 107, 128256, True, ForwardLaunch(RowLaunch(1), grad_apart=True)),
        ("A100", 108, 128256, True, ForwardLaunch(RowLaunch(1))),
    ],
)
def test_where_a_forward_leaves_its_gradient_to_another_kernel(
    device: str, n_rows: int, vocab_size: int, aligned: bool, expected: ForwardLaunch
) -> None:
    launch = forward_launch(n_rows, 2 * vocab_size, STATE_BYTES, DEVICES[device], with_grad=True, aligned_alike=aligned)
    assert launch == expected


def test_parts_leave_the_busiest_multiprocessor_least() -> None:
    """Of 64 rows on 132 multiprocessors: two parts each, not three, of which some would get two."""
    assert rows_launch(64, 2 * 50257, DEVICES["H100"]) == RowLaunch(2)
    assert rows_launch(1, 2 * 1_000_000, DEVICES["H100"]) == RowLaunch(122)
    assert rows_launch(0, 2 * 50257, DEVICES["H100"]) == RowLaunch(1)


def test_block_bytes_are_those_of_the_kernels() -> None:
    source = (ROOT / "csrc" / "cuda" / "row_stats.cuh").read_text()
    (threads,) = re.findall(r"kThreads = (\d+);", source)
    (unroll,) = re.findall(r"kUnroll = .*: (\d+);", source)
    assert int(threads) * int(unroll) * VECTOR_BYTES == BLOCK_BYTES
