"""The linear loss on every backend: loss and gradients of every case, by the accuracy rule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from conftest import INTERPRETED
from mixce_kernels import MixCEStats, fused_linear_mixce_loss, linear_mixce_loss_reference
from mixce_kernels.linear.chunks import CHUNK_BYTES, default_chunk_bytes, rows_per_chunk
from mixce_kernels.linear.matmul import TiledProducts
from support.cases import BFLOAT16
from support.linear_cases import LINEAR, LinearCase, LinearInputs, build_linear, check_linear
from support.numerics import assert_accurate, to_numpy
from support.oracle import np

# An interpreted kernel costs by the operation, and `test_loss` has tried the rows' own: every eighth that is not large.
CASES = [case for case in LINEAR if math.prod(case.plain.shape) <= 10_000][::8] if INTERPRETED else LINEAR


def run(inputs: LinearInputs, backend: str, device: str) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients by the public function."""
    leaves = [leaf.detach().to(device).requires_grad_() for leaf in inputs.leaves]
    if device == "cpu":
        leaves = inputs.leaves
    tokens = inputs.tokens.to(device)
    bias = leaves[2] if len(leaves) > 2 else None
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.keywords.items()}
    loss = fused_linear_mixce_loss(*leaves[:2], tokens.targets, tokens.eta, bias=bias, backend=backend, **moved)
    grads = torch.autograd.grad(loss, leaves, tokens.upstream)
    return loss.cpu(), [grad.cpu() for grad in grads]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients(case: LinearCase, backend: str, device: str) -> None:
    inputs = build_linear(case)
    loss, grads = run(inputs, backend, device)
    # The interpreter truncates where a device rounds to bfloat16.
    check_linear(inputs, loss, grads, 1 if INTERPRETED and case.plain.dtype == BFLOAT16 else 0)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.plain.name in ("default", "all", "masked") or 0 in case.plain.shape],
    ids=str,
)
def test_statistics(case: LinearCase, backend: str, device: str) -> None:
    """With and without gradients, in chunks; those of ignored tokens are 0."""
    inputs = build_linear(case)
    expected, _ = inputs.oracle()
    for with_grad in (False, True):
        hidden, weight = (leaf.detach().to(device).requires_grad_(with_grad) for leaf in inputs.leaves[:2])
        bias = None if inputs.bias is None else inputs.bias.detach().to(device)
        tokens = inputs.tokens.to(device)
        _, stats = fused_linear_mixce_loss(
            hidden, weight, tokens.targets, tokens.eta, bias=bias, backend=backend, return_stats=True, **inputs.keywords
        )
        assert isinstance(stats, MixCEStats)
        for name, statistic in stats._asdict().items():
            assert statistic.shape == inputs.tokens.targets.shape
            assert not statistic.requires_grad
            want = getattr(expected, name)
            if name == "correct":
                assert statistic.cpu().flatten().tolist() == want.tolist()
                continue
            found = to_numpy(statistic.flatten(), want.dtype)
            assert np.abs(found - want).max(initial=0) <= 2e-6 * np.abs(want).max(initial=1)


