"""Tables in Markdown."""

from __future__ import annotations

NAMES = {"cuda": "CUDA", "triton": "Triton"}


def head(titles: list[str]) -> list[str]:
    """The titles, and the line of dashes below."""
    return [row(titles), "|---|" + "---:|" * (len(titles) - 1)]


def row(cells: list[str]) -> str:
    """A line of a table."""
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)
