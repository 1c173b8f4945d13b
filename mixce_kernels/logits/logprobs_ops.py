"""The operators of tokens' log-probabilities and entropies, and their derivatives.

    token_logprobs   logits -> logprobs, entropy, state, entropy_state       (one read of the logits)
    logprobs_grad    logits, states, upstream gradients -> grad_logits       (one read, one write)

A log-probability is the loss of a token whose weight is -1, and the kernels are those of the loss: `logits.ops`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mixce_kernels import backends
from mixce_kernels.backends.layout import materialized
from mixce_kernels.backends.results import EntropyGrad, Results, empty_results
from mixce_kernels.logits.autograd import Grads, folded
from mixce_kernels.logits.overwriting import Overwrite
from mixce_kernels.mixture import Mixture
from mixce_kernels.operators import Differentiable, Operator, given, is_plain
from mixce_kernels.options import TokenOptions
from mixce_kernels.reduction import NO_REDUCTION
from mixce_kernels.weightings import KINDS, Given

RESULTS = "Tensor logprobs, Tensor entropy, Tensor state, Tensor entropy_state"
# Its loss is weight * nll.
LOGPROBS = Mixture(eta_value=0.0, weighting=KINDS.index(Given), first=-1.0)
_ENTROPY = 4  # among the statistics


class TokenLogprobs(NamedTuple):
    """The arguments of `token_logprobs`."""

    logits: Tensor  # [..., V]
    targets: Tensor  # [...]
    temperature: Tensor | None  # [...]
    options: TokenOptions
    with_state: bool  # whether a gradient may follow
    with_entropy: bool
    inplace_backward: bool
    backend: str


class LogprobsGrad(NamedTuple):
    """The arguments of `logprobs_grad` and, without a derivative, `logprobs_grad_`."""

    logits: Tensor  # [..., V]
    targets: Tensor  # [...]
    state: Tensor  # [STATE_WIDTH, ...]
    entropy_state: Tensor | None  # [ENTROPY_STATE_WIDTH, ...], with grad_entropy
    grad_logprobs: Tensor  # [] or [...]
    grad_entropy: Tensor | None  # [] or [...]
    temperature: Tensor | None  # [...]
    options: TokenOptions
    backend: str


def token_logprobs(args: TokenLogprobs) -> tuple[Tensor | None, ...]:
    results = _empty_results(args)
    kernels = backends.vocabulary(args.backend).kernels
    kernels.forward(
        args.logits, args.targets, LOGPROBS, args.options, NO_REDUCTION, results, None, None, args.temperature,
        may_split=False,
    )  # fmt: skip
    return returned(results)


def logprobs_grad(args: LogprobsGrad) -> Tensor:
    grad_logits = _empty_grad(args)
    _write_grad(args, grad_logits)
    return grad_logits


def logprobs_grad_(args: LogprobsGrad) -> None:
    _write_grad(args, args.logits)
    increment_version(args.logits)


def logprob_results(like_logits: Tensor, targets: Tensor, *, with_state: bool, with_entropy: bool) -> Results:
    """Memory for the results of tokens `targets` [...], in the type of arithmetic of logits."""
    return empty_results(
        like_logits, targets, NO_REDUCTION,
        with_state=with_state, with_stats=with_entropy, with_entropy_state=with_state and with_entropy,
    )  # fmt: skip


def returned(results: Results) -> tuple[Tensor | None, ...]:
    """What an operator of log-probabilities returns."""
    # A copy of N numbers: autograd lets nobody write to a view that an operator returns.
    entropy = None if results.stats is None else results.stats[_ENTROPY].clone()
    return results.loss, entropy, results.state, results.entropy_state


def entropy_grad(grad_entropy: Tensor | None, entropy_state: Tensor | None) -> EntropyGrad | None:
    """The record of both, None where there is no gradient of the entropy."""
    if grad_entropy is None:
        return None
    assert entropy_state is not None
    return EntropyGrad(grad_entropy, entropy_state)


def _empty_results(args: TokenLogprobs) -> Results:
    return logprob_results(args.logits, args.targets, with_state=args.with_state, with_entropy=args.with_entropy)


def _empty_grad(args: LogprobsGrad) -> Tensor:
    return args.logits.new_empty(args.logits.shape)


def _write_grad(args: LogprobsGrad, grad_logits: Tensor) -> None:
    kernels = backends.vocabulary(args.backend).kernels
    kernels.logits_grad(
        args.logits, args.targets, args.state, args.grad_logprobs, None, args.options, grad_logits,
        args.temperature, entropy_grad(args.grad_entropy, args.entropy_state),
    )  # fmt: skip


TOKEN_LOGPROBS = Operator(token_logprobs, RESULTS, lambda args: returned(_empty_results(args)))
LOGPROBS_GRAD = Operator(logprobs_grad, "Tensor", _empty_grad)
LOGPROBS_GRAD_ = Operator(logprobs_grad_, "", writes="logits")


def _context(ctx: Any, args: TokenLogprobs, output: tuple[Tensor | None, ...]) -> None:
    _, entropy, *states = output
    without_grad = states if args.with_entropy else [entropy, *states]
    ctx.mark_non_differentiable(*[one for one in without_grad if one is not None])
    ctx.set_materialize_grads(False)
    ctx.overwrite = Overwrite.of(args.inplace_backward)
    TOKEN_LOGPROBS.fields.save(ctx, args, *states)


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_unused: None) -> Grads:
    if grad_logprobs is None and grad_entropy is None:
        return {}
    args, (state, entropy_state) = TOKEN_LOGPROBS.fields.saved(ctx)
    upstream = [one for one in (grad_logprobs, grad_entropy) if one is not None]
    call = LogprobsGrad(
        args.logits, args.targets, state, None if grad_entropy is None else given(entropy_state),
        upstream[0].new_zeros(()) if grad_logprobs is None else grad_logprobs, grad_entropy,
        args.temperature, args.options, args.backend,
    )  # fmt: skip
    if ctx.overwrite.allowed(args.logits) and all(map(is_plain, upstream)) and not torch.is_grad_enabled():
        logprobs_grad_(
            call._replace(
                grad_logprobs=materialized(call.grad_logprobs),
                grad_entropy=None if grad_entropy is None else materialized(grad_entropy),
            )
        )
        return {"logits": args.logits.detach()}
    return {"logits": grad(call)}


def _grad_context(ctx: Any, args: LogprobsGrad, output: Tensor) -> None:
    LOGPROBS_GRAD.fields.save(ctx, args)


def _grad_backward(ctx: Any, grad_output: Tensor) -> Grads:
    """The second derivative, by PyTorch through the plain formula."""
    args, _ = LOGPROBS_GRAD.fields.saved(ctx)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views of their own: autograd.grad below must stop here.
        leaves = {
            name: (one if create_graph else one.detach()).view_as(one).requires_grad_()
            for name in ("logits", "grad_logprobs", "grad_entropy")
            if (one := getattr(args, name)) is not None
        }
        logits, *upstream = leaves.values()
        vocabulary = backends.vocabulary(args.backend)
        results = vocabulary.token_logprobs(logits, args.targets, args.temperature, args.options)[: len(upstream)]
        upstream = [one.to(result.dtype).expand(result.shape) for one, result in zip(upstream, results, strict=True)]
        (grad_logits,) = torch.autograd.grad(results, logits, upstream, create_graph=True)
        found = torch.autograd.grad(
            grad_logits, list(leaves.values()), grad_output, create_graph=create_graph, allow_unused=True
        )
    return dict(zip(leaves, found, strict=True))


# The log-probabilities, the entropies, and the two states.
_folded = functools.partial(folded, out_dims=(0, 0, 1, 1))
forward = Differentiable(TOKEN_LOGPROBS, _context, _backward, _folded)
grad = Differentiable(LOGPROBS_GRAD, _grad_context, _grad_backward, _folded)
