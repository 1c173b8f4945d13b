"""The operators of the linear loss, as those of `logits.ops`: schema, and shapes for the compiler.

    linear_forward            hidden, weight, bias -> loss, state, stats, correct          (1 matrix product)
    linear_grad               hidden, weight, bias, state, grad_loss -> the gradients      (3 products)
    linear_forward_with_grad  both at once, for a sum of losses whose factors are known    (3 products)

Gradients are of the type of accumulation, [0] where not wanted. The loss of `linear_forward_with_grad` is that sum.
With the address of a shard as the backend, weight and bias are those of a rank's columns, and the gradient of the
hidden states is added up over the ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mixce_kernels.autocast import without_autocast
from mixce_kernels.backends.results import empty_results
from mixce_kernels.linear import chunks, tiles
from mixce_kernels.linear.chunks import Call, Grads
from mixce_kernels.logits.ops import ETA, OPTIONS, RESULTS, library
from mixce_kernels.options import TokenOptions, accumulate_dtype, check_targets_in_range
from mixce_kernels.parallel.agreement import Signature
from mixce_kernels.parallel.backend import Shard

_INPUTS = f"Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {ETA}, {OPTIONS}"
# How it is computed: the type of the products' operands, the chunks' memory, whether ignored rows are left out.
_HOW = "ScalarType compute_dtype, int? max_chunk_bytes, bool drop_ignored, str path, str backend"
_GRADS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"

library.define(f"linear_forward({_INPUTS}, {_HOW}, bool with_stats) -> ({RESULTS})")
library.define(f"linear_grad({_INPUTS}, {_HOW}, Tensor state, Tensor grad_loss, bool[3] wanted) -> ({_GRADS})")
library.define(
    f"linear_forward_with_grad({_INPUTS}, {_HOW}, bool with_stats, Tensor token_scale, bool[3] wanted)"
    f" -> ({RESULTS}, {_GRADS})"
)
N_SHARED = 16  # arguments of _INPUTS and _HOW


class Inputs:
    """The arguments that the operators share, in their schemas' order."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.hidden, self.weight, self.bias, self.targets, self.eta, self.eta_value = args[:6]
        self.options = TokenOptions(*args[6:11])
        self.compute_dtype, self.max_chunk_bytes, self.drop_ignored, self.path, self.backend = args[11:N_SHARED]
        self.backend_name, self.shard = Shard.of(self.backend)
        self.dtype = accumulate_dtype(self.compute_dtype)

    def call(self, nominal_columns: int | None = None) -> Call:
        """As the path "chunks" takes them."""
        return Call(
            self.hidden, self.weight, self.bias, self.targets, self.options, self.compute_dtype, self.max_chunk_bytes,
            self.drop_ignored, self.backend, nominal_columns,
        )  # fmt: skip

    def forward_call(self, with_stats: bool) -> Call:
        """The call of a forward, after its targets were checked where that is free, before anything is computed.

        Ranks that share the vocabulary meet once a chunk: they size it for the most columns of a rank, which they tell
        each other, or for an even split of a vocabulary whose size is known.

        Raises:
            IndexError: a target is out of range.
            ValueError: on every rank, where the ranks' calls do not fit together.
        """
        vocab_size, nominal = self.weight.shape[0], None
        if self.shard is not None:
            vocab_size, nominal = self.shard.whole(self._signature(self.shard, with_stats), self.weight)
        if self.backend_name == "cpu":
            check_targets_in_range(self.targets, self.options.ignore_index, vocab_size)
        return self.call(nominal)

    def backward_call(self) -> Call:
        """The call of a backward, in the chunks of the forward: a BLAS rounds the logits of other chunks otherwise.

        Probabilities are of these logits and the forward's sums, and a logit of 60 may differ by 8e-6.
        """
        if self.shard is None:
            return self.call()
        # Whether the calls fit together is known by now.
        shard = self.shard._replace(check_group=False)
        return self.call(shard.whole(self._signature(shard, False), self.weight)[1])

    def _signature(self, shard: Shard, with_stats: bool) -> Signature:
        tokens, hidden_size = self.hidden.shape
        eta = self.eta_value if self.eta is None else self.eta
        return shard.signature(
            self.weight.shape[0], tokens, self.compute_dtype, eta, self.options, with_stats, hidden_size=hidden_size,
            max_chunk_bytes=self.max_chunk_bytes,
        )  # fmt: skip

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """As the path "tiles" takes them: of one type, the last dimension contiguous."""
        hidden, weight = (one.to(self.compute_dtype) for one in (self.hidden, self.weight))
        hidden, weight = (one if one.stride(-1) == 1 else one.contiguous() for one in (hidden, weight))
        return hidden, weight, self.bias, self.targets

    def empty_results(self, with_stats: bool) -> tuple[Tensor, ...]:
        """Memory for loss, state and statistics."""
        return empty_results(self.hidden.new_empty(0, dtype=self.dtype), self.targets, with_stats)

    def empty_grads(self, wanted: list[bool]) -> list[Tensor]:
        """Memory for the gradients that are wanted, and [0] for the others."""
        return [
            self.hidden.new_empty(one.shape if want and one is not None else (0,), dtype=self.dtype)
            for one, want in zip((self.hidden, self.weight, self.bias), wanted, strict=True)
        ]

    def sum_hidden_grad(self, grad_hidden: Tensor) -> None:
        """Adds up what each rank's columns contribute to the gradient of hidden states that all of them have."""
        if self.shard is not None and grad_hidden.numel() > 0:
            dist.all_reduce(grad_hidden, group=self.shard.group)


