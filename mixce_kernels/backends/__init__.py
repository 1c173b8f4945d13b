"""The backends in one table: who serves a call, and why another cannot."""

from __future__ import annotations

import os
from typing import Protocol

from torch import Tensor

from mixce_kernels.backends import cpu, cuda, triton
from mixce_kernels.options import TokenOptions
from mixce_kernels.parallel.backend import Shard, ShardBackend

NAMES = ("reference", "cpu", "triton", "cuda")


class Backend(Protocol):
    """What a backend is: four functions over tensors that were checked before."""

    def unavailable(self, logits: Tensor) -> str | None:
        """Why this backend cannot serve these logits, as a sentence; None where it can."""

    def forward(
        self,
        logits: Tensor,  # [..., V], last stride 1
        targets: Tensor,  # [...]
        eta: Tensor | None,  # [...] of any float type, any strides
        eta_value: float,  # used where eta is None
        options: TokenOptions,
        results: tuple[Tensor, ...],  # loss [...], state [5, ...], stats [5, ...] or [0], correct [...] or [0]: written
        grad_loss: Tensor | None,  # [...], any strides, with grad_logits
        grad_logits: Tensor | None,  # [..., V], written; may be the logits themselves
    ) -> None:
        """Loss, state and statistics of each token, and with `grad_logits` its gradient times `grad_loss`.

        Raises:
            IndexError: a target is out of range, from `cpu`, which has written nothing then. A GPU's backend writes NaN
                into that row's results instead.
        """

    def logits_grad(
        self,
        logits: Tensor,  # [..., V], last stride 1
        targets: Tensor,  # [...]
        state: Tensor,  # [5, ...]: m, s, a, c, t
        grad_loss: Tensor,  # [...], any strides
        options: TokenOptions,
        grad_logits: Tensor,  # [..., V], written; may be the logits themselves
    ) -> None:
        """The gradient of sum(grad_loss * loss) by the logits, rounded once."""

    def scale_rows_(self, grad_logits: Tensor, grad_loss: Tensor) -> None:
        """Multiplies row i of grad_logits [..., V] by grad_loss[i] in place; rows whose factor is 1 are not read."""


_TABLE: dict[str, Backend] = {"cpu": cpu, "triton": triton, "cuda": cuda}
_PREFERRED = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}


def get(address: str) -> Backend:
    """The backend of that name, on a shard of the vocabulary if it is the `Shard.address` of one.

    `reference` is not among them, since autograd alone serves it.
    """
    name, shard = Shard.of(address)
    return _TABLE[name] if shard is None else ShardBackend(name, _TABLE[name], shard)


def resolve(name: str | None, logits: Tensor) -> str:
    """The name of the backend that serves these logits.

    Without a name, the environment's `MIXCE_BACKEND`, else the first of the device's own that can serve, else
    `reference`.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend cannot serve these logits; says why.
    """
    name = name or os.environ.get("MIXCE_BACKEND") or None
    if name is None:
        for own in _PREFERRED.get(logits.device.type, ()):
            if _TABLE[own].unavailable(logits) is None:
                return own
        return "reference"
    if name not in NAMES:
        raise ValueError(f"expected backend to be one of {', '.join(NAMES)} or None, got {name!r}")
    reason = None if name == "reference" else _TABLE[name].unavailable(logits)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot serve this call: {reason}")
    return name
