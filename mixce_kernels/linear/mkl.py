"""Products of bfloat16 matrices by MKL, with float32 sums: what `torch.mm` has on GPUs alone.

PyTorch's own product of bfloat16 matrices on a CPU rounds its result to bfloat16. MKL's `cblas_gemm_bf16bf16f32`
(oneMKL C reference, BLAS-like extensions) does not, and PyTorch's builds for x86 bring it inside of their library.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mixce_kernels.backends import native

_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112  # of cblas.h


def is_fast() -> bool:
    """Whether MKL takes the widest vectors of this CPU: on Intel's processors alone."""
    return torch.backends.mkl.is_available() and "intel" in native.CPU_FEATURES


def has_bfloat16() -> bool:
    """Whether `multiply` runs on the matrix units of this CPU."""
    return is_fast() and "amx_bf16" in native.CPU_FEATURES and _gemm() is not None


def takes(matrix: Tensor) -> bool:
    """Whether rows or columns of a matrix [R, C] are contiguous, with one distance between them."""
    return _layout(matrix) is not None


def multiply(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """Writes a [R, K] @ b [K, C] to out [R, C] float32, or adds it; operands bfloat16 that `takes` accepts."""
    gemm, of_a, of_b, of_out = _gemm(), _layout(a), _layout(b), _layout(out)
    assert gemm is not None
    assert of_a is not None
    assert of_b is not None
    assert of_out is not None
    assert of_out[0] == _PLAIN
    (rows, inner), columns = a.shape, b.shape[1]
    if 0 in (rows, columns):
        return
    gemm(
        _ROW_MAJOR, of_a[0], of_b[0], rows, columns, inner, 1.0, a.data_ptr(), of_a[1], b.data_ptr(), of_b[1],
        1.0 if accumulate else 0.0, out.data_ptr(), of_out[1],
    )  # fmt: skip


def _layout(matrix: Tensor) -> tuple[int, int] | None:
    """Whether it is transposed in memory, and the elements from row to row there; None where it is neither."""
    rows, columns = matrix.shape
    row_stride, column_stride = matrix.stride()
    # The stride of a dimension of one is any, also where PyTorch calls the tensor contiguous.
    if (column_stride == 1 or columns == 1) and (row_stride >= columns or rows == 1):
        return _PLAIN, max(columns, 1) if rows == 1 else row_stride
    if (row_stride == 1 or rows == 1) and (column_stride >= rows or columns == 1):
        return _TRANSPOSED, max(rows, 1) if columns == 1 else column_stride
    return None


@functools.cache
def _gemm() -> Callable[..., None] | None:
    """The function; None where PyTorch was built without."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        gemm = library.cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    number, pointer, scale = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
    gemm.argtypes = [*[number] * 6, scale, pointer, number, pointer, number, scale, pointer, number]
    gemm.restype = None
    return gemm