# Inside of the operators no autocast may come between: their types are settled.


def linear_forward(*args: Any) -> tuple[Tensor, ...]:
    inputs, (with_stats,) = Inputs(args), args[N_SHARED:]
    results = inputs.empty_results(with_stats)
    with without_autocast(inputs.hidden):
        if inputs.path == "tiles":
            tiles.forward(*inputs.operands(), inputs.eta, inputs.eta_value, inputs.options, results)
        else:
            call = inputs.forward_call(with_stats)
            chunks.forward(call, inputs.eta, inputs.eta_value, results, None, (None, None, None))
    return results


def linear_grad(*args: Any) -> tuple[Tensor, ...]:
    inputs, (state, grad_loss, wanted) = Inputs(args), args[N_SHARED:]
    grads = inputs.empty_grads(wanted)
    with without_autocast(inputs.hidden):
        if inputs.path == "tiles":
            tiles.grad(*inputs.operands(), state, grad_loss, inputs.options, *_wanted(grads, wanted))
        else:
            chunks.grad(inputs.backward_call(), state, grad_loss, _wanted(grads, wanted))
            inputs.sum_hidden_grad(grads[0])
    return tuple(grads)


def linear_forward_with_grad(*args: Any) -> tuple[Tensor, ...]:
    inputs, (with_stats, token_scale, wanted) = Inputs(args), args[N_SHARED:]
    call = inputs.forward_call(with_stats)
    results = inputs.empty_results(with_stats)
    grads = inputs.empty_grads(wanted)
    with without_autocast(inputs.hidden):
        chunks.forward(call, inputs.eta, inputs.eta_value, results, token_scale, _wanted(grads, wanted))
        inputs.sum_hidden_grad(grads[0])
    loss, *others = results
    return _weighted_sum(loss, token_scale), *others, *grads


def _wanted(grads: list[Tensor], wanted: list[bool]) -> Grads:
    hidden, weight, bias = (one if want else None for one, want in zip(grads, wanted, strict=True))
    return hidden, weight, bias


def _weighted_sum(loss: Tensor, token_scale: Tensor) -> Tensor:
    return (loss * token_scale).sum(dtype=torch.float64)


for _kernel in (linear_forward, linear_grad, linear_forward_with_grad):
    library.impl(_kernel.__name__, _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("mixce_kernels::linear_forward", lib=library)
def _(*args: Any) -> tuple[Tensor, ...]:
    return Inputs(args).empty_results(*args[N_SHARED:])


@torch.library.register_fake("mixce_kernels::linear_grad", lib=library)
def _(*args: Any) -> tuple[Tensor, ...]:
    return tuple(Inputs(args).empty_grads(args[-1]))


@torch.library.register_fake("mixce_kernels::linear_forward_with_grad", lib=library)
def _(*args: Any) -> tuple[Tensor, ...]:
    inputs, (with_stats, token_scale, wanted) = Inputs(args), args[N_SHARED:]
    loss, *others = inputs.empty_results(with_stats)
    return _weighted_sum(loss, token_scale), *others, *inputs.empty_grads(wanted)


# What `torch.utils.flop_counter.FlopCounterMode` counts: products of all rows, as torch.nn.functional.linear's.


@register_flop_formula(torch.ops.mixce_kernels.linear_forward)
def _(hidden_shape: torch.Size, weight_shape: torch.Size, *_args: Any, **_others: Any) -> int:
    return 2 * math.prod(hidden_shape) * weight_shape[0]


@register_flop_formula([torch.ops.mixce_kernels.linear_grad, torch.ops.mixce_kernels.linear_forward_with_grad])
def _(hidden_shape: torch.Size, weight_shape: torch.Size, *args: Any, **_others: Any) -> int:
    wants_hidden, wants_weight, _ = args[-1]
    return 2 * math.prod(hidden_shape) * weight_shape[0] * (1 + wants_hidden + wants_weight)
