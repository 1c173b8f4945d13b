"""One run of the synthetic experiment: data, training, and the metrics of the epoch with the least held-out loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthetic.data import Sequences, sample, transition_matrix
from synthetic.metrics import Metrics, compare
from synthetic.model import Bigram, dropout_mask, held_out_loss, probabilities

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-4
BATCH = 1000
# Epochs without improvement after which training stops.
PATIENCE = 5


@dataclass(frozen=True)
class Setting:
    """What one run is of."""

    vocab: int  # symbols n, EOS included, BOS not
    eta: float
    seed: int
    sequences: int
    held_out: int
    max_length: int
    max_epochs: int


class Selection:
    """The epoch with the least held-out loss so far, and when to stop."""

    def __init__(self) -> None:
        self.best_epoch = 0
        self.best_loss = float("inf")
        self.metrics = Metrics(float("nan"), float("nan"))
        self.epoch = 0

    def take(self, loss: float, metrics: Metrics) -> bool:
        """Takes the next epoch's results; whether training goes on."""
        self.epoch += 1
        if loss < self.best_loss:
            self.best_epoch, self.best_loss, self.metrics = self.epoch, loss, metrics
        return self.epoch - self.best_epoch < PATIENCE


def run(setting: Setting, epoch_done: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Trains one model; its row of the CSV. Of one seed, data, initial weights, order and dropout are every eta's."""
    begin = time.perf_counter()
    matrix = transition_matrix(setting.vocab, setting.seed)
    sampled = sample(matrix, setting.held_out + setting.sequences, setting.max_length, setting.seed)
    held_out, training = sampled.split(setting.held_out)
    pair_counts = torch.from_numpy(held_out.pair_counts(setting.vocab + 1))

    torch.manual_seed(setting.seed)
    model = Bigram(setting.vocab + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    # Apart from the streams of the matrix and of the sequences.
    generator = np.random.Generator(np.random.SFC64([setting.seed, 2]))
    selection = Selection()
    for _ in range(setting.max_epochs):
        for inputs, targets, n_sequences in batches(training, generator):
            optimizer.zero_grad()
            kept = dropout_mask(len(inputs), generator)
            model.loss(inputs, targets, kept, setting.eta, n_sequences).backward()
            optimizer.step()
        learned = model.log_probabilities()
        loss = held_out_loss(learned, pair_counts, setting.eta, setting.held_out)
        goes_on = selection.take(loss, compare(probabilities(learned), matrix))
        epoch_done()
        if not goes_on:
            break
    return {
        **vars(setting),
        "epochs": selection.epoch,
        "best_epoch": selection.best_epoch,
        "held_out_loss": selection.best_loss,
        **selection.metrics._asdict(),
        "seconds": time.perf_counter() - begin,
    }


def batches(sequences: Sequences, generator: np.random.Generator) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The epoch's batches, in a new order: inputs [N] and targets [N] of whole sequences, and how many these are."""
    order = generator.permutation(len(sequences))
    for begin in range(0, len(order), BATCH):
        chosen = order[begin : begin + BATCH]
        tokens = sequences.tokens_of(chosen)
        inputs, targets = (torch.from_numpy(symbols[tokens]) for symbols in (sequences.inputs, sequences.targets))
        yield inputs, targets, len(chosen)
