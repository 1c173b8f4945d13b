"""The kernels on an NVIDIA GPU, at the sizes of real models: `pytest -m gpu`.

Under an emulation (conftest.py) the same functions run on CPU tensors. Graphs, streams and devices are in
test_gpu_runtime.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from conftest import EMULATED, GPU_BACKENDS, INTERPRETED
from mixce_kernels import fused_mixce_loss
from mixce_kernels.options import accumulate_dtype
from support.allocations import allocated_bytes
from support.cases import BFLOAT16, DTYPES, FLOAT16, FLOAT32, MODES, Case
from support.inputs import build, computed
from support.loss_checks import check, run
from support.oracle import Options

pytestmark = pytest.mark.skipif(INTERPRETED, reason="an interpreter is too slow for the sizes of real models")

OPTIONS = {
    "default": {},
    "smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.05},
    "softcap": {"softcap": 2.0},
    "all": {"label_smoothing": 0.2, "z_loss": 0.05, "softcap": 2.0, "logit_scale": 1.7},
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
EVERY_REDUCTION = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
EVERY_MODE = pytest.mark.parametrize("mode", MODES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Gradcheck calls backward more than once a forward.
REUSABLE = pytest.mark.parametrize("mode", ["plain", "grad_in_forward"])

# Llama 2: rows aligned to 16 bytes. GPT-2: aligned to nothing. Llama 3: a float32 row fits no block's shared memory.
VOCAB_SIZES = (32_000, 50_257, 128_256)
FEW = 8
# More rows than any GPU has multiprocessors, so that a row is one block's work.
MANY_COPIES = 24
# Rows of V = 128256 with more than 2^31 logits, a multiple of 2 * FEW.
LARGE_VOCAB_SIZE = 128_256
LARGE_ROWS = 2 * FEW if EMULATED else 17_008


@pytest.fixture(params=GPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The backends of a GPU."""
    return request.param


def synchronize(device: str) -> None:
    """Waits for the GPU, and raises what went wrong on it."""
    if device != "cpu":
        torch.cuda.synchronize()


def inputs(n_rows: int, vocab_size: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [n_rows, vocab_size], every second target confident, and targets, every fifth ignored."""
    generator = torch.Generator().manual_seed(n_rows)
    logits = torch.randn(n_rows, vocab_size, generator=generator) * 2
    targets = torch.randint(vocab_size, (n_rows,), generator=generator)
    logits[::2].scatter_(1, targets[::2, None], 20.0)
    targets[1::5] = -100
    return logits.to(device, dtype), targets.to(device)


def loss_and_grad(values: Tensor, targets: Tensor, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    """Of a copy of the logits; tokens' losses unless a reduction is asked for."""
    logits = computed(values.clone())
    loss = fused_mixce_loss(logits, targets, *args, **{"reduction": "none", **keywords})
    (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, 0.7))
    return loss.detach(), grad


def float64_inputs(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [2, 3, 7] and an upstream gradient [2, 3], leaves, and targets with one ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=generator).to(device)
    upstream = torch.randn(2, 3, dtype=torch.float64, generator=generator).to(device)
    targets = torch.tensor([[0, 6, -100], [3, 3, 1]], device=device)
    return logits.requires_grad_(), upstream.requires_grad_(), targets


@EVERY_OPTION
@EVERY_REDUCTION
@REUSABLE
def test_gradcheck(backend: str, device: str, mode: str, reduction: str, options: dict[str, float]) -> None:
    """Float64 through the kernels: differences of what forward computes are what backward computes."""
    logits, _, targets = float64_inputs(device)
    weights = torch.tensor([[0.5, 1.0, 2.0], [0.0, 3.0, 1.0]], device=device)
    keywords = {"reduction": reduction, "token_weights": weights, "backend": backend, **MODES[mode], **options}
    assert gradcheck(lambda logits: fused_mixce_loss(logits, targets, 1.0, **keywords), logits)


@EVERY_OPTION
@EVERY_REDUCTION
@REUSABLE
def test_gradgradcheck(backend: str, device: str, mode: str, reduction: str, options: dict[str, float]) -> None:
    """The second derivative, by the logits and by the upstream gradient."""
    logits, upstream, targets = float64_inputs(device)
    upstream = upstream if reduction == "none" else upstream.detach()[0, 0].clone().requires_grad_()
    keywords = {"reduction": reduction, "backend": backend, **MODES[mode], **options}
    assert gradgradcheck(lambda logits: fused_mixce_loss(logits, targets, 1.0, **keywords), logits, upstream)


