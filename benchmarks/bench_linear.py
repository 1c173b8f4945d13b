"""Speed and memory of the MixCE loss with its linear head, beside what one would use instead.

    python benchmarks/bench_linear.py            at the sizes of the goals; some ten minutes on two idle cores
    python benchmarks/bench_linear.py --quick    what the goals need, and no more: half of that
    python benchmarks/bench_linear.py --full     other sizes, bfloat16, one thread
    python benchmarks/bench_linear.py --help     fewer or other cells

Every contender's loss and gradients are first held to the float64 oracle at full size; one that is off is named with
its error, and not timed. Then all contenders of a cell take turns, beside the yardstick: the three matrix products that
the loss cannot do without, in the same chunks and by the same routines. Medians with 20 % and 80 % quantiles are
reported, and peak memory beyond inputs and gradients. Each regime of the allocator, each number of threads and the
measurement of memory has a process of its own. On a GPU, events are the clock, L2 is flushed between calls, and peaks
are those of the caching allocator. Writes linear.csv, linear.md and plots.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from harness.jobs import Job, environment, integers, run_all, words
from harness.report import announce, machine, read_csv, write_csv
from linear.contenders import LINEAR_MODES, OURS, linear_contenders
from linear.goals import linear_goals_text
from linear.plan import SWEEP_VOCABULARIES, LinearCell, linear_cells, linear_shapes, peak_cells
from linear.report import KEY, RESULTS, linear_summary, linear_table, without_wrong
from vocab.contenders import refuse_unknown
from vocab.plan import ALLOCATOR_ENVIRONMENT, DEFAULT, PEAK_ENVIRONMENT, WARM

HERE = Path(__file__).resolve().parent
MIN_ROUNDS = 5


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the goals' contenders, loss and gradients, no sweep")
    parser.add_argument("--full", action="store_true", help="more sizes and types, one thread, all of all contenders")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rows", type=integers, default=[], help="tokens N, as 1024,2048")
    parser.add_argument("--hidden-size", type=integers, default=[], help="D, as 768")
    parser.add_argument("--vocab", type=integers, default=[], help="V, as 50257,128256")
    parser.add_argument("--dtypes", type=words, default=[], help="of float32,bfloat16,float16,float64")
    parser.add_argument("--modes", type=words, default=list(LINEAR_MODES), help=f"of {','.join(LINEAR_MODES)}")
    parser.add_argument("--threads", type=integers, default=[], help="as 1,2; default: all cores")
    parser.add_argument("--contenders", type=words, default=[], help="names from the table; default: all that can run")
    parser.add_argument("--extra-contenders", type=Path, action="append", default=[], metavar="FILE",
                        help="a Python file that defines CONTENDERS, see linear/contenders.py")  # fmt: skip
    parser.add_argument("--allocator", choices=("both", WARM, DEFAULT), default="both", help="of the CPU's memory")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help=f"of all contenders, at least {MIN_ROUNDS}")
    parser.add_argument("--no-time", action="store_true", help="measure memory alone; nobody is checked")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--memory-vocab", type=integers, default=list(SWEEP_VOCABULARIES),
                        help="vocabularies of the plot of peak memory; empty for none")  # fmt: skip
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the CSV, the summary and plots")
    chosen = parser.parse_args(given)
    unknown = [mode for mode in chosen.modes if mode not in LINEAR_MODES]
    if unknown:
        parser.error(f"expected --modes to be of {','.join(LINEAR_MODES)}, got {unknown[0]}")
    if chosen.quick and chosen.full:
        parser.error("expected one of --quick and --full, got both")
    if chosen.rounds < MIN_ROUNDS:
        parser.error(f"expected at least {MIN_ROUNDS} --rounds, got {chosen.rounds}")
    return chosen


def main() -> int:
    """Runs the benchmark; 1 if a process ended early, or if one of our own contenders was wrong or failed."""
    args = arguments()
    device = torch.device(args.device)
    able, left_out = linear_contenders(device, args.extra_contenders)
    refuse_unknown(args.contenders, (one.name for one in able), left_out)
    args.out.mkdir(parents=True, exist_ok=True)

    measured = run_all("linear.worker", *linear_jobs(args))
    results = [*measured.times, *without_wrong(measured.peaks, measured.times)]
    if not results:
        raise SystemExit("expected at least one result, got none")

    path = args.out / "linear.csv"
    write_csv(path, results, machine(device), (*KEY, *RESULTS))
    rows = read_csv(path)
    verdicts = linear_goals_text(rows)
    (args.out / "linear.md").write_text(linear_summary(rows, verdicts))
    announce(linear_table(rows), rows, left_out, verdicts, [path, args.out / "linear.md"])
    try:
        from linear.plot import linear_plot

        print(f"written: {', '.join(map(str, linear_plot(path)))}")
    except ImportError as error:
        print(f"no plots: {error}")
    ours_right = all(row["status"] == "ok" for row in rows if row["contender"].startswith(OURS))
    return 0 if measured.complete and ours_right else 1


def linear_jobs(args: argparse.Namespace) -> tuple[list[Job], list[Job]]:
    """The child processes: one that measures memory, and one that times for each allocator and number of threads."""
    device = torch.device(args.device)
    all_threads = torch.get_num_threads()
    threads = args.threads or (sorted({1, all_threads}) if args.full else [all_threads])
    only = {"rows": args.rows, "hidden_size": args.hidden_size, "vocab": args.vocab}
    shapes = linear_shapes(device, args.full, only, args.dtypes)
    allocators = [WARM, DEFAULT] if args.allocator == "both" else [args.allocator]
    timed = linear_cells(device, shapes, threads, allocators, args.full)
    peaks = [] if args.no_memory else peak_cells(timed, [] if args.quick else args.memory_vocab, threads[-1])
    if args.quick:
        timed, peaks = ([replace(cell, all=False) for cell in cells] for cells in (timed, peaks))
    common = {
        "device": args.device,
        "modes": args.modes,
        "contenders": args.contenders,
        "extra_files": [str(path.resolve()) for path in args.extra_contenders],
        "rounds": args.rounds,
    }
    settings: dict[tuple[str, int], list[LinearCell]] = {}
    for cell in timed:
        settings.setdefault((cell.allocator, cell.threads), []).append(cell)
    peak_jobs = [_job(PEAK_ENVIRONMENT, peaks, {**common, "peak": True})] if peaks else []
    time_jobs = [
        _job(ALLOCATOR_ENVIRONMENT[allocator], members, {**common, "peak": False})
        for (allocator, _), members in settings.items()
    ]
    return peak_jobs, [] if args.no_time else time_jobs


def _job(allocator: dict[str, str], cells: list[LinearCell], common: dict[str, Any]) -> Job:
    return Job(environment(allocator, cells[0].threads), {**common, "cells": [vars(cell) for cell in cells]})


if __name__ == "__main__":
    sys.exit(main())
