"""`fused_linear_mixce_loss`: the loss straight from hidden states, without logits [N, V] in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixce_kernels import backends
from mixce_kernels.autocast import autocast_dtype
from mixce_kernels.linear import autograd, tiles
from mixce_kernels.options import (
    accumulate_dtype,
    check_eta,
    check_linear_options,
    check_linear_tensors,
    check_reduction,
    check_shard_range,
    check_sharded_call,
    check_token_options,
    check_values,
    has_dtensor,
)
from mixce_kernels.parallel.backend import Shard
from mixce_kernels.parallel.collectives import copy_to, group_name
from mixce_kernels.parallel.reference import sharded_token_losses
from mixce_kernels.reduction import Reduction
from mixce_kernels.reference import linear_logits, linear_mixce_loss_reference
from mixce_kernels.stats import MixCEStats


def fused_linear_mixce_loss(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...]
    eta: float | Tensor = 0.5,
    *,
    bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,  # [...]
    num_items_in_batch: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace_backward: bool = False,
    grad_in_forward: bool = False,
    return_stats: bool = False,
    validate: bool = False,
    max_chunk_bytes: int | None = None,
    path: str = "chunks",
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    check_group: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, MixCEStats]:
    """`fused_mixce_loss` of the logits hidden @ weight.T + bias, which never exist as a whole.

    With path "chunks" the logits of some rows at a time are computed by the device's BLAS, in float32 whatever the type
    of the operands (float64 for float64), and turned into their gradient in place. For the reductions "mean" and "sum"
    the gradients of hidden states, weight and bias are computed in the forward and multiplied by the upstream gradient
    in backward; for "none" backward computes the logits once more. With path "tiles" a Triton kernel computes the
    logits in tiles that never leave the chip, and backward computes each tile again, of whose gradients a span of the
    vocabulary is in memory at a time: docs/linear.md says when that pays.

    With `group` the weight is a shard: each rank has the same hidden states and the rows of some columns of the
    vocabulary. The ranks meet once a chunk, as in `vocab_parallel_mixce_loss`, and once more to add up the gradient of
    the hidden states, in float32, which every rank then has as a whole. Hidden states and weight may also be DTensors,
    of which the weight is sharded by the vocabulary over one dimension of the mesh.

    Gradients are summed in float32 and rounded once, to their tensor's type. Only those are computed whose tensor
    requires one. Gradients with a graph of their own (`create_graph`, `torch.func`) are computed
    through the plain formula, with all logits in memory.
    Source: Zhang et al., "MixCE", ACL 2023 (arXiv 2305.16958).

    Args:
        hidden: [..., D], float32, bfloat16, float16 or float64: the last hidden states.
        weight: [V, D] of the same type, the language model head's own layout, tied to the embedding or not. Under
            autocast the types may differ: the products' operands are of autocast's type, as in
            `torch.nn.functional.linear`, and logits are float32.
        targets: [...], int64 or int32, class indices in [0, V) or `ignore_index`.
        eta: mixing ratio in [0, 1]: a number, or a floating tensor that broadcasts to targets' shape.
        bias: [V] of the same type, or None.
        ignore_index: tokens with this target have loss, gradient and statistics 0, whatever their hidden states hold.
            On the CPU, and on a GPU with `validate`, they are left out of the products.
        reduction, token_weights, num_items_in_batch, label_smoothing, z_loss, softcap, logit_scale, return_stats: as in
            `fused_mixce_loss`.
        inplace_backward, grad_in_forward: permissions that this function has no use for: there are no logits to
            overwrite, and the gradient is computed in the forward where that costs nothing.
        validate: check the values of targets and of a tensor eta, synchronising with a GPU. On the CPU targets are
            always checked.
        max_chunk_bytes: memory for the logits of a chunk with path "chunks": as many rows are taken as fit, at least
            one. None: 36 MiB on a CPU, 1 GiB on a GPU. For half-precision operands on a CPU, which are multiplied in
            float32, this includes the float32 copy of a tile of the weight.
        path: "chunks" or "tiles"; a sharded weight takes "chunks".
        group: the ranks that hold the weight; None: the weight is whole.
        vocab_start, vocab_size, check_group: with `group`, as in `vocab_parallel_mixce_loss`. With `vocab_size` chunks
            are sized for an even split; without it the ranks tell each other the size of their shards at each call, and
            once more where backward computes logits, for which a GPU's host waits.
        backend: "cpu", "cuda", "triton" or "reference", whose kernels turn logits into losses and gradients; None picks
            the best that can serve, or `MIXCE_BACKEND` of the environment. Path "tiles" is Triton's alone.

    Returns:
        The loss, float32 (float64 for float64 tensors); with `return_stats`, a pair of it and `MixCEStats`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, range, placement or combination is wrong; or, on every rank, the ranks' calls do
            not fit together.
        IndexError: a target is out of range, on the CPU or with `validate`. On a GPU, without `validate`, that row's
            loss is NaN, and so are the gradients that it is part of.
        RuntimeError: the backend asked for cannot serve these tensors, or there is no process group.
    """
    options = check_token_options(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    keywords: dict[str, Any] = {
        "bias": bias,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "reduction": reduction,
        "token_weights": token_weights,
        "num_items_in_batch": num_items_in_batch,
        "return_stats": return_stats,
        "validate": validate,
    }
    if has_dtensor(hidden, weight, bias, targets, eta, token_weights):
        from mixce_kernels import dtensors

        for name, value in (("group", group), ("vocab_start", vocab_start), ("vocab_size", vocab_size)):
            if value is not None:
                raise ValueError(f"expected {name}=None with DTensors, whose placements say it, got {value!r}")
        keywords.update(max_chunk_bytes=max_chunk_bytes, path=path, backend=backend)
        return dtensors.linear_mixce_loss(hidden, weight, targets, eta, **keywords)
    sharded = group is not None
    check_sharded_call(group, vocab_start, vocab_size)
    compute_dtype = check_linear_tensors(hidden, weight, bias, targets, autocast_dtype(hidden), sharded=sharded)
    eta = check_eta(eta, targets)
    check_reduction(reduction, targets, token_weights, num_items_in_batch)
    check_linear_options(max_chunk_bytes, path, backend, sharded=sharded)
    shard = None
    if vocab_start is not None:
        check_shard_range(vocab_start, vocab_size)
        shard = Shard(
            group_name(group), vocab_start, vocab_size, check_group, reduction,
            token_weights=token_weights is not None, hidden_grad=hidden.requires_grad and torch.is_grad_enabled(),
        )  # fmt: skip
    backend = _resolve(backend, path, hidden, weight, compute_dtype)
    if shard is not None and (validate or backend == "reference"):
        signature = shard.signature(
            weight.shape[0], targets.numel(), compute_dtype, eta, options, return_stats, hidden_size=hidden.shape[-1],
            max_chunk_bytes=max_chunk_bytes, reference=backend == "reference",
            validate=validate or hidden.device.type == "cpu",
        )  # fmt: skip
        shard.check_call(signature, targets, eta, ignore_index, weight)
    reduced = Reduction.of(reduction, targets, ignore_index, token_weights, num_items_in_batch)
    if backend == "reference" and shard is not None:
        # Added up in the type of accumulation, and rounded once.
        wide = copy_to(shard.group, hidden.to(accumulate_dtype(compute_dtype)))
        logits = linear_logits(wide, weight, bias, targets != ignore_index, compute_dtype)
        loss, stats = sharded_token_losses(shard, logits, targets, eta, options)
        loss = reduced.apply(loss).to(logits.dtype)
        return (loss, stats) if return_stats else loss
    if backend == "reference":
        return linear_mixce_loss_reference(hidden, weight, targets, eta, **keywords)
    if validate and shard is None:
        check_values(targets, eta, ignore_index, weight.shape[0])

    eta_tensor, eta_value = (eta.reshape(-1), 0.0) if isinstance(eta, Tensor) else (None, eta)
    # Counting the rows that are left needs the host: on a GPU it synchronises.
    drop_ignored = validate or backend == "cpu"
    inputs = (
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets.reshape(-1), eta_tensor, eta_value, *options,
        compute_dtype, max_chunk_bytes, drop_ignored, path, shard.address(backend) if shard else backend, return_stats,
    )  # fmt: skip
    wanted = [one is not None and one.requires_grad and torch.is_grad_enabled() for one in (hidden, weight, bias)]
    if path == "chunks" and reduction != "none" and any(wanted):
        scale = reduced.token_scale(targets).reshape(-1)
        loss, _, stats, correct, *_ = autograd.linear_forward_with_grad(*inputs, scale, wanted)
    else:
        loss, _, stats, correct = autograd.linear_forward(*inputs)
        loss = reduced.apply(loss.reshape(targets.shape))
    loss = loss.to(accumulate_dtype(compute_dtype))
    if not return_stats:
        return loss
    return loss, MixCEStats.of(stats.reshape(5, *targets.shape), correct.reshape(targets.shape))


def _resolve(backend: str | None, path: str, hidden: Tensor, weight: Tensor, compute_dtype: torch.dtype) -> str:
    """The backend that serves; raises RuntimeError where that of path "tiles" or a named one cannot."""
    if path == "tiles":
        reason = tiles.unavailable(hidden, weight)
        if reason is not None:
            raise RuntimeError(f"path 'tiles' cannot serve this call: {reason}")
        return "triton"
    like_logits = hidden.new_empty((), dtype=accumulate_dtype(compute_dtype)).expand(1, weight.shape[0])
    return backends.resolve(backend, like_logits)
