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
from pathlib import Path
from typing import Any

import torch

from harness.jobs import Job, environment, integers, run_all, words
from harness.report import announce, machine, read_csv, write_csv
from parallel.contenders import OURS, parallel_contenders
from parallel.goals import parallel_goals_text
from parallel.plan import DTYPES, ParallelCell, parallel_cells
from parallel.report import KEY, RESULTS, joined, parallel_summary, parallel_table
from vocab.contenders import refuse_unknown
from vocab.plan import ALLOCATOR_ENVIRONMENT, PEAK_ENVIRONMENT, WARM

HERE = Path(__file__).resolve().parent
MIN_ROUNDS, ROUNDS = 5, 15


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=integers, default=[], help="tokens N, as 512,2048")
    parser.add_argument("--vocab", type=integers, default=[], help="V, as 50257,128256")
    parser.add_argument("--ranks", type=integers, default=[], help="as 2,4")
    parser.add_argument("--dtypes", type=words, default=[], help="of float32,bfloat16,float16,float64")
    parser.add_argument(
        "--contenders", type=words, default=[], help="names from the table, which has no commas in them"
    )
    parser.add_argument("--extra-contenders", type=Path, action="append", default=[], metavar="FILE",
                        help="a Python file that defines CONTENDERS, see parallel/contenders.py")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of all contenders, at least {MIN_ROUNDS}")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the CSV and the summary")
    chosen = parser.parse_args(given)
    if chosen.rounds < MIN_ROUNDS:
        parser.error(f"expected at least {MIN_ROUNDS} --rounds, got {chosen.rounds}")
    return chosen


def main() -> int:
    """Runs the benchmark; 1 if a process ended early, or if one of our own contenders was wrong or failed."""
    args = arguments()
    able = parallel_contenders(torch.bfloat16, args.extra_contenders)
    refuse_unknown(args.contenders, (one.name for one in able), {})
    args.out.mkdir(parents=True, exist_ok=True)

    measured = run_all("parallel.worker", *parallel_jobs(args))
    results = joined(measured.times, measured.peaks)
    if not results:
        raise SystemExit("expected at least one result, got none")

    path = args.out / "parallel.csv"
    write_csv(path, results, machine(torch.device("cpu")), (*KEY, *RESULTS))
    rows = read_csv(path)
    verdicts = parallel_goals_text(rows)
    (args.out / "parallel.md").write_text(parallel_summary(rows, verdicts))
    announce(parallel_table(rows), [], {}, verdicts, [path, args.out / "parallel.md"])
    ours_right = all(row["status"] == "ok" for row in rows if row["contender"].startswith(OURS))
    return 0 if measured.complete and ours_right else 1


def parallel_jobs(args: argparse.Namespace) -> tuple[list[Job], list[Job]]:
    """For each number of ranks, a child process that measures memory and one that times."""
    cells = parallel_cells(args.dtypes or list(DTYPES), args.rows, args.vocab, args.ranks)
    common = {
        "contenders": args.contenders,
        "extra_files": [str(path.resolve()) for path in args.extra_contenders],
        "rounds": args.rounds,
    }
    by_ranks: dict[int, list[ParallelCell]] = {}
    for cell in cells:
        by_ranks.setdefault(cell.ranks, []).append(cell)

    def job(allocator: dict[str, str], members: list[ParallelCell], peak: bool) -> Job:
        request: dict[str, Any] = {**common, "peak": peak, "cells": [vars(cell) for cell in members]}
        # The profiler would say of each recording that it starts and ends.
        quiet = {"OMP_WAIT_POLICY": "passive", "KINETO_LOG_LEVEL": "6"}
        return Job({**environment(allocator, 1), **quiet}, request)

    peak_jobs = [] if args.no_memory else [job(PEAK_ENVIRONMENT, of, True) for of in by_ranks.values()]
    return peak_jobs, [job(ALLOCATOR_ENVIRONMENT[WARM], of, False) for of in by_ranks.values()]


if __name__ == "__main__":
    sys.exit(main())
