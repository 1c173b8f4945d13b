"""The operators of tokens' log-probabilities from hidden states, as those of `linear.ops`, and their derivatives.

    linear_token_logprobs   hidden, weight, bias -> logprobs, entropy, state, entropy_state   (1 matrix product)
    linear_logprobs_grad    the same, states, upstream gradients -> the gradients             (3 products)

The upstream gradient of a token's log-probability comes later than the forward, as that of a loss without a reduction:
backward computes the logits once more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixce_kernels import backends
from mixce_kernels.autocast import without_autocast
from mixce_kernels.backends.results import Results
from mixce_kernels.linear import chunks
from mixce_kernels.linear.autograd import NAMES, differentiable_grads, looped, wanted_grads
from mixce_kernels.linear.chunks import NO_GRADS, LinearCall
from mixce_kernels.linear.chunks import Grads as AllGrads
from mixce_kernels.linear.ops import (
    GRADS,
    add_up,
    columns_again,
    columns_of_chunks,
    empty_grads,
    flops_of_forward,
    flops_of_grads,
    wanted_of,
)
from mixce_kernels.logits.autograd import Grads
from mixce_kernels.logits.logprobs_ops import RESULTS, entropy_grad, logprob_results, returned
from mixce_kernels.operators import Differentiable, Operator, given


class LinearTokenLogprobs(NamedTuple):
    """The arguments of `linear_token_logprobs`; the call's mixture is LOGPROBS."""

    call: LinearCall
    temperature: Tensor | None  # [N]
    with_state: bool  # whether a gradient may follow
    with_entropy: bool


class LinearLogprobsGrad(NamedTuple):
    """The arguments of `linear_logprobs_grad`."""

    call: LinearCall
    temperature: Tensor | None  # [N]
    state: Tensor  # [STATE_WIDTH, N]
    entropy_state: Tensor | None  # [ENTROPY_STATE_WIDTH, N], with grad_entropy
    grad_logprobs: Tensor  # [] or [N]
    grad_entropy: Tensor | None  # [] or [N]
    wanted: list[bool]  # the gradients by hidden, weight and bias


def linear_token_logprobs(args: LinearTokenLogprobs) -> tuple[Tensor | None, ...]:
    call, results = args.call, _empty_results(args)
    with without_autocast(call.hidden):
        columns = columns_of_chunks(call, args.with_entropy, args.temperature)
        chunks.forward(call, columns, results, None, NO_GRADS, args.temperature, batch_invariant=True)
    return returned(results)


def linear_logprobs_grad(args: LinearLogprobsGrad) -> AllGrads:
    call, grads = args.call, empty_grads(args.call, args.wanted)
    wanted = wanted_of(grads, args.wanted)
    upstream = args.grad_logprobs.expand(call.targets.shape).double()
    entropy = entropy_grad(args.grad_entropy, args.entropy_state)
    with without_autocast(call.hidden):
        chunks.grad(
            call, columns_again(call), args.state, upstream, wanted, args.temperature, entropy, batch_invariant=True
        )
        add_up(call, wanted)
    return grads


def _empty_results(args: LinearTokenLogprobs) -> Results:
    like_logits = args.call.hidden.new_empty(0, dtype=args.call.dtype)
    return logprob_results(like_logits, args.call.targets, with_state=args.with_state, with_entropy=args.with_entropy)


LINEAR_TOKEN_LOGPROBS = Operator(linear_token_logprobs, RESULTS, lambda args: returned(_empty_results(args)))
LINEAR_LOGPROBS_GRAD = Operator(linear_logprobs_grad, GRADS, lambda args: empty_grads(args.call, args.wanted))
flops_of_forward(LINEAR_TOKEN_LOGPROBS)
flops_of_grads(LINEAR_LOGPROBS_GRAD)


def _context(ctx: Any, args: LinearTokenLogprobs, output: tuple[Tensor | None, ...]) -> None:
    _, entropy, *states = output
    without_grad = states if args.with_entropy else [entropy, *states]
    ctx.mark_non_differentiable(*[one for one in without_grad if one is not None])
    ctx.set_materialize_grads(False)
    LINEAR_TOKEN_LOGPROBS.fields.save(ctx, args, *states)


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_unused: None) -> Grads:
    if grad_logprobs is None and grad_entropy is None:
        return {}
    args, (state, entropy_state) = LINEAR_TOKEN_LOGPROBS.fields.saved(ctx)
    call, wanted = args.call, wanted_grads(ctx)
    if torch.is_grad_enabled():
        return _differentiable_grads(args, [grad_logprobs, grad_entropy], wanted)
    zero = call.hidden.new_zeros((), dtype=call.dtype)
    record = LinearLogprobsGrad(
        call, args.temperature, state, None if grad_entropy is None else given(entropy_state),
        zero if grad_logprobs is None else grad_logprobs, grad_entropy, wanted,
    )  # fmt: skip
    grads = LINEAR_LOGPROBS_GRAD.dispatched(*LINEAR_LOGPROBS_GRAD.fields.flat(record))
    return {
        name: grad.to(getattr(call, name).dtype) for name, grad, want in zip(NAMES, grads, wanted, strict=True) if want
    }


def _differentiable_grads(args: LinearTokenLogprobs, upstream: list[Tensor | None], wanted: list[bool]) -> Grads:
    """The gradients with a graph of their own, by PyTorch through the plain formula on all logits at once."""
    call = args.call
    vocabulary = backends.vocabulary(call.backend)

    def results_of(logits: Tensor) -> list[tuple[Tensor, Tensor]]:
        found = vocabulary.token_logprobs(logits, call.targets, args.temperature, call.options)
        return [(one, grad) for one, grad in zip(found, upstream, strict=True) if grad is not None]

    return differentiable_grads(call, results_of, wanted)


forward = Differentiable(LINEAR_TOKEN_LOGPROBS, _context, _backward, looped)
