"""How much is allocated: measured by the profiler, operator by operator, against what was promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import INTERPRETED
from mixce_kernels import fused_mixce_loss
from support.allocations import allocated_bytes
from support.cases import MODES
from support.inputs import computed

ROWS, VOCAB_SIZE = 16, 40_000
# Per token: loss, five numbers of state, six statistics, and what eager PyTorch needs to weigh and to reduce.
PER_TOKEN_BYTES = 400


def logits(dtype: torch.dtype) -> Tensor:
    """More bytes than all per-token numbers together, [ROWS, VOCAB_SIZE]."""
    return torch.randn(ROWS, VOCAB_SIZE).to(dtype)


pytestmark = pytest.mark.skipif(INTERPRETED, reason="an interpreter allocates as it likes")
OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0, "logit_scale": 2.0, "return_stats": True},
        {"token_weights": torch.rand(ROWS), "reduction": "sum"},
    ],
    ids=["default", "every_option", "weighted"],
)  # fmt: skip
HALF_TOO = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def call(values: Tensor, mode: str, options: dict[str, Any], *, backward: bool) -> Any:
    """A forward, or a forward and its backward, on fresh contents of the same memory."""
    targets = torch.randint(VOCAB_SIZE, (ROWS,))
    leaf = computed(values.detach()) if backward else values.detach()

    def run() -> None:
        loss = fused_mixce_loss(leaf, targets, 0.5, backend="cpu", **MODES[mode], **options)
        loss = loss[0] if options.get("return_stats") else loss
        if backward:
            torch.autograd.grad(loss, leaf)

    return run


def test_the_measurement_sees_what_eager_pytorch_allocates() -> None:
    """Otherwise the tests below could not fail."""
    values = computed(logits(torch.bfloat16))
    targets = torch.randint(VOCAB_SIZE, (ROWS,))
    sizes = allocated_bytes(lambda: torch.nn.functional.cross_entropy(values.float(), targets).backward())
    # The float32 copy, the log-probabilities, their gradient, and its float32 and bfloat16 forms.
    assert sum(size >= ROWS * VOCAB_SIZE * 2 for size in sizes) >= 3


@HALF_TOO
@OPTIONS
@pytest.mark.parametrize("mode", MODES)
def test_forward_without_gradient_allocates_per_token(dtype: torch.dtype, options: dict[str, Any], mode: str) -> None:
    """O(N): also of a slice, which is not copied."""
    sizes = allocated_bytes(call(logits(dtype), mode, options, backward=False))
    assert 0 < sum(sizes) <= ROWS * PER_TOKEN_BYTES


@HALF_TOO
@OPTIONS
@pytest.mark.parametrize("mode", ["inplace", "inplace_grad_in_forward"])
def test_in_place_allocates_per_token(dtype: torch.dtype, options: dict[str, Any], mode: str) -> None:
    """O(N) for forward and backward together."""
    sizes = allocated_bytes(call(logits(dtype), mode, options, backward=True))
    assert 0 < sum(sizes) <= 2 * ROWS * PER_TOKEN_BYTES


@HALF_TOO
@OPTIONS
@pytest.mark.parametrize("mode", ["plain", "grad_in_forward"])
def test_out_of_place_allocates_one_gradient(dtype: torch.dtype, options: dict[str, Any], mode: str) -> None:
    """One N x V of the logits' type, and nothing else of that size."""
    gradient, *others = allocated_bytes(call(logits(dtype), mode, options, backward=True))
    assert gradient == ROWS * VOCAB_SIZE * dtype.itemsize
    assert sum(others) <= 2 * ROWS * PER_TOKEN_BYTES


@HALF_TOO
def test_slices_are_not_copied(dtype: torch.dtype) -> None:
    """`logits[:, :-1]` is read where it lies."""
    values = torch.randn(2, ROWS // 2 + 1, VOCAB_SIZE).to(dtype)[:, :-1]
    targets = torch.randint(VOCAB_SIZE, (2, ROWS // 2))
    sizes = allocated_bytes(lambda: fused_mixce_loss(values, targets, backend="cpu"))
    assert 0 < sum(sizes) <= ROWS * PER_TOKEN_BYTES


@pytest.mark.parametrize("mode", MODES)
def test_autocast_makes_no_copy(mode: str) -> None:
    """Under autocast half-precision logits are read as they are."""
    values = logits(torch.bfloat16)
    run = call(values, mode, {}, backward=True)

    def autocast() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            run()

    n_gradients = 0 if "inplace" in mode else 1
    sizes = allocated_bytes(autocast)
    assert sum(size >= ROWS * VOCAB_SIZE for size in sizes) == n_gradients
