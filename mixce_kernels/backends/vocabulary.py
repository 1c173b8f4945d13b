"""`Vocabulary`: what an operator asks beside the kernels, since the columns at hand may not be all there are.

Here they are all; what serves a part of them derives from it (`backends.register_part`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixce_kernels.backends.base import Backend
from mixce_kernels.logprobs_reference import token_logprobs
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions
from mixce_kernels.reference import token_losses
from mixce_kernels.stats import MixCEStats


class CallFacts(NamedTuple):
    """A call in numbers: whoever else has a part in it must have the same."""

    tokens: int
    dtype: torch.dtype
    mixture: Mixture
    options: TokenOptions
    return_stats: bool
    hidden_size: int = 0  # 0: the call has logits
    max_chunk_bytes: int | None = None
    temperature: Tensor | None = None  # one that is a number is among the options


class Vocabulary:
    """All columns of the vocabulary, served by a backend's kernels."""

    def __init__(self, kernels: Backend) -> None:
        self.kernels = kernels

    def token_losses(
        self,
        logits: Tensor,  # [..., V]
        targets: Tensor,  # [...]
        mixture: Mixture,
        options: TokenOptions,
    ) -> tuple[Tensor, MixCEStats]:
        """Each token's loss [...] by the plain formula, for second derivatives; see `reference.token_losses`."""
        return token_losses(logits, targets, mixture.eta_of_tokens(), mixture.function(), options)

    def token_logprobs(
        self,
        logits: Tensor,  # [..., V]
        targets: Tensor,  # [...]
        temperature: Tensor | None,  # [...]
        options: TokenOptions,
    ) -> tuple[Tensor, Tensor]:
        """Each token's log-probability and the entropy [...], likewise; see `logprobs_reference.token_logprobs`."""
        return token_logprobs(logits, targets, temperature, options)

    def sizes(self, facts: CallFacts, weight: Tensor, *, again: bool = False) -> tuple[int, int]:
        """The number of columns of the vocabulary, and of those that chunks of logits are sized for.

        `weight` [V, D] has the columns at hand; `again` says that the call is known, as in a backward.
        """
        return weight.shape[0], weight.shape[0]

    def shared(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """Hidden states as every part of the vocabulary takes them: their gradient, added up in `dtype`, is of all."""
        return hidden

    def add_up(self, grad_hidden: Tensor) -> None:
        """Adds to a gradient of hidden states, in place, those of the other parts."""
