"""A model, not a measurement: which limit of a chip the compiled kernels meet, from published figures of the chip.

Bytes are what was counted of the executed PTX; instructions are those of the hot loops, in the chip's machine code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gpu_kernels.counts import CODE_OF_ITS_OWN, ENTROPY, MAIN_STEPS, ROWS, TARGET, VOCABULARIES, WITHOUT_CLUSTERS, Count
from gpu_kernels.hot_loops import ALIGNED_OTHERWISE, GRADIENT, STATISTICS, WHOLE_ROW, HotLoop, triton_variant

# The share of a memory's published bandwidth that a kernel can hope for.
REACHABLE = 0.9
WARP_SIZE = 32
# A multiprocessor issues four warp instructions a clock, and has 16 special functions in one.
ISSUE_SLOTS, SPECIAL_FUNCTIONS = 4, 16


@dataclass(frozen=True)
class Chip:
    """Figures of NVIDIA's data sheets and architecture papers, at boost clock."""

    name: str
    target: str
    bandwidth: float  # bytes a second
    multiprocessors: int
    clock: float  # Hz
    l2_bytes: float
    fp32_lanes: int  # of a multiprocessor


CHIPS = (
    Chip("A100-SXM 80 GB", "sm_80", 2.04e12, 108, 1.41e9, 40e6, 64),
    Chip("H100-SXM", "sm_90", 3.35e12, 132, 1.83e9, 50e6, 128),
    Chip("B200", "sm_100", 8.00e12, 148, 1.85e9, 126e6, 128),
)


@dataclass(frozen=True)
class Code:
    """Instructions of a thread for each logit, and what they ask of two units."""

    instructions: float
    fp32: float  # additions, products, or both at once
    special: float


@dataclass(frozen=True)
class Limits:
    """Picoseconds that a logit takes on a whole chip, were there no other limit."""

    memory: float
    issue: float
    fp32: float
    special: float

    @property
    def largest(self) -> str:
        """The limit that the kernel meets first."""
        times = {"memory": self.memory, "issue": self.issue, "FP32": self.fp32, "special functions": self.special}
        return max(times, key=lambda name: times[name])

    @property
    def time(self) -> float:
        """That limit's."""
        return max(self.memory, self.issue, self.fp32, self.special)


def limits(chip: Chip, memory_bytes: float, code: Code) -> Limits:
    """The times of a logit that moves so many bytes, and takes this code."""
    clocks = chip.multiprocessors * chip.clock / 1e12  # all multiprocessors' in a picosecond
    return Limits(
        memory=1e12 * memory_bytes / (REACHABLE * chip.bandwidth),
        issue=code.instructions / WARP_SIZE / (ISSUE_SLOTS * clocks),
        fp32=code.fp32 / (chip.fp32_lanes * clocks),
        special=code.special / (SPECIAL_FUNCTIONS * clocks),
    )


def most_instructions(chip: Chip, memory_bytes: float) -> float:
    """Instructions of a thread for each logit that take as long to issue as its bytes take to move."""
    issued = ISSUE_SLOTS * chip.multiprocessors * chip.clock
    return WARP_SIZE * issued * memory_bytes / (REACHABLE * chip.bandwidth)


def code_of(count: Count, loops: Iterable[HotLoop], target: str) -> Code:
    """The hot loops of the kernels that a counted step launched, as they are for an architecture."""
    wanted = set(_hot_parts(count))
    found = [
        loop
        for loop in loops
        if (loop.backend, loop.target, loop.dtype) == (count.backend, target, count.dtype)
        and (loop.kernel, loop.variant, loop.part) in wanted
    ]
    assert found, f"no hot loop of {count} for {target}"
    return Code(
        instructions=sum(loop.per_logit for loop in found),
        # A pair takes two lanes.
        fp32=sum((loop.kinds["fp32"] + 2 * loop.kinds["fp32x2"]) / loop.logits for loop in found),
        special=sum(loop.kinds["special"] / loop.logits for loop in found),
    )


