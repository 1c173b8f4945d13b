"""Counts of the GPU kernels as a CSV, and the whole report as Markdown, with bars and registers."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import get_type_hints

from gpu_kernels.counts import (
    BACKENDS,
    BARS,
    DTYPES,
    FEW_ROWS,
    MAIN_STEPS,
    MULTIPROCESSORS,
    OPTIONS,
    ROWS,
    TARGET,
    VOCABULARIES,
    Count,
    bars_of,
    verdicts,
)
from gpu_kernels.hot_loops import HotLoop
from gpu_kernels.limits_tables import hot_loops_section, model_section
from gpu_kernels.markdown import NAMES, head, row
from gpu_kernels.model import CHIPS
from gpu_kernels.registers import ARCHITECTURES, REGISTERS, REGISTERS_GRANULARITY, Held, Registers

FIGURES = ("unique_loaded_bytes", "loaded_bytes", "stored_bytes", "vector_share", "special_functions", "instructions")
COUNT_COLUMNS = tuple(field.name for field in dataclasses.fields(Count))
WHAT_IT_IS = """\
The compiled PTX of the kernels was executed on a CPU, and counted. **No time was measured, and no GPU was there.** PTX
instructions are not the instructions of a GPU (SASS), of which the hot loops were read. Every figure is for each logit:
summed over all launches of a step and over their threads, divided by N * V. Unique bytes are those that a launch
touches, of the call's own tensors; CUDA's partials of rows that several blocks share are not among them. Exponentials
include reciprocals and logarithms: few, but for one reciprocal with each tanh of a softcap."""
REGISTERS_TEXT = """\
Registers of a thread and, after the slash, blocks that a multiprocessor holds by registers ({registers}, in units of
{unit} a warp), by threads, and by shared memory but for rows held there. Bytes in local memory, spills among them:
{spilled}."""
HELD_TEXT = """\
How CUDA holds a bfloat16 row between the passes of grad_in_forward, with N = 4096: blocks that share a row (a cluster),
bytes of it in the shared memory of each, and blocks that a multiprocessor holds by that memory."""


def write_csv(path: Path, counts: Iterable[Count], facts: dict[str, str]) -> None:
    """One line for each step of each case; `facts` stand on every line."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COUNT_COLUMNS, "vector_share", *facts], lineterminator="\n")
        writer.writeheader()
        for count in counts:
            row = dataclasses.asdict(count) | {"vector_share": count.vector_share}
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()} | facts)


def read_csv(path: Path) -> list[Count]:
    """The counts of such a file."""
    types = get_type_hints(Count)
    with path.open(newline="", encoding="utf-8") as file:
        return [Count(**{name: types[name](row[name]) for name in types}) for row in csv.DictReader(file)]


def write_registers_csv(path: Path, kernels: Iterable[Registers], facts: dict[str, str]) -> None:
    """One line for each kernel, type, variant and architecture."""
    with path.open("w", newline="") as file:
        columns = [field.name for field in dataclasses.fields(Registers)]
        writer = csv.DictWriter(file, [*columns, "blocks", *facts], lineterminator="\n")
        writer.writeheader()
        for kernel in kernels:
            writer.writerow(dataclasses.asdict(kernel) | {"blocks": kernel.blocks} | facts)


def markdown(
    counts: list[Count],
    kernels: list[Registers],
    loops: list[HotLoop],
    held: list[Held],
    facts: dict[str, str],
) -> str:
    """The whole report."""
    made_with = ", ".join(f"{name} {value}" for name, value in facts.items() if value)
    parts = [
        f"# What the compiled GPU kernels do\n\n{made_with}.\n\n{WHAT_IT_IS}",
        f"## Counts and bars\n\n{bars_table(counts)}",
        f"## Rows that are held with options, and rows that are few\n\n{other_bars_table(counts)}",
        f"## What else was counted\n\n{others_table(counts)}",
        f"## What an option adds\n\n{options_table(counts)}",
    ]
    if loops:
        parts.append(f"## Machine code of the hot loops\n\n{hot_loops_section(loops)}")
        parts.append(f"## Limits of chips\n\n{model_section(counts, loops)}")
    if kernels:
        parts.append(f"## Registers and occupancy\n\n{registers_section(kernels, held)}")
    return "\n\n".join(parts) + "\n"


