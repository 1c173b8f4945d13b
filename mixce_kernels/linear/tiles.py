"""The loss from hidden states with logits that never reach memory: launches the kernels `linear_*` of `triton_kernels`.

Each computation's place, and when another path is the better one: `docs/linear.md`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixce_kernels.backends.devices import multiprocessors, on_device, triton_arch, unsuited_to_triton
from mixce_kernels.backends.layout import entries
from mixce_kernels.backends.results import Results
from mixce_kernels.backends.triton_arguments import (
    gradient_arguments,
    kernels,
    loss_arguments,
    mixture_arguments,
    no_kernels,
    statistics_arguments,
)
from mixce_kernels.backends.triton_launch import VECTOR_BYTES
from mixce_kernels.linear.tiles_launch import depth_arguments, forward_config, grad_config
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions


def unavailable(hidden: Tensor, weight: Tensor) -> str | None:
    """The sentence why these kernels cannot serve hidden [N, D] and weight [V, D]; None where they can."""
    return unsuited_to_triton(hidden, "the hidden states") or no_kernels(weight.shape[0])


def forward(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    mixture: Mixture,  # of [N]
    options: TokenOptions,
    results: Results,  # written: state, and tokens' losses and statistics
) -> None:
    """Loss, state and statistics of each token, as `Backend.forward` of the logits."""
    losses, state, stats, correct = results.losses, results.state, results.stats, results.correct
    assert losses is not None
    (n_rows, depth), vocab_size, itemsize = hidden.shape, weight.shape[0], hidden.element_size()
    if n_rows == 0:
        return
    linear_forward = kernels("linear_forward")
    targets = targets.contiguous()
    aligned = _aligned(hidden, weight)
    statistics = statistics_arguments(options, stats is not None)
    with_options = statistics["CAP"] or statistics["SMOOTH"] or statistics["STATS"]
    with on_device(hidden):
        config = forward_config(
            n_rows, vocab_size, itemsize, with_options, aligned, triton_arch(), multiprocessors(hidden)
        )
        order, n_valid = _valid_first(targets, options.ignore_index)
        partial = losses.new_empty((config.n_splits, linear_forward.PARTIALS.value, n_rows))
        rows = {"targets_ptr": targets, "order_ptr": order, "n_valid_ptr": n_valid, "partial_ptr": partial}
        splits = {"n_splits": config.n_splits, "split_size": config.split_size}
        shared = statistics | rows | splits | {"n_rows": n_rows, "vocab_size": vocab_size}
        linear_forward.linear_forward_kernel[(config.n_row_blocks * config.n_splits,)](
            hidden_ptr=hidden,
            weight_ptr=weight,
            bias_ptr=losses if bias is None else bias.contiguous(),
            depth=depth,
            hidden_stride=hidden.stride(0),
            weight_stride=weight.stride(0),
            n_row_blocks=config.n_row_blocks,
            HAS_BIAS=bias is not None,
            **shared,
            **depth_arguments(depth, config.tiles.block_d, itemsize, aligned),
            **config.tiles.blocks(),
            **config.tiles.arguments(),
        )
        linear_forward.linear_merge_kernel[(-(-n_rows // config.merge_rows),)](
            loss_ptr=losses,
            state_ptr=state,
            stats_ptr=losses if stats is None else stats,
            correct_ptr=losses if correct is None else correct,
            **shared,
            **loss_arguments(options),
            **mixture_arguments(mixture, losses),
            **config.merge_arguments(),
        )


def grad(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    state: Tensor,  # [STATE_WIDTH, N]
    grad_loss: Tensor,  # [N], any strides: the upstream gradients of tokens' losses
    options: TokenOptions,
    grad_hidden: Tensor | None,  # [N, D] of the accumulation's type, written
    grad_weight: Tensor | None,  # [V, D] of the accumulation's type, written
    grad_bias: Tensor | None,  # [V] of the accumulation's type, written
) -> None:
    """The gradients of sum(grad_loss * loss) that are wanted, from the state of the forward."""
    wanted = [each for each in (grad_hidden, grad_weight, grad_bias) if each is not None]
    (n_rows, depth), vocab_size, itemsize = hidden.shape, weight.shape[0], hidden.element_size()
    if n_rows == 0:
        for each in wanted:
            each.zero_()
    if n_rows == 0 or not wanted:
        return
    linear_gradient = kernels("linear_gradient")
    targets, state = targets.contiguous(), state.contiguous()
    grad_loss, grad_loss_stride = entries(grad_loss)
    aligned = _aligned(hidden, weight)
    gradient = gradient_arguments(options)
    # bfloat16 and wider types have float32's exponents.
    scaled = hidden.dtype == torch.float16
    products = grad_hidden is not None or grad_weight is not None
    with on_device(hidden):
        config = grad_config(
            n_rows, vocab_size, depth, itemsize, gradient["CAP"], aligned, triton_arch(), multiprocessors(hidden)
        )
        tiles, n_row_blocks, n_depth_blocks = config.tiles, config.n_row_blocks, config.n_depth_blocks
        order, n_valid = _valid_first(targets, options.ignore_index)
        scale = _scale(state, grad_loss, options) if scaled else state
        scratch = hidden.new_empty((n_row_blocks * tiles.block_n, config.span) if products else (0,))
        # Blocks of rows in which every token is ignored add nothing.
        bias_partial = state if grad_bias is None else state.new_zeros((n_row_blocks, config.span))
        partial = grad_hidden
        if grad_hidden is not None and config.n_splits > 1:
            partial = grad_hidden.new_empty((config.n_splits, *grad_hidden.shape))
        if partial is not None:
            # An ignored token's row is written by no program.
            partial.zero_()
        hidden_in_order = hidden if grad_weight is None else hidden.index_select(0, order)
        shared = {"n_valid_ptr": n_valid, "scale_ptr": scale, "scratch_ptr": scratch, "SCALED": scaled}
        shared |= {"vocab_size": vocab_size, "depth": depth, "span": config.span} | tiles.arguments()
        product = shared | depth_arguments(depth, config.block_out, itemsize, aligned)
        product |= {"n_depth_blocks": n_depth_blocks, "BLOCK_K": config.block_k, "BLOCK_OUT": config.block_out}
        for first_column in range(0, vocab_size, config.span):
            width = min(config.span, vocab_size - first_column)
            n_column_blocks = -(-width // tiles.block_v)
            linear_gradient.linear_grad_logits_kernel[(n_row_blocks * n_column_blocks,)](
                hidden_ptr=hidden,
                weight_ptr=weight,
                bias_ptr=state if bias is None else bias.contiguous(),
                targets_ptr=targets,
                order_ptr=order,
                state_ptr=state,
                grad_loss_ptr=grad_loss,
                bias_partial_ptr=bias_partial,
                n_rows=n_rows,
                hidden_stride=hidden.stride(0),
                weight_stride=weight.stride(0),
                grad_loss_stride=grad_loss_stride,
                n_row_blocks=n_row_blocks,
                n_column_blocks=n_column_blocks,
                first_column=first_column,
                HAS_BIAS=bias is not None,
                GRAD_BIAS=grad_bias is not None,
                PRODUCTS=products,
                **shared,
                **gradient,
                **depth_arguments(depth, tiles.block_d, itemsize, aligned),
                **tiles.blocks(),
            )
            if grad_bias is not None:
                torch.sum(bias_partial[:, :width], 0, out=grad_bias[first_column : first_column + width])
            if grad_hidden is not None:
                linear_gradient.linear_grad_hidden_kernel[(config.n_splits * n_row_blocks * n_depth_blocks,)](
                    weight_ptr=weight,
                    order_ptr=order,
                    grad_ptr=partial,
                    n_rows=n_rows,
                    weight_stride=weight.stride(0),
                    n_row_blocks=n_row_blocks,
                    first_column=first_column,
                    n_columns=width,
                    split_size=config.split_size,
                    BLOCK_N=tiles.block_n,
                    **product,
                )
            if grad_weight is not None:
                n_column_blocks = -(-width // config.block_out)
                linear_gradient.linear_grad_weight_kernel[(n_column_blocks * n_depth_blocks,)](
                    hidden_ptr=hidden_in_order,
                    grad_ptr=grad_weight,
                    n_column_blocks=n_column_blocks,
                    first_column=first_column,
                    BLOCK_V=config.block_out,
                    **product,
                )
        if grad_hidden is not None and partial is not None and partial is not grad_hidden:
            torch.sum(partial, 0, out=grad_hidden)


def _valid_first(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Row numbers [N], those of ignored tokens last, and how many are not ignored [1]: no host synchronisation."""
    ignored = targets == ignore_index
    order = torch.argsort(ignored.to(torch.uint8), stable=True)
    return order, (~ignored).sum().reshape(1)


