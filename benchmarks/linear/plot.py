"""Plots of a run with a linear head, from its CSV alone.

    python -m linear.plot results/linear.csv

writes, next to the CSV, `linear_time.png` (the contenders' times over those of the bare matrix products, for each cell)
and, where three or more vocabularies were measured, `linear_memory.png` (peak memory against V).
"""

from __future__ import annotations

import sys
from pathlib import Path

from harness.plot import bars, machine_name, over_vocabularies, panels, save
from harness.report import Row, groups, read_csv
from linear.plan import PEAKS
from linear.report import CELL

# Contenders keep their colours in both plots; others take the rest.
COLOURS = {
    "three-matmuls": "#c8c8c8",
    "fused-linear": "#1f77b4",
    "fused-linear-tiles": "#2ca02c",
    "fused-materialised": "#17607d",
    "eager": "#7a7a7a",
    "torch.compile": "#d9a441",
    "F.linear_cross_entropy": "#c0563f",
    "cut-cross-entropy": "#7d4f9e",
    "cut-cross-entropy-compiled": "#b08cc9",
    "liger-kernel": "#8d6b3f",
}
OTHER = "#b5493f"


def linear_plot(path: Path) -> list[Path]:
    """Draws all plots of the CSV at `path`, and returns what was written."""
    rows = [row for row in read_csv(path) if row["status"] == "ok" and row["mode"] == "both"]
    written = [
        _times([row for row in rows if row["times_matmuls"]], path.with_name("linear_time.png")),
        _memory(
            [row for row in rows if row["peak_bytes"] and row["contender"] != "three-matmuls"],
            path.with_name("linear_memory.png"),
        ),
    ]
    return [one for one in written if one is not None]


def _times(rows: list[Row], path: Path) -> Path | None:
    """One panel for each cell: loss and gradients, in the time of the bare matrix products."""
    cells = groups([row for row in rows if row["allocator"] != PEAKS], CELL)
    if not cells:
        return None
    most = max(len(members) for members in cells.values())
    figure, axes = panels(len(cells), 2, 5.4, 0.9 + 0.3 * most)
    for axis, (cell, members) in zip(axes, cells.items(), strict=True):
        dtype, n, d, v, threads, allocator = cell
        plural = "s" * (threads != "1")
        names, values = [row["contender"] for row in members], [float(row["times_matmuls"]) for row in members]
        of_cell = f"{dtype} N {n}, D {d}, V {v}\n{threads} thread{plural}, allocator {allocator}"
        bars(axis, names, values, [COLOURS.get(name, OTHER) for name in names], of_cell)
    title = "Loss and gradients of hidden states and weight: time, in the three bare matrix products"
    figure.suptitle(f"{title} ({machine_name(rows[0])})", fontsize=9)
    return save(figure, path)


def _memory(rows: list[Row], path: Path) -> Path | None:
    """Peak memory beyond inputs and gradients over V: one panel for each type, N and D with three vocabularies."""
    shapes = {
        key: members
        for key, members in groups(rows, ("dtype", "rows", "hidden_size")).items()
        if len({row["vocab"] for row in members}) >= 3
    }
    if not shapes:
        return None
    figure, axes = panels(len(shapes), len(shapes), 5.4, 3.9)
    for axis, ((dtype, n, d), members) in zip(axes, shapes.items(), strict=True):
        vocabs = sorted({int(row["vocab"]) for row in members})
        for count, ((name,), points) in enumerate(groups(members, ("contender",)).items()):
            points = sorted(points, key=lambda row: int(row["vocab"]))
            # A peak of nothing is measured as some pages, or none: it has no place on a logarithmic axis.
            peaks = [max(float(row["peak_bytes"]) / 1e6, 0.1) for row in points]
            drawn = [int(row["vocab"]) for row in points]
            # Several hold exactly one copy of the logits: a line upon another is thinner, so that both are seen.
            width = max(4.0 - 0.7 * count, 1.0)
            axis.plot(
                drawn, peaks, linewidth=width, marker="o", markersize=3, label=name, color=COLOURS.get(name, OTHER)
            )
        axis.set_yscale("log")
        over_vocabularies(
            axis, vocabs, "peak MB beyond inputs and gradients", f"{dtype}, N {n}, D {d}, loss and gradients"
        )
    figure.suptitle(machine_name(rows[0]), fontsize=9)
    return save(figure, path)


if __name__ == "__main__":
    for picture in linear_plot(Path(sys.argv[1])):
        print(picture)
