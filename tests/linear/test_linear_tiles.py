"""Path "tiles" of the linear loss: interpreted in a process of its own, executed as compiled, and its launches."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys
from unittest import mock

import pytest
import torch

from conftest import INTERPRETED
from mixce_kernels import MixCEStats, fused_linear_mixce_loss, linear_mixce_loss_reference
from mixce_kernels.linear import tiles as linear_tiles
from mixce_kernels.linear.tiles_launch import forward_config, grad_config
from support.cases import BFLOAT16, FLOAT16, FLOAT32
from support.linear_cases import LINEAR, LinearCase, _case, build_linear
from support.linear_tiles_check import EVERY, TILES, check_case, check_tiny_upstream, run, small_launches
from support.on_ptx import needs_ptx_on_cpu, run_on_ptx
from support.oracle import Options

pytest.importorskip("triton")

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_a_process_of_its_own")
compiled = pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel cannot be compiled")


@pytest.mark.slow
@compiled
def test_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MIXCE_CPU_TENSORS": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed.group(1)) >= 100, done.stdout


@pytest.mark.slow
@compiled
@needs_ptx_on_cpu
def test_compiled_kernels_on_cpu_tensors() -> None:
    """The PTX of sm_80, whose products of halves are mma.sync."""
    assert run_on_ptx("support.linear_tiles_on_ptx").startswith("ran ")


@interpreted
@pytest.mark.parametrize("case", TILES, ids=lambda case: f"{case}-{case.plain.dtype}")
def test_tiles(case: LinearCase) -> None:
    check_case(case)


SHARED = [case for case in LINEAR if math.prod(case.plain.shape) * case.hidden_size <= 2_000_000][::3]


@interpreted
@pytest.mark.parametrize("case", SHARED, ids=lambda case: f"{case}-{case.plain.dtype}")
def test_cases_of_all_paths(case: LinearCase) -> None:
    check_case(case)


@interpreted
@pytest.mark.parametrize("upstream", [1e-6, 1e-12, 3e4])
@pytest.mark.parametrize(("values", "eta"), [("random", "0.3"), ("random", "0"), ("confident", "1")])
def test_float16_keeps_its_digits_whatever_the_upstream(upstream: float, values: str, eta: str) -> None:
    check_tiny_upstream(upstream, values, eta)


@interpreted
@pytest.mark.parametrize("options", [Options(), EVERY], ids=["none", "every"])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_statistics(dtype: torch.dtype, options: Options) -> None:
    case = _case("splits_stats", 24, shape=(20, 700), dtype=dtype, options=options, bias="random", reduction="none")
    inputs = build_linear(case)
    with small_launches():
        _, stats = fused_linear_mixce_loss(
            inputs.hidden, inputs.weight, inputs.tokens.targets, inputs.tokens.eta, bias=inputs.bias, path="tiles",
            return_stats=True, **inputs.keywords,
        )  # fmt: skip
    assert isinstance(stats, MixCEStats)
    _, expected = linear_mixce_loss_reference(
        *(one.detach().double() for one in (inputs.hidden, inputs.weight)), inputs.tokens.targets, inputs.tokens.eta,
        bias=inputs.bias.detach().double(), return_stats=True, **inputs.keywords,
    )  # fmt: skip
    assert torch.equal(stats.correct, expected.correct)
    for name in MixCEStats._fields[:5]:
        found, want = getattr(stats, name), getattr(expected, name)
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=2e-6, msg=name)


@interpreted
def test_correct_is_the_first_of_the_largest() -> None:
    """Ties within a tile, between tiles of a split, and between splits."""
    weight, hidden = torch.zeros(900, 8), torch.ones(4, 8)
    weight[[100, 110, 400, 700], :] = 0.5
    targets = torch.tensor([100, 110, 400, 700])
    with small_launches():
        _, stats = fused_linear_mixce_loss(hidden, weight, targets, path="tiles", return_stats=True, softcap=1e-3)
    assert stats.correct.tolist() == [True, False, False, False]


@interpreted
@pytest.mark.parametrize("bad", [-1, 700, 2**33 + 5])
def test_bad_target_is_nan_in_its_row_alone(bad: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 16, generator=generator, requires_grad=True)
    weight = torch.randn(700, 16, generator=generator)
    targets = torch.tensor([3, bad, 699, -100, 0])
    with small_launches():
        loss, stats = fused_linear_mixce_loss(
            hidden, weight, targets, reduction="none", path="tiles", return_stats=True
        )
        (grad,) = torch.autograd.grad(loss.sum(), hidden)
    expected = [False, True, False, False, False]
    assert loss.isnan().tolist() == expected
    assert all(statistic.isnan().tolist() == expected for statistic in stats[:5])
    assert not stats.correct[1]
    assert grad.isnan().any(1).tolist() == grad.isnan().all(1).tolist() == expected
    assert not grad[3].any()


@interpreted
def test_only_what_is_wanted_is_computed() -> None:
    """Each gradient alone has the bits that it has among all."""
    inputs = build_linear(_case("wanted", 24, shape=(20, 300), dtype=FLOAT16, bias="random", reduction="none"))
    _, together = run(inputs)
    launched = []
    kernels = linear_tiles.kernels("linear_gradient")
    for index, kernel in enumerate(("linear_grad_hidden_kernel", "linear_grad_weight_kernel", None)):
        leaves = [leaf.detach().requires_grad_(i == index) for i, leaf in enumerate(inputs.leaves)]
        others = {"linear_grad_hidden_kernel", "linear_grad_weight_kernel"} - {kernel}
        with mock.patch.multiple(kernels, **dict.fromkeys(others)):  # None cannot be launched
            loss = fused_linear_mixce_loss(
                *leaves[:2], inputs.tokens.targets, inputs.tokens.eta, bias=leaves[2], path="tiles", **inputs.keywords
            )
            (alone,) = torch.autograd.grad(loss, leaves[index], inputs.tokens.upstream)
        launched.append(torch.equal(alone, together[index]))
    assert launched == [True, True, True]


@interpreted
def test_same_bits_on_every_run() -> None:
    case = _case("splits_bits", 48, shape=(70, 700), dtype=BFLOAT16, options=EVERY, bias="random", reduction="none")
    first, second = check_case(case), check_case(case)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@interpreted
@pytest.mark.parametrize("fault", ["ignored rows count", "no scale of float16", "another slope", "a split is lost"])
def test_planted_faults_are_found(fault: str) -> None:
    """What the checks above are worth."""
    valid_first, config = linear_tiles._valid_first, linear_tiles.forward_config
    gradient_arguments = linear_tiles.gradient_arguments
    faults = {
        "ignored rows count": ("_valid_first", lambda targets, _: valid_first(targets, 2**40)),
        "no scale of float16": ("_scale", lambda *_: torch.ones(1)),
        "another slope": ("gradient_arguments", lambda options: gradient_arguments(options) | {"logit_scale": 1.01}),
        "a split is lost": ("forward_config", lambda *call: dataclasses.replace(config(*call), n_splits=1)),
    }
    name, planted = faults[fault]
    case = _case("splits_faulty", 48, shape=(70, 700), dtype=FLOAT16, reduction="none", upstream="per_token")
    check_case(case)
    check = check_tiny_upstream if name == "_scale" else check_case
    with mock.patch.object(linear_tiles, name, planted), pytest.raises(AssertionError):
        check(1e-6 if name == "_scale" else case)


def test_a_tensor_elsewhere_is_refused() -> None:
    reason = linear_tiles.unavailable(torch.empty(2, 3, device="meta"), torch.empty(5, 3, device="meta"))
    assert reason is not None
    assert "meta" in reason
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "0", "MIXCE_CPU_TENSORS": "0"}):
        reason = linear_tiles.unavailable(torch.empty(2, 3), torch.empty(5, 3))
    assert reason is not None
    assert "on cpu" in reason


@pytest.mark.parametrize("arch", [0, 80, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_launches_cover_everything_once(itemsize: int, arch: int) -> None:
    for n_rows, vocab_size, with_options, aligned in itertools.product(
        (1, 100, 4096, 200_000), (1, 1000, 50257, 128256, 10_000_000), (True, False), (True, False)
    ):
        forward = forward_config(n_rows, vocab_size, itemsize, with_options, aligned, arch)
        tiles = forward.tiles
        assert forward.n_row_blocks * tiles.block_n >= n_rows > (forward.n_row_blocks - 1) * tiles.block_n
        # Each split has a column; a split is whole tiles, and few enough of them for a running sum in float32.
        assert forward.n_splits * forward.split_size >= vocab_size > (forward.n_splits - 1) * forward.split_size
        assert forward.split_size % tiles.block_v == 0
        assert forward.split_size // tiles.block_v <= max(64, -(-vocab_size // (512 * tiles.block_v)))
        assert forward.merge_splits >= forward.n_splits
        assert forward.merge_splits & (forward.merge_splits - 1) == 0
        assert forward.merge_splits * forward.merge_rows <= 1024
        for depth in (1, 768, 4096):
            grad = grad_config(n_rows, vocab_size, depth, itemsize, with_options, aligned, arch)
            assert grad.n_depth_blocks * grad.block_out >= depth
            assert grad.span % grad.block_out == grad.block_out % grad.tiles.block_v == 0
            assert grad.n_splits * grad.split_size >= grad.span > (grad.n_splits - 1) * grad.split_size
            # A tile of the scratch is whole steps of a product's sum, so that no step reads what was not written.
            assert grad.tiles.block_n % grad.block_k == grad.tiles.block_v % grad.block_k == 0
            assert grad.split_size % grad.block_k == 0
            assert grad.span % 16 == 0
            scratch = grad.n_row_blocks * grad.tiles.block_n * grad.span * itemsize
            assert scratch <= 64 * 2**20 or grad.span <= 2048


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        forward_config(8, 100, 2).n_splits = 1  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        grad_config(8, 100, 8, 2).span = 1  # type: ignore[misc]
