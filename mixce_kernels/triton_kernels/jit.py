"""How kernels are compiled, and what Triton's interpreter needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def kernel(function: Callable[..., None]) -> Any:
    """`triton.jit` for runtime values that stay runtime: no new size, stride, option or address compiles anew."""
    code = function.__code__
    runtime = [name for name in code.co_varnames[: code.co_argcount] if not name.isupper()]
    return triton.jit(function, do_not_specialize=runtime, do_not_specialize_on_alignment=runtime)


@triton.jit
def bound(n):
    """A loop's bound n, which compiled code takes as it is.

    The interpreter holds a scalar as an array of one number, which Triton before 3.7 cannot count to with NumPy 2.4.
    """
    if INTERPRETED and isinstance(n, tl.tensor):
        return n.handle.data.item()
    return n
