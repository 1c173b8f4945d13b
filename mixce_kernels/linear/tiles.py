"""The loss from hidden states with logits that never reach memory: launches the kernels `linear_*` of `triton_kernels`.

What is computed where, and when another path is the better one: `docs/linear.md`.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mixce_kernels.backends.layout import flat
from mixce_kernels.backends.triton import _MAX_VOCAB_SIZE, _arch, _device_of, _import_problem, _transform
from mixce_kernels.backends.triton_launch import VECTOR_BYTES
from mixce_kernels.linear.tiles_launch import Tiles, forward_config, grad_config
from mixce_kernels.options import TokenOptions

# Stands for a CPU's, in emulations: few, so that small tests have several tiles for a program.
_EMULATED_MULTIPROCESSORS = 3


def unavailable(hidden: Tensor, weight: Tensor) -> str | None:
    """Why these kernels cannot serve hidden [N, D] and weight [V, D]."""
    if hidden.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1" and os.environ.get("MIXCE_CPU_TENSORS") != "1":
            return (
                "it runs on CUDA and ROCm tensors (on the CPU under TRITON_INTERPRET=1), and the hidden states are "
                "on cpu"
            )
    elif hidden.device.type != "cuda":
        return f"it runs on CUDA and ROCm tensors, and the hidden states are on {hidden.device}"
    if weight.shape[0] > _MAX_VOCAB_SIZE:
        return f"it takes at most {_MAX_VOCAB_SIZE} logits a row, and these are {weight.shape[0]}"
    return _import_problem()


def forward(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    eta: Tensor | None,  # [N]
    eta_value: float,
    options: TokenOptions,
    results: tuple[Tensor, ...],  # loss [N], state [5, N], stats [5, N] or [0], correct [N] or [0]: written
) -> None:
    """Loss, state and statistics of each token, as `Backend.forward` of the logits."""
    loss, state, stats, correct = results
    n_rows, vocab_size = hidden.shape[0], weight.shape[0]
    if n_rows == 0:
        return
    kernels = _kernels("linear_forward")
    targets = targets.contiguous()
    eta_entries, eta_stride = (loss, 0) if eta is None else flat(eta)
    diff_scale, cap, tanh_scale, _ = _transform(options)
    flags = {"CAP": options.softcap is not None, "SMOOTH": options.label_smoothing > 0, "STATS": stats.shape[0] > 0}
    with _device_of(hidden):
        config = forward_config(
            n_rows, vocab_size, hidden.element_size(), any(flags.values()), _aligned(hidden, weight), _arch(),
            _multiprocessors(hidden),
        )  # fmt: skip
        order, n_valid = _valid_first(targets, options.ignore_index)
        partial = loss.new_empty((config.n_splits, kernels.PARTIALS.value, n_rows))
        kernels.linear_forward_kernel[(config.n_row_blocks * config.n_splits,)](
            hidden,
            weight,
            loss if bias is None else bias.contiguous(),
            targets,
            order,
            n_valid,
            partial,
            n_rows,
            vocab_size,
            hidden.shape[1],
            hidden.stride(0),
            weight.stride(0),
            config.n_row_blocks,
            config.n_splits,
            config.split_size,
            diff_scale,
            cap,
            tanh_scale,
            HAS_BIAS=bias is not None,
            **flags,
            **_layout(hidden, weight, config.tiles.block_d),
            BLOCK_N=config.tiles.block_n,
            BLOCK_V=config.tiles.block_v,
            BLOCK_D=config.tiles.block_d,
            **_compiled_for(config.tiles),
        )
        kernels.linear_merge_kernel[(-(-n_rows // config.merge_rows),)](
            partial,
            targets,
            order,
            n_valid,
            eta_entries,
            loss,
            state,
            stats,
            correct,
            n_rows,
            vocab_size,
            config.n_splits,
            config.split_size,
            eta_stride,
            eta_value,
            options.label_smoothing,
            options.z_loss,
            diff_scale,
            cap,
            tanh_scale,
            HAS_ETA=eta is not None,
            **flags,
            SPLITS=config.merge_splits,
            ROWS=config.merge_rows,
            num_warps=4,
            **_registers(config.tiles),
        )


def grad(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    state: Tensor,  # [5, N]
    grad_loss: Tensor,  # [N], any strides
    options: TokenOptions,
    grad_hidden: Tensor | None,  # [N, D] of the accumulation's type, written
    grad_weight: Tensor | None,  # [V, D] of the accumulation's type, written
    grad_bias: Tensor | None,  # [V] of the accumulation's type, written
) -> None:
    """The gradients of sum(grad_loss * loss) that are wanted, from the state of the forward."""
    wanted = [each for each in (grad_hidden, grad_weight, grad_bias) if each is not None]
    n_rows, vocab_size = hidden.shape[0], weight.shape[0]
    if n_rows == 0:
        for each in wanted:
            each.zero_()
    if n_rows == 0 or not wanted:
        return
    targets, state = targets.contiguous(), state.contiguous()
    upstream, upstream_stride = flat(grad_loss)
    kernels = _kernels("linear_gradient")
    depth, itemsize = hidden.shape[1], hidden.element_size()
    products = grad_hidden is not None or grad_weight is not None
    # bfloat16 and wider types have float32's exponents.
    scaled = hidden.dtype == torch.float16
    with _device_of(hidden):
        config = grad_config(
            n_rows, vocab_size, depth, itemsize, options.softcap is not None, _aligned(hidden, weight), _arch(),
            _multiprocessors(hidden),
        )  # fmt: skip
        tiles, n_row_blocks, n_depth_blocks = config.tiles, config.n_row_blocks, config.n_depth_blocks
        order, n_valid = _valid_first(targets, options.ignore_index)
        scale = _scale(state, upstream, options) if scaled else state
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
        shared = _compiled_for(tiles) | {"SCALED": scaled}
        products_layout = shared | _layout(hidden, weight, config.block_out)
        products_layout |= {"BLOCK_K": config.block_k, "BLOCK_OUT": config.block_out}
        for first_column in range(0, vocab_size, config.span):
            width = min(config.span, vocab_size - first_column)
            n_column_blocks = -(-width // tiles.block_v)
            kernels.linear_grad_logits_kernel[(n_row_blocks * n_column_blocks,)](
                hidden,
                weight,
                state if bias is None else bias.contiguous(),
                targets,
                order,
                n_valid,
                state,
                upstream,
                scale,
                scratch,
                bias_partial,
                n_rows,
                vocab_size,
                depth,
                hidden.stride(0),
                weight.stride(0),
                upstream_stride,
                n_row_blocks,
                n_column_blocks,
                first_column,
                config.span,
                *_transform(options),
                HAS_BIAS=bias is not None,
                GRAD_BIAS=grad_bias is not None,
                PRODUCTS=products,
                CAP=options.softcap is not None,
                **shared,
                **_layout(hidden, weight, tiles.block_d),
                BLOCK_N=tiles.block_n,
                BLOCK_V=tiles.block_v,
                BLOCK_D=tiles.block_d,
            )
            if grad_bias is not None:
                torch.sum(bias_partial[:, :width], 0, out=grad_bias[first_column : first_column + width])
            if grad_hidden is not None:
                kernels.linear_grad_hidden_kernel[(config.n_splits * n_row_blocks * n_depth_blocks,)](
                    weight,
                    order,
                    n_valid,
                    scale,
                    scratch,
                    partial,
                    n_rows,
                    vocab_size,
                    depth,
                    weight.stride(0),
                    n_row_blocks,
                    n_depth_blocks,
                    first_column,
                    width,
                    config.split_size,
                    config.span,
                    **products_layout,
                    BLOCK_N=tiles.block_n,
                )
            if grad_weight is not None:
                n_blocks = -(-width // config.block_out)
                kernels.linear_grad_weight_kernel[(n_blocks * n_depth_blocks,)](
                    hidden_in_order,
                    n_valid,
                    scale,
                    scratch,
                    grad_weight,
                    vocab_size,
                    depth,
                    n_blocks,
                    n_depth_blocks,
                    first_column,
                    config.span,
                    **products_layout,
                    BLOCK_V=config.block_out,
                )
        if grad_hidden is not None and partial is not None and partial is not grad_hidden:
            torch.sum(partial, 0, out=grad_hidden)


@functools.cache
def _kernels(name: str) -> ModuleType:
    if name == "linear_forward":
        from mixce_kernels.triton_kernels import linear_forward

        return linear_forward
    from mixce_kernels.triton_kernels import linear_gradient

    return linear_gradient


def _valid_first(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Row numbers [N], those of ignored tokens last, and how many are not ignored [1]: no host synchronisation."""
    ignored = targets == ignore_index
    order = torch.argsort(ignored.to(torch.uint8), stable=True)
    return order, (~ignored).sum().reshape(1)


