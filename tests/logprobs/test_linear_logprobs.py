"""Log-probabilities of hidden states: held to the oracle by the accuracy rule, in chunks, and in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mixce_kernels import fused_linear_token_logprobs
from support.allocations import allocated_bytes
from support.numerics import accumulate_dtype, assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LinearLogprobs:
    """One call of hidden states [12, D] and weight [V, D]."""

    name: str
    dtype: torch.dtype
    temperature: Any = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    bias: bool = True
    height: float = 1.0  # of the logits
    chunk_rows: int = 5
    upstreams: tuple[bool, bool] = (True, True)
    ignored: bool = True
    vocab_size: int = 131

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


CASES = [
    replace(one, dtype=dtype)
    for dtype in DTYPES
    for one in (
        LinearLogprobs("plain", dtype),
        LinearLogprobs("no_bias_temperature", dtype, temperature=0.7, bias=False),
        LinearLogprobs("per_token", dtype, temperature="per_token", chunk_rows=1),
        LinearLogprobs("softcap", dtype, temperature="per_token", softcap=3.0, logit_scale=1.4, ignored=False),
        LinearLogprobs("sure", dtype, height=12.0, temperature=0.9),
        LinearLogprobs("logprobs_alone", dtype, upstreams=(True, False)),
        LinearLogprobs("entropy_alone", dtype, upstreams=(False, True), chunk_rows=100),
        LinearLogprobs("wide", dtype, vocab_size=6200),
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(case: LinearLogprobs, backend: str, device: str) -> None:
    """Both results, and the gradients by hidden states, weight and bias."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(3, 4, 24), (case.vocab_size, 24)] + [(case.vocab_size,)] * case.bias
    factor = (case.height / 24**0.5) ** 0.5
    leaves = [(torch.randn(shape, generator=generator) * factor).to(case.dtype) for shape in shapes]
    targets = torch.randint(case.vocab_size, (3, 4), generator=generator)
    if case.ignored:
        targets[1, ::2] = -100
        leaves[0][1, 0] = torch.nan
    temperature: Any = case.temperature
    if temperature == "per_token":
        temperature = torch.rand(3, 4, generator=generator) + 0.4
    accumulate = accumulate_dtype(case.dtype)
    upstream = [torch.randn(3, 4, generator=generator).to(accumulate) for _ in range(2)]
    keywords = {"softcap": case.softcap, "logit_scale": case.logit_scale, "return_entropy": True}

    def results(tensors: list[Tensor], **others: Any) -> tuple[list[Tensor], list[Tensor]]:
        tensors = [one.detach().requires_grad_() for one in tensors]
        hidden, weight, *bias = tensors
        where = hidden.device
        found = fused_linear_token_logprobs(
            hidden, weight, targets.to(where), bias=bias[0] if bias else None,
            temperature=temperature.to(where) if isinstance(temperature, Tensor) else temperature, **keywords, **others,
        )  # fmt: skip
        chosen = [i for i in range(2) if case.upstreams[i]]
        grads = [upstream[i].to(where, found[i].dtype) for i in chosen]
        found_grads = torch.autograd.grad([found[i] for i in chosen], tensors, grads)
        return [one.detach().cpu() for one in found], [one.cpu() for one in found_grads]

    expected, expected_grads = results([one.double() for one in leaves], backend="reference")
    plain, plain_grads = results([one.to(accumulate) for one in leaves], backend="reference")
    budget = case.chunk_rows * case.vocab_size * accumulate.itemsize
    found, grads = results([one.to(device) for one in leaves], backend=backend, max_chunk_bytes=budget)
    largest = max(float(one.abs().max()) for one in upstream) * case.logit_scale
    largest /= float(temperature.min()) if isinstance(temperature, Tensor) else temperature
    for name, one, want, measure in zip(("log-probability", "entropy"), found, expected, plain, strict=True):
        assert_accurate(name, one, want.numpy(), measure, max(1.0, case.height))
    for name, grad, want, measure, other in zip(
        ("hidden", "weight", "bias"), grads, expected_grads, plain_grads, (leaves[1], leaves[0], None), strict=False
    ):
        scale = largest * (1.0 if other is None else float(other.nan_to_num().abs().max()))
        assert_accurate(name, grad, want.numpy(), measure.to(case.dtype), scale * max(1.0, case.height))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_that_of_a_chunk(dtype: torch.dtype) -> None:
    """No tensor of the logits' size, forward or backward."""
    hidden = torch.randn(512, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(4096, 16, dtype=dtype, requires_grad=True)
    targets = torch.randint(4096, (512,))
    budget = 2**20

    def call() -> None:
        logprobs, entropy = fused_linear_token_logprobs(
            hidden, weight, targets, return_entropy=True, max_chunk_bytes=budget, backend="cpu"
        )
        (logprobs.sum() + entropy.sum()).backward()

    assert allocated_bytes(call)[0] <= 1.1 * budget


def test_autocast_takes_operands_of_its_type() -> None:
    hidden, weight = torch.randn(6, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    targets = torch.randint(40, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropy = fused_linear_token_logprobs(hidden, weight, targets, return_entropy=True)
    rounded = [one.detach().bfloat16().double() for one in (hidden, weight)]
    expected = fused_linear_token_logprobs(*rounded, targets, return_entropy=True, backend="reference")
    torch.testing.assert_close((logprobs.double(), entropy.double()), expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(logprobs.sum() + entropy.sum(), (hidden, weight))
    assert [grad.dtype for grad in grads] == [torch.float32] * 2
