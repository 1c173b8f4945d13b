"""Compiles the Triton kernels of the loss from hidden states ahead of time: see `triton_compile.py`.

Run as a program it writes one JSON object a kernel: `python -m support.linear_compile some|all`.
"""

from __future__ import annotations

import re
import sys
from typing import Any, NamedTuple

from triton.compiler import CompiledKernel

from mixce_kernels.linear.tiles_launch import forward_config, grad_config
from mixce_kernels.triton_kernels import linear_forward, linear_gradient
from support.triton_compile import ITEMSIZES, TARGETS, compiled, facts_of, spread, write

# Of each kernel with options.
OPTIONS = {
    "linear_forward": ("HAS_BIAS", "CAP", "SMOOTH", "STATS"),
    "linear_merge": ("CAP", "SMOOTH", "STATS", "HAS_ETA"),
    "linear_grad_logits": ("HAS_BIAS", "CAP", "GRAD_BIAS"),
}
PRODUCTS = ("linear_grad_hidden", "linear_grad_weight")
VOCAB_SIZE, DEPTH = 50257, 4096


class Variant(NamedTuple):
    """One kernel for one type, number of rows, choice of options and layout."""

    kernel: str
    dtype: str
    options: tuple[str, ...] = ()
    n_rows: int = 4096
    aligned: bool = True


def variants(name: str) -> list[tuple[str, Variant]]:
    """Targets and variants of the set."""
    heavy: list[dict[str, Any]] = [
        {"kernel": "linear_forward"},
        {"kernel": "linear_forward", "options": OPTIONS["linear_forward"]},
        {"kernel": "linear_grad_logits", "options": ("HAS_BIAS", "GRAD_BIAS")},
        {"kernel": "linear_grad_logits", "options": OPTIONS["linear_grad_logits"]},
        *({"kernel": kernel} for kernel in PRODUCTS),
    ]
    light: list[dict[str, Any]] = [
        *({"kernel": "linear_forward", "options": (option,)} for option in OPTIONS["linear_forward"]),
        {"kernel": "linear_grad_logits"},
        {"kernel": "linear_grad_logits", "options": ("CAP",)},
        {"kernel": "linear_merge"},
    ]
    # As many rows as choose other tiles, and rows that are not whole vectors.
    for shape in ({"n_rows": 8}, {"aligned": False}):
        light += [{"kernel": kernel, "options": options, **shape} for kernel, options in OPTIONS.items()]
        light += [{"kernel": kernel, **shape} for kernel in PRODUCTS]
    return [(target, Variant(dtype=dtype, **choice)) for target, dtype, choice in spread(name, heavy, light)]


def compile_variant(target_name: str, variant: Variant) -> CompiledKernel:
    """The kernel as a launch would compile it."""
    target = TARGETS[target_name]
    itemsize = ITEMSIZES[variant.dtype]
    arch = target.arch if target.backend == "cuda" else 0
    constants: dict[str, Any] = {option: option in variant.options for option in OPTIONS.get(variant.kernel, ())}
    constants |= {"EVEN": variant.aligned, "VECTOR": 16 // itemsize if variant.aligned else 1}
    constants |= {"PRODUCTS": True, "SCALED": variant.dtype == "fp16"}
    with_options = bool({"CAP", "SMOOTH", "STATS"} & set(variant.options))
    with_softcap = "CAP" in variant.options
    forward = forward_config(variant.n_rows, VOCAB_SIZE, itemsize, with_options, variant.aligned, arch)
    grad = grad_config(variant.n_rows, VOCAB_SIZE, DEPTH, itemsize, with_softcap, variant.aligned, arch)
    tiles = grad.tiles if "grad" in variant.kernel else forward.tiles
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
    function = getattr(linear_gradient if "grad" in variant.kernel else linear_forward, f"{variant.kernel}_kernel")
    pointers = dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr", "scratch_ptr"), variant.dtype)
    pointers |= dict.fromkeys(("targets_ptr", "order_ptr", "n_valid_ptr"), "i64") | {"correct_ptr": "i1"}
    return compiled(function, target, variant.dtype, pointers, constants, options)


def facts(target_name: str, variant: Variant) -> dict[str, Any]:
    """What the compilers made of a variant."""
    compiled = compile_variant(target_name, variant)
    # Copies to shared memory while products run: of so many bytes each.
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, 0x(\w+)", compiled.asm.get("ptx", ""))
    return facts_of(target_name, compiled) | {
        "shared": compiled.metadata.shared,
        "copies": sorted({int(size, 16) for size in copies}),
    }


if __name__ == "__main__":
    write(facts, variants(sys.argv[1]))