_BASE = Case("base", reduction="none", upstream="per_token")
ACCURACY = [
    _BASE.at(name=f"v{size}_{kind}_{mode}", shape=(FEW, size), dtype=dtype, kind=kind, mode=mode, eta=eta)
    for size in VOCAB_SIZES
    for dtype in (BFLOAT16, FLOAT16, FLOAT32)
    # The approximate instructions matter where exponentials are largest (ties), smallest (wide) and where q is near 1.
    for kind, eta in (("random", "0.3"), ("confident", "0"), ("wide", "1"), ("ties", "0.3"), ("shifted", "0.3"))
    for mode in (MODES if kind == "confident" else ("plain", "inplace_grad_in_forward"))
    if kind != "shifted" or dtype == FLOAT32
]
ACCURACY += [
    _BASE.at(name=f"v50257_{name}_{mode}", shape=(FEW, 50_257), dtype=dtype, options=options, mode=mode)
    for name, options in {
        "softcap": Options(softcap=30.0),
        "small_softcap": Options(softcap=0.5),
        "smoothing_z_loss": Options(label_smoothing=0.1, z_loss=1e-3),
        "all": Options(label_smoothing=0.1, z_loss=1e-3, softcap=15.0, logit_scale=1.3),
    }.items()
    for dtype in (BFLOAT16, FLOAT32)
    for mode in ("plain", "inplace_grad_in_forward")
]


@pytest.mark.parametrize("case", ACCURACY, ids=str)
@pytest.mark.parametrize("copies", [1, MANY_COPIES], ids=["few_rows", "many_rows"])
def test_accuracy(backend: str, device: str, case: Case, copies: int) -> None:
    """By the rule of numerics.py, for rows that several blocks share and for rows of one block each."""
    if EMULATED and copies > 1 and case.shape[-1] > VOCAB_SIZES[0]:
        pytest.skip("too slow for an emulation")
    few = build(case)
    logits = computed(few.logits.detach().to(device).repeat(copies, 1))
    targets, upstream = few.targets.to(device).repeat(copies), few.upstream.to(device).repeat(copies)
    loss = fused_mixce_loss(logits, targets, few.eta, backend=backend, **few.keywords)
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    expected = few.oracle()
    for first in sorted({0, (copies - 1) * FEW}):
        check(few, expected, loss[first : first + FEW].cpu(), grad[first : first + FEW].cpu())


MILLION = [
    _BASE.at(name=f"v1000000_{kind}_{mode}", shape=(3, 1_000_000), dtype=dtype, kind=kind, mode=mode)
    for dtype in (FLOAT32, BFLOAT16)
    for kind in ("random", "confident", "shifted")
    for mode in ("plain", "grad_in_forward", "inplace_grad_in_forward")
    if kind != "shifted" or dtype == FLOAT32
]
# Rows that lie where 16-byte vectors do not: between other memory, at odd addresses, beside a last position.
LAYOUTS = [
    _BASE.at(name=f"{layout}_{mode}", shape=shape, layout=layout, dtype=dtype, mode=mode)
    for layout, shape in (("sliced", (2, 4, 50_257)), ("sliced_columns", (6, 32_000)), ("unaligned", (6, 128_256)))
    for dtype in (FLOAT32, BFLOAT16)
    for mode in MODES
]


@pytest.mark.parametrize("case", MILLION + LAYOUTS, ids=str)
def test_accuracy_of_long_and_of_strided_rows(backend: str, device: str, case: Case) -> None:
    """A million logits a row, and rows that are not contiguous."""
    loss, grad = run(build(case).to(device), backend)
    few = build(case)
    check(few, few.oracle(), loss.cpu(), grad.cpu())


