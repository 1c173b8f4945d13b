"""What every benchmark's contenders share, and how they are chosen on the command line."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
ETA = 0.5


def refuse_unknown(wanted: Iterable[str], able: Iterable[str], left_out: Mapping[str, str]) -> None:
    """Ends the program if a contender that is wanted by name cannot run."""
    able = list(able)
    for name in wanted:
        if name not in able:
            raise SystemExit(
                f"expected --contenders to be of {', '.join(able)}, got {name!r}"
                + "".join(f"\n{one} cannot run: {reason}" for one, reason in left_out.items())
            )


def plain_mixce(logits: Tensor, targets: Tensor) -> Tensor:
    """MixCE as its authors write it, with the conversion to float32 of Transformers' losses."""
    return _weighted_mean(F.log_softmax(logits.float(), dim=-1), targets, lambda log_p, q: q)


def plain_power(logits: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """The same with q^alpha in the place of q."""
    return _weighted_mean(F.log_softmax(logits.float(), dim=-1), targets, lambda log_p, q: q**alpha)


def plain_entropy(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """The same with the entropy of the row, divided by `scale`, in the place of q."""
    return _weighted_mean(
        F.log_softmax(logits.float(), dim=-1), targets, lambda log_p, q: -(log_p.exp() * log_p).sum(-1) / scale
    )


def _weighted_mean(log_p: Tensor, targets: Tensor, factor_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    valid = targets != IGNORE_INDEX
    index = torch.where(valid, targets, 0).unsqueeze(-1)
    nll = -log_p.gather(-1, index).squeeze(-1)
    factor = factor_of(log_p.detach(), torch.exp(-nll.detach()))
    loss = ETA * nll + (1.0 - ETA) * factor * nll
    return (loss * valid).sum() / valid.sum()


def add_installed(
    loaders: Mapping[str, Callable[[str, torch.device], list[Any]]],
    device: torch.device,
    able: list[Any],
    left_out: dict[str, str],
) -> None:
    """Adds the contenders of other packages to those that are able, or to those left out, with the reason."""
    for name, load in loaders.items():
        try:
            able += load(name, device)
        except importlib.metadata.PackageNotFoundError:
            left_out[name] = "it is not installed"
        except (ImportError, NotImplementedError) as error:
            left_out[name] = str(error)


def from_file(path: Path) -> list[Any]:
    """The CONTENDERS that a Python file defines."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"expected --extra-contenders to name a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.CONTENDERS)
