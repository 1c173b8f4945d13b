"""The backend `cpu`: each instruction set of this machine, threads, determinism, and what a call costs its host."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import pytest
import torch

from conftest import INTERPRETED
from mixce_kernels import fused_mixce_loss, fused_token_logprobs
from mixce_kernels.backends import cpu
from support import cases, logprob_cases
from support.cases import DTYPES, MODES, Case
from support.inputs import build
from support.logprob_cases import LogprobCase, build_logprobs, check_found, differentiated
from support.loss_checks import check, run

ISAS = cpu._supported_isas()
pytestmark = pytest.mark.skipif(INTERPRETED, reason="of the native kernels")

# Every option and every kind, at sizes with tails; the best set is tried on everything by test_loss.
CASES = [
    case
    for case in cases.SIZES + cases.KINDS + cases.OPTIONS + cases.RANDOM
    if math.prod(case.shape) <= 70_000 and case.dtype != cases.FLOAT64
]
LOGPROBS = [one for one in logprob_cases.ALL if math.prod(one.case.shape) <= 70_000]


@pytest.mark.parametrize("isa", ISAS[1:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set(monkeypatch: pytest.MonkeyPatch, isa: str, case: Case) -> None:
    """By the rule of accuracy, as the best one."""
    monkeypatch.setenv("MIXCE_CPU_ISA", isa)
    assert cpu.isa() == isa
    loss, grad = run(build(case), "cpu")
    inputs = build(case)
    check(inputs, inputs.oracle(), loss, grad)


@pytest.mark.parametrize("isa", ISAS[1:])
@pytest.mark.parametrize("one", LOGPROBS, ids=str)
def test_log_probabilities_of_every_instruction_set(
    monkeypatch: pytest.MonkeyPatch, isa: str, one: LogprobCase
) -> None:
    """Whose gradient has loops of its own."""
    monkeypatch.setenv("MIXCE_CPU_ISA", isa)
    inputs = build_logprobs(one)
    result = fused_token_logprobs(inputs.logits, inputs.targets, backend="cpu", **inputs.keywords)
    check_found(build_logprobs(one), differentiated(result, inputs))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_special_values_at_every_column(monkeypatch: pytest.MonkeyPatch, isa: str, value: float) -> None:
    """In every lane of every vector and in the tail beyond."""
    monkeypatch.setenv("MIXCE_CPU_ISA", isa)
    size = 150
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.zeros(size, size).to(dtype)
        logits.fill_diagonal_(value).requires_grad_()
        targets = (torch.arange(size) + 1) % size
        loss, stats = fused_mixce_loss(logits, targets, reduction="none", return_stats=True, backend="cpu")
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        logprobs, entropy = fused_token_logprobs(logits, targets, return_entropy=True, backend="cpu")
        (grad_of_both,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)
        if value == -torch.inf:
            torch.testing.assert_close(entropy, stats.nll, rtol=3e-7, atol=0)
            assert (grad_of_both.diagonal() == 0).all()
            assert grad_of_both.isfinite().all()
            torch.testing.assert_close(stats.nll, torch.full((size,), size - 1.0).log(), rtol=3e-7, atol=0)
            assert (grad.diagonal() == 0).all()
            assert grad.isfinite().all()
        else:
            assert loss.isnan().all()
            assert grad.isnan().all()
            assert logprobs.isnan().all()
            assert entropy.isnan().all()
            assert grad_of_both.isnan().all()


def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence with the names that would do; the best of the machine is the first of them."""
    assert ISAS[-1] == "baseline"
    for name in ("sse9", "AVX2", "avx512" if "avx512" not in ISAS else "neon"):
        monkeypatch.setenv("MIXCE_CPU_ISA", name)
        with pytest.raises(RuntimeError, match=f"expected MIXCE_CPU_ISA to be one of {', '.join(ISAS)}, got '{name}'"):
            fused_mixce_loss(torch.zeros(1, 3), torch.tensor([0]), backend="cpu")
    monkeypatch.setenv("MIXCE_CPU_ISA", "")
    assert cpu.isa() == ISAS[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time(monkeypatch: pytest.MonkeyPatch, isa: str, mode: str, dtype: torch.dtype) -> None:
    """Over runs, over one, two and three threads, and wherever the memory lies."""
    monkeypatch.setenv("MIXCE_CPU_ISA", isa)
    case = Case("bits", shape=(40, 5003), dtype=dtype, mode=mode)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(run(build(case), "cpu"))
        results.append(run(build(case.at(layout="contiguous")), "cpu"))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_gradients(dtype: torch.dtype) -> None:
    """Gradients too large for the caches are written past them, at every alignment of a row and at the target."""
    rows, size = 300, 32_009
    logits = torch.randn(rows, size).to(dtype).requires_grad_()
    # In the first and the last vectors of rows that begin at every alignment.
    targets = torch.cat([torch.arange(150), size - 1 - torch.arange(150)])
    (grad,) = torch.autograd.grad(fused_mixce_loss(logits, targets, 1.0, reduction="sum", backend="cpu"), logits)
    expected = torch.softmax(logits.detach().float(), -1)
    at_target = torch.expm1(torch.log_softmax(logits.detach().float(), -1).gather(1, targets[:, None]))
    expected.scatter_(1, targets[:, None], at_target)
    torch.testing.assert_close(grad.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-7)


def test_other_threads_run_meanwhile() -> None:
    """The interpreter's lock is free while a kernel runs: another Python thread advances during one long call."""
    logits, targets = torch.randn(64, 200_000), torch.zeros(64, dtype=torch.int64)
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0002)

    fused_mixce_loss(logits, targets, backend="cpu")
    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        for _ in range(20):
            begin = time.perf_counter()
            fused_mixce_loss(logits, targets, backend="cpu")
            end = time.perf_counter()
            # In the middle half: not when the call starts or ends.
            quarter = (end - begin) / 4
            if any(begin + quarter < at < end - quarter for at in ticks):
                return
    finally:
        stop.set()
        ticker.join()
    pytest.fail("no other thread ran in the middle of twenty calls")


def fastest(call: Callable[[], object], repetitions: int = 400) -> float:
    """The shortest of many times, which another process's work does not lengthen."""
    times = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("backward", [False, True])
def test_a_small_call_costs_at_most_three_eager_ones(backward: bool) -> None:
    """8 x 1000 logits: the host's work, not the arithmetic, is what a small model pays."""
    # Poison costs fills that a real run does not make.
    torch.use_deterministic_algorithms(False)
    logits = torch.randn(8, 1000, requires_grad=backward)
    targets = torch.randint(1000, (8,))

    def eager() -> torch.Tensor:
        nll = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
        valid = targets != -100
        loss = 0.5 * nll + 0.5 * torch.exp(-nll.detach()) * nll
        return (loss * valid).sum() / valid.sum().clamp(min=1)

    def fused() -> torch.Tensor:
        return fused_mixce_loss(logits, targets, 0.5, backend="cpu")

    def with_backward(loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return (lambda: torch.autograd.grad(loss(), logits)) if backward else loss

    ratios = []
    for _ in range(3):
        ratios.append(fastest(with_backward(fused)) / fastest(with_backward(eager)))
        if ratios[-1] <= 3:
            return
    pytest.fail(f"expected at most 3 times the eager formula's time, got {min(ratios):.1f}")