def _scale(state: Tensor, grad_loss: Tensor, options: TokenOptions) -> Tensor:
    """A power of two [1] that brings the largest gradient of a logit just below 2^14, far above float16's underflow."""
    largest = state[2:].abs().amax(0)
    if not options.moves_sure_tokens:
        # All of a row's gradients are at most |t| then, which is small where the row is sure of its target. The scaled
        # a must remain finite.
        largest = torch.maximum(state[4].abs(), state[2].abs() * 2.0**-64)
    largest = largest * grad_loss.to(state.dtype).abs() * options.logit_scale
    largest = torch.where(largest.isfinite(), largest, 0.0).amax().reshape(1)
    # By the bits of float32: 2^e is (e + 127) << 23.
    exponent = (13 + 2 * 127 - (largest.view(torch.int32) >> 23)).clamp(27, 227)
    return (exponent << 23).view(torch.float32)


def _aligned(hidden: Tensor, weight: Tensor) -> bool:
    """Whether rows are whole vectors: their lengths, and where they begin."""
    numbers = [hidden.shape[1], *(tensor.stride(0) for tensor in (hidden, weight) if tensor.shape[0] > 1)]
    bytes_from_zero = [number * hidden.element_size() for number in numbers] + [hidden.data_ptr(), weight.data_ptr()]
    return all(number % VECTOR_BYTES == 0 for number in bytes_from_zero)
