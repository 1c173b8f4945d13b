"""The linear loss among other parts of PyTorch: derivatives, compilers, autocast, checkpoints, accumulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from conftest import INTERPRETED
from linear_cases import LINEAR_OPERATORS
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mixce_kernels import LinearMixCELoss, fused_linear_mixce_loss, linear_mixce_loss_reference
from mixce_kernels.matmul import TiledProducts

REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
# Two rows a chunk of 50 logits.
CHUNK = 2 * 50 * 4


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No graph of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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


@not_interpreted
@pytest.mark.parametrize(("compiler", "reduction"), [("aot_eager", "none"), ("aot_eager", "sum"), ("inductor", "mean")])
def test_one_graph(compiler: str, reduction: str, kernels: str, device: str) -> None:
    """Compiled as a whole, with ignored rows and every option; dynamic sizes do not recompile."""
    torch.use_deterministic_algorithms(False)
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(fused_linear_mixce_loss, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for rows in ((7,), (9,), (4,)):
        hidden, weight, bias = tensors = leaves(device, rows=rows)
        targets = targets_of(hidden)
        keywords = {
            "bias": bias, "reduction": reduction, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0,
            "token_weights": torch.rand(rows, device=device), "max_chunk_bytes": CHUNK, "backend": kernels,
        }  # fmt: skip
        results = []
        for function in (compiled, fused_linear_mixce_loss):
            loss = function(hidden, weight, targets, 0.3, **keywords)
            results.append((loss.detach(), *grads_of(loss, tensors)))
        assert_close(*results)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[0]


@not_interpreted
def test_compiled_under_autocast(kernels: str, device: str) -> None:
    torch.use_deterministic_algorithms(False)
    hidden, weight, bias = tensors = leaves(device)
    targets = targets_of(hidden)

    def loss(hidden: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return fused_linear_mixce_loss(hidden.bfloat16(), weight, targets, bias=bias, backend=kernels)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(grads_of(compiled(hidden), tensors), grads_of(loss(hidden), tensors))


def test_operators(kernels: str, device: str) -> None:
    """What torch.library asks of an operator: schema, fake results, and autograd where it is registered."""
    hidden, weight, bias = leaves(device)
    targets = targets_of(hidden)
    shared = (
        hidden, weight, bias, targets, None, 0.3, -100, 0.1, 0.0, None, 1.0, torch.float32, CHUNK, device == "cpu",
        "chunks", kernels,
    )  # fmt: skip
    no_grad = tuple(one.detach() if isinstance(one, Tensor) else one for one in shared)
    state = torch.ops.mixce_kernels.linear_forward(*no_grad, False)[1]
    upstream = torch.rand(7, device=device)
    utilities = ("test_schema", "test_faketensor")
    others = ((True,), (state, upstream, [True, False, True]), (False, upstream, [True, True, False]))
    for name, rest in zip(LINEAR_OPERATORS, others, strict=True):
        args = (*no_grad, *rest)
        torch.library.opcheck(getattr(torch.ops.mixce_kernels, name).default, args, test_utils=utilities)


@REDUCTIONS
@pytest.mark.parametrize("types", ["bfloat16_float32", "float32_float32", "float16_float32"])
def test_autocast(types: str, reduction: str, backend: str, device: str) -> None:
    """Half-precision products with a float32 weight: the weight's gradient is float32, and not rounded on its way."""
    hidden_type, _ = (getattr(torch, name) for name in types.split("_"))
    autocast_type = torch.float16 if hidden_type == torch.float16 else torch.bfloat16
    hidden, weight, bias = leaves(device)
    hidden = hidden.detach().to(hidden_type).requires_grad_()
    targets = targets_of(hidden)
    with torch.autocast(device, autocast_type):
        loss, stats = fused_linear_mixce_loss(
            hidden, weight, targets, bias=bias, reduction=reduction, max_chunk_bytes=CHUNK, backend=backend,
            return_stats=True,
        )  # fmt: skip
        logits = F.linear(hidden, weight)
    assert logits.dtype == autocast_type
    assert {loss.dtype, stats.nll.dtype, stats.lse.dtype} == {torch.float32}
    grads = grads_of(loss, [hidden, weight, bias])
    assert [grad.dtype for grad in grads] == [hidden_type, torch.float32, torch.float32]
    # The same from operands that were rounded by hand, in float64.
    rounded = [one.detach().to(autocast_type).double().requires_grad_() for one in (hidden, weight)]
    rounded.append(bias.detach().double().requires_grad_())
    expected = linear_mixce_loss_reference(*rounded[:2], targets, bias=rounded[2], reduction=reduction)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-6, atol=2e-6)
    for grad, want in zip(grads, grads_of(expected, rounded), strict=True):
        eps = torch.finfo(grad.dtype).eps if grad.dtype != torch.float32 or device == "cpu" else 2**-8
        torch.testing.assert_close(grad.double(), want, rtol=2 * eps, atol=4 * eps * want.abs().max().item())


