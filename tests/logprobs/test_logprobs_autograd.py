"""The derivatives of log-probabilities and entropies: of which order, by which transformation, in which memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import EMULATED
from mixce_kernels import fused_linear_token_logprobs, fused_mixce_loss, fused_token_logprobs
from mixce_kernels.linear import logprobs_ops as linear_ops
from mixce_kernels.linear.chunks import LinearCall
from mixce_kernels.logits import logprobs_ops
from mixce_kernels.logits.logprobs_ops import LOGPROBS, LogprobsGrad, TokenLogprobs
from mixce_kernels.options import TokenOptions
from mixce_kernels.reduction import NO_REDUCTION
from support.allocations import allocated_bytes

TEMPERATURES = pytest.mark.parametrize("temperature", [1.0, 0.6, "per_token"], ids=str)
SOFTCAPS = pytest.mark.parametrize("softcap", [None, 3.0])


def inputs(device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [2, 3, 11] that require a gradient, targets of which one is ignored, temperatures."""
    logits = (2 * torch.randn(2, 3, 11, dtype=dtype, device=device)).requires_grad_()
    targets = torch.randint(11, (2, 3), device=device)
    targets[1, 0] = -100
    return logits, targets, torch.rand(2, 3, device=device) + 0.5


def linear_inputs(device: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Hidden states [2, 3, 5], weight [11, 5] and bias [11]."""
    shapes = ((2, 3, 5), (11, 5), (11,))
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


@SOFTCAPS
@TEMPERATURES
@pytest.mark.parametrize("results", ["logprobs", "entropy", "both"])
def test_gradcheck_and_second_derivative(
    results: str, temperature: Any, softcap: float | None, backend: str, device: str
) -> None:
    logits, targets, temperatures = inputs(device)
    keywords = {"temperature": temperatures if temperature == "per_token" else temperature, "softcap": softcap}

    def function(logits: Tensor) -> Any:
        found = fused_token_logprobs(
            logits, targets, logit_scale=1.3, return_entropy=results != "logprobs", backend=backend, **keywords
        )
        return found[1] if results == "entropy" else found

    assert torch.autograd.gradcheck(function, (logits,))
    assert torch.autograd.gradgradcheck(function, (logits,))


@SOFTCAPS
@TEMPERATURES
def test_gradcheck_and_second_derivative_of_hidden_states(
    temperature: Any, softcap: float | None, backend: str, device: str
) -> None:
    tensors = linear_inputs(device)
    _, targets, temperatures = inputs(device)
    keywords = {"temperature": temperatures if temperature == "per_token" else temperature, "softcap": softcap}

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return fused_linear_token_logprobs(
            hidden, weight, targets, bias=bias, return_entropy=True, max_chunk_bytes=2 * 11 * 8, backend=backend,
            **keywords,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_derivatives_of_the_definition(backend: str, device: str) -> None:
    """The policy gradient's two: [j = y] - p_j, and -p_j (log p_j + entropy)."""
    logits, targets, _ = inputs(device)
    logprobs, entropy = fused_token_logprobs(logits, targets, return_entropy=True, backend=backend)
    log_p = torch.log_softmax(logits.detach(), -1)
    valid = (targets != -100).unsqueeze(-1)
    hot = torch.nn.functional.one_hot(targets.clamp(min=0), 11)
    (grad,) = torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)
    torch.testing.assert_close(grad, (hot - log_p.exp()) * valid)
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    torch.testing.assert_close(grad, -log_p.exp() * (log_p + entropy.detach().unsqueeze(-1)) * valid)


