"""Weightings: the published formulas, functions of the caller's, and parameters as numbers and as tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
import torch.utils.checkpoint
from torch import Tensor
from torch.nn import functional as F

from conftest import INTERPRETED
from mixce_kernels import MixCELoss, MixCEStats, fused_linear_mixce_loss, fused_mixce_loss, weightings
from mixce_kernels.weightings import (
    Band,
    CollisionPower,
    Entropy,
    Focal,
    Power,
    Probability,
    TaiLr,
    Variance,
)
from support.cases import MODES
from support.inputs import computed

EVERY_MODE = pytest.mark.parametrize("mode", MODES)
BUILT_IN: dict[str, tuple[Any, Callable[[MixCEStats], Tensor]]] = {
    "Probability": (Probability(), lambda stats: stats.q),
    "Power": (Power(0.7), lambda stats: torch.exp(-0.7 * stats.nll)),
    "TaiLr": (TaiLr(0.3, 0.05), lambda stats: (stats.q / (0.3 + 0.7 * stats.q)).clamp(min=0.05)),
    "Band": (Band(1e-4, 0.02), lambda stats: ((stats.q >= 1e-4) & (stats.q <= 0.02)).to(stats.q.dtype)),
    "Focal": (Focal(2.0), lambda stats: torch.expm1(-stats.nll).square()),
    "Variance": (Variance(), lambda stats: -stats.q * torch.expm1(-stats.nll)),
    "Entropy": (Entropy(0.5, 2.0), lambda stats: (stats.entropy / 2.0).sqrt()),
    "CollisionPower": (CollisionPower(), lambda stats: stats.q**stats.collision),
}


def inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits [2, 5, 300] and targets, of which one is ignored and some are likely."""
    logits = 3 * torch.randn(2, 5, 300, device=device, dtype=torch.float64)
    targets = torch.randint(300, (2, 5), device=device)
    logits.scatter_add_(-1, targets.unsqueeze(-1), torch.linspace(0, 25, 10, device=device).double().view(2, 5, 1))
    targets[1, 2] = -100
    return logits.to(dtype), targets


def loss_and_grad(logits: Tensor, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    """Of a copy of the logits."""
    copy = computed(logits.clone())
    loss = fused_mixce_loss(copy, *args, **keywords)
    return loss.detach(), *torch.autograd.grad(loss.sum(), copy)


def assert_close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], roundings: int = 16) -> None:
    for one, other in zip(got, expected, strict=True):
        epsilon = torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=roundings * epsilon, atol=roundings * epsilon)


