"""What is counted of the GPU kernels: the cases, a step's counts for each logit, and the bars they are held to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

BACKENDS = ("cuda", "triton")
# scale_rows follows a grad_in_forward, and only where the upstream gradient is not 1.
STEPS = ("forward", "backward", "grad_in_forward", "scale_rows")
MAIN_STEPS = STEPS[:3]
# The bars are for this one; the other has no thread-block clusters.
TARGET, WITHOUT_CLUSTERS = "sm_90", "sm_80"
TARGETS = (WITHOUT_CLUSTERS, TARGET, "sm_100", "sm_120")
ROWS = 64
# Contiguous bfloat16 rows of the first start at every even address, those of the second at 16-byte boundaries.
VOCABULARIES = (50257, 128256)
# At least an A100's multiprocessors: of fewer rows, CUDA would split those that it cannot hold over two kernels.
ROWS_WITHOUT_CLUSTERS = 128
DTYPES = ("float32", "float16", "float64")
# Rows fewer than the multiprocessors of an H100, which both backends split.
FEW_ROWS, MULTIPROCESSORS = 8, 132
# Options with which Triton's registers hold a row for its gradient as without: on those with clusters, in fewer rows
# since their number changes nothing.
HELD_OPTIONS, HELD_TARGETS, HELD_ROWS = ("label_smoothing", "return_stats", "softcap"), (TARGET, "sm_100"), 16
# Options that Triton compiles kernels for, and the steps in which it does.
ENTROPY = "entropy"
CODE_OF_ITS_OWN = {
    "softcap": MAIN_STEPS,
    "label_smoothing": ("forward", "grad_in_forward"),
    "return_stats": ("forward", "grad_in_forward"),
    "gradient aligned otherwise": ("backward", "grad_in_forward"),
    ENTROPY: ("forward", "backward"),
}


class Option(NamedTuple):
    """One option of the loss, alone."""

    token_options: tuple[tuple[str, float], ...] = ()
    eta_tensor: bool = False
    stats: bool = False
    grad_offset: int = 0  # elements from a 16-byte boundary to the gradient
    entropy: bool = False  # with temperatures and a gradient of the entropies, as log-probabilities are asked for
    steps: tuple[str, ...] = MAIN_STEPS


OPTIONS = {
    "": Option(),
    "label_smoothing": Option((("label_smoothing", 0.1),)),
    "z_loss": Option((("z_loss", 1e-4),)),
    "softcap": Option((("softcap", 30.0),)),
    "logit_scale": Option((("logit_scale", 0.7),)),
    "return_stats": Option(stats=True),
    "eta tensor": Option(eta_tensor=True),
    "gradient aligned otherwise": Option(grad_offset=1),
    ENTROPY: Option(stats=True, entropy=True, steps=MAIN_STEPS[:2]),
}


@dataclass(frozen=True)
class Case:
    """One set of inputs for one backend on one architecture, and the steps that are taken on it."""

    backend: str
    target: str
    dtype: str = "bfloat16"
    rows: int = ROWS
    vocab: int = VOCABULARIES[0]
    option: str = ""
    steps: tuple[str, ...] = MAIN_STEPS
    # That Triton's launches are told of: 1 stands for fewer than there are rows. CUDA's know those of the architecture.
    multiprocessors: int = 1


@dataclass(frozen=True)
class Count:
    """A step's counts: summed over its launches, divided by its logits."""

    backend: str
    target: str
    dtype: str
    rows: int
    vocab: int
    option: str
    step: str
    kernels: str
    programs: int  # of the launch that has the most; blocks, to CUDA
    unique_loaded_bytes: float
    loaded_bytes: float
    unique_stored_bytes: float
    stored_bytes: float
    vector_bytes: float  # of those loaded and stored, in accesses of 16 bytes
    special_functions: float  # exponentials, and a few reciprocals and logarithms
    instructions: float
    warp_instructions: float  # of the busiest thread of each warp

    @property
    def vector_share(self) -> float:
        """The share of the bytes that move 16 at a time."""
        return self.vector_bytes / (self.loaded_bytes + self.stored_bytes)


