"""The loops of the compiled kernels that go over a row's logits, and their instructions in machine code."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpu_kernels.counts import kernel_name
from gpu_kernels.machine_code import KINDS, ControlFlow, Execution, Function, functions
from gpu_kernels.registers import dtype_and_variant

# Parts of a row's work. A row that waits in registers is unrolled: it has no loop, but a way from the kernel's begin to
# its end, which is all of the work of a thread. With options it is no longer: a loop for each pass rotates it.
STATISTICS, GRADIENT, ALIGNED_OTHERWISE, WHOLE_ROW = (
    "statistics",
    "gradient",
    "gradient aligned otherwise",
    "whole row",
)
# float64 is left out: its exponentials are no special functions.
ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
KERNELS = ("forward_kernel", "partial_stats_kernel", "logits_grad_kernel")
# Instructions for a logit that a loop may have more than are on record.
MAY_GROW = 0.05
KEY = ("backend", "target", "kernel", "dtype", "variant", "part")


@dataclass(frozen=True)
class HotLoop:
    """What a thread executes in an iteration."""

    backend: str
    target: str
    kernel: str
    dtype: str
    variant: str
    part: str
    logits: int
    kinds: dict[str, int]  # instructions of each of KINDS

    @property
    def instructions(self) -> int:
        """Of all kinds."""
        return sum(self.kinds.values())

    @property
    def per_logit(self) -> float:
        """Instructions of a thread for each logit."""
        return self.instructions / self.logits

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from all others."""
        return tuple(getattr(self, name) for name in KEY)


def hot_loops(function: Function, backend: str, dtype: str, variant: str) -> Iterator[HotLoop]:
    """The loop of each part of a row's work: of several, the one that takes the most logits at once."""
    flow = ControlFlow(function.instructions)
    itemsize = ITEMSIZES[dtype]
    found: dict[str, HotLoop] = {}

    def add(part: str, execution: Execution, moved: int) -> None:
        kinds = {kind: execution.kinds[kind] for kind in KINDS}
        loop = HotLoop(
            backend, function.target, kernel_name(function.name), dtype, variant, part, moved // itemsize, kinds
        )
        found[part] = max(loop, found.get(part, loop), key=lambda one: one.logits)

    rotating = []
    for iteration in flow.loops():
        if iteration.count("MUFU.EX2"):
            if max(iteration.loaded, iteration.stored) >= itemsize:
                otherwise = iteration.loaded > iteration.stored
                part = ALIGNED_OTHERWISE if otherwise else GRADIENT
                add(part if iteration.stored else STATISTICS, iteration, iteration.stored or iteration.loaded)
            elif not iteration.read:
                rotating.append(iteration)
    if rotating and found.keys() == {GRADIENT}:
        # Pass 1 over registers moves no memory, so pass 2 says how many logits a tile has, and both have as many.
        longest = max(rotating, key=lambda one: one.count("MUFU.EX2"))
        add(STATISTICS, longest, found[GRADIENT].logits * itemsize)
    if not found and (whole := flow.whole()) is not None:
        # The rest of a row is stored element by element, where there is one.
        add(WHOLE_ROW, whole, whole.vectors_stored)
    yield from found.values()


def cuda_hot_loops(cuobjdump: str, extension: Path) -> list[HotLoop]:
    """Those of the CUDA kernels, for every architecture of the extension."""
    # Listed by another option: asked for functions by name, `-sass` takes a second for each.
    usage = subprocess.run([cuobjdump, "--dump-resource-usage", extension], capture_output=True, text=True, check=True)
    names = set(re.findall(r"Function (\S+):", usage.stdout))
    known = {name: dtype_and_variant(name) for name in names if kernel_name(name) in KERNELS}
    known = {name: words for name, words in known.items() if words[0] in ITEMSIZES}
    found = [
        loop
        for function in disassembled(cuobjdump, extension, known)
        for loop in hot_loops(function, "cuda", *known[function.name])
    ]
    return sorted(found, key=lambda loop: loop.key)


def triton_variant(option: str, vocab: int, step: str) -> str:
    """A Triton kernel as it is compiled for an option and a step."""
    return ", ".join(filter(None, (option, f"V = {vocab}", "gradient" * (step == "grad_in_forward"))))


def triton_hot_loops(cuobjdump: str, cubin: Path, dtype: str, variant: str) -> list[HotLoop]:
    """Those of a Triton kernel."""
    (function,) = disassembled(cuobjdump, cubin)
    return list(hot_loops(function, "triton", dtype, variant))


def find_cuobjdump() -> str:
    """The tool that reads compiled kernels, of Triton's wheel or of the CUDA toolkit; exits where it is missing."""
    try:
        import triton
    except ImportError:
        sys.exit("expected Triton to be installed: its kernels are counted, and its tools are used.")
    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(own) if own.exists() else shutil.which("cuobjdump")
    if found is None:
        sys.exit("expected cuobjdump in Triton's folder or on the PATH.")
    return found


def disassembled(cuobjdump: str, path: Path, wanted: Container[str] | None = None) -> Iterator[Function]:
    """The functions in a file of machine code."""
    command = [cuobjdump, "-sass", str(path)]
    # It warns of the format of files that Triton's ptxas makes for sm_80 and sm_90, and reads them.
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdout=pipe, stderr=null, text=True) as process:
        assert process.stdout is not None
        yield from functions(process.stdout, wanted)
    if process.returncode:
        raise RuntimeError(f"{cuobjdump} could not read the machine code in {path}")


def grown(recorded: Iterable[HotLoop], compiled: Iterable[HotLoop]) -> list[str]:
    """A sentence for each loop that has grown, or that is in one of the two alone."""
    before, after = ({loop.key: loop for loop in loops} for loops in (recorded, compiled))
    found = []
    for key in sorted(before.keys() | after.keys()):
        name = ", ".join(filter(None, key))
        if key not in after:
            found.append(f"{name}: was {before[key].per_logit:.2f} instructions a logit, is not there")
        elif key not in before:
            found.append(f"{name}: is {after[key].per_logit:.2f} instructions a logit, was not there")
        elif after[key].per_logit > (1 + MAY_GROW) * before[key].per_logit:
            was, now = before[key].per_logit, after[key].per_logit
            found.append(f"{name}: was {was:.2f} instructions a logit, is {now:.2f}")
    return found


def write_hot_loops_csv(path: Path, loops: Iterable[HotLoop], facts: dict[str, str]) -> None:
    """One line for each loop; `facts` stand on every line."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, [*KEY, "logits", "instructions", *KINDS, "per_logit", *facts], lineterminator="\n"
        )
        writer.writeheader()
        for loop in loops:
            key = dict(zip(KEY, loop.key, strict=True))
            numbers = {"logits": loop.logits, "instructions": loop.instructions, "per_logit": f"{loop.per_logit:.3f}"}
            writer.writerow(key | numbers | loop.kinds | facts)


def read_hot_loops_csv(path: Path) -> list[HotLoop]:
    """The loops of such a file."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        HotLoop(
            backend=row["backend"],
            target=row["target"],
            kernel=row["kernel"],
            dtype=row["dtype"],
            variant=row["variant"],
            part=row["part"],
            logits=int(row["logits"]),
            kinds={kind: int(row[kind]) for kind in KINDS},
        )
        for row in rows
    ]
