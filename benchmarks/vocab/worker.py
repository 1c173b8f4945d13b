"""A child process of the benchmark: measures the cells of one job, and writes a JSON line for each result.

A job comes as JSON on the standard input. The allocator's regime is the process's own, set in its environment by the
parent; `peak` jobs measure memory, the others time.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

import torch

from harness.jobs import Output
from harness.measure import (
    TRAFFIC,
    Program,
    Timing,
    check,
    copy_contender,
    peak_growth,
    time_rounds,
)
from vocab.check import Errors, Inputs
from vocab.contenders import COPY, MODES, Contender, contenders
from vocab.plan import WARM, Cell

# Of a cell's progress, the part before the first repetition.
CHECKED = 0.5


class Worker:
    """One job: its settings, and where results go."""

    def __init__(self, job: dict[str, Any], output: TextIO) -> None:
        self.device = torch.device(job["device"])
        self.modes: list[str] = job["modes"]
        self.names: list[str] = job["contenders"]
        self.extra_files = [Path(path) for path in job["extra_files"]]
        self.budget: float = job["budget"]
        self.peak: bool = job["peak"]
        self.output = Output(output)

    def run(self, cell: Cell) -> None:
        """Measures one cell."""
        torch.set_num_threads(cell.threads)
        able, _ = contenders(self.device, self.extra_files)
        able = [
            one for one in able if (not self.names or one.name in self.names) and (cell.compiled or not one.compiled)
        ]
        if any(one.compiled for one in able):
            # Or the compiler's limit of shapes for one function is reached.
            torch.compiler.reset()
        programs = [Program(one, mode, loss) for one in able for mode, loss in one.losses.items() if self._wanted(mode)]
        inputs = Inputs(getattr(torch, cell.dtype), cell.rows, cell.vocab, self.device)
        if self.peak:
            self._measure_peaks(cell, programs, inputs)
        else:
            self._measure_times(cell, programs, inputs)

    def _wanted(self, mode: str) -> bool:
        return mode in self.modes or (mode == "both" and "backward" in self.modes)

    def _measure_peaks(self, cell: Cell, programs: list[Program], inputs: Inputs) -> None:
        warmed: list[Contender] = []
        for count, program in enumerate(programs):
            try:
                # A contender's first call loads code and starts threads, and each of its modes compiles for itself.
                if program.contender.compiled or program.contender not in warmed:
                    peak_growth(program, inputs)
                    warmed.append(program.contender)
                peak = peak_growth(program, inputs)
            except Exception:
                peak = None
            self._result(cell, program.contender, program.mode, {"peak_bytes": peak})
            self._progress(cell, (count + 1) / len(programs))

    def _measure_times(self, cell: Cell, programs: list[Program], inputs: Inputs) -> None:
        right: list[Program] = []
        errors: list[Errors] = []
        for count, program in enumerate(programs):
            status, found = outcome(partial(check, program, inputs))
            if status is None and found is not None:
                right.append(program)
                errors.append(found)
            else:
                self._result(cell, program.contender, program.mode, {"status": status, **_error_fields(found)})
            self._progress(cell, CHECKED * (count + 1) / len(programs))

        yardstick = Program(copy_contender(), COPY, None)
        timings: list[Timing] = []
        for step in time_rounds([yardstick, *right], inputs, self.budget, cell.allocator == WARM):
            if isinstance(step, float):
                self._progress(cell, CHECKED + (1 - CHECKED) * step)
            else:
                timings = step
        copy_ms = statistics.median(timings[0].parts[0]) * 1e3
        self._timed(cell, yardstick, COPY, timings[0].parts[0], timings[0], inputs, copy_ms, None)
        for program, timing, found in zip(right, timings[1:], errors, strict=True):
            for mode, seconds in _rows(program.mode, timing):
                if mode in self.modes:
                    self._timed(cell, program, mode, seconds, timing, inputs, copy_ms, found)

    def _timed(
        self,
        cell: Cell,
        program: Program,
        mode: str,
        seconds: list[float],
        timing: Timing,
        inputs: Inputs,
        copy_ms: float,
        errors: Errors | None,
    ) -> None:
        median, q20, q80 = (1e3 * value for value in quantiles(seconds))
        traffic = TRAFFIC[mode] * inputs.nbytes
        gbps, copy_gbps = traffic / median / 1e6, TRAFFIC[COPY] * inputs.nbytes / copy_ms / 1e6
        fields = {
            "status": "ok",
            "repetitions": len(seconds),
            "median_ms": median,
            "q20_ms": q20,
            "q80_ms": q80,
            "traffic_bytes": traffic,
            "gbps": gbps,
            "percent_of_copy": 100 * gbps / copy_gbps,
            "times_copy": median / copy_ms,
            "page_faults": timing.page_faults,
            **_error_fields(errors),
        }
        self._result(cell, program.contender, mode, fields)

    def _result(self, cell: Cell, contender: Contender, mode: str, fields: dict[str, Any]) -> None:
        key = {"contender": contender.name, "computes": contender.computes, "mode": mode}
        self.output.result({**vars(cell), **key, **fields})

    def _progress(self, cell: Cell, fraction: float) -> None:
        what = f"memory: {cell}" if self.peak else f"time: {cell}, allocator {cell.allocator}"
        self.output.progress(what, fraction)


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


def _rows(mode: str, timing: Timing) -> list[tuple[str, list[float]]]:
    """The rows that a program's parts make: `both` also yields `backward`, its second part."""
    whole = [sum(parts) for parts in zip(*timing.parts, strict=True)]
    return [("backward", timing.parts[1]), (mode, whole)] if mode == "both" else [(mode, whole)]


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return statistics.median(seconds), fifths[0], fifths[3]


def _error_fields(errors: Errors | None) -> dict[str, float]:
    if errors is None:
        return {}
    return {f"{name}_error" if "_" not in name else name: value for name, value in vars(errors).items()}


def main() -> None:
    """Reads a job from the standard input and runs it."""
    output, sys.stdout = sys.stdout, sys.stderr
    job = json.load(sys.stdin)
    job["modes"] = job["modes"] or list(MODES)
    worker = Worker(job, output)
    for fields in job["cells"]:
        worker.run(Cell(**fields))


if __name__ == "__main__":
    main()
