"""The derivatives of the linear loss: which are computed, how often, of which order, and by which transformation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixce_kernels import fused_linear_mixce_loss, linear_mixce_loss_reference
from mixce_kernels.linear.matmul import TiledProducts

REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
# Two rows a chunk of 50 logits.
CHUNK = 2 * 50 * 4


def leaves(device: str = "cpu", dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = (7,)) -> list[Tensor]:
    """Hidden states [*rows, 12], weight [50, 12], bias [50]."""
    shapes = ((*rows, 12), (50, 12), (50,))
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def targets_of(hidden: Tensor) -> Tensor:
    """Some of them ignored."""
    targets = torch.randint(50, hidden.shape[:-1], device=hidden.device)
    return targets.masked_fill(torch.arange(targets.numel(), device=hidden.device).view(targets.shape) % 3 == 1, -100)


def grads_of(loss: Tensor, wanted: list[Tensor], factor: float = 1.5) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum() * factor, wanted)


def assert_close(got: Any, expected: Any, epsilons: int = 64) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        eps = torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=epsilons * eps, atol=epsilons * eps)


@REDUCTIONS
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_only_what_requires_a_gradient(
    wanted: tuple[int, ...], reduction: str, kernels: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen head costs no product for its gradient, and a frozen trunk none for that of the hidden states."""
    made = []
    for name in ("grad_hidden", "grad_weight"):
        function = getattr(TiledProducts, name)
        monkeypatch.setattr(
            TiledProducts,
            name,
            lambda self, *args, _f=function, _n=name, **kw: (made.append(_n), _f(self, *args, **kw)),
        )
    tensors = leaves(device)
    chosen = [tensors[i] for i in wanted]
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i in wanted)
    hidden, weight, bias = tensors
    targets = targets_of(hidden)
    keywords = {"bias": bias, "reduction": reduction}
    loss = fused_linear_mixce_loss(hidden, weight, targets, backend=kernels, max_chunk_bytes=CHUNK, **keywords)
    got = grads_of(loss, chosen)
    if device == "cpu":
        assert set(made) == {("grad_hidden", "grad_weight")[i] for i in wanted if i < 2}
    assert_close(got, grads_of(linear_mixce_loss_reference(hidden, weight, targets, **keywords), chosen))


@REDUCTIONS
def test_without_a_gradient_there_is_no_graph(reduction: str, backend: str, device: str) -> None:
    hidden, weight, bias = leaves(device)
    targets = targets_of(hidden)
    with torch.no_grad():
        loss = fused_linear_mixce_loss(hidden, weight, targets, bias=bias, reduction=reduction, backend=backend)
    assert not loss.requires_grad
    with_graph = fused_linear_mixce_loss(hidden, weight, targets, bias=bias, reduction=reduction, backend=backend)
    assert with_graph.requires_grad
    torch.testing.assert_close(loss, with_graph.detach())


@REDUCTIONS
def test_gradcheck_and_second_derivative(reduction: str, kernels: str, device: str) -> None:
    """At eta 1, where the loss is what the gradient is of."""
    tensors = leaves(device, torch.float64, (4,))
    targets = targets_of(tensors[0])

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_linear_mixce_loss(
            hidden, weight, targets, 1.0, bias=bias, reduction=reduction, label_smoothing=0.1, z_loss=1e-2, softcap=9.0,
            max_chunk_bytes=2 * CHUNK, backend=kernels,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, tensors)
    assert torch.autograd.gradgradcheck(loss, tensors)


@REDUCTIONS
def test_second_derivative_of_the_mixture(reduction: str, kernels: str, device: str) -> None:
    """The weight of a token stays fixed in both, as in the reference."""
    tensors = leaves(device, torch.float64)
    targets = targets_of(tensors[0])
    found = []
    for function, keywords in (
        (fused_linear_mixce_loss, {"backend": kernels, "max_chunk_bytes": CHUNK}),
        (linear_mixce_loss_reference, {}),
    ):
        loss = function(tensors[0], tensors[1], targets, 0.3, bias=tensors[2], reduction=reduction, **keywords)
        first = torch.autograd.grad(loss.sum() * 1.5, tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(one.square().sum() for one in first), tensors))
    assert_close(*found)


@REDUCTIONS
def test_backward_twice(reduction: str, kernels: str, device: str) -> None:
    """With other upstream gradients: the memory of the first backward's result is its own."""
    tensors = leaves(device)
    targets = targets_of(tensors[0])
    keywords = {"bias": tensors[2], "reduction": reduction}
    loss = fused_linear_mixce_loss(*tensors[:2], targets, backend=kernels, max_chunk_bytes=CHUNK, **keywords).sum()
    expected = linear_mixce_loss_reference(*tensors[:2], targets, **keywords).sum()
    first = torch.autograd.grad(loss, tensors, torch.tensor(3.0, device=device), retain_graph=True)
    kept = [one.clone() for one in first]
    second = torch.autograd.grad(loss, tensors, torch.tensor(-0.5, device=device))
    assert all(torch.equal(one, other) for one, other in zip(first, kept, strict=True))
    assert_close(second, torch.autograd.grad(expected, tensors, torch.tensor(-0.5, device=device), retain_graph=True))
    assert_close(first, torch.autograd.grad(expected, tensors, torch.tensor(3.0, device=device)))