def test_logprobs_are_the_loss_without_a_mixture(backend: str, device: str) -> None:
    """-nll, in value and in gradient bit for bit: there is one kernel."""
    logits, targets, _ = inputs(device, torch.float32)
    loss, stats = fused_mixce_loss(logits, targets, 1.0, reduction="none", return_stats=True, backend=backend)
    logprobs, entropy = fused_token_logprobs(logits, targets, return_entropy=True, backend=backend)
    assert torch.equal(logprobs, -loss)
    assert torch.equal(entropy, stats.entropy)
    upstream = torch.randn_like(loss)
    (grad,) = torch.autograd.grad(logprobs, logits, upstream)
    (other,) = torch.autograd.grad(loss, logits, -upstream)
    torch.testing.assert_close(grad, other, rtol=0, atol=0 if backend != "reference" else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inplace_backward_takes_the_logits_memory(dtype: torch.dtype, kernels: str, device: str) -> None:
    leaf, targets, _ = inputs(device, dtype)
    expected = torch.autograd.grad(_sum(leaf, targets, kernels), leaf)[0]
    logits = leaf * 1
    grads: list[Tensor] = []
    logits.register_hook(grads.append)
    _sum(logits, targets, kernels, inplace_backward=True).backward()
    assert grads[0].data_ptr() == logits.data_ptr()
    assert torch.equal(leaf.grad, expected)
    with pytest.raises(ValueError, match="expected logits that were computed for inplace_backward"):
        fused_token_logprobs(leaf, targets, inplace_backward=True, backend=kernels)
    again = leaf * 1
    squares = (again * again).sum()
    _sum(again, targets, kernels, inplace_backward=True).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def _sum(logits: Tensor, targets: Tensor, backend: str, **keywords: Any) -> Tensor:
    logprobs, entropy = fused_token_logprobs(logits, targets, return_entropy=True, backend=backend, **keywords)
    return logprobs.sum() + 0.1 * entropy.sum()


def test_an_entropy_may_be_written_to(backend: str, device: str) -> None:
    """As a mask does: neither result is a view."""
    logits, targets, _ = inputs(device)
    logprobs, entropy = fused_token_logprobs(logits, targets, return_entropy=True, backend=backend)
    logprobs.mul_(2)
    entropy.mul_(3)
    (logprobs.sum() + entropy.sum()).backward()
    other = logits.detach().clone().requires_grad_()
    logprobs, entropy = fused_token_logprobs(other, targets, return_entropy=True, backend="reference")
    (2 * logprobs.sum() + 3 * entropy.sum()).backward()
    torch.testing.assert_close(logits.grad, other.grad)


def test_backward_twice_and_an_overwritten_temperature(backend: str, device: str) -> None:
    """The forward's temperatures count."""
    logits, targets, temperature = inputs(device)
    kept = temperature.clone()
    found = fused_token_logprobs(logits, targets, temperature=temperature, return_entropy=True, backend=backend)
    temperature.fill_(9.0)
    first = torch.autograd.grad(found[0].sum() + found[1].sum(), logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(found[0].sum() + found[1].sum(), logits)[0])
    found = fused_token_logprobs(logits, targets, temperature=kept, return_entropy=True, backend=backend)
    torch.testing.assert_close(first, torch.autograd.grad(found[0].sum() + found[1].sum(), logits)[0])


def test_without_a_gradient_there_is_no_graph(backend: str, device: str) -> None:
    logits, targets, _ = inputs(device)
    with torch.no_grad():
        found = fused_token_logprobs(logits, targets, return_entropy=True, backend=backend)
        linear = fused_linear_token_logprobs(*linear_inputs(device)[:2], targets, return_entropy=True, backend=backend)
    assert not any(one.requires_grad for one in (*found, *linear))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_what_requires_a_gradient(needed: tuple[int, ...], backend: str, device: str) -> None:
    tensors = linear_inputs(device)
    _, targets, _ = inputs(device)
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i in needed)
    hidden, weight, bias = tensors
    leaves = [tensors[i] for i in needed]
    grads = []
    for name in (backend, "reference"):
        logprobs, entropy = fused_linear_token_logprobs(
            hidden, weight, targets, bias=bias, return_entropy=True, max_chunk_bytes=200, backend=name
        )
        grads.append(torch.autograd.grad(logprobs.sum() - entropy.sum(), leaves))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("batched", ["upstream", "logits"])
