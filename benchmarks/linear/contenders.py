"""Who takes part in the benchmark of the loss with a linear head, and what each of them computes.

A contender's loss is a function (hidden [N, D], weight [V, D], targets [N]) -> scalar loss, the mean over the tokens
whose target is not IGNORE_INDEX. Modes: forward (without a graph) and both (loss and gradients of hidden and weight).
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.check import results_of
from harness.contenders import ETA, IGNORE_INDEX, add_installed, from_file, plain_mixce
from linear.check import LinearErrors, LinearInputs
from mixce_kernels import backends, fused_linear_mixce_loss, fused_mixce_loss
from mixce_kernels.linear.chunks import default_chunk_bytes, rows_per_chunk
from mixce_kernels.linear.matmul import padded_empty, products
from mixce_kernels.options import accumulate_dtype

LINEAR_MODES = ("forward", "both")
OURS, TILES, OURS_MATERIALISED = "fused-linear", "fused-linear-tiles", "fused-materialised"
EAGER, MATMULS = "eager", "three-matmuls"

# About as much memory as fused-linear's chunks take.
TORCH_CHUNK_ROWS = 256

LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LinearContender:
    """A name for tables, what is computed and how it is checked.

    Attributes:
        loss: None for the yardstick, which computes none.
        eta: the oracle's.
        compiled: its first call of a shape compiles.
        rounds_logits: it makes logits of the inputs' type; the other contenders' are float32.
        of_goals: the goals need it; the others are there to compare.
    """

    name: str
    computes: str
    loss: LinearLoss | None
    eta: float = ETA
    compiled: bool = False
    rounds_logits: bool = False
    of_goals: bool = False


@dataclass(frozen=True)
class LinearProgram:
    """One contender in one mode, to be called again and again."""

    contender: LinearContender
    mode: str

    def steps(self, inputs: LinearInputs, targets: Tensor, results: list[Tensor]) -> list[Callable[[], None]]:
        """The call's parts; they leave loss and gradients in `results`."""
        loss, hidden, weight = self.contender.loss, inputs.hidden, inputs.weight
        if loss is None:
            return [lambda: results.extend(matmuls(hidden.detach(), weight.detach(), self.mode == "both"))]

        def forward_alone() -> None:
            # Detached, as in evaluation: some compute gradients of what requires them, graph or no graph.
            with torch.no_grad():
                results.append(loss(hidden.detach(), weight.detach(), targets))

        def both() -> None:
            results.append(loss(hidden, weight, targets))
            results.extend(torch.autograd.grad(results[0], (hidden, weight)))

        return [forward_alone if self.mode == "forward" else both]


def check(program: LinearProgram, inputs: LinearInputs) -> LinearErrors | None:
    """Runs the program once at full size, with some tokens ignored, and compares its results with the oracle's.

    None for the yardstick: it has no loss that could be wrong.
    """
    results = results_of(program, inputs)
    if program.contender.loss is None:
        return None
    return inputs.expected(program.contender.eta, program.contender.rounds_logits).compare(*results)


def linear_contenders(
    device: torch.device, extra_files: Iterable[Path] = ()
) -> tuple[list[LinearContender], dict[str, str]]:
    """All that can run on `device`, the yardstick and ours first, and why the others cannot.

    Args:
        device: where the inputs will be.
        extra_files: Python files that define `CONTENDERS`, a list of `LinearContender`.
    """
    left_out: dict[str, str] = {}
    able = [
        LinearContender(MATMULS, "no loss: the matrix products of fused-linear, in its chunks", None, of_goals=True),
        LinearContender(OURS, "MixCE, fused_linear_mixce_loss", partial(_ours, "chunks"), of_goals=True),
    ]
    if device.type == "cuda":
        reason = backends.get("triton").unavailable(torch.empty(1, 1, device=device))
        if reason is None:
            computes = "MixCE, fused_linear_mixce_loss(path='tiles')"
            able.append(LinearContender(TILES, computes, partial(_ours, "tiles")))
        else:
            left_out[TILES] = reason
    else:
        left_out[TILES] = "on CPU tensors it would be interpreted, and that time is no speed"
    able += [
        LinearContender(
            OURS_MATERIALISED,
            "MixCE, F.linear and fused_mixce_loss(inplace_backward=True, grad_in_forward=True)",
            _materialised,
            rounds_logits=True,
            of_goals=True,
        ),
        LinearContender(
            EAGER,
            "MixCE, F.linear and the plain formula on logits.float()",
            _eager,
            rounds_logits=True,
            of_goals=True,
        ),
        LinearContender(
            "torch.compile",
            "MixCE, F.linear and the plain formula on logits.float(), under torch.compile",
            _compiled,
            compiled=True,
            rounds_logits=True,
        ),
    ]
    loaders = {
        "F.linear_cross_entropy": _torch_chunked,
        "cut-cross-entropy": _cut_cross_entropy,
        "liger-kernel": _liger,
    }
    add_installed(loaders, device, able, left_out)
    for path in extra_files:
        able += from_file(path)
    return able, left_out


