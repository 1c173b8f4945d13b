"""From measurements of log-probabilities to tables: the CSV's columns, a run's table, the summary in Markdown."""

from __future__ import annotations

from typing import Any

from harness.report import OUTCOME, Row, computed, groups, machine_line, megabytes, short, text_table, with_notes
from logprobs.contenders import MODE_TITLES
from logprobs.plan import HIDDEN, LOGITS

# What one measurement is of, then its results.
KEY = ("level", "dtype", "rows", "hidden_size", "vocab", "threads", "allocator", "contender", "mode")
CELL = KEY[:7]
ERROR_NAMES = ("logprobs", "entropy", "grad_logits", "grad_hidden", "grad_weight")
RESULTS = (
    *OUTCOME,
    "times_copy",
    "page_faults",
    "peak_bytes",
    *(f"{name}_{what}" for name in ERROR_NAMES for what in ("error", "allowed")),
)
ERROR_TITLES = ("log-probabilities", "entropies", "gradient of logits", "gradient of hidden", "gradient of weight")


def with_peaks(times: list[dict[str, Any]], peaks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to each timed result the peak memory of its shape, threads, contender and mode; regimes share it."""
    names = [name for name in KEY if name != "allocator"]
    by_key = {tuple(peak[name] for name in names): peak["peak_bytes"] for peak in peaks}
    return [
        {**one, "peak_bytes": by_key.get(tuple(one[name] for name in names)) if one["status"] == "ok" else None}
        for one in times
    ]


def logprob_table(rows: list[Row]) -> str:
    """All measurements for reading on a terminal, one block for each cell."""
    lines: list[str] = []
    titles = ("contender", "mode", "median ms", "20 %", "80 %", "x copy", "peak MB")
    for cell, members in groups(rows, CELL).items():
        names = _names_of(members)
        body: list[tuple[str, ...]] = [(*titles, *(f"{name} off by" for name in names))]
        for row in members:
            numbers = [short(row[name]) for name in ("median_ms", "q20_ms", "q80_ms", "times_copy")]
            body.append((row["contender"], row["mode"], *numbers, megabytes(row), *(_error(row, n) for n in names)))
        lines += ["", _cell_title(cell), text_table(body)]
        lines += [f"{row['contender']}, {row['mode']}: {row['status']}" for row in members if row["status"] != "ok"]
    return "\n".join([*lines, "", *(f"{name}: {computes}" for name, computes in computed(rows).items())])


def logprob_summary(rows: list[Row], verdicts: str) -> str:
    """The run in Markdown: medians, peaks and errors of each shape and contender, and the goals."""
    lines = [
        machine_line(rows[0]),
        "Median milliseconds; peak memory of forward + backward, in place where a contender can, beyond inputs and "
        "gradients; largest absolute errors against float64.",
    ]
    for cell, members in groups(rows, CELL).items():
        right = {(row["contender"], row["mode"]): row for row in members if row["status"] == "ok"}
        timed = {key: row for key, row in right.items() if row["median_ms"]}
        whole = [f"{name} {short(row['median_ms'])} ms" for (name, mode), row in timed.items() if name == mode]
        lines += ["", f"**{_cell_title(cell)}**" + (f" (of the logits: {', '.join(whole)})" if whole else "")]
        if timed:
            lines += ["", *_time_table(members, timed)]
        lines += ["", *_error_table(members, right)]
    return with_notes(lines, rows, CELL, _cell_title, verdicts)


def _time_table(members: list[Row], timed: dict[tuple[str, str], Row]) -> list[str]:
    """Medians and peaks."""
    modes = [mode for mode in MODE_TITLES if any(key[1] == mode for key in timed)]
    lines = [f"| | {' | '.join(MODE_TITLES[mode] for mode in modes)} | peak MB |", "|---|" + "---:|" * (len(modes) + 1)]
    for name in dict.fromkeys(row["contender"] for row in members if row["mode"] in MODE_TITLES):
        medians = [short(timed[name, mode]["median_ms"]) if (name, mode) in timed else "" for mode in modes]
        peaks = [megabytes(timed[name, mode]) for mode in ("both", "inplace") if (name, mode) in timed]
        lines.append(f"| {name} | {' | '.join(medians)} | {' / '.join(peak for peak in peaks if peak)} |")
    return lines


def _error_table(members: list[Row], right: dict[tuple[str, str], Row]) -> list[str]:
    """The errors of forward and backward through both results."""
    names = _names_of(members)
    titles = dict(zip(ERROR_NAMES, ERROR_TITLES, strict=True))
    lines = [f"| largest error of | {' | '.join(titles[name] for name in names)} |"]
    lines.append("|---|" + "---:|" * len(names))
    for (contender, mode), row in right.items():
        if mode == "both":
            lines.append(f"| {contender} | {' | '.join(_error(row, name) for name in names)} |")
    return lines


def _names_of(members: list[Row]) -> list[str]:
    """The results and gradients that a cell has errors of."""
    return [name for name in ERROR_NAMES if any(row[f"{name}_error"] for row in members)]


def _error(row: Row, name: str) -> str:
    error = row[f"{name}_error"]
    return f"{float(error):.1e}" if error else ""


def _cell_title(cell: tuple[str, ...]) -> str:
    level, dtype, rows, hidden_size, vocab, threads, allocator = cell
    shape = " x ".join(size for size in (rows, hidden_size, vocab) if size)
    given = {LOGITS: "logits", HIDDEN: "hidden states"}[level]
    return f"from {given}, {dtype} {shape}, {threads} thread{'s' * (threads != '1')}, allocator {allocator}"
