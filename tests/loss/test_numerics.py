"""The accuracy rule itself: results with planted faults must fail it, or no other test means anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mixce_kernels import mixce_loss_reference
from support import cases
from support.cases import Case
from support.inputs import build
from support.loss_checks import check, run
from support.numerics import assert_accurate, plain_loss_and_grad, ulp
from support.oracle import Options, np, token_results

CASE = Case("planted", shape=(6, 300), kind="masked", reduction="none", upstream="per_token")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_the_plain_formula_passes_its_own_rule(dtype: torch.dtype) -> None:
    """The rule is not so tight that what it is measured by fails."""
    inputs = build(CASE.at(dtype=dtype, ignored="none"))
    losses, grad = plain_loss_and_grad(
        inputs.flat_logits, inputs.flat_targets, 0.3, CASE.options, inputs.token_upstream * inputs.factors
    )
    check(inputs, inputs.oracle(), losses.reshape(inputs.targets.shape), grad.reshape(inputs.logits.shape))


def _largest(change: Callable[[Tensor], Tensor | float]) -> Callable[[Tensor], None]:
    """Changes the entry of largest finite magnitude."""

    def plant(result: Tensor) -> None:
        entries = result.view(-1)
        where = entries.abs().nan_to_num(0, 0, 0).argmax()
        entries[where] = change(entries[where].clone())

    return plant


FAULTS = {
    "2_percent_more": _largest(lambda entry: entry * 1.02),
    "2_percent_less": _largest(lambda entry: entry * 0.98),
    "nan": _largest(lambda _: torch.nan),
    "inf": _largest(lambda _: torch.inf),
    "zero": _largest(lambda _: 0.0),
    "sign": _largest(lambda entry: -entry),
}


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_planted_faults_fail(fault: str, where: str, dtype: torch.dtype) -> None:
    """One wrong entry, the largest, is enough."""
    inputs = build(CASE.at(dtype=dtype))
    loss, grad = (result.detach().clone() for result in run(build(CASE.at(dtype=dtype)), "reference"))
    check(inputs, inputs.oracle(), loss, grad)
    FAULTS[fault]({"loss": loss, "gradient": grad}[where])
    with pytest.raises(AssertionError, match=where):
        check(inputs, inputs.oracle(), loss, grad)


def test_infinities_and_nans_are_compared_by_place_and_sign() -> None:
    """Neither a swapped pair nor a wrong sign passes."""
    expected = np.array([np.inf, np.nan, 1.0, -np.inf])
    good = torch.tensor([torch.inf, torch.nan, 1.0, -torch.inf])
    assert_accurate("result", good, expected, good, 1.0)
    for order in ([1, 0, 2, 3], [3, 1, 2, 0], [2, 1, 0, 3]):
        with pytest.raises(AssertionError, match="in other places"):
            assert_accurate("result", good[order], expected, good, 1.0)


def test_a_plain_formula_without_a_value_loosens_nothing() -> None:
    """Where the plain formula is NaN, it sets no measure."""
    expected = np.array([1.0, 2.0])
    plain = torch.tensor([torch.nan, 2.0])
    with pytest.raises(AssertionError, match="exceeds"):
        assert_accurate("result", torch.tensor([1.01, 2.0]), expected, plain, 0.0)


def test_float32_steps_in_float64_fail() -> None:
    """A float64 result that passed through float32 is not a float64 result."""
    inputs = build(CASE.at(dtype=cases.FLOAT64))
    loss, grad = run(build(CASE.at(dtype=cases.FLOAT64)), "reference")
    with pytest.raises(AssertionError, match="gradient"):
        check(inputs, inputs.oracle(), loss, grad.float().double())


@pytest.mark.parametrize(
    ("magnitude", "dtype", "expected"),
    [
        (1.0, torch.float32, 2.0**-23), (1.99, torch.float32, 2.0**-23), (0.75, torch.bfloat16, 2.0**-8),
        (0.0, torch.float16, 2.0**-24), (1e-6, torch.float16, 2.0**-24), (2.0, torch.float64, 2.0**-51),
    ],
)  # fmt: skip
def test_ulp(magnitude: float, dtype: torch.dtype, expected: float) -> None:
    """The distance between neighbours, subnormal ones too."""
    assert ulp(magnitude, dtype) == expected


def test_oracle_by_hand() -> None:
    """Two logits whose probabilities are 1/4 and 3/4: every number of the formula can be checked on paper."""
    logits, eta = np.array([[0.0, np.log(3.0)]]), np.array([0.5])
    result = token_results(logits, np.array([0]), eta, Options(z_loss=0.1))
    nll, lse, weight = np.log(4.0), np.log(4.0), 0.625
    np.testing.assert_allclose(result.loss, [weight * nll + 0.1 * lse**2], rtol=1e-14)
    z_slope = 0.2 * lse
    np.testing.assert_allclose(
        result.grad, [[weight * -0.75 + z_slope * 0.25, weight * 0.75 + z_slope * 0.75]], rtol=1e-14
    )
    np.testing.assert_allclose(result.entropy, [0.25 * np.log(4) + 0.75 * np.log(4 / 3)], rtol=1e-14)


@pytest.mark.parametrize("case", [case for case in cases.RANDOM if case.dtype != cases.FLOAT64], ids=str)
def test_reference_in_float64_is_the_oracle(case: Case) -> None:
    """`mixce_loss_reference`, differentiated by PyTorch, and the oracle, by hand, agree to float64's digits."""
    inputs = build(case.at(mode="plain"))
    logits = inputs.logits.detach().double().requires_grad_()
    eta = inputs.eta.double() if isinstance(inputs.eta, Tensor) else inputs.eta
    keywords = {**inputs.keywords, "reduction": "none", "token_weights": None, "num_items_in_batch": None}
    losses = mixce_loss_reference(logits, inputs.targets, eta, **keywords)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    expected = inputs.oracle()
    # Sums of at most 5000 terms, in another order, of logits up to 1000 in size: 1e4 float64 epsilons cover both.
    torch.testing.assert_close(losses.detach().reshape(-1), torch.from_numpy(expected.loss), rtol=2e-12, atol=2e-12)
    torch.testing.assert_close(
        grad.reshape(expected.grad.shape), torch.from_numpy(expected.grad), rtol=2e-12, atol=2e-12
    )
