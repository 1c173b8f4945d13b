"""A token's numbers do not depend on which other tokens are in the call: ratios of two policies are taken of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import EMULATED
from mixce_kernels import fused_linear_token_logprobs, fused_token_logprobs

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
ROWS = 24 if EMULATED else 96


def numbers(call: Any, leaf: Tensor, rows: slice) -> list[Tensor]:
    """Log-probabilities, entropies and gradients of these rows in a call of their own."""
    part = leaf.detach()[rows].clone().requires_grad_()
    logprobs, entropy = call(part, rows)
    (grad,) = torch.autograd.grad([logprobs, entropy], part, [1.5 + 0 * logprobs, 0.3 + 0 * entropy])
    return [one.detach() for one in (logprobs, entropy, grad)]


@DTYPES
@pytest.mark.parametrize("vocab_size", [515, 9001, 512, 9000])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_logits_bit_for_bit(
    threads: int, vocab_size: int, dtype: torch.dtype, kernels: str, device: str
) -> None:
    """Alone, in other batches, in another place, with ignored neighbours."""
    on_gpu = EMULATED or device != "cpu"
    if on_gpu and vocab_size % 8 > 0:
        pytest.skip("rows that lie otherwise to 16 bytes are walked otherwise")
    if EMULATED and (threads > 1 or vocab_size > 1000):
        pytest.skip("emulated kernels are slow, and have no threads of the host's")
    logits = (4 * torch.randn(ROWS, vocab_size, device=device)).to(dtype)
    targets = torch.randint(vocab_size, (ROWS,), device=device)
    temperature = torch.rand(ROWS, device=device) + 0.5

    def call(part: Tensor, rows: slice, of: Tensor = targets) -> Any:
        return fused_token_logprobs(part, of[rows], temperature=temperature[rows], return_entropy=True, backend=kernels)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = numbers(call, logits, slice(0, ROWS))
        for rows in (slice(0, 1), slice(5, 6), slice(3, ROWS // 2), slice(ROWS - 2, ROWS)):
            for one, other in zip(numbers(call, logits, rows), whole, strict=True):
                assert torch.equal(one, other[rows]), rows
        ignored = targets.clone()
        ignored[1::2] = -100
        some = numbers(lambda part, rows: call(part, rows, ignored), logits, slice(0, ROWS))
        for one, other in zip(some, whole, strict=True):
            assert torch.equal(one[::2], other[::2])
    finally:
        torch.set_num_threads(before)


@DTYPES
def test_hidden_states_by_the_products_that_are_alike(dtype: torch.dtype, kernels: str, device: str) -> None:
    """A row's log-probabilities differ by its logits' roundings alone: the BLAS may add up in another order."""
    hidden = torch.randn(ROWS, 64, device=device).to(dtype)
    weight = (torch.randn(515, 64, device=device) / 8).to(dtype)
    targets = torch.randint(515, (ROWS,), device=device)

    def call(part: Tensor, rows: slice, budget: int | None = None) -> Any:
        return fused_linear_token_logprobs(
            part, weight, targets[rows], return_entropy=True, max_chunk_bytes=budget, backend=kernels
        )

    whole = numbers(call, hidden, slice(0, ROWS))
    assert all(torch.equal(*both) for both in zip(numbers(call, hidden, slice(0, ROWS)), whole, strict=True))
    # A logit is a sum of 64 products of about 1/8, of which each order is off by less than this.
    bound = 16 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for rows in (slice(0, 1), slice(3, ROWS // 2), slice(ROWS - 2, ROWS)):
        for budget in (None, 8 * 515 * 8):
            found = numbers(lambda part, rows, budget=budget: call(part, rows, budget), hidden, rows)
            for one, other in zip(found[:2], whole[:2], strict=True):
                torch.testing.assert_close(one, other[rows], rtol=bound, atol=bound)
