"""The kernel of a loss's reduction: the transcription of csrc/reduction.h."""

from __future__ import annotations

import triton
import triton.language as tl

from mixce_kernels.triton_kernels.jit import bound, kernel
from mixce_kernels.triton_kernels.mixce_math import as_real


@triton.jit
def weight_of(targets_ptr, weights_ptr, token, in_block, weights_stride, ignore_index):
    """The weights of tokens, 0 where ignored, whatever stands there."""
    target = tl.load(targets_ptr + token, mask=in_block, other=0).to(tl.int64)
    valid = in_block & (target != ignore_index)
    weight = valid.to(tl.float64)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + token * weights_stride, mask=valid, other=0.0).to(tl.float64)
    return weight


@kernel
def reduction_kernel(
    losses_ptr,  # [N], or None
    targets_ptr,  # [N]
    weights_ptr,  # [N], or None
    num_items_ptr,  # [], or None
    loss_ptr,  # [], or [N] without SUMS; with losses
    token_scale_ptr,  # [], or with weights [N]; or None
    number: tl.int64,
    weights_stride: tl.int64,
    ignore_index: tl.int64,
    num_items_value: tl.float64,  # NaN: the weights, added up
    SUMS: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the sums of all tokens in an order that their number decides, the loss, and tokens' factors."""
    total = tl.zeros((BLOCK,), tl.float64)
    total_weight = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, bound(number), BLOCK):
        token = begin + tl.arange(0, BLOCK).to(tl.int64)
        in_block = token < number
        weight = weight_of(targets_ptr, weights_ptr, token, in_block, weights_stride, ignore_index)
        total_weight += weight
        if losses_ptr is not None:
            total += tl.load(losses_ptr + token, mask=in_block, other=0.0).to(tl.float64) * weight
    divisor = tl.full((), 1.0, tl.float64)
    if MEAN:
        if num_items_ptr is None:
            divisor = as_real(num_items_value, tl.float64)
            divisor = tl.where(divisor == divisor, divisor, tl.sum(total_weight, axis=0))
        else:
            divisor = tl.load(num_items_ptr).to(tl.float64)
        divisor = tl.where(divisor == 0.0, 1.0, divisor)
    if SUMS and losses_ptr is not None:
        tl.store(loss_ptr, (tl.sum(total, axis=0) / divisor).to(loss_ptr.dtype.element_ty))
    if weights_ptr is None:
        if token_scale_ptr is not None:
            tl.store(token_scale_ptr, 1.0 / divisor)
    else:
        for begin in range(0, bound(number), BLOCK):
            token = begin + tl.arange(0, BLOCK).to(tl.int64)
            in_block = token < number
            weight = weight_of(targets_ptr, weights_ptr, token, in_block, weights_stride, ignore_index)
            if token_scale_ptr is not None:
                tl.store(token_scale_ptr + token, weight / divisor, mask=in_block)
            if not SUMS and losses_ptr is not None:
                loss = tl.load(losses_ptr + token, mask=in_block, other=0.0).to(tl.float64) * weight
                tl.store(loss_ptr + token, loss.to(loss_ptr.dtype.element_ty), mask=in_block)
