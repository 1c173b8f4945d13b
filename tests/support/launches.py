"""What a call would launch on a GPU: PyTorch's operators that launch, and kernels of ours, counted on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixce_kernels import backends, fused_mixce_loss, operators
from mixce_kernels.backends import cpu
from mixce_kernels.backends.vocabulary import Vocabulary

N_ROWS = 40  # as many as keep the multiprocessors of an emulation busy
_WEIGHTS = torch.linspace(0.5, 1.5, N_ROWS)
# Keywords, whether the loss is other than the tokens' own, and whether these have factors in it.
REDUCTIONS: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "mean": ({}, True, True),
    "sum": ({"reduction": "sum"}, True, False),
    "none": ({"reduction": "none"}, False, False),
    "mean-weights": ({"token_weights": _WEIGHTS}, True, True),
    "sum-weights": ({"reduction": "sum", "token_weights": _WEIGHTS.double()}, True, True),
    "none-weights": ({"reduction": "none", "token_weights": _WEIGHTS.bfloat16()}, True, True),
    "number": ({"num_items_in_batch": 7}, True, True),
    "tensor": ({"num_items_in_batch": torch.tensor(7)}, True, True),
    "tensor-weights": ({"num_items_in_batch": torch.tensor(7.5), "token_weights": _WEIGHTS}, True, True),
}
# Made on the host, or no memory is touched.
_NOTHING = {"scalar_tensor", "detach", "alias", "lift_fresh", "_unsafe_view"}


class Launches(TorchDispatchMode):
    """The names of the launches within, PyTorch's and ours."""

    def __init__(self) -> None:
        super().__init__()
        self.torch: list[str] = []
        self.ours: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if not (func.is_view or name in _NOTHING or "empty" in name):
            self.torch.append(name)
        return func(*args, **(kwargs or {}))


class _AsOnGpu:
    """The backend `cpu`, whose calls count as the kernels of a GPU."""

    checks_targets = False

    def __init__(self, launches: Launches) -> None:
        self.launches = launches

    def unavailable(self, *args: Any) -> str | None:
        return cpu.unavailable(*args)

    def forward(self, *args: Any, **keywords: Any) -> None:
        reduction = args[4]
        self.launches.ours += ["forward"] if reduction.is_identity else ["forward", "reduce"]
        cpu.forward(*args, **keywords)

    def reduce(self, *args: Any) -> None:
        self.launches.ours.append("reduce")
        cpu.reduce(*args)

    def logits_grad(self, *args: Any) -> None:
        self.launches.ours.append("logits_grad")
        cpu.logits_grad(*args)

    def scale_rows_(self, *args: Any) -> None:
        self.launches.ours.append("scale_rows_")
        cpu.scale_rows_(*args)


@contextlib.contextmanager
def launches_of_eager() -> Iterator[Launches]:
    """Counts the launches of eager calls with the backend `cpu`, as if its kernels were a GPU's."""
    launches = Launches()
    kernels = _AsOnGpu(launches)
    with (
        mock.patch.dict(backends._TABLE, {"cpu": kernels}),
        mock.patch.dict(backends._WHOLE, {"cpu": Vocabulary(kernels)}),
        # Under a dispatch mode a call goes by the dispatcher, which would hide what an operator does.
        mock.patch.object(operators, "is_in_torch_dispatch_mode", return_value=False),
        launches,
    ):
        yield launches


def check_launches_of_reductions(backend: str, launched: Callable[[], list[str]]) -> None:
    """The kernels of each reduction, of a backend that runs: `launched` gives their names since it was last called."""
    targets = torch.arange(N_ROWS)
    for name, (keywords, reduces, factors) in REDUCTIONS.items():
        for in_forward in (False, True):
            logits = torch.randn(N_ROWS, 300).bfloat16().requires_grad_()
            launched()
            loss = fused_mixce_loss(logits, targets, backend=backend, grad_in_forward=in_forward, **keywords)
            forward = launched()
            torch.autograd.grad(loss, logits, torch.ones_like(loss))
            expected = ["reduction"] * (in_forward and factors) + ["forward"] + ["reduction"] * reduces
            assert _kinds(forward) == expected, (name, forward)
            assert _kinds(launched()) == ["scale_rows" if in_forward else "logits_grad"], name


def _kinds(names: list[str]) -> list[str]:
    """Kernels by the words of their names."""
    kinds = ("reduction", "forward", "scale_rows", "logits_grad")
    return [next(kind for kind in kinds if f"{kind}_kernel" in name) for name in names]
