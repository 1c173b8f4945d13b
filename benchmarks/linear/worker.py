"""A child process of the benchmark with a linear head: measures the cells of one job, in the terms of jobs.py.

`peak` jobs measure memory, the others time; the allocator's regime is the process's own, set by the parent.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TextIO

import torch

from harness.measure import MIN_WARMUP_ROUNDS_GPU, Timing, peak_growth, rounds, without_collector
from harness.worker import Worker, outcome, run_job, times
from linear.check import LinearInputs
from linear.contenders import LinearContender, LinearProgram, check, linear_contenders
from linear.plan import LinearCell

# Of a cell's progress, the part before the first repetition.
CHECKED = 0.25
# Matrix products of N D V multiplications and additions that a mode cannot do without.
PRODUCTS = {"forward": 1, "both": 3}


class LinearWorker(Worker):
    """One job of the benchmark."""

    def __init__(self, job: dict[str, Any], stream: TextIO) -> None:
        super().__init__(job, stream)
        self.rounds: int = job["rounds"]
        self._called: set[str] = set()

    def run(self, cell: LinearCell) -> None:
        """Measures one cell."""
        torch.set_num_threads(cell.threads)
        able, _ = linear_contenders(self.device, self.extra_files)
        able = [one for one in able if (one.name in self.names if self.names else cell.all or one.of_goals)]
        if any(one.compiled for one in able):
            # Or the compiler's limit of shapes for one function is reached.
            torch.compiler.reset()
        inputs = LinearInputs(getattr(torch, cell.dtype), cell.rows, cell.hidden_size, cell.vocab, self.device)
        if self.peak:
            self._measure_peaks(cell, able, inputs)
        else:
            self._measure_times(cell, able, inputs)

    def _measure_peaks(self, cell: LinearCell, able: list[LinearContender], inputs: LinearInputs) -> None:
        for count, contender in enumerate(able):
            program = LinearProgram(contender, "both")
            fields: dict[str, Any] = {"status": "ok"}
            try:
                # The first call loads code and starts threads, and a compiled contender's of a shape compiles.
                if contender.compiled or contender.name not in self._called:
                    peak_growth(program, inputs)
                self._called.add(contender.name)
                growth = peak_growth(program, inputs)
                if growth is not None:
                    fields["peak_bytes"] = growth - inputs.gradients_nbytes
            except Exception as error:
                fields["status"] = f"failed: {type(error).__name__}"
            self.result(cell, program.contender, program.mode, fields)
            self.output.progress(f"memory: {cell}", (count + 1) / len(able))

    def _measure_times(self, cell: LinearCell, able: list[LinearContender], inputs: LinearInputs) -> None:
        # Where only the goals are asked for, the forward by itself is left out.
        modes = [mode for mode in self.modes if cell.all or mode == "both"]
        programs = [LinearProgram(one, mode) for one in able for mode in modes]
        title = f"time: {cell}, allocator {cell.allocator}"
        # In the programs' order: what each is found to be, and the errors of those that are right.
        results: dict[LinearProgram, dict[str, Any]] = {}
        for count, program in enumerate(programs):
            status, found = outcome(partial(check, program, inputs))
            results[program] = {"status": status or "ok", **(vars(found) if found else {})}
            self.output.progress(title, CHECKED * (count + 1) / len(programs))

        right = [program for program in programs if results[program]["status"] == "ok"]
        timings: list[Timing] = []
        with without_collector():
            if self.device.type == "cuda":
                # A GPU's clocks rise under load. On the CPU, the check was the first call: what is left to touch for
                # the first time takes no part of a second that shows beside the seconds of these calls.
                list(rounds(right, inputs, MIN_WARMUP_ROUNDS_GPU))
            for step in rounds(right, inputs, self.rounds):
                if isinstance(step, float):
                    self.output.progress(title, CHECKED + (1 - CHECKED) * step)
                else:
                    timings = step
        yardstick: dict[str, float] = {}
        for program, timing in zip(right, timings, strict=True):
            timed = times(timing.parts[0])
            median = timed["median_ms"]
            if program.contender.loss is None:
                yardstick[program.mode] = median
            products = yardstick.get(program.mode)
            flops = 2 * PRODUCTS[program.mode] * cell.rows * cell.hidden_size * cell.vocab
            results[program] |= {
                **timed,
                "gflops": flops / median / 1e6,
                "times_matmuls": median / products if products else None,
                "page_faults": timing.page_faults,
            }
        for program, fields in results.items():
            self.result(cell, program.contender, program.mode, fields)


if __name__ == "__main__":
    run_job(LinearWorker, LinearCell)
