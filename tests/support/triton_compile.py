"""Compiles the Triton kernels ahead of time, for GPUs that need not be there, and says what ptxas made of them.

Run as a program it compiles the named set and writes one JSON object a kernel:
`python -m support.triton_compile some|all`. A folder with another Triton, first on PYTHONPATH, has that one compile.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from mixce_kernels.backends.triton_launch import (
    RowConfig,
    TileConfig,
    merge_config,
    row_config,
    split_config,
    tile_config,
)
from mixce_kernels.triton_kernels import forward, gradient, split_forward

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
ITEMSIZES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
OPTIONS = ("CAP", "SMOOTH", "STATS", "HAS_ETA", "HAS_GRAD")
# Pointers that calls of losses leave out: those with "LOGPROBS" among their options have them.
LOGPROBS = "LOGPROBS"
# A forward of a loss that no gradient follows leaves out these, too.
BARE = "BARE"
NOT_BARE = frozenset(("state_ptr", "parameters_ptr", "token_scale_ptr"))
# The gradient in a forward whose tokens have no factors, as those of a sum.
UNSCALED = "UNSCALED"
OF_LOGPROBS = frozenset(("temperature_ptr", "entropy_state_ptr", "grad_entropy_ptr"))
# The kernels of a split forward.
SPLIT = ("partial_stats", "merge")
# Vocabulary sizes that a choice leaves to the target and the type: the one whose rows take the most registers of a
# thread in the largest cluster that there may be, and one whose rows leave the most beside whole steps.
MOST_HELD = -1
WIDEST_REST = -2
# For sm_90 and halves: 7 and 24 steps in a program, 24 in a cluster of 2, 15 in one of 8, of twice the threads as well,
# and two reads.
SIZES_WITH_GRAD = (8000, 25000, 50257, 128256, 262144, 1_000_000, WIDEST_REST)
Choice = TypeVar("Choice")


class Variant(NamedTuple):
    """One kernel for one type, vocabulary size and choice of options."""

    kernel: str
    dtype: str
    options: tuple[str, ...] = ()
    vocab_size: int = 50257
    same_window: bool = True


def spread(name: str, heavy: list[Choice], light: list[Choice]) -> Iterator[tuple[str, str, Choice]]:
    """Targets, types and choices of the set `name`: `some` is the part of `all` with sm_90 or with bfloat16.

    Heavy choices, which are the first to spill, are compiled for every type and target. A light one meets each type and
    each target, but not each pair of them. Outside sm_90 float64, which is for checks, has all choices as light ones.
    """
    for (i, dtype), (j, target) in itertools.product(enumerate(ITEMSIZES), enumerate(TARGETS)):
        if name == "some" and target != "sm_90" and dtype != "bf16":
            continue
        n_always = len(heavy) if dtype != "fp64" or target == "sm_90" else 0
        for index, choice in enumerate(heavy + light):
            if index < n_always or (index + i + j) % len(ITEMSIZES) == 0:
                yield target, dtype, choice


def variants(name: str) -> list[tuple[str, Variant]]:
    """Targets and variants of the set."""
    heavy: list[dict[str, Any]] = [
        {"kernel": "forward", "options": OPTIONS},
        {"kernel": "forward", "options": OPTIONS, "vocab_size": MOST_HELD},
        {"kernel": "forward", "options": OPTIONS, "vocab_size": WIDEST_REST},
        {"kernel": "forward", "options": ("CAP", "SMOOTH", "STATS"), "vocab_size": WIDEST_REST},
        {"kernel": "forward", "options": ("HAS_GRAD",), "vocab_size": MOST_HELD},
        {"kernel": "forward", "options": ("HAS_GRAD", UNSCALED), "vocab_size": MOST_HELD},
        {"kernel": "forward", "options": ("CAP", "STATS", LOGPROBS), "vocab_size": WIDEST_REST},
        {"kernel": "logits_grad", "options": ("CAP",), "vocab_size": WIDEST_REST},
        {"kernel": "logits_grad", "options": ("CAP", LOGPROBS), "vocab_size": WIDEST_REST},
        {"kernel": "partial_stats", "options": OPTIONS, "vocab_size": WIDEST_REST},
        {"kernel": "merge", "options": OPTIONS},
    ]
    light: list[dict[str, Any]] = [
        {"kernel": "forward"},
        {"kernel": "forward", "options": (BARE,)},
        {"kernel": "forward", "options": ("STATS", BARE)},
        {"kernel": "merge", "options": (BARE,)},
        *({"kernel": "forward", "options": (option,)} for option in OPTIONS if option != "HAS_GRAD"),
        # Rows that one program holds, as many vectors as it may, or a cluster of any size, or none.
        *({"kernel": "forward", "options": ("HAS_GRAD",), "vocab_size": size} for size in SIZES_WITH_GRAD),
        *({"kernel": "forward", "options": ("HAS_GRAD", UNSCALED), "vocab_size": size} for size in SIZES_WITH_GRAD),
        *({"kernel": "forward", "options": OPTIONS, "vocab_size": size} for size in SIZES_WITH_GRAD),
        {"kernel": "logits_grad"},
        {"kernel": "logits_grad", "same_window": False},
        {"kernel": "forward", "options": (LOGPROBS,)},
        {"kernel": "forward", "options": ("STATS", LOGPROBS)},
        {"kernel": "logits_grad", "options": (LOGPROBS,)},
        {"kernel": "logits_grad", "options": (LOGPROBS,), "same_window": False},
        {"kernel": "scale_rows"},
        *({"kernel": kernel} for kernel in SPLIT),
        *({"kernel": "partial_stats", "options": (option,)} for option in ("CAP", "SMOOTH", "STATS")),
        # As many tiles as there may be.
        {"kernel": "merge", "options": OPTIONS, "vocab_size": 1_100_000},
    ]
    result = []
    for target, dtype, choice in spread(name, heavy, light):
        variant = Variant(dtype=dtype, **choice)
        if variant.vocab_size < 0:
            variant = variant._replace(vocab_size=vocab_size_of(target, variant))
        result.append((target, variant))
    return result


def vocab_size_of(target: str, variant: Variant) -> int:
    """The vocabulary size that MOST_HELD or WIDEST_REST stands for."""

    def row(vocab_size: int) -> RowConfig:
        return row_of(target, variant._replace(vocab_size=vocab_size))

    def held(vocab_size: int) -> tuple[int, int]:
        config = row(vocab_size)
        return (config.n_ctas, config.n_steps) if config.held else (0, 0)

    if variant.vocab_size == MOST_HELD:
        return max(range(1024, 2**18, 512), key=held)
    # Too many logits to be held. A step more would be one whole step wherever the row begins; this is just less.
    config = row(2**20)
    return 2**20 + config.vector - 2


def row_of(target_name: str, variant: Variant) -> RowConfig:
    """The launch of a forward kernel."""
    target = TARGETS[target_name]
    with_grad = "HAS_GRAD" in variant.options and variant.same_window
    return row_config(
        variant.vocab_size,
        ITEMSIZES[variant.dtype],
        with_grad,
        "STATS" in variant.options,
        "CAP" in variant.options or "SMOOTH" in variant.options,
        target.warp_size,
        target.arch if target.backend == "cuda" and with_grad else 0,
    )


def tile_of(target_name: str, variant: Variant) -> TileConfig:
    """The launch of a kernel whose programs take tiles of a row; that of a split forward has one row."""
    itemsize, warp_size = ITEMSIZES[variant.dtype], TARGETS[target_name].warp_size
    with_cap = "CAP" in variant.options
    if variant.kernel in SPLIT:
        with_options = with_cap or "SMOOTH" in variant.options
        tile = split_config(1, variant.vocab_size, itemsize, 132, "STATS" in variant.options, with_options, warp_size)
        assert tile is not None
        return tile
    return tile_config(4096, variant.vocab_size, itemsize, variant.kernel == "logits_grad" and with_cap, warp_size)


def launch_arguments(target_name: str, variant: Variant) -> dict[str, Any]:
    """The arguments that follow from a launch's configuration."""
    if variant.kernel == "forward":
        return row_of(target_name, variant).arguments()
    tile = tile_of(target_name, variant)
    if variant.kernel == "merge":
        return merge_config(tile.n_tiles, TARGETS[target_name].warp_size).arguments()
    return tile.arguments() | {"STACK": tile.stack}


