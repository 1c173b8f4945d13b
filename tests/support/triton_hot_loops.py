"""Compiles the Triton kernels whose hot loops are on record ahead of time, and says what their loops are now.

Run as a program it writes one JSON object a kernel: `python -m support.triton_hot_loops`. The folder benchmarks is on
its path.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from gpu_kernels.hot_loops import find_cuobjdump, read_hot_loops_csv, triton_hot_loops
from support.paths import BENCHMARKS
from support.triton_compile import Variant, compile_variant, write

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
OPTIONS = {"softcap": "CAP", "label_smoothing": "SMOOTH", "return_stats": "STATS", "gradient": "HAS_GRAD"}


class Recorded(NamedTuple):
    """A kernel as the record names it."""

    kernel: str
    dtype: str
    variant: str


def facts(target: str, recorded: Recorded) -> dict[str, Any]:
    """The hot loops of a kernel."""
    words = recorded.variant.split(", ")
    (vocab_size,) = (int(found[1]) for word in words if (found := re.fullmatch(r"V = (\d+)", word)))
    variant = Variant(
        kernel=recorded.kernel.removesuffix("_kernel"),
        dtype=DTYPES[recorded.dtype],
        options=tuple(OPTIONS[word] for word in words if word in OPTIONS),
        vocab_size=vocab_size,
        same_window="gradient aligned otherwise" not in words,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compile_variant(target, variant).asm["cubin"])
        cubin.flush()
        loops = triton_hot_loops(find_cuobjdump(), Path(cubin.name), recorded.dtype, recorded.variant)
    return {"loops": [dataclasses.asdict(loop) for loop in loops]}


if __name__ == "__main__":
    record = read_hot_loops_csv(BENCHMARKS / "results" / "hot_loops.csv")
    kernels = {(one.target, Recorded(one.kernel, one.dtype, one.variant)) for one in record if one.backend == "triton"}
    write(facts, sorted(kernels))
