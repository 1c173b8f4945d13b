"""Compiles the Triton kernels of the loss from hidden states ahead of time: see `triton_compile.py`.

Run as a program it writes one JSON object a kernel: `python linear_compile.py some|all`.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from typing import Any, NamedTuple

import triton
from triton.compiler import ASTSource, CompiledKernel
from triton_compile import ITEMSIZES, TARGETS, facts_of

from mixce_kernels.triton_kernels import linear_forward, linear_gradient
from mixce_kernels.triton_kernels.linear_launch import forward_config, grad_config

OPTIONS = ("HAS_BIAS", "CAP", "SMOOTH", "STATS", "HAS_ETA", "GRAD_BIAS")
KERNELS = ("linear_forward", "linear_merge", "linear_grad_logits", "linear_grad_hidden", "linear_grad_weight")
VOCAB_SIZE, DEPTH = 50257, 4096


class Variant(NamedTuple):
    """One kernel for one type, number of rows and layout, with every option or none."""

    kernel: str
    dtype: str
    n_rows: int = 4096
    options: bool = False
    aligned: bool = True


def variants(name: str) -> list[tuple[str, Variant]]:
    """Targets and variants: `some` for every run; `all` is every type for every target."""
    if name == "all":
        dtypes_and_targets = list(itertools.product(ITEMSIZES, TARGETS))
        # As many rows as choose other tiles, and rows that are not whole vectors.
        shapes = [(4096, False, True), (4096, True, True), (4096, True, False), (8, True, True)]
    else:
        dtypes_and_targets = [(dtype, "sm_90") for dtype in ITEMSIZES]
        dtypes_and_targets += [("bf16", target) for target in TARGETS if target != "sm_90"]
        shapes = [(4096, False, True), (4096, True, True)]
    return [
        (target, Variant(kernel, dtype, *shape))
        for dtype, target in dtypes_and_targets
        for shape in shapes
        for kernel in KERNELS
    ]


def compile_variant(target_name: str, variant: Variant) -> CompiledKernel:
    """The kernel as a launch would compile it."""
    target = TARGETS[target_name]
    function = getattr(linear_gradient if "grad" in variant.kernel else linear_forward, f"{variant.kernel}_kernel")
    itemsize = ITEMSIZES[variant.dtype]
    real = "fp64" if variant.dtype == "fp64" else "fp32"
    arch = target.arch if target.backend == "cuda" else 0
    constants: dict[str, Any] = dict.fromkeys(OPTIONS, variant.options)
    constants |= {"EVEN": variant.aligned, "VECTOR": 16 // itemsize if variant.aligned else 1}
    constants |= {"INTERPRETED": False, "PRODUCTS": True, "SCALED": variant.dtype == "fp16"}
    forward = forward_config(variant.n_rows, VOCAB_SIZE, itemsize, variant.options, variant.aligned, arch)
    grad = grad_config(variant.n_rows, VOCAB_SIZE, DEPTH, itemsize, variant.options, variant.aligned, arch)
    tiles = forward.tiles if function.__name__.startswith("linear_forward") else grad.tiles
    constants |= {"SPLITS": forward.merge_splits, "ROWS": forward.merge_rows, "GROUP": tiles.group}
    constants |= {"BLOCK_N": tiles.block_n, "BLOCK_V": tiles.block_v, "BLOCK_D": tiles.block_d}
    constants |= {"BLOCK_K": grad.block_k, "BLOCK_OUT": grad.block_out}
    if variant.kernel == "linear_grad_weight":
        constants["BLOCK_V"] = grad.block_out
    options = {"num_warps": 4}
    if variant.kernel != "linear_merge":
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    if tiles.max_registers is not None:
        options["maxnreg"] = tiles.max_registers

    pointers = dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr", "scratch_ptr"), variant.dtype)
    pointers |= dict.fromkeys(("targets_ptr", "order_ptr", "n_valid_ptr"), "i64") | {"correct_ptr": "i1"}
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


def main() -> None:
    """Writes the facts of each variant of the set named on the command line, a line each."""
    for target_name, variant in variants(sys.argv[1]):
        compiled = compile_variant(target_name, variant)
        facts = facts_of(target_name, compiled) | {"shared": compiled.metadata.shared}
        # Copies to shared memory while products run: of so many bytes each.
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, 0x(\w+)", compiled.asm.get("ptx", ""))
        facts["copies"] = sorted({int(size, 16) for size in copies})
        print(json.dumps({"target": target_name, **variant._asdict(), **facts}), flush=True)


if __name__ == "__main__":
    main()
