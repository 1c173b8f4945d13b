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
from mixce_kernels.backends.vocabulary import CallFacts, Vocabulary
from mixce_kernels.checks import check_targets_in_range
from mixce_kernels.linear import chunks, tiles
from mixce_kernels.linear.chunks import Grads, LinearCall
from mixce_kernels.logits.ops import RESULTS
from mixce_kernels.operators import Operator

_GRADS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"


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
            chunks.forward(call, _columns_of_chunks(args), results, None, Grads(None, None, None))
    _reduce(args, results)
    return results.returned()


def linear_grad(args: LinearGrad) -> Grads:
    call, grads = args.call, _empty_grads(args)
    wanted = _wanted(grads, args)
    upstream = args.grad_loss if args.token_scale is None else args.grad_loss * args.token_scale
    upstream = upstream.expand(call.targets.shape)
    with without_autocast(call.hidden):
        if call.path == "tiles":
            tiles.grad(*call.operands(), args.state, upstream, call.options, *wanted)
        else:
            # In the chunks of the forward: a BLAS rounds the logits of other chunks otherwise. Probabilities are of
            # these logits and the forward's sums, and a logit of 60 may differ by 8e-6.
            _, columns = _vocabulary(args).sizes(_facts(call, with_stats=False), call.weight, again=True)
            chunks.grad(call, columns, args.state, upstream.double(), wanted)
            _add_up(args, wanted)
    return grads


def linear_forward_with_grad(args: LinearForwardWithGrad) -> tuple[Tensor | None, ...]:
    call = args.call
    columns = _columns_of_chunks(args)
    results, grads = _empty_results(args).with_losses(call.targets), _empty_grads(args)
    wanted = _wanted(grads, args)
    token_scale = results.token_scale
    if token_scale is not None:
        _vocabulary(args).kernels.reduce(
            call.targets, call.options.ignore_index, call.reduction, None, None, token_scale
        )
    with without_autocast(call.hidden):
        chunks.forward(call, columns, results, token_scale, wanted)
        _add_up(args, wanted)
    _reduce(args, results._replace(token_scale=None))
    return *results.returned(), *grads


_Arguments = LinearForward | LinearGrad | LinearForwardWithGrad


def _vocabulary(args: _Arguments) -> Vocabulary:
    return backends.vocabulary(args.call.backend)


def _columns_of_chunks(args: LinearForward | LinearForwardWithGrad) -> int:
    """What chunks are sized for, after a check of the targets where that is free, before anything is computed.

    Raises:
        IndexError: a target is out of range.
        ValueError: the vocabulary has other parts, and their calls are not this one.
    """
    call, vocabulary = args.call, _vocabulary(args)
    vocab_size, columns = vocabulary.sizes(_facts(call, args.with_stats), call.weight)
    if vocabulary.kernels.checks_targets:
        check_targets_in_range(call.targets, call.options.ignore_index, vocab_size)
    return columns


def _facts(call: LinearCall, with_stats: bool) -> CallFacts:
    tokens, hidden_size = call.hidden.shape
    return CallFacts(
        tokens, call.compute_dtype, call.mixture, call.options, with_stats, hidden_size, call.max_chunk_bytes
    )  # fmt: skip


def _empty_results(args: LinearForward | LinearForwardWithGrad) -> Results:
    call = args.call
    like_logits = call.hidden.new_empty(0, dtype=call.dtype)
    return empty_results(like_logits, call.targets, call.reduction, with_state=True, with_stats=args.with_stats)


def _reduce(args: LinearForward | LinearForwardWithGrad, results: Results) -> None:
    call = args.call
    if not call.reduction.is_identity:
        _vocabulary(args).kernels.reduce(
            call.targets, call.options.ignore_index, call.reduction, results.losses, results.loss, results.token_scale
        )


def _empty_grads(args: LinearGrad | LinearForwardWithGrad) -> Grads:
    """Memory for the gradients that are wanted, and [0] for the others."""
    call = args.call
    return Grads(
        *(
            call.hidden.new_empty(one.shape if want and one is not None else (0,), dtype=call.dtype)
            for one, want in zip((call.hidden, call.weight, call.bias), args.wanted, strict=True)
        )
    )


def _wanted(grads: Grads, args: LinearGrad | LinearForwardWithGrad) -> Grads:
    """The gradients that are wanted, None for the others."""
    return Grads(*(one if want else None for one, want in zip(grads, args.wanted, strict=True)))


def _add_up(args: LinearGrad | LinearForwardWithGrad, grads: Grads) -> None:
    """Completes the gradient of the hidden states, where other columns add to it."""
    if grads.hidden is not None:
        _vocabulary(args).add_up(grads.hidden)


LINEAR_FORWARD = Operator(linear_forward, RESULTS, lambda args: _empty_results(args).returned())
LINEAR_GRAD = Operator(linear_grad, _GRADS, _empty_grads)
LINEAR_FORWARD_WITH_GRAD = Operator(
    linear_forward_with_grad,
    f"{RESULTS}, {_GRADS}",
    lambda args: (*_empty_results(args).returned(), *_empty_grads(args)),
)


# What `torch.utils.flop_counter.FlopCounterMode` counts, products of all rows, as those of torch.nn.functional.linear.
# It hands over shapes for the tensors.


@register_flop_formula(LINEAR_FORWARD.dispatched)
def _(*shapes: Any, **_others: Any) -> int:
    call: Any = LINEAR_FORWARD.fields.of(shapes).call
    return 2 * math.prod(call.hidden) * int(call.weight[0])


def _flops_of_grads(operator: Operator[Any]) -> None:
    @register_flop_formula(operator.dispatched)
    def _(*shapes: Any, **_others: Any) -> int:
        args = operator.fields.of(shapes)
        wants_hidden, wants_weight, _ = args.wanted
        return 2 * math.prod(args.call.hidden) * args.call.weight[0] * (1 + wants_hidden + wants_weight)


_flops_of_grads(LINEAR_GRAD)
_flops_of_grads(LINEAR_FORWARD_WITH_GRAD)
