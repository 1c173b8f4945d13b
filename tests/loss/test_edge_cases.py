"""The table of decided edge cases, row by row, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import EMULATED, GPU_BACKENDS
from mixce_kernels import fused_linear_mixce_loss, fused_mixce_loss
from support.cases import DTYPES, MODES
from support.inputs import computed

ALL_MODES = pytest.mark.parametrize("mode", MODES)


def loss_and_grad(logits: Tensor, targets: Tensor, *args: Any, upstream: Tensor | None = None, **keywords: Any):
    """Both, without a reduction unless asked for."""
    logits = computed(logits.clone())
    loss = fused_mixce_loss(logits, targets, *args, **{"reduction": "none", **keywords})
    (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), grad


@ALL_MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("content", "upstream"), [(torch.nan, 1.0), (torch.nan, torch.nan), (torch.inf, torch.inf)])
def test_ignored_rows_are_not_read(
    backend: str, device: str, mode: str, dtype: torch.dtype, content: float, upstream: float
) -> None:
    """Loss, gradient and statistics are 0 whatever stands in the row, its weight or its upstream gradient."""
    logits = torch.randn(3, 70, device=device, dtype=torch.float64).to(dtype)
    logits[1] = content
    targets = torch.tensor([4, -100, 69], device=device)
    logits = computed(logits)
    logits.retain_grad()
    loss, stats = fused_mixce_loss(
        logits, targets, 0.3, reduction="none", return_stats=True, backend=backend,
        token_weights=torch.tensor([1.0, content, 1.0], device=device),
        label_smoothing=0.1, z_loss=0.1, **MODES[mode],
    )  # fmt: skip
    factors = torch.tensor([1.0, upstream, 1.0], device=device, dtype=loss.dtype)
    (grad,) = torch.autograd.grad(loss, logits, factors)
    assert loss[1] == 0
    assert (grad[1] == 0).all()
    assert all(statistic[1] == 0 for statistic in stats)
    assert loss[[0, 2]].isfinite().all()
    assert grad[[0, 2]].isfinite().all()


@ALL_MODES
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_valid_is_zero(backend: str, device: str, mode: str, reduction: str, rows: int, weighted: bool) -> None:
    """Every token ignored, or none there: 0, connected to the graph, with a gradient of 0."""
    logits = computed(torch.full((rows, 9), torch.nan, device=device))
    logits.retain_grad()
    targets = torch.full((rows,), -100, device=device)
    weights = torch.rand(rows, device=device) if weighted else None
    loss = fused_mixce_loss(logits, targets, reduction=reduction, token_weights=weights, backend=backend, **MODES[mode])
    assert loss.requires_grad
    assert loss.shape == ((rows,) if reduction == "none" else ())
    assert (loss == 0).all()
    loss.sum().backward()
    assert logits.grad.shape == (rows, 9)
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("value", [0, 0.0])
def test_divisor_of_zero_counts_as_one(backend: str, device: str, value: float) -> None:
    """As for a batch whose every token is ignored."""
    logits, targets = torch.randn(3, 9, device=device), torch.tensor([1, 2, 3], device=device)
    total = fused_mixce_loss(logits, targets, reduction="sum", backend=backend)
    for divisor in (value, torch.tensor(value, device=device)):
        assert fused_mixce_loss(logits, targets, num_items_in_batch=divisor, backend=backend) == total
    weights = torch.zeros(3, device=device)
    assert fused_mixce_loss(logits, targets, token_weights=weights, backend=backend) == 0


@ALL_MODES
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1, -(2**31), -101])
def test_bad_target_raises_before_anything_is_written(mode: str, dtype: torch.dtype, bad: int) -> None:
    """On the CPU the error names the first bad row and its value, and the logits stay as they were."""
    for backend in () if EMULATED else ("reference", "cpu"):
        logits = torch.randn(2, 3, 50)
        before = logits.clone()
        targets = torch.tensor([[0, -100, 49], [3, bad, 99]], dtype=dtype)
        with pytest.raises(IndexError, match=rf"expected targets in \[0, 50\).*-100.* got {bad} in row 4$"):
            fused_mixce_loss(computed(logits), targets, backend=backend, **MODES[mode])
        assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [2**33 + 1, -(2**40)])
def test_bad_target_beyond_32_bits(bad: int) -> None:
    """A 64-bit index is not cut to 32 bits, where it would be a good one."""
    for backend in () if EMULATED else ("reference", "cpu"):
        with pytest.raises(IndexError, match=f"got {bad} in row 0"):
            fused_mixce_loss(torch.randn(1, 50), torch.tensor([bad]), backend=backend)


@ALL_MODES
@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_bad_target_on_a_gpu_is_nan(backend: str, device: str, mode: str, bad: int) -> None:
    """Without a synchronisation: that row alone is NaN; `validate=True` raises as on the CPU."""
    logits = torch.randn(3, 50, device=device)
    targets = torch.tensor([3, bad, 49], device=device)
    loss, grad = loss_and_grad(logits, targets, backend=backend, **MODES[mode])
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().all(-1).tolist() == [False, True, False]
    assert grad.isnan().any(-1).tolist() == [False, True, False]
    with pytest.raises(IndexError, match=f"got {bad} in row 1"):
        loss_and_grad(logits, targets, backend=backend, validate=True, **MODES[mode])


@ALL_MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_target_without_probability(backend: str, device: str, mode: str, dtype: torch.dtype, eta: float) -> None:
    """The limit of -q log q is 0; the gradient is a * p_j beside the target, and -w at it."""
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], device=device, dtype=dtype)
    targets = torch.tensor([2], device=device)
    loss, grad = loss_and_grad(logits, targets, eta, backend=backend, **MODES[mode])
    assert loss.item() == (0.0 if eta == 0 else torch.inf)
    p = torch.softmax(torch.tensor([0.0, 1.0, -torch.inf]), -1)
    expected = eta * (p - torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(grad[0].cpu(), expected.to(dtype), rtol=2 * torch.finfo(dtype).eps + 2e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_logits_get_no_gradient(backend: str, device: str, dtype: torch.dtype) -> None:
    """Exactly 0 where the probability is, also for whole blocks of -inf before the first finite logit."""
    logits = torch.full((2, 9000), -torch.inf, device=device, dtype=dtype)
    logits[0, 8190:8195] = logits[1, 8999] = 1.0
    targets = torch.tensor([8192, 8999], device=device)
    loss, grad = loss_and_grad(logits, targets, 1.0, backend=backend)
    assert (grad[logits.isinf()] == 0).all()
    torch.testing.assert_close(loss.cpu().double(), torch.tensor([5.0, 1.0]).double().log(), rtol=3e-7, atol=0)
    assert grad.isfinite().all()


# The first vector, the first block, a later block, the last vector, and the tail beyond it.
@pytest.mark.parametrize("column", [0, 5, 1000, 2047, 2048, 4100, 4111, 4112, 4114])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("dtype", "mode"), list(zip(DTYPES, ("plain", "inplace_grad_in_forward") * 2, strict=True)))
def test_nan_and_inf_fill_their_row(
    backend: str, device: str, column: int, value: float, dtype: torch.dtype, mode: str
) -> None:
    """Loss and the whole gradient row are NaN, as in PyTorch; other rows have the bits they have without it."""
    logits = torch.randn(3, 4115, device=device, generator=torch.Generator(device).manual_seed(column)).to(dtype)
    targets = torch.tensor([0, 4114, 2048], device=device)
    clean = loss_and_grad(logits, targets, 0.3, backend=backend, **MODES[mode])
    logits[1, column] = value
    loss, grad = loss_and_grad(logits, targets, 0.3, backend=backend, **MODES[mode])
    assert loss[1].isnan()
    assert grad[1].isnan().all()
    for dirty, before in zip((loss, grad), clean, strict=True):
        assert torch.equal(dirty[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"logit_scale": 2.0}])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("size", [3, 5000])
def test_row_of_minus_infinity(backend: str, device: str, extra: dict[str, float], eta: float, size: int) -> None:
    """It has no distribution: NaN, for every option."""
    logits = torch.randn(3, size, device=device)
    logits[1] = -torch.inf
    loss, grad = loss_and_grad(logits, torch.tensor([0, 1, 2], device=device), eta, backend=backend, **extra)
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().all(-1).tolist() == [False, True, False]
    assert grad.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_class(backend: str, device: str, eta: float, dtype: torch.dtype) -> None:
    """V = 1: certainty costs nothing."""
    logits = torch.tensor([[3.0], [-1e4], [0.0]], device=device, dtype=dtype)
    loss, grad = loss_and_grad(logits, torch.tensor([0, 0, -100], device=device), eta, backend=backend)
    assert (loss == 0).all()
    assert (grad == 0).all()


def test_options_that_are_off_multiply_nothing(backend: str, device: str) -> None:
    """0 * -inf would be NaN: z_loss and label_smoothing of 0 leave a masked row alone."""
    logits = torch.tensor([[0.0, -torch.inf, 2.0]], device=device)
    targets = torch.tensor([0], device=device)
    loss, grad = loss_and_grad(logits, targets, 0.5, backend=backend, z_loss=0.0, label_smoothing=0.0)
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    # On, they mean what they say: the mean of logits that contain -inf is -inf.
    loss, _ = loss_and_grad(logits, targets, 0.5, backend=backend, label_smoothing=0.1)
    assert loss.item() == torch.inf


def test_softcap_makes_infinite_logits_finite(backend: str, device: str) -> None:
    """The cap of +-inf is +-softcap, and its slope there is 0."""
    logits = torch.tensor([[0.0, -torch.inf, torch.inf]], device=device)
    loss, grad = loss_and_grad(logits, torch.tensor([2], device=device), 1.0, backend=backend, softcap=2.0)
    expected = -torch.log_softmax(torch.tensor([0.0, -2.0, 2.0]), -1)[2]
    # One ulp, and the two epsilons that the rule allows a token of weight 1.
    epsilon = torch.finfo(torch.float32).eps
    torch.testing.assert_close(loss[0].cpu(), expected, rtol=epsilon, atol=2 * epsilon)
    assert grad[0, 1:].tolist() == [0, 0]
    assert grad[0, 0] > 0


@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.2}])
def test_adding_a_constant_to_all_logits_changes_nothing(
    backend: str, device: str, scale: float, extra: dict[str, float]
) -> None:
    """Multiples of 2^-7 are exact at 1e5: the loss may differ by its own rounding alone, the gradient too."""
    logits = torch.randint(-500, 500, (8, 3000), device=device) / 128.0
    targets = torch.arange(8, device=device)
    keywords = {"logit_scale": scale, "backend": backend, **extra}
    loss, grad = loss_and_grad(logits, targets, 0.3, **keywords)
    shifted_loss, shifted_grad = loss_and_grad(logits + 1e5, targets, 0.3, **keywords)
    torch.testing.assert_close(shifted_loss, loss, rtol=3e-7, atol=0)
    torch.testing.assert_close(shifted_grad, grad, rtol=0, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_confident_tokens_keep_their_gradient(dtype: torch.dtype, mode: str) -> None:
    """Q rounds to 1 in float32, and p - 1 to 0: the native kernels, which sum in float64, still know -(1 - q) * w."""
    if EMULATED:
        pytest.skip("of the native kernels")
    height = torch.tensor([10.0, 17.0, 20.0])
    logits = torch.zeros(3, 3)
    logits[:, 1] = height
    _, grad = loss_and_grad(logits.to(dtype), torch.ones(3, dtype=torch.long), 0.0, backend="cpu", **MODES[mode])
    q = 1 / (1 + 2 * torch.exp(-height.double()))
    expected = -q * 2 * torch.exp(-height.double()) * q
    tolerance = 2e-6 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(grad[:, 1].double(), expected, rtol=tolerance, atol=0)


@ALL_MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_of_the_lowest_finite_number(backend: str, device: str, mode: str, dtype: torch.dtype) -> None:
    """What many write for -inf: no overflow on the way to a probability of 0, and a row of nothing else is uniform."""
    lowest = torch.finfo(dtype).min
    logits = torch.full((2, 3001), lowest, dtype=dtype, device=device)
    logits[1, [5, 3000]] = 1.0
    loss, grad = loss_and_grad(logits, torch.tensor([7, 5], device=device), 1.0, backend=backend, **MODES[mode])
    expected = torch.tensor([3001.0, 2.0]).double().log()
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-6, atol=0)
    assert (grad[1, 6:3000] == 0).all()
    torch.testing.assert_close(grad[0, :7].cpu().double(), torch.full((7,), 1 / 3001).double(), rtol=2**-7, atol=0)


LOSSES: dict[str, Callable[..., Any]] = {
    "plain": fused_mixce_loss,
    "linear": lambda values, *args, **keywords: fused_linear_mixce_loss(
        values, torch.eye(9, dtype=values.dtype, device=values.device), *args, **keywords
    ),
}


@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(), (4,)])
def test_the_forward_s_weights_count(
    backend: str, device: str, mode: str, reduction: str, shape: tuple[int, ...], loss_of: Callable[..., Any]
) -> None:
    """A schedule may write to eta between forward and backward: the gradient is that of the loss that came out."""
    values, targets = torch.randn(4, 9, device=device), torch.tensor([1, 2, -100, 8], device=device)
    keywords = {"reduction": reduction, "backend": backend, **MODES[mode]}
    grads = []
    for changed in (False, True):
        leaf, eta = values.clone().requires_grad_(), torch.full(shape, 0.3, device=device)
        loss = loss_of(leaf * 1, targets, eta, **keywords)
        if changed:
            eta.fill_(0.9)
        grads.append(torch.autograd.grad(loss.sum(), leaf)[0])
    assert torch.equal(*grads)
    if "inplace" in mode:
        return
    for changed in (False, True):
        leaf, eta = values.clone().requires_grad_(), torch.full(shape, 0.3, device=device)
        loss = loss_of(leaf * 1, targets, eta, **keywords)
        if changed:
            eta.fill_(0.9)
        (grad,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
        grads.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
    assert torch.equal(*grads[2:])


def negated(tensor: Tensor) -> Tensor:
    """The same values, held as their negatives with the negative bit set."""
    return torch._neg_view(-tensor)


def no_memory(tensor: Tensor) -> Tensor:
    """Zeros that have no memory, as gradients of nothing are."""
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype, device=tensor.device)


@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_tensors_are_not_read_as_they_lie(
    backend: str, device: str, mode: str, reduction: str, loss_of: Callable[..., Any]
) -> None:
    """With their negative bit set, as the imaginary part of a conjugate; zero tensors without memory; expanded ones."""
    leaf = torch.randn(4, 9, device=device, requires_grad=True)
    targets, eta = torch.tensor([1, 2, -100, 8], device=device), torch.rand(4, device=device)
    weights = torch.rand(4, device=device)
    upstream = torch.randn((4,) if reduction == "none" else (), device=device)

    def outcome(of: Callable[[Tensor], Tensor], *which: str) -> tuple[Tensor, ...]:
        given = {"logits": leaf * 1, "targets": targets, "eta": eta, "weights": weights, "upstream": upstream}
        given |= {name: of(given[name]) for name in which}
        loss = loss_of(
            given["logits"], given["targets"], given["eta"], token_weights=given["weights"], reduction=reduction,
            backend=backend, **MODES[mode],
        )  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss, leaf, given["upstream"])

    for name in ("logits", "targets", "eta", "weights", "upstream"):
        torch.testing.assert_close(outcome(negated, name), outcome(Tensor.clone, name))
    for name in ("eta", "weights", "upstream"):
        torch.testing.assert_close(outcome(no_memory, name), outcome(torch.zeros_like, name))
    expanded = outcome(lambda tensor: tensor.flatten()[:1].expand(tensor.shape), "eta", "weights", "targets")
    copied = outcome(lambda tensor: tensor.flatten()[:1].expand(tensor.shape).contiguous(), "eta", "weights", "targets")
    torch.testing.assert_close(expanded, copied)
