"""The bigram model of the synthetic experiment, its losses in training and on held-out data.

Everything before dropout depends on a token's input symbol alone: it is computed for the n + 1 symbols, not for the
tokens. Dropout is a token's own, and so are the logits in training; without it a table of them is all there is.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mixce_kernels import fused_linear_mixce_loss

HIDDEN_SIZE = 50
# Masks are made of 16 random bits an entry: of 65536 values, as many drop it as come next to a share of 0.1.
DROPPED = 6554
KEPT_SHARE = 1 - DROPPED / 2**16
# The logits of a chunk and their gradient stay near the core: of 512 KiB to 36 MiB this was fastest on Zen 4, with 101
# columns and with 501.
CHUNK_BYTES = 2 * 2**20


class Bigram(nn.Module):
    """Embedding, linear layer, ReLU, dropout and head, initialised as PyTorch does."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, HIDDEN_SIZE)
        self.linear = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)
        self.head = nn.Linear(HIDDEN_SIZE, vocab)

    def hidden(self) -> Tensor:
        """Of every input symbol, before dropout: [n + 1, D]."""
        return torch.relu(self.linear(self.embedding.weight))

    @torch.no_grad()
    def log_probabilities(self) -> Tensor:
        """Of every symbol after every symbol, without dropout: float64 [n + 1, n + 1]."""
        return torch.log_softmax(self.head(self.hidden()).double(), 1)

    def loss(
        self,
        inputs: Tensor,  # [N]
        targets: Tensor,  # [N]
        kept: Tensor,  # [N, D], 1 where dropout keeps an entry, else 0
        eta: float,
        n_sequences: int,
    ) -> Tensor:
        """MixCE of packed tokens: summed over those of a sequence, averaged over the sequences."""
        hidden = (self.hidden() / KEPT_SHARE).index_select(0, inputs) * kept
        loss = fused_linear_mixce_loss(
            hidden, self.head.weight, targets, eta, bias=self.head.bias, num_items_in_batch=n_sequences,
            max_chunk_bytes=CHUNK_BYTES,
        )  # fmt: skip
        assert isinstance(loss, Tensor)
        return loss


def dropout_mask(n_tokens: int, generator: np.random.Generator) -> Tensor:
    """1 where an entry is kept, else 0: float32 [n_tokens, D]. A third of the time of torch's own."""
    n_words = -(-n_tokens * HIDDEN_SIZE // 4)
    bits = generator.integers(0, 2**64, n_words, dtype=np.uint64).view(np.int16)[: n_tokens * HIDDEN_SIZE]
    return (torch.from_numpy(bits) >= DROPPED - 2**15).float().view(n_tokens, HIDDEN_SIZE)


def held_out_loss(log_probabilities: Tensor, pair_counts: Tensor, eta: float, n_sequences: int) -> float:
    """The loss of sequences with these counts of pairs [n + 1, n + 1], without dropout."""
    # Pairs that do not occur have no part in it, whatever their probability.
    nll = -log_probabilities[pair_counts > 0]
    weight = eta + (1 - eta) * torch.exp(-nll)
    return float((pair_counts[pair_counts > 0] * weight * nll).sum() / n_sequences)


def probabilities(log_probabilities: Tensor) -> NDArray[np.float64]:
    """What the metrics compare."""
    return log_probabilities.exp().numpy()
