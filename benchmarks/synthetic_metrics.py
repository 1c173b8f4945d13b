"""How far the matrix that a bigram model learned is from the true one."""

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
    is normalised for the divergence alone. The true first symbol is any with the same probability.
    """
    n = len(matrix)
    learned = probabilities[:-1, 1:]
    true = np.concatenate((np.full((1, n), 1.0 / n), matrix[:-1]))
    zero = true == 0.0
    return Metrics(float(jensen_shannon(learned, true).mean()), float(learned[zero].mean()) if zero.any() else 0.0)


def jensen_shannon(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """The squared Jensen-Shannon distance of each row of `p` and of `q`, in nats: from 0 to ln 2."""
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    middle = (p + q) / 2
    return (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2


def _relative_entropy(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    ratio = np.divide(p, q, out=np.ones_like(p), where=p > 0)
    return np.asarray((p * np.log(ratio)).sum(1))
