"""How much the linear loss allocates: gradients, one chunk of logits, and little else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import INTERPRETED
from mixce_kernels import fused_linear_mixce_loss
from support.allocations import allocated_bytes

ROWS, HIDDEN_SIZE, VOCAB_SIZE = 64, 32, 10_000
BUDGET = 8 * VOCAB_SIZE * 4 + 1000
# Each of the others: per-token numbers, a chunk's rows and statistics, padding of its rows, a tile of its logits.
BESIDES = 100_000

pytestmark = pytest.mark.skipif(INTERPRETED, reason="an interpreter allocates as it likes")


def sizes(dtype: torch.dtype, wanted: tuple[bool, bool] = (True, True), **keywords: Any) -> list[int]:
    """Of all allocations of a forward and its backward, largest first."""
    hidden = torch.randn(ROWS, HIDDEN_SIZE).to(dtype).requires_grad_(wanted[0])
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE).to(dtype).requires_grad_(wanted[1])
    targets = torch.randint(VOCAB_SIZE, (ROWS,))
    targets[::5] = -100
    leaves = [one for one in (hidden, weight) if one.requires_grad]

    def run() -> None:
        loss = fused_linear_mixce_loss(hidden, weight, targets, backend="cpu", max_chunk_bytes=BUDGET, **keywords)
        if leaves:
            torch.autograd.grad(loss.sum(), leaves)

    return allocated_bytes(run)


@pytest.mark.parametrize("keywords", [{}, {"reduction": "sum", "return_stats": False}], ids=["mean", "sum"])
def test_forward_and_backward(keywords: dict[str, Any]) -> None:
    """The weight's gradient, the hidden states' gradient, one chunk of logits for all chunks."""
    weight_grad, chunk, hidden_grad, *rest = sizes(torch.float32, **keywords)
    assert weight_grad == 4 * VOCAB_SIZE * HIDDEN_SIZE
    assert BUDGET / 2 < chunk <= BUDGET + BESIDES
    assert hidden_grad < BESIDES
    assert max(rest) < BESIDES


def test_recomputation() -> None:
    """Reduction "none": a chunk for the forward, and one and the gradients for the backward."""
    weight_grad, *chunks, hidden_grad = sizes(torch.float32, reduction="none")[:4]
    assert weight_grad == 4 * VOCAB_SIZE * HIDDEN_SIZE
    assert all(BUDGET / 2 < chunk <= BUDGET + BESIDES for chunk in chunks)
    assert hidden_grad < BESIDES


@pytest.mark.parametrize("wanted", [(True, False), (False, False)], ids=["frozen_head", "no_gradient"])
def test_nothing_for_a_gradient_that_nobody_wants(wanted: tuple[bool, bool]) -> None:
    chunk, *rest = sizes(torch.float32, wanted)
    assert BUDGET / 2 < chunk <= BUDGET + BESIDES
    assert max(rest) < BESIDES


def test_half_precision() -> None:
    """Sums of gradients in float32, the gradients themselves, and tiles of the weight within the chunk's budget."""
    found = sizes(torch.bfloat16)
    assert found[:2] == [4 * VOCAB_SIZE * HIDDEN_SIZE, 2 * VOCAB_SIZE * HIDDEN_SIZE]
    assert all(size <= BUDGET + BESIDES for size in found[2:])
