"""A child process of the benchmark of log-probabilities: measures the cells of one job, in the terms of jobs.py.

`peak` jobs measure memory, the others errors and times; the allocator's regime is the process's own, set by the parent.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TextIO

import torch

from harness.allocators import WARM
from harness.measure import MIN_WARMUP_ROUNDS_GPU, Timing, peak_growth, rounds, time_rounds, without_collector
from harness.worker import Worker, outcome, run_job, times
from logprobs.check import Oracle, inputs_of
from logprobs.contenders import (
    MODES,
    WITHOUT_GRADIENT,
    AnyProgram,
    check,
    error_fields,
    level_of,
    logprob_contenders,
    programs_of,
)
from logprobs.plan import LOGITS, LogprobCell
from vocab.contenders import COPY
from vocab.programs import yardsticks

# Of a cell's progress, the part before the first repetition.
CHECKED = 0.4


class LogprobWorker(Worker):
    """One job of the benchmark."""

    def __init__(self, job: dict[str, Any], stream: TextIO) -> None:
        super().__init__(job, stream)
        self.modes = self.modes or list(MODES)
        self.budget: float = job["budget"]
        self.rounds: int = job["rounds"]
        self._called: set[str] = set()

    def run(self, cell: LogprobCell) -> None:
        """Measures one cell."""
        torch.set_num_threads(cell.threads)
        able, _ = logprob_contenders(self.device, self.extra_files)
        able = [
            one
            for one in able
            if level_of(one) == cell.level
            and (not self.names or one.name in self.names)
            # Errors are those of the formula that is compiled.
            and (cell.timed or not one.compiled)
        ]
        if any(one.compiled for one in able):
            # Or the compiler's limit of shapes for one function is reached.
            torch.compiler.reset()
        programs = programs_of(able, self.modes)
        inputs: Any = inputs_of(cell, self.device)
        if self.peak:
            self._measure_peaks(cell, programs, inputs)
        else:
            self._measure_times(cell, programs, inputs)

    def _measure_peaks(self, cell: LogprobCell, programs: list[AnyProgram], inputs: Any) -> None:
        for count, program in enumerate(programs):
            peak = None
            try:
                # The first call loads code and starts threads, and each of a compiled contender's modes compiles.
                if program.contender.compiled or program.contender.name not in self._called:
                    peak_growth(program, inputs)
                self._called.add(program.contender.name)
                peak = peak_growth(program, inputs)
            except Exception:
                # The process that times says what is wrong.
                pass
            if peak is not None and program.mode not in (*WITHOUT_GRADIENT, "inplace"):
                peak -= inputs.gradients_nbytes
            self.result(cell, program.contender, program.mode, {"peak_bytes": peak})
            self.output.progress(f"memory: {cell}", (count + 1) / len(programs))

    def _measure_times(self, cell: LogprobCell, programs: list[AnyProgram], inputs: Any) -> None:
        title = f"{'time' if cell.timed else 'errors'}: {cell}, allocator {cell.allocator}"
        whole: list[AnyProgram] = [*yardsticks()] if cell.timed and cell.level == LOGITS else []
        results: list[dict[str, Any]] = [{"status": "ok"} for _ in whole]
        oracle = Oracle(inputs)
        for count, program in enumerate(programs):
            status, found = outcome(partial(check, program, inputs, oracle))
            results.append({"status": status or "ok", **error_fields(found)})
            self.output.progress(title, (CHECKED if cell.timed else 1.0) * (count + 1) / len(programs))
        del oracle

        measured = list(zip([*whole, *programs], results, strict=True))
        right = [one for one in measured if one[1]["status"] == "ok"] if cell.timed else []
        timings = self._timings(cell, [program for program, _ in right], inputs, title) if right else []
        copy = None
        for (program, fields), timing in zip(right, timings, strict=True):
            timed = times([sum(parts) for parts in zip(*timing.parts, strict=True)])
            if program.mode == COPY:
                copy = timed["median_ms"]
            fields |= {
                **timed,
                "times_copy": timed["median_ms"] / copy if copy else None,
                "page_faults": timing.page_faults,
            }
        for program, fields in measured:
            self.result(cell, program.contender, program.mode, fields)

    def _timings(self, cell: LogprobCell, right: list[AnyProgram], inputs: Any, title: str) -> list[Timing]:
        """The programs' times: with logits as many as the budget allows, with a head's products as few as may be."""
        timings: list[Timing] = []
        with without_collector():
            if cell.level == LOGITS:
                steps = time_rounds(right, inputs, self.budget, cell.allocator == WARM, self.rounds)
            else:
                # A GPU's clocks rise under load. On the CPU, the check was the first call.
                if self.device.type == "cuda":
                    list(rounds(right, inputs, MIN_WARMUP_ROUNDS_GPU))
                steps = rounds(right, inputs, self.rounds)
            for step in steps:
                if isinstance(step, float):
                    self.output.progress(title, CHECKED + (1 - CHECKED) * step)
                else:
                    timings = step
        return timings


if __name__ == "__main__":
    run_job(LogprobWorker, LogprobCell)
