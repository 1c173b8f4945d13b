"""`Backend`: the interface of whatever turns rows of logits into losses and gradients."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mixce_kernels.backends.results import EntropyGrad, Results
from mixce_kernels.backends.shards import ShardKernels
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions
from mixce_kernels.reduction import Reduction


class Backend(Protocol):
    """Five functions over tensors that were checked before, and those of `shards`; a module may be one."""

    @property
    def checks_targets(self) -> bool:
        """Whether `forward` raises for a target out of range: it reads targets on the host, where that is free."""

    @property
    def shards(self) -> ShardKernels:
        """The steps around these where ranks hold the vocabulary's columns."""

    def unavailable(self, logits: Tensor) -> str | None:
        """The reason why this backend cannot serve these logits, as a sentence; None where it can."""

    def forward(
        self,
        logits: Tensor,  # [..., V], last stride 1
        targets: Tensor,  # [...]
        mixture: Mixture,  # eta of any float type, any strides
        options: TokenOptions,
        reduction: Reduction,
        results: Results,  # written
        token_scale: Tensor | None,  # float64 [] or [...], with grad_logits: the upstream gradient; None: 1
        grad_logits: Tensor | None,  # [..., V], written; may be the logits themselves
        temperature: Tensor | None = None,  # [...]: z is divided by it; with neither grad_logits nor may_split
        *,
        may_split: bool = True,  # whether few rows may be summed in another order than many
    ) -> None:
        """Losses, state and statistics of the tokens, with `grad_logits` their gradients, and `reduce` of the losses.

        Raises:
            IndexError: a target is out of range, with `checks_targets`; nothing has been written then. Other backends
                write NaN into that row's results.
        """

    def reduce(
        self,
        targets: Tensor,  # [...]
        ignore_index: int,
        reduction: Reduction,
        losses: Tensor | None,  # [...], the tokens' own
        loss: Tensor | None,  # [] or [...], written; with losses
        token_scale: Tensor | None,  # float64 [] or [...], written; None: not wanted
    ) -> None:
        """The loss of the tokens' losses, and each token's factor in it."""

    def logits_grad(
        self,
        logits: Tensor,  # [..., V], last stride 1
        targets: Tensor,  # [...]
        state: Tensor,  # [STATE_WIDTH, ...]
        grad_loss: Tensor | None,  # [], or [...] of any strides; None: 1
        token_scale: Tensor | None,  # float64 [] or [...]; None: 1
        options: TokenOptions,
        grad_logits: Tensor,  # [..., V], written; may be the logits themselves
        temperature: Tensor | None = None,  # that of the forward
        entropy: EntropyGrad | None = None,
    ) -> None:
        """The gradient of sum(grad_loss * token_scale * losses) by the logits, rounded once.

        With `entropy` that of sum(entropy.upstream * entropies) is added to it before.
        """

    def scale_rows_(
        self,
        grad_logits: Tensor,  # [..., V]
        grad_loss: Tensor,  # [], or [...] of any strides
        targets: Tensor | None,  # [...]; None: no row is ignored
        ignore_index: int,
    ) -> None:
        """Multiplies row i by grad_loss[i] in place, unless it is ignored; rows whose factor is 1 are not read."""
