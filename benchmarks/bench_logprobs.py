"""Speed, memory and errors of tokens' log-probabilities and entropies, beside what one would use instead.

    python benchmarks/bench_logprobs.py            in about a minute and a half on two cores
    python benchmarks/bench_logprobs.py --help     fewer or other cells

From logits, beside MixCE with its statistics, the plain formula, torch.compile and TRL; from hidden states, beside the
plain formula and TRL's chunks. Every contender's results and gradients are first held to float64; one that is off is
named with its error, and not timed. The rest is as in bench_vocab.py and bench_linear.py: contenders take turns, and
medians are reported with 20 % and 80 % quantiles, and peak memory beyond inputs and gradients. Logits in bfloat16 are
checked on a CPU, and not timed there unless --dtypes names them. Writes logprobs.csv and logprobs.md.
"""

from __future__ import annotations

import argparse
import sys

import torch

from harness.allocators import PEAK_ENVIRONMENT, WARM
from harness.command import Benchmark, add_device_options, allocators_of, parsed, parser_of, request_of
from harness.jobs import Job, job_of, timing_jobs, words
from logprobs.contenders import MODES, logprob_contenders
from logprobs.goals import logprob_verdicts
from logprobs.plan import DTYPES, LEVELS, LogprobCell, Sizes, logprob_cells
from logprobs.report import KEY, RESULTS, logprob_summary, logprob_table, with_peaks

MIN_ROUNDS = 5

LOGPROBS = Benchmark(
    name="logprobs.csv",
    summary_name="logprobs.md",
    worker="logprobs.worker",
    columns=(*KEY, *RESULTS),
    ours="fused-",
    joined=with_peaks,
    verdicts=logprob_verdicts,
    table=logprob_table,
    summary=logprob_summary,
)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "logprobs")
    add_device_options(parser, MODES, "one with logits, all cores with hidden states")
    parser.set_defaults(allocator=WARM)
    parser.add_argument("--levels", type=words, default=list(LEVELS), help=f"of {','.join(LEVELS)}")
    parser.add_argument("--rows", type=int, default=0, help="tokens N in every shape")
    parser.add_argument("--hidden-size", type=int, default=0, help="D")
    parser.add_argument("--dtypes", type=words, default=[], help=f"of {','.join(DTYPES)},float16")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of repetitions with logits")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help=f"of all contenders, at least {MIN_ROUNDS}")
    chosen = parsed(parser, given, MODES, MIN_ROUNDS)
    unknown = [level for level in chosen.levels if level not in LEVELS]
    if unknown:
        parser.error(f"expected --levels to be of {','.join(LEVELS)}, got {unknown[0]}")
    return chosen


def main() -> int:
    """Runs the benchmark."""
    args = arguments()
    device = torch.device(args.device)
    return LOGPROBS.run(args, device, *logprob_contenders(device, args.extra_contenders), logprob_jobs)


def logprob_jobs(args: argparse.Namespace) -> tuple[list[Job], list[Job]]:
    """The child processes: one for each number of threads that measures memory, and one that times and checks."""
    request = request_of(args, "device", "modes", "budget", "rounds")
    peak_cells: dict[int, list[LogprobCell]] = {}
    planned: list[LogprobCell] = []
    for vocab in args.vocab or [0]:
        sizes = Sizes(args.dtypes, args.rows, args.hidden_size, vocab)
        planned += logprob_cells(torch.device(args.device), args.levels, sizes, args.threads, allocators_of(args))
    for cell in planned:
        if cell.timed and not args.no_memory:
            peak_cells.setdefault(cell.threads, []).append(cell)
    peak_jobs = [job_of(PEAK_ENVIRONMENT, threads, cells, request, peak=True) for threads, cells in peak_cells.items()]
    return peak_jobs, timing_jobs(planned, request)


if __name__ == "__main__":
    sys.exit(main())
