"""Weightings as text, for configurations: `repr` writes what `parse` reads."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from mixce_kernels import MixCELoss
from mixce_kernels.weightings import (
    Band,
    CollisionPower,
    Entropy,
    Focal,
    Power,
    Probability,
    TaiLr,
    Variance,
    parse,
)

WEIGHTINGS = (
    Probability(), Power(0.7), TaiLr(0.3, 0.05), Band(1e-4, 0.02), Focal(2.0), Variance(), Entropy(0.5, 2.0),
    CollisionPower(),
)  # fmt: skip


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
def test_repr_is_what_parse_reads(weighting: Any) -> None:
    assert parse(repr(weighting)) == weighting
    assert pickle.loads(pickle.dumps(weighting)) == weighting
    assert parse(f"  {type(weighting).__name__}{str(weighting.parameters()).replace(',)', ')')} ") == weighting


def test_parse_takes_a_bare_name() -> None:
    assert parse("Variance") == Variance()
    assert parse("Entropy") == Entropy()
    assert parse("TaiLr(0.5, floor=0.1)") == TaiLr(0.5, 0.1)


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ("Powers(0.5)", ValueError, "expected one of Probability, Power, .*, got 'Powers\\(0.5\\)'"),
        ("Given(1.0)", ValueError, "expected one of Probability"),
        ("__import__('os')", ValueError, "expected one of Probability"),
        ("Power(alpha=open('x'))", ValueError, "expected one of Probability"),
        ("Power", TypeError, "expected Power with its parameters, got 'Power'"),
        ("Power(0.5, 0.5)", ValueError, "expected Power with the parameters alpha, got"),
        ("Power(beta=0.5)", ValueError, "expected Power with the parameters alpha, got"),
        ("Power(0.5, alpha=0.5)", ValueError, "expected Power with the parameters alpha, got"),
        ("Variance(1)", ValueError, "expected Variance with the parameters none, got"),
        ("Power(alpha='x')", TypeError, "expected alpha to be a number, got str"),
        ("Power(alpha=-1)", ValueError, "expected alpha to be finite and not negative, got -1"),
        ("", ValueError, "expected one of Probability"),
        (None, ValueError, "expected one of Probability"),
    ],
)
def test_what_parse_refuses(text: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        parse(text)


def test_module_shows_its_weighting() -> None:
    assert repr(MixCELoss(0.2, weighting=Power(0.5))) == "MixCELoss(eta=0.2, weighting=Power(alpha=0.5))"