def test_vmap_and_func(batched: str, backend: str, device: str) -> None:
    logits, targets, temperature = inputs(device)

    def total(logits: Tensor, targets: Tensor, temperature: Tensor, name: str) -> Tensor:
        logprobs, entropy = fused_token_logprobs(
            logits, targets, temperature=temperature, return_entropy=True, backend=name
        )
        return (logprobs * 1.5 + entropy).sum(-1)

    found = []
    for name in (backend, "reference"):
        if batched == "logits":
            grad = torch.func.grad(lambda *tensors, name=name: total(*tensors, name))
            found.append(torch.func.vmap(grad)(logits.detach(), targets, temperature))
        else:
            results = total(logits, targets, temperature, name)
            eye = torch.eye(2, dtype=results.dtype, device=device)
            found.append(torch.autograd.grad(results, logits, eye, is_grads_batched=True)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("with_temperature", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_operators_pass_opcheck(with_entropy: bool, with_temperature: bool, kernels: str, device: str) -> None:
    logits, targets, temperature = inputs(device, torch.float32)
    temperature = temperature if with_temperature else None
    record = TokenLogprobs(logits, targets, temperature, TokenOptions(), True, with_entropy, False, kernels)
    check = torch.library.opcheck
    check(logprobs_ops.TOKEN_LOGPROBS.dispatched, logprobs_ops.TOKEN_LOGPROBS.fields.flat(record))
    _, _, state, entropy_state = logprobs_ops.token_logprobs(record)
    grads = [torch.randn(2, 3, device=device, requires_grad=True) for _ in range(2)]
    grad_record = LogprobsGrad(
        logits, targets, state, entropy_state, grads[0], grads[1] if with_entropy else None, temperature,
        TokenOptions(), kernels,
    )  # fmt: skip
    check(logprobs_ops.LOGPROBS_GRAD.dispatched, logprobs_ops.LOGPROBS_GRAD.fields.flat(grad_record))
    detached = grad_record._replace(
        logits=logits.detach().clone(), grad_logprobs=grads[0].detach(),
        grad_entropy=grads[1].detach() if with_entropy else None,
    )  # fmt: skip
    check(logprobs_ops.LOGPROBS_GRAD_.dispatched, logprobs_ops.LOGPROBS_GRAD_.fields.flat(detached))
    hidden, weight, bias = linear_inputs(device, torch.float32)
    call = LinearCall(
        hidden.detach().reshape(-1, 5).requires_grad_(), weight, bias, targets.reshape(-1), LOGPROBS, TokenOptions(),
        NO_REDUCTION, torch.float32, 200, False, "chunks", kernels,
    )  # fmt: skip
    flat = None if temperature is None else temperature.reshape(-1)
    linear = linear_ops.LinearTokenLogprobs(call, flat, True, with_entropy)
    check(linear_ops.LINEAR_TOKEN_LOGPROBS.dispatched, linear_ops.LINEAR_TOKEN_LOGPROBS.fields.flat(linear))
    call = call._replace(hidden=call.hidden.detach(), weight=weight.detach(), bias=bias.detach())
    _, _, state, entropy_state = linear_ops.linear_token_logprobs(linear._replace(call=call))
    linear_grad = linear_ops.LinearLogprobsGrad(
        call, flat, state, entropy_state, grads[0].detach().reshape(-1),
        grads[1].detach().reshape(-1) if with_entropy else None, [True, False, True],
    )  # fmt: skip
    check(linear_ops.LINEAR_LOGPROBS_GRAD.dispatched, linear_ops.LINEAR_LOGPROBS_GRAD.fields.flat(linear_grad))


@pytest.mark.parametrize("of", ["logits", "hidden"])
def test_compiles_as_one_graph(of: str, backend: str, device: str) -> None:
    """And a tensor of temperatures is data: another one compiles nothing anew."""
    torch._dynamo.reset()
    logits, targets, temperature = inputs(device, torch.float32)
    hidden, weight, bias = linear_inputs(device, torch.float32)
    leaves = [logits] if of == "logits" else [hidden, weight, bias]
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def total(targets: Tensor, temperature: Tensor, *leaves: Tensor) -> Tensor:
        keywords: dict[str, Any] = {"temperature": temperature, "return_entropy": True, "backend": backend}
        if of == "logits":
            logprobs, entropy = fused_token_logprobs(leaves[0] * 1.0, targets, **keywords)
        else:
            hidden, weight, bias = leaves
            logprobs, entropy = fused_linear_token_logprobs(hidden, weight, targets, bias=bias, **keywords)
        return (logprobs.exp() + entropy).sum()

    compiled = torch.compile(total, fullgraph=True, backend=counter)
    for factor in (1.0, 2.0):
        grads = [
            torch.autograd.grad(function(targets, temperature * factor, *leaves), leaves)
            for function in (compiled, total)
        ]
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


@pytest.mark.skipif(EMULATED is not None, reason="an emulation allocates as it likes")
def test_memory_is_the_gradient_and_some_numbers_a_token() -> None:
    """In place there is not even that."""
    leaf, targets = torch.randn(64, 9001, requires_grad=True), torch.randint(9001, (64,))
    numbers = 64 * 4 * 16

    def call(inplace: bool) -> None:
        logits = leaf * 1 if inplace else leaf
        _sum(logits, targets, "cpu", inplace_backward=inplace).backward()
        leaf.grad = None

    with torch.no_grad():
        assert allocated_bytes(lambda: _sum(leaf, targets, "cpu"))[0] <= numbers
    of_logits = leaf.numel() * 4
    assert [size for size in allocated_bytes(lambda: call(False)) if size > numbers] == [of_logits]
    # The product of the test's own, and the gradient of that.
    assert [size for size in allocated_bytes(lambda: call(True)) if size > numbers] == [of_logits] * 2
