"""Speed and memory of the MixCE loss over the vocabularies of real models, beside what one would use instead.

    python benchmarks/bench_vocab.py            under three minutes on two cores
    python benchmarks/bench_vocab.py --full     every vocabulary in both types
    python benchmarks/bench_vocab.py --help     fewer or other cells

Every contender's loss and gradient are first held to the float64 oracle; one that is off is named with its error, and
not timed. Then all contenders of a cell take turns, so that a drift of the machine meets all alike; medians with 20 %
and 80 % quantiles are reported, and speeds beside those of a copy and of a pure read of the logits in the same rounds
(vocab/programs.py has the model of bytes). Each regime of the allocator, each number of threads and the measurement of
memory has a process of its own, and every line of the results names its regime. On a GPU, events are the clock, L2 is
flushed between calls, and peaks are those of the caching allocator. Writes bench.csv, summary.md and plots.
"""

from __future__ import annotations

import argparse
import sys

import torch

from harness.allocators import PEAK_ENVIRONMENT
from harness.command import Benchmark, add_device_options, allocators_of, parsed, parser_of, request_of
from harness.jobs import Job, job_of, timing_jobs, words
from vocab.contenders import MODES, contenders
from vocab.goals import verdicts
from vocab.plan import DTYPES, OVERHEAD, Cell, cells, shapes
from vocab.plot import plot
from vocab.report import KEY, RESULTS, summary, table, with_peaks

VOCAB = Benchmark(
    name="bench.csv",
    summary_name="summary.md",
    worker="vocab.worker",
    columns=(*KEY, *RESULTS),
    ours="fused-",
    joined=with_peaks,
    verdicts=verdicts,
    table=table,
    summary=summary,
    plot=plot,
)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "vocab")
    add_device_options(parser, MODES, "one, and all cores")
    parser.add_argument("--full", action="store_true", help="all vocabularies in both types, both allocators for all")
    parser.add_argument("--rows", type=int, default=0, help="tokens in every shape; default: what suits the device")
    parser.add_argument("--dtypes", type=words, default=[], help=f"of {','.join(DTYPES)},float16,float64")
    parser.add_argument(
        "--budget", type=float, default=3.0, help="seconds of repetitions for a cell, at least 7 rounds"
    )
    return parsed(parser, given, MODES)


def main() -> int:
    """Runs the benchmark."""
    args = arguments()
    device = torch.device(args.device)
    return VOCAB.run(args, device, *contenders(device, args.extra_contenders), vocab_jobs)


def vocab_jobs(args: argparse.Namespace) -> tuple[list[Job], list[Job]]:
    """The child processes that measure memory, one for each number of threads, and time, also for each allocator."""
    device = torch.device(args.device)
    threads = args.threads or sorted({1, torch.get_num_threads()})
    table = shapes(device, args.full, args.vocab, args.dtypes, args.rows)
    return jobs_of(args, cells(device, table, threads, allocators_of(args), args.full))


def jobs_of(args: argparse.Namespace, planned: list[Cell]) -> tuple[list[Job], list[Job]]:
    """The child processes for these cells."""
    request = request_of(args, "device", "modes", "budget")
    peak_cells: dict[int, dict[tuple[str, int, int], Cell]] = {}
    for cell in planned:
        shape = (cell.dtype, cell.rows, cell.vocab)
        if shape != OVERHEAD and not args.no_memory:
            peak_cells.setdefault(cell.threads, {}).setdefault(shape, cell)
    peak_jobs = [
        job_of(PEAK_ENVIRONMENT, threads, members.values(), request, peak=True)
        for threads, members in peak_cells.items()
    ]
    return peak_jobs, timing_jobs(planned, request)


if __name__ == "__main__":
    sys.exit(main())
