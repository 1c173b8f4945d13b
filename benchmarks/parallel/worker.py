"""A child process of the benchmark of the vocabulary-parallel loss: measures the cells of one job, in jobs.py's terms.

All cells of a job have the same number of ranks, which are processes of their own; rank 0 tells what was found. `peak`
jobs measure memory, the others traffic and time.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from harness.check import Errors
from harness.jobs import Output
from harness.measure import Timing, peak_growth, rounds, without_collector
from harness.worker import outcome, times
from parallel.check import ParallelInputs
from parallel.contenders import ParallelContender, ParallelProgram, Place, check, parallel_contenders
from parallel.plan import ParallelCell
from parallel.traffic import Traffic, traffic

# Of a cell's progress, the part before the first repetition.
CHECKED = 0.5
WARMUP_ROUNDS = 2
# A rank that has failed is not waited for much longer than the slowest call takes.
TIMEOUT = datetime.timedelta(minutes=3)


class Queued:
    """Rank 0's lines, on their way to the process that was asked for them."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def write(self, line: str) -> None:
        """One line."""
        self.queue.put(line)

    def flush(self) -> None:
        """Nothing is kept."""


class Rank:
    """One of the job's processes."""

    def __init__(self, job: dict[str, Any], ranks: int, queue: Any) -> None:
        self.names: list[str] = job["contenders"]
        self.extra_files = [Path(path) for path in job["extra_files"]]
        self.rounds: int = job["rounds"]
        self.peak: bool = job["peak"]
        assert dist.group.WORLD is not None
        self.group = dist.group.WORLD
        self.mesh = init_device_mesh("cpu", (ranks,))
        self.output = Output(cast(Any, Queued(queue))) if dist.get_rank() == 0 else None

    def run(self, cell: ParallelCell) -> None:
        """Measures one cell."""
        dtype = getattr(torch, cell.dtype)
        able = [one for one in parallel_contenders(dtype, self.extra_files) if not self.names or one.name in self.names]
        inputs = ParallelInputs(dtype, cell.rows, cell.vocab, cell.ranks, dist.get_rank())
        place = Place(self.group, self.mesh, inputs.vocab_start, cell.vocab)
        if self.peak:
            self._measure_peaks(cell, able, place, inputs)
        else:
            self._measure_times(cell, able, place, inputs)

    def _measure_peaks(
        self, cell: ParallelCell, able: list[ParallelContender], place: Place, inputs: ParallelInputs
    ) -> None:
        for count, contender in enumerate(able):
            program = ParallelProgram(contender, "both", place)
            fields: dict[str, Any] = {"status": "ok"}
            try:
                # The first call loads code and connects the ranks.
                peak_growth(program, inputs)
                growth = peak_growth(program, inputs)
            except Exception as error:
                growth, fields["status"] = None, f"failed: {type(error).__name__}"
            most = max((one for one in _of_all(growth) if one is not None), default=None)
            if most is not None:
                fields["peak_bytes"] = most - inputs.nbytes
                fields["peak_over_logits"] = fields["peak_bytes"] / inputs.nbytes
            self._result(cell, contender, "both", fields)
            self._progress(f"memory: {cell}", (count + 1) / len(able))

    def _measure_times(
        self, cell: ParallelCell, able: list[ParallelContender], place: Place, inputs: ParallelInputs
    ) -> None:
        programs = [ParallelProgram(one, mode, place) for one in able for mode in ("forward", "both")]
        results: dict[ParallelProgram, dict[str, Any]] = {}
        parts: dict[ParallelProgram, list[Traffic]] = {}
        for count, program in enumerate(programs):
            status, errors = _worst(*outcome(partial(check, program, inputs)))
            results[program] = {"status": status or "ok", **_error_fields(errors)}
            if status is None:
                parts[program] = traffic(program, inputs)
            self._progress(f"time: {cell}", CHECKED * (count + 1) / len(programs))

        right = list(parts)
        timings: list[Timing] = []
        with without_collector():
            list(rounds(right, inputs, WARMUP_ROUNDS))
            for step in rounds(right, inputs, self.rounds):
                if isinstance(step, float):
                    self._progress(f"time: {cell}", CHECKED + (1 - CHECKED) * step)
                else:
                    timings = step
        slowest = _slowest(timings)
        for program, fields in results.items():
            if program not in parts:
                self._result(cell, program.contender, program.mode, fields)
                continue
            seconds, sent = slowest[right.index(program)], parts[program]
            if program.mode == "both":
                self._timed(cell, program.contender, "backward", seconds[1], sent[1:], {"status": "ok"})
            whole = [sum(of_one) for of_one in zip(*seconds, strict=True)]
            self._timed(cell, program.contender, program.mode, whole, sent, fields)

    def _timed(
        self,
        cell: ParallelCell,
        contender: ParallelContender,
        mode: str,
        seconds: list[float],
        sent: list[Traffic],
        fields: dict[str, Any],
    ) -> None:
        wire = [one.wire_bytes for one in sent if one.wire_bytes is not None]
        found = {
            **times(seconds),
            "collectives": sum(one.collectives for one in sent),
            "sent_per_token": sum(one.sent_bytes for one in sent) / cell.rows,
            "wire_per_token": sum(wire) / (cell.rows * cell.ranks) if wire else None,
        }
        self._result(cell, contender, mode, {**fields, **found})

    def _result(self, cell: ParallelCell, contender: ParallelContender, mode: str, fields: dict[str, Any]) -> None:
        if self.output is not None:
            key = {"contender": contender.name, "computes": contender.computes, "mode": mode}
            self.output.result({**vars(cell), "columns": cell.columns, **key, **fields})

    def _progress(self, what: str, fraction: float) -> None:
        if self.output is not None:
            self.output.progress(what, fraction)


