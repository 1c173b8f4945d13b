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
