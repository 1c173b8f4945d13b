"""Runs the compiled PTX of path "tiles" on CPU tensors: `python -m support.linear_tiles_on_ptx`.

sm_80 stands for all: its products of halves are mma.sync, those of newer targets are not executed by ptx_on_cpu.
"""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch

from linear import model as linear_model
from mixce_kernels import fused_linear_mixce_loss
from mixce_kernels.backends.devices import EMULATED_MULTIPROCESSORS
from mixce_kernels.linear import tiles as linear_tiles
from mixce_kernels.linear.tiles_launch import forward_config, grad_config
from support.cases import BFLOAT16, FLOAT16, FLOAT32
from support.linear_cases import _case
from support.linear_tiles_check import EVERY, PER_TOKEN, check_case, check_tiny_upstream
from support.oracle import Options

# Whole vectors and not, several tiles of each kind, every option; `splits` are launched as `small_launches` says.
CASES = [
    _case("splits_aligned", 136, shape=(130, 300), dtype=BFLOAT16, **PER_TOKEN),
    _case("splits_every", 72, shape=(70, 300), dtype=FLOAT16, options=EVERY, bias="random", **PER_TOKEN),
    _case("unaligned", 67, shape=(66, 130), dtype=BFLOAT16, bias="masked", **PER_TOKEN),
    _case("few_rows", 40, shape=(9, 130), dtype=FLOAT16, options=Options(label_smoothing=0.1), **PER_TOKEN),
    _case("splits_float32", 36, shape=(66, 130), dtype=FLOAT32, bias="random", **PER_TOKEN),
    _case("all_ignored", 40, shape=(9, 130), dtype=FLOAT16, ignored="all", **PER_TOKEN),
]


def check_results() -> list[torch.Tensor]:
    """Each case against the oracle; float16 with tiny upstream gradients; a bad target; the first of the largest."""
    found = [result for case in CASES for result in check_case(case)]
    check_tiny_upstream(1e-6)
    # A check that cannot fail would prove nothing: float16 without its scale.
    with mock.patch.object(linear_tiles, "_scale", return_value=torch.ones(1)), contextlib.suppress(AssertionError):
        check_tiny_upstream(1e-6)
        raise RuntimeError("a planted fault was not found")

    weight, hidden = torch.zeros(200, 8), torch.ones(4, 8, requires_grad=True)
    weight[[3, 100, 190], :] = 0.5
    targets = torch.tensor([3, 100, -100, 2**33 + 5])
    loss, stats = fused_linear_mixce_loss(
        hidden, weight, targets, reduction="none", path="tiles", return_stats=True, softcap=1e-3
    )
    (grad,) = torch.autograd.grad(loss.sum(), hidden)
    expected_nan = [False, False, False, True]
    assert loss.isnan().tolist() == grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == expected_nan
    assert stats.correct.tolist() == [True, False, False, False]
    return found


def _of_products(launches: list[Any]) -> dict[str, Any]:
    """Name: counters, of the launches that grow with N x V, in order; the reduction's grows with N."""
    names = [(launch.name.removesuffix("_kernel"), launch.counters) for launch in launches]
    return {name: counters for name, counters in names if name != "reduction"}


def check_counts(launches: list[Any]) -> None:
    """The bytes and the instructions that the model of benchmarks/linear/model.py counts with."""
    n, v = 256, 512
    depths = (128, 256)
    counted: dict[tuple[str, int], Any] = {}
    for d in depths:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(n, d, generator=generator).bfloat16().requires_grad_()
        weight = torch.randn(v, d, generator=generator).bfloat16().requires_grad_()
        launches.clear()
        fused_linear_mixce_loss(hidden, weight, torch.arange(n), path="tiles").backward()
        model = linear_model.modelled("tiles", "forward + backward", n, v, d, 80, EMULATED_MULTIPROCESSORS).launches
        ours = [launch for launch in model if launch.name != linear_model.IN_ORDER]
        for (name, counters), expected in zip(_of_products(launches).items(), ours, strict=True):
            counted[name, d] = counters
            touched = counters["unique_loaded_bytes"] + counters["unique_stored_bytes"]
            # Besides, some numbers of each row.
            assert 0 <= touched - expected.memory_bytes <= 80 * n, (name, d, touched, expected)
    tiles = forward_config(n, v, 2, arch=80, multiprocessors=EMULATED_MULTIPROCESSORS).tiles
    block_out = grad_config(n, v, 128, 2, arch=80, multiprocessors=EMULATED_MULTIPROCESSORS).block_out
    for kernel, bytes_of in linear_model.read_by_programs(tiles, block_out).items():
        of_depth = [bytes_of(n, v, d) for d in depths]
        for index, (key, slack) in enumerate((("global_loaded_bytes", 0.15), ("global_stored_bytes", 0.0))):
            first, second = (counted[kernel, d][key] for d in depths)
            expected = of_depth[1][index] - of_depth[0][index]
            assert expected <= second - first <= (1 + slack) * expected, (kernel, key, first, second, expected)
    # Ignored tokens are left out of every product: half of them leave half of the blocks.
    targets = torch.arange(n).where(torch.arange(n) % 2 == 0, -100)
    launches.clear()
    fused_linear_mixce_loss(hidden, weight, targets, path="tiles").backward()
    for name, counters in _of_products(launches).items():
        if name != "linear_merge":
            loaded = counters["global_loaded_bytes"]
            assert loaded <= 0.55 * counted[name, depths[1]]["global_loaded_bytes"], (name, loaded)
    # What is left of a logit's instructions at no depth at all: Pass 1, Pass 2.
    for kernel, instructions in linear_model.TILE_INSTRUCTIONS.items():
        first, second = (counted[kernel, d]["instructions"] for d in depths)
        found = (2 * first - second) / (n * v)
        assert abs(found - instructions) <= 0.05 * instructions, (kernel, found, instructions)


def main() -> None:
    """Raises AssertionError at the first result that is off, and ptx_on_cpu's error at an access out of bounds."""
    import ptx_on_cpu
    from ptx_on_cpu import triton_backend

    with triton_backend.on_cpu("sm_80") as launches:
        results = []
        for order in ("forward", "reverse", "shuffled"):
            ptx_on_cpu.configure(order=order, seed=1, races=True)
            results.append(check_results())
        for others in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))
        ptx_on_cpu.configure(order="forward", races=False)
        check_counts(launches)
    print("ran", len(CASES))


if __name__ == "__main__":
    main()