@EVERY_MODE
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_function_of_the_caller_s_equals_the_built_in(name: str, mode: str, backend: str, device: str) -> None:
    """The same loss and gradient, with every option, in every mode."""
    built_in, function = BUILT_IN[name]
    logits, targets = inputs(device)
    keywords = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0, "backend": backend, **MODES[mode]}
    expected = loss_and_grad(logits, targets, 0.2, weighting=built_in, **keywords)
    assert_close(loss_and_grad(logits, targets, 0.2, weighting=function, **keywords), expected, roundings=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_a_function_gets(dtype: torch.dtype, backend: str, device: str) -> None:
    """One call a forward, with detached statistics of all tokens and no graph; `weight` is not known yet."""
    logits, targets = inputs(device, dtype)
    calls = []

    def function(stats: MixCEStats) -> Tensor:
        assert not torch.is_grad_enabled()
        calls.append(stats)
        return torch.full_like(stats.q, 0.5)

    loss, stats = fused_mixce_loss(
        logits.requires_grad_(), targets, 0.2, weighting=function, return_stats=True, backend=backend
    )
    loss.backward()
    (found,) = calls
    assert isinstance(found, MixCEStats)
    valid = targets != -100
    assert found.weight.isnan().all()
    for name in ("nll", "q", "lse", "entropy", "collision"):
        one = getattr(found, name)
        assert one.shape == targets.shape
        assert one.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not one.requires_grad
        assert (one[~valid] == 0).all()
        torch.testing.assert_close(one, getattr(stats, name))
    assert torch.equal(found.correct, stats.correct)
    torch.testing.assert_close(stats.weight, torch.where(valid, 0.2 + 0.8 * 0.5, 0.0).to(stats.weight.dtype))


class _Doubled(Power):
    """A class of the caller's: no kernel knows it, and its own formula counts."""

    def __call__(self, stats: MixCEStats) -> Tensor:
        return 2 * super().__call__(stats)


class _Own(weightings.Weighting):
    def __call__(self, stats: MixCEStats) -> Tensor:
        return 2 * torch.exp(-0.5 * stats.nll)


@pytest.mark.parametrize("weighting", [_Doubled(0.5), _Own()], ids=["of a built-in", "of the base"])
def test_classes_of_the_caller_s(weighting: Any, backend: str, device: str) -> None:
    logits, targets = inputs(device)
    got, expected = (
        loss_and_grad(logits, targets, 0.2, weighting=one, backend=backend)
        for one in (weighting, lambda stats: 2 * torch.exp(-0.5 * stats.nll))
    )
    assert_close(got, expected)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_returned_weight(name: str, backend: str, device: str) -> None:
    """It is eta + (1 - eta) * f of the returned statistics."""
    weighting, _ = BUILT_IN[name]
    logits, targets = inputs(device)
    _, stats = fused_mixce_loss(logits, targets, 0.2, weighting=weighting, return_stats=True, backend=backend)
    expected = torch.where(targets != -100, 0.2 + 0.8 * weighting(stats), 0.0)
    torch.testing.assert_close(stats.weight, expected, rtol=1e-5, atol=1e-6)


def test_bands_are_decided_on_the_returned_q(backend: str, device: str) -> None:
    """To the last bit: a band that ends at a token's q has it, and one that begins behind it has not."""
    logits, targets = inputs(device)
    _, stats = fused_mixce_loss(logits, targets, return_stats=True, backend=backend)
    q = stats.q[targets != -100]
    behind = torch.nextafter(q, torch.full_like(q, 2.0)).clamp(max=1.0)
    for low, high in ((q, q), (torch.zeros_like(q), q), (q, torch.ones_like(q))):
        every = [
            fused_mixce_loss(
                logits, targets, 0.0, weighting=Band(float(a), float(b)), return_stats=True, backend=backend
            )[1].weight[targets != -100][i]
            for i, (a, b) in enumerate(zip(low, high, strict=True))
        ]
        assert every == [1.0] * len(q)
    for i, first in enumerate(behind):
        if first > q[i]:
            band = Band(float(first), 1.0)
            weight = fused_mixce_loss(logits, targets, 0.0, weighting=band, return_stats=True, backend=backend)[
                1
            ].weight
            assert weight[targets != -100][i] == 0.0


def _published(name: str, logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over valid tokens as the authors' or a trainer's code has it, in the logits' dtype."""
    log_p = F.log_softmax(logits, -1)
    nll = -log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    valid = targets != -100
    q = nll.neg().exp()
    if name == "dft":  # softmax(logits).gather(labels).detach() * loss
        token = logits.softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1).detach() * nll
    elif name == "beyond_log_likelihood":  # GeneralFamily-8
        token = -((8 * -nll).exp() - 1) / 8
    elif name == "only_top_log_p":
        token = nll * (q.detach() >= 0.3)
    elif name == "tailr":
        with torch.no_grad():
            weight = torch.clamp((q.log() - (0.1 + 0.9 * q).log()).exp(), min=0.2, max=1.0)
        token = weight * nll
    elif name == "chord_phi":
        token = nll * (q * (1 - q)).detach()
    elif name == "deft":
        alpha = logits.softmax(-1).pow(2).sum(-1).detach()
        token = -((alpha * -nll).exp() - 1) / alpha
    elif name == "eaft":  # of the entropy of the whole row
        entropy = -(log_p.exp() * log_p).sum(-1).detach()
        token = (entropy / 3.0) ** 1.0 * nll
    else:
        raise ValueError(name)
    return (token * valid).sum() / valid.sum()


PUBLISHED = {
    "dft": (Probability(), True),
    "beyond_log_likelihood": (Power(8.0), False),
    "only_top_log_p": (Band(0.3, 1.0), True),
    "tailr": (TaiLr(0.1, 0.2), True),
    "chord_phi": (Variance(), True),
    "deft": (CollisionPower(), False),
    "eaft": (Entropy(), True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_published(name: str, backend: str, device: str) -> None:
    """The gradient of the authors' code in float64, and its loss where that is not another one with this gradient."""
    weighting, same_loss = PUBLISHED[name]
    logits, targets = inputs(device, torch.float64)
    loss, grad = loss_and_grad(logits, targets, 0.0, weighting=weighting, backend=backend)
    leaf = logits.clone().requires_grad_()
    expected = _published(name, leaf, targets)
    torch.testing.assert_close(grad, *torch.autograd.grad(expected, leaf), rtol=1e-10, atol=1e-12)
    if same_loss:
        torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize("shape", [(), (5,), (2, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_parameters_as_tensors(shape: tuple[int, ...], dtype: torch.dtype, backend: str, device: str) -> None:
    """They broadcast to the tokens, and count as they were in the forward."""
    logits, targets = inputs(device)
    alpha = (torch.rand(shape, device=device) + 0.5).to(dtype)
    weighting = Power(alpha)
    copy = computed(logits.clone())
    loss = fused_mixce_loss(copy, targets, 0.2, weighting=weighting, reduction="none", backend=backend)
    one_by_one = [
        [
            fused_mixce_loss(logits[i, j], targets[i, j], 0.2, weighting=Power(float(value)), backend=backend)
            for j, value in enumerate(row)
        ]
        for i, row in enumerate(alpha.expand(2, 5))
    ]
    expected = torch.stack([torch.stack(row) for row in one_by_one])
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=1e-7)
    before = torch.autograd.grad(loss.sum(), copy, retain_graph=True)[0]
    alpha.fill_(0.0)
    copy = computed(logits.clone())
    loss = fused_mixce_loss(copy, targets, 0.2, weighting=weighting, reduction="none", backend=backend)
    alpha.fill_(9.0)
    assert_close(
        torch.autograd.grad(loss.sum(), copy),
        loss_and_grad(logits, targets, 0.2, weighting=Power(0.0), reduction="none", backend=backend)[1:],
    )
    assert not torch.equal(before, loss_and_grad(logits, targets, 0.2, weighting=Power(0.0), backend=backend)[1])


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("mode", ["plain", "grad_in_forward"])
@pytest.mark.parametrize("name", ["Power", "Entropy", "function"])
def test_one_graph(name: str, mode: str, kernels: str, device: str) -> None:
    """Built-in or a function of the caller's, under `torch.compile(fullgraph=True)`."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    logits, targets = inputs(device)
    weighting = (lambda stats: stats.q.sqrt() / stats.q.mean()) if name == "function" else BUILT_IN[name][0]
    keywords = {"weighting": weighting, "backend": kernels, **MODES[mode]}

    def loss(values: Tensor) -> Tensor:
        return fused_mixce_loss(values * 1.0, targets, 0.3, **keywords)

    leaf = logits.clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(one(leaf), leaf) for one in (compiled, loss))
    assert_close(got, expected)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("dynamic", [None, False])
def test_no_stale_numbers_in_a_graph(dynamic: bool | None, kernels: str, device: str) -> None:
    """A parameter that changes from step to step has the value of its call; as a tensor nothing compiles anew."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    logits, targets = inputs(device)
    compiled = torch.compile(fused_mixce_loss, fullgraph=True, backend=counter, dynamic=dynamic)
    for alpha in (0.5, 0.25, 0.75, 2.0):
        torch.testing.assert_close(
            compiled(logits, targets, 0.3, weighting=Power(alpha), backend=kernels),
            fused_mixce_loss(logits, targets, 0.3, weighting=Power(alpha), backend=kernels),
        )
    compiled(logits, targets, 0.3, weighting=Power(torch.tensor(0.5, device=device)), backend=kernels)
    count = counter.frame_count
    for alpha in (0.25, 3.0):
        tensor = torch.tensor(alpha, device=device)
        torch.testing.assert_close(
            compiled(logits, targets, 0.3, weighting=Power(tensor), backend=kernels),
            fused_mixce_loss(logits, targets, 0.3, weighting=Power(alpha), backend=kernels),
        )
    assert counter.frame_count == count


@pytest.mark.parametrize("weighting", [Power(0.5), lambda stats: stats.q.sqrt()], ids=["built-in", "function"])
def test_within_a_checkpoint(weighting: Any, backend: str, device: str) -> None:
    logits, targets = inputs(device)

    def loss(values: Tensor) -> Tensor:
        return fused_mixce_loss(values * 2.0, targets, 0.3, weighting=weighting, backend=backend)

    leaf = logits.clone().requires_grad_()
    expected = torch.autograd.grad(loss(leaf), leaf)
    got = torch.autograd.grad(torch.utils.checkpoint.checkpoint(loss, leaf, use_reentrant=False), leaf)
    assert_close(got, expected)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels do not transform")
@pytest.mark.parametrize(
    "weighting", [Power(0.5), Power(torch.rand(5) + 0.1), Entropy(), lambda stats: stats.q.sqrt()],
    ids=["number", "tensor", "entropy", "function"],
)  # fmt: skip
def test_vmap(weighting: Any, backend: str, device: str) -> None:
    """One call for a batch of batches is a call for each."""
    logits, targets = inputs(device)
    weighting = weighting.to(torch.device(device)) if isinstance(weighting, weightings.Weighting) else weighting

    def grads(values: Tensor, positions: Tensor) -> Tensor:
        return torch.func.grad(lambda x: fused_mixce_loss(x, positions, 0.3, weighting=weighting, backend=backend))(
            values
        )

    got = torch.func.vmap(grads)(logits, targets)
    expected = torch.stack([grads(one, positions) for one, positions in zip(logits, targets, strict=True)])
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(INTERPRETED, reason="checked natively")
@pytest.mark.parametrize("name", BUILT_IN)
def test_second_derivative(name: str, kernels: str, device: str) -> None:
    """Of the plain formula with the weight held fixed, as the first has it."""
    weighting, _ = BUILT_IN[name]
    logits, targets = inputs(device, torch.float64)
    results = []
    for backend in (kernels, "reference"):
        leaf = logits.clone().requires_grad_()
        loss = fused_mixce_loss(leaf * 1, targets, 0.2, weighting=weighting, backend=backend)
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_function_sees_all_tokens_of_hidden_states(reduction: str, backend: str, device: str) -> None:
    """However small the chunks: it may look at the mean of the batch."""
    hidden = torch.randn(9, 16, device=device, requires_grad=True)
    weight = torch.randn(50, 16, device=device, requires_grad=True)
    targets = torch.randint(50, (9,), device=device)
    targets[3] = -100
    calls = []

    def function(stats: MixCEStats) -> Tensor:
        calls.append(stats.q.shape)
        return stats.q / stats.means().q

    results = []
    for size in (50 * 4, 50 * 4 * 2, None):
        loss = fused_linear_mixce_loss(
            hidden, weight, targets, 0.1, weighting=function, reduction=reduction, max_chunk_bytes=size, backend=backend
        )
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight))))
    assert calls == [(9,)] * 3
    assert_close(results[0], results[2])
    assert_close(results[1], results[2])
    loss = fused_mixce_loss(hidden @ weight.T, targets, 0.1, weighting=function, reduction=reduction, backend=backend)
    assert_close(results[0], (loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight))))


