"""The vocab-parallel loss on one to four ranks: every case of the table, held to the oracle as one process is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from conftest import BACKENDS, EMULATED, INTERPRETED
from mixce_kernels import MixCEStats, vocab_parallel_mixce_loss
from support import cases
from support.cases import BFLOAT16, STATISTICS, Case
from support.inputs import build, computed
from support.loss_checks import check, check_statistics
from support.ranks import run_ranks
from support.shards import SPLITS, column_range, everyone, padded

pytestmark = pytest.mark.slow


def _thinned(table: list[Case]) -> list[Case]:
    """Emulated kernels are slow, and have been tried on the whole table by themselves."""
    if INTERPRETED:
        return [case for case in table if math.prod(case.shape) <= 10_000][::12]
    return [case for case in table if math.prod(case.shape) <= 60_000][::8] if EMULATED else table


CASES = _thinned(cases.ALL)
STATS_CASES = _thinned(STATISTICS)


def placed(number: int, group: dist.ProcessGroup, case: Case) -> tuple[torch.Tensor, dict[str, Any]]:
    """A rank's columns of a case's logits, where they lie; every other turn with padding. And what the call is told."""
    split = list(SPLITS)[number % len(SPLITS)]
    vocab_size = case.shape[-1]
    begin, end = column_range(split, vocab_size, group)
    shard = build(case).logits.detach()[..., begin:end]
    keywords: dict[str, Any] = {"group": group, "vocab_start": begin}
    if number % 2 == 1:
        shard = padded(shard, end, vocab_size)
        keywords["vocab_size"] = vocab_size
    return shard, keywords


def parallel_loss(number: int, group: dist.ProcessGroup, case: Case, backend: str) -> None:
    """A case on the ranks of a group; the last one holds what they found to the oracle."""
    shard, keywords = placed(number, group, case)
    logits = computed(shard)
    inputs = build(case)
    loss = vocab_parallel_mixce_loss(logits, inputs.targets, inputs.eta, backend=backend, **keywords, **inputs.keywords)
    (grad,) = torch.autograd.grad(loss, logits, inputs.upstream)
    vocab_size = case.shape[-1]
    width = min(shard.shape[-1], max(vocab_size - keywords["vocab_start"], 0))
    assert (grad[..., width:] == 0).all(), "padding has a gradient"
    found = everyone(group, (loss.detach(), grad[..., :width]))
    for other, _ in found:
        torch.testing.assert_close(other, found[0][0], rtol=0, atol=0, equal_nan=True)
    if group.rank() == group.size() - 1:
        truncation = 1 if INTERPRETED and case.dtype == BFLOAT16 else 0
        check(inputs, inputs.oracle(), found[0][0], torch.cat([part for _, part in found], -1), truncation)


def parallel_stats(number: int, group: dist.ProcessGroup, case: Case, backend: str) -> None:
    """Statistics, the same on every rank."""
    shard, keywords = placed(number, group, case)
    inputs = build(case)
    _, stats = vocab_parallel_mixce_loss(
        shard, inputs.targets, inputs.eta, return_stats=True, backend=backend, **keywords, **inputs.keywords
    )
    found = everyone(group, tuple(stats))
    torch.testing.assert_close(found[0], tuple(stats), rtol=0, atol=0, equal_nan=True)
    if group.rank() == group.size() - 1:
        check_statistics(case, MixCEStats(*found[0]))


def try_all(backend: str) -> dict[str, str]:
    """What went wrong, by the case's name; groups of 1 to 4 ranks and all splits take turns."""
    groups = [dist.new_group(list(range(size))) for size in range(1, dist.get_world_size() + 1)]
    wrong = {}
    for run, table in ((parallel_loss, CASES), (parallel_stats, STATS_CASES)):
        for number, case in enumerate(table):
            size = 1 + (number + number // 4) % len(groups)
            if dist.get_rank() < size:
                try:
                    run(number, groups[size - 1], case, backend)
                except AssertionError as error:
                    wrong[str(case)] = f"{size} ranks: {error}"
    return wrong


@pytest.fixture(scope="module", params=BACKENDS)
def wrong(request: pytest.FixtureRequest) -> dict[str, str]:
    """What the ranks found wrong, by the case's name."""
    if torch.cuda.is_available() and request.param not in ("reference", "cpu", EMULATED):
        pytest.skip("the ranks have CPU tensors")
    return {name: text for found in run_ranks(try_all, 4, request.param, timeout=240.0) for name, text in found.items()}


@pytest.mark.parametrize("case", CASES + STATS_CASES, ids=str)
def test_as_in_one_process(case: Case, wrong: dict[str, str]) -> None:
    """Loss, gradient and statistics by the accuracy rule, whatever the split; the same loss on each rank."""
    assert str(case) not in wrong, wrong[str(case)]
