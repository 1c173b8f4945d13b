"""Plots of a run, from its CSV alone.

    python -m vocab.plot results/bench.csv

writes, next to the CSV, `time.png` (the contenders' times over that of a copy of the logits; of the headline shapes
where these were measured, else of all), `memory.png` (peak memory, likewise) and, where three or more vocabularies were
measured, `vocabulary.png` (time per logit).
"""

from __future__ import annotations

import sys
from pathlib import Path

from harness.plot import bars, machine_name, over_vocabularies, panels, save
from harness.report import Row, groups, read_csv
from vocab.contenders import is_of_weightings
from vocab.plan import HEADLINES
from vocab.report import KEY, MODE_TITLES

# Contenders keep their colours in every plot; others take the rest.
COLOURS = {
    "eager": "#9a9a9a",
    "torch.compile": "#d9a441",
    "F.cross_entropy": "#c8c8c8",
    "liger": "#8d6bb0",
    "fused-cpu": "#1f77b4",
    "fused-triton": "#2ca02c",
    "fused-cuda": "#17607d",
}
OTHER = "#b5493f"
# The modes that do the same work: loss and gradient.
WHOLE = ("both", "inplace", "grad_in_forward", "grad_in_forward_inplace")
# Smaller shapes measure a call's own cost, and have no place beside bandwidths.
LEAST_LOGITS = 1_000_000


def plot(path: Path) -> list[Path]:
    """Draws all plots of the CSV at `path`, and returns what was written."""
    rows = [row for row in read_csv(path) if row["status"] == "ok" and not is_of_weightings(row["contender"])]
    large = [row for row in rows if int(row["rows"]) * int(row["vocab"]) >= LEAST_LOGITS] or rows
    chosen = [row for row in large if (row["dtype"], int(row["rows"]), int(row["vocab"])) in HEADLINES] or large
    written = [
        _bars(chosen, path.with_name("time.png"), "times_copy", "time, in copies of the logits"),
        _bars(chosen, path.with_name("memory.png"), "peak_over_logits", "peak memory beyond the inputs, in logits"),
        _by_vocabulary(large, path.with_name("vocabulary.png")),
    ]
    return [one for one in written if one is not None]


def _bars(rows: list[Row], path: Path, column: str, title: str) -> Path | None:
    """One panel for each cell: loss and gradient (every contender's modes)."""
    rows = [row for row in rows if row["mode"] in WHOLE and row[column]]
    if column == "peak_over_logits":
        # A peak is of a shape: the setting in which it was timed changes nothing that shows here.
        rows = list({tuple(row[k] for k in (*KEY[:3], *KEY[5:])): row for row in rows}.values())
        cells = groups(rows, KEY[:3])
    else:
        cells = groups(rows, KEY[:5])
    if not cells:
        return None
    most = max(len(members) for members in cells.values())
    figure, axes = panels(len(cells), 3, 4.6, 0.9 + 0.3 * most)
    for axis, (cell, members) in zip(axes, cells.items(), strict=True):
        names, values = [_bar_name(row) for row in members], [float(row[column]) for row in members]
        bars(axis, names, values, [_colour(row["contender"]) for row in members], _panel_title(cell))
    figure.suptitle(f"Loss and gradient: {title} ({machine_name(rows[0])})", fontsize=9)
    return save(figure, path)


def _by_vocabulary(rows: list[Row], path: Path) -> Path | None:
    """Nanoseconds per logit over V, one panel for each type, with the most threads and the first regime measured."""
    rows = [row for row in rows if row["mode"] in ("forward", "both", "grad_in_forward_inplace")]
    if len({row["vocab"] for row in rows}) < 3:
        return None
    threads = max((row["threads"] for row in rows), key=int)
    allocator = rows[0]["allocator"]
    rows = [row for row in rows if row["threads"] == threads and row["allocator"] == allocator]
    by_mode = groups(rows, ("dtype", "mode"))
    figure, axes = panels(len(by_mode), len({mode for _, mode in by_mode}), 3.9, 2.9)
    for axis, ((dtype, mode), members) in zip(axes, by_mode.items(), strict=True):
        for (name,), points in groups(members, ("contender",)).items():
            points = sorted(points, key=lambda row: int(row["vocab"]))
            vocabs = [int(row["vocab"]) for row in points]
            times = [1e6 * float(row["median_ms"]) / (int(row["rows"]) * int(row["vocab"])) for row in points]
            axis.plot(vocabs, times, marker="o", markersize=3, label=name, color=_colour(name))
        over_vocabularies(axis, vocabs, "ns per logit", f"{dtype}, {MODE_TITLES[mode]}")
        axis.set_ylim(bottom=0)
    plural = "s" * (threads != "1")
    figure.suptitle(f"{machine_name(rows[0])}, {threads} thread{plural}, allocator {allocator}", fontsize=9)
    return save(figure, path)


def _bar_name(row: Row) -> str:
    return row["contender"] if row["mode"] == "both" else f"{row['contender']}, {MODE_TITLES[row['mode']]}"


def _panel_title(cell: tuple[str, ...]) -> str:
    shape = f"{cell[0]} {cell[1]} x {cell[2]}"
    if len(cell) == 3:
        return shape
    return f"{shape}\n{cell[3]} thread{'s' * (cell[3] != '1')}, allocator {cell[4]}"


def _colour(name: str) -> str:
    return COLOURS.get(name, OTHER)


if __name__ == "__main__":
    for picture in plot(Path(sys.argv[1])):
        print(picture)