def test_default_chunks_are_those_of_one_budget() -> None:
    """As few chunks as the budget allows, of equal size, of a multiple of 8 rows where there is room."""
    assert rows_per_chunk(2048, 50257, 4, CHUNK_BYTES["cpu"]) == 229
    assert rows_per_chunk(1024, 128256, 4, CHUNK_BYTES["cpu"]) == 88
    for dtype, expected in ((torch.float32, 44 * 2**20), (torch.float64, 44 * 2**20), (BFLOAT16, 2 * 50257 * 768)):
        weight = torch.empty(1, 768, dtype=dtype)
        assert default_chunk_bytes(weight, 50257) == expected
        assert default_chunk_bytes(weight, 1000) == 44 * 2**20
    assert rows_per_chunk(7, 10, 4, 10**9) == 7
    assert rows_per_chunk(100, 1000, 4, 1) == 1
    assert rows_per_chunk(100, 1000, 4, -5) == 1
    assert rows_per_chunk(0, 1000, 4, 10**6) == 1
    for n_rows in range(1, 60):
        for most in range(1, 60):
            rows = rows_per_chunk(n_rows, 10, 4, 40 * most + 39)
            assert 1 <= rows <= min(most, n_rows)
            assert -(-n_rows // rows) == -(-n_rows // min(most, n_rows))


def test_same_bits_on_every_run(kernels: str, device: str) -> None:
    name = "none_ignored" if INTERPRETED else "n12_v6200_d40"
    inputs = build_linear(next(case for case in LINEAR if case.plain.name == name))
    first, second = (run(inputs, kernels, device) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(one, other) for one, other in zip(first[1], second[1], strict=True))


def test_a_bad_target_on_a_gpu_is_nan(kernels: str, device: str) -> None:
    """On the CPU it is an error that names the row among all rows, not among those of its chunk."""
    hidden, weight = torch.randn(9, 8, device=device, requires_grad=True), torch.randn(50, 8, device=device)
    targets = torch.arange(9, device=device)
    targets[7] = 50
    targets[2] = -100
    keywords = {"backend": kernels, "reduction": "none", "max_chunk_bytes": 600}
    if kernels == "cpu":
        with pytest.raises(IndexError, match=r"expected targets in \[0, 50\) or ignore_index=-100, got 50 in row 7"):
            fused_linear_mixce_loss(hidden, weight, targets, **keywords)
        return
    loss = fused_linear_mixce_loss(hidden, weight, targets, **keywords)
    (grad,) = torch.autograd.grad(loss.sum(), hidden)
    assert loss.isnan().tolist() == grad.isnan().any(-1).tolist() == [row == 7 for row in range(9)]
    with pytest.raises(IndexError, match=r"got 50 in row 7"):
        fused_linear_mixce_loss(hidden, weight, targets, validate=True, **keywords)


def test_ignored_rows_are_left_out_of_the_products(kernels: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, and where `validate` synchronises anyway; elsewhere their hidden states count as zeros."""
    rows = []

    def logits(self: TiledProducts, hidden: Tensor, out: Tensor) -> None:
        rows.append(len(hidden))
        products_logits(self, hidden, out)

    products_logits = TiledProducts.logits
    monkeypatch.setattr(TiledProducts, "logits", logits)
    hidden = torch.randn(20, 8, device=device)
    targets = torch.full((20,), -100, device=device)
    targets[3::6] = 1
    hidden[targets == -100] = torch.nan
    weight = torch.randn(50, 8, device=device, requires_grad=True)
    losses = []
    for validate in (True, False):
        rows.clear()
        loss = fused_linear_mixce_loss(
            hidden, weight, targets, backend=kernels, validate=validate, max_chunk_bytes=4 * 50 * 2
        )
        assert sum(rows) == (3 if validate or kernels == "cpu" else 20)
        (grad,) = torch.autograd.grad(loss, weight)
        assert grad.isfinite().all()
        losses.append(loss)
    torch.testing.assert_close(*losses)


def test_reference_in_float64_is_the_oracle() -> None:
    """The package's own oracle against that of the tests."""
    inputs = build_linear(
        next(case for case in LINEAR if str(case) == "all-float64" and case.plain.reduction == "mean")
    )
    keywords = {name: value for name, value in inputs.keywords.items() if name != "max_chunk_bytes"}
    loss = linear_mixce_loss_reference(
        inputs.hidden, inputs.weight, inputs.tokens.targets, inputs.tokens.eta, bias=inputs.bias, **keywords
    )
    grads = torch.autograd.grad(loss, inputs.leaves, inputs.tokens.upstream)
    check_linear(inputs, loss, list(grads))


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 4, 24])
@pytest.mark.parametrize("hidden_size", [768, 4096])
def test_float32_products_of_model_sizes(hidden_size: int, chunk_rows: int, kernels: str, device: str) -> None:
    """Sums over many hidden numbers, by the kernels that a BLAS has for few rows and for many."""
    plain = LINEAR[0].plain.at(name=f"d{hidden_size}", shape=(24, 1111), dtype=torch.float32, reduction="none")
    inputs = build_linear(LinearCase(plain, hidden_size, chunk_rows=chunk_rows))
    loss, grads = run(inputs, kernels, device)
    check_linear(inputs, loss, grads)


def test_wrong_results_are_noticed() -> None:
    """Of a gradient that was summed in bfloat16, and of one that forgets a row."""
    inputs = build_linear(next(case for case in LINEAR if case.plain.name == "none_ignored"))
    loss, grads = run(inputs, "reference", "cpu")
    check_linear(inputs, loss, grads)
    for wrong in (grads[1].bfloat16().float(), grads[1].index_fill(0, inputs.tokens.flat_targets[:1].long(), 0.0)):
        with pytest.raises(AssertionError, match="grad_weight"):
            check_linear(inputs, loss, [grads[0], wrong])
    with pytest.raises(AssertionError, match="loss"):
        assert_accurate("loss", loss.reshape(1) * 1.001, to_numpy(loss.reshape(1), np.dtype(float)), loss.reshape(1), 1)