def bars_table(counts: list[Count]) -> str:
    """Each figure with its bar, and whether it is met."""
    titles = [bar.title for bar in BARS["forward"]]
    lines = [f"{TARGET}, bfloat16, N = {ROWS}.", "", *head(["", "V", *titles])]
    held = [count for count in counts if bars_of(count) == BARS.get(count.step)]
    for step, bars in BARS.items():
        for backend in BACKENDS:
            bounds = [f"{'>=' if bar.at_least else '<='} {_bound(bar.bounds[backend], bar.at_least)}" for bar in bars]
            lines.append(row([f"**{step}, {NAMES[backend]}**", "", *bounds]))
            for count in held:
                if (count.step, count.backend) == (step, backend):
                    cells = [_verdict(getattr(count, bar.figure), bar.at_least, bar.met_by(count)) for bar in bars]
                    lines.append(row([count.kernels, str(count.vocab), *cells]))
    missed = sum(not bar.met_by(count) for count in held for bar in BARS[count.step])
    checked = sum(len(BARS[count.step]) for count in held)
    return "\n".join([*lines, "", f"{checked - missed} of {checked} bars met."])


def other_bars_table(counts: list[Count]) -> str:
    """The bars that some steps have, and others not: a line for each."""
    lines = [
        f"grad_in_forward with an option, whose rows Triton holds in registers, and {FEW_ROWS} rows on "
        f"{MULTIPROCESSORS} multiprocessors.",
        "",
        *head(["", "architecture", "N", "V", "figure", "bar", "counted"]),
    ]
    for count, bar, met in verdicts(counts):
        if bars_of(count) == BARS.get(count.step):
            continue
        name = ", ".join(filter(None, (count.step, count.option, NAMES[count.backend])))
        bound = f"{'>=' if bar.at_least else '<='} {bar.bounds[count.backend]:g}"
        value = getattr(count, bar.figure)
        counted = f"{value:.3f}" if isinstance(value, float) else str(value)
        verdict = f"{counted} {'met' if met else '**not met**'}"
        lines.append(row([name, count.target, str(count.rows), str(count.vocab), bar.title, bound, verdict]))
    return "\n".join(lines)


def others_table(counts: list[Count]) -> str:
    """What has no bar: the scaling of a gradient's rows, and grad_in_forward where there are no clusters."""
    lines = [
        "scale_rows is what follows a grad_in_forward in the backward, where the upstream gradient is not 1.",
        "",
        *head(["", "architecture", "N", "V", *FIGURE_TITLES]),
    ]
    for count in counts:
        if count.dtype == "bfloat16" and not count.option and (count.target != TARGET or count.step == "scale_rows"):
            name = f"{count.step}, {NAMES[count.backend]}"
            lines.append(row([name, count.target, str(count.rows), str(count.vocab), *_figures(count)]))
    return "\n".join(lines)


def options_table(counts: list[Count]) -> str:
    """Differences from the plain step in bfloat16, each option and type alone."""
    rows = VOCABULARIES[0]
    lines = [f"{TARGET}, N = {ROWS}, V = {rows}: differences from the same step without options in bfloat16."]
    for backend in BACKENDS:
        of = {
            (count.step, count.option, count.dtype): count
            for count in counts
            if (count.backend, count.target, count.vocab) == (backend, TARGET, rows)
        }
        for step in MAIN_STEPS:
            plain = of.get((step, "", "bfloat16"))
            if plain is None:
                continue
            lines += ["", *head([f"{step}, {NAMES[backend]}", *FIGURE_TITLES]), row(["", *_figures(plain)])]
            wanted = [(option, "bfloat16") for option in OPTIONS if option] + [("", dtype) for dtype in DTYPES]
            for option, dtype in wanted:
                if (step, option, dtype) in of:
                    lines.append(row([option or dtype, *_differences(of[step, option, dtype], plain)]))
    return "\n".join(lines)


