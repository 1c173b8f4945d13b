"""Child processes of a benchmark: their environment, their input, their results, and the bar that shows the way left.

A worker reads its job as JSON on the standard input and writes lines of JSON: {"result": ...} for a measurement, and
{"cell": ..., "progress": ...} in between.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from harness.allocators import ALLOCATOR_ENVIRONMENT

# From here, a worker imports what it needs.
BENCHMARKS = Path(__file__).resolve().parents[1]


def words(text: str) -> list[str]:
    """The words of a command line's list."""
    return text.split(",") if text else []


def integers(text: str) -> list[int]:
    """The numbers of a command line's list."""
    return [int(word) for word in words(text)]


@dataclass(frozen=True)
class Job:
    """What one child process does: the variables of its environment, and its input."""

    environment: dict[str, str]
    request: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """What all child processes found, and whether each of them came to its end."""

    peaks: list[dict[str, Any]]
    times: list[dict[str, Any]]
    complete: bool


@dataclass(frozen=True)
class Output:
    """A worker's end: its lines of JSON."""

    stream: TextIO

    def result(self, fields: dict[str, Any]) -> None:
        """One measurement."""
        self._write({"result": fields})

    def progress(self, cell: str, fraction: float) -> None:
        """How much of a cell is done, from 0 to 1."""
        self._write({"progress": fraction, "cell": cell})

    def _write(self, line: dict[str, Any]) -> None:
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()


def environment(allocator: dict[str, str], threads: int) -> dict[str, str]:
    """The variables of a process with this allocator and this many threads."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return {**kept, **allocator, "OMP_NUM_THREADS": str(threads)}


def job_of(allocator: dict[str, str], threads: int, cells: Iterable[Any], request: dict[str, Any], peak: bool) -> Job:
    """Measures these cells, peaks or times, in one process."""
    members = [vars(cell) for cell in cells]
    return Job(environment(allocator, threads), {**request, "peak": peak, "cells": members})


def timing_jobs(cells: Iterable[Any], request: dict[str, Any]) -> list[Job]:
    """Jobs that time these cells, a process for each allocator and number of threads."""
    settings: dict[tuple[str, int], list[Any]] = {}
    for cell in cells:
        settings.setdefault((cell.allocator, cell.threads), []).append(cell)
    return [
        job_of(ALLOCATOR_ENVIRONMENT[allocator], threads, members, request, peak=False)
        for (allocator, threads), members in settings.items()
    ]


def run_all(worker: str, peak_jobs: list[Job], time_jobs: list[Job]) -> Measured:
    """Runs the jobs with this worker's module: memory side by side, then times one after the other."""
    with _Progress([*peak_jobs, *time_jobs]) as progress:
        # Load changes no peak: these run side by side, and leave torch.compile's disk cache filled for the others.
        with ThreadPoolExecutor(max(len(peak_jobs), 1)) as pool:
            peak_runs = list(pool.map(lambda job: _run(worker, job, progress), peak_jobs))
        time_runs = [_run(worker, job, progress) for job in time_jobs]
    return Measured(
        peaks=[result for results, _ in peak_runs for result in results],
        times=[result for results, _ in time_runs for result in results],
        complete=all(ended_well for _, ended_well in [*peak_runs, *time_runs]),
    )


def _run(worker: str, job: Job, progress: _Progress) -> tuple[list[dict[str, Any]], bool]:
    """The results of one child process, and whether it came to its end."""
    with subprocess.Popen(
        [sys.executable, "-m", worker],
        cwd=BENCHMARKS,
        env=job.environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(job.request))
        child.stdin.close()
        results = list(_results(child.stdout, progress))
    if child.returncode != 0:
        progress.say(f"a measuring process ended early, with code {child.returncode}; its remaining cells are missing")
    return results, child.returncode == 0


def _results(lines: Iterable[str], progress: _Progress) -> Iterable[dict[str, Any]]:
    for line in lines:
        message = json.loads(line)
        if "result" in message:
            yield message["result"]
        else:
            progress.move(message["cell"], message["progress"])


class _Progress:
    """A bar that moves by fractions of a cell, or a line for each cell where tqdm is missing."""

    def __init__(self, jobs: list[Job]) -> None:
        self._lock = threading.Lock()
        self._done: dict[str, float] = {}
        self._bar: Any = None
        try:
            from tqdm import tqdm
        except ImportError:
            return
        total = sum(len(job.request["cells"]) for job in jobs)
        self._bar = tqdm(total=total, bar_format="{percentage:3.0f}% |{bar:24}| {elapsed} {desc}")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def move(self, cell: str, fraction: float) -> None:
        """The cell's own progress, from 0 to 1."""
        with self._lock:
            if self._bar is not None:
                self._bar.set_description_str(cell, refresh=False)
                self._bar.update(fraction - self._done.get(cell, 0.0))
            elif cell not in self._done:
                self.say(cell)
            self._done[cell] = fraction

    def say(self, line: str) -> None:
        """A line beside the bar."""
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)
