"""From measurements to files and tables: the machine's facts, the CSV, the table of a run, the summary in Markdown."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import mixce_kernels
from mixce_kernels.backends import cpu
from vocab.plan import ALLOCATOR_MEANING

Row = dict[str, str]

# What one measurement is of, then its results, then where and with what it was made.
KEY = ("dtype", "rows", "vocab", "threads", "allocator", "contender", "mode")
RESULTS = (
    "computes",
    "status",
    "repetitions",
    "median_ms",
    "q20_ms",
    "q80_ms",
    "traffic_bytes",
    "gbps",
    "percent_of_copy",
    "times_copy",
    "page_faults",
    "peak_bytes",
    "peak_over_logits",
    "loss_error",
    "loss_allowed",
    "grad_error",
    "grad_allowed",
)
MACHINE = ("device", "cpu", "cores", "isa", "python", "torch", "cuda", "triton", "mixce_kernels", "commit", "date")
MODE_TITLES = {
    "forward": "forward",
    "backward": "backward",
    "both": "forward + backward",
    "inplace": "in place",
    "grad_in_forward": "grad in forward",
    "grad_in_forward_inplace": "grad in forward, in place",
}


def machine(device: torch.device) -> dict[str, str]:
    """Where and with what a run is made."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "isa": cpu.isa() if cpu.unavailable(torch.empty(1, 1)) is None else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": (torch.version.cuda or torch.version.hip or "") if device.type == "cuda" else "",
        "triton": _version("triton"),
        "mixce_kernels": mixce_kernels.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
    }


def write_csv(
    path: Path, results: Iterable[dict[str, Any]], facts: dict[str, str], columns: Iterable[str] = (*KEY, *RESULTS)
) -> None:
    """Writes one line for each measurement; `facts` stand on every line."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *MACHINE], extrasaction="ignore")
        writer.writeheader()
        for result in results:
            writer.writerow({name: _cell_text(value) for name, value in {**result, **facts}.items()})


def read_csv(path: Path) -> list[Row]:
    """The lines of a CSV of `write_csv`."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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


def groups(rows: list[Row], names: tuple[str, ...]) -> dict[tuple[str, ...], list[Row]]:
    """The rows by the values of these columns, in the order in which they come."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def table(rows: list[Row]) -> str:
    """All measurements for reading on a terminal, one block for each cell."""
    lines = []
    for cell, members in groups(rows, KEY[:5]).items():
        lines += ["", _cell_title(cell)]
        columns = ("contender", "mode", "median ms", "20 %", "80 %", "GB/s", "% of copy", "x copy", "peak MB", "faults")
        body: list[tuple[str, ...]] = [columns]
        for row in members:
            if row["status"] == "ok":
                numbers = [short(row[name]) for name in ("median_ms", "q20_ms", "q80_ms", "gbps")]
                numbers += [f"{float(row['percent_of_copy']):.0f}", f"{float(row['times_copy']):.2f}", megabytes(row)]
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
        names = list(dict.fromkeys(row["contender"] for row in members if row["mode"] != "copy"))
        copy_ms = next((row["median_ms"] for row in members if row["mode"] == "copy"), "")
        lines += ["", f"**{_cell_title(cell)}** (copy of the logits: {short(copy_ms)} ms)", ""]
        lines.append(f"| | {' | '.join(MODE_TITLES[mode] for mode in modes)} | peak MB |")
        lines.append("|---|" + "---:|" * (len(modes) + 1))
        for name in names:
            cells = [short(timed[name, mode]["median_ms"]) if (name, mode) in timed else "" for mode in modes]
            peaks = [megabytes(timed[name, mode]) for mode in ("both", "inplace") if (name, mode) in timed]
            lines.append(f"| {name} | {' | '.join(cells)} | {' / '.join(peak for peak in peaks if peak)} |")
    lines += ["", *(f"- {name}: {computes}." for name, computes in computed(rows).items())]
    wrong = [row for row in rows if row["status"] != "ok"]
    lines += [
        f"- {row['contender']}, {row['mode']}, {_cell_title(tuple(row[k] for k in KEY[:5]))}: {row['status']}."
        for row in wrong
    ]
    return "\n".join([*lines, *(["", "```", verdicts, "```"] if verdicts else []), ""])


def machine_line(facts: Row) -> str:
    """Where, with what and when a run was made, for a reader."""
    versions = ", ".join(
        f"{name} {facts[name]}" for name in ("mixce_kernels", "torch", "cuda", "triton", "python") if facts[name]
    )
    commit = f", commit {facts['commit']}" if facts["commit"] else ""
    where = facts["cpu"] if facts["device"] == "cpu" else f"{facts['device']}, {facts['cpu']}"
    isa = f", {facts['isa']}" if facts["isa"] and facts["device"] == "cpu" else ""
    return f"{where}, {facts['cores']} cores{isa}; {versions}{commit}; {facts['date']}."


def announce(
    measured: str, rows: list[Row], left_out: Mapping[str, str], verdicts: str, written: Iterable[Path]
) -> None:
    """Prints a run for its reader: the table, what its regimes mean, who was left out and why, and the goals."""
    print(measured)
    print()
    for name in dict.fromkeys(row["allocator"] for row in rows):
        if name in ALLOCATOR_MEANING:
            print(f"allocator {name}: {ALLOCATOR_MEANING[name]}")
    for name, reason in left_out.items():
        print(f"not measured: {name}: {reason}")
    print(f"\n{verdicts}\n")
    print(f"written: {', '.join(map(str, written))}")


def text_table(body: list[tuple[str, ...]]) -> str:
    """Lines of equal columns, the first row their titles."""
    widths = [max(len(line[i]) for line in body) for i in range(len(body[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in body)


def computed(rows: list[Row]) -> dict[str, str]:
    """What each contender computes."""
    return {row["contender"]: row["computes"] for row in rows}


def _cell_title(cell: tuple[str, ...]) -> str:
    dtype, rows, vocab, threads, allocator = cell
    return f"{dtype} {rows} x {vocab}, {threads} thread{'s' * (threads != '1')}, allocator {allocator}"


def _peak_key(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result[name] for name in ("dtype", "rows", "vocab", "threads", "contender", "mode"))


def _cell_text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def short(number: str) -> str:
    """Three digits, without an exponent."""
    if not number:
        return ""
    value = float(number)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(row: Row) -> str:
    """A row's peak memory."""
    return f"{float(row['peak_bytes']) / 1e6:.1f}" if row["peak_bytes"] else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _commit() -> str:
    """The commit of the checkout, marked where files differ from it; nothing outside a checkout."""
    git: Callable[..., str] = lambda *arguments: subprocess.run(  # noqa: E731
        ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
