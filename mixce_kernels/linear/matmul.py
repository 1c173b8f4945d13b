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

from mixce_kernels.linear import mkl
from mixce_kernels.options import accumulate_dtype

# Rows of the weight in a tile: with their logits they stay in a CPU's caches, and their float32 copy is small.
_TILE = 2048
# MKL packs what it multiplies, for some shapes the whole weight: of so many rows its copy is small, and it as fast.
_MKL_TILE = 8192
# A BLAS of a CPU may add up the terms of a product one after another (oneDNN does, MKL for up to three rows): longer
# sums, as those over the vocabulary, are made of sums of so many terms.
_LONGEST_SUM = 512
_ROWS_OF_LONG_SUMS = 4
# The same for the terms of a logit on AMX, whose sums are of single products.
_LONGEST_SUM_OF_TILES = 1024
# Bytes of a chunk's logits that are rounded at a time.
_ROUNDED_BYTES = 2**21
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


def products(
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    compute_dtype: torch.dtype,
    max_bytes: int,
    hidden_dtype: torch.dtype,
) -> Products:
    """The products with a weight and a bias, of hidden states of that type, with operands rounded to `compute_dtype`.

    A weight that must be converted is converted in tiles of at most `max_bytes`, but at least one row.
    """
    half = accumulate_dtype(compute_dtype) != compute_dtype
    if half and weight.is_cuda and torch.version.hip is None and hasattr(torch.ops.aten.mm, "dtype_out"):
        return MixedProducts(weight, bias, compute_dtype)
    # Where autocast rounds one operand, its gradient is float32, and on a CPU not rounded on its way.
    all_half = hidden_dtype == weight.dtype == compute_dtype == torch.bfloat16
    if all_half and weight.device.type == "cpu" and mkl.has_bfloat16() and mkl.takes(weight):
        return MklProducts(weight, bias)
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
        most = _MKL_TILE if mkl.is_fast() and not self.converted else _TILE
        tile = min(most, vocab_size) if self.converted or self.on_cpu else vocab_size
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
        adds_in_order = self.on_cpu and not (mkl.is_fast() and len(grad_logits) >= _ROWS_OF_LONG_SUMS)
        if not (adds_in_order or self.converted):
            torch.mm(grad_logits, self.weight, out=out)
            return
        onednn = self._has_onednn(len(grad_logits))
        out.zero_()
        for columns, weight in self._tiles(min(self.tile, _LONGEST_SUM) if adds_in_order else self.tile):
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
        return (
            self.on_cpu and self.dtype == torch.float32 and not small and n_rows <= _MOST_ROWS and _onednn_is_faster()
        )


def _onednn_is_faster() -> bool:
    """Whether torch has oneDNN's product, and MKL leaves it vectors that it does not use itself."""
    found = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return found and not mkl.is_fast()


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


class MklProducts:
    """Products of bfloat16 operands on a CPU's matrix units, with float32 results, as `MixedProducts`.

    The gradient of the logits is rounded within their memory: no chunk takes more than its float32 logits.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight  # bfloat16, as `mkl.takes` it
        self.bias = None if bias is None else bias.float()
        self.bytes_per_logit = 4
        self.wants_units = False

    def bytes_besides(self, vocab_size: int) -> int:
        return 0

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        hidden = self._operand(hidden)
        first, *others = self.weight.split(_LONGEST_SUM_OF_TILES, 1)
        mkl.multiply(hidden[:, : first.shape[1]], first.t(), out)
        for index, terms in enumerate(others, 1):
            of_hidden = hidden[:, index * _LONGEST_SUM_OF_TILES :][:, : terms.shape[1]]
            for columns, weight in zip(out.split(_TILE, 1), terms.split(_TILE), strict=True):
                part = torch.empty_like(columns, memory_format=torch.contiguous_format)
                mkl.multiply(of_hidden, weight.t(), part)
                columns += part
        if self.bias is not None:
            out += self.bias

    def operand(self, grad_logits: Tensor) -> Tensor:
        """In the first half of each row's memory."""
        rounded = grad_logits.view(torch.bfloat16)[:, : grad_logits.shape[1]]
        rows = max(_ROUNDED_BYTES // (2 * max(grad_logits.shape[1], 1)), 1)
        for part, its_rounded in zip(grad_logits.split(rows), rounded.split(rows), strict=True):
            its_rounded.copy_(part.bfloat16())
        return rounded

    def grad_hidden(self, grad_logits: Tensor, out: Tensor) -> None:
        mkl.multiply(grad_logits, self.weight, out)

    def grad_weight(self, grad_logits: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        mkl.multiply(grad_logits.t(), self._operand(hidden), out, accumulate=accumulate)

    def _operand(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.weight.dtype)
        return hidden if mkl.takes(hidden) else hidden.contiguous()


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