def matmuls(hidden: Tensor, weight: Tensor, gradients: bool) -> Sequence[Tensor]:
    """The yardstick: every matrix product of fused-linear, in its chunks and by its routines, and nothing else.

    What stands for the gradient of the logits is the logits: a product takes the same time with other numbers.
    """
    budget = default_chunk_bytes(weight, len(weight))
    made = products(weight, None, hidden.dtype, budget // 2, hidden.dtype)
    dtype = accumulate_dtype(hidden.dtype)
    budget -= made.bytes_besides(weight.shape[0])
    size = rows_per_chunk(len(hidden), len(weight), made.bytes_per_logit, budget)
    buffer = padded_empty(size, len(weight), dtype, hidden.device)
    if not gradients:
        for rows in hidden.split(size):
            made.logits(rows, buffer[: len(rows)])
        return [buffer]
    grad_hidden, grad_weight = torch.empty_like(hidden, dtype=dtype), torch.empty_like(weight, dtype=dtype)
    for count, (rows, grad_rows) in enumerate(zip(hidden.split(size), grad_hidden.split(size), strict=True)):
        logits = buffer[: len(rows)]
        made.logits(rows, logits)
        operand = made.operand(logits)
        made.grad_hidden(operand, grad_rows)
        made.grad_weight(operand, rows, grad_weight, accumulate=count > 0)
    return [grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype)]


def _ours(path: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    loss = fused_linear_mixce_loss(hidden, weight, targets, ETA, ignore_index=IGNORE_INDEX, path=path)
    assert isinstance(loss, Tensor)
    return loss


def _materialised(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    loss = fused_mixce_loss(
        logits, targets, ETA, ignore_index=IGNORE_INDEX, inplace_backward=True, grad_in_forward=True
    )
    assert isinstance(loss, Tensor)
    return loss


def _eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return plain_mixce(F.linear(hidden, weight), targets)


def _compiled(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return _compile_eager()(hidden, weight, targets)


@functools.cache
def _compile_eager() -> LinearLoss:
    # Not before the first call: the compiler's import takes seconds.
    return torch.compile(_eager, dynamic=False)


def _torch_chunked(name: str, device: torch.device) -> list[LinearContender]:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise NotImplementedError(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    linear_cross_entropy: Any = F.linear_cross_entropy
    # Its own choice of chunks is for GPUs: some ten rows at these shapes, for which a CPU's products are slow.
    chunking: dict[str, Any] = {"batch_chunk_size": TORCH_CHUNK_ROWS, "chunking_method": None}
    options = torch.nn.LinearCrossEntropyOptions(**(chunking if device.type == "cpu" else {}))
    loss = partial(linear_cross_entropy, ignore_index=IGNORE_INDEX, options=options)
    chunks = f"chunks of {TORCH_CHUNK_ROWS} rows" if device.type == "cpu" else "its own choice of chunks"
    computes = f"cross-entropy alone (MixCE at eta = 1) by PyTorch's LinearCrossEntropyOptions, {chunks}"
    return [LinearContender(name, computes, loss, eta=1.0, rounds_logits=True)]


def _cut_cross_entropy(name: str, device: torch.device) -> list[LinearContender]:
    version = importlib.metadata.version(name)
    from cut_cross_entropy import linear_cross_entropy

    made = []
    for impl in ("torch_compile",) if device.type == "cpu" else ("cce", "torch_compile"):
        computes = f"cross-entropy alone (MixCE at eta = 1), cut-cross-entropy {version}, impl={impl!r}"
        loss = partial(linear_cross_entropy, ignore_index=IGNORE_INDEX, impl=impl)
        called = name if impl == "cce" else f"{name}-compiled"
        made.append(LinearContender(called, computes, loss, eta=1.0, compiled=impl != "cce", rounds_logits=True))
    return made


def _liger(name: str, device: torch.device) -> list[LinearContender]:
    version = importlib.metadata.version(name)
    if device.type == "cpu":
        raise NotImplementedError("its kernels are Triton's and need a GPU")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss = partial(liger_fused_linear_cross_entropy, ignore_index=IGNORE_INDEX)
    computes = f"cross-entropy alone (MixCE at eta = 1), chunks of logits of the inputs' type, Liger {version}"
    return [LinearContender(name, computes, loss, eta=1.0, rounds_logits=True)]
