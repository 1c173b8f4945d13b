"""A model, not a measurement: which limit of a chip the counted kernels meet, from published figures of the chip."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gpu_kernels.counts import MAIN_STEPS, ROWS, TARGET, VOCABULARIES, WITHOUT_CLUSTERS, Count

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


CHIPS = (
    Chip("A100-SXM 80 GB", "sm_80", 2.04e12, 108, 1.41e9, 40e6),
    Chip("H100-SXM", "sm_90", 3.35e12, 132, 1.83e9, 50e6),
    Chip("B200", "sm_100", 8.00e12, 148, 1.85e9, 126e6),
)


@dataclass(frozen=True)
class Limits:
    """Picoseconds that a logit takes on a whole chip, were there no other limit."""

    memory: float
    issue: float
    special: float

    @property
    def largest(self) -> str:
        """The limit that the kernel meets first."""
        times = {"memory": self.memory, "issue": self.issue, "special functions": self.special}
        return max(times, key=lambda name: times[name])

    @property
    def time(self) -> float:
        """That limit's."""
        return max(self.memory, self.issue, self.special)


def limits(chip: Chip, memory_bytes: float, warp_instructions: float, special_functions: float) -> Limits:
    """The times of a logit that moves so many bytes, and takes so many instructions and special functions."""
    clocks = chip.multiprocessors * chip.clock / 1e12  # all multiprocessors' in a picosecond
    return Limits(
        memory=1e12 * memory_bytes / (REACHABLE * chip.bandwidth),
        issue=warp_instructions / (ISSUE_SLOTS * clocks),
        special=special_functions / (SPECIAL_FUNCTIONS * clocks),
    )


def most_instructions(chip: Chip, memory_bytes: float) -> float:
    """Instructions of a thread for each logit that take as long to issue as its bytes take to move."""
    issued = ISSUE_SLOTS * chip.multiprocessors * chip.clock
    return WARP_SIZE * issued * memory_bytes / (REACHABLE * chip.bandwidth)


@dataclass(frozen=True)
class Modelled:
    """A step on a chip. `reads` says how often the logits come from memory, which decides the bytes."""

    chip: Chip
    count: Count
    reads: str
    memory_bytes: float

    @property
    def limits(self) -> Limits:
        """Its times."""
        return limits(self.chip, self.memory_bytes, self.count.warp_instructions, self.count.special_functions)

    @property
    def most_instructions(self) -> float:
        """What it might take before the issue of instructions is its limit."""
        return most_instructions(self.chip, self.memory_bytes)


def modelled(counts: Iterable[Count], backend: str) -> list[Modelled]:
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
                    found += _reads(chip, count)
    return found


def plain_limits(chip: Chip, count: Count) -> Limits:
    """A step's limits where every logit comes from memory once."""
    memory_bytes = count.unique_loaded_bytes + count.unique_stored_bytes
    return limits(chip, memory_bytes, count.warp_instructions, count.special_functions)


def not_of_memory_alone(counts: Iterable[Count], backend: str) -> list[Count]:
    """Steps with an option, or of another type, that meet another limit than memory's on some chip."""
    return [
        count
        for count in counts
        if (count.backend, count.target) == (backend, TARGET)
        and (count.option or count.dtype != "bfloat16")
        and count.dtype != "float64"
        and any(plain_limits(chip, count).largest != "memory" for chip in CHIPS)
    ]


def _reads(chip: Chip, count: Count) -> list[Modelled]:
    once = count.unique_loaded_bytes + count.unique_stored_bytes
    if count.loaded_bytes < 1.5 * count.unique_loaded_bytes:
        return [Modelled(chip, count, "one", once)]
    twice = count.loaded_bytes + count.unique_stored_bytes
    return [Modelled(chip, count, "two, one of them of L2", once), Modelled(chip, count, "two", twice)]