def _of_all(own: Any) -> list[Any]:
    """Every rank's."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def _worst(status: str | None, errors: Errors | None) -> tuple[str | None, Errors | None]:
    """The first rank's complaint, and the largest errors of all ranks, the same on each."""
    found = _of_all((status, errors))
    complaint = next((f"{text} (rank {rank})" for rank, (text, _) in enumerate(found) if text is not None), None)
    of_ranks = [one for _, one in found if one is not None]
    if not of_ranks:
        return complaint, None
    # Of the loss too, though it should be the same; a NaN is the largest.
    worst = torch.tensor([list(vars(one).values()) for one in of_ranks], dtype=torch.float64).amax(0)
    return complaint, Errors(*worst.tolist())


def _error_fields(errors: Errors | None) -> dict[str, float]:
    if errors is None:
        return {}
    return {
        "loss_error": errors.loss,
        "loss_allowed": errors.loss_allowed,
        "grad_error": errors.grad,
        "grad_allowed": errors.grad_allowed,
    }


def _slowest(timings: list[Timing]) -> list[list[list[float]]]:
    """Of each program, the seconds of its parts in each repetition, on the rank that took the longest for it."""
    of_ranks = _of_all([timing.parts for timing in timings])
    return [
        [
            [max(seconds) for seconds in zip(*of_part, strict=True)]
            for of_part in zip(*(parts[program] for parts in of_ranks), strict=True)
        ]
        for program in range(len(timings))
    ]


def run_rank(rank: int, job: dict[str, Any], meeting: str, queue: Any) -> None:
    """A rank's whole life."""
    torch.set_num_threads(1)
    cells = [ParallelCell(**fields) for fields in job["cells"]]
    ranks = cells[0].ranks
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=TIMEOUT)
    worker = Rank(job, ranks, queue)
    for cell in cells:
        worker.run(cell)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Reads a job from the standard input and runs it."""
    job = json.load(sys.stdin)
    stream = os.fdopen(os.dup(1), "w")
    # What the ranks or the profiler print is no result.
    os.dup2(2, 1)
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        given = (job, f"{folder}/meeting", queue)
        context = spawn(run_rank, given, job["cells"][0]["ranks"], join=False)
        ended = False
        while not ended:
            ended = context.join(timeout=0.1)
            while not queue.empty():
                stream.write(queue.get())
                stream.flush()


if __name__ == "__main__":
    main()
