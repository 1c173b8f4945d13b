"""The hot loops in machine code, and the limits of chips that follow from them, as Markdown."""

from __future__ import annotations

from gpu_kernels.counts import BACKENDS, TARGET, VOCABULARIES, Count
from gpu_kernels.hot_loops import ALIGNED_OTHERWISE, HotLoop, triton_variant
from gpu_kernels.machine_code import KINDS
from gpu_kernels.markdown import NAMES, head, row
from gpu_kernels.model import (
    CHIPS,
    ISSUE_SLOTS,
    REACHABLE,
    SPECIAL_FUNCTIONS,
    Modelled,
    modelled,
    not_of_memory_alone,
    plain_limits,
)

HOT_LOOPS_TEXT = """\
What ptxas makes of the loops that go over a row's logits: SASS instructions of a thread for each logit. An iteration is
the usual one: of the ways through a loop the one that copies as many bytes to shared memory as it reads there, then
moves the most bytes of global memory, then is the shortest. Instructions whose predicate is false count, since they
take their turn to be issued. A row that Triton holds in registers is unrolled: "whole row" is all that a thread
executes, without the stores of single elements among its logits. special: special functions; fp32: additions and
products, and both at once; fp32x2: pairs of them; comparison: maxima and selections of float32; half: packed pairs of
16 bits; global and shared: accesses of memory. Options and other variants are in `hot_loops.csv`."""
MODEL_TEXT = """\
**A model from published figures, not a measurement.** Each limit alone gives a time for a logit, in picoseconds on the
whole chip; the model's time is the largest. Memory: unique bytes loaded and stored at {reachable:.0%} of the bandwidth.
The others are of the hot loops in the chip's own machine code: issue at {slots} warp instructions a clock and
multiprocessor, FP32 by the lanes of a multiprocessor, special functions at {special} a clock and multiprocessor. Left
out: latency, the start and the end of a launch and of a row, integer units, shared memory, the bandwidth of L2, and how
far the passes of a row overlap with other rows'. "SASS may take" is how many instructions a thread has for a logit
before issue takes as long as memory. The bytes of {target} stand for all chips, but for grad_in_forward on the A100:
without clusters it is launched otherwise, and was counted so."""
OPTIONS_MODEL_TEXT = """\
Options and types, each alone, for which memory is not the largest limit on every chip: the largest, and its time. Bytes
as counted on sm_90, with one read from memory. float64 is left out, since its units are no part of the model."""


def hot_loops_section(loops: list[HotLoop]) -> str:
    """Instructions for each logit by kind: plain kernels in bfloat16 and float32, for every architecture."""
    lines = [HOT_LOOPS_TEXT]
    for backend in BACKENDS:
        found = [loop for loop in loops if loop.backend == backend and _is_plain(loop)]
        if found:
            lines += ["", *head([NAMES[backend], "architecture", "logits", "instructions", *KINDS])]
        for loop in sorted(found, key=lambda one: (one.kernel, one.dtype, one.variant, one.part, int(one.target[3:]))):
            name = ", ".join(filter(None, (loop.kernel, loop.dtype, loop.variant, loop.part)))
            kinds = [f"{number / loop.logits:.2f}" if number else "" for number in loop.kinds.values()]
            lines.append(row([name, loop.target, str(loop.logits), f"{loop.per_logit:.2f}", *kinds]))
    return "\n".join(lines)


def _is_plain(loop: HotLoop) -> bool:
    steps = ("forward", "grad_in_forward")
    variants = ("", "gradient, held in shared memory", *(triton_variant("", VOCABULARIES[0], step) for step in steps))
    return loop.variant in variants and loop.part != ALIGNED_OTHERWISE and loop.dtype != "float16"


def model_section(counts: list[Count], loops: list[HotLoop]) -> str:
    """The chips' figures, and each step's limits on each."""
    text = MODEL_TEXT.format(reachable=REACHABLE, slots=ISSUE_SLOTS, special=SPECIAL_FUNCTIONS, target=TARGET)
    lines = [text, "", *head(["chip", "TB/s", "multiprocessors", "GHz", "FP32 lanes", "L2, MB"])]
    for chip in CHIPS:
        numbers = [f"{chip.bandwidth / 1e12:.2f}", str(chip.multiprocessors), f"{chip.clock / 1e9:.2f}"]
        lines.append(row([chip.name, *numbers, str(chip.fp32_lanes), f"{chip.l2_bytes / 1e6:.0f}"]))
    titles = ["chip", "V", "reads", "memory", "issue", "FP32", "special functions", "the largest"]
    for backend in BACKENDS:
        lines += ["", *head([NAMES[backend], *titles, "SASS may take", "SASS counted"])]
        lines += [row(_model_cells(one)) for one in modelled(counts, loops, backend)]
    lines += ["", OPTIONS_MODEL_TEXT, "", *head(["", *(chip.name for chip in CHIPS)])]
    for backend in BACKENDS:
        for count in not_of_memory_alone(counts, loops, backend):
            found = (plain_limits(chip, count, loops) for chip in CHIPS)
            name = f"{NAMES[backend]} {count.step}, {count.option or count.dtype}"
            lines.append(row([name, *(f"{one.largest}, {one.time:.3f}" for one in found)]))
    return "\n".join(lines)


def _model_cells(one: Modelled) -> list[str]:
    limits = one.limits
    times = [f"{time:.3f}" for time in (limits.memory, limits.issue, limits.fp32, limits.special)]
    counts = [f"{one.most_instructions:.1f}", f"{one.code.instructions:.1f}"]
    return [one.count.step, one.chip.name, str(one.count.vocab), one.reads, *times, limits.largest, *counts]