def targets(backend: str) -> tuple[str, ...]:
    """The architectures that the backend's kernels are executed for."""
    return (TARGET, WITHOUT_CLUSTERS, *(HELD_TARGETS[1:] if backend == "triton" else ()))


def cases(backend: str, target: str) -> list[Case]:
    """What is executed and counted in one process."""
    if target == WITHOUT_CLUSTERS:
        steps = ("grad_in_forward",)
        return [Case(backend, target, rows=ROWS_WITHOUT_CLUSTERS, vocab=vocab, steps=steps) for vocab in VOCABULARIES]
    # Of the first vocabulary, those for TARGET are counted in every step.
    held = [
        Case(backend, target, rows=HELD_ROWS, vocab=vocab, option=option, steps=("grad_in_forward",))
        for vocab in (VOCABULARIES[1:] if target == TARGET else VOCABULARIES)
        for option in HELD_OPTIONS
        if backend == "triton"
    ]
    if target != TARGET:
        return held
    plain = [Case(backend, target, vocab=vocab, steps=STEPS) for vocab in VOCABULARIES]
    options = [Case(backend, target, option=name, steps=option.steps) for name, option in OPTIONS.items() if name]
    few = Case(backend, target, "bfloat16", FEW_ROWS, VOCABULARIES[1], "", ("forward",), MULTIPROCESSORS)
    return plain + options + [Case(backend, target, dtype=dtype) for dtype in DTYPES] + held + [few]


def compiled_cases(backend: str) -> list[Case]:
    """What is compiled for every architecture, for registers and machine code: few rows, since nothing runs."""
    found = []
    for target in TARGETS:
        found.append(Case(backend, target, rows=1, steps=STEPS))
        for option in ("", *HELD_OPTIONS):
            found.append(
                Case(backend, target, rows=1, vocab=VOCABULARIES[1], option=option, steps=("grad_in_forward",))
            )
            found.append(
                Case(backend, target, rows=1, option=option, steps=("forward",), multiprocessors=MULTIPROCESSORS)
            )
        for option, steps in CODE_OF_ITS_OWN.items():
            found.append(Case(backend, target, rows=1, option=option, steps=steps))
        found += [Case(backend, target, rows=1, dtype=dtype) for dtype in DTYPES]
        found += [
            Case(backend, target, dtype, rows=1, steps=("forward",), multiprocessors=MULTIPROCESSORS)
            for dtype in DTYPES
        ]
    return found


def count_of(case: Case, step: str, launches: list[tuple[str, int, dict[str, Any]]]) -> Count:
    """The counts of a step from the names, programs and counters of its launches."""
    logits = case.rows * case.vocab

    def each(name: str) -> float:
        return sum(counters[name] for _, _, counters in launches) / logits

    accesses = [counters[kind] for _, _, counters in launches for kind in ("global_loads", "global_stores")]
    return Count(
        backend=case.backend,
        target=case.target,
        dtype=case.dtype,
        rows=case.rows,
        vocab=case.vocab,
        option=case.option,
        step=step,
        kernels=kernel_names(name for name, _, _ in launches),
        programs=max(programs for _, programs, _ in launches),
        unique_loaded_bytes=each("unique_loaded_bytes"),
        loaded_bytes=each("global_loaded_bytes"),
        unique_stored_bytes=each("unique_stored_bytes"),
        stored_bytes=each("global_stored_bytes"),
        vector_bytes=16 * sum(number.get(16, 0) for number in accesses) / logits,
        special_functions=each("special_ops"),
        instructions=each("instructions"),
        warp_instructions=each("warp_instructions"),
    )


def kernel_names(names: Iterable[str]) -> str:
    """Launched kernels, in the order of their first launch."""
    found = Counter(kernel_name(name) for name in names)
    return " + ".join(name if times == 1 else f"{times} x {name}" for name, times in found.items())


