"""`Backend`: the interface of whatever turns rows of logits into losses and gradients."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mixce_kernels.backends.results import Results
from mixce_kernels.backends.shards import ShardKernels
from mixce_kernels.options import TokenOptions


class Backend(Protocol):
    """Four functions over tensors that were checked before, and those of `shards`; a module may be one."""

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
        eta: Tensor | None,  # [...] of any float type, any strides
        eta_value: float,  # used where eta is None
        options: TokenOptions,
        results: Results,  # written
        grad_loss: Tensor | None,  # [...], any strides, with grad_logits
        grad_logits: Tensor | None,  # [..., V], written; may be the logits themselves
    ) -> None:
        """Loss, state and statistics of each token, and with `grad_logits` its gradient times `grad_loss`.

        Raises:
            IndexError: a target is out of range, with `checks_targets`; nothing has been written then. Other backends
                write NaN into that row's results.
        """

    def logits_grad(
        self,
        logits: Tensor,  # [..., V], last stride 1
        targets: Tensor,  # [...]
        state: Tensor,  # [STATE_WIDTH, ...]
        grad_loss: Tensor,  # [...], any strides
        options: TokenOptions,
        grad_logits: Tensor,  # [..., V], written; may be the logits themselves
    ) -> None:
        """The gradient of sum(grad_loss * loss) by the logits, rounded once."""

    def scale_rows_(self, grad_logits: Tensor, grad_loss: Tensor) -> None:
        """Multiplies row i of grad_logits [..., V] by grad_loss[i] in place; rows whose factor is 1 are not read."""
