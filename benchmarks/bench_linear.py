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

import torch

from harness.allocators import PEAK_ENVIRONMENT
from harness.command import Benchmark, Results, add_device_options, allocators_of, parsed, parser_of, request_of
from harness.jobs import Job, integers, job_of, timing_jobs, words
from linear.contenders import LINEAR_MODES, OURS, linear_contenders
from linear.goals import linear_verdicts
from linear.plan import SWEEP_VOCABULARIES, linear_cells, linear_shapes, peak_cells
from linear.plot import linear_plot
from linear.report import KEY, RESULTS, linear_summary, linear_table, without_wrong

MIN_ROUNDS = 5


def joined(times: Results, peaks: Results) -> Results:
    """Times and peaks, a line for each."""
    return [*times, *without_wrong(peaks, times)]


LINEAR = Benchmark(
    name="linear.csv",
    summary_name="linear.md",
    worker="linear.worker",
    columns=(*KEY, *RESULTS),
    ours=OURS,
    joined=joined,
    verdicts=linear_verdicts,
    table=linear_table,
    summary=linear_summary,
    plot=linear_plot,
)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "linear")
    add_device_options(parser, LINEAR_MODES, "all cores")
    parser.add_argument("--quick", action="store_true", help="the goals' contenders, loss and gradients, no sweep")
    parser.add_argument("--full", action="store_true", help="more sizes and types, one thread, all of all contenders")
    parser.add_argument("--rows", type=integers, default=[], help="tokens N, as 1024,2048")
    parser.add_argument("--hidden-size", type=integers, default=[], help="D, as 768")
    parser.add_argument("--dtypes", type=words, default=[], help="of float32,bfloat16,float16,float64")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help=f"of all contenders, at least {MIN_ROUNDS}")
    parser.add_argument("--no-time", action="store_true", help="measure memory alone; nobody is checked")
    parser.add_argument("--memory-vocab", type=integers, default=list(SWEEP_VOCABULARIES),
                        help="vocabularies of the plot of peak memory; empty for none")  # fmt: skip
    chosen = parsed(parser, given, LINEAR_MODES, MIN_ROUNDS)
    if chosen.quick and chosen.full:
        parser.error("expected one of --quick and --full, got both")
    return chosen


def main() -> int:
    """Runs the benchmark."""
    args = arguments()
    device = torch.device(args.device)
    return LINEAR.run(args, device, *linear_contenders(device, args.extra_contenders), linear_jobs)


def linear_jobs(args: argparse.Namespace) -> tuple[list[Job], list[Job]]:
    """The child processes: one that measures memory, and one that times for each allocator and number of threads."""
    device = torch.device(args.device)
    all_threads = torch.get_num_threads()
    threads = args.threads or (sorted({1, all_threads}) if args.full else [all_threads])
    only = {"rows": args.rows, "hidden_size": args.hidden_size, "vocab": args.vocab}
    shapes = linear_shapes(device, args.full, only, args.dtypes)
    timed = linear_cells(device, shapes, threads, allocators_of(args), args.full)
    peaks = [] if args.no_memory else peak_cells(timed, [] if args.quick else args.memory_vocab, threads[-1])
    if args.quick:
        timed, peaks = ([replace(cell, all=False) for cell in cells] for cells in (timed, peaks))
    request = request_of(args, "device", "modes", "rounds")
    peak_jobs = [job_of(PEAK_ENVIRONMENT, peaks[0].threads, peaks, request, peak=True)] if peaks else []
    return peak_jobs, [] if args.no_time else timing_jobs(timed, request)


if __name__ == "__main__":
    sys.exit(main())
