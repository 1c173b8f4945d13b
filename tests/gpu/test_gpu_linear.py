"""The linear loss on an NVIDIA GPU, as test_gpu_runtime.py: nothing synchronises, and a graph replays it.

Its accuracy is that of test_linear.py, whose backends are a GPU's where there is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_gpu_runtime import SYNCHRONISES, assert_same_bits, captured, stand_in, without_synchronisation
from torch import Tensor

from conftest import GPU_BACKENDS, INTERPRETED
from mixce_kernels import fused_linear_mixce_loss
from support.cases import BFLOAT16, FLOAT32

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="an interpreter knows neither graphs nor streams"),
    pytest.mark.usefixtures(stand_in.__name__),
]
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
ROWS, HIDDEN_SIZE, VOCAB_SIZE = 42, 64, 1003


def inputs(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and targets; some tokens are ignored, and hold no numbers."""
    hidden = torch.randn(ROWS, HIDDEN_SIZE, device=device).to(dtype)
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, device=device).to(dtype)
    targets = torch.randint(VOCAB_SIZE, (ROWS,), device=device)
    targets[::3] = -100
    hidden[::3] = torch.nan
    return hidden.requires_grad_(), weight.requires_grad_(), torch.zeros_like(weight[:, 0]).requires_grad_(), targets


@pytest.fixture(params=GPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The backends of a GPU."""
    return request.param


@pytest.fixture(params=["chunks", "tiles"])
def path(request: pytest.FixtureRequest, backend: str) -> str:
    """Those that the backend has."""
    if request.param == "tiles" and backend != "triton":
        pytest.skip("path 'tiles' is Triton's alone")
    return request.param


@DTYPES
@REDUCTIONS
def test_nothing_synchronises(backend: str, path: str, device: str, dtype: torch.dtype, reduction: str) -> None:
    """Forward and backward in several chunks leave the host free; `validate` does not, and counts what is left."""
    hidden, weight, bias, targets = inputs(device, dtype)
    eta = torch.rand(ROWS, device=device)

    def call(**keywords: Any) -> tuple[Tensor, ...]:
        loss = fused_linear_mixce_loss(
            hidden, weight, targets, eta, bias=bias, reduction=reduction, max_chunk_bytes=100_000, path=path,
            backend=backend, **keywords,
        )  # fmt: skip
        return torch.autograd.grad((loss * 0.5).sum(), (hidden, weight, bias))

    call()  # compiles and loads the kernels
    with without_synchronisation():
        grads = call()
    assert all(grad.isfinite().all() for grad in grads)
    with pytest.raises(RuntimeError, match=SYNCHRONISES), without_synchronisation():
        call(validate=True)


@DTYPES
@REDUCTIONS
def test_graph_replays_with_changed_inputs(
    backend: str, path: str, device: str, dtype: torch.dtype, reduction: str
) -> None:
    """Hidden states, weight and targets are read anew by each replay: the bits of an eager call."""
    hidden, weight, bias, targets = inputs(device, dtype)

    def step() -> tuple[Tensor, ...]:
        loss = fused_linear_mixce_loss(
            hidden, weight, targets, bias=bias, reduction=reduction, max_chunk_bytes=100_000, path=path, backend=backend
        ).sum()
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))

    replay, outputs = captured(step)
    seen = set()
    for change in (lambda: None, lambda: weight.mul_(0.5), lambda: targets.copy_(targets.roll(3))):
        with torch.no_grad():
            change()
        replay()
        assert_same_bits(tuple(tensor.clone() for tensor in outputs), step())
        seen.add(outputs[0].item())
    assert len(seen) == 3
