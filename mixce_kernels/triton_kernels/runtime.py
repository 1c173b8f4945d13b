"""How kernels are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton


def kernel(function: Callable[..., None]) -> Any:
    """`triton.jit` for runtime values that stay runtime: no new size, stride, option or address compiles anew."""
    code = function.__code__
    runtime = [name for name in code.co_varnames[: code.co_argcount] if not name.isupper()]
    return triton.jit(function, do_not_specialize=runtime, do_not_specialize_on_alignment=runtime)