def compile_variant(target_name: str, variant: Variant) -> CompiledKernel:
    """The kernel as a launch would compile it."""
    target = TARGETS[target_name]
    constants: dict[str, Any] = {option: option in variant.options for option in OPTIONS}
    constants |= launch_arguments(target_name, variant) | {"SAME_WINDOW": variant.same_window}
    constants["PTX"] = target.backend == "cuda" and constants["HAS_GRAD"] and variant.same_window
    options = {name: constants[name] for name in ("num_warps", "num_ctas", "maxnreg") if name in constants}
    (module,) = (one for one in (forward, gradient, split_forward) if hasattr(one, f"{variant.kernel}_kernel"))
    pointers = {"logits_ptr": variant.dtype, "grad_ptr": variant.dtype, "targets_ptr": "i64", "correct_ptr": "i1"}
    function = getattr(module, f"{variant.kernel}_kernel")
    left_out = frozenset() if LOGPROBS in variant.options else OF_LOGPROBS
    if variant.kernel == "forward" and "STATS" not in variant.options:
        left_out |= {"entropy_state_ptr"}
    if BARE in variant.options:
        left_out |= NOT_BARE
    if UNSCALED in variant.options:
        left_out |= {"token_scale_ptr", "parameters_ptr"}
    return compiled(function, target, variant.dtype, pointers, constants, options, left_out)


