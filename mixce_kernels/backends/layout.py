"""Logits [..., V] as rows in memory: row i begins at (i // inner) * outer_stride + (i % inner) * inner_stride."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowLayout(NamedTuple):
    """Where the rows lie; strides in elements."""

    number: int
    inner: int
    outer_stride: int
    inner_stride: int


def layout_of(tensor: Tensor) -> RowLayout | None:
    """The rows of a tensor [..., V], or None where the last stride is not 1 or two strides cannot reach every row."""
    if tensor.is_contiguous():
        vocab_size = tensor.shape[-1]
        count = tensor.numel() // vocab_size
        return RowLayout(count, count or 1, 0, vocab_size)
    *sizes, vocab_size = tensor.shape
    *strides, last_stride = tensor.stride()
    if last_stride != 1 and vocab_size != 1:
        return None
    count = tensor.numel() // vocab_size
    if count == 0:
        return RowLayout(0, 1, 0, 0)
    merged: list[tuple[int, int]] = []  # from the innermost outwards: size, stride
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, stride))
    merged += [(1, 0)] * (2 - len(merged))
    if len(merged) > 2:
        return None
    (inner, inner_stride), (_, outer_stride) = merged
    return RowLayout(count, inner, outer_stride, inner_stride)


def reachable_layout(tensor: Tensor) -> RowLayout:
    """The rows of a tensor [..., V] that two strides reach, as those that come to a backend are."""
    rows = layout_of(tensor)
    assert rows is not None, "rows must be reachable by two strides"
    return rows


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory, as those of `Tensor.expand` or of sliding windows do."""
    if tensor.numel() == 0:
        return False
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def needs_copy(tensor: Tensor) -> bool:
    """Whether memory does not hold the tensor as it is: one with its negative bit set, or zeros without memory."""
    return tensor.is_neg() or tensor._is_zerotensor()


def materialized(tensor: Tensor) -> Tensor:
    """The tensor as its memory holds it: a copy where that is another."""
    return tensor.clone() if needs_copy(tensor) else tensor


def entries(tensor: Tensor) -> tuple[Tensor, int]:
    """A tensor with one number for all tokens [] or one each [...], as entries and the stride between them.

    Copies N numbers at most.
    """
    if tensor.numel() == 1:
        return tensor, 0
    if tensor.is_contiguous():
        return tensor, 1
    tensor = tensor.reshape(-1)
    return tensor, tensor.stride(0)


def aligned_alike(a: Tensor, rows_a: RowLayout, b: Tensor, rows_b: RowLayout, boundary: int) -> bool:
    """Whether row i of `a` [..., V] lies as row i of `b` does to the boundary, in bytes, for every i."""
    if a is b:
        return True
    if (a.data_ptr() - b.data_ptr()) % boundary != 0:
        return False
    step = boundary // a.element_size()
    if rows_a.inner == rows_b.inner:
        return all((stride_a - stride_b) % step == 0 for stride_a, stride_b in zip(rows_a[2:], rows_b[2:], strict=True))
    return all(stride % step == 0 for stride in (*rows_a[2:], *rows_b[2:]))
