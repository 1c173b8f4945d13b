"""What a rank of a vocabulary-parallel loss launches, moves, sends and holds, counted for a model of GPUs.

    python -m parallel.counts

One rank of k that are not there runs on the CPU, with a process group that sends nothing: operators are counted, not
timed. Ours is counted as on a GPU, with nothing in place of its kernels.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Sharded
from torch.distributed.tensor.parallel import loss_parallel
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from mixce_kernels import vocab_parallel_mixce_loss
from mixce_kernels.backends.results import empty_results
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions
from mixce_kernels.parallel.backend import ShardBackend
from mixce_kernels.parallel.shard import Shard
from mixce_kernels.reduction import Reduction
from parallel.baseline import three_all_reduces
from parallel.counting import Counted, Counting
from parallel.left_out import NoKernels

OURS, LOSS_PARALLEL, THREE_ALL_REDUCES = "vocab_parallel_mixce_loss", "loss_parallel", "three-all-reduces"
STEPS = ("forward", "backward")
N_ROWS = 1024
# Of a rank: enough columns that what grows with them is told from what does not.
COLUMNS = (256, 512)
RANKS = (8, 16)
MEAN = Reduction("mean")


@dataclass(frozen=True)
class Figures:
    """Of one step of a loss: parts that do not grow, and parts that grow with logits and with ranks."""

    launches: int
    sent: tuple[float, ...]  # a token
    logit_bytes: float  # moved, a logit of the rank
    token_bytes: float  # moved, a token
    rank_bytes: float  # moved, a token and rank
    held_logit_bytes: float
    held_token_bytes: float
    held_rank_bytes: float


def _held(one: Any) -> dict[str, int]:
    """The most bytes that there are at a time in each step, beside the inputs and what the step hands over."""
    one.loss = one.results = None
    forward, kept = _peak(one.forward)
    backward, _ = _peak(one.backward)
    return {"forward": forward, "backward": kept + backward - one.logits.numel() * one.logits.element_size()}


def _peak(step: Callable[[], Any]) -> tuple[int, int]:
    """Bytes allocated at the peak and left at the end, the result's included."""
    # What a collector of garbage has yet to free, or frees meanwhile, is no part of a step.
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = step()
    finally:
        gc.enable()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak, held


class _Ours:
    """The operators that the public function's own hide."""

    def __init__(
        self,
        ranks: int,
        columns: int,
        options: TokenOptions | None = None,
        *,
        with_stats: bool = False,
        reduction: Reduction = MEAN,
    ) -> None:
        self.logits = torch.randn(N_ROWS, columns, dtype=torch.bfloat16)
        self.targets = torch.randint(columns, (N_ROWS,))
        self.options, self.with_stats, self.reduction = options or TokenOptions(), with_stats, reduction
        self.shard = ShardBackend(NoKernels(), Shard(_world().group_name, 0, None, check_group=False))
        self.results: Any = ()

    def forward(self) -> None:
        self.results = empty_results(
            self.logits, self.targets, self.reduction, with_state=True, with_stats=self.with_stats
        )
        mixture = Mixture(eta_value=0.5)
        self.shard.forward(self.logits, self.targets, mixture, self.options, self.reduction, self.results, None, None)

    def backward(self) -> Tensor:
        grad, grad_loss = torch.empty_like(self.logits), self.results.loss
        self.shard.logits_grad(
            self.logits, self.targets, self.results.state, grad_loss, self.results.token_scale, self.options, grad
        )
        return grad


class _Around:
    """What the public function does around its operators, which do nothing."""

    def __init__(self, ranks: int, columns: int) -> None:
        self.logits = torch.randn(N_ROWS, columns, dtype=torch.bfloat16, requires_grad=True)
        self.targets = torch.randint(columns, (N_ROWS,))
        self.loss: Any = None

    def forward(self) -> None:
        with mock.patch.object(ShardBackend, "forward", return_value=None):
            self.loss = vocab_parallel_mixce_loss(
                self.logits, self.targets, group=None, vocab_start=0, backend="cpu", check_group=False
            )

    def backward(self) -> Any:
        with mock.patch.object(ShardBackend, "logits_grad", return_value=None):
            return torch.autograd.grad(self.loss, self.logits)


