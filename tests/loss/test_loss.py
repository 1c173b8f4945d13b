"""Loss, gradient and statistics of every case on every backend, held to the oracle by the accuracy rule."""

from __future__ import annotations

import math

import pytest

from conftest import INTERPRETED
from support import cases
from support.cases import BFLOAT16, Case
from support.inputs import build
from support.loss_checks import check, run

# An interpreted kernel costs by the operation: every fifth case that is not large.
INTERPRETED_CASES = [case for case in cases.ALL if math.prod(case.shape) <= 60_000][::5]


@pytest.mark.parametrize("case", INTERPRETED_CASES if INTERPRETED else cases.ALL, ids=str)
def test_loss_and_gradient(case: Case, backend: str, device: str) -> None:
    """Every case of the table."""
    loss, grad = run(build(case).to(device), backend)
    inputs = build(case)
    # The interpreter truncates where a device rounds to bfloat16.
    truncation = 1 if INTERPRETED and case.dtype == BFLOAT16 else 0
    check(inputs, inputs.oracle(), loss.cpu(), grad.cpu(), truncation)
