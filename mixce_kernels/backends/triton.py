"""The backend `triton`: launches the kernels of `triton_kernels`, imported by the first call that needs them."""

from __future__ import annotations

from torch import Tensor

from mixce_kernels.backends import triton_shards
from mixce_kernels.backends.devices import on_device, triton_arch, unsuited_to_triton
from mixce_kernels.backends.layout import RowLayout, aligned_alike, flat, reachable_layout
from mixce_kernels.backends.results import Results
from mixce_kernels.backends.triton_arguments import forward_launch, logits_grad_launch, no_kernels, scale_rows_launch
from mixce_kernels.backends.triton_launch import VECTOR_BYTES
from mixce_kernels.options import TokenOptions

checks_targets = False
shards = triton_shards


def unavailable(logits: Tensor) -> str | None:
    """The sentence why the Triton kernels cannot serve these logits; None where they can."""
    return unsuited_to_triton(logits, "the logits") or no_kernels(logits.shape[-1])


def forward(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    eta: Tensor | None,  # [...]
    eta_value: float,
    options: TokenOptions,
    results: Results,
    grad_loss: Tensor | None,  # [...]
    grad_logits: Tensor | None,  # [..., V]
) -> None:
    """Loss, state and statistics, with the gradient where `grad_logits` is given: see `Backend`."""
    rows = reachable_layout(logits)
    if rows.number == 0:
        return
    loss, has_grad = results.loss, grad_logits is not None
    grad_logits, grad_rows, same_window = _grad_layout(logits, rows, grad_logits)
    eta_entries, eta_stride = (loss, 0) if eta is None else flat(eta)
    grad_loss, grad_loss_stride = (loss, 0) if grad_loss is None else flat(grad_loss)
    with on_device(logits):
        launch, partials = forward_launch(
            rows,
            grad_rows if has_grad else None,
            logits.shape[-1],
            logits.element_size(),
            options,
            with_stats=results.with_stats,
            same_window=same_window,
            arch=triton_arch() if has_grad else 0,
        )
        launch(
            logits_ptr=logits,
            targets_ptr=targets.contiguous(),
            eta_ptr=eta_entries,
            loss_ptr=loss,
            state_ptr=results.state,
            stats_ptr=results.stats,
            correct_ptr=results.correct,
            grad_loss_ptr=grad_loss,
            grad_ptr=grad_logits,
            partial_ptr=loss.new_empty(partials) if partials > 0 else loss,
            eta_stride=eta_stride,
            grad_loss_stride=grad_loss_stride,
            eta_value=eta_value,
            HAS_ETA=eta is not None,
        )


def logits_grad(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    state: Tensor,  # [STATE_WIDTH, ...]
    grad_loss: Tensor,  # [...]
    options: TokenOptions,
    grad_logits: Tensor,  # [..., V]
) -> None:
    """The gradient from the state of the forward: see `Backend`."""
    rows = reachable_layout(logits)
    if rows.number == 0:
        return
    grad_logits, grad_rows, same_window = _grad_layout(logits, rows, grad_logits)
    grad_loss, grad_loss_stride = flat(grad_loss)
    launch = logits_grad_launch(
        rows, grad_rows, logits.shape[-1], logits.element_size(), options, same_window=same_window
    )
    with on_device(logits):
        launch(
            logits_ptr=logits,
            targets_ptr=targets.contiguous(),
            state_ptr=state.contiguous(),
            grad_loss_ptr=grad_loss,
            grad_ptr=grad_logits,
            grad_loss_stride=grad_loss_stride,
        )


def scale_rows_(grad_logits: Tensor, grad_loss: Tensor) -> None:
    """Scales the rows of a gradient in place: see `Backend`."""
    rows = reachable_layout(grad_logits)
    if rows.number == 0:
        return
    grad_loss, grad_loss_stride = flat(grad_loss)
    with on_device(grad_logits):
        launch = scale_rows_launch(rows, grad_logits.shape[-1], grad_logits.element_size())
        launch(grad_ptr=grad_logits, grad_loss_ptr=grad_loss, grad_loss_stride=grad_loss_stride)


def _grad_layout(logits: Tensor, rows: RowLayout, grad_logits: Tensor | None) -> tuple[Tensor, RowLayout, bool]:
    """The gradient, its rows, and whether each of them lies as its row of logits does to a 16-byte boundary."""
    if grad_logits is None or grad_logits is logits:
        return logits, rows, True
    grad_rows = reachable_layout(grad_logits)
    return grad_logits, grad_rows, aligned_alike(logits, rows, grad_logits, grad_rows, VECTOR_BYTES)
