"""Communication, speed and memory of the vocabulary-parallel loss, beside what one would use instead.

    python benchmarks/bench_parallel.py           2 and 4 ranks on this machine; some minutes
    python benchmarks/bench_parallel.py --help    fewer or other cells

Ranks are processes of this machine that meet by gloo, with one thread each. Every contender's loss and gradient are
first held to the float64 oracle at full size, in the columns of every rank; one that is off is named with its error,
and not timed. Then its collectives and their bytes are recorded, and all contenders of a cell take turns: each call
starts at a barrier, and a repetition's time is that of the slowest rank. Medians with 20 % and 80 % quantiles. Memory
is measured in processes of its own. Writes parallel.csv and parallel.md.
"""

from __future__ import annotations

import argparse
import sys

import torch

from harness.allocators import ALLOCATOR_ENVIRONMENT, PEAK_ENVIRONMENT, WARM
from harness.command import Benchmark, parsed, parser_of, request_of
from harness.jobs import Job, integers, job_of, words
from parallel.contenders import OURS, parallel_contenders
from parallel.goals import parallel_verdicts
from parallel.plan import DTYPES, ParallelCell, parallel_cells
from parallel.report import KEY, RESULTS, joined, parallel_summary, parallel_table

MIN_ROUNDS, ROUNDS = 5, 15
# The profiler would say of each recording that it starts and ends.
QUIET = {"OMP_WAIT_POLICY": "passive", "KINETO_LOG_LEVEL": "6"}

PARALLEL = Benchmark(
    name="parallel.csv",
    summary_name="parallel.md",
    worker="parallel.worker",
    columns=(*KEY, *RESULTS),
    ours=OURS,
    joined=joined,
    verdicts=parallel_verdicts,
    table=parallel_table,
    summary=parallel_summary,
)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "parallel")
    parser.add_argument("--rows", type=integers, default=[], help="tokens N, as 512,2048")
    parser.add_argument("--ranks", type=integers, default=[], help="as 2,4")
    parser.add_argument("--dtypes", type=words, default=[], help="of float32,bfloat16,float16,float64")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of all contenders, at least {MIN_ROUNDS}")
    return parsed(parser, given, min_rounds=MIN_ROUNDS)


def main() -> int:
    """Runs the benchmark."""
    args = arguments()
    able = parallel_contenders(torch.bfloat16, args.extra_contenders)
    return PARALLEL.run(args, torch.device("cpu"), able, {}, parallel_jobs)


def parallel_jobs(args: argparse.Namespace) -> tuple[list[Job], list[Job]]:
    """For each number of ranks, a child process that measures memory and one that times."""
    by_ranks: dict[int, list[ParallelCell]] = {}
    for cell in parallel_cells(args.dtypes or list(DTYPES), args.rows, args.vocab, args.ranks):
        by_ranks.setdefault(cell.ranks, []).append(cell)

    def jobs(allocator: dict[str, str], peak: bool) -> list[Job]:
        request = request_of(args, "rounds")
        return [job_of({**allocator, **QUIET}, 1, members, request, peak) for members in by_ranks.values()]

    return [] if args.no_memory else jobs(PEAK_ENVIRONMENT, True), jobs(ALLOCATOR_ENVIRONMENT[WARM], False)


if __name__ == "__main__":
    sys.exit(main())
