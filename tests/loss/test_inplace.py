"""The modes that write over the logits: what is written, when, and what PyTorch is told about it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from mixce_kernels import MixCELoss, fused_mixce_loss
from support.cases import MODES, Case
from support.inputs import build, computed

INPLACE = pytest.mark.parametrize("mode", ["inplace", "inplace_grad_in_forward"])
# What PyTorch says when a tensor that was saved for backward has been written to.
MODIFIED = "modified by an inplace operation"


def inputs(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits [5, 300], not a leaf, and targets with one ignored."""
    leaf = torch.randn(5, 300, device=device, dtype=dtype, requires_grad=True)
    return leaf * 2, torch.tensor([0, 299, -100, 7, 8], device=device)


@INPLACE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradient_lies_in_the_logits_memory(kernels: str, device: str, mode: str, dtype: torch.dtype) -> None:
    """The gradient that arrives is a view of the logits, and they hold it."""
    logits, targets = inputs(device, dtype)
    expected = logits.detach().clone().requires_grad_()
    (plain,) = torch.autograd.grad(fused_mixce_loss(expected, targets, backend=kernels), expected)
    loss = fused_mixce_loss(logits, targets, backend=kernels, **MODES[mode])
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.data_ptr() == logits.data_ptr()
    assert not grad.requires_grad
    assert torch.equal(grad, logits.detach())
    # The same arithmetic, but for the order of the factors.
    torch.testing.assert_close(grad, plain, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


@INPLACE
def test_leaf_gradient_arrives_through_a_linear_layer(kernels: str, device: str, mode: str) -> None:
    """In a model, as in a training loop, the weights' gradients are those of the plain mode."""
    hidden, targets = torch.randn(6, 16, device=device), torch.tensor([0, 1, 99, -100, 5, 6], device=device)
    grads = []
    for keywords in ({}, MODES[mode]):
        torch.manual_seed(0)
        layer = torch.nn.Linear(16, 100).to(device)
        fused_mixce_loss(layer(hidden), targets, backend=kernels, **keywords).backward()
        grads.append([parameter.grad for parameter in layer.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "detached", "forward_alone"])
def test_logits_are_untouched_without_a_gradient_to_compute(backend: str, device: str, mode: str, how: str) -> None:
    """Nothing is written, and nothing counted as written."""
    logits, targets = inputs(device)
    logits = computed(logits) if how == "forward_alone" else logits.detach().requires_grad_(how != "detached")
    before, version = logits.detach().clone(), logits._version
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(how, torch.enable_grad)
    with context():
        loss = fused_mixce_loss(logits, targets, backend=backend, **MODES[mode])
    if how == "forward_alone" and mode == "inplace_grad_in_forward":
        return  # forward itself overwrites them: there was a gradient to compute
    assert torch.equal(logits.detach(), before)
    assert logits._version == version
    assert loss.requires_grad == (how == "forward_alone")


@INPLACE
def test_another_graph_that_saved_the_logits_raises(kernels: str, device: str, mode: str) -> None:
    """Whoever needs the logits' values afterwards gets PyTorch's error instead of a gradient of garbage."""
    logits, targets = inputs(device)
    other = logits.square().sum()
    fused_mixce_loss(logits, targets, backend=kernels, **MODES[mode]).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        other.backward()


@INPLACE
@pytest.mark.parametrize("view", [False, True])
def test_a_leaf_is_not_overwritten(backend: str, device: str, mode: str, view: bool) -> None:
    """As PyTorch refuses to write to one that requires a gradient: a parameter would become its own gradient."""
    parameter = nn.Parameter(torch.randn(4, 9, device=device))
    before, targets = parameter.detach().clone(), torch.tensor([1, 2, 3], device=device)
    logits = parameter[:3] if view else parameter
    sentence = f"got {'a view of a leaf' if view else 'a leaf'} that requires a gradient"
    for call in (fused_mixce_loss, MixCELoss(backend=backend, **MODES[mode])):
        keywords = {"backend": backend, **MODES[mode]} if call is fused_mixce_loss else {}
        with pytest.raises(ValueError, match=sentence):
            call(logits, targets if view else torch.tensor([1, 2, 3, 4], device=device), **keywords)
    assert torch.equal(parameter.detach(), before)
    with torch.no_grad():
        fused_mixce_loss(parameter[:3], targets, backend=backend, **MODES[mode])
    assert torch.equal(parameter.detach(), before)


@contextlib.contextmanager
def saved_elsewhere() -> Iterator[None]:
    """Hooks that keep what is saved in memory that several tensors share, outside of PyTorch's own."""
    arrays: dict[int, Any] = {}

    def pack(tensor: Tensor) -> tuple[int, torch.dtype]:
        key = tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape)
        arrays.setdefault(key, tensor.detach().float().cpu().numpy().copy())
        return key, tensor.dtype

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: torch.from_numpy(arrays[one[0]]).to(one[1])):
        yield


