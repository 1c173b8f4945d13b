"""From measurements of the vocabulary-parallel loss to tables: the CSV's columns, a run's table, the summary."""

from __future__ import annotations

from typing import Any

from harness.report import (
    ERRORS,
    OUTCOME,
    Row,
    computed,
    groups,
    machine_line,
    megabytes,
    short,
    text_table,
    with_notes,
)

# What one measurement is of, then its results.
KEY = ("dtype", "rows", "vocab", "ranks", "columns", "contender", "mode")
CELL = KEY[:5]
RESULTS = (
    *OUTCOME,
    "collectives",
    "sent_per_token",
    "wire_per_token",
    "peak_bytes",
    "peak_over_logits",
    *ERRORS,
)
MODES = ("forward", "backward", "both")
MODE_TITLES = {"forward": "forward, ms", "backward": "backward, ms", "both": "both, ms"}


def joined(times: list[dict[str, Any]], peaks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The timed results, each with the peak of its cell, contender and mode; without times, the peaks alone."""
    if not times:
        return peaks
    by_key = {tuple(one[name] for name in KEY): one for one in peaks if one["status"] == "ok"}
    found = []
    for one in times:
        peak = by_key.get(tuple(one[name] for name in KEY), {}) if one["status"] == "ok" else {}
        found.append({**one, **{name: peak.get(name) for name in ("peak_bytes", "peak_over_logits")}})
    return found


def parallel_table(rows: list[Row]) -> str:
    """All measurements for reading on a terminal, one block for each cell."""
    lines: list[str] = []
    columns = ("median_ms", "q20_ms", "q80_ms", "collectives", "sent_per_token", "wire_per_token")
    for cell, members in groups(rows, CELL).items():
        body: list[tuple[str, ...]] = [
            ("contender", "mode", "median ms", "20 %", "80 %", "collectives", "sent B/token", "wire B/token", "peak MB")
        ]
        body += [
            (row["contender"], row["mode"], *(short(row[name]) for name in columns), megabytes(row)) for row in members
        ]
        lines += ["", _title(cell), text_table(body)]
        lines += [f"{row['contender']}, {row['mode']}: {row['status']}" for row in members if row["status"] != "ok"]
    return "\n".join([*lines, "", *(f"{name}: {computes}" for name, computes in computed(rows).items())])


WHAT_IS_MEASURED = """\
Ranks are processes that meet by gloo over the loopback device of one machine, with one thread each: where there are
fewer cores than ranks, ranks share them, and what a rank waits for is a scheduler. Median milliseconds of the slowest
rank, with 20 % and 80 % quantiles. The allocator keeps freed memory, so that nobody pays for first touches.

Communication is of forward and backward together, for a token and rank. Sent: what the collectives take from the
rank's tensors, by the profiler. On the wire: what gloo's algorithms make of that, by the loopback device's counters,
headers of packets and acknowledgements included; other processes that use the device at the same time add to it, of
which the least of some calls is left. An all-gather's bytes on the wire grow with the ranks, an all-reduce's hardly do.
Peak: megabytes of the rank that takes most, beside its logits and their gradient, and as a share of the logits."""


def parallel_summary(rows: list[Row], verdicts: str) -> str:
    """The run in Markdown."""
    lines = [machine_line(rows[0]), "", WHAT_IS_MEASURED]
    for cell, members in groups(rows, CELL).items():
        by_key = {(row["contender"], row["mode"]): row for row in members if row["status"] == "ok"}
        lines += ["", f"**{_title(cell)}**", ""]
        titles = [*MODE_TITLES.values(), "collectives", "sent, bytes", "on the wire, bytes", "peak, MB (share)"]
        lines += [f"| | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
        for name in dict.fromkeys(row["contender"] for row in members):
            cells = [_time(by_key.get((name, mode))) for mode in MODES]
            lines.append(f"| {name} | {' | '.join([*cells, *_others(by_key.get((name, 'both')))])} |")
    return with_notes(lines, rows, CELL, _title, verdicts)


def _time(row: Row | None) -> str:
    if row is None or not row["median_ms"]:
        return ""
    return f"{short(row['median_ms'])} ({short(row['q20_ms'])}-{short(row['q80_ms'])})"


def _others(row: Row | None) -> list[str]:
    if row is None:
        return [""] * 4
    peak = f"{megabytes(row)} ({100 * float(row['peak_over_logits']):.1f} %)" if row["peak_bytes"] else ""
    return [row["collectives"], short(row["sent_per_token"]), short(row["wire_per_token"]), peak]


def _title(cell: tuple[str, ...]) -> str:
    dtype, rows, vocab, ranks, columns = cell
    return f"{dtype} {rows} x {vocab}, {ranks} ranks of {columns} columns"
