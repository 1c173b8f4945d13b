"""The backends in one table: who serves a call, and why another cannot."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import Tensor

from mixce_kernels.backends import cpu, cuda, triton
from mixce_kernels.backends.base import Backend
from mixce_kernels.backends.vocabulary import Vocabulary

NAMES = ("reference", "cpu", "triton", "cuda")
_TABLE: dict[str, Backend] = {"cpu": cpu, "triton": triton, "cuda": cuda}
_WHOLE = {name: Vocabulary(backend) for name, backend in _TABLE.items()}
_PARTS: dict[str, Callable[[Backend, str], Vocabulary]] = {}
_PREFERRED = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}


def get(name: str) -> Backend:
    """The backend of that name. `reference` is not among them, since autograd alone serves it."""
    return _TABLE[name]


def vocabulary(address: str) -> Vocabulary:
    """The vocabulary as an operator's argument names it.

    It is a backend's name for all of it, or `name@part:fields` for a part that was registered.
    """
    whole = _WHOLE.get(address)
    if whole is not None:
        return whole
    name, _, rest = address.partition("@")
    part, _, fields = rest.partition(":")
    return _PARTS[part](_TABLE[name], fields)


def name_of(address: str) -> str:
    """The name of the backend in an operator's argument."""
    return address.partition("@")[0]


def register_part(name: str, part: Callable[[Backend, str], Vocabulary]) -> None:
    """Has the address `backend@name:fields` mean part(backend, fields)."""
    _PARTS[name] = part


def checks_targets(name: str) -> bool:
    """Whether a backend raises for a target out of range by itself."""
    return name == "reference" or get(name).checks_targets


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
