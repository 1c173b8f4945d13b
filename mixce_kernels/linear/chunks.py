"""The linear loss in chunks of rows: the logits of a chunk exist, in memory of a bounded size, and no others.

A chunk's logits come from the BLAS, a backend's row kernel turns them into losses and, in place, into their gradient,
and the BLAS makes the gradients of hidden states and weight from that: three products of N D V multiplications each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mixce_kernels import backends
from mixce_kernels.backends.results import EntropyGrad, Results, empty_results
from mixce_kernels.linear.matmul import Products, padded_empty, products
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions, accumulate_dtype
from mixce_kernels.reduction import NO_REDUCTION, Reduction

# Where the caller names no budget: on a GPU for a thousand rows, at which reading the weight and adding to its gradient
# takes less time than multiplying, on a CPU for about a hundred.
CHUNK_BYTES = {"cpu": 44 * 2**20, "cuda": 2**30}
# MKL multiplies fewer rows otherwise than more, float32 below 16 and float64 below 4: a token's log-probability would
# depend on how many others there are.
LEAST_ROWS = {"cpu": 16}


class Grads(NamedTuple):
    """The gradients by hidden states, weight and bias, in the type of accumulation; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


NO_GRADS = Grads(None, None, None)


class LinearCall(NamedTuple):
    """What the operators on hidden states share: tensors, options, and how it is computed."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N]
    mixture: Mixture  # of [N]
    options: TokenOptions
    reduction: Reduction
    compute_dtype: torch.dtype  # of the products' operands
    max_chunk_bytes: int | None
    drop_ignored: bool  # whether ignored rows leave the products
    path: str
    backend: str  # what `backends.vocabulary` takes

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, losses and gradients while they are added up."""
        return accumulate_dtype(self.compute_dtype)

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Hidden states, weight, bias and targets as the path "tiles" takes them: of one type, rows contiguous."""
        hidden, weight = (one.to(self.compute_dtype) for one in (self.hidden, self.weight))
        hidden, weight = (one if one.stride(-1) == 1 else one.contiguous() for one in (hidden, weight))
        return hidden, weight, self.bias, self.targets


def default_chunk_bytes(weight: Tensor, columns: int) -> int:
    """The budget where the caller names none, of a weight [.., D] with so many columns of logits.

    On a CPU matrix units for half precision leave little time to read a weight and its float32 gradient, which is held
    beside anyway: a chunk may then take half as much memory as that.
    """
    least = CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cuda"])
    half = weight.device.type == "cpu" and accumulate_dtype(weight.dtype) != weight.dtype
    return max(least, 2 * columns * weight.shape[1]) if half else least


def rows_per_chunk(n_rows: int, vocab_size: int, bytes_per_logit: int, max_bytes: int) -> int:
    """Rows of each chunk, the last one excepted: as few chunks as the bytes allow, of equal size; at least one row."""
    most = max(max_bytes // (bytes_per_logit * vocab_size), 1)
    n_chunks = max(-(-n_rows // most), 1)
    rows = -(-n_rows // n_chunks)
    # Products are faster with a multiple of 8.
    return max(min(-(-rows // 8) * 8, most, n_rows), 1)


def forward(
    call: LinearCall,
    columns: int,
    results: Results,  # of N tokens: losses, state and statistics are written
    token_scale: Tensor | None,  # float64 [] or [N], with grads; None: 1
    grads: Grads,  # written, of sum(token_scale * losses)
    temperature: Tensor | None = None,  # [N]
    *,
    batch_invariant: bool = False,  # whether a token's numbers must not depend on the others', as far as can be had
) -> None:
    """Losses, state and statistics of the tokens, and the gradients of their weighted sum that are wanted.

    Chunks are sized for `columns`: whoever has another part of the vocabulary must have as many chunks.
    """
    kernels = backends.vocabulary(call.backend).kernels
    wants_grads = any(one is not None for one in grads)
    chunks = _Chunks(call, columns, token_scale, grads, batch_invariant=batch_invariant)
    of_tokens = _of_tokens(results)
    if chunks.kept is not None:
        for one in of_tokens:
            one.zero_()
    for chunk in chunks:
        part = empty_results(
            chunk.logits,
            chunk.targets,
            NO_REDUCTION,
            with_state=results.state is not None,
            with_stats=results.stats is not None,
            with_entropy_state=results.entropy_state is not None,
        )
        grad_logits = chunk.logits if wants_grads else None
        kernels.forward(
            chunk.logits, chunk.targets, call.mixture.of_rows(chunk.rows), call.options, NO_REDUCTION, part,
            chunk.scale, grad_logits, chunk.of_each(temperature), may_split=not batch_invariant,
        )  # fmt: skip
        for one, its_part in zip(of_tokens, _of_tokens(part), strict=True):
            one[..., chunk.rows] = its_part
        if grad_logits is not None:
            chunks.add_grads(chunk)
    chunks.finish_grads()


def grad(
    call: LinearCall,
    columns: int,
    state: Tensor,  # [STATE_WIDTH, N]
    upstream: Tensor,  # [N]
    grads: Grads,  # written
    temperature: Tensor | None = None,  # [N]
    entropy: EntropyGrad | None = None,  # of [N]
    *,
    batch_invariant: bool = False,  # as in the forward
) -> None:
    """The gradients of sum(upstream * losses), from the state of the forward; the logits are computed once more.

    With `entropy` those of sum(entropy.upstream * entropies) are among them.
    """
    kernels = backends.vocabulary(call.backend).kernels
    chunks = _Chunks(call, columns, upstream, grads, entropy, batch_invariant=batch_invariant)
    for chunk in chunks:
        chunk_state = chunk.of(state).contiguous()
        kernels.logits_grad(
            chunk.logits, chunk.targets, chunk_state, None, chunk.scale, call.options, chunk.logits,
            chunk.of_each(temperature), chunk.entropy,
        )  # fmt: skip
        chunks.add_grads(chunk)
    chunks.finish_grads()


def _of_tokens(results: Results) -> list[Tensor]:
    """The results that have an entry a token."""
    found = (results.losses, results.state, results.stats, results.correct, results.entropy_state)
    return [one for one in found if one is not None]


class _Chunk(NamedTuple):
    """Some rows: a range of all, or those that an index names."""

    rows: slice | Tensor
    hidden: Tensor  # [R, D], finite where ignored
    targets: Tensor  # [R]
    scale: Tensor | None  # [R] float64, the upstream gradient; None: 1
    logits: Tensor  # [R, V]
    entropy: EntropyGrad | None

    def of(self, per_token: Tensor) -> Tensor:
        """The chunk's part of a tensor [..., N]."""
        return per_token[..., self.rows]

    def of_each(self, per_token: Tensor | None) -> Tensor | None:
        """The same of one that may be missing."""
        return None if per_token is None else self.of(per_token)


