"""Compiles the Triton kernels ahead of time, for GPUs that need not be there, and says what ptxas made of them.

Run as a program it compiles the named set and writes one JSON object a kernel: `python triton_compile.py some|all`.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from mixce_kernels.triton_kernels import forward, gradient
from mixce_kernels.triton_kernels.launch import row_config, tile_config

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
ITEMSIZES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
FLAGS = ("CAP", "SMOOTH", "STATS", "HAS_ETA", "HAS_GRAD")


class Variant(NamedTuple):
    """One kernel for one type, vocabulary size and choice of options."""

    kernel: str
    dtype: str
    vocab_size: int = 50257
    flags: tuple[bool, ...] = (False,) * len(FLAGS)
    same_window: bool = True


def variants(name: str) -> list[tuple[str, Variant]]:
    """Targets and variants: `some` for every run; `all` is every type for every target with each option alone."""
    none, every = (False,) * len(FLAGS), (True,) * len(FLAGS)
    alone = [tuple(flag == only for flag in FLAGS) for only in FLAGS]
    if name == "all":
        choices = [none, every, *alone]
        dtypes_and_targets = list(itertools.product(ITEMSIZES, TARGETS))
    else:
        choices = [none, every, alone[-1]]
        dtypes_and_targets = [(dtype, "sm_90") for dtype in ITEMSIZES]
        dtypes_and_targets += [("bf16", target) for target in TARGETS if target != "sm_90"]
    result = []
    for dtype, target in dtypes_and_targets:
        for flags in choices:
            # With a gradient: rows that one program holds, that a cluster holds (or two reads serve), and two reads.
            sizes = (8000, 50257, 128256, 1_000_000) if name == "all" or target == "sm_90" else (50257,)
            for vocab_size in sizes if flags[-1] else (50257,):
                result.append((target, Variant("forward", dtype, vocab_size, flags)))
        for cap in (False, True):
            result.append((target, Variant("logits_grad", dtype, flags=(cap, *none[1:]))))
        result.append((target, Variant("logits_grad", dtype, same_window=False)))
        result.append((target, Variant("scale_rows", dtype)))
    return result


def compile_variant(target_name: str, variant: Variant) -> CompiledKernel:
    """The kernel as a launch would compile it, no address, size or stride known to be a multiple of anything."""
    target = TARGETS[target_name]
    function = getattr(forward if variant.kernel == "forward" else gradient, f"{variant.kernel}_kernel")
    itemsize = ITEMSIZES[variant.dtype]
    real = "fp64" if variant.dtype == "fp64" else "fp32"
    constants: dict[str, Any] = dict(zip(FLAGS, variant.flags, strict=True)) | {"SAME_WINDOW": variant.same_window}
    if variant.kernel == "forward":
        arch = target.arch if target.backend == "cuda" and constants["HAS_GRAD"] else 0
        with_grad, with_stats = constants["HAS_GRAD"], constants["STATS"]
        with_options = constants["CAP"] or constants["SMOOTH"]
        row = row_config(variant.vocab_size, itemsize, with_grad, with_stats, with_options, target.warp_size, arch)
        constants |= {"STACK": row.stack, "LANES": row.lanes, "VECTOR": row.vector, "REST": row.rest}
        constants |= {"CTAS": row.n_ctas, "HELD": row.n_steps if row.held and variant.same_window else None}
        constants["PTX"] = arch > 0
        options = {"num_warps": row.num_warps, "num_ctas": row.n_ctas}
        if row.max_registers is not None:
            options["maxnreg"] = row.max_registers
    else:
        with_softcap = variant.kernel == "logits_grad" and constants["CAP"]
        tile = tile_config(4096, variant.vocab_size, itemsize, with_softcap, target.warp_size)
        constants |= {"STACK": tile.stack, "LANES": tile.lanes, "VECTOR": tile.vector, "REST": tile.rest}
        options = {"num_warps": tile.num_warps}
        if tile.max_registers is not None:
            options["maxnreg"] = tile.max_registers

    pointers = {"logits_ptr": variant.dtype, "grad_ptr": variant.dtype, "targets_ptr": "i64", "correct_ptr": "i1"}
    signature, constexprs = {}, {}
    for index, param in enumerate(function.params):
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constexprs[(index,)] = constants[param.name]
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


def main() -> None:
    """Writes the facts of each variant of the set named on the command line, a line each."""
    for target_name, variant in variants(sys.argv[1]):
        print(json.dumps({"target": target_name, **variant._asdict(), **facts(target_name, variant)}), flush=True)


if __name__ == "__main__":
    main()
