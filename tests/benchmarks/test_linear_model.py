"""What benchmarks/linear/model.py computes and writes: its arithmetic, by hand for round numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpu_kernels.model import CHIPS, REACHABLE
from linear import model as linear_model
from linear.model import Launch, least_share, markdown, modelled

A100, H100, B200 = CHIPS
N, V, D = 4096, 131072, 1024


def test_operations_of_each_path() -> None:
    product = 2 * N * V * D
    for path, times in (("chunks", 3), ("tiles", 4), ("materialised", 3)):
        assert modelled(path, "forward", N, V, D).operations == product
        assert modelled(path, "forward + backward", N, V, D).operations == times * product


def test_bytes_of_chunks_by_hand() -> None:
    """A gibibyte holds 1365 rows of 6 bytes a logit: four chunks of equal size."""
    n_chunks = 4
    found = {launch.name: launch.memory_bytes for launch in modelled("chunks", "forward + backward", N, V, D).launches}
    assert found == {
        "logits": 2 * (n_chunks * V * D + N * D) + 4 * N * V,
        "row kernel": 8 * N * V,
        "conversion to half": 6 * N * V,
        "gradient by hidden": 2 * (N * V + n_chunks * V * D) + 4 * N * D,
        "gradient by weight": 2 * (N * V + N * D) + 4 * (2 * n_chunks - 1) * V * D,
    }
    # No cluster holds a row on an A100: it is read twice.
    assert modelled("chunks", "forward + backward", N, V, D, 80).launches[1].memory_bytes == 12 * N * V


def test_bytes_of_tiles_by_hand() -> None:
    """Four groups of 1024 rows read the weight; 64 MiB hold a span of 8192 columns, of which there are 16."""
    found = {launch.name: launch.memory_bytes for launch in modelled("tiles", "forward + backward", N, V, D).launches}
    partials = found["merge"]
    assert found == {
        "statistics of tiles": 2 * (N * D + 4 * V * D) + partials,
        "merge": partials,
        "hidden in order": 4 * N * D,
        "gradient of tiles": 2 * (16 * N * D + V * D + N * V),
        "gradient by hidden": 2 * (N * V + V * D) + 4 * 31 * N * D,
        "gradient by weight": 2 * (N * V + 16 * N * D) + 4 * V * D,
    }
    # No logit, nor a number of its size, reaches memory in the forward.
    assert partials < 0.01 * 4 * N * V


def test_a_launch_takes_its_larger_limit() -> None:
    rate = linear_model.TENSOR_REACHABLE * 989e12
    assert Launch("", rate, 0).seconds(H100) == pytest.approx(1)
    assert Launch("", 0, REACHABLE * H100.bandwidth).seconds(H100) == pytest.approx(1)
    assert Launch("", rate, 3 * REACHABLE * H100.bandwidth).seconds(H100) == pytest.approx(3)
    # A tile's statistics come after its product: 32 instructions of a thread are one of a warp, four a clock.
    assert Launch("", rate, 0, 32 * 4 * 132 * 1.83e9).seconds(H100) == pytest.approx(2)


def test_the_share_makes_both_paths_equal() -> None:
    share = least_share(A100, "forward + backward", N, V, D)
    assert share is not None
    tiles = modelled("tiles", "forward + backward", N, V, D, 80, A100.multiprocessors)
    slowed = replace(tiles, launches=tuple(replace(one, operations=one.operations / share) for one in tiles.launches))
    chunks = modelled("chunks", "forward + backward", N, V, D, 80)
    assert slowed.seconds(A100) == pytest.approx(chunks.seconds(A100))


def test_the_report_is_the_one_committed() -> None:
    assert linear_model.RESULT.read_text() == markdown()
    assert "Nothing here was measured" in markdown()
    assert all(chip.name in markdown() for chip in CHIPS)
