"""How far the matrix that a bigram model learned is from the true one, and how far that is which the loss asks for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Metrics(NamedTuple):
    """The two numbers of the paper's table."""

    avg_js: float
    avg_0s: float


def compare(probabilities: NDArray[np.float64], matrix: NDArray[np.float64]) -> Metrics:
    """The metrics of a model's `probabilities` [n + 1, n + 1] of every symbol after every symbol, against [n, n].

    Nothing follows EOS and BOS follows nothing: the last row and the first column are left out. What is left of a row
    is normalised for the divergence alone.
    """
    learned, true = probabilities[:-1, 1:], with_first(matrix)
    zero = true == 0.0
    return Metrics(float(jensen_shannon(learned, true).mean()), float(learned[zero].mean()) if zero.any() else 0.0)


def optimum_js(matrix: NDArray[np.float64], eta: float) -> float:
    """The avg. js of a model without limits, trained on data without end: for eta > 0, where the gradient is 0."""
    true = with_first(matrix)
    return float(jensen_shannon(optimum(true, eta), true).mean())


def optimum(p: NDArray[np.float64], eta: float) -> NDArray[np.float64]:
    """The rows q at which MixCE's expected gradient under the rows `p` is 0, of an eta > 0.

    With q a constant to the gradient, that is where q = p (eta + (1 - eta) q) / c, with c the sum that makes q a
    distribution: q = eta p / (c - (1 - eta) p). The sum of that falls with c, from infinity to at most 1 at c = 1.
    """
    low, high = (1 - eta) * p.max(1, keepdims=True), np.ones((len(p), 1))
    for _ in range(60):
        middle = (low + high) / 2
        too_much = (eta * p / (middle - (1 - eta) * p)).sum(1, keepdims=True) > 1
        low, high = np.where(too_much, middle, low), np.where(too_much, high, middle)
    return np.asarray(eta * p / (high - (1 - eta) * p))


def with_first(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distribution of the first symbol, any with the same probability, on top of those after each but EOS."""
    n = len(matrix)
    return np.concatenate((np.full((1, n), 1.0 / n), matrix[:-1]))


def jensen_shannon(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """The squared Jensen-Shannon distance of each row of `p` and of `q`, in nats: from 0 to ln 2."""
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    middle = (p + q) / 2
    return (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2


def _relative_entropy(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    ratio = np.divide(p, q, out=np.ones_like(p), where=p > 0)
    return np.asarray((p * np.log(ratio)).sum(1))