class _Chunks:
    """The chunks of a call, each with its logits; their gradients, once they are made, are added up here."""

    def __init__(
        self,
        call: LinearCall,
        columns: int,
        scale: Tensor | None,  # [] or [N], the upstream gradient of the losses; None: 1
        grads: Grads,
        entropy: EntropyGrad | None = None,
        *,
        batch_invariant: bool = False,
    ) -> None:
        self.call = call
        self.least_rows = LEAST_ROWS.get(call.weight.device.type, 1) if batch_invariant else 1
        self.columns = max(columns, 1)
        self.scale = None if scale is None else scale.expand(call.targets.shape)
        self.grad_hidden, self.grad_weight, self.grad_bias = grads
        self.budget = call.max_chunk_bytes or default_chunk_bytes(call.weight, self.columns)
        self.products: Products = products(
            call.weight, call.bias, call.compute_dtype, self.budget // 2, call.hidden.dtype
        )
        self.valid = call.targets != call.options.ignore_index
        # The rows that are not ignored, where others are left out; None: all rows are taken.
        self.kept: Tensor | None = None
        if call.drop_ignored:
            kept = self.valid.nonzero().squeeze(-1)
            self.kept = kept if len(kept) < len(call.targets) else None
        self.unit: Tensor | None = None
        self.entropy = entropy
        if self.scale is not None and self.scale.numel() > 0 and self.products.wants_units:
            largest = self._largest(self.scale)
            if entropy is not None:
                largest = torch.maximum(largest, self._largest(entropy.upstream).to(largest.dtype))
            self.unit = torch.where(largest == 0, 1.0, largest)
            self.scale = self.scale / self.unit
            if entropy is not None:
                upstream = (entropy.upstream / self.unit).to(entropy.upstream.dtype)
                self.entropy = entropy._replace(upstream=upstream)
        self.count = 0

    def __iter__(self) -> Iterator[_Chunk]:
        call = self.call
        n_rows = len(call.targets if self.kept is None else self.kept)
        vocab_size = call.weight.shape[0]
        budget = self.budget - self.products.bytes_besides(self.columns)
        size = rows_per_chunk(n_rows, self.columns, self.products.bytes_per_logit, budget)
        most = max(budget // (self.products.bytes_per_logit * self.columns), 1)
        least = min(self.least_rows, most)
        buffer = padded_empty(max(min(size, n_rows), least), vocab_size, call.dtype, call.hidden.device)
        for begin in range(0, n_rows, size):
            rows: slice | Tensor = slice(begin, min(begin + size, n_rows))
            rows = rows if self.kept is None else self.kept[rows]
            hidden = call.hidden[rows]
            if not call.drop_ignored:
                # Whatever stands in an ignored row, 0 * it must be 0 in the weight's gradient.
                hidden = torch.where(self.valid[rows].unsqueeze(-1), hidden, 0.0)
            logits = buffer[: len(hidden)]
            if len(hidden) < least:
                zeros = hidden.new_zeros(least - len(hidden), hidden.shape[1])
                self.products.logits(torch.cat((hidden, zeros)), buffer[:least])
            else:
                self.products.logits(hidden, logits)
            scale = None if self.scale is None else self.scale[rows]
            yield _Chunk(rows, hidden, call.targets[rows], scale, logits, self._entropy_of(rows))

    def _largest(self, upstream: Tensor) -> Tensor:
        """The largest magnitude of what is finite: other rows must not meet an infinity."""
        return torch.where(self.valid & upstream.isfinite(), upstream.abs(), 0.0).amax()

    def _entropy_of(self, rows: slice | Tensor) -> EntropyGrad | None:
        if self.entropy is None:
            return None
        upstream, state = self.entropy
        return EntropyGrad(upstream.expand(self.call.targets.shape)[rows], state[:, rows])

    def add_grads(self, chunk: _Chunk) -> None:
        """Adds those of a chunk whose logits have become their gradient."""
        if self.grad_bias is not None:
            total = chunk.logits.sum(0)
            self.grad_bias.copy_(total if self.count == 0 else total + self.grad_bias)
        # An operand may take the memory of what it is made of.
        grad_logits = self.products.operand(chunk.logits)
        if self.grad_hidden is not None and isinstance(chunk.rows, slice):
            self.products.grad_hidden(grad_logits, self.grad_hidden[chunk.rows])
        elif self.grad_hidden is not None:
            part = self.grad_hidden.new_empty(chunk.hidden.shape)
            self.products.grad_hidden(grad_logits, part)
            self.grad_hidden[chunk.rows] = part
        if self.grad_weight is not None:
            self.products.grad_weight(grad_logits, chunk.hidden, self.grad_weight, accumulate=self.count > 0)
        self.count += 1

    def finish_grads(self) -> None:
        """Completes the sums: zeros where nothing was added, and the unit."""
        if self.kept is not None and self.grad_hidden is not None:
            self.grad_hidden[~self.valid] = 0.0
        for one in (self.grad_hidden, self.grad_weight, self.grad_bias):
            if one is not None and self.count == 0:
                one.zero_()
            elif one is not None and self.unit is not None:
                one.mul_(self.unit)
