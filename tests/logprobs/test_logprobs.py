"""Log-probabilities, entropies and their gradient of every case on every backend, held to the oracle by the rule."""

from __future__ import annotations

import math

import pytest

from conftest import INTERPRETED
from mixce_kernels import fused_token_logprobs
from support import logprob_cases
from support.cases import BFLOAT16
from support.logprob_cases import LogprobCase, build_logprobs, check_found, differentiated

# An interpreted kernel costs by the operation: every third case that is not large.
FEW = [one for one in logprob_cases.ALL if math.prod(one.case.shape) <= 60_000][::3]


@pytest.mark.parametrize("one", FEW if INTERPRETED else logprob_cases.ALL, ids=str)
def test_logprobs_entropy_and_gradient(one: LogprobCase, backend: str, device: str) -> None:
    inputs = build_logprobs(one).to(device)
    result = fused_token_logprobs(inputs.logits, inputs.targets, backend=backend, **inputs.keywords)
    found = differentiated(result, inputs)
    # The interpreter truncates where a device rounds to bfloat16.
    truncation = 1 if INTERPRETED and one.case.dtype == BFLOAT16 else 0
    found = type(found)(*(None if one is None else one.cpu() for one in found))
    check_found(build_logprobs(one), found, truncation)
