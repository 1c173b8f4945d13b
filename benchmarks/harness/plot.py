"""Figures, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.report import Row


def pyplot() -> Any:
    """matplotlib, for files."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> Path:
    """Writes the figure and closes it."""
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot().close(figure)
    return path


def machine_name(row: Row) -> str:
    """The device that the rows are of."""
    return row["cpu"] if row["device"] == "cpu" else row["device"]


def panels(count: int, most_across: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with this many panels, so many side by side, each of this size in inches."""
    across = min(count, most_across)
    down = -(-count // across)
    figure, axes = pyplot().subplots(down, across, figsize=(width * across, height * down), squeeze=False)
    for axis in axes.flat[count:]:
        axis.remove()
    drawn = list(axes.flat[:count])
    for axis in drawn:
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, drawn


def bars(axis: Any, names: list[str], values: list[float], colours: list[str], title: str) -> None:
    """One panel of bars, the first on top."""
    axis.bar_label(axis.barh(names, values, color=colours), fmt="%.2f", padding=2, fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_title(title, fontsize=8)


def over_vocabularies(axis: Any, vocabs: list[int], what: str, title: str) -> None:
    """Makes the horizontal axis one of vocabularies; `what` is drawn over them."""
    axis.set_xscale("log")
    axis.set_xticks(vocabs, [f"{v // 1000}k" if v >= 1000 else str(v) for v in vocabs], fontsize=7)
    axis.minorticks_off()
    axis.set_xlabel("vocabulary", fontsize=8)
    axis.set_ylabel(what, fontsize=8)
    axis.set_title(title, fontsize=8)
    axis.legend(fontsize=6)
