"""The goals that the package sets itself for log-probabilities on a CPU, computed from a run's CSV.

python -m logprobs.goals results/logprobs.csv
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from harness.allocators import WARM
from harness.goals import SMALL_SHARE, Verdict, verdicts_text
from harness.report import Row, groups, read_csv
from logprobs.plan import GOAL_SHAPE, LOGITS
from logprobs.report import CELL

OURS, MIXCE, EAGER = "fused-cpu", "fused-cpu-stats", "eager"
STATS_BOUND, EAGER_BOUND = 1.15, 4.0


def logprob_verdicts(rows: list[Row]) -> list[Verdict]:
    """The goals that these measurements decide; those of other machines or shapes are left out."""
    found: list[Verdict] = []
    for cell, members in groups([row for row in rows if row["status"] == "ok"], CELL).items():
        level, dtype, n, _, v, threads, allocator = cell
        if (level, dtype, int(n), int(v), allocator) == (LOGITS, *GOAL_SHAPE, WARM):
            title = f"{dtype} {n} x {v}, {threads} thread{'s' * (threads != '1')}"
            found += _of_cell(title, {(row["contender"], row["mode"]): row for row in members})
    return found


def _of_cell(title: str, rows: dict[tuple[str, str], Row]) -> Iterator[Verdict]:
    def number(contender: str, mode: str, column: str = "median_ms") -> float | None:
        text = rows[contender, mode][column] if (contender, mode) in rows else ""
        return float(text) if text else None

    ours, mixce = number(OURS, "forward"), number(MIXCE, "forward")
    if ours and mixce:
        yield Verdict("forward, times fused_mixce_loss(return_stats=True)", title, ours / mixce, STATS_BOUND)
    ours, eager = number(OURS, "both"), number(EAGER, "both")
    if ours and eager:
        yield Verdict("forward + backward, times faster than eager", title, eager / ours, EAGER_BOUND, True)
    _, n, v = GOAL_SHAPE
    for mode in ("forward", "both", "inplace"):
        peak = number(OURS, mode, "peak_bytes")
        if peak is not None:
            what = f"peak memory of {mode} beyond logits and gradient, share of the logits"
            yield Verdict(what, title, peak / (4 * n * v), SMALL_SHARE)


if __name__ == "__main__":
    print(verdicts_text(logprob_verdicts(read_csv(Path(sys.argv[1])))))
