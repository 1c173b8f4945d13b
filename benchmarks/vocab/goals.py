"""The goals that the package sets itself on a CPU, computed from a run's CSV.

python -m vocab.goals results/bench.csv
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.allocators import DEFAULT, WARM
from harness.goals import SMALL_SHARE, Verdict, verdicts_text
from harness.report import Row, read_csv
from vocab.plan import HEADLINES, OVERHEAD
from vocab.report import KEY

OURS = "fused-cpu"


def verdicts(rows: list[Row]) -> list[Verdict]:
    """The goals that these measurements decide; those of other machines or shapes are left out."""
    table = {tuple(row[name] for name in KEY): row for row in rows if row["status"] == "ok"}
    threads = sorted({row["threads"] for row in rows}, key=int)
    found: list[Verdict] = []
    for shape in HEADLINES:
        for count in threads:
            found += _speed(Cellular(table, shape, count, WARM))
    for count in threads:
        found += _weightings(Cellular(table, HEADLINES[0], count, WARM))
    for shape in HEADLINES:
        for count in threads:
            found += _default_allocator(Cellular(table, shape, count, DEFAULT))
    for shape in HEADLINES:
        found += _memory(Cellular(table, shape, threads[0] if threads else "1", WARM))
    for count in threads:
        found += _overhead(Cellular(table, OVERHEAD, count, WARM))
    return found


@dataclass(frozen=True)
class Cellular:
    """The measurements of one shape in one setting."""

    table: dict[tuple[str, ...], Row]
    shape: tuple[str, int, int]
    threads: str
    allocator: str

    def __str__(self) -> str:
        dtype, rows, vocab = self.shape
        return f"{dtype} {rows} x {vocab}, {self.threads} thread{'s' * (self.threads != '1')}, {self.allocator}"

    def number(self, contender: str, mode: str, column: str = "median_ms") -> float | None:
        """One number, or None where it was not measured."""
        dtype, rows, vocab = self.shape
        row = self.table.get((dtype, str(rows), str(vocab), self.threads, self.allocator, contender, mode))
        return float(row[column]) if row is not None and row[column] else None


def _speed(cell: Cellular) -> Iterator[Verdict]:
    dtype = cell.shape[0]
    ours, compiled = cell.number(OURS, "forward"), cell.number("torch.compile", "forward")
    if ours and compiled:
        yield Verdict("forward, share of torch.compile's time", str(cell), ours / compiled, 0.6)
    ours, compiled, eager = (cell.number(name, "both") for name in (OURS, "torch.compile", "eager"))
    if ours and compiled and eager:
        bound = 2.2 if dtype == "float32" else 2.5
        faster = min(compiled, eager) / ours
        yield Verdict("forward + backward, times faster than eager and torch.compile", str(cell), faster, bound, True)
    copies = cell.number(OURS, "grad_in_forward_inplace", "times_copy")
    if copies:
        bound = 1.6 if dtype == "float32" else 2.4 if cell.threads == "1" else 1.8
        yield Verdict("grad in forward in place, times a copy's time", str(cell), copies, bound)


def _weightings(cell: Cellular) -> Iterator[Verdict]:
    """Another weighting costs what MixCE costs, with statistics where it needs their sums."""
    for name, beside in (("power", OURS), ("entropy", f"{OURS}-stats")):
        for mode in ("forward", "both"):
            ours, mixce = cell.number(f"{OURS}-{name}", mode), cell.number(beside, mode)
            if ours and mixce:
                what = f"weighting {name}, {mode}, times the time of {beside}"
                yield Verdict(what, str(cell), ours / mixce, 1.03)


def _default_allocator(cell: Cellular) -> Iterator[Verdict]:
    ours, eager = cell.number(OURS, "inplace"), cell.number("eager", "both")
    if ours and eager:
        yield Verdict("forward + backward in place, times faster than eager", str(cell), eager / ours, 6.0, True)


def _memory(cell: Cellular) -> Iterator[Verdict]:
    bounds = {
        "forward": SMALL_SHARE,
        "both": 1 + SMALL_SHARE,
        "inplace": SMALL_SHARE,
        "grad_in_forward": 1 + SMALL_SHARE,
        "grad_in_forward_inplace": SMALL_SHARE,
    }
    for mode, bound in bounds.items():
        peak = cell.number(OURS, mode, "peak_over_logits")
        if peak is not None:
            dtype, rows, vocab = cell.shape
            yield Verdict(f"peak memory of {mode}, share of the logits", f"{dtype} {rows} x {vocab}", peak, bound)


def _overhead(cell: Cellular) -> Iterator[Verdict]:
    for mode in ("forward", "both"):
        ours, eager = cell.number(OURS, mode), cell.number("eager", mode)
        if ours and eager:
            yield Verdict(f"a small call's host time, {mode}, times eager's", str(cell), ours / eager, 1.0)


if __name__ == "__main__":
    print(verdicts_text(verdicts(read_csv(Path(sys.argv[1])))))
