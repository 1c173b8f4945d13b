"""The losses of a sharded vocabulary on an NVIDIA GPU, as test_gpu_runtime.py, in a group of one rank with nccl.

More ranks than one want more GPUs; their numbers are test_vocab_parallel.py's and test_linear_parallel.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_gpu_runtime import assert_same_bits, captured, stand_in, without_synchronisation
from torch import Tensor

from conftest import EMULATED, GPU_BACKENDS, INTERPRETED
from mixce_kernels import fused_linear_mixce_loss, fused_mixce_loss, vocab_parallel_mixce_loss
from support.cases import BFLOAT16, FLOAT32

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="an interpreter knows neither graphs nor streams"),
    pytest.mark.usefixtures(stand_in.__name__),
]
ROWS, HIDDEN_SIZE, VOCAB_SIZE, PADDING = 42, 64, 1003, 5
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "every": {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "logit_scale": 1.3, "return_stats": True},
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A group of one rank."""
    dist.init_process_group("gloo" if EMULATED else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=GPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The backends of a GPU."""
    return request.param


def step_of(linear: bool, backend: str, device: str, dtype: torch.dtype, options: dict[str, Any]) -> Callable[..., Any]:
    """A forward and a backward of a padded vocabulary; some tokens are ignored."""
    width = HIDDEN_SIZE if linear else VOCAB_SIZE + PADDING
    values = torch.randn(ROWS, width, device=device).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB_SIZE + PADDING, HIDDEN_SIZE, device=device).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB_SIZE, (ROWS,), device=device)
    targets[::3] = -100
    eta = torch.rand(ROWS, device=device)
    leaves = (values, weight) if linear else (values,)

    def step(sharded: bool = True) -> tuple[Tensor, ...]:
        where = {"group": dist.group.WORLD, "vocab_start": 0, "vocab_size": VOCAB_SIZE} if sharded else {}
        if linear:
            rows = weight if sharded else weight[:VOCAB_SIZE]
            found = fused_linear_mixce_loss(values, rows, targets, eta, backend=backend, **where, **options)
        elif sharded:
            found = vocab_parallel_mixce_loss(values, targets, eta, backend=backend, **where, **options)
        else:
            found = fused_mixce_loss(values[:, :VOCAB_SIZE], targets, eta, backend=backend, **options)
        loss, stats = found if options.get("return_stats") else (found, ())
        return loss.detach(), *stats, *torch.autograd.grad(loss * 0.5, leaves)

    return step


@DTYPES
@EVERY_OPTION
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_one_rank_is_one_process(
    backend: str, device: str, linear: bool, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """The loss and the gradients of a vocabulary that is whole."""
    step = step_of(linear, backend, device, dtype, options)
    for got, expected in zip(step(), step(sharded=False), strict=True):
        epsilon = torch.finfo(expected.dtype).eps if expected.dtype != torch.bool else 0.0
        torch.testing.assert_close(got, expected, rtol=4 * epsilon, atol=1e-6)


@DTYPES
@EVERY_OPTION
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_nothing_synchronises_but_the_first_call(
    backend: str, device: str, linear: bool, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Whose ranks compare their calls."""
    step = step_of(linear, backend, device, dtype, options)
    step()
    with without_synchronisation():
        results = step()
    assert all(result.isfinite().all() for result in results)


@DTYPES
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_graph_replays(backend: str, device: str, linear: bool, dtype: torch.dtype) -> None:
    """With its collective: the bits of an eager call."""
    step = step_of(linear, backend, device, dtype, {})
    step()
    replay, outputs = captured(step)
    replay()
    assert_same_bits(tuple(tensor.clone() for tensor in outputs), step())
