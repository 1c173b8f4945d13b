"""Who multiplies; half-precision operands on tensor cores, over stand-ins of a GPU's operators, and by MKL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import EMULATED
from mixce_kernels import fused_linear_mixce_loss
from mixce_kernels.linear import chunks, matmul, mkl
from support.linear_cases import LINEAR, LinearCase, build_linear, check_linear

pytestmark = pytest.mark.skipif(EMULATED is not None, reason="no backend is tried here")
needs_mkl = pytest.mark.skipif(mkl._gemm() is None, reason="this PyTorch has no MKL")
HALF = [
    case
    for case in LINEAR
    if case.plain.dtype in (torch.bfloat16, torch.float16) and case.plain.reduction in ("mean", "none")
]


def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """Half-precision operands and a float32 result, as `torch.mm` has it on CUDA; operands of other types fail."""
    assert a.dtype == b.dtype
    assert a.dtype in (torch.bfloat16, torch.float16)
    assert out_dtype == torch.float32
    return torch.mm(a.float(), b.float(), out=out)


def addmm(c: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    assert c.dtype == out.dtype == torch.float32
    return out.copy_(c + mm(a, b, out_dtype))


@pytest.fixture(params=[True, False], ids=["addmm", "mm_and_add"])
def tensor_cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision calls take `MixedProducts`, on a torch whose addmm does or does not add to float32."""
    monkeypatch.setattr(torch.ops.aten.mm, "dtype", mm)
    monkeypatch.setattr(torch.ops.aten.mm, "dtype_out", mm)
    monkeypatch.setattr(torch.ops.aten.addmm, "dtype_out", addmm)
    monkeypatch.setattr(matmul, "_adds_to_float32", lambda dtype: request.param)
    monkeypatch.setattr(chunks, "products", lambda *args: matmul.MixedProducts(*args[:3]))


@pytest.fixture
def by_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls in bfloat16 take `MklProducts`, on any CPU."""
    monkeypatch.setattr(mkl, "has_bfloat16", lambda: True)


def _check_accuracy(case: LinearCase) -> None:
    inputs = build_linear(case)
    keywords: dict[str, Any] = {**inputs.keywords, "backend": "cpu", "bias": inputs.bias}
    loss = fused_linear_mixce_loss(inputs.hidden, inputs.weight, inputs.tokens.targets, inputs.tokens.eta, **keywords)
    check_linear(inputs, loss, list(torch.autograd.grad(loss, inputs.leaves, inputs.tokens.upstream)))


@pytest.mark.parametrize("case", HALF, ids=str)
def test_accuracy(case: LinearCase, tensor_cores: None) -> None:
    """The gradient of the logits is an operand in half precision, and the rule holds all the same."""
    _check_accuracy(case)


@needs_mkl
@pytest.mark.parametrize("case", [case for case in HALF if case.plain.dtype == torch.bfloat16], ids=str)
def test_accuracy_of_mkl(case: LinearCase, by_mkl: None) -> None:
    """As above; a CPU without matrix units computes the same another way."""
    _check_accuracy(case)


@needs_mkl
@pytest.mark.parametrize("hidden_size", [1, 1024, 2500])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n_rows", [1, 3, 40])
def test_logits_of_mkl_are_not_rounded(n_rows: int, transposed: bool, hidden_size: int) -> None:
    """As near to the exact product as twice that of float32 operands, sums of many terms included."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n_rows, hidden_size, generator=generator).bfloat16()
    weight = torch.rand(5000, hidden_size, generator=generator).bfloat16()
    weight = weight.t().contiguous().t() if transposed else weight
    bias = torch.randn(5000, generator=generator).bfloat16()
    logits = matmul.padded_empty(n_rows, 5000, torch.float32, torch.device("cpu"))
    matmul.MklProducts(weight, bias).logits(hidden, logits)
    exact = hidden.double() @ weight.double().t() + bias.double()
    in_float32 = (torch.mm(hidden.float(), weight.float().t()) + bias.float() - exact).abs().max()
    assert (logits - exact).abs().max() <= 2 * in_float32 + torch.finfo(torch.float32).eps * exact.abs().max()


