"""The goals that the package sets itself for the vocabulary-parallel loss, computed from a run's CSV.

python -m parallel.goals results/parallel.csv
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from harness.goals import SMALL_SHARE, Verdict, verdicts_text
from harness.report import Row, groups, read_csv
from parallel.contenders import LOSS_PARALLEL, OURS, OURS_CE, OURS_SMOOTHED, THREE_ALL_REDUCES
from parallel.plan import SHAPES
from parallel.report import CELL

SENT = "bytes a token and rank that the forward sends"
SENT_SMOOTHED = "the same with label smoothing"
COLLECTIVES = "collectives of a forward"
BACKWARD = "collectives of a backward"
MEMORY = "peak beside logits and gradient, share of the rank's logits"
FASTER = "cross-entropy, forward + backward, times faster than loss_parallel"
FASTER_THREE = "the same, than three all-reduces"
BACKWARD_FASTER = "the same, backward alone"
WIRE = "bytes of a forward on the wire, times those of three all-reduces"
LOSS, GRADIENT = "error of the loss, share of what is allowed", "error of the gradient, share of what is allowed"
GOALS = (
    SENT, SENT_SMOOTHED, COLLECTIVES, BACKWARD, WIRE, MEMORY, FASTER, FASTER_THREE, BACKWARD_FASTER, LOSS, GRADIENT
)  # fmt: skip
# The header takes 12 bytes a call, which a token's share of is what is left of these.
SENT_BOUND, SENT_SMOOTHED_BOUND = 16.0, 20.0


def parallel_verdicts(rows: list[Row]) -> list[Verdict]:
    """The goals that these measurements decide."""
    found: list[Verdict] = []
    for cell, members in groups(rows, CELL).items():
        dtype, n, vocab, ranks, _ = cell
        of_cell = {(row["contender"], row["mode"]): row for row in members}
        found += _of_cell(f"{dtype} {n} x {vocab}, {ranks} ranks", of_cell, (int(n), int(vocab)) in SHAPES)
    return sorted(found, key=lambda one: GOALS.index(one.goal))


def _of_cell(title: str, rows: dict[tuple[str, str], Row], of_goals: bool) -> Iterator[Verdict]:
    def number(contender: str, mode: str, column: str) -> float | None:
        row = rows.get((contender, mode))
        return float(row[column]) if row is not None and row[column] else None

    for goal, contender, mode, column, bound in (
        (SENT, OURS, "forward", "sent_per_token", SENT_BOUND),
        (SENT_SMOOTHED, OURS_SMOOTHED, "forward", "sent_per_token", SENT_SMOOTHED_BOUND),
        (COLLECTIVES, OURS, "forward", "collectives", 1.0),
        (BACKWARD, OURS, "backward", "collectives", 0.0),
        (MEMORY, OURS, "both", "peak_over_logits", SMALL_SHARE),
    ):
        measured = number(contender, mode, column)
        # Of few tokens or columns, a page is a share that says nothing.
        if measured is not None and (of_goals or goal != MEMORY):
            yield Verdict(goal, title, measured, bound)
    ours, theirs = (number(name, "forward", "wire_per_token") for name in (OURS, THREE_ALL_REDUCES))
    if ours and theirs:
        yield Verdict(WIRE, title, ours / theirs, 1.0)
    for goal, contender, mode in (
        (FASTER, LOSS_PARALLEL, "both"),
        (FASTER_THREE, THREE_ALL_REDUCES, "both"),
        (BACKWARD_FASTER, THREE_ALL_REDUCES, "backward"),
    ):
        ours, theirs = (number(name, mode, "median_ms") for name in (OURS_CE, contender))
        if ours and theirs:
            yield Verdict(goal, title, theirs / ours, 1.0, at_least=True)
    # Also where these are why it was not timed.
    for goal, column in ((LOSS, "loss"), (GRADIENT, "grad")):
        error, allowed = (number(OURS, "both", f"{column}_{what}") for what in ("error", "allowed"))
        if error is not None and allowed is not None:
            yield Verdict(goal, title, error / allowed, 1.0)


if __name__ == "__main__":
    print(verdicts_text(parallel_verdicts(read_csv(Path(sys.argv[1])))))
