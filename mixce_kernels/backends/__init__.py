"""The backends in one table: who serves a call, and why another cannot."""

from __future__ import annotations

import os

from torch import Tensor

from mixce_kernels.backends import cpu, cuda, triton
from mixce_kernels.backends.base import Backend
from mixce_kernels.parallel.backend import Shard, ShardBackend

NAMES = ("reference", "cpu", "triton", "cuda")


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