@needs_mkl
def test_the_gradient_is_rounded_in_its_own_memory() -> None:
    grads = matmul.padded_empty(700, 5000, torch.float32, torch.device("cpu")).normal_()
    expected = grads.bfloat16()
    operand = matmul.MklProducts(torch.empty(5000, 8, dtype=torch.bfloat16), None).operand(grads)
    assert torch.equal(operand, expected)
    assert operand.data_ptr() == grads.data_ptr()
    assert mkl.takes(operand)


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_without_mkl_nothing_is_asked_of_it(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of PyTorch without MKL, or with its library elsewhere."""

    def library(path: str) -> None:
        raise error(path)

    mkl._gemm.cache_clear()
    monkeypatch.setattr(mkl.ctypes, "CDLL", library)
    try:
        assert not mkl.has_bfloat16()
    finally:
        mkl._gemm.cache_clear()


def test_an_infinite_upstream_gradient_is_no_number(tensor_cores: None) -> None:
    """A scaler of gradients must see that a step overflowed, also where float16 is normalised; other rows do not."""
    hidden, weight = (torch.randn(n, 8, dtype=torch.float16, requires_grad=True) for n in (5, 40))
    targets = torch.tensor([0, 1, -100, 3, 4])
    for bad in (torch.inf, torch.nan):
        loss = fused_linear_mixce_loss(hidden, weight, targets, reduction="none", backend="cpu")
        grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight), torch.tensor([1.0, bad, bad, 1.0, 1.0]))
        assert grad_hidden.isfinite().all(1).tolist() == [True, False, True, True, True]
        assert not grad_weight.isfinite().all()


def test_rows_begin_at_boundaries() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        rows = matmul.padded_empty(3, 50257, dtype, torch.device("cpu"))
        assert rows.shape == (3, 50257)
        assert rows.stride(0) * dtype.itemsize % 128 == 0
        assert rows.stride(0) - 50257 < 128


@pytest.mark.parametrize("has_units", [True, False])
def test_who_multiplies(has_units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """MKL where this CPU has matrix units for bfloat16, no gradient is float32, and the weight's rows are whole."""
    monkeypatch.setattr(mkl, "has_bfloat16", lambda: has_units)
    weight = torch.empty(6, 4, dtype=torch.bfloat16)
    by_mkl = matmul.MklProducts if has_units else matmul.TiledProducts
    for one, compute_dtype, expected in (
        (weight, torch.bfloat16, by_mkl),
        (weight.t(), torch.bfloat16, by_mkl),
        (weight[:, :3], torch.bfloat16, by_mkl),
        (weight[:, ::2], torch.bfloat16, matmul.TiledProducts),
        (weight.float(), torch.bfloat16, matmul.TiledProducts),
        (weight.float(), torch.float32, matmul.TiledProducts),
        (weight.half(), torch.float16, matmul.TiledProducts),
        (weight.double(), torch.float64, matmul.TiledProducts),
    ):
        assert type(matmul.products(one, None, compute_dtype, 1000, compute_dtype)) is expected
    # Float32 hidden states under autocast have a float32 gradient.
    products = matmul.products(weight, None, torch.bfloat16, 1000, torch.float32)
    assert type(products) is matmul.TiledProducts
    assert matmul.products(weight.float(), None, torch.float32, 1000, torch.float32).bytes_besides(4) == 0


@needs_mkl
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 5, 4), (3, 1, 4), (3, 5, 1), (1, 1, 1)])
def test_dimensions_of_one_have_any_stride(rows: int, inner: int, columns: int) -> None:
    """PyTorch calls these contiguous, and copies none of them."""

    def with_strides(n: int, m: int) -> Tensor:
        return torch.randn(n, m).bfloat16().as_strided((n, m), (m if n > 1 else 0, 1 if m > 1 else 3))

    a, b, out = with_strides(rows, inner), with_strides(inner, columns), torch.empty(rows, columns)
    mkl.multiply(a, b, out)
    torch.testing.assert_close(out, a.float() @ b.float())
    mkl.multiply(a, b, out, accumulate=True)
    torch.testing.assert_close(out, 2 * (a.float() @ b.float()))


def test_tiles_of_a_weight_that_is_converted_fit_their_memory() -> None:
    """The float32 copy of a tile, on its way through bfloat16, counts as memory of the chunk."""
    weight = torch.empty(4000, 4096, dtype=torch.bfloat16)
    for max_bytes in (1, 10**6, 20 * 2**20, 2**30):
        chosen = matmul.TiledProducts(weight, None, torch.bfloat16, max_bytes)
        assert 1 <= chosen.tile <= 2048
        assert chosen.bytes_besides(len(weight)) == 6 * 4096 * chosen.tile
        assert chosen.bytes_besides(len(weight)) <= max(max_bytes, 6 * 4096)
