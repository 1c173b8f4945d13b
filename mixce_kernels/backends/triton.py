"""The backend `triton`: launches the kernels of `triton_kernels`, imported by the first call that needs them."""

from __future__ import annotations

from torch import Tensor

from mixce_kernels.backends.devices import WARP_SIZE, on_device, triton_arch, unsuited_to_triton
from mixce_kernels.backends.layout import RowLayout, aligned_alike, flat, reachable_layout
from mixce_kernels.backends.results import Results
from mixce_kernels.backends.triton_launch import (
    VECTOR_BYTES,
    gradient_arguments,
    kernels,
    layout_arguments,
    loss_arguments,
    no_kernels,
    row_config,
    statistics_arguments,
    tile_config,
)
from mixce_kernels.options import TokenOptions

checks_targets = False


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
    loss, vocab_size = results.loss, logits.shape[-1]
    has_grad = grad_logits is not None and grad_loss is not None
    grad_logits, grad_rows, same_window = _grad_layout(logits, rows, grad_logits)
    eta_entries, eta_stride = (loss, 0) if eta is None else flat(eta)
    grad_loss, grad_loss_stride = (loss, 0) if grad_loss is None else flat(grad_loss)
    arguments = statistics_arguments(options, results.with_stats) | gradient_arguments(options)
    with on_device(logits):
        may_hold = has_grad and same_window
        arch = triton_arch() if may_hold else 0
        with_options = arguments["CAP"] or arguments["SMOOTH"]
        config = row_config(
            vocab_size, logits.element_size(), may_hold, results.with_stats, with_options, WARP_SIZE, arch
        )
        kernels("forward").forward_kernel[(rows.number,)](
            logits_ptr=logits,
            targets_ptr=targets.contiguous(),
            eta_ptr=eta_entries,
            loss_ptr=loss,
            state_ptr=results.state,
            stats_ptr=results.stats,
            correct_ptr=results.correct,
            grad_loss_ptr=grad_loss,
            grad_ptr=grad_logits,
            partial_ptr=loss.new_empty((rows.number, 6, config.n_ctas)) if config.n_ctas > 1 else loss,
            n_rows=rows.number,
            vocab_size=vocab_size,
            **layout_arguments(rows),
            **layout_arguments(grad_rows, "grad_"),
            eta_stride=eta_stride,
            grad_loss_stride=grad_loss_stride,
            ignore_index=options.ignore_index,
            eta_value=eta_value,
            **arguments,
            **loss_arguments(options),
            HAS_ETA=eta is not None,
            HAS_GRAD=has_grad,
            SAME_WINDOW=same_window,
            PTX=arch > 0,
            **config.arguments(),
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
    vocab_size = logits.shape[-1]
    arguments = gradient_arguments(options)
    config = tile_config(rows.number, vocab_size, logits.element_size(), arguments["CAP"], WARP_SIZE)
    with on_device(logits):
        kernels("gradient").logits_grad_kernel[(rows.number * config.n_tiles,)](
            logits_ptr=logits,
            targets_ptr=targets.contiguous(),
            state_ptr=state.contiguous(),
            grad_loss_ptr=grad_loss,
            grad_ptr=grad_logits,
            n_rows=rows.number,
            vocab_size=vocab_size,
            **layout_arguments(rows),
            **layout_arguments(grad_rows, "grad_"),
            grad_loss_stride=grad_loss_stride,
            ignore_index=options.ignore_index,
            **arguments,
            SAME_WINDOW=same_window,
            STACK=config.stack,
            **config.arguments(),
        )


def scale_rows_(grad_logits: Tensor, grad_loss: Tensor) -> None:
    """Scales the rows of a gradient in place: see `Backend`."""
    rows = reachable_layout(grad_logits)
    if rows.number == 0:
        return
    grad_loss, grad_loss_stride = flat(grad_loss)
    vocab_size = grad_logits.shape[-1]
    config = tile_config(rows.number, vocab_size, grad_logits.element_size(), warp_size=WARP_SIZE)
    with on_device(grad_logits):
        kernels("gradient").scale_rows_kernel[(rows.number * config.n_tiles,)](
            grad_ptr=grad_logits,
            grad_loss_ptr=grad_loss,
            vocab_size=vocab_size,
            **layout_arguments(rows),
            grad_loss_stride=grad_loss_stride,
            **config.arguments(),
        )


def _grad_layout(logits: Tensor, rows: RowLayout, grad_logits: Tensor | None) -> tuple[Tensor, RowLayout, bool]:
    """The gradient, its rows, and whether each of them lies as its row of logits does to a 16-byte boundary."""
    if grad_logits is None or grad_logits is logits:
        return logits, rows, True
    grad_rows = reachable_layout(grad_logits)
    return grad_logits, grad_rows, aligned_alike(logits, rows, grad_logits, grad_rows, VECTOR_BYTES)
