"""A child process of the benchmark: measures the cells of one job, and writes a JSON line for each result.

A job comes as JSON on the standard input. The allocator's regime is the process's own, set in its environment by the
parent; `peak` jobs measure memory, the others time.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any, TextIO

import torch

from harness.allocators import WARM
from harness.check import Errors
from harness.measure import Timing, peak_growth, time_rounds
from harness.worker import Worker, outcome, run_job, times
from vocab.check import Inputs
from vocab.contenders import COPY, MODES, READ, Contender, contenders
from vocab.plan import Cell
from vocab.programs import TRAFFIC, Program, check, yardsticks

# Of a cell's progress, the part before the first repetition.
CHECKED = 0.5


class VocabWorker(Worker):
    """One job of the benchmark."""

    def __init__(self, job: dict[str, Any], stream: TextIO) -> None:
        super().__init__(job, stream)
        self.modes = self.modes or list(MODES)
        self.budget: float = job["budget"]

    def run(self, cell: Cell) -> None:
        """Measures one cell."""
        torch.set_num_threads(cell.threads)
        able, _ = contenders(self.device, self.extra_files)
        able = [
            one
            for one in able
            if (not self.names or one.name in self.names)
            and (cell.compiled or not one.compiled)
            and (cell.weightings or not one.of_weightings)
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
            self.result(cell, program.contender, program.mode, {"peak_bytes": peak})
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
                self.result(cell, program.contender, program.mode, {"status": status, **_error_fields(found)})
            self._progress(cell, CHECKED * (count + 1) / len(programs))

        whole = yardsticks()
        timings: list[Timing] = []
        for step in time_rounds([*whole, *right], inputs, self.budget, cell.allocator == WARM):
            if isinstance(step, float):
                self._progress(cell, CHECKED + (1 - CHECKED) * step)
            else:
                timings = step
        found_of_all = [None] * len(whole) + errors
        gbps = {
            one.mode: TRAFFIC[one.mode] * inputs.nbytes / statistics.median(timing.parts[0]) / 1e9
            for one, timing in zip(whole, timings, strict=False)
        }
        for program, timing, found in zip([*whole, *right], timings, found_of_all, strict=True):
            for mode, seconds in _rows(program.mode, timing):
                if mode in self.modes or mode in gbps:
                    self._timed(cell, program, mode, seconds, timing, inputs, gbps, found)

    def _timed(
        self,
        cell: Cell,
        program: Program,
        mode: str,
        seconds: list[float],
        timing: Timing,
        inputs: Inputs,
        yardstick_gbps: dict[str, float],
        errors: Errors | None,
    ) -> None:
        timed = times(seconds)
        median = timed["median_ms"]
        traffic = TRAFFIC[mode] * inputs.nbytes
        gbps = traffic / median / 1e6
        fields = {
            "status": "ok",
            **timed,
            "traffic_bytes": traffic,
            "gbps": gbps,
            "percent_of_copy": 100 * gbps / yardstick_gbps[COPY],
            "percent_of_read": 100 * gbps / yardstick_gbps[READ],
            "times_copy": median * 1e6 * yardstick_gbps[COPY] / (TRAFFIC[COPY] * inputs.nbytes),
            "page_faults": timing.page_faults,
            **_error_fields(errors),
        }
        self.result(cell, program.contender, mode, fields)

    def _progress(self, cell: Cell, fraction: float) -> None:
        what = f"memory: {cell}" if self.peak else f"time: {cell}, allocator {cell.allocator}"
        self.output.progress(what, fraction)


def _rows(mode: str, timing: Timing) -> list[tuple[str, list[float]]]:
    """The rows that a program's parts make: `both` also yields `backward`, its second part."""
    whole = [sum(parts) for parts in zip(*timing.parts, strict=True)]
    return [("backward", timing.parts[1]), (mode, whole)] if mode == "both" else [(mode, whole)]


def _error_fields(errors: Errors | None) -> dict[str, float]:
    if errors is None:
        return {}
    return {f"{name}_error" if "_" not in name else name: value for name, value in vars(errors).items()}


if __name__ == "__main__":
    run_job(VocabWorker, Cell)
