"""Runs nvcc's PTX of the CUDA kernels on CPU tensors; test_cuda_ptx.py sets the scene.

On PYTHONPATH are ptx_on_cpu and the package, built with MIXCE_CUDA_ARCHS=90+PTX and MIXCE_CUDART=shared. Every kernel
runs in three orders of its threads, its results are held to the oracle, and each access to memory must lie in a tensor
that was handed over.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ptx_on_cpu
import torch
from ptx_on_cpu import cudart

from support.cases import BFLOAT16, DTYPES, FLOAT32, FLOAT64, Case
from support.figures import assert_figures
from support.oracle import Options

ORDERS = (("forward", 0), ("reverse", 0), ("shuffled", 5))
_PLAIN = Options()
_ALL = Options(label_smoothing=0.1, z_loss=1e-3, softcap=6.0, logit_scale=1.3, ignore_index=7)


def cases() -> Iterator[tuple[Case, bool]]:
    """Calls, and whether they ask for statistics: every kernel for every type, and what only addresses can break."""
    from mixce_kernels.backends.cuda_launch import BLOCK_BYTES

    for dtype in DTYPES:
        # Rows of two and a half blocks: split in a forward alone, a cluster's in a forward with gradient.
        vocab_size = 5 * BLOCK_BYTES // (2 * dtype.itemsize) + 11
        base = Case("ptx", shape=(3, vocab_size), dtype=dtype, reduction="none", upstream="per_token")
        for options in (_PLAIN, Options(softcap=6.0), Options(label_smoothing=0.1), _ALL):
            yield base.at(options=options), False
            yield base.at(options=options), True
            for mode in ("grad_in_forward", "inplace_grad_in_forward"):
                yield base.at(options=options, mode=mode, kind="confident"), False
            # Gradient rows that lie otherwise than the logits', a vector of theirs cut out of two: many rows are read
            # again by the same kernel, few by another that splits them.
            otherwise = base.at(options=options, mode="grad_in_forward", layout="sliced_columns", eta="column")
            yield otherwise, False
            yield otherwise.at(shape=(140, 333)), False
        yield base.at(layout="sliced_columns", kind="masked", target_dtype=torch.int32, eta="per_token"), False
        yield base.at(layout="unaligned", mode="inplace", kind="nonfinite_rows", shape=(12, 700)), True
        for size in (1, 7, 15, 2 * 256 * 16 // dtype.itemsize + 3):
            yield base.at(shape=(5, size), mode="grad_in_forward", options=Options(z_loss=0.1)), True
    for name in ("power_0.3", "focal_0.5", "entropy_per_token", "custom"):
        yield Case("ptx_weighted", shape=(3, 9001), weighting=name, reduction="none", kind="confident"), True
    # A row a block holds whole, and one that needs a cluster for it.
    yield Case("held", shape=(70, 9000), dtype=BFLOAT16, mode="grad_in_forward"), False
    yield Case("cluster", shape=(2, 128256), dtype=FLOAT32, mode="inplace_grad_in_forward"), False
    yield Case("too_large", shape=(1, 240_001), dtype=FLOAT64, mode="grad_in_forward", ignored="none"), False


def taken_from(runtime: Any) -> list[str]:
    """The names of the kernels that were launched since the last call."""
    names = [launch["kernel"] for launch in runtime.launches()]
    runtime.clear()
    return names


def check_figures(runtime: Any, vocab_size: int) -> None:
    """Speed that can be seen without a GPU: each logit is read once, in whole vectors, with few instructions."""
    from mixce_kernels import fused_mixce_loss
    from mixce_kernels.weightings import Power
    from support.logprobs_on_ptx import check_figures_of_logprobs

    logits = torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    targets = torch.arange(64)

    def assert_counted(step: str) -> int:
        counters = runtime.counters()
        assert_figures("cuda", step, counters, logits.numel())
        runtime.clear()
        return counters["instructions"]

    runtime.clear()
    loss = fused_mixce_loss(logits, targets, backend="cuda")
    instructions = assert_counted("forward")
    torch.autograd.grad(loss, logits)
    assert_counted("backward")
    fused_mixce_loss(logits, targets, grad_in_forward=True, backend="cuda")
    assert_counted("grad_in_forward")
    # Another function of q costs some instructions a row.
    fused_mixce_loss(logits, targets, weighting=Power(0.5), backend="cuda")
    assert assert_counted("forward") <= 1.001 * instructions

    def counted() -> dict[str, Any]:
        counters = runtime.counters()
        runtime.clear()
        return counters

    check_figures_of_logprobs("cuda", vocab_size, counted)


def main() -> None:
    """Raises AssertionError at the first result that is off, and RuntimeError at a kernel's fault."""
    runtime = cudart.Runtime("sm_90", check_bounds=True)
    # Before anything imports it.
    (library,) = Path(importlib.util.find_spec("mixce_kernels").origin).parent.glob("_C.*.so")
    runtime.attach(str(library))
    from mixce_kernels import fused_mixce_loss
    from support.inputs import build
    from support.launches import check_launches_of_reductions
    from support.logprobs_on_ptx import check_logprobs
    from support.loss_checks import check, check_statistics
    from support.shard_checks import CHECKS, FEW, check_case, check_launches
    from support.watched import Watched

    Watched(runtime.register, runtime.unregister)
    kernels = {name for module in runtime.modules for name in module.kernels}
    for order, seed in ORDERS:
        ptx_on_cpu.configure(order=order, seed=seed, races=True)
        runtime.apply()
        launched: set[str] = set()
        for case, stats in cases():
            inputs, fresh = build(case), build(case)
            loss = fused_mixce_loss(
                inputs.logits, inputs.targets, inputs.eta, backend="cuda", return_stats=stats, **inputs.keywords
            )
            if stats:
                loss, statistics = loss
                check_statistics(case, statistics)
            (grad,) = torch.autograd.grad(loss, inputs.logits, inputs.upstream)
            check(fresh, fresh.oracle(), loss, grad)
            launched |= {launch["kernel"] for launch in runtime.launches()}
            runtime.clear()
        check_logprobs("cuda")
        for number, case in FEW:
            check_case(number, case, "cuda")
        for one in CHECKS:
            one("cuda")
        launched |= {launch["kernel"] for launch in runtime.launches()}
        runtime.clear()
        check_launches("cuda", lambda: taken_from(runtime))
        check_launches_of_reductions("cuda", lambda: taken_from(runtime))
        assert launched == kernels, sorted(kernels - launched)

        logits, targets = torch.randn(4, 9001).bfloat16().requires_grad_(), torch.tensor([3, 9001, -1, 2**33 + 5])
        for keywords in ({}, {"grad_in_forward": True}):
            loss = fused_mixce_loss(logits, targets, reduction="none", backend="cuda", **keywords)
            (grad,) = torch.autograd.grad(loss.sum(), logits)
            assert loss.isnan().tolist() == grad.isnan().all(1).tolist() == [False, True, True, True]
            assert not grad[0].isnan().any()
    ptx_on_cpu.configure(order="forward", races=False)
    runtime.apply()
    for vocab_size in (50257, 128256):
        check_figures(runtime, vocab_size)
    print("ran", len(kernels), "kernels")


if __name__ == "__main__":
    main()
