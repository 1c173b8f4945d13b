"""How much a call allocates, measured by the profiler operator by operator."""

from __future__ import annotations

from typing import Any

from torch.profiler import ProfilerActivity, profile


def allocated_bytes(call: Any) -> list[int]:
    """The sizes of all allocations of a call of tensor memory, largest first."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    return sorted(
        (event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0), reverse=True
    )
