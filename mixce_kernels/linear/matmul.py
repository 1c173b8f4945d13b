"""The three matrix products of a linear loss, by the device's BLAS, over a chunk of rows.

    logits       hidden [R, D], weight [V, D] -> [R, V]        hidden @ weight.T + bias
    grad_hidden  grad_logits [R, V], weight -> [R, D]          grad_logits @ weight
    grad_weight  grad_logits, hidden -> [V, D]                 grad_logits.T @ hidden, added to those of other chunks

Results are float32 (float64 for float64 operands), also where the operands are half precision: a logit rounded to
bfloat16 is off by up to 0.4 %, and its probability by as much for each unit of the logit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from mixce_kernels.options import accumulate_dtype

# Rows of the weight in a tile: with their logits they stay in a CPU's caches, and their float32 copy is small.
_TILE = 2048
# A BLAS of a CPU may add up the terms of a product one after another (MKL does for up to three rows, oneDNN for any
# number): longer sums, as those over the vocabulary, are made of sums of so many terms.
_LONGEST_SUM = 512
# Where a chunk has more rows, MKL has packed the weight for all of them, and oneDNN's own memory would count.
_MOST_ROWS = 1024


class Products(Protocol):
    """The products with one weight and bias."""

    # Memory that a chunk takes for each of its logits.
    bytes_per_logit: int
    # Whether the gradient of the logits is rounded to float16, which holds only what is near 1.
    wants_units: bool

    def bytes_besides(self, vocab_size: int) -> int:
        """Memory that a chunk takes beside its logits, with a weight of so many rows."""

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """Writes hidden [R, D] @ weight.T + bias to out [R, V]."""

    def operand(self, grad_logits: Tensor) -> Tensor:
        """The gradient of the logits [R, V] as the two products below take it."""

    def grad_hidden(self, grad_logits: Tensor, out: Tensor) -> None:
        """Writes grad_logits [R, V] @ weight to out [R, D]."""

    def grad_weight(self, grad_logits: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        """Writes grad_logits.T @ hidden to out [V, D], or adds it."""


def products(weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype, max_bytes: int) -> Products:
    """The products with a weight [V, D] and a bias [V] or None, with operands rounded to `compute_dtype`.

    A weight that must be converted is converted in tiles of at most `max_bytes`, but at least one row.
    """
    half = accumulate_dtype(compute_dtype) != compute_dtype
    if half and weight.is_cuda and torch.version.hip is None and hasattr(torch.ops.aten.mm, "dtype_out"):
        return MixedProducts(weight, bias, compute_dtype)
    return TiledProducts(weight, bias, compute_dtype, max_bytes)


class TiledProducts:
    """Products of float32 or float64 operands; a weight of another type is converted tile by tile."""

    def __init__(self, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype, max_bytes: int) -> None:
        self.weight = weight
        self.compute_dtype = compute_dtype
        self.dtype = accumulate_dtype(compute_dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.converted = weight.dtype != self.dtype or weight.dtype != compute_dtype
        self.on_cpu = weight.device.type == "cpu"
        self.row_bytes = weight.shape[1] * (self.dtype.itemsize + compute_dtype.itemsize)
        self.most_converted = max_bytes // self.row_bytes
        self.tile = self._tile_of(weight.shape[0])
        self.bytes_per_logit = self.dtype.itemsize
        self.wants_units = False

    def bytes_besides(self, vocab_size: int) -> int:
        return self._tile_of(vocab_size) * self.row_bytes if self.converted else 0

    def _tile_of(self, vocab_size: int) -> int:
        """Rows of a tile of a weight [vocab_size, D]."""
        # A GPU's BLAS chooses its own tiles.
        tile = min(_TILE, vocab_size) if self.converted or self.on_cpu else vocab_size
        return max(min(tile, self.most_converted) if self.converted else tile, 1)

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        hidden = self._operand(hidden)
        for columns, weight in self._tiles(self.tile):
            bias = None if self.bias is None else self.bias[columns]
            part = out[:, columns]
            if self._has_onednn(len(hidden)) and weight.is_contiguous():
                _onednn_sum(hidden, weight, bias, part)
            elif bias is None:
                torch.mm(hidden, weight.t(), out=part)
            else:
                torch.addmm(bias, hidden, weight.t(), out=part)

    def operand(self, grad_logits: Tensor) -> Tensor:
        return grad_logits

    def grad_hidden(self, grad_logits: Tensor, out: Tensor) -> None:
        if not self.on_cpu and self.weight.dtype == self.dtype == self.compute_dtype:
            torch.mm(grad_logits, self.weight, out=out)
            return
        onednn = self._has_onednn(len(grad_logits))
        out.zero_()
        for columns, weight in self._tiles(min(self.tile, _LONGEST_SUM) if self.on_cpu else self.tile):
            part = grad_logits[:, columns]
            out += _onednn(part, weight.t()) if onednn and weight.is_contiguous() else torch.mm(part, weight)

    def grad_weight(self, grad_logits: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        hidden = self._operand(hidden)
        if accumulate:
            out.addmm_(grad_logits.t(), hidden)
        else:
            torch.mm(grad_logits.t(), hidden, out=out)

    def _operand(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.compute_dtype).to(self.dtype)

    def _tiles(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        for begin in range(0, self.weight.shape[0], size):
            columns = slice(begin, begin + size)
            yield columns, self._operand(self.weight[columns])

    def _has_onednn(self, n_rows: int) -> bool:
        # For so few columns a call costs more than it saves; without them oneDNN has no fast kernel either.
        small = min(self.weight.shape) < 32
        return self.on_cpu and self.dtype == torch.float32 and not small and n_rows <= _MOST_ROWS and _onednn_found()


def _onednn_found() -> bool:
    """Whether torch has oneDNN's product, which is the faster one of few rows by many columns."""
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    """A @ b.T of float32 [R, K] and [C, K]."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def _onednn_sum(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Writes a @ b.T + bias to out [R, C], as sums of few enough terms."""
    n_sums = -(-a.shape[1] // _LONGEST_SUM)
    total = None if bias is None else bias
    for left, right in zip(a.chunk(n_sums, 1), b.chunk(n_sums, 1), strict=True):
        # Of strided operands oneDNN has no fast kernel.
        part = _onednn(left.contiguous(), right.contiguous())
        total = part if total is None else part.add_(total)
    assert total is not None
    out.copy_(total)


class MixedProducts:
    """Products of half-precision operands on NVIDIA's tensor cores, which add up in float32 and hand it over.

    The gradient of the logits is rounded to half precision to be an operand.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype) -> None:
        # Under autocast the weight is float32, and its copy what torch.nn.functional.linear makes, too.
        self.weight = weight.to(compute_dtype)
        self.bias = None if bias is None else bias.float()
        self.bytes_per_logit = 4 + compute_dtype.itemsize
        self.wants_units = compute_dtype == torch.float16

    def bytes_besides(self, vocab_size: int) -> int:
        return 0

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        torch.ops.aten.mm.dtype_out(hidden.to(self.weight.dtype), self.weight.t(), torch.float32, out=out)
        if self.bias is not None:
            out += self.bias

    def operand(self, grad_logits: Tensor) -> Tensor:
        return padded_empty(grad_logits.shape[0], grad_logits.shape[1], self.weight.dtype, self.weight.device).copy_(
            grad_logits
        )

    def grad_hidden(self, grad_logits: Tensor, out: Tensor) -> None:
        torch.ops.aten.mm.dtype_out(grad_logits, self.weight, torch.float32, out=out)

    def grad_weight(self, grad_logits: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        hidden = hidden.to(self.weight.dtype)
        if not accumulate:
            torch.ops.aten.mm.dtype_out(grad_logits.t(), hidden, torch.float32, out=out)
        elif _adds_to_float32(hidden.dtype):
            torch.ops.aten.addmm.dtype_out(out, grad_logits.t(), hidden, torch.float32, out=out)
        else:
            for begin in range(0, len(out), _TILE):
                tile = slice(begin, begin + _TILE)
                out[tile] += torch.ops.aten.mm.dtype(grad_logits[:, tile].t(), hidden, torch.float32)


@functools.cache
def _adds_to_float32(dtype: torch.dtype) -> bool:
    """Whether products of this type can be added to float32: early releases of this `addmm` refuse it."""
    one = torch.ones((1, 1), dtype=dtype, device="cuda")
    try:
        torch.ops.aten.addmm.dtype(one.float(), one, one, torch.float32)
    except RuntimeError:
        return False
    return True


def padded_empty(n_rows: int, n_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor [n_rows, n_columns] whose rows begin at boundaries of 128 bytes, as fast BLAS kernels want them."""
    step = 128 // dtype.itemsize
    return torch.empty((n_rows, -(-n_columns // step) * step), dtype=dtype, device=device)[:, :n_columns]
