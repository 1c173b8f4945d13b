"""Who takes part in the benchmark, and what each of them computes.

A contender is a loss per mode, a function (logits [N, V], targets [N]) -> scalar loss, the mean over the tokens whose
target is not IGNORE_INDEX:

    forward                   the loss without a graph
    both                      the loss and its gradient; the row `backward` is the second half of the same calls
    inplace                   both, the gradient written over the logits in backward
    grad_in_forward           both, the gradient computed in forward
    grad_in_forward_inplace   both, the gradient written over the logits in forward

In one cell other weightings take part, too: a function of q and one of the entropy, and MixCE with statistics.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.contenders import (
    ETA,
    IGNORE_INDEX,
    add_installed,
    from_file,
    plain_entropy,
    plain_mixce,
    plain_power,
)
from mixce_kernels import backends, fused_mixce_loss
from mixce_kernels.weightings import PROBABILITY, Entropy, Power, Weighting

COPY, READ = "copy", "read"
# What the backends of a GPU would be on CPU tensors.
_ON_CPU_TENSORS = {"triton": "interpreted", "cuda": "emulated"}
MODES = ("forward", "backward", "both", "inplace", "grad_in_forward", "grad_in_forward_inplace")

LossFunction = Callable[[Tensor, Tensor], Tensor]
# One of each kind: a function of q, and one that needs a sum more.
WEIGHTINGS: dict[str, tuple[Weighting, LossFunction]] = {
    "power": (Power(0.5), partial(plain_power, alpha=0.5)),
    "entropy": (Entropy(1.0, 3.0), partial(plain_entropy, scale=3.0)),
}


@dataclass(frozen=True)
class Contender:
    """A name for tables, what is computed, the loss of each mode, and what the oracle that checks it computes."""

    name: str
    computes: str
    losses: Mapping[str, LossFunction]
    eta: float = ETA
    compiled: bool = False
    weighting: Weighting = PROBABILITY
    of_weightings: bool = False  # whether it is measured beside other weightings alone


def contenders(device: torch.device, extra_files: Iterable[Path] = ()) -> tuple[list[Contender], dict[str, str]]:
    """All that can run on `device`, ours first, and why the others cannot.

    Args:
        device: where the logits will be.
        extra_files: Python files that define `CONTENDERS`, a list of `Contender`.
    """
    left_out: dict[str, str] = {}
    able = []
    for name in backends.NAMES:
        reason = why_not(name, device)
        if reason is None:
            able.append(_fused(name))
        else:
            left_out[f"fused-{name}"] = reason
    able += [
        Contender("eager", "MixCE, the plain formula on logits.float()", _forward_and_both(plain_mixce)),
        Contender(
            "torch.compile",
            "MixCE, the plain formula on logits.float(), under torch.compile",
            _forward_and_both(compiled_mixce),
            compiled=True,
        ),
        Contender(
            "F.cross_entropy",
            "cross-entropy alone (MixCE at eta = 1) on logits.float()",
            _forward_and_both(plain_cross_entropy),
            eta=1.0,
        ),
    ]
    able += _weighted(device)
    add_installed({"liger-kernel": _liger, "cut-cross-entropy": _cut_cross_entropy}, device, able, left_out)
    for path in extra_files:
        able += from_file(path)
    return able, left_out


def _weighted(device: torch.device) -> list[Contender]:
    """The weightings beside the plain formula, and MixCE with the statistics that one of them needs."""
    found: list[Contender] = []
    backend = next((name for name in backends.NAMES if why_not(name, device) is None), None)
    if backend is None:
        return found
    found.append(with_stats(backend))
    for name, (weighting, plain) in WEIGHTINGS.items():
        for contender, loss, what in (
            (f"fused-{backend}-{name}", partial(_fused_loss, backend, {"weighting": weighting}), "fused_mixce_loss"),
            (f"eager-{name}", plain, "the plain formula on logits.float()"),
            (f"torch.compile-{name}", partial(_compiled, plain), "the plain formula under torch.compile"),
        ):
            found.append(
                Contender(
                    contender, f"{weighting!r} in the place of q, {what}", _forward_and_both(loss),
                    compiled=contender.startswith("torch"), weighting=weighting, of_weightings=True,
                )
            )  # fmt: skip
    return found


def with_stats(backend: str) -> Contender:
    """MixCE with its statistics."""
    losses = _forward_and_both(partial(_fused_loss, backend, {"return_stats": True}))
    return Contender(f"fused-{backend}-stats", "MixCE with its statistics", losses, of_weightings=True)


def is_of_weightings(name: str) -> bool:
    """Whether a contender of that name is one beside other weightings."""
    return name.endswith(tuple(f"-{suffix}" for suffix in ("stats", *WEIGHTINGS)))


def compiled_mixce(logits: Tensor, targets: Tensor) -> Tensor:
    """`plain_mixce` under torch.compile, for these very shapes."""
    return _compiled(plain_mixce, logits, targets)


def _compiled(function: LossFunction, logits: Tensor, targets: Tensor) -> Tensor:
    return _compile(function)(logits, targets)


@functools.cache
def _compile(function: LossFunction) -> LossFunction:
    # Not before the first call: the compiler's import takes seconds.
    return torch.compile(function, dynamic=False)


def plain_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss that MixCE replaces, with the conversion to float32 of Transformers' losses."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX)


def _forward_and_both(function: LossFunction) -> dict[str, LossFunction]:
    return {"forward": function, "both": function}


def why_not(name: str, device: torch.device) -> str | None:
    """Why a backend takes no part on `device`, or None if it does."""
    if name == "reference":
        return "it is the oracle, and the plain formula stands for it"
    if device.type == "cpu" and name != "cpu":
        return f"on CPU tensors it would be {_ON_CPU_TENSORS[name]}, and that time is no speed"
    return backends.get(name).unavailable(torch.empty(1, 1, device=device))


def _fused(backend: str) -> Contender:
    flags: dict[str, dict[str, Any]] = {
        "forward": {},
        "both": {},
        "inplace": {"inplace_backward": True},
        "grad_in_forward": {"grad_in_forward": True},
        "grad_in_forward_inplace": {"grad_in_forward": True, "inplace_backward": True},
    }
    losses = {mode: partial(_fused_loss, backend, chosen) for mode, chosen in flags.items()}
    return Contender(f"fused-{backend}", f"MixCE, fused_mixce_loss(backend={backend!r})", losses)


def _fused_loss(backend: str, flags: dict[str, Any], logits: Tensor, targets: Tensor) -> Tensor:
    result = fused_mixce_loss(logits, targets, ETA, ignore_index=IGNORE_INDEX, backend=backend, **flags)
    return result[0] if isinstance(result, tuple) else result


def _liger(name: str, device: torch.device) -> list[Contender]:
    version = importlib.metadata.version(name)
    if device.type == "cpu":
        raise NotImplementedError("its kernels are Triton's and need a GPU")
    from liger_kernel.transformers.functional import liger_cross_entropy

    function = partial(liger_cross_entropy, ignore_index=IGNORE_INDEX)
    # It writes the gradient over the logits in forward: its place is beside our mode that does.
    losses = {"forward": function, "grad_in_forward_inplace": function}
    computes = f"cross-entropy alone (MixCE at eta = 1) in the logits' type, Liger {version}"
    return [Contender("liger", computes, losses, eta=1.0)]


def _cut_cross_entropy(name: str, device: torch.device) -> list[Contender]:
    importlib.metadata.version(name)
    raise NotImplementedError("it computes hidden @ weight.T with its loss, and no loss of given logits")
