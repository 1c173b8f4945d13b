"""Correct first, for a loss whose vocabulary is split: a rank's inputs, and how far from the oracle it may be."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from harness.check import Expected, FewRows
from harness.contenders import IGNORE_INDEX
from mixce_kernels import mixce_loss_reference

# Megatron-LM pads a vocabulary to a multiple of this for each rank (`make_vocab_size_divisible_by`).
COLUMNS_MULTIPLE = 128


def columns_of(vocab: int, ranks: int) -> int:
    """The columns that each rank holds, of a vocabulary padded to as many on every rank."""
    return -(-vocab // (COLUMNS_MULTIPLE * ranks)) * COLUMNS_MULTIPLE


class ParallelInputs(FewRows):
    """A rank's columns of logits and the targets of all, and what the oracle says of the whole vocabulary.

    Columns of padding hold -inf, with which every contender's result is that of the vocabulary without them.
    """

    def __init__(self, dtype: torch.dtype, rows: int, vocab: int, ranks: int, rank: int) -> None:
        super().__init__(dtype, rows, vocab)
        self.device = torch.device("cpu")
        self.vocab, self.ranks = vocab, ranks
        columns = columns_of(vocab, ranks)
        self.vocab_start = rank * columns
        self._columns = slice(self.vocab_start, self.vocab_start + columns)
        self.pristine = self._padded(self.few, -torch.inf)[self.index]  # [N, columns]
        self.targets = self.few_targets[self.index]  # [N]
        self.masked_targets = self.few_masked[self.index]  # [N], some ignored: for the check alone
        self.logits = self.pristine.clone().requires_grad_()  # [N, columns]
        self._expected: dict[tuple[float, float, bool], Expected] = {}

    def expected(self, eta: float, label_smoothing: float, rounds_log_probs: bool) -> Expected:
        """The oracle's results in the rank's columns, and how far off a contender may be."""
        rounds_log_probs = rounds_log_probs and self.few.dtype in (torch.bfloat16, torch.float16)
        key = (eta, label_smoothing, rounds_log_probs)
        if key not in self._expected:
            rounded = self.few.dtype if rounds_log_probs else None
            found = Expected(
                self, eta, partial(_oracle_losses, label_smoothing), partial(_plain_losses, label_smoothing, rounded)
            )
            # The error that is allowed is of the whole vocabulary.
            found.grad = self._padded(found.grad, 0.0)
            self._expected[key] = found
        return self._expected[key]

    @property
    def nbytes(self) -> int:
        """Bytes of the rank's logits, and of their gradient."""
        return self.pristine.numel() * self.pristine.element_size()

    def restore(self) -> None:
        """Puts back the logits, and waits for the other ranks: no contender pays for one that comes late."""
        with torch.no_grad():
            self.logits.copy_(self.pristine)
        dist.barrier()

    def _padded(self, whole: Tensor, padding: float) -> Tensor:
        """The rank's columns of [N, V]."""
        n_columns = self._columns.stop - self._columns.start
        return F.pad(whole, (0, self.ranks * n_columns - self.vocab), value=padding)[:, self._columns]


def _oracle_losses(label_smoothing: float, logits: Tensor, targets: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    result = mixce_loss_reference(
        logits, targets, eta, ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=label_smoothing,
        return_stats=True,
    )  # fmt: skip
    assert isinstance(result, tuple)
    return result[0], result[1].weight


def _plain_losses(
    label_smoothing: float, rounded: torch.dtype | None, logits: Tensor, targets: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """Losses and weights by PyTorch's own cross-entropy, whose log-probabilities are of the logits' type."""
    logits = logits.to(rounded or logits.dtype)
    plain = partial(F.cross_entropy, logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    weights = eta + (1.0 - eta) * torch.exp(-plain().detach().float())
    return weights * plain(label_smoothing=label_smoothing).float(), weights
