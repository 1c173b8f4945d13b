"""The operators of the linear loss, as those of `logits.ops`: their arguments, and the shapes of their results.

    linear_forward            hidden, weight, bias -> loss, token_scale, state, stats, correct       (1 matrix product)
    linear_grad               hidden, weight, bias, state, upstream gradient -> the gradients        (3 products)
    linear_forward_with_grad  both at once, for a loss that is one number, its upstream gradient 1   (3 products)

Gradients are of the type of accumulation, [0] where not wanted.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mixce_kernels import backends
from mixce_kernels.autocast import without_autocast
from mixce_kernels.backends.results import Results, empty_results
from mixce_kernels.backends.vocabulary import CallFacts
from mixce_kernels.checks import check_targets_in_range
from mixce_kernels.linear import chunks, tiles
from mixce_kernels.linear.chunks import NO_GRADS, Grads, LinearCall
from mixce_kernels.logits.ops import RESULTS
from mixce_kernels.operators import Operator

GRADS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"


class LinearForward(NamedTuple):
    """The arguments of `linear_forward`."""

    call: LinearCall
    with_stats: bool


class LinearGrad(NamedTuple):
    """The arguments of `linear_grad`."""

    call: LinearCall
    state: Tensor  # [STATE_WIDTH, N]
    grad_loss: Tensor  # [] or [N]
    token_scale: Tensor | None  # [] or [N]
    wanted: list[bool]  # the gradients by hidden, weight and bias


class LinearForwardWithGrad(NamedTuple):
    """The arguments of `linear_forward_with_grad`."""

    call: LinearCall
    with_stats: bool
    wanted: list[bool]  # the gradients by hidden, weight and bias


# Inside of the operators no autocast may come between: their types are settled.


def linear_forward(args: LinearForward) -> tuple[Tensor | None, ...]:
    call, results = args.call, _empty_results(args).with_losses(args.call.targets)
    with without_autocast(call.hidden):
        if call.path == "tiles":
            tiles.forward(*call.operands(), call.mixture, call.options, results)
        else:
            chunks.forward(call, columns_of_chunks(call, args.with_stats), results, None, NO_GRADS)
    _reduce(args, results)
    return results.returned()


def linear_grad(args: LinearGrad) -> Grads:
    call, grads = args.call, empty_grads(args.call, args.wanted)
    wanted = wanted_of(grads, args.wanted)
    upstream = args.grad_loss if args.token_scale is None else args.grad_loss * args.token_scale
    upstream = upstream.expand(call.targets.shape)
    with without_autocast(call.hidden):
        if call.path == "tiles":
            tiles.grad(*call.operands(), args.state, upstream, call.options, *wanted)
        else:
            chunks.grad(call, columns_again(call), args.state, upstream.double(), wanted)
            add_up(call, wanted)
    return grads


def linear_forward_with_grad(args: LinearForwardWithGrad) -> tuple[Tensor | None, ...]:
    call = args.call
    columns = columns_of_chunks(call, args.with_stats)
    results, grads = _empty_results(args).with_losses(call.targets), empty_grads(call, args.wanted)
    wanted = wanted_of(grads, args.wanted)
    token_scale = results.token_scale
    if token_scale is not None:
        backends.vocabulary(call.backend).kernels.reduce(
            call.targets, call.options.ignore_index, call.reduction, None, None, token_scale
        )
    with without_autocast(call.hidden):
        chunks.forward(call, columns, results, token_scale, wanted)
        add_up(call, wanted)
    _reduce(args, results._replace(token_scale=None))
    return *results.returned(), *grads


def columns_of_chunks(call: LinearCall, with_stats: bool, temperature: Tensor | None = None) -> int:
    """What chunks are sized for, after a check of the targets where that is free, before anything is computed.

    Raises:
        IndexError: a target is out of range.
        ValueError: the vocabulary has other parts, and their calls are not this one.
    """
    vocabulary = backends.vocabulary(call.backend)
    vocab_size, columns = vocabulary.sizes(_facts(call, with_stats, temperature), call.weight)
    if vocabulary.kernels.checks_targets:
        check_targets_in_range(call.targets, call.options.ignore_index, vocab_size)
    return columns


def columns_again(call: LinearCall) -> int:
    """What the chunks of the forward were sized for, whose logits a backward computes once more.

    A BLAS rounds the logits of other chunks otherwise. Probabilities are of these logits and the forward's sums, and a
    logit of 60 may differ by 8e-6.
    """
    _, columns = backends.vocabulary(call.backend).sizes(_facts(call, False, None), call.weight, again=True)
    return columns


def _facts(call: LinearCall, with_stats: bool, temperature: Tensor | None) -> CallFacts:
    tokens, hidden_size = call.hidden.shape
    return CallFacts(
        tokens, call.compute_dtype, call.mixture, call.options, with_stats, hidden_size, call.max_chunk_bytes,
        temperature,
    )  # fmt: skip


def _empty_results(args: LinearForward | LinearForwardWithGrad) -> Results:
    call = args.call
    like_logits = call.hidden.new_empty(0, dtype=call.dtype)
    return empty_results(like_logits, call.targets, call.reduction, with_state=True, with_stats=args.with_stats)


def _reduce(args: LinearForward | LinearForwardWithGrad, results: Results) -> None:
    call = args.call
    if not call.reduction.is_identity:
        backends.vocabulary(call.backend).kernels.reduce(
            call.targets, call.options.ignore_index, call.reduction, results.losses, results.loss, results.token_scale
        )


def empty_grads(call: LinearCall, wanted: list[bool]) -> Grads:
    """Memory for the gradients that are wanted, and [0] for the others."""
    return Grads(
        *(
            call.hidden.new_empty(one.shape if want and one is not None else (0,), dtype=call.dtype)
            for one, want in zip((call.hidden, call.weight, call.bias), wanted, strict=True)
        )
    )


def wanted_of(grads: Grads, wanted: list[bool]) -> Grads:
    """The gradients that are wanted, None for the others."""
    return Grads(*(one if want else None for one, want in zip(grads, wanted, strict=True)))


def add_up(call: LinearCall, grads: Grads) -> None:
    """Completes the gradient of the hidden states, where other columns add to it."""
    if grads.hidden is not None:
        backends.vocabulary(call.backend).add_up(grads.hidden)


LINEAR_FORWARD = Operator(linear_forward, RESULTS, lambda args: _empty_results(args).returned())
LINEAR_GRAD = Operator(linear_grad, GRADS, lambda args: empty_grads(args.call, args.wanted))
LINEAR_FORWARD_WITH_GRAD = Operator(
    linear_forward_with_grad,
    f"{RESULTS}, {GRADS}",
    lambda args: (*_empty_results(args).returned(), *empty_grads(args.call, args.wanted)),
)


# What `torch.utils.flop_counter.FlopCounterMode` counts, products of all rows, as those of torch.nn.functional.linear.
# It hands over shapes for the tensors.


def flops_of_forward(operator: Operator[Any]) -> None:
    """Has an operator on a `call` counted as one product."""

    @register_flop_formula(operator.dispatched)
    def _(*shapes: Any, **_others: Any) -> int:
        call = operator.fields.of(shapes).call
        return 2 * math.prod(call.hidden) * int(call.weight[0])


def flops_of_grads(operator: Operator[Any]) -> None:
    """Has an operator on a `call` counted as one product, and one more for each gradient that is `wanted`."""

    @register_flop_formula(operator.dispatched)
    def _(*shapes: Any, **_others: Any) -> int:
        args = operator.fields.of(shapes)
        wants_hidden, wants_weight, _ = args.wanted
        return 2 * math.prod(args.call.hidden) * args.call.weight[0] * (1 + wants_hidden + wants_weight)


flops_of_forward(LINEAR_FORWARD)
flops_of_grads(LINEAR_GRAD)
flops_of_grads(LINEAR_FORWARD_WITH_GRAD)