def test_certain_tokens(backend: str, device: str) -> None:
    """Near and at q = 1: 1 - q has the digits of nll, and no factor is negative or NaN."""
    logits = torch.zeros(40, 300, device=device)
    logits[:, 7] = torch.linspace(0, 200, 40, device=device)
    targets = torch.full((40,), 7, device=device)
    for weighting in (Focal(0.5), Focal(1.0), Variance(), Entropy(0.5)):
        _, stats = fused_mixce_loss(logits, targets, 0.0, weighting=weighting, return_stats=True, backend=backend)
        nll = stats.nll.double()
        expected = {
            Focal(0.5): (-torch.expm1(-nll)).sqrt(),
            Focal(1.0): -torch.expm1(-nll),
            Variance(): -torch.expm1(-nll) * torch.exp(-nll),
            Entropy(0.5): (stats.entropy.double().clamp(min=0) / 3).sqrt(),
        }[weighting]
        assert (stats.weight >= 0).all()
        # A kernel may know nll and the entropy better than it returns them.
        torch.testing.assert_close(stats.weight.double(), expected, rtol=1e-5, atol=1e-12)


def test_module(backend: str, device: str) -> None:
    logits, targets = inputs(device)
    expected = fused_mixce_loss(logits, targets, 0.2, weighting=Power(0.5), backend=backend)
    assert torch.equal(MixCELoss(0.2, weighting=Power(0.5), backend=backend)(logits, targets), expected)
