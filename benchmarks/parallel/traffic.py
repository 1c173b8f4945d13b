"""What a step communicates, measured: the collectives of a rank with their bytes, and bytes on the loopback device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from parallel.check import ParallelInputs
from parallel.contenders import ParallelProgram

# Of a message, by the profiler's names of types.
_SIZES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "int": 4, "long int": 8}
# The profiler's name of what gloo is asked for; a barrier is ours alone.
_GLOO, _BARRIER = "gloo:", "gloo:barrier"
# The smallest counts: other processes' traffic on the same device only adds.
REPETITIONS = 8
_COUNTERS = Path("/proc/net/dev")


@dataclass(frozen=True)
class Traffic:
    """Of one part of a program."""

    collectives: int
    sent_bytes: int  # that they take from this rank
    wire_bytes: float | None  # that all ranks send, headers included; None where there are no counters


def traffic(program: ParallelProgram, inputs: ParallelInputs) -> list[Traffic]:
    """Each part's, after a call that is not counted."""
    _call(program, inputs, lambda step: step())
    messages: list[list[int]] = []

    def recorded(step: Callable[[], None]) -> None:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
            step()
        events = found.profiler.kineto_results.events()
        messages.append(
            [
                math.prod(event.shapes()[0]) * _SIZES[event.dtypes()[0]]
                for event in events
                if event.name().startswith(_GLOO) and event.name() != _BARRIER
            ]
        )

    _call(program, inputs, recorded)
    on_wire = _on_wire(program, inputs, len(messages))
    return [Traffic(len(sent), sum(sent), wire) for sent, wire in zip(messages, on_wire, strict=True)]


def _on_wire(program: ParallelProgram, inputs: ParallelInputs, parts: int) -> list[float | None]:
    """Bytes that the loopback device sends during each part, less those of the barriers around it."""
    if not _COUNTERS.exists():
        return [None] * parts
    counts: list[list[int]] = []
    barriers: list[int] = []

    def counted(step: Callable[[], None]) -> None:
        counts[-1].append(_sent_during(step))

    for _ in range(REPETITIONS):
        barriers.append(_sent_during(lambda: None))
        counts.append([])
        _call(program, inputs, counted)
    return [float(max(min(of_one) - min(barriers), 0)) for of_one in zip(*counts, strict=True)]


def _sent_during(step: Callable[[], None]) -> int:
    # The first barrier's last messages may come after its end on one rank.
    dist.barrier()
    dist.barrier()
    before = _loopback_bytes()
    step()
    dist.barrier()
    return _loopback_bytes() - before


def _loopback_bytes() -> int:
    lines = _COUNTERS.read_text().splitlines()
    counters = next(line.partition(":")[2].split() for line in lines if line.strip().startswith("lo:"))
    return int(counters[8])


def _call(program: ParallelProgram, inputs: ParallelInputs, with_step: Callable[[Callable[[], None]], None]) -> None:
    inputs.restore()
    results: list[Tensor] = []
    for step in program.steps(inputs, inputs.targets, results):
        with_step(step)
