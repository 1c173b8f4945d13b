"""From measurements of the loss over logits to tables: the CSV's columns, a run's table, the summary in Markdown."""

from __future__ import annotations

from typing import Any

import torch

from harness.report import ERRORS, OUTCOME, Row, computed, groups, machine_line, megabytes, short, with_notes
from vocab.contenders import COPY, READ

# What one measurement is of, then its results, then where and with what it was made.
KEY = ("dtype", "rows", "vocab", "threads", "allocator", "contender", "mode")
RESULTS = (
    *OUTCOME,
    "traffic_bytes",
    "gbps",
    "percent_of_copy",
    "percent_of_read",
    "times_copy",
    "page_faults",
    "peak_bytes",
    "peak_over_logits",
    *ERRORS,
)
MODE_TITLES = {
    "forward": "forward",
    "backward": "backward",
    "both": "forward + backward",
    "inplace": "in place",
    "grad_in_forward": "grad in forward",
    "grad_in_forward_inplace": "grad in forward, in place",
}


def with_peaks(times: list[dict[str, Any]], peaks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to each timed result the peak memory of its shape, threads, contender and mode; regimes share it."""
    by_key = {_peak_key(peak): peak["peak_bytes"] for peak in peaks}
    joined = []
    for result in times:
        peak = by_key.get(_peak_key(result)) if result["status"] == "ok" else None
        logits_bytes = result["rows"] * result["vocab"] * torch.finfo(getattr(torch, result["dtype"])).bits // 8
        ratio = None if peak is None else peak / logits_bytes
        joined.append({**result, "peak_bytes": peak, "peak_over_logits": ratio})
    return joined


def table(rows: list[Row]) -> str:
    """All measurements for reading on a terminal, one block for each cell."""
    lines = []
    for cell, members in groups(rows, KEY[:5]).items():
        lines += ["", _cell_title(cell)]
        columns: tuple[str, ...] = ("contender", "mode", "median ms", "20 %", "80 %", "GB/s")
        columns += ("% of copy", "% of read", "x copy", "peak MB", "faults")
        body: list[tuple[str, ...]] = [columns]
        for row in members:
            if row["status"] == "ok":
                numbers = [short(row[name]) for name in ("median_ms", "q20_ms", "q80_ms", "gbps")]
                numbers += [f"{float(row[name]):.0f}" for name in ("percent_of_copy", "percent_of_read")]
                numbers += [f"{float(row['times_copy']):.2f}", megabytes(row)]
                body.append((row["contender"], row["mode"], *numbers, f"{float(row['page_faults']):.0f}"))
            else:
                body.append((row["contender"], row["mode"], row["status"]))
        widths = [max(len(line[i]) for line in body if len(line) == len(columns)) for i in range(len(columns))]
        for line in body:
            cells = [
                text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=False))
            ]
            lines.append("  ".join(cells).rstrip() if len(line) == len(columns) else "  ".join((*cells[:2], line[2])))
    lines.append("")
    lines += [f"{name}: {computes}" for name, computes in computed(rows).items()]
    return "\n".join(lines)


def summary(rows: list[Row], verdicts: str) -> str:
    """The run in Markdown: medians in ms of each shape, contender and mode, and the goals."""
    lines = [
        machine_line(rows[0]),
        "Median milliseconds; peak memory of forward + backward, in place where a contender can, beyond the inputs.",
    ]
    for cell, members in groups(rows, KEY[:5]).items():
        timed = {(row["contender"], row["mode"]): row for row in members if row["status"] == "ok"}
        modes = [mode for mode in MODE_TITLES if any(key[1] == mode for key in timed)]
        names = list(dict.fromkeys(row["contender"] for row in members if row["mode"] not in (COPY, READ)))
        yardsticks = [row for row in members if row["mode"] in (COPY, READ)]
        whole = ", ".join(f"{row['mode']} {short(row['median_ms'])} ms" for row in yardsticks)
        lines += ["", f"**{_cell_title(cell)}** (of the logits: {whole})", ""]
        lines.append(f"| | {' | '.join(MODE_TITLES[mode] for mode in modes)} | peak MB |")
        lines.append("|---|" + "---:|" * (len(modes) + 1))
        for name in names:
            cells = [short(timed[name, mode]["median_ms"]) if (name, mode) in timed else "" for mode in modes]
            peaks = [megabytes(timed[name, mode]) for mode in ("both", "inplace") if (name, mode) in timed]
            lines.append(f"| {name} | {' | '.join(cells)} | {' / '.join(peak for peak in peaks if peak)} |")
    return with_notes(lines, rows, KEY[:5], _cell_title, verdicts)


def _cell_title(cell: tuple[str, ...]) -> str:
    dtype, rows, vocab, threads, allocator = cell
    return f"{dtype} {rows} x {vocab}, {threads} thread{'s' * (threads != '1')}, allocator {allocator}"


def _peak_key(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result[name] for name in ("dtype", "rows", "vocab", "threads", "contender", "mode"))
