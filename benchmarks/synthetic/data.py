"""Data of the synthetic experiment: a random transition matrix, and sequences sampled from it, all at once.

Symbols are 1..n, of which n is EOS; 0 begins every sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BOS = 0
# Of the Dirichlet distribution of a row, and of an entry to be 0.
CONCENTRATION = 0.5
ZEROS = 0.5


def transition_matrix(n: int, seed: int) -> NDArray[np.float64]:
    """The true matrix [n, n]: from symbol i + 1 to symbol j + 1. Nothing follows EOS: its row is 0.

    NumPy's legacy generator, drawn from as the authors' code does: their seeds give their matrices.
    """
    generator = np.random.RandomState(seed)
    matrix = generator.dirichlet(np.full(n, CONCENTRATION), size=n)
    # EOS stays possible after every symbol, or a row might have nothing left.
    matrix[:-1, :-1][generator.random_sample((n - 1, n - 1)) < ZEROS] = 0.0
    matrix /= matrix.sum(1, keepdims=True)
    matrix[-1] = 0.0
    return matrix


@dataclass(frozen=True)
class Sequences:
    """Sequences without padding: the tokens of all of them one after the other, each with the symbol before it."""

    inputs: NDArray[np.int32]  # [T]
    targets: NDArray[np.int32]  # [T]
    begins: NDArray[np.int64]  # [S + 1], where each sequence begins, and the end

    def __len__(self) -> int:
        return len(self.begins) - 1

    def split(self, count: int) -> tuple[Sequences, Sequences]:
        """The first `count` sequences, and the others."""
        cut = self.begins[count]
        first = Sequences(self.inputs[:cut], self.targets[:cut], self.begins[: count + 1])
        return first, Sequences(self.inputs[cut:], self.targets[cut:], self.begins[count:] - cut)

    def tokens_of(self, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the tokens of the chosen sequences are."""
        lengths = self.begins[chosen + 1] - self.begins[chosen]
        ends = lengths.cumsum()
        return np.arange(lengths.sum()) + np.repeat(self.begins[chosen] - (ends - lengths), lengths)

    def pair_counts(self, vocab: int) -> NDArray[np.int64]:
        """How often each symbol follows each, [vocab, vocab]: all that a bigram model sees of the sequences."""
        pairs = self.inputs.astype(np.int64) * vocab + self.targets
        return np.bincount(pairs, minlength=vocab * vocab).reshape(vocab, vocab)


def sample(matrix: NDArray[np.float64], count: int, max_length: int, seed: int) -> Sequences:
    """Samples `count` sequences of at most `max_length` symbols, EOS included; a position of all of them at a time.

    The first symbol is any of the n with the same probability; the last one that fits is EOS.
    """
    n = len(matrix)
    # Apart from the stream of the matrix, which has the seed itself.
    generator = np.random.default_rng([seed, 1])
    # Row i's cumulative distribution in (i, i + 1]: one ascending array, in which i + u falls on a symbol of row i.
    cumulative = matrix[:-1].cumsum(1)
    cumulative[:, -1] = 1.0
    flat = (cumulative + np.arange(n - 1)[:, None]).ravel()

    running = np.arange(count)
    symbols = generator.integers(1, n + 1, count) if max_length > 1 else np.full(count, n)
    steps = [(running, symbols)]
    for length in range(2, max_length + 1):
        running, symbols = running[symbols != n], symbols[symbols != n]
        if len(running) == 0:
            break
        if length == max_length:
            symbols = np.full(len(running), n)
        else:
            rows = symbols - 1
            found = np.searchsorted(flat, rows + generator.random(len(rows)), side="right")
            # A sum may have been rounded up to the next row's beginning.
            symbols = np.minimum(found - rows * n, n - 1) + 1
        steps.append((running, symbols))

    lengths = np.bincount(np.concatenate([running for running, _ in steps]), minlength=count)
    begins = np.concatenate(([0], lengths.cumsum()))
    targets = np.empty(begins[-1], np.int32)
    for position, (running, symbols) in enumerate(steps):
        targets[begins[running] + position] = symbols
    inputs = np.concatenate(([BOS], targets[:-1])).astype(np.int32)
    inputs[begins[:-1]] = BOS
    return Sequences(inputs, targets, begins)
