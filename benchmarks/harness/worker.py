"""What the workers share: a job and its results, checks that may fail, and the numbers of a timing."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

import torch

from harness.jobs import Output


class Worker:
    """One job on one device: its settings, and where results go."""

    def __init__(self, job: dict[str, Any], stream: TextIO) -> None:
        self.device = torch.device(job["device"])
        self.modes: list[str] = job["modes"]
        self.names: list[str] = job["contenders"]
        self.extra_files = [Path(path) for path in job["extra_files"]]
        self.peak: bool = job["peak"]
        self.output = Output(stream)

    def result(self, cell: Any, contender: Any, mode: str, fields: dict[str, Any]) -> None:
        """Tells what was found."""
        key = {"contender": contender.name, "computes": contender.computes, "mode": mode}
        self.output.result({**vars(cell), **key, **fields})


def run_job(make: Callable[[dict[str, Any], TextIO], Any], cell: Callable[..., Any]) -> None:
    """Reads a job from the standard input and runs its cells; what contenders print is no result."""
    stream, sys.stdout = sys.stdout, sys.stderr
    job = json.load(sys.stdin)
    worker = make(job, stream)
    for fields in job["cells"]:
        worker.run(cell(**fields))


class Judged(Protocol):
    """Errors, and what is wrong with them."""

    def wrong(self) -> str | None:
        """A sentence, or None if the results are right."""


JudgedT = TypeVar("JudgedT", bound=Judged)


def outcome(checked: Callable[[], JudgedT | None]) -> tuple[str | None, JudgedT | None]:
    """What a check says against a contender, None if nothing, and the errors that it found."""
    try:
        found = checked()
    except Exception as error:
        # Whatever a contender raises is its result, and no reason to lose the others'.
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", None
    return None if found is None else found.wrong(), found


def times(seconds: list[float]) -> dict[str, float]:
    """The columns of a time: repetitions, and their median, 20 % and 80 % quantile in milliseconds."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return {
        "repetitions": len(seconds),
        "median_ms": 1e3 * statistics.median(seconds),
        "q20_ms": 1e3 * fifths[0],
        "q80_ms": 1e3 * fifths[3],
    }
