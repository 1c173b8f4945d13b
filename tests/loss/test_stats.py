"""The statistics that come with the loss: their values, their types, and that asking for them changes nothing."""

from __future__ import annotations

import pytest
import torch

from conftest import INTERPRETED
from mixce_kernels import fused_mixce_loss
from support.cases import DTYPES, MODES, STATISTICS, Case
from support.inputs import build
from support.loss_checks import check_statistics


@pytest.mark.parametrize("case", STATISTICS[::9] if INTERPRETED else STATISTICS, ids=str)
def test_statistics(case: Case, backend: str, device: str) -> None:
    """Of every case, held to the oracle's."""
    moved = build(case).to(device)
    _, stats = fused_mixce_loss(
        moved.logits, moved.targets, moved.eta, return_stats=True, backend=backend, **moved.keywords
    )
    check_statistics(case, stats)


@pytest.mark.parametrize("softcap", [None, 30.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_are_probabilities(backend: str, device: str, softcap: float | None, dtype: torch.dtype) -> None:
    """No nll below 0, no q above 1, no entropy below 0: exactly, also for tokens that are almost certain."""
    logits = torch.randn(200, 64, device=device)
    targets = torch.randint(64, (200,), device=device)
    logits[torch.arange(200), targets] = torch.linspace(0, 60, 200, device=device)
    loss, stats = fused_mixce_loss(
        logits.to(dtype), targets, 0.0, softcap=softcap, reduction="none", return_stats=True, backend=backend
    )
    assert (stats.nll >= 0).all()
    assert (stats.q <= 1).all()
    assert (stats.weight <= 1).all()
    assert (loss >= 0).all()
    assert (stats.entropy >= -1e-6).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_asking_for_statistics_changes_nothing_else(kernels: str, device: str, mode: str, dtype: torch.dtype) -> None:
    """Loss and gradient are those of a call without them, but for a rounding."""
    results = []
    for return_stats in (False, True):
        moved = build(Case("bits", shape=(6, 2500), dtype=dtype, mode=mode, kind="masked")).to(device)
        result = fused_mixce_loss(
            moved.logits, moved.targets, moved.eta, return_stats=return_stats, backend=kernels, **moved.keywords
        )
        loss = result[0] if return_stats else result
        results.append((loss, *torch.autograd.grad(loss, moved.logits, moved.upstream)))
    for without, with_statistics in zip(*results, strict=True):
        epsilon = torch.finfo(without.dtype).eps
        torch.testing.assert_close(with_statistics, without, rtol=2 * epsilon, atol=2 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [5, 2049, 5000])
def test_correct_is_the_first_of_the_largest(backend: str, device: str, dtype: torch.dtype, size: int) -> None:
    """As `argmax`: of equal logits the first counts."""
    logits = torch.zeros(4, size, device=device, dtype=dtype)
    logits[:, 2] = logits[:, -1] = 1.0
    targets = torch.tensor([2, size - 1, 0, -100], device=device)
    _, stats = fused_mixce_loss(logits, targets, return_stats=True, backend=backend)
    assert stats.correct.tolist() == [True, False, False, False]


def test_entropy_of_known_distributions(backend: str, device: str) -> None:
    """Log V of the uniform one, 0 of a certain one, log 2 of a coin's among masked logits."""
    logits = torch.zeros(3, 4096, device=device)
    logits[1, 7] = 200.0
    logits[2, 2:] = -torch.inf
    _, stats = fused_mixce_loss(logits, torch.tensor([0, 7, 1], device=device), return_stats=True, backend=backend)
    expected = torch.tensor([4096.0, 1.0, 2.0]).log()
    torch.testing.assert_close(stats.entropy.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_means_are_over_the_tokens_that_count(backend: str, device: str, ignore_index: int) -> None:
    """An ignored token has statistics of 0, which no mean may take for its own."""
    logits = 3 * torch.randn(7, 50, device=device)
    targets = torch.tensor([1, 2, 3, 4, 5, 6, 7], device=device)
    targets[[0, 2, 3, 5]] = ignore_index
    # A token that is as sure as can be has nll 0, and counts.
    logits[4, 5] = 200.0
    stats = fused_mixce_loss(logits, targets, 0.3, ignore_index=ignore_index, return_stats=True, backend=backend)[1]
    valid = targets != ignore_index
    assert torch.equal(stats.valid, valid)
    means = stats.means()
    nll = torch.nn.functional.cross_entropy(logits.double(), targets, ignore_index=ignore_index)
    torch.testing.assert_close(means.nll, nll.float())
    torch.testing.assert_close(means.perplexity, nll.exp().float())
    torch.testing.assert_close(means.accuracy, (logits.argmax(-1) == targets)[valid].float().mean())
    for name in ("q", "weight", "lse", "entropy"):
        torch.testing.assert_close(getattr(means, name), getattr(stats, name)[valid].mean())


def test_means_of_nothing(backend: str, device: str) -> None:
    """No token, no mean."""
    targets = torch.full((3,), -100, device=device)
    stats = fused_mixce_loss(torch.randn(3, 9, device=device), targets, return_stats=True, backend=backend)[1]
    assert all(mean.isnan() for mean in stats.means())


def test_means_of_infinite_losses(backend: str, device: str) -> None:
    """A target without probability counts, and so does a row of NaN."""
    logits = torch.zeros(3, 9, device=device)
    logits[0, 1] = -torch.inf
    stats = fused_mixce_loss(logits, torch.tensor([1, -100, 2], device=device), return_stats=True, backend=backend)[1]
    assert stats.valid.tolist() == [True, False, True]
    assert stats.means().nll == torch.inf
    logits[2, 0] = torch.nan
    stats = fused_mixce_loss(logits, torch.tensor([-100, -100, 2], device=device), return_stats=True, backend=backend)[
        1
    ]
    assert stats.valid.tolist() == [False, False, True]
    assert stats.means().nll.isnan()
