"""Forwards of rows fewer than the multiprocessors of the GPU that is emulated: Triton's backend splits each row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from mixce_kernels import fused_mixce_loss
from mixce_kernels.backends import devices, triton
from support.cases import BFLOAT16, FLOAT16, FLOAT64, Case
from support.inputs import build
from support.loss_checks import check, check_statistics, run
from support.oracle import Options

# Two programs for each are enough for a row of 9001 logits to be split into all of its blocks.
MULTIPROCESSORS = 64
_BASE = Case("split", shape=(6, 9001), reduction="none", upstream="-2")
_ALL = Options(label_smoothing=0.1, z_loss=1e-3, softcap=6.0, logit_scale=1.3)
# Each type, kind of row and option. Registers do not hold these rows of float64 with options, nor a gradient that lies
# otherwise: their gradient is a launch of its own.
SPLIT = [
    _BASE.at(name="split_random", dtype=BFLOAT16),
    _BASE.at(name="split_mean", dtype=BFLOAT16, reduction="mean", token_weights=True),
    _BASE.at(name="split_eta", shape=(2, 3, 9001), eta="per_token", layout="sliced", dtype=FLOAT16),
    _BASE.at(name="split_smoothing", options=Options(label_smoothing=0.1), kind="confident"),
    _BASE.at(name="split_masked", options=_ALL, kind="first_block_masked", shape=(6, 9007)),
    _BASE.at(name="split_target_masked", kind="target_masked", eta="0", dtype=FLOAT64, shape=(6, 3003)),
    _BASE.at(name="split_nonfinite", kind="nonfinite_rows", dtype=BFLOAT16, shape=(9, 9001)),
    _BASE.at(name="split_nonfinite_all", kind="nonfinite_rows", options=_ALL, shape=(9, 9007)),
    _BASE.at(name="split_ties", kind="ties", dtype=BFLOAT16, options=Options(softcap=6.0)),
    _BASE.at(name="split_shifted", kind="shifted"),
    _BASE.at(name="split_grad", dtype=FLOAT64, shape=(6, 5003), options=_ALL, mode="grad_in_forward"),
    _BASE.at(
        name="split_grad_inplace", dtype=FLOAT64, shape=(6, 5003), options=_ALL, mode="inplace_grad_in_forward",
        reduction="mean", token_weights=True, upstream="1",
    ),
    _BASE.at(name="split_grad_aligned_otherwise", dtype=BFLOAT16, layout="sliced_columns", mode="grad_in_forward"),
]  # fmt: skip


@contextlib.contextmanager
def many_multiprocessors(number: int = MULTIPROCESSORS) -> Iterator[None]:
    """A context in which emulations claim so many."""
    with mock.patch.object(devices, "EMULATED_MULTIPROCESSORS", number):
        yield


def check_split(case: Case, extra_ulps: int = 0) -> None:
    """Holds loss, gradient and statistics to the rule, and sees that rows were split."""
    launch = triton.forward_launch
    split = []

    def noted(*args: object, **keywords: object) -> object:
        split.append(launch(*args, **keywords))  # type: ignore[arg-type]
        return split[-1]

    with many_multiprocessors(), mock.patch.object(triton, "forward_launch", noted):
        loss, grad = run(build(case), "triton")
        inputs = build(case)
        _, stats = fused_mixce_loss(
            inputs.logits, inputs.targets, inputs.eta, return_stats=True, backend="triton", **inputs.keywords
        )
    assert [len(one.launches) for one in split] == [2, 2]  # type: ignore[attr-defined]
    in_forward = "grad_in_forward" in case.mode
    assert [one.grad_apart for one in split] == [in_forward] * 2  # type: ignore[attr-defined]
    inputs = build(case)
    check(inputs, inputs.oracle(), loss, grad, extra_ulps)
    check_statistics(case, stats)


def check_bad_targets_of_split_rows() -> None:
    """A target out of range makes NaN of its row alone, and an ignored one 0."""
    for in_forward in (False, True):
        logits = torch.randn(4, 3003, dtype=torch.float64, requires_grad=True)
        targets = torch.tensor([3, 3003, -100, 3002])
        with many_multiprocessors():
            losses, stats = fused_mixce_loss(
                logits, targets, 0.3, softcap=9.0, reduction="none", return_stats=True, grad_in_forward=in_forward,
                backend="triton",
            )  # fmt: skip
            losses.sum().backward()
        bad = torch.tensor([False, True, False, False])
        assert torch.equal(losses.isnan(), bad)
        assert all(torch.equal(statistic.isnan(), bad) for statistic in stats[:5])
        assert not stats.correct[1:3].any()
        assert logits.grad is not None
        assert torch.equal(logits.grad.isnan(), bad[:, None].expand_as(logits))
        assert not logits.grad[2].any()
        assert losses[2] == 0


def check_launches_of_split_rows(launched: Callable[[], list[str]]) -> None:
    """The merge is one launch more, and so is a gradient that waits for it; the reduction follows, as of other rows."""
    logits, targets = torch.randn(4, 3003, dtype=torch.float64, requires_grad=True), torch.arange(4)
    split = ["partial_stats_kernel", "merge_kernel"]
    with many_multiprocessors():
        for in_forward in (False, True):
            launched()
            loss = fused_mixce_loss(logits, targets, softcap=9.0, grad_in_forward=in_forward, backend="triton")
            expected = [*split, "logits_grad_kernel"] if in_forward else split
            assert launched() == ["reduction_kernel"] * in_forward + expected + ["reduction_kernel"]
            torch.autograd.grad(loss, logits)
            assert launched() == ["scale_rows_kernel" if in_forward else "logits_grad_kernel"]
        # Without a gradient and a reduction.
        fused_mixce_loss(logits.detach(), targets, reduction="none", backend="triton")
        assert launched() == split
