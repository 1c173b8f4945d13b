"""Speed and memory of the MixCE loss over the vocabularies of real models, beside what one would use instead.

    python benchmarks/bench_vocab.py            under three minutes on two cores
    python benchmarks/bench_vocab.py --full     every vocabulary in both types
    python benchmarks/bench_vocab.py --help     fewer or other cells

Every contender's loss and gradient are first held to the float64 oracle; one that is off is named with its error, and
not timed. Then all contenders of a cell take turns, so that a drift of the machine meets all alike; medians with 20 %
and 80 % quantiles are reported, and speeds beside that of a copy of the logits in the same rounds (the byte model
stands in harness/measure.py). Each regime of the allocator, each number of threads and the measurement of memory has
a process of its own, and every line of the results names its regime. On a GPU, events are the clock, L2 is flushed
between calls, and peaks are those of the caching allocator. Writes bench.csv, summary.md and plots.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from harness.jobs import Job, environment, integers, run_all, words
from harness.report import announce, machine, read_csv, summary, table, with_peaks, write_csv
from vocab.contenders import MODES, contenders, refuse_unknown
from vocab.goals import goals_text
from vocab.plan import (
    ALLOCATOR_ENVIRONMENT,
    DEFAULT,
    DTYPES,
    OVERHEAD,
    PEAK_ENVIRONMENT,
    WARM,
    Cell,
    cells,
    shapes,
)

HERE = Path(__file__).resolve().parent


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all vocabularies in both types, both allocators for all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--vocab", type=integers, default=[], help="vocabulary sizes, as 50257,128256")
    parser.add_argument("--rows", type=int, default=0, help="tokens in every shape; default: what suits the device")
    parser.add_argument("--dtypes", type=words, default=[], help=f"of {','.join(DTYPES)},float16,float64")
    parser.add_argument("--modes", type=words, default=list(MODES), help=f"of {','.join(MODES)}")
    parser.add_argument("--threads", type=integers, default=[], help="as 1,2; default: one, and all cores")
    parser.add_argument("--contenders", type=words, default=[], help="names from the table; default: all that can run")
    parser.add_argument("--extra-contenders", type=Path, action="append", default=[], metavar="FILE",
                        help="a Python file that defines CONTENDERS, see vocab/contenders.py")  # fmt: skip
    parser.add_argument("--allocator", choices=("both", WARM, DEFAULT), default="both", help="of the CPU's memory")
    parser.add_argument(
        "--budget", type=float, default=3.0, help="seconds of repetitions for a cell, at least 7 rounds"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for bench.csv, summary.md and plots")
    chosen = parser.parse_args(given)
    unknown = [mode for mode in chosen.modes if mode not in MODES]
    if unknown:
        parser.error(f"expected --modes to be of {','.join(MODES)}, got {unknown[0]}")
    return chosen


def main() -> int:
    """Runs the benchmark; 1 if a process ended early, or if one of our own contenders was wrong or failed."""
    args = arguments()
    device = torch.device(args.device)
    able, left_out = contenders(device, args.extra_contenders)
    refuse_unknown(args.contenders, (one.name for one in able), left_out)
    threads = args.threads or sorted({1, torch.get_num_threads()})
    allocators = [WARM, DEFAULT] if args.allocator == "both" else [args.allocator]
    shape_list = shapes(device, args.full, args.vocab, args.dtypes, args.rows)
    planned = cells(device, shape_list, threads, allocators, args.full)
    args.out.mkdir(parents=True, exist_ok=True)

    measured = run_all("vocab.worker", *_jobs(args, planned))
    if not measured.times:
        raise SystemExit("expected at least one result, got none")

    path = args.out / "bench.csv"
    write_csv(path, with_peaks(measured.times, measured.peaks), machine(device))
    rows = read_csv(path)
    verdicts = goals_text(rows)
    (args.out / "summary.md").write_text(summary(rows, verdicts))
    announce(table(rows), rows, left_out, verdicts, [path, args.out / "summary.md"])
    try:
        from vocab.plot import plot

        print(f"written: {', '.join(map(str, plot(path)))}")
    except ImportError as error:
        print(f"no plots: {error}")
    ours_right = all(row["status"] == "ok" for row in rows if row["contender"].startswith("fused-"))
    return 0 if measured.complete and ours_right else 1


def _jobs(args: argparse.Namespace, planned: list[Cell]) -> tuple[list[Job], list[Job]]:
    """The child processes that measure memory, one for each number of threads, and time, also for each allocator."""
    common = {
        "device": args.device,
        "modes": args.modes,
        "contenders": args.contenders,
        "extra_files": [str(path.resolve()) for path in args.extra_contenders],
        "budget": args.budget,
    }
    peak_cells: dict[int, dict[tuple[str, int, int], dict[str, Any]]] = {}
    time_cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for cell in planned:
        time_cells.setdefault((cell.allocator, cell.threads), []).append(vars(cell))
        shape = (cell.dtype, cell.rows, cell.vocab)
        if shape != OVERHEAD and not args.no_memory:
            peak_cells.setdefault(cell.threads, {}).setdefault(shape, vars(cell))
    peak_jobs = [
        Job(environment(PEAK_ENVIRONMENT, threads), {**common, "cells": list(members.values()), "peak": True})
        for threads, members in peak_cells.items()
    ]
    time_jobs = [
        Job(environment(ALLOCATOR_ENVIRONMENT[allocator], threads), {**common, "cells": members, "peak": False})
        for (allocator, threads), members in time_cells.items()
    ]
    return peak_jobs, time_jobs


if __name__ == "__main__":
    sys.exit(main())
