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
# Of so few rows MKL adds up the terms of a product one after another: a sum over the vocabulary would lose two digits.
_FEW_ROWS = 3
_SHORT_SUM = 512


class Products(Protocol):
    """The products with one weight and bias."""

    # Memory that a chunk takes for each of its logits, and beside them.
    bytes_per_logit: int
    bytes_besides: int
    # Whether the gradient of the logits is rounded to float16, which holds only what is near 1.
    wants_units: bool

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """Writes hidden [R, D] @ weight.T + bias to out [R, V]."""

    def operand(self, grad_logits: Tensor) -> Tensor:
        """The gradient of the logits [R, V] as the two products below take it."""

    def grad_hidden(self, grad_logits: Tensor, out: Tensor) -> None:
        """Writes grad_logits [R, V] @ weight to out [R, D]."""

    def grad_weight(self, grad_logits: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        """Writes grad_logits.T @ hidden to out [V, D], or adds it."""


def products(weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype) -> Products:
    """The products with a weight [V, D] and a bias [V] or None, with operands rounded to `compute_dtype`."""
    half = accumulate_dtype(compute_dtype) != compute_dtype
    if half and weight.is_cuda and torch.version.hip is None and hasattr(torch.ops.aten.mm, "dtype_out"):
        return MixedProducts(weight, bias, compute_dtype)
    return TiledProducts(weight, bias, compute_dtype)


class TiledProducts:
    """Products of float32 or float64 operands; a weight of another type is converted tile by tile."""

    def __init__(self, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype) -> None:
        self.weight = weight
        self.compute_dtype = compute_dtype
        self.dtype = accumulate_dtype(compute_dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        vocab_size, hidden_size = weight.shape
        converted = weight.dtype != self.dtype
        # A GPU's BLAS chooses its own tiles.
        self.tile = _TILE if converted or weight.device.type == "cpu" else vocab_size
        self.bytes_per_logit = self.dtype.itemsize
        self.wants_units = False
        self.bytes_besides = converted * self.tile * hidden_size * (self.dtype.itemsize + compute_dtype.itemsize)

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        hidden = self._operand(hidden)
        for columns, weight in self._tiles(self.tile):
            if self.bias is None:
                torch.mm(hidden, weight.t(), out=out[:, columns])
            else:
                torch.addmm(self.bias[columns], hidden, weight.t(), out=out[:, columns])

    def operand(self, grad_logits: Tensor) -> Tensor:
        return grad_logits

    def grad_hidden(self, grad_logits: Tensor, out: Tensor) -> None:
        few = len(grad_logits) <= _FEW_ROWS and self.weight.device.type == "cpu"
        if not few and self.weight.dtype == self.dtype == self.compute_dtype:
            torch.mm(grad_logits, self.weight, out=out)
            return
        out.zero_()
        for columns, weight in self._tiles(_SHORT_SUM if few else self.tile):
            out += torch.mm(grad_logits[:, columns], weight)

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


class MixedProducts:
    """Products of half-precision operands on NVIDIA's tensor cores, which add up in float32 and hand it over.

    The gradient of the logits is rounded to half precision to be an operand.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype) -> None:
        # Under autocast the weight is float32, and its copy what torch.nn.functional.linear makes, too.
        self.weight = weight.to(compute_dtype)
        self.bias = None if bias is None else bias.float()
        self.bytes_per_logit = 4 + compute_dtype.itemsize
        self.bytes_besides = 0
        self.wants_units = compute_dtype == torch.float16

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
