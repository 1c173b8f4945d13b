"""`TokenMetrics`: means over tokens and not over batches, on ranks too; and which versions integrations take."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from mixce_kernels import fused_mixce_loss
from mixce_kernels.integrations import TokenMetrics
from mixce_kernels.integrations.versions import require
from support.ranks import run_ranks

# Sums of some dozen float32 statistics, added in float64.
RELATIVE = 1e-6


def add(metrics: TokenMetrics, tokens: int, seed: int, ignore_index: int = -100) -> torch.Tensor:
    """Adds a batch, two of whose tokens are ignored; returns the nll of the others."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens + 2, 13, generator=generator)
    targets = torch.randint(1, 13, (tokens + 2,), generator=generator)
    targets[:2] = ignore_index
    stats = fused_mixce_loss(logits, targets, return_stats=True, ignore_index=ignore_index)[1]
    metrics.update(stats, targets, ignore_index)
    return stats.nll[2:]


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_means_are_over_tokens(ignore_index: int) -> None:
    metrics = TokenMetrics()
    nll = torch.cat([add(metrics, tokens, tokens, ignore_index) for tokens in (1, 20, 3)])
    found = metrics.compute()
    assert found["tokens"] == 24
    assert found["nll"] == pytest.approx(nll.mean().item(), rel=RELATIVE)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))


def test_reading_starts_anew() -> None:
    metrics = TokenMetrics()
    assert metrics.compute() == {}
    add(metrics, 5, 0)
    first = metrics.compute()
    assert metrics.compute() == {}
    add(metrics, 5, 0)
    assert metrics.compute() == first


def test_nothing_but_ignored_tokens() -> None:
    metrics = TokenMetrics()
    add(metrics, 0, 0)
    assert metrics.compute() == {}


def test_an_ignored_token_is_not_correct() -> None:
    """Index 0 has the largest logit and is ignored."""
    metrics = TokenMetrics()
    logits, targets = torch.tensor([[9.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 1])
    metrics.update(fused_mixce_loss(logits, targets, return_stats=True, ignore_index=0)[1], targets, 0)
    assert metrics.compute()["accuracy"] == 1.0


def test_improbable_targets() -> None:
    metrics = TokenMetrics()
    logits, targets = torch.tensor([[0.0, 1e4]]), torch.tensor([0])
    metrics.update(fused_mixce_loss(logits, targets, return_stats=True)[1], targets)
    found = metrics.compute()
    assert found["nll"] == 1e4
    assert found["perplexity"] == math.inf


def means_of_ranks() -> dict[str, float]:
    """Rank 0 has 4 tokens, rank 1 has 20, rank 2 has seen no batch."""
    metrics = TokenMetrics()
    rank = dist.get_rank()
    if rank < 2:
        add(metrics, (4, 20)[rank], rank)
    return metrics.compute(dist.group.WORLD)


def test_means_over_ranks() -> None:
    metrics = TokenMetrics()
    for rank, tokens in enumerate((4, 20)):
        add(metrics, tokens, rank)
    expected = metrics.compute()
    for found in run_ranks(means_of_ranks, 3):
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ("4.48.3", r"expected some_package >= 4.49, < 6, got 4\.48\.3"),
        ("6.0.0", r"expected some_package >= 4.49, < 6, got 6\.0\.0"),
        ("6.0.0.dev0", r"got 6\.0\.0\.dev0"),
        ("unknown", "got unknown"),
        ("4.49.0", None),
        ("4.49", None),
        ("5.99.0rc1", None),
    ],
)
def test_versions(installed: str, message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("some_package")
    module.__version__ = installed  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "some_package", module)
    if message is None:
        assert require("some_package", "4.49", "6") is module
    else:
        with pytest.raises(ImportError, match=message):
            require("some_package", "4.49", "6")


def test_missing_package() -> None:
    message = (
        r"expected no_such_package >= 1, < 2, which is not installed: pip install 'mixce_kernels\[no_such_package\]'"
    )
    with pytest.raises(ImportError, match=message):
        require("no_such_package", "1", "2")


@pytest.mark.parametrize("installed", ["4.48.3", "6.1.0"])
def test_unsupported_transformers(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'transformers'")
    import importlib

    from mixce_kernels.integrations import transformers as integration

    monkeypatch.setattr(transformers, "__version__", installed)
    with pytest.raises(ImportError, match=f"expected transformers >= 4.49, < 6, got {installed}"):
        importlib.reload(integration)
    monkeypatch.undo()
    importlib.reload(integration)
