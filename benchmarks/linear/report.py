"""From measurements with a linear head to tables: the CSV's columns, the table of a run, the summary in Markdown."""

from __future__ import annotations

from typing import Any

from harness.report import OUTCOME, Row, computed, groups, machine_line, megabytes, short, text_table, with_notes
from linear.plan import PEAKS

# What one measurement is of, then its results.
KEY = ("dtype", "rows", "hidden_size", "vocab", "threads", "allocator", "contender", "mode")
CELL = KEY[:6]
RESULTS = (
    *OUTCOME,
    "gflops",
    "times_matmuls",
    "page_faults",
    "peak_bytes",
    "loss_error",
    "loss_allowed",
    "grad_hidden_error",
    "grad_hidden_allowed",
    "grad_weight_error",
    "grad_weight_allowed",
)
# Of the terminal's table.
NUMBERS = ("median_ms", "q20_ms", "q80_ms", "gflops", "times_matmuls", "page_faults")
MODE_TITLES = {"forward": "forward", "both": "forward + backward"}


def without_wrong(peaks: list[dict[str, Any]], times: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The peaks of contenders whose results are right wherever they were checked in the same type."""
    wrong = {(one["dtype"], one["contender"]) for one in times if one["status"] != "ok"}
    return [one for one in peaks if (one["dtype"], one["contender"]) not in wrong]


def linear_table(rows: list[Row]) -> str:
    """All measurements for reading on a terminal, one block for each cell."""
    lines: list[str] = []
    for cell, members in groups(rows, CELL).items():
        body: list[tuple[str, ...]]
        if cell[5] == PEAKS:
            body = [("contender", "peak MB"), *((row["contender"], megabytes(row)) for row in members)]
        else:
            body = [("contender", "mode", "median ms", "20 %", "80 %", "GFLOP/s", "x matmuls", "faults")]
            body += [(row["contender"], row["mode"], *(short(row[name]) for name in NUMBERS)) for row in members]
        lines += ["", _cell_title(cell), text_table(body)]
        lines += [f"{row['contender']}, {row['mode']}: {row['status']}" for row in members if row["status"] != "ok"]
    return "\n".join([*lines, "", *(f"{name}: {computes}" for name, computes in computed(rows).items())])


def linear_summary(rows: list[Row], verdicts: str) -> str:
    """The run in Markdown: medians of each shape, contender and mode, peaks against the vocabulary, and the goals."""
    lines = [
        machine_line(rows[0]),
        "Median milliseconds with 20 % and 80 % quantiles, and times the bare matrix products of the same run.",
    ]
    timed = [row for row in rows if row["allocator"] != PEAKS]
    for cell, members in groups(timed, CELL).items():
        by_key = {(row["contender"], row["mode"]): row for row in members if row["status"] == "ok"}
        modes = [mode for mode in MODE_TITLES if any(key[1] == mode for key in by_key)]
        lines += ["", f"**{_cell_title(cell)}**", ""]
        lines.append(f"| | {' | '.join(f'{MODE_TITLES[mode]} | x matmuls' for mode in modes)} |")
        lines.append("|---|" + "---:|---:|" * len(modes))
        for name in dict.fromkeys(row["contender"] for row in members):
            cells = [text for mode in modes for text in _times(by_key.get((name, mode)))]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += _peak_tables(rows)
    return with_notes(lines, rows, CELL, _cell_title, verdicts)


def _times(row: Row | None) -> tuple[str, str]:
    if row is None:
        return "", ""
    quantiles = f"{short(row['q20_ms'])}-{short(row['q80_ms'])}"
    return f"{short(row['median_ms'])} ({quantiles})", f"{float(row['times_matmuls'] or 'nan'):.2f}"


def _peak_tables(rows: list[Row]) -> list[str]:
    """Peak memory: a table for each type, N and D, with a column for each vocabulary."""
    peaks = [row for row in rows if row["peak_bytes"]]
    lines: list[str] = []
    for (dtype, n, d, _), members in groups(peaks, ("dtype", "rows", "hidden_size", "threads")).items():
        vocabs = sorted({int(row["vocab"]) for row in members})
        lines += ["", f"**{dtype}, N = {n}, D = {d}: peak MB beyond inputs and gradients**, by vocabulary", ""]
        lines.append(f"| | {' | '.join(map(str, vocabs))} |")
        lines.append("|---|" + "---:|" * len(vocabs))
        for (name,), of_one in groups(members, ("contender",)).items():
            by_vocab = {int(row["vocab"]): megabytes(row) for row in of_one}
            lines.append(f"| {name} | {' | '.join(by_vocab.get(vocab, '') for vocab in vocabs)} |")
    return lines


def _cell_title(cell: tuple[str, ...]) -> str:
    dtype, rows, hidden_size, vocab, threads, allocator = cell
    regime = "peak memory" if allocator == PEAKS else f"allocator {allocator}"
    return f"{dtype} {rows} x {hidden_size} x {vocab}, {threads} thread{'s' * (threads != '1')}, {regime}"
