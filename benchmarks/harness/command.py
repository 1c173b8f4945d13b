"""The command of a benchmark: the options that all have, and the steps from child processes to files."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.allocators import DEFAULT, WARM
from harness.contenders import refuse_unknown
from harness.goals import Verdict, verdicts_text
from harness.jobs import BENCHMARKS, Job, integers, run_all, words
from harness.report import Row, announce, machine, read_csv, write_csv

Results = list[dict[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark does in its own way.

    Attributes:
        name: of the CSV.
        summary_name: of the summary in Markdown.
        worker: the module that a child process runs.
        columns: of the CSV, besides those of the machine.
        ours: how the names of our own contenders begin.
        joined: from times and peaks to the lines of the CSV.
        verdicts: the goals that these lines decide.
        table: all lines, for a terminal.
        summary: the lines and the table of goals in Markdown.
        plot: draws the CSV, and returns the files; None where nothing is drawn.
    """

    name: str
    summary_name: str
    worker: str
    columns: Sequence[str]
    ours: str
    joined: Callable[[Results, Results], Results]
    verdicts: Callable[[list[Row]], list[Verdict]]
    table: Callable[[list[Row]], str]
    summary: Callable[[list[Row], str], str]
    plot: Callable[[Path], list[Path]] | None = None

    def run(
        self,
        args: argparse.Namespace,
        device: torch.device,
        able: Iterable[Any],
        left_out: Mapping[str, str],
        jobs: Callable[[argparse.Namespace], tuple[list[Job], list[Job]]],
    ) -> int:
        """Measures, writes and prints; 1 if a process ended early, or if our own contender was wrong or failed."""
        refuse_unknown(args.contenders, (one.name for one in able), left_out)
        args.out.mkdir(parents=True, exist_ok=True)
        measured = run_all(self.worker, *jobs(args))
        results = self.joined(measured.times, measured.peaks)
        if not results:
            raise SystemExit("expected at least one result, got none")

        path, summary = args.out / self.name, args.out / self.summary_name
        write_csv(path, results, machine(device), self.columns)
        rows = read_csv(path)
        goals = verdicts_text(self.verdicts(rows))
        summary.write_text(self.summary(rows, goals))
        announce(self.table(rows), rows, left_out, goals, [path, summary])
        if self.plot is not None:
            try:
                print(f"written: {', '.join(map(str, self.plot(path)))}")
            except ImportError as error:
                print(f"no plots: {error}")
        ours_right = all(row["status"] == "ok" for row in rows if row["contender"].startswith(self.ours))
        return 0 if measured.complete and ours_right else 1


def parser_of(description: str | None, package: str) -> argparse.ArgumentParser:
    """The options of every benchmark; `package` has the module of contenders that a file of others is to follow."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=integers, default=[], help="vocabulary sizes V, as 50257,128256")
    parser.add_argument("--contenders", type=words, default=[], help="names from the table; default: all that can run")
    parser.add_argument("--extra-contenders", type=Path, action="append", default=[], metavar="FILE",
                        help=f"a Python file that defines CONTENDERS, see {package}/contenders.py")  # fmt: skip
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument(
        "--out", type=Path, default=BENCHMARKS / "results", help="folder for the CSV, the summary and plots"
    )
    return parser


def add_device_options(parser: argparse.ArgumentParser, modes: Sequence[str], threads: str) -> None:
    """The options of a benchmark that runs on one device; `threads` is the default, for the reader."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--modes", type=words, default=list(modes), help=f"of {','.join(modes)}")
    parser.add_argument("--threads", type=integers, default=[], help=f"as 1,2; default: {threads}")
    parser.add_argument("--allocator", choices=("both", WARM, DEFAULT), default="both", help="of the CPU's memory")


def parsed(
    parser: argparse.ArgumentParser, given: list[str] | None, modes: Sequence[str] = (), min_rounds: int = 0
) -> argparse.Namespace:
    """The arguments; ends the program at a mode of another name, or where rounds are too few for quantiles."""
    chosen = parser.parse_args(given)
    unknown = [mode for mode in chosen.modes if mode not in modes] if modes else []
    if unknown:
        parser.error(f"expected --modes to be of {','.join(modes)}, got {unknown[0]}")
    if min_rounds and chosen.rounds < min_rounds:
        parser.error(f"expected at least {min_rounds} --rounds, got {chosen.rounds}")
    return chosen


def allocators_of(args: argparse.Namespace) -> list[str]:
    """The regimes to time in."""
    return [WARM, DEFAULT] if args.allocator == "both" else [args.allocator]


def request_of(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What every worker is told, and these arguments."""
    return {
        "contenders": args.contenders,
        "extra_files": [str(path.resolve()) for path in args.extra_contenders],
        **{name: getattr(args, name) for name in names},
    }
