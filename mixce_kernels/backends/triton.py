"""The backend `triton`: launches the kernels of `triton_kernels`, imported by the first call that needs them."""

from __future__ import annotations

import math

from torch import Tensor

from mixce_kernels.backends import triton_shards
from mixce_kernels.backends.devices import multiprocessors, on_device, triton_arch, unsuited_to_triton
from mixce_kernels.backends.layout import RowLayout, aligned_alike, entries, reachable_layout
from mixce_kernels.backends.results import EntropyGrad, Results
from mixce_kernels.backends.triton_arguments import (
    forward_launch,
    logits_grad_launch,
    mixture_arguments,
    no_kernels,
    of_tokens,
    reduction_launch,
    scale_rows_launch,
)
from mixce_kernels.backends.triton_launch import VECTOR_BYTES
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions
from mixce_kernels.reduction import Reduction

checks_targets = False
shards = triton_shards


def unavailable(logits: Tensor) -> str | None:
    """The sentence why the Triton kernels cannot serve these logits; None where they can."""
    return unsuited_to_triton(logits, "the logits") or no_kernels(logits.shape[-1])


def forward(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    mixture: Mixture,
    options: TokenOptions,
    reduction: Reduction,
    results: Results,
    token_scale: Tensor | None,  # [] or [...]
    grad_logits: Tensor | None,  # [..., V]
    temperature: Tensor | None = None,  # [...]
    *,
    may_split: bool = True,
) -> None:
    """Loss, state and statistics, with the gradient where `grad_logits` is given: see `Backend`."""
    rows, results = reachable_layout(logits), results.with_losses(targets)
    if rows.number > 0:
        _forward_rows(
            logits, rows, targets, mixture, options, results, token_scale, grad_logits, temperature, may_split
        )
    if not reduction.is_identity:
        reduce(targets, options.ignore_index, reduction, results.losses, results.loss, results.token_scale)


def _forward_rows(
    logits: Tensor,  # [..., V]
    rows: RowLayout,
    targets: Tensor,  # [...]
    mixture: Mixture,
    options: TokenOptions,
    results: Results,
    token_scale: Tensor | None,  # [] or [...]
    grad_logits: Tensor | None,  # [..., V]
    temperature: Tensor | None,  # [...]
    may_split: bool,
) -> None:
    losses, stats, has_grad = results.losses, results.stats, grad_logits is not None
    assert losses is not None
    grad_logits, grad_rows, same_window = _grad_layout(logits, rows, grad_logits)
    token_scale, token_scale_stride = (None, 0) if token_scale is None else entries(token_scale)
    with on_device(logits):
        launch = forward_launch(
            rows,
            grad_rows if has_grad else None,
            logits.shape[-1],
            logits.element_size(),
            options,
            with_stats=stats is not None,
            same_window=same_window,
            arch=triton_arch() if has_grad else 0,
            # Rows are split where they are fewer than these.
            multiprocessors=multiprocessors(logits) if may_split else 0,
        )
        launch(
            logits_ptr=logits,
            targets_ptr=targets.contiguous(),
            loss_ptr=losses,
            state_ptr=results.state,
            stats_ptr=losses if stats is None else stats,
            correct_ptr=losses if results.correct is None else results.correct,
            token_scale_ptr=token_scale,
            grad_ptr=grad_logits,
            entropy_state_ptr=results.entropy_state,
            temperature_ptr=of_tokens(temperature, targets),
            partial_ptr=losses.new_empty(launch.n_partials) if launch.n_partials > 0 else losses,
            token_scale_stride=token_scale_stride,
            **mixture_arguments(mixture, losses),
        )
    if launch.grad_apart:
        assert results.state is not None
        logits_grad(logits, targets, results.state, None, token_scale, options, grad_logits, temperature)


def reduce(
    targets: Tensor,  # [...]
    ignore_index: int,
    reduction: Reduction,
    losses: Tensor | None,  # [...]
    loss: Tensor | None,  # [] or [...]
    token_scale: Tensor | None,  # [] or [...]
) -> None:
    """The loss of the tokens' losses, and their factors in it: see `Backend`."""
    weights, weights_stride = (None, 0) if reduction.weights is None else entries(reduction.weights)
    value = reduction.num_items_value
    with on_device(targets):
        reduction_launch(reduction.kind)(
            losses_ptr=losses,
            targets_ptr=targets.contiguous(),
            weights_ptr=weights,
            num_items_ptr=reduction.num_items,
            loss_ptr=loss,
            token_scale_ptr=token_scale,
            number=targets.numel(),
            weights_stride=weights_stride,
            ignore_index=ignore_index,
            num_items_value=math.nan if value is None else value,
        )


def logits_grad(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    state: Tensor,  # [STATE_WIDTH, ...]
    grad_loss: Tensor | None,  # [] or [...]
    token_scale: Tensor | None,  # [] or [...]
    options: TokenOptions,
    grad_logits: Tensor,  # [..., V]
    temperature: Tensor | None = None,  # [...]
    entropy: EntropyGrad | None = None,
) -> None:
    """The gradient from the state of the forward: see `Backend`."""
    rows = reachable_layout(logits)
    if rows.number == 0:
        return
    grad_logits, grad_rows, same_window = _grad_layout(logits, rows, grad_logits)
    grad_loss, grad_loss_stride = (None, 0) if grad_loss is None else entries(grad_loss)
    token_scale, token_scale_stride = (None, 0) if token_scale is None else entries(token_scale)
    launch = logits_grad_launch(
        rows, grad_rows, logits.shape[-1], logits.element_size(), options, same_window=same_window
    )
    with on_device(logits):
        launch(
            logits_ptr=logits,
            targets_ptr=targets.contiguous(),
            state_ptr=state.contiguous(),
            grad_loss_ptr=grad_loss,
            token_scale_ptr=token_scale,
            temperature_ptr=of_tokens(temperature, targets),
            grad_entropy_ptr=None if entropy is None else of_tokens(entropy.upstream, targets),
            entropy_state_ptr=None if entropy is None else entropy.state.contiguous(),
            grad_ptr=grad_logits,
            grad_loss_stride=grad_loss_stride,
            token_scale_stride=token_scale_stride,
        )


def scale_rows_(
    grad_logits: Tensor,  # [..., V]
    grad_loss: Tensor,  # [] or [...]
    targets: Tensor | None,  # [...]
    ignore_index: int,
) -> None:
    """Scales the rows of a gradient in place: see `Backend`."""
    rows = reachable_layout(grad_logits)
    if rows.number == 0:
        return
    grad_loss, grad_loss_stride = entries(grad_loss)
    with on_device(grad_logits):
        launch = scale_rows_launch(rows, grad_logits.shape[-1], grad_logits.element_size())
        launch(
            grad_ptr=grad_logits,
            grad_loss_ptr=grad_loss,
            targets_ptr=None if targets is None else targets.contiguous(),
            grad_loss_stride=grad_loss_stride,
            ignore_index=ignore_index,
        )


def _grad_layout(logits: Tensor, rows: RowLayout, grad_logits: Tensor | None) -> tuple[Tensor, RowLayout, bool]:
    """The gradient, its rows, and whether each of them lies as its row of logits does to a 16-byte boundary."""
    if grad_logits is None or grad_logits is logits:
        return logits, rows, True
    grad_rows = reachable_layout(grad_logits)
    return grad_logits, grad_rows, aligned_alike(logits, rows, grad_logits, grad_rows, VECTOR_BYTES)