def kernel_name(name: str) -> str:
    """A kernel's own name, from its mangled or its plain one."""
    match = re.search(r"[a-z][a-z_]*_kernel", name)
    return match[0] if match else name


@dataclass(frozen=True)
class Bar:
    """A bound of one figure, by backend."""

    title: str
    figure: str
    bounds: dict[str, float]
    at_least: bool = False

    def met_by(self, count: Count) -> bool:
        """Whether the count keeps to the bound."""
        measured: float = getattr(count, self.figure)
        bound = self.bounds[count.backend]
        return measured >= bound if self.at_least else measured <= bound


def _bars(
    stored: float,
    instructions: tuple[float, float],
    special: tuple[float, float],
    loaded: tuple[float, float] = (2.12, 2.12),
    vectors: tuple[float, float] = (0.98, 0.95),
) -> tuple[Bar, ...]:
    """A step's bars, of CUDA and of Triton where they differ."""

    def each(bounds: tuple[float, float]) -> dict[str, float]:
        return dict(zip(BACKENDS, bounds, strict=True))

    return (
        Bar("unique bytes loaded", "unique_loaded_bytes", each((2.01, 2.01))),
        Bar("bytes loaded", "loaded_bytes", each(loaded)),
        Bar("bytes stored", "stored_bytes", each((stored, stored))),
        Bar("in 16-byte accesses", "vector_share", each(vectors), at_least=True),
        Bar("exponentials", "special_functions", each(special)),
        Bar("PTX instructions", "instructions", each(instructions)),
    )


# A logit of two bytes is read once, and its gradient written once, in vectors of 16 bytes, with an exponential a pass.
# In Triton's cluster of 8 more threads load a row's few numbers, from a cache, and more of a row is its rest.
BARS = {
    "forward": _bars(0.01, (8, 11), (1.08, 1.08)),
    "backward": _bars(2.01, (8, 11), (1.02, 1.02)),
    "grad_in_forward": _bars(2.01, (16, 22), (2.1, 2.15), loaded=(2.12, 2.2), vectors=(0.98, 0.92)),
}

# The gradient of both results is a pass of the same kind, with a multiplication and an addition a logit more.
ENTROPY_BARS = {
    "forward": _bars(0.01, (14, 22), (1.08, 1.08)),
    "backward": _bars(2.01, (10, 13), (1.02, 1.02)),
}
# Of other steps, what they are for: a row that waits in registers is read once, and few rows keep a chip busy.
HELD_BARS = (Bar("bytes loaded", "loaded_bytes", dict.fromkeys(BACKENDS, 2.2)),)
# CUDA has at most a block for 16 KB of a row. Each thread of Triton's loads its row's target, from a cache.
FEW_ROWS_BARS = (
    Bar("programs", "programs", {"cuda": 120, "triton": 128}, at_least=True),
    Bar("unique bytes loaded", "unique_loaded_bytes", dict.fromkeys(BACKENDS, 2.01)),
    Bar("bytes loaded", "loaded_bytes", {"cuda": 2.12, "triton": 2.3}),
)


def bars_of(count: Count) -> tuple[Bar, ...]:
    """The bars that a count is held to; none for most."""
    if count.dtype != "bfloat16":
        return ()
    if count.option == ENTROPY:
        return ENTROPY_BARS[count.step] if count.target == TARGET else ()
    if count.option:
        held = count.option in HELD_OPTIONS and count.target in HELD_TARGETS and count.step == "grad_in_forward"
        return HELD_BARS if held else ()
    if count.target != TARGET:
        return ()
    if count.rows == FEW_ROWS:
        return FEW_ROWS_BARS
    return BARS.get(count.step, ()) if count.rows == ROWS else ()


def verdicts(counts: Iterable[Count]) -> list[tuple[Count, Bar, bool]]:
    """Each count with each of its bars, and whether it is met."""
    return [(count, bar, bar.met_by(count)) for count in counts for bar in bars_of(count)]
