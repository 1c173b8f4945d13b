"""The kernels of a split vocabulary, rank after rank in one process: loss, statistics and gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from conftest import EMULATED, INTERPRETED
from mixce_kernels import backends
from mixce_kernels.backends.results import empty_results
from mixce_kernels.backends.shards import HEADER, integers, numbers_per_token
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions
from mixce_kernels.reduction import NO_REDUCTION
from support.cases import BFLOAT16, Case
from support.shard_checks import CASES, CHECKS, check_case


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES))[:: 3 if INTERPRETED else 1], ids=str)
def test_as_the_oracle(number: int, case: Case, kernels: str) -> None:
    check_case(number, case, kernels, extra_ulps=int(INTERPRETED and case.dtype == BFLOAT16))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_rare_calls(check: Callable[[str], None], kernels: str) -> None:
    check(kernels)


@pytest.mark.skipif(bool(EMULATED), reason="of the backend cpu")
def test_nothing_is_written_before_an_error() -> None:
    """Of the backend `cpu`: the first of two rows is good, and nobody holds the other's target."""
    cpu_shards = backends.get("cpu").shards
    targets, options = torch.tensor([1, 5]), TokenOptions()
    message = torch.empty(HEADER + 2 * numbers_per_token(options, False))
    message[:HEADER].view(integers(message.dtype)).copy_(torch.tensor([0, 0, 4]))
    message[HEADER:] = torch.tensor([2.0, 2.0, 1.0, 1.0, -0.5, torch.inf])
    results = empty_results(torch.empty(2, 4), targets, NO_REDUCTION, with_state=True, with_stats=False)
    results.loss.fill_(7.0)
    assert cpu_shards.merge_messages(message[None], targets, Mixture(eta_value=0.3), options, results, None) == 1
    assert results.loss.tolist() == [7.0, 7.0]
    targets[1] = -100
    assert cpu_shards.merge_messages(message[None], targets, Mixture(eta_value=0.3), options, results, None) is None
    assert results.loss[0] != 7.0
    assert results.loss[1] == 0.0