def compiled(
    function: Any,
    target: GPUTarget,
    dtype: str,
    pointers: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, int],
    left_out: frozenset[str] = frozenset(),
) -> CompiledKernel:
    """A kernel with no address, size or stride known to be a multiple of anything.

    Pointers that are not named point to numbers of the type of sums; tokens' factors in the loss are float64. Those
    that are `left_out` are None.
    """
    pointers = {"token_scale_ptr": "fp64", **pointers}
    real = "fp64" if dtype == "fp64" else "fp32"
    signature, constexprs = {}, {}
    for index, param in enumerate(function.params):
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constexprs[(index,)] = constants[param.name]
        elif param.name in left_out:
            signature[param.name] = "constexpr"
            constexprs[(index,)] = None
        elif param.name.endswith("_ptr"):
            signature[param.name] = "*" + pointers.get(param.name, real)
        else:
            signature[param.name] = param.annotation_type
    source = ASTSource(function, signature=signature, constexprs=constexprs)
    return triton.compile(source, target=target, options=options)


@functools.cache
def _cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def facts(target_name: str, variant: Variant) -> dict[str, Any]:
    """What the compilers made of a variant."""
    return facts_of(target_name, compile_variant(target_name, variant))


def facts_of(target_name: str, compiled: CompiledKernel) -> dict[str, Any]:
    """Registers and spilled bytes, and how many accesses of global memory have which width."""
    if target_name.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        return {
            # Scalar registers spill to lanes of vector registers, which costs no memory.
            "spills": sum(
                map(int, re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", assembly))
            ),
            "registers": max(map(int, re.findall(r"\.vgpr_count:\s+(\d+)", assembly))),
            "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly)),
            "wide_stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", assembly)),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    ptx = compiled.asm["ptx"]
    # A local frame is where ptxas spills.
    return {
        "spills": sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage))),
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v(?:4\.b32|2\.b64)", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v(?:4\.b32|2\.b64)", ptx)),
    }


def _line(facts: Callable[[str, Any], dict[str, Any]], target_and_variant: tuple[str, Any]) -> str:
    target_name, variant = target_and_variant
    return json.dumps({"target": target_name, **variant._asdict(), **facts(target_name, variant)})


def write(facts: Callable[[str, Any], dict[str, Any]], targets_and_variants: list[tuple[str, Any]]) -> None:
    """Writes the facts of each variant, a line each; the processors share the work."""
    with multiprocessing.Pool(len(os.sched_getaffinity(0))) as pool:
        for line in pool.imap(functools.partial(_line, facts), targets_and_variants):
            print(line, flush=True)


if __name__ == "__main__":
    write(facts, variants(sys.argv[1]))
