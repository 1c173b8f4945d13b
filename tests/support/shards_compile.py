"""Compiles the Triton kernels of tokens ahead of time, as triton_compile.py does those of rows: a split vocabulary's
three, and the reduction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from mixce_kernels.backends.triton_launch import reduction_config
from mixce_kernels.backends.triton_shards import TOKENS, launch_options
from mixce_kernels.triton_kernels import reduction, shards
from support.triton_compile import TARGETS, compiled, facts_of, write

KERNELS = ("localize_targets", "write_message", "merge_messages", "reduction")


class Variant(NamedTuple):
    """One kernel for one type, with every option or with none."""

    kernel: str
    dtype: str
    every: bool


def variants() -> list[tuple[str, Variant]]:
    """Targets and variants."""
    return [
        (target, Variant(kernel, dtype, every))
        for target in TARGETS
        for kernel in KERNELS
        for dtype in (("fp32", "fp64") if kernel != "localize_targets" else ("fp32",))
        for every in ((False, True) if kernel != "localize_targets" else (True,))
    ]


def facts(target_name: str, variant: Variant) -> dict[str, Any]:
    """What the compilers made of a variant."""
    constants = dict.fromkeys(("COLUMNS", "CAP", "SMOOTH", "STATS", "HAS_ETA"), variant.every) | {"TOKENS": TOKENS}
    integers = "i64" if variant.dtype == "fp64" else "i32"
    pointers = {"targets_ptr": "i64", "local_ptr": "i64", "correct_ptr": "i1"}
    pointers |= {"header_ptr": integers, "headers_ptr": integers}
    pointers |= {"weights_ptr": "bf16", "num_items_ptr": "i64"}
    target = TARGETS[target_name]
    if variant.kernel == "reduction":
        kernel, options = reduction.reduction_kernel, reduction_config(target.warp_size).arguments()
        constants |= {"SUMS": variant.every, "MEAN": variant.every, "BLOCK": options.pop("BLOCK")}
    else:
        kernel, options = getattr(shards, f"{variant.kernel}_kernel"), launch_options(target.warp_size)
    return facts_of(target_name, compiled(kernel, target, variant.dtype, pointers, constants, options))


if __name__ == "__main__":
    write(facts, variants())