HOOKS: dict[str, Callable[[], Any]] = {
    "identity": lambda: torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "elsewhere": saved_elsewhere,
    "allow_mutation": torch.autograd.graph.allow_mutation_on_saved_tensors,
}
CHECKPOINTS: dict[str, Callable[..., Any]] = {
    "plain": lambda head, hidden: checkpoint(head, hidden, use_reentrant=False),
    "twice": lambda head, hidden: checkpoint(
        lambda states: checkpoint(head, states, use_reentrant=False) * 1.0, hidden, use_reentrant=False
    ),
    "no_early_stop": lambda head, hidden: _without_early_stop(head, hidden),
    "reentrant": lambda head, hidden: checkpoint(head, hidden, use_reentrant=True),
}


def _without_early_stop(head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    with set_checkpoint_early_stop(False):
        return checkpoint(head, hidden, use_reentrant=False)


def losses_of_a_head(
    kernels: str, device: str, mode: dict[str, bool], *, first: bool
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A head that needs its logits besides, before the loss or after it, and hidden states [6, 16] for it."""
    torch.manual_seed(0)
    weight = torch.randn(50, 16, device=device)
    targets = torch.tensor([0, 1, 49, -100, 5, 6], device=device)

    def head(hidden: Tensor) -> Tensor:
        logits = hidden @ weight.T
        other = (logits.logsumexp(-1) ** 2).mean() if first else 0
        loss = fused_mixce_loss(logits, targets, 0.3, backend=kernels, **mode)
        return loss + (other if first else (logits.detach() * 0).sum())

    return head, torch.randn(6, 16, device=device, requires_grad=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("where", [*HOOKS, *CHECKPOINTS])
def test_under_hooks_on_saved_tensors(kernels: str, device: str, where: str, first: bool, mode: str) -> None:
    """What a hook gives back to another node has no versions: the gradient is right, or PyTorch raises."""
    head, hidden = losses_of_a_head(kernels, device, MODES[mode], first=first)
    plain, _ = losses_of_a_head(kernels, device, {}, first=first)
    (expected,) = torch.autograd.grad(plain(hidden), hidden)
    if where == "reentrant" and first and "inplace" in mode:
        # Recomputed with an ordinary graph, whose versions are watched.
        with pytest.raises(RuntimeError, match=MODIFIED):
            CHECKPOINTS[where](head, hidden).backward()
        return
    with HOOKS[where]() if where in HOOKS else contextlib.nullcontext():
        loss = head(hidden) if where in HOOKS else CHECKPOINTS[where](head, hidden)
        loss.backward(retain_graph=True)
    torch.testing.assert_close(hidden.grad, expected)
    if where in ("plain", "twice", "identity", "save_on_cpu", "elsewhere"):
        hidden.grad = None
        loss.backward()
        torch.testing.assert_close(hidden.grad, expected)


def test_a_checkpoint_s_logits_are_overwritten_where_nobody_else_has_them(kernels: str, device: str) -> None:
    """Recomputed for the loss alone, they make room for their gradient."""
    seen: list[int] = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor) -> Tensor:
            return logits.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.append(grad.data_ptr())
            return grad

    made: list[int] = []

    def head(hidden: Tensor) -> Tensor:
        logits = Watch.apply(hidden)
        made.append(logits.data_ptr())
        return fused_mixce_loss(logits, torch.tensor([0, 1], device=device), backend=kernels, inplace_backward=True)

    checkpoint(head, torch.randn(2, 5000, device=device, requires_grad=True), use_reentrant=False).backward()
    assert seen == made[1:]


def test_grad_in_forward_in_place_is_told_in_forward(kernels: str, device: str) -> None:
    """The logits are gone after the forward, and a graph that saved them before knows."""
    logits, targets = inputs(device)
    other = logits.square().sum()
    fused_mixce_loss(logits, targets, backend=kernels, inplace_backward=True, grad_in_forward=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        other.backward()


@INPLACE
@pytest.mark.parametrize("upstream", [1.0, 2.0])
def test_second_backward_raises_in_place(kernels: str, device: str, mode: str, upstream: float) -> None:
    """The logits are spent: PyTorch's error, not the gradient of a gradient."""
    logits, targets = inputs(device)
    loss = fused_mixce_loss(logits, targets, backend=kernels, **MODES[mode])
    factor = torch.tensor(upstream, device=device)
    torch.autograd.grad(loss, logits, factor, retain_graph=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        torch.autograd.grad(loss, logits, factor, retain_graph=True)


@pytest.mark.parametrize("mode", ["plain", "grad_in_forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_backward_is_right_out_of_place(backend: str, device: str, mode: str, dtype: torch.dtype) -> None:
    """With `retain_graph`, every time, whatever was done to the gradient handed out first."""
    logits, targets = inputs(device, dtype)
    loss = fused_mixce_loss(logits, targets, 0.3, backend=backend, **MODES[mode])
    (first,) = torch.autograd.grad(loss, logits, torch.tensor(1.0, device=device), retain_graph=True)
    kept = first.clone()
    first.fill_(torch.nan)
    for factor in (1.0, -2.0, 4.0):
        (again,) = torch.autograd.grad(loss, logits, torch.tensor(factor, device=device), retain_graph=True)
        # Powers of two: exact.
        torch.testing.assert_close(again, kept * factor, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["sliced", "transposed", "sliced_columns", "unaligned"])
def test_memory_around_the_logits_is_untouched(kernels: str, device: str, mode: str, layout: str) -> None:
    """What lies between and around strided rows stays, to the bit."""
    shape = (3, 4, 129) if layout in ("sliced", "transposed") else (5, 129)
    case = Case("around", shape=shape, layout=layout, mode=mode, ignored="none")
    moved = build(case).to(device)
    outside = torch.ones_like(moved.memory, dtype=torch.bool)
    view = moved.logits.detach()
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    # A value that arithmetic would change; the fixture's NaN would hide a write of NaN.
    moved.memory[outside] = 1.0 / 3
    before = moved.memory[outside].clone()
    loss = fused_mixce_loss(moved.logits, moved.targets, moved.eta, backend=kernels, **moved.keywords)
    (grad,) = torch.autograd.grad(loss, moved.logits)
    assert torch.equal(moved.memory[outside], before)
    assert grad.isfinite().all()
    if "inplace" in mode:
        assert torch.equal(moved.logits.detach(), grad)


@INPLACE
def test_sliced_logits_of_a_model(kernels: str, device: str, mode: str) -> None:
    """`logits[:, :-1]` of a layer's output: the last position's gradient is 0, the others' that of the plain mode."""
    hidden = torch.randn(2, 5, 16, device=device)
    targets = torch.randint(100, (2, 4), device=device)
    grads = []
    for keywords in ({}, MODES[mode]):
        torch.manual_seed(0)
        layer = torch.nn.Linear(16, 100).to(device)
        fused_mixce_loss(layer(hidden)[:, :-1], targets, backend=kernels, **keywords).backward()
        grads.append([parameter.grad for parameter in layer.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("mode", ["inplace", "grad_in_forward", "inplace_grad_in_forward"])
def test_loss_without_upstream_gradient(kernels: str, device: str, mode: str) -> None:
    """The statistics alone carry no gradient, and a loss that nobody uses gives none."""
    logits, targets = inputs(device)
    loss, stats = fused_mixce_loss(logits, targets, backend=kernels, return_stats=True, **MODES[mode])
    assert loss.requires_grad
    assert not any(statistic.requires_grad for statistic in stats)


def test_gradient_accumulates_into_a_leaf(kernels: str, device: str) -> None:
    """Two plain calls on one leaf add up; the gradient of the first is not a buffer of the second."""
    logits, targets = inputs(device)
    leaf = logits.detach().requires_grad_()
    for _ in range(2):
        fused_mixce_loss(leaf, targets, backend=kernels, grad_in_forward=True).backward()
    (once,) = torch.autograd.grad(fused_mixce_loss(leaf, targets, backend=kernels), leaf)
    torch.testing.assert_close(leaf.grad, 2 * once)