def _scale(state: Tensor, upstream: Tensor, options: TokenOptions) -> Tensor:
    """A power of two [1] that brings the largest gradient of a logit just below 2^14, far above float16's underflow."""
    largest = state[2:].abs().amax(0)
    if options.label_smoothing == options.z_loss == 0:
        # All of a row's gradients are at most |t| then, which is small where the row is sure of its target. The scaled
        # a must remain finite.
        largest = torch.maximum(state[4].abs(), state[2].abs() * 2.0**-64)
    largest = largest * upstream.to(state.dtype).abs() * options.logit_scale
    largest = torch.where(largest.isfinite(), largest, 0.0).amax().reshape(1)
    # By the bits of float32: 2^e is (e + 127) << 23.
    exponent = (13 + 2 * 127 - (largest.view(torch.int32) >> 23)).clamp(27, 227)
    return (exponent << 23).view(torch.float32)


def _multiprocessors(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return _EMULATED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(tensor.device).multi_processor_count)


def _aligned(hidden: Tensor, weight: Tensor) -> bool:
    """Whether rows are whole vectors: their lengths, and where they begin."""
    numbers = [hidden.shape[1], *(tensor.stride(0) for tensor in (hidden, weight) if tensor.shape[0] > 1)]
    bytes_from_zero = [number * hidden.element_size() for number in numbers] + [hidden.data_ptr(), weight.data_ptr()]
    return all(number % VECTOR_BYTES == 0 for number in bytes_from_zero)


def _layout(hidden: Tensor, weight: Tensor, block: int) -> dict[str, Any]:
    """What kernels know of rows when they are compiled: whether they are whole blocks of depth, and whole vectors."""
    return {
        "EVEN": hidden.shape[1] % block == 0,
        "VECTOR": VECTOR_BYTES // hidden.element_size() if _aligned(hidden, weight) else 1,
    }


def _compiled_for(tiles: Tiles) -> dict[str, int]:
    """What the launches with these tiles share."""
    return {"GROUP": tiles.group, "num_warps": tiles.num_warps, "num_stages": tiles.num_stages} | _registers(tiles)


def _registers(tiles: Tiles) -> dict[str, int]:
    return {} if tiles.max_registers is None else {"maxnreg": tiles.max_registers}
