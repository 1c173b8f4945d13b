"""The goals that the package sets itself for the loss with a linear head, computed from a run's CSV.

python -m linear.goals results/linear.csv
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from harness.goals import Verdict, verdicts_text
from harness.report import Row, groups, read_csv
from linear.contenders import EAGER, OURS, OURS_MATERIALISED
from linear.plan import GOAL_SHAPES
from linear.report import CELL

# MiB beyond inputs and gradients, whatever N and V are.
PEAK_BOUND = 64.0
# What the loss may cost beside its matrix products.
MATMULS_BOUND = 1.15
# What it may cost beside the same loss of logits that exist as a whole, and in bfloat16 beside the plain formula.
MATERIALISED_BOUND, HALF_BOUND = 1.15, 1.5

MEMORY = "peak beyond inputs and gradients, MiB"
PRODUCTS = "forward + backward, times the three bare matmuls"
MATERIALISED = "forward + backward, float32, times F.linear and the loss in place"
HALF = "forward + backward, bfloat16, times eager"
FASTER = "forward + backward, times faster than eager"
LOSS, HIDDEN, WEIGHT = (
    f"error of {what}, share of what is allowed" for what in ("the loss", "grad_hidden", "grad_weight")
)
GOALS = (MEMORY, PRODUCTS, MATERIALISED, HALF, FASTER, LOSS, HIDDEN, WEIGHT)


def linear_verdicts(rows: list[Row]) -> list[Verdict]:
    """The goals that these measurements decide: those of a CPU; its shapes alone for memory and the products."""
    found: list[Verdict] = []
    for cell, members in groups([row for row in rows if row["device"] in ("cpu", "")], CELL).items():
        dtype, n, d, v, threads, allocator = cell
        shape = (dtype, int(n), int(d), int(v))
        title = f"{dtype} {n} x {d} x {v}, {threads} thread{'s' * (threads != '1')}, {allocator}"
        whole = {row["contender"]: row for row in members if row["mode"] == "both"}
        found += _of_cell(title, whole, shape in GOAL_SHAPES)
    return sorted(found, key=lambda one: GOALS.index(one.goal))


def _of_cell(title: str, whole: dict[str, Row], of_goals: bool) -> Iterator[Verdict]:
    ours, eager = whole.get(OURS), whole.get(EAGER)
    if ours is None:
        return
    if ours["peak_bytes"] and of_goals:
        yield Verdict(MEMORY, title, float(ours["peak_bytes"]) / 2**20, PEAK_BOUND)
    if ours["times_matmuls"] and of_goals:
        yield Verdict(PRODUCTS, title, float(ours["times_matmuls"]), MATMULS_BOUND)
    dtype = ours["dtype"]
    for goal, of_type, other, bound in (
        (MATERIALISED, "float32", whole.get(OURS_MATERIALISED), MATERIALISED_BOUND),
        (HALF, "bfloat16", eager, HALF_BOUND),
    ):
        if dtype == of_type and ours["median_ms"] and other is not None and other["median_ms"]:
            yield Verdict(goal, title, float(ours["median_ms"]) / float(other["median_ms"]), bound)
    if ours["median_ms"] and eager is not None and eager["median_ms"]:
        yield Verdict(FASTER, title, float(eager["median_ms"]) / float(ours["median_ms"]), 1.0, at_least=True)
    # Also where these are why it was not timed.
    for goal, column in ((LOSS, "loss"), (HIDDEN, "grad_hidden"), (WEIGHT, "grad_weight")):
        if ours[f"{column}_error"]:
            yield Verdict(goal, title, float(ours[f"{column}_error"]) / float(ours[f"{column}_allowed"]), 1.0)


if __name__ == "__main__":
    print(verdicts_text(linear_verdicts(read_csv(Path(sys.argv[1])))))
