"""Who takes part in the benchmark of the vocabulary-parallel loss, and what each of them computes.

A contender's loss is a function (logits [N, columns of this rank], targets [N], place) -> scalar loss, the mean over
the tokens whose target is not IGNORE_INDEX, the same on every rank. Modes: forward (without a graph) and both (loss and
gradient of the rank's logits); the row `backward` is the second half of the same calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

from harness.check import Errors, results_of
from harness.contenders import ETA, IGNORE_INDEX, from_file
from mixce_kernels import vocab_parallel_mixce_loss
from parallel.baseline import three_all_reduces
from parallel.check import ParallelInputs

PARALLEL_MODES = ("forward", "both")
OURS, OURS_CE, OURS_SMOOTHED = "vocab-parallel", "vocab-parallel-ce", "vocab-parallel-smoothed"
LOSS_PARALLEL, LOSS_PARALLEL_HALF, THREE_ALL_REDUCES = "loss_parallel", "loss_parallel-half", "three-all-reduces"
LABEL_SMOOTHING = 0.1


@dataclass(frozen=True)
class Place:
    """Where a rank is."""

    group: dist.ProcessGroup
    mesh: DeviceMesh
    vocab_start: int
    vocab_size: int


ParallelLoss = Callable[[Tensor, Tensor, Place], Tensor]


@dataclass(frozen=True)
class ParallelContender:
    """A name for tables, what is computed and how it is checked.

    Attributes:
        eta: the oracle's.
        label_smoothing: the oracle's.
        context: forward and backward run inside of it.
        rounds_log_probs: its log-probabilities are of the logits' type, and so rounded they are what it is held to.
        half_only: in float32 it is another contender.
    """

    name: str
    computes: str
    loss: ParallelLoss
    eta: float = ETA
    label_smoothing: float = 0.0
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    rounds_log_probs: bool = False
    half_only: bool = False


@dataclass(frozen=True)
class ParallelProgram:
    """One contender in one mode on one rank, to be called again and again."""

    contender: ParallelContender
    mode: str
    place: Place

    def steps(self, inputs: ParallelInputs, targets: Tensor, results: list[Tensor]) -> list[Callable[[], None]]:
        """The call's parts; they leave loss and gradient in `results`."""
        loss, context = self.contender.loss, self.contender.context

        def forward() -> None:
            with context():
                results.append(loss(inputs.logits, targets, self.place))

        def forward_alone() -> None:
            with context(), torch.no_grad():
                results.append(loss(inputs.logits.detach(), targets, self.place))

        def backward() -> None:
            with context():
                results.extend(torch.autograd.grad(results[0], inputs.logits))

        return [forward_alone] if self.mode == "forward" else [forward, backward]


def check(program: ParallelProgram, inputs: ParallelInputs) -> Errors:
    """Runs the program once at full size, with some tokens ignored, and compares with the oracle's in its columns."""
    one = program.contender
    return inputs.expected(one.eta, one.label_smoothing, one.rounds_log_probs).compare(*results_of(program, inputs))


def parallel_contenders(dtype: torch.dtype, extra_files: Iterable[Path] = ()) -> list[ParallelContender]:
    """All for logits of this type, ours first.

    Args:
        dtype: of the logits.
        extra_files: Python files that define `CONTENDERS`, a list of `ParallelContender`.
    """
    found = [
        ParallelContender(OURS, f"MixCE, vocab_parallel_mixce_loss(eta={ETA})", partial(_ours, ETA, 0.0)),
        ParallelContender(
            OURS_CE, "cross-entropy (MixCE at eta = 1), vocab_parallel_mixce_loss", partial(_ours, 1.0, 0.0), eta=1.0
        ),
        ParallelContender(
            OURS_SMOOTHED,
            f"MixCE, vocab_parallel_mixce_loss(eta={ETA}, label_smoothing={LABEL_SMOOTHING})",
            partial(_ours, ETA, LABEL_SMOOTHING),
            label_smoothing=LABEL_SMOOTHING,
        ),
        ParallelContender(
            LOSS_PARALLEL,
            "cross-entropy, PyTorch's loss_parallel and F.cross_entropy on a DTensor of logits.float()",
            partial(_loss_parallel, True),
            eta=1.0,
            context=loss_parallel,
        ),
        ParallelContender(
            LOSS_PARALLEL_HALF,
            "cross-entropy, PyTorch's loss_parallel and F.cross_entropy on a DTensor of the logits, whose "
            "log-probabilities are rounded to their type",
            partial(_loss_parallel, False),
            eta=1.0,
            context=loss_parallel,
            rounds_log_probs=True,
            half_only=True,
        ),
        ParallelContender(
            THREE_ALL_REDUCES,
            "cross-entropy, plain PyTorch with the three all-reduces of Megatron-LM's vocab_parallel_cross_entropy",
            lambda logits, targets, place: three_all_reduces(logits, targets, place.group, place.vocab_start),
            eta=1.0,
        ),
    ]
    for path in extra_files:
        found += from_file(path)
    return [one for one in found if not one.half_only or dtype in (torch.bfloat16, torch.float16)]


def _ours(eta: float, label_smoothing: float, logits: Tensor, targets: Tensor, place: Place) -> Tensor:
    loss = vocab_parallel_mixce_loss(
        logits,
        targets,
        eta,
        group=place.group,
        vocab_start=place.vocab_start,
        vocab_size=place.vocab_size,
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
    )
    assert isinstance(loss, Tensor)
    return loss


def _loss_parallel(in_float32: bool, logits: Tensor, targets: Tensor, place: Place) -> Tensor:
    sharded = DTensor.from_local(logits.float() if in_float32 else logits, place.mesh, [Shard(1)], run_check=False)
    loss: Any = F.cross_entropy(sharded, targets, ignore_index=IGNORE_INDEX)
    return loss.to_local()