def _hot_parts(count: Count) -> list[tuple[str, str, str]]:
    """Kernels, their variants, and the parts of them that a step takes."""
    forward, backward = "forward_kernel", "logits_grad_kernel"
    in_forward = count.step == "grad_in_forward"
    if count.backend == "triton":
        option = count.option if count.step in CODE_OF_ITS_OWN.get(count.option, ()) else ""
        variant = triton_variant(option, count.vocab, count.step)
        if in_forward:
            return [(forward, variant, part) for part in (STATISTICS, GRADIENT, WHOLE_ROW)]
        return [(forward, variant, STATISTICS) if count.step == "forward" else (backward, variant, GRADIENT)]
    capped = "softcap" if count.option == "softcap" else ""
    words = "moments" if count.option in ("label_smoothing", "return_stats", ENTROPY) else capped
    gradient = ALIGNED_OTHERWISE if count.option == ALIGNED_OTHERWISE else GRADIENT
    if in_forward and backward not in count.kernels:
        held = "gradient, second read" if reads_twice(count) else "gradient, held in shared memory"
        variant = ", ".join(filter(None, (words, held)))
        return [(forward, variant, STATISTICS), (forward, variant, gradient)]
    parts = [(forward, words, STATISTICS), (backward, ENTROPY if count.option == ENTROPY else capped, gradient)]
    return parts if in_forward else parts[:1] if count.step == "forward" else parts[1:]


def reads_twice(count: Count) -> bool:
    """Whether a step reads the logits again, from L2 or from memory."""
    return count.loaded_bytes >= 1.5 * count.unique_loaded_bytes


@dataclass(frozen=True)
class Modelled:
    """A step on a chip. `reads` says how often the logits come from memory, which decides the bytes."""

    chip: Chip
    count: Count
    code: Code
    reads: str
    memory_bytes: float

    @property
    def limits(self) -> Limits:
        """Its times."""
        return limits(self.chip, self.memory_bytes, self.code)

    @property
    def most_instructions(self) -> float:
        """What it might take before the issue of instructions is its limit."""
        return most_instructions(self.chip, self.memory_bytes)


def modelled(counts: Iterable[Count], loops: list[HotLoop], backend: str) -> list[Modelled]:
    """Each step on each chip; grad_in_forward at both vocabularies, since it depends on what a chip can hold."""
    plain = {
        (count.target, count.step, count.vocab): count
        for count in counts
        if count.backend == backend and count.dtype == "bfloat16" and not count.option and count.rows >= ROWS
    }
    found = []
    for chip in CHIPS:
        for step in MAIN_STEPS:
            for vocab in VOCABULARIES if step == "grad_in_forward" else VOCABULARIES[:1]:
                alone = step == "grad_in_forward" and chip.target == WITHOUT_CLUSTERS
                count = plain.get((WITHOUT_CLUSTERS if alone else TARGET, step, vocab))
                if count is not None:
                    found += _reads(chip, count, code_of(count, loops, chip.target))
    return found


def plain_limits(chip: Chip, count: Count, loops: list[HotLoop]) -> Limits:
    """A step's limits where every logit comes from memory once."""
    memory_bytes = count.unique_loaded_bytes + count.unique_stored_bytes
    return limits(chip, memory_bytes, code_of(count, loops, chip.target))


def not_of_memory_alone(counts: Iterable[Count], loops: list[HotLoop], backend: str) -> list[Count]:
    """Steps with an option, or of another type, that meet another limit than memory's on some chip."""
    return [
        count
        for count in counts
        if (count.backend, count.target) == (backend, TARGET)
        and (count.option or count.dtype != "bfloat16")
        and count.dtype != "float64"
        and count.vocab == VOCABULARIES[0]
        and any(plain_limits(chip, count, loops).largest != "memory" for chip in CHIPS)
    ]


def _reads(chip: Chip, count: Count, code: Code) -> list[Modelled]:
    once = count.unique_loaded_bytes + count.unique_stored_bytes
    if not reads_twice(count):
        return [Modelled(chip, count, code, "one", once)]
    twice = count.loaded_bytes + count.unique_stored_bytes
    return [Modelled(chip, count, code, "two, one of them of L2", once), Modelled(chip, count, code, "two", twice)]