def test_autocast_leaves_float64_alone(kernels: str, device: str) -> None:
    hidden, weight, _ = leaves(device, torch.float64)
    targets = targets_of(hidden)
    with torch.autocast(device, torch.bfloat16):
        loss = fused_linear_mixce_loss(hidden, weight, targets, backend=kernels)
    assert torch.equal(loss, fused_linear_mixce_loss(hidden, weight, targets, backend=kernels))


@REDUCTIONS
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool, reduction: str, kernels: str, device: str) -> None:
    """The last layer and the loss recomputed in backward: to the bit what they are without."""
    hidden, weight, bias = tensors = leaves(device)
    targets = targets_of(hidden)

    def head(states: Tensor) -> Tensor:
        return fused_linear_mixce_loss(
            torch.tanh(states), weight, targets, bias=bias, reduction=reduction, max_chunk_bytes=CHUNK, backend=kernels
        ).sum()

    plain = head(hidden)
    recomputed = checkpoint(head, hidden, use_reentrant=use_reentrant)
    results = []
    for loss in (plain, recomputed):
        # A reentrant checkpoint refuses autograd.grad.
        for tensor in tensors:
            tensor.grad = None
        (1.5 * loss).backward()
        results.append((loss.detach(), *(tensor.grad for tensor in tensors)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_checkpoint_keeps_no_gradients(kernels: str, device: str) -> None:
    """Those of the forward are saved tensors: hooks may drop or offload them."""
    hidden, weight, _ = leaves(device)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(tensor.shape) or tensor, lambda x: x):
        loss = fused_linear_mixce_loss(hidden, weight, targets_of(hidden), backend=kernels)
    assert packed.count(weight.shape) == packed.count(hidden.shape) == 2
    loss.backward()


def test_gradient_accumulation_is_one_large_batch(backend: str, device: str) -> None:
    """Micro-batches of different numbers of tokens, divided by the tokens of all."""
    tensors = leaves(device, torch.float64, (12,))
    hidden, weight, bias = tensors
    targets = targets_of(hidden)
    whole = fused_linear_mixce_loss(hidden, weight, targets, bias=bias, backend=backend)
    expected = torch.autograd.grad(whole, tensors)
    count = (targets != -100).sum()
    total = torch.zeros_like(whole)
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        part = fused_linear_mixce_loss(
            hidden[begin:end], weight, targets[begin:end], bias=bias, num_items_in_batch=count, backend=backend
        )
        part.backward()
        total += part.detach()
    torch.testing.assert_close(total, whole.detach())
    assert_close([tensor.grad for tensor in tensors], expected)


def test_tied_weight(kernels: str, device: str) -> None:
    """The embedding is the head: the gradients of both uses add up."""
    tokens = torch.randint(50, (3, 4), device=device)
    weight = torch.randn(50, 12, device=device, requires_grad=True)

    def loss(function: Callable[..., Tensor], **keywords: Any) -> Tensor:
        return function(torch.tanh(F.embedding(tokens, weight))[:, :-1], weight, tokens[:, 1:], **keywords)

    got = torch.autograd.grad(loss(fused_linear_mixce_loss, backend=kernels), weight)
    assert_close(got, torch.autograd.grad(loss(linear_mixce_loss_reference), weight))


def test_module(backend: str, device: str) -> None:
    """`LinearMixCELoss` is the function, to the bit; what belongs to a batch goes into the call."""
    hidden, weight, bias = tensors = leaves(device)
    targets = targets_of(hidden)
    options = {"label_smoothing": 0.1, "softcap": 9.0, "max_chunk_bytes": CHUNK, "backend": backend}
    module = LinearMixCELoss(0.2, **options)
    batch = {"bias": bias, "num_items_in_batch": 11, "token_weights": torch.rand(7, device=device)}
    results = []
    for loss in (
        module(hidden, weight, targets, **batch),
        fused_linear_mixce_loss(hidden, weight, targets, 0.2, **options, **batch),
    ):
        results.append((loss.detach(), *grads_of(loss, tensors)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert repr(LinearMixCELoss(0.2, path="tiles")) == "LinearMixCELoss(eta=0.2, path=tiles)"
    assert not list(module.parameters())


def test_permissions_change_nothing(backend: str, device: str) -> None:
    hidden, weight, _ = leaves(device)
    targets = targets_of(hidden)
    before = hidden.detach().clone(), weight.detach().clone()
    keywords = {"inplace_backward": True, "grad_in_forward": True}
    loss = fused_linear_mixce_loss(hidden, weight, targets, backend=backend, **keywords)
    loss.backward()
    assert torch.equal(hidden, before[0])
    assert torch.equal(weight, before[1])
    assert torch.equal(loss, fused_linear_mixce_loss(hidden, weight, targets, backend=backend))
