"""How a number comes about: time and peak memory of a contender in a mode, after its check.

On a GPU, events on the stream are the clock. Before each call the logits are put back and L2 is filled with other data:
the forward reads its logits from memory, the backward finds in L2 what the forward left there. Both also give the host
a head start, as in a training loop, where the device has work queued.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

# Twice the L2 of the largest GPU.
FLUSH_BYTES = 256 * 2**20
MIN_WARMUP_ROUNDS = 1
# A GPU's clocks rise under load, and the first round fills the caching allocator.
MIN_WARMUP_ROUNDS_GPU = 3
MAX_WARMUP_ROUNDS = 8
# Pages that a whole round of all contenders may still touch for the first time when memory is warm (of 4 KiB: 4 MB).
WARM_FAULTS = 1024
MIN_REPETITIONS = 7
MAX_REPETITIONS = 200


class InputsLike(Protocol):
    """What the measurement of any call needs of its inputs."""

    device: torch.device
    pristine: Tensor
    targets: Tensor  # [N]

    def restore(self) -> None:
        """Puts back what a contender may have written over."""


InputsT_contra = TypeVar("InputsT_contra", bound=InputsLike, contravariant=True)
InputsT = TypeVar("InputsT", bound=InputsLike)


class ProgramLike(Protocol[InputsT_contra]):
    """Something to be called again and again."""

    def steps(self, inputs: InputsT_contra, targets: Tensor, results: list[Tensor]) -> list[Callable[[], None]]:
        """The parts to time, one after the other; they leave loss and gradients in `results`."""


@dataclass(frozen=True)
class Timing:
    """Of one program: seconds of each part in each repetition, and pages touched for the first time."""

    parts: list[list[float]]
    page_faults: float


def time_rounds(
    programs: Sequence[ProgramLike[InputsT]],
    inputs: InputsT,
    budget: float,
    warm: bool,
    least: int = MIN_REPETITIONS,
) -> Iterator[float | list[Timing]]:
    """Warms up, then times as many rounds as the budget allows; yields what `rounds` does.

    Args:
        programs: what to time; all must have passed their check, which also was their first call.
        inputs: their logits and targets.
        budget: seconds for the repetitions, at least `least` and at most MAX_REPETITIONS of them.
        warm: go on warming up until the process touches no new pages.
        least: see `budget`.
    """
    min_warmup_rounds = MIN_WARMUP_ROUNDS_GPU if inputs.device.type == "cuda" else MIN_WARMUP_ROUNDS
    with without_collector():
        for count in range(MAX_WARMUP_ROUNDS):
            start = time.perf_counter()
            *_, timings = rounds(programs, inputs, 1)
            round_seconds = time.perf_counter() - start
            assert isinstance(timings, list)
            faults = sum(timing.page_faults for timing in timings)
            if count + 1 >= min_warmup_rounds and (not warm or faults <= WARM_FAULTS):
                break
        repetitions = min(max(int(budget / round_seconds), least), MAX_REPETITIONS)
        yield from rounds(programs, inputs, repetitions)


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Keeps Python's collector of cycles out of the times."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def rounds(
    programs: Sequence[ProgramLike[InputsT]], inputs: InputsT, repetitions: int
) -> Iterator[float | list[Timing]]:
    """Calls the programs in turn, round after round, so that a drift of the machine meets all alike.

    Yields the fraction that is done, and at last a `Timing` for each program.
    """
    on_gpu = inputs.device.type == "cuda"
    flush = inputs.pristine.new_empty(FLUSH_BYTES, dtype=torch.uint8) if on_gpu else None
    calls: list[list[tuple[list[float], int]]] = []
    for count in range(repetitions):
        calls.append([_call(program, inputs, flush) for program in programs])
        yield (count + 1) / repetitions
    yield [
        Timing(
            [list(part) for part in zip(*(seconds for seconds, _ in of_one), strict=True)],
            statistics.median(faults for _, faults in of_one),
        )
        for of_one in zip(*calls, strict=True)
    ]


def _call(program: ProgramLike[InputsT], inputs: InputsT, flush: Tensor | None) -> tuple[list[float], int]:
    """Seconds of each part of one call, and the pages that it touched first."""
    inputs.restore()
    results: list[Tensor] = []
    steps = program.steps(inputs, inputs.targets, results)
    if flush is not None:
        flush.zero_()
        return _event_seconds(steps), 0
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    marks = [time.perf_counter()]
    for step in steps:
        step()
        marks.append(time.perf_counter())
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return [after - before for before, after in itertools.pairwise(marks)], faults


def _event_seconds(steps: list[Callable[[], None]]) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
    events[0].record()
    for step, event in zip(steps, events[1:], strict=True):
        step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


def peak_growth(program: ProgramLike[InputsT], inputs: InputsT) -> int | None:
    """Bytes by which the process's (or the GPU's) memory grew at its peak during a call, inputs allocated before.

    On a GPU by the caching allocator's count. On the CPU the kernel's own high-water mark of resident memory, reset
    before the call; None where it cannot be.
    """
    inputs.restore()
    results: list[Tensor] = []
    steps = program.steps(inputs, inputs.targets, results)
    if inputs.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for step in steps:
            step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    before = _resident("VmRSS")
    for step in steps:
        step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"expected {field} in /proc/self/status")