class _LossParallel:
    def __init__(self, ranks: int, columns: int) -> None:
        self.logits = torch.randn(N_ROWS, columns, dtype=torch.bfloat16, requires_grad=True)
        self.targets = torch.randint(columns, (N_ROWS,))
        self.mesh = init_device_mesh("cpu", (ranks,))
        self.loss: Any = None

    def forward(self) -> None:
        with loss_parallel():
            logits = DTensor.from_local(self.logits, self.mesh, [Sharded(1)], run_check=False)
            loss: Any = F.cross_entropy(logits, self.targets)
            self.loss = loss.to_local()

    def backward(self) -> Any:
        with loss_parallel():
            return torch.autograd.grad(self.loss, self.logits)


class _ThreeAllReduces:
    def __init__(self, ranks: int, columns: int) -> None:
        self.logits = torch.randn(N_ROWS, columns, dtype=torch.bfloat16, requires_grad=True)
        self.targets = torch.randint(columns, (N_ROWS,))
        self.loss: Any = None

    def forward(self) -> None:
        self.loss = three_all_reduces(self.logits, self.targets, _world(), 0)

    def backward(self) -> Any:
        return torch.autograd.grad(self.loss, self.logits)


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


_COUNTED: dict[str, tuple[Any, ...]] = {
    OURS: (_Ours, _Around),
    LOSS_PARALLEL: (_LossParallel,),
    THREE_ALL_REDUCES: (_ThreeAllReduces,),
}


@contextlib.contextmanager
def _rank_of(ranks: int) -> Iterator[None]:
    """A rank of others that are not there; a process group needs the last one to be gone."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _count_steps(one: Any) -> dict[str, Counted]:
    """Both steps of a loss."""
    # The first call is not counted: some operators are for it alone.
    one.forward()
    one.backward()
    found = {}
    for step in STEPS:
        with Counting() as counting:
            getattr(one, step)()
        found[step] = counting.counted
    return found


def count_options(options: TokenOptions, *, with_stats: bool) -> dict[str, Counted]:
    """Both steps of our operators with these options, without what the public function does around them."""
    with _rank_of(RANKS[0]):
        return _count_steps(_Ours(RANKS[0], COLUMNS[0], options, with_stats=with_stats))


def _count(name: str, ranks: int, columns: int) -> dict[str, Counted]:
    """Both steps."""
    found = {step: Counted() for step in STEPS}
    with _rank_of(ranks):
        for make in _COUNTED[name]:
            one = make(ranks, columns)
            for step, counted in _count_steps(one).items():
                found[step].add(counted)
            if make is not _Around:
                for step, held_bytes in _held(one).items():
                    found[step].held_bytes = held_bytes
    return found


def figures(name: str) -> dict[str, Figures]:
    """The steps of a loss, from two numbers of columns and of ranks."""
    base, wider, more = (
        _count(name, *of) for of in ((RANKS[0], COLUMNS[0]), (RANKS[0], COLUMNS[1]), (RANKS[1], COLUMNS[0]))
    )
    found = {}
    for step in STEPS:
        parts: list[float] = []
        for of in ("moved_bytes", "held_bytes"):
            a_row, a_wider, one_more = (getattr(each[step], of) / N_ROWS for each in (base, wider, more))
            a_logit = (a_wider - a_row) / (COLUMNS[1] - COLUMNS[0])
            a_rank = (one_more - a_row) / (RANKS[1] - RANKS[0])
            parts += [a_logit, a_row - a_logit * COLUMNS[0] - a_rank * RANKS[0], a_rank]
        found[step] = Figures(base[step].launches, tuple(sent / N_ROWS for sent in base[step].sent), *parts)
    return found


if __name__ == "__main__":
    for loss in _COUNTED:
        for step, found in figures(loss).items():
            print(json.dumps({"loss": loss, "step": step, **asdict(found)}))
