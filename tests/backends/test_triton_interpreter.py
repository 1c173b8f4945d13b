"""Triton's interpreter, which needs a process of its own: the tests that all backends share, and what only Triton's
geometry can break.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from support.cases import Case
from support.paths import TESTS
from support.split_forward import SPLIT, check_bad_targets_of_split_rows, check_split
from support.triton_releases import environment_with

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_a_process_of_its_own")
MODES = {
    "plain": {},
    "inplace": {"inplace_backward": True},
    "grad_in_forward": {"grad_in_forward": True},
    "inplace_grad_in_forward": {"inplace_backward": True, "grad_in_forward": True},
}
# The interpreter cuts float32 to bfloat16 at a store instead of rounding it.
EXTRA_ULPS = {torch.bfloat16: 1, torch.float32: 0}


# The core is tried with this file alone. Other releases differ in what their interpreters accept, not in the sums.
JOBS = [
    pytest.param("installed", "backends/test_triton_interpreter.py", id="core"),
    *(
        pytest.param(release, files, id=f"{release}-{files.split()[0].rpartition('/')[2]}", marks=pytest.mark.slow)
        for release, files in (
            ("installed", "loss/test_loss.py"),
            ("installed", "loss/test_edge_cases.py loss/test_inplace.py loss/test_reductions.py"),
            ("installed", "loss/test_stats.py loss/test_weightings.py"),
            ("installed", "logprobs/test_logprobs.py logprobs/test_batch_invariance.py"),
            ("installed", "logprobs/test_linear_logprobs.py logprobs/test_logprobs_parallel.py"),
            ("installed", "linear/test_linear.py"),
            ("installed", "parallel/test_vocab_parallel.py parallel/test_shard_kernels.py"),
            ("newest", "backends/test_triton_interpreter.py"),
            ("newest", "linear/test_linear.py"),
            ("oldest", "backends/test_triton_interpreter.py"),
        )
    ),
]


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize(("release", "files"), JOBS)
def test_in_a_process_of_its_own(release: str, files: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *files.split()]
    environment = environment_with(release, TRITON_INTERPRET="1", MIXCE_CPU_TENSORS="1", OMP_NUM_THREADS="1")
    run = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None, run.stdout
    assert int(passed.group(1)) >= 30, run.stdout


@interpreted
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# A lone edge, no body, one vector, around a step and a block of the forward (1024 and 4096 bfloat16 logits), and past
# the largest row that stays in registers (16384).
@pytest.mark.parametrize("vocab_size", [1, 7, 9, 1023, 1025, 4095, 4103, 5200, 16391])
def test_ragged_rows(vocab_size: int, dtype: torch.dtype, mode: str) -> None:
    from support.triton_check import check, confident_inputs

    logits, targets = confident_inputs(4, vocab_size, dtype)
    check(logits, targets, extra_ulps=EXTRA_ULPS[dtype], label_smoothing=0.1, **MODES[mode])


@interpreted
@pytest.mark.parametrize("mode", ["plain", "grad_in_forward"])
@pytest.mark.parametrize("offset", [1, 5])
def test_gradient_rows_that_lie_otherwise_than_logits(offset: int, mode: str) -> None:
    """A row of a slice starts at another distance from a 16-byte boundary than its row of the gradient."""
    from support.triton_check import check, confident_inputs

    logits, targets = confident_inputs(6, 1005, torch.bfloat16)
    logits = logits.reshape(2, 3, 1005)[:, :2, offset:]
    targets = (targets.reshape(2, 3)[:, :2] % (1005 - offset)).contiguous()
    check(logits, targets, extra_ulps=1, softcap=20.0, **MODES[mode])


@interpreted
@pytest.mark.parametrize("position", ["first", "last", "head", "tail", "body"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_target_anywhere_in_the_window(position: str, mode: str, softcap: float | None) -> None:
    from support.triton_check import check, confident_inputs

    vocab_size = 1031
    column = {"first": 0, "last": vocab_size - 1, "head": 2, "tail": vocab_size - 3, "body": 517}[position]
    logits, targets = confident_inputs(3, vocab_size, torch.float32)
    targets[:] = column
    logits[1, column] += 30
    check(logits, targets, softcap=softcap, **MODES[mode])


@interpreted
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [-1, 515, 2**33 + 5])
def test_bad_target_is_nan_in_its_row_alone(bad: int, mode: str) -> None:
    """Guards around the logits are NaN: a read outside would spoil a good row, a write would show in them."""
    from mixce_kernels import fused_mixce_loss

    memory = torch.full((6, 515), torch.nan)
    memory[1:5] = torch.randn(4, 515, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, bad, 514, -100])
    leaf = torch.zeros((), requires_grad=True)
    inplace = "inplace" in mode
    base = memory + 0 * leaf if inplace else memory.requires_grad_()
    base.retain_grad()
    logits = base[1:5]
    loss, stats = fused_mixce_loss(
        logits, targets, 0.3, reduction="none", return_stats=True, backend="triton", **MODES[mode]
    )
    loss.sum().backward()
    grad = base.grad[1:5]
    expected_nan = torch.tensor([False, True, False, False])
    assert torch.equal(loss.isnan(), expected_nan)
    for statistic in stats[:5]:
        assert torch.equal(statistic.isnan(), expected_nan)
    assert not stats.correct[1]
    assert torch.equal(grad.isnan(), expected_nan[:, None].expand_as(grad))
    assert not grad[3].any()
    if inplace:
        assert base.detach()[[0, 5]].isnan().all()


@interpreted
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_rows_leaves_rows_with_factor_one(dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    from mixce_kernels.backends import triton as backend

    grad = torch.randn(5, 1031, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = grad.clone()
    factors = torch.tensor([1.0, 2.0, 0.0, -0.5, torch.inf], dtype=factor_dtype)
    targets = torch.tensor([3, 3, 3, 3, 7])
    backend.scale_rows_(grad, factors, targets, 7)
    expected = before * torch.tensor([1.0, 2.0, 0.0, -0.5, 1.0], dtype=dtype)[:, None]  # powers of two: exact
    assert torch.equal(grad, expected)
    # One factor for all rows, and none of them ignored.
    backend.scale_rows_(grad, torch.tensor(4.0, dtype=factor_dtype), None, 7)
    assert torch.equal(grad, 4 * expected)


@interpreted
def test_correct_is_the_first_of_the_largest() -> None:
    from mixce_kernels import fused_mixce_loss

    logits = torch.zeros(4, 1031)
    logits[:, [100, 700]] = 5.0
    logits[3, 9] = torch.nan
    targets = torch.tensor([100, 700, 3, 100])
    # The cap makes all logits alike in float32: the logits themselves are compared.
    _, stats = fused_mixce_loss(logits, targets, return_stats=True, softcap=1e-6, backend="triton")
    assert stats.correct.tolist() == [True, False, False, False]


@interpreted
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_split_forward(case: Case) -> None:
    check_split(case, extra_ulps=EXTRA_ULPS.get(case.dtype, 0))


@interpreted
def test_bad_targets_of_split_rows() -> None:
    check_bad_targets_of_split_rows()