@REDUCTIONS
def test_backward_into_grad_again_and_again(reduction: str, kernels: str, device: str) -> None:
    """What autograd keeps as `.grad` is the caller's: changed in place, it changes no later backward."""
    tensors = leaves(device)
    loss = fused_linear_mixce_loss(
        *tensors[:2], targets_of(tensors[0]), bias=tensors[2], reduction=reduction, backend=kernels
    ).sum()
    expected = torch.autograd.grad(loss, tensors, retain_graph=True)
    for count in (1, 2, 3):
        loss.backward(retain_graph=True)
        assert_close([tensor.grad for tensor in tensors], [count * one for one in expected])
    for tensor in tensors:
        tensor.grad.zero_()
    loss.backward()
    assert_close([tensor.grad for tensor in tensors], expected)


@REDUCTIONS
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_no_number_upstream_leaves_ignored_tokens_alone(bad: float, reduction: str, backend: str, device: str) -> None:
    """Their gradient is 0 whatever comes, and so is all of it where no token counts."""
    tensors = leaves(device)
    targets = targets_of(tensors[0])
    for ignored in (False, True):
        chosen = targets.fill_(-100) if ignored else targets
        loss = fused_linear_mixce_loss(
            *tensors[:2], chosen, bias=tensors[2], reduction=reduction, backend=backend
        ).sum()
        grads = torch.autograd.grad(loss * bad, tensors)
        assert not grads[0][chosen == -100].any()
        assert grads[1].isfinite().all() == grads[2].isfinite().all() == ignored


def test_forward_mode_is_refused(kernels: str, device: str) -> None:
    """It is not implemented, and does not vanish."""
    hidden, weight, _ = leaves(device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(hidden.detach(), torch.ones_like(hidden))
        with pytest.raises(RuntimeError, match=r"forward mode|jvp"):
            fused_linear_mixce_loss(dual, weight.detach(), targets_of(hidden), backend=kernels)


def test_batched_gradients(kernels: str, device: str) -> None:
    tensors = leaves(device)
    upstream = torch.tensor([1.0, -2.0], device=device)
    loss = fused_linear_mixce_loss(*tensors[:2], targets_of(tensors[0]), bias=tensors[2], backend=kernels)
    got = torch.autograd.grad(loss, tensors, upstream, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        assert_close([one[i] for one in got], torch.autograd.grad(loss, tensors, upstream[i], retain_graph=True))


@REDUCTIONS
def test_func_grad(reduction: str, kernels: str, device: str) -> None:
    tensors = leaves(device, torch.float64)
    targets = targets_of(tensors[0])

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_linear_mixce_loss(hidden, weight, targets, bias=bias, reduction=reduction, backend=kernels).sum()

    assert_close(torch.func.grad(loss, argnums=(0, 1, 2))(*tensors), torch.autograd.grad(loss(*tensors), tensors))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_flops_are_counted(kernels: str, device: str, reduction: str) -> None:
    """`FlopCounterMode` counts the products: one of the forward, two of the gradients, and logits made once more."""
    hidden = torch.randn(2, 3, 64, device=device, requires_grad=True)
    weight = torch.randn(1000, 64, device=device, requires_grad=True)
    targets = torch.randint(1000, (2, 3), device=device)
    with FlopCounterMode(display=False) as of_linear:
        torch.nn.functional.linear(hidden, weight)
    product = of_linear.get_total_flops()
    assert product == 2 * 6 * 64 * 1000
    for frozen, n_grads in ((None, 2), (weight, 1)):
        if frozen is not None:
            frozen.requires_grad_(False)
        with FlopCounterMode(display=False) as forward:
            loss = fused_linear_mixce_loss(hidden, weight, targets, reduction=reduction, backend=kernels)
        with FlopCounterMode(display=False) as backward:
            loss.sum().backward()
        with FlopCounterMode(display=False) as without_grad, torch.no_grad():
            fused_linear_mixce_loss(hidden, weight, targets, reduction=reduction, backend=kernels)
        found = [counter.get_total_flops() // product for counter in (forward, backward, without_grad)]
        assert found == ([1, 1 + n_grads, 1] if reduction == "none" else [1 + n_grads, 0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_tokens(kernels: str, device: str, reduction: str, weighted: bool, dtype: torch.dtype) -> None:
    """Loss 0 and gradients of zeros, also where products take gradients in units of the largest."""
    hidden = torch.empty(0, 8, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 8, device=device, dtype=dtype, requires_grad=True)
    targets = torch.empty(0, device=device, dtype=torch.int64)
    loss = fused_linear_mixce_loss(
        hidden, weight, targets, 0.3, reduction=reduction, backend=kernels,
        token_weights=torch.empty(0, device=device) if weighted else None,
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    assert loss.sum() == 0
    grads = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert grads[0].shape == hidden.shape
    assert not grads[1].any()
