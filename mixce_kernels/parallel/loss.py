"""`vocab_parallel_mixce_loss`: the loss of logits whose vocabulary is split over the ranks of a process group."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from mixce_kernels import backends
from mixce_kernels.backends.layout import check_overwritable
from mixce_kernels.functional import fused_loss
from mixce_kernels.logits.autograd import is_transformed
from mixce_kernels.options import (
    accumulate_dtype,
    check_eta,
    check_reduction,
    check_shard_range,
    check_shard_tensors,
    check_token_options,
)
from mixce_kernels.parallel.backend import Shard
from mixce_kernels.parallel.collectives import group_name
from mixce_kernels.parallel.reference import sharded_token_losses
from mixce_kernels.reduction import Reduction
from mixce_kernels.stats import MixCEStats


def vocab_parallel_mixce_loss(
    logits_shard: Tensor,  # [..., columns of this rank]
    targets: Tensor,  # [...], of the whole vocabulary
    eta: float | Tensor = 0.5,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int | None = None,
    check_group: bool = True,
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, MixCEStats]:
    """`fused_mixce_loss` of logits [..., V] of which each rank of a group holds some columns.

    Every rank calls it with its columns and with the same targets and options, and gets the same loss and statistics;
    its gradient is that of its own columns. The ranks meet in one all-gather a forward, to which each sends 12 bytes a
    token, 4 more with label smoothing and 4 with statistics (8 with a softcap), and 12 bytes a call; twice as many for
    float64 logits. A backward communicates nothing, and beside the gradient no memory of the logits' size is taken.

    Source: Zhang et al., "MixCE", ACL 2023 (arXiv 2305.16958); the merging of partial sums is that of the online
    softmax (Milakov and Gimelshein, arXiv 1805.02867).

    Args:
        logits_shard: [..., columns], the columns of the logits that this rank holds: as many as it likes, none
            included. Otherwise as the logits of `fused_mixce_loss`.
        targets: [...], int64 or int32, class indices in [0, V), not those of a shard, or `ignore_index`.
        eta: mixing ratio in [0, 1]: a number, or a floating tensor that broadcasts to targets' shape.
        group: the ranks that hold the vocabulary; None is all of `torch.distributed`.
        vocab_start: the first of this rank's columns. Together the ranks must hold each column once, in any order.
        vocab_size: V, where the vocabulary is padded: columns from there on have no probability and gradient 0. None:
            all columns that the ranks hold.
        check_group: compare the ranks' columns, shapes and options, and raise on every rank where they do not fit
            together. At the first call in a group that costs one small collective, for which a GPU's host waits. Later
            calls tell it by a digest in their one message, with the backend "cpu" at once, if the messages are of one
            size; with other backends the loss of a target that no rank or several hold is then NaN. Messages of other
            sizes (other numbers of tokens, other numbers a token) are torch.distributed's own error.
        ignore_index, reduction, token_weights, num_items_in_batch, label_smoothing, z_loss, softcap, logit_scale,
            inplace_backward, return_stats: as in `fused_mixce_loss`. Statistics with a softcap read the logits once
            more.
        grad_in_forward: the gradient is computed in the forward, once the ranks have met, by a second read of the
            logits.
        validate: check the values of targets and of a tensor eta, synchronising with a GPU. With the backends "cpu"
            and, on a CPU, "reference" targets are always checked.
        backend: "cpu", "cuda", "triton" or "reference"; None picks the best that can serve, or `MIXCE_BACKEND` of the
            environment. Ranks may differ in it, except in whether it is "reference", which takes some collectives
            more. Neither "reference" nor `validate` is for `torch.compile`.

    Returns:
        The loss, float32 (float64 for float64 logits), the same on every rank; with `return_stats`, a pair of it and
        `MixCEStats`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, range or combination is wrong; or, on every rank, the ranks' calls do not fit
            together.
        IndexError: a target is out of range, on the CPU or with `validate`, on every rank. On a GPU, without
            `validate`, that row's loss and gradient are NaN.
        RuntimeError: the backend asked for cannot serve these logits, or there is no process group. A rank that fails
            in a collective raises torch.distributed's own error in the others.
    """
    options = check_token_options(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    check_shard_tensors(logits_shard, targets)
    if inplace_backward and not is_transformed():
        check_overwritable(logits_shard)
    check_shard_range(vocab_start, vocab_size)
    eta = check_eta(eta, targets)
    check_reduction(reduction, targets, token_weights, num_items_in_batch)
    shard = Shard(group_name(group), vocab_start, vocab_size, check_group, reduction, token_weights is not None)
    backend = backends.resolve(backend, logits_shard)
    if validate or backend == "reference":
        signature = shard.signature(
            logits_shard.shape[-1], targets.numel(), logits_shard.dtype, eta, options, return_stats,
            reference=backend == "reference", validate=validate or logits_shard.device.type == "cpu",
        )  # fmt: skip
        shard.check_call(signature, targets, eta, ignore_index, logits_shard)
    reduced = Reduction.of(reduction, targets, ignore_index, token_weights, num_items_in_batch)
    if backend == "reference":
        loss, stats = sharded_token_losses(shard, logits_shard, targets, eta, options)
        loss = reduced.apply(loss).to(accumulate_dtype(logits_shard.dtype))
        return (loss, stats) if return_stats else loss
    return fused_loss(
        logits_shard, targets, eta, options, reduced, inplace_backward, grad_in_forward, return_stats,
        shard.address(backend),
    )  # fmt: skip
