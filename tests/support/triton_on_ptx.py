"""Runs the compiled PTX of the Triton kernels on CPU tensors: `python -m support.triton_on_ptx`."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from mixce_kernels import fused_mixce_loss
from mixce_kernels.backends import triton as backend
from mixce_kernels.triton_kernels.forward import forward_kernel
from mixce_kernels.triton_kernels.reduction import reduction_kernel
from mixce_kernels.weightings import Power, TaiLr, Variance
from support.cases import DTYPES, Case
from support.figures import assert_figures
from support.inputs import build
from support.launches import check_launches_of_reductions
from support.logprobs_on_ptx import check_figures_of_logprobs, check_logprobs
from support.loss_checks import check_statistics
from support.oracle import Options
from support.shard_checks import CHECKS, FEW, check_case, check_launches
from support.split_forward import (
    SPLIT,
    check_bad_targets_of_split_rows,
    check_launches_of_split_rows,
    check_split,
    many_multiprocessors,
)
from support.triton_check import check, confident_inputs

BOTH = {"grad_in_forward": True, "inplace_backward": True}
EVERY = {"softcap": 20.0, "label_smoothing": 0.1, "z_loss": 1e-3, "logit_scale": 0.7}
HELD, TWO_READS, CLUSTER = "held", "two reads", "cluster"
# Each type and option with each path, in sizes just past a step, so that blocks, steps and a rest all run. How the
# gradient is made in forward: from registers of one program, from those of a cluster, or from a second read.
CASES: list[tuple[tuple[int, int], torch.dtype, dict[str, Any], str | None]] = [
    ((4, 1003), torch.bfloat16, {}, None),
    ((3, 5200), torch.float32, {"label_smoothing": 0.1, "z_loss": 1e-3, "logit_scale": 0.7}, None),
    ((3, 1031), torch.float32, {"inplace_backward": True, "softcap": 9.0, "eta": 0.0}, None),
    ((3, 5129), torch.float16, EVERY | {"eta": torch.tensor([0.0, 0.3, 1.0])}, None),
    ((3, 515), torch.float64, EVERY | {"eta": torch.tensor(0.6)}, None),
    ((3, 1), torch.float32, {"grad_in_forward": True}, HELD),
    ((3, 5300), torch.bfloat16, BOTH, HELD),
    ((3, 1003), torch.float16, {"grad_in_forward": True, "z_loss": 1e-3}, HELD),
    ((3, 4500), torch.float32, BOTH | {"label_smoothing": 0.2}, HELD),
    ((3, 900), torch.float64, BOTH | {"softcap": 9.0}, HELD),
    ((3, 17000), torch.bfloat16, BOTH | EVERY, HELD),
    ((3, 17003), torch.float32, {"grad_in_forward": True, "softcap": 9.0}, CLUSTER),
    ((3, 33333), torch.bfloat16, BOTH | EVERY, CLUSTER),
    ((3, 9003), torch.float64, BOTH | EVERY, TWO_READS),
    ((3, 33333), torch.bfloat16, BOTH | {"eta": torch.tensor([0.0, 0.3, 1.0]), "logit_scale": 0.7}, CLUSTER),
    ((3, 33555), torch.float16, {"grad_in_forward": True, "z_loss": 1e-3}, CLUSTER),
    ((3, 33333), torch.float32, BOTH, CLUSTER),
    ((3, 16500), torch.float64, {"grad_in_forward": True}, CLUSTER),
]


# The statistics of each type: of rows past a block with every option, and of rows that are held for their gradient.
STATISTICS = [
    Case(f"ptx_{mode}", shape=(5, size), dtype=dtype, kind=kind, options=options, mode=mode)
    for dtype in DTYPES
    for mode, size, kind, options in (
        ("plain", 5203, "masked", Options(label_smoothing=0.1, z_loss=1e-3, softcap=6.0, logit_scale=1.3)),
        ("grad_in_forward", 700, "confident", Options()),
    )
]


# Functions of q, of the entropy, of parameters for each token, and of the caller.
STATISTICS += [
    Case(f"ptx_{name}", shape=(5, 700), weighting=name, kind="confident")
    for name in ("power_0.3", "focal_0.5", "entropy_per_token", "custom")
]


def path_of(counters: dict[str, Any], n_ctas: int, row_bytes: float) -> str:
    """How a forward kernel made its gradient."""
    if n_ctas > 1:
        return CLUSTER
    return TWO_READS if 16 * counters["global_loads"][16] > row_bytes else HELD


def check_results(launches: list[Any]) -> None:
    """Each case against the float64 oracle; a bad target; rows of a slice, and gradients that lie otherwise."""
    for (n_rows, vocab_size), dtype, keywords, path in CASES:
        launches.clear()
        logits, targets = confident_inputs(n_rows, vocab_size, dtype)
        check(logits, targets, **keywords)
        if path is not None and vocab_size > 1:
            row_bytes = (targets >= 0).sum().item() * vocab_size * dtype.itemsize
            forward = of_rows(launches)[0]
            found = path_of(forward.counters, forward.num_ctas, row_bytes)
            assert found == path, (vocab_size, dtype, keywords, found)
    logits, targets = confident_inputs(4, 1005, torch.bfloat16)
    check(logits.reshape(2, 2, 1005)[:, :1], targets.reshape(2, 2)[:, :1].contiguous())
    check(logits[:, 5:], targets % 1000, grad_in_forward=True, softcap=20.0)

    for keywords in ({}, {"grad_in_forward": True}):
        logits, targets = confident_inputs(4, 515, torch.float32)
        targets[1] = 2**33 + 5
        logits.requires_grad_()
        loss, stats = fused_mixce_loss(
            logits, targets, reduction="none", return_stats=True, backend="triton", **keywords
        )
        loss.sum().backward()
        expected_nan = [False, True, False, False]
        assert loss.isnan().tolist() == expected_nan
        assert all(statistic.isnan().tolist() == expected_nan for statistic in stats[:5])
        expected_correct = logits.detach().argmax(1) == targets
        expected_correct[2] = False  # ignored
        assert stats.correct.tolist() == expected_correct.tolist()
        assert logits.grad is not None
        assert logits.grad.isnan().all(1).tolist() == logits.grad.isnan().any(1).tolist() == expected_nan


def check_all_statistics() -> None:
    """Each of them against the oracle."""
    for case in STATISTICS:
        inputs = build(case)
        _, stats = fused_mixce_loss(
            inputs.logits, inputs.targets, inputs.eta, backend="triton", return_stats=True, **inputs.keywords
        )
        check_statistics(case, stats)


def check_shards() -> None:
    """The kernels of a split vocabulary."""
    for number, case in FEW:
        check_case(number, case, "triton")
    for one in CHECKS:
        one("triton")


def of_rows(launches: list[Any]) -> list[Any]:
    """Those of the row kernels, without those of the reduction."""
    return [launch for launch in launches if launch.name != "reduction_kernel"]


def taken_from(launches: list[Any]) -> list[str]:
    """The names of the kernels that were launched since the last call."""
    names = [launch.name for launch in launches]
    launches.clear()
    return names


def check_figures(launches: list[Any]) -> None:
    """Speed that can be seen without a GPU: each logit is read once, in whole vectors, with few instructions."""
    n_rows = 64
    for vocab_size in (50257, 128256):
        logits = torch.randn(n_rows, vocab_size, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
        targets = torch.arange(n_rows)
        launches.clear()
        fused_mixce_loss(logits, targets, backend="triton").backward()
        fused_mixce_loss(logits, targets, grad_in_forward=True, backend="triton")
        # Another function of q costs some instructions a row and thread.
        fused_mixce_loss(logits.detach(), targets, backend="triton")
        fused_mixce_loss(logits.detach(), targets, weighting=Power(0.5), backend="triton")
        *steps, plain, weighted = of_rows(launches)
        for step, launch in zip(("forward", "backward", "grad_in_forward"), steps, strict=True):
            assert_figures("triton", step, launch.counters, logits.numel())
        assert weighted.counters["instructions"] <= 1.03 * plain.counters["instructions"]

        def counted() -> dict[str, Any]:
            return of_rows(launches)[-1].counters

        check_figures_of_logprobs("triton", vocab_size, counted)

    # With each option, too; and of rows fewer than the multiprocessors each one is split.
    for vocab_size, keywords in itertools.product(
        (50257, 128256), ({"label_smoothing": 0.1}, {"return_stats": True}, {"softcap": 30.0})
    ):
        few = torch.randn(4, vocab_size).bfloat16().requires_grad_()
        launches.clear()
        fused_mixce_loss(few, targets[:4], grad_in_forward=True, backend="triton", **keywords)
        (launch,) = of_rows(launches)
        assert launch.counters["global_loaded_bytes"] <= 2.2 * few.numel(), (vocab_size, keywords, launch.counters)
    few = torch.randn(8, 128256).bfloat16()
    launches.clear()
    with many_multiprocessors(132):
        fused_mixce_loss(few, targets[:8], backend="triton")
    tiles, merge, reduction = launches
    assert tiles.grid[0] >= 128, tiles
    assert (merge.name, merge.grid[0], reduction.name) == ("merge_kernel", 8, "reduction_kernel"), launches
    # Each thread of a tile loads the target.
    assert tiles.counters["global_loaded_bytes"] <= 2.3 * few.numel(), tiles.counters

    # Rows whose factor is 1 are neither read nor written: each thread reads the factor alone.
    launches.clear()
    backend.scale_rows_(logits.detach()[:2], torch.tensor([1.0, 1.0]), None, -100)
    counters = launches[-1].counters
    assert not counters["global_stores"], counters
    assert list(counters["global_loads"]) == [4], counters


def check_specialisation() -> None:
    """Values do not specialise: no sizes or strides of 1 or of multiples of 16, no options, weightings or addresses."""
    # Without a gradient, as below.
    fused_mixce_loss(torch.randn(3, 50259).bfloat16(), torch.full((3,), 3), backend="triton")
    compiled = [len(one.device_caches[90][0]) for one in (forward_kernel, reduction_kernel)]
    assert all(compiled)
    for n_rows, vocab_size, ignore_index, eta, weighting in (
        (1, 50257, 1, 0.0, Power(1.0)), (2, 50272, 16, 1.0, TaiLr(0.5, 0.1)), (1, 50258, 2**40, 0.3, Variance())
    ):  # fmt: skip
        logits, targets = torch.randn(n_rows, vocab_size + 16).bfloat16(), torch.full((n_rows,), 3)
        rows = logits[:, 3 : 3 + vocab_size]
        fused_mixce_loss(rows, targets, eta, ignore_index=ignore_index, weighting=weighting, backend="triton")
    assert [len(one.device_caches[90][0]) for one in (forward_kernel, reduction_kernel)] == compiled


def main() -> None:
    """Raises AssertionError at the first result that is off, and ptx_on_cpu's error at an access out of bounds."""
    import ptx_on_cpu
    from ptx_on_cpu import triton_backend

    with triton_backend.on_cpu("sm_90") as launches:
        for order in ("forward", "reverse", "shuffled"):
            ptx_on_cpu.configure(order=order, seed=1, races=True)
            check_results(launches)
            check_all_statistics()
            check_logprobs("triton")
            for case in SPLIT:
                check_split(case)
            check_bad_targets_of_split_rows()
        # Their threads tell each other nothing: one order will do.
        check_shards()
        check_launches("triton", lambda: taken_from(launches))
        check_launches_of_reductions("triton", lambda: taken_from(launches))
        check_launches_of_split_rows(lambda: taken_from(launches))
        ptx_on_cpu.configure(order="forward", races=False)
        check_figures(launches)
        check_specialisation()
    print("ran", len(CASES))


if __name__ == "__main__":
    main()