def registers_section(kernels: list[Registers], held: list[Held]) -> str:
    """Registers and blocks by kernel and architecture, and the rows that CUDA holds."""
    spilled = [one for one in kernels if one.spilled_bytes]
    names = "; ".join(f"{one.spilled_bytes} in {NAMES[one.backend]} {_title(one)} on {one.target}" for one in spilled)
    lines = [
        REGISTERS_TEXT.format(registers=REGISTERS, unit=REGISTERS_GRANULARITY, spilled=names or "none, in no kernel"),
        "",
    ]
    lines += head(["", "threads", *ARCHITECTURES])
    table: dict[tuple[str, str, int], dict[str, Registers]] = {}
    for one in kernels:
        table.setdefault((one.backend, _title(one), one.threads), {})[one.target] = one
    for (backend, title, threads), by_target in table.items():
        found = (by_target.get(target) for target in ARCHITECTURES)
        cells = [f"{known.registers} / {known.blocks}" if known else "" for known in found]
        lines.append(row([f"{NAMES[backend]} {title}", str(threads), *cells]))
    if held:
        lines += ["", HELD_TEXT, "", *head(["architecture", "V", "blocks of a row", "bytes held", "blocks"])]
        for each in held:
            cells = [str(each.parts), str(each.held_bytes), str(each.blocks)]
            lines.append(row([each.target, str(each.vocab), *(cells if each.held_bytes else [cells[0], "none", ""])]))
        lines += _second_reads(kernels, held)
    return "\n".join(lines)


def _second_reads(kernels: list[Registers], held: list[Held]) -> list[str]:
    """How much of L2 the rows want that are read a second time."""
    found = []
    for each in held:
        chip = next((chip for chip in CHIPS if chip.target == each.target), None)
        blocks = [
            one.blocks
            for one in kernels
            if (one.backend, one.target, one.dtype, one.variant)
            == ("cuda", each.target, "bfloat16", "gradient, second read")
        ]
        if chip and blocks and not each.held_bytes:
            rows = chip.multiprocessors * blocks[0]
            text = (
                f"On the {chip.name} the {rows} rows of V = {each.vocab} under way at once are "
                f"{rows * each.vocab * 2 / 1e6:.0f} MB, L2 is {chip.l2_bytes / 1e6:.0f} MB: "
            )
            fits = rows * each.vocab * 2 <= chip.l2_bytes
            found += [
                "",
                text + ("there the second read finds them." if fits else "much of it is read from memory again."),
            ]
    return found


FIGURE_TITLES = [bar.title for bar in BARS["forward"]]


def _title(one: Registers) -> str:
    return ", ".join(filter(None, (one.kernel, one.dtype, one.variant)))


def _figures(count: Count) -> list[str]:
    return [_figure(getattr(count, name), name == "vector_share") for name in FIGURES]


def _differences(count: Count, plain: Count) -> list[str]:
    cells = []
    for name in FIGURES:
        difference = getattr(count, name) - getattr(plain, name)
        share = name == "vector_share"
        text = f"{100 * difference:+.1f} points" if share else f"{difference:+.2f}"
        cells.append("0" if abs(difference) < (5e-4 if share else 5e-3) else text)
    return cells


def _figure(value: float, share: bool) -> str:
    return f"{value:.1%}" if share else f"{value:.3f}"


def _bound(value: float, share: bool) -> str:
    return f"{value:.0%}" if share else f"{value:g}"


def _verdict(value: float, share: bool, met: bool) -> str:
    return f"{_figure(value, share)} {'met' if met else '**not met**'}"
