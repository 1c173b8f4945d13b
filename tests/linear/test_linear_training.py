"""The linear loss in a training: compilers, autocast, checkpoints, micro-batches, a tied weight, and its module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from test_linear_autograd import CHUNK, REDUCTIONS, assert_close, grads_of, leaves, targets_of
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from conftest import INTERPRETED
from mixce_kernels import (
    LinearMixCELoss,
    fused_linear_mixce_loss,
    fused_mixce_loss,
    linear_mixce_loss_reference,
    vocab_parallel_mixce_loss,
)
from support.linear_cases import LINEAR_OPERATORS

not_interpreted = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No graph of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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
        hidden, weight, bias, targets, None, 0.3, 7, None, 0.0, 0.0, -100, 0.1, 0.0, None, 1.0, "mean", None, None,
        None, torch.float32, CHUNK, device == "cpu", "chunks", kernels,
    )  # fmt: skip
    no_grad = tuple(one.detach() if isinstance(one, Tensor) else one for one in shared)
    _, token_scale, state, *_ = torch.ops.mixce_kernels.linear_forward(*no_grad, True)
    upstream = torch.rand((), device=device)
    utilities = ("test_schema", "test_faketensor")
    others = ((True,), (state, upstream, token_scale, [True, False, True]), (True, [True, True, False]))
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


def test_autocast_of_a_half_precision_weight(kernels: str, device: str) -> None:
    """Float32 hidden states have a float32 gradient, which on a CPU is not rounded on its way."""
    hidden, weight, _ = leaves(device)
    weight = weight.detach().bfloat16().requires_grad_()
    targets = targets_of(hidden)
    with torch.autocast(device, torch.bfloat16):
        loss = fused_linear_mixce_loss(hidden, weight, targets, max_chunk_bytes=CHUNK, backend=kernels)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert grad.dtype == torch.float32
    rounded = [one.detach().bfloat16().double().requires_grad_() for one in (hidden, weight)]
    (expected,) = torch.autograd.grad(linear_mixce_loss_reference(*rounded, targets), rounded[0])
    eps = torch.finfo(torch.float32).eps if device == "cpu" else 2**-8
    torch.testing.assert_close(grad.double(), expected, rtol=2 * eps, atol=4 * eps * expected.abs().max().item())


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


def test_signatures() -> None:
    """The options are those of `fused_mixce_loss`, with the same defaults, and some of its own."""
    own = {"bias": None, "max_chunk_bytes": None, "path": "chunks"}
    sharded = {"group": None, "vocab_start": None, "vocab_size": None, "check_group": True}
    options = dict(fused_mixce_loss.__kwdefaults__ or {})
    assert fused_linear_mixce_loss.__kwdefaults__ == {**options, **own, **sharded}
    reference = {name: value for name, value in options.items() if name != "backend"}
    assert linear_mixce_loss_reference.__kwdefaults__ == {**reference, **own}
    of_the_call = {"bias", "token_weights", "num_items_in_batch"}
    constructor = {name: value for name, value in {**options, **own, **sharded}.items() if name not in of_the_call}
    assert LinearMixCELoss.__init__.__kwdefaults__ == constructor
    assert set(inspect.signature(LinearMixCELoss.forward).parameters) >= of_the_call
    # Of a shard of the vocabulary the same, and what a rank has to say.
    parallel = dict(vocab_parallel_mixce_loss.__kwdefaults__ or {})
    assert parallel == {**options, "vocab_size": None, "check_group": True}
