"""The products of half-precision operands on tensor cores, which only a GPU has, over stand-ins of its operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import EMULATED
from mixce_kernels import fused_linear_mixce_loss
from mixce_kernels.linear import chunks, matmul
from support.linear_cases import LINEAR, LinearCase, build_linear, check_linear

pytestmark = pytest.mark.skipif(EMULATED is not None, reason="no backend is tried here")
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


@pytest.mark.parametrize("case", HALF, ids=str)
def test_accuracy(case: LinearCase, tensor_cores: None) -> None:
    """The gradient of the logits is an operand in half precision, and the rule holds all the same."""
    inputs = build_linear(case)
    keywords: dict[str, Any] = {**inputs.keywords, "backend": "cpu", "bias": inputs.bias}
    loss = fused_linear_mixce_loss(inputs.hidden, inputs.weight, inputs.tokens.targets, inputs.tokens.eta, **keywords)
    check_linear(inputs, loss, list(torch.autograd.grad(loss, inputs.leaves, inputs.tokens.upstream)))


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


def test_who_multiplies() -> None:
    weight = torch.empty(4, 4, dtype=torch.bfloat16)
    assert isinstance(matmul.products(weight, None, torch.bfloat16, 1000), matmul.TiledProducts)
    assert matmul.products(weight.float(), None, torch.float32, 1000).bytes_besides(4) == 0


def test_tiles_of_a_weight_that_is_converted_fit_their_memory() -> None:
    """The float32 copy of a tile, on its way through bfloat16, counts as memory of the chunk."""
    weight = torch.empty(4000, 4096, dtype=torch.bfloat16)
    for max_bytes in (1, 10**6, 20 * 2**20, 2**30):
        chosen = matmul.products(weight, None, torch.bfloat16, max_bytes)
        assert isinstance(chosen, matmul.TiledProducts)
        assert 1 <= chosen.tile <= 2048
        assert chosen.bytes_besides(len(weight)) == 6 * 4096 * chosen.tile
        assert chosen.bytes_besides(len(weight)) <= max(max_bytes, 6 * 4096)