@pytest.mark.slow
@EVERY_MODE
@pytest.mark.parametrize("spare", [0, 1], ids=["contiguous", "sliced"])
def test_more_than_2_to_31_logits(backend: str, device: str, mode: str, spare: int) -> None:
    """Addresses have 64 bits: every block of FEW rows has the same bits, and the first is right."""
    gc.collect()
    row_bytes = LARGE_VOCAB_SIZE * BFLOAT16.itemsize
    needed = (LARGE_ROWS + 2 * spare) * row_bytes * (1 if "inplace" in mode else 2) + 2**30
    if device != "cpu":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < needed:
            pytest.skip(f"needs {needed / 1e9:.1f} GB of free GPU memory, {free / 1e9:.1f} GB are free")
    case = _BASE.at(name="large", shape=(FEW, LARGE_VOCAB_SIZE), dtype=BFLOAT16, kind="confident", mode=mode)
    few = build(case)
    memory = torch.empty(2, LARGE_ROWS // 2 + spare, LARGE_VOCAB_SIZE, dtype=BFLOAT16, device=device)
    logits = memory[:, : LARGE_ROWS // 2]
    logits.unflatten(1, (-1, FEW)).copy_(few.logits.detach().to(device))
    targets, upstream = (
        tensor.to(device).repeat(LARGE_ROWS // FEW).view(2, -1) for tensor in (few.targets, few.upstream)
    )
    logits = computed(logits)
    loss = fused_mixce_loss(logits, targets, few.eta, backend=backend, **few.keywords)
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    check(few, few.oracle(), loss[0, :FEW].cpu(), grad[0, :FEW].cpu())
    assert torch.equal(loss.view(-1, FEW), loss[0, :FEW].expand(LARGE_ROWS // FEW, FEW))
    assert all(torch.equal(rows, grad[0, :FEW]) for half in grad for rows in half.split(FEW))


@EVERY_MODE
@EVERY_DTYPE
@pytest.mark.parametrize("n_rows", [3, 200])
def test_same_bits_on_every_run(backend: str, device: str, mode: str, dtype: torch.dtype, n_rows: int) -> None:
    """Loss and gradient, of rows that blocks share and of rows of one block; statistics too."""
    values, targets = inputs(n_rows, 10_007, device, dtype)
    keywords = {"backend": backend, **MODES[mode]}
    first = loss_and_grad(values, targets, 0.3, **keywords)
    statistics = fused_mixce_loss(values, targets, 0.3, return_stats=True, **keywords)[1]
    for _ in range(3):
        again = loss_and_grad(values, targets, 0.3, **keywords)
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
        more = fused_mixce_loss(values, targets, 0.3, return_stats=True, **keywords)[1]
        assert all(torch.equal(*pair) for pair in zip(statistics, more, strict=True))


@EVERY_MODE
@pytest.mark.parametrize("target_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("n_rows", [5, 200])
def test_bad_targets_stop_nothing(backend: str, device: str, mode: str, target_dtype: torch.dtype, n_rows: int) -> None:
    """NaN in their own rows, the bits of before in all others, no assertion on the device, and the next call works."""
    values, targets = inputs(n_rows, 50_257, device, BFLOAT16)
    targets = targets.to(target_dtype)
    clean = loss_and_grad(values, targets, 0.3, backend=backend, **MODES[mode])
    spoiled = targets.clone()
    bad = [-1, 50_257, 2**31 - 1] + ([2**33 + 1] if target_dtype == torch.int64 else [])
    rows = [0, 2, 3, 4][: len(bad)]
    spoiled[rows] = torch.tensor(bad, dtype=target_dtype, device=device)
    loss, grad = loss_and_grad(values, spoiled, 0.3, backend=backend, **MODES[mode])
    synchronize(device)
    is_bad = torch.zeros(n_rows, dtype=torch.bool, device=device)
    is_bad[rows] = True
    assert torch.equal(loss.isnan(), is_bad)
    assert torch.equal(grad.isnan().all(-1), is_bad)
    assert torch.equal(loss[~is_bad], clean[0][~is_bad])
    assert torch.equal(grad[~is_bad], clean[1][~is_bad])
    again = loss_and_grad(values, targets, 0.3, backend=backend, **MODES[mode])
    assert all(torch.equal(*pair) for pair in zip(clean, again, strict=True))
    with pytest.raises(IndexError, match="got -1 in row 0"):
        fused_mixce_loss(values, spoiled, backend=backend, validate=True)
    synchronize(device)


# Loss, state and statistics of 16 rows, the partial results of rows that blocks share, and what eager PyTorch needs to
# weigh and to reduce, in blocks of 512 bytes at the least.
SMALL_BYTES = 512 * 1024
# Whole multiples of 2 MiB, of which the caching allocator is made: it would count the rest of a segment too.
MEMORY_SHAPE = (16, 2**19)


def peak_bytes(call: Callable[[], None], device: str) -> int:
    """By how much a call raises the allocated memory; under an emulation the sum of all that it allocates."""
    if device == "cpu":
        return sum(allocated_bytes(call))
    call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@EVERY_MODE
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "softcap": 9.0, "return_stats": True}], ids=["default", "every_result"]
)
def test_peak_memory(
    backend: str, device: str, mode: str, dtype: torch.dtype, direction: str, options: dict[str, Any]
) -> None:
    """Forward and in place O(N); out of place one gradient, and nothing else of that size."""
    values, targets = inputs(*MEMORY_SHAPE, device, dtype)
    logits = computed(values) if direction == "both" else values

    def call() -> None:
        loss = fused_mixce_loss(logits, targets, 0.5, backend=backend, **MODES[mode], **options)
        loss = loss[0] if options.get("return_stats") else loss
        if direction == "both":
            torch.autograd.grad(loss, logits)

    gradient = 0 if direction == "forward" or "inplace" in mode else values.numel() * dtype.itemsize
    assert gradient < peak_bytes(call, device) <= gradient + SMALL_BYTES


# Small, since a sanitizer slows a kernel by a factor of hundreds: one logit, less than a vector, odd tails; rows that a
# block holds, that a cluster holds, that are read again, and that blocks split.
SANITIZED_SHAPES = ((3, 1), (3, 7), (200, 515), (5, 2049), (2, 50_257), (1, 1_000_003))
SANITIZED_OPTIONS = {"default": {}, "every_option": {**OPTIONS["all"], "return_stats": True}}


@EVERY_MODE
@EVERY_DTYPE
@pytest.mark.parametrize("shape", SANITIZED_SHAPES, ids=str)
@pytest.mark.parametrize("options", SANITIZED_OPTIONS.values(), ids=SANITIZED_OPTIONS)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_sanitizer(
    backend: str,
    device: str,
    mode: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    options: dict[str, Any],
    offset: int,
) -> None:
    """Every kernel and every way through it, for compute-sanitizer to watch; the results are finite, ignored rows 0."""
    n_rows, vocab_size = shape
    values, targets = inputs(n_rows, vocab_size, device, dtype)
    memory = torch.empty(values.numel() + offset, dtype=dtype, device=device)
    logits = computed(memory[offset:].view(shape).copy_(values))
    eta = torch.rand(n_rows, device=device)
    loss = fused_mixce_loss(logits, targets, eta, reduction="none", backend=backend, **MODES[mode], **options)
    loss = loss[0] if options.get("return_stats") else loss
    # Not all 1, so that a gradient of the forward is scaled.
    upstream = torch.linspace(-1, 1, n_rows, device=device, dtype=loss.dtype)
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    synchronize(device)
    assert loss.dtype == accumulate_dtype(dtype)
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    assert (grad[targets == -100] == 0).all()


def test_sanitized_shapes_take_every_way(backend: str, device: str) -> None:
    """Of the CUDA kernels on this device: rows held by a block and by a cluster, read again, and split."""
    if backend != "cuda":
        pytest.skip("of the CUDA kernels")
    from mixce_kernels import _C
    from mixce_kernels.backends import cuda
    from mixce_kernels.backends.cuda_launch import grad_in_forward_launch, rows_launch

    properties = cuda._device(0)
    state_bytes = _C.cuda_state_bytes(0)
    forwards = [rows_launch(n, 4 * size, properties) for n, size in SANITIZED_SHAPES]
    both = [grad_in_forward_launch(n, 4 * size, state_bytes, properties) for n, size in SANITIZED_SHAPES]
    assert {launch.parts > 1 for launch in forwards} == {False, True}
    assert {launch.held_bytes > 0 for launch in both} == {False, True}
    assert any(launch.held_bytes > 0 and launch.parts == 1 for launch in both)
    if properties.arch >= 90:
        assert any(launch.held_bytes > 0 and launch.parts > 1 for launch in both)
