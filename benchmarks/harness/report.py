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
from harness.allocators import ALLOCATOR_MEANING
from mixce_kernels.backends import cpu

Row = dict[str, str]

# What is said of each measurement, and of loss and gradient [N, V].
OUTCOME = ("computes", "status", "repetitions", "median_ms", "q20_ms", "q80_ms")
ERRORS = ("loss_error", "loss_allowed", "grad_error", "grad_allowed")
MACHINE = ("device", "cpu", "cores", "isa", "python", "torch", "cuda", "triton", "mixce_kernels", "commit", "date")


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


def write_csv(path: Path, results: Iterable[dict[str, Any]], facts: dict[str, str], columns: Iterable[str]) -> None:
    """Writes one line for each measurement; `facts` stand on every line."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *MACHINE], extrasaction="ignore")
        writer.writeheader()
        for result in results:
            writer.writerow({name: cell_text(value) for name, value in {**result, **facts}.items()})


def read_csv(path: Path) -> list[Row]:
    """The lines of a CSV of `write_csv`."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def groups(rows: list[Row], names: tuple[str, ...]) -> dict[tuple[str, ...], list[Row]]:
    """The rows by the values of these columns, in the order in which they come."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


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
    for name in dict.fromkeys(row.get("allocator") for row in rows):
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


def with_notes(
    lines: list[str], rows: list[Row], cell: tuple[str, ...], title: Callable[[tuple[str, ...]], str], verdicts: str
) -> str:
    """A summary in Markdown: its lines, what each contender computes, who failed and where, and the goals.

    `cell` names the columns of which `title` makes the title of a cell.
    """
    notes = ["", *(f"- {name}: {computes}." for name, computes in computed(rows).items())]
    notes += [
        f"- {row['contender']}, {row['mode']}, {title(tuple(row[name] for name in cell))}: {row['status']}."
        for row in rows
        if row["status"] != "ok"
    ]
    return "\n".join([*lines, *notes, *(["", "```", verdicts, "```"] if verdicts else []), ""])


def computed(rows: list[Row]) -> dict[str, str]:
    """What each contender computes."""
    return {row["contender"]: row["computes"] for row in rows}


def cell_text(value: Any) -> str:
    """A value as a CSV has it: numbers to 6 digits."""
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
