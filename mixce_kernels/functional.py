"""The public functions: their arguments in one record, and on to the body of the loss."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from mixce_kernels.checks import has_dtensor
from mixce_kernels.linear import loss as linear_loss
from mixce_kernels.logits import loss as logits_loss
from mixce_kernels.options import LinearOptions, LossOptions
from mixce_kernels.parallel import loss as parallel_loss
from mixce_kernels.parallel.shard import Sharding
from mixce_kernels.stats import MixCEStats
from mixce_kernels.weightings import PROBABILITY, CustomWeighting


def fused_mixce_loss(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    eta: float | Tensor = 0.5,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,  # [...]
    num_items_in_batch: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    weighting: CustomWeighting = PROBABILITY,
    inplace_backward: bool = False,
    grad_in_forward: bool = False,
    return_stats: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, MixCEStats]:
    """The mixture of forward and reverse cross-entropy of next-token logits, fused into one pass over the vocabulary.

    With nll = -log softmax(z)[target] and q = exp(-nll), the model's probability of the target, a token's loss is

        (eta + (1 - eta) * stopgrad(q)) * ce + z_loss * logsumexp(z)^2,

    where ce is nll (label-smoothed where asked) and z = softcap * tanh(logit_scale * logits / softcap), or
    logit_scale * logits without a softcap. eta = 1 is `torch.nn.functional.cross_entropy`; eta = 0 is the reverse
    cross-entropy approximation, known as dynamic fine-tuning (DFT). With `weighting` another function of the token's
    statistics takes the place of q in the weight; no gradient goes through it. Source: Zhang et al., "MixCE", ACL 2023
    (arXiv 2305.16958): the self-reweighted mixture.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64, unnormalised. Leading dimensions may be strided, as in
            `logits[:, :-1]`: rows are read where they lie as long as two strides reach them all, and are made
            contiguous otherwise. Arithmetic is float32 (float64 for float64 logits), also under autocast.
        targets: [...], int64 or int32, class indices in [0, V) or `ignore_index`.
        eta: mixing ratio in [0, 1]: a number, or a floating tensor that broadcasts to targets' shape and is read on
            the device, so that a schedule neither recompiles nor synchronises. A number that misses the range by at
            most 1e-6 is its end. Must not require a gradient; the forward's values count, also where the tensor is
            overwritten before backward.
        ignore_index: tokens with this target have loss, gradient and statistics 0; their logits are not read.
        reduction: "none" gives targets' shape, "sum" the sum, "mean" the sum divided by the number of valid tokens
            (by the sum of their weights, with `token_weights`). A divisor of 0 counts as 1: a batch whose every
            token is ignored has loss 0 and gradient 0.
        token_weights: [...], floating, factors of the tokens' losses; must not require a gradient.
        num_items_in_batch: replaces the divisor of "mean": for gradient accumulation and data parallelism. A number or
            a tensor of one element on any device; must not require a gradient.
        label_smoothing: in [0, 1], as in `torch.nn.functional.cross_entropy`. q and the weight stay unsmoothed.
        z_loss: factor of logsumexp(z)^2, which is not weighted by eta or q.
        softcap: bound of the capped logits, or None.
        logit_scale: factor of the logits (1 / temperature), positive.
        weighting: f of a token's weight eta + (1 - eta) * f: one of `mixce_kernels.weightings`, whose parameters may be
            tensors, read on the device as eta is. Or any function of `MixCEStats` (detached, float32, or float64 for
            float64 logits; `weight` is NaN, ignored tokens are 0) that gives a tensor of targets' shape and the
            statistics' dtype, not negative. It is called once a forward with all tokens, without a graph, and costs one
            more read of the logits.
        inplace_backward: the gradient overwrites the logits' memory in backward instead of allocating as much again.
            Whoever saved the logits for a later backward then gets PyTorch's error. Without a gradient to compute,
            logits are never touched. A leaf, or a view of one, is refused. This has no effect under `torch.compile`,
            which plans memory itself, under `torch.func`, and under hooks on saved tensors, whose copies autograd does
            not watch; within a checkpoint it has where nothing else needs the logits.
        grad_in_forward: the gradient is computed together with the loss: one read and one write of the logits in all,
            where a row fits on the chip. An upstream gradient other than 1 multiplies it in backward: for half
            precision a second rounding. With `inplace_backward`, forward itself overwrites the logits. With a function
            of the caller's as weighting these are two launches.
        return_stats: also return the tokens' statistics, from the same pass.
        validate: check the values of targets, of tensors eta and parameters of the weighting, and of a function's
            result, synchronising with a GPU. On the CPU targets are always checked.
        backend: "cpu", "cuda", "triton" or "reference"; None picks the best that can serve, or `MIXCE_BACKEND` of the
            environment.

    Returns:
        The loss, float32 (float64 for float64 logits); with `return_stats`, a pair of it and `MixCEStats`. Of a
        `DTensor` they are DTensors: the loss replicated, results of tokens placed as the tokens are.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, range, placement or combination is wrong.
        IndexError: a target is out of range, on the CPU or with `validate`. On a GPU, without `validate`, that row's
            loss and gradient are NaN.
        RuntimeError: the backend asked for cannot serve these logits.
    """
    options = LossOptions(
        ignore_index=ignore_index, reduction=reduction, token_weights=token_weights,
        num_items_in_batch=num_items_in_batch, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        logit_scale=logit_scale, weighting=weighting, inplace_backward=inplace_backward,
        grad_in_forward=grad_in_forward, return_stats=return_stats, validate=validate, backend=backend,
    )  # fmt: skip
    return mixce_loss(logits, targets, eta, options)


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
    weighting: CustomWeighting = PROBABILITY,
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
        weighting: likewise. A function of the caller's is called with the statistics of all tokens, not of a chunk's:
            the logits are computed once more for it.
        inplace_backward, grad_in_forward: permissions that this function has no use for: there are no logits to
            overwrite, and the gradient is computed in the forward where that costs nothing.
        validate: as in `fused_mixce_loss`.
        max_chunk_bytes: memory for the logits of a chunk with path "chunks": as many rows are taken as fit, at least
            one. None: 44 MiB on a CPU (2 V D bytes for a half-precision weight, if that is more), 1 GiB on a GPU. Where
            half-precision operands are multiplied in float32, this includes the float32 copy of a tile of the weight.
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
    options = LossOptions(
        ignore_index=ignore_index, reduction=reduction, token_weights=token_weights,
        num_items_in_batch=num_items_in_batch, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        logit_scale=logit_scale, weighting=weighting, inplace_backward=inplace_backward,
        grad_in_forward=grad_in_forward, return_stats=return_stats, validate=validate, backend=backend,
    )  # fmt: skip
    linear = LinearOptions(max_chunk_bytes=max_chunk_bytes, path=path)
    sharding = Sharding(group=group, vocab_start=vocab_start, vocab_size=vocab_size, check_group=check_group)
    return linear_mixce_loss(hidden, weight, bias, targets, eta, options, linear, sharding)


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
    weighting: CustomWeighting = PROBABILITY,
    inplace_backward: bool = False,
    grad_in_forward: bool = False,
    return_stats: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, MixCEStats]:
    """`fused_mixce_loss` of logits [..., V] of which each rank of a group holds some columns.

    Every rank calls it with its columns and with the same targets and options, and gets the same loss and statistics;
    its gradient is that of its own columns. The ranks meet in one all-gather a forward, to which each sends 12 bytes a
    token, 4 more with label smoothing and 8 with statistics (12 with a softcap), and 12 bytes a call; twice as many for
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
        weighting: likewise, the same on every rank. For a function of the caller's, which gets the same statistics on
            each, the ranks meet once more.
        grad_in_forward: the gradient is computed in the forward, once the ranks have met, by a second read of the
            logits.
        validate: as in `fused_mixce_loss`. With the backends "cpu" and, on a CPU, "reference" targets are always
            checked.
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
    options = LossOptions(
        ignore_index=ignore_index, reduction=reduction, token_weights=token_weights,
        num_items_in_batch=num_items_in_batch, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        logit_scale=logit_scale, weighting=weighting, inplace_backward=inplace_backward,
        grad_in_forward=grad_in_forward, return_stats=return_stats, validate=validate, backend=backend,
    )  # fmt: skip
    sharding = Sharding(group=group, vocab_start=vocab_start, vocab_size=vocab_size, check_group=check_group)
    return parallel_loss.mixce_loss(logits_shard, targets, eta, options, sharding)


def mixce_loss(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    eta: float | Tensor,
    options: LossOptions,
) -> Tensor | tuple[Tensor, MixCEStats]:
    """`fused_mixce_loss` with its options in a record: of DTensors or of plain tensors."""
    if has_dtensor(logits, targets, eta, options.token_weights):
        # Imported where it is needed: PyTorch's DTensors take longer to import than all the rest.
        from mixce_kernels import dtensors

        return dtensors.mixce_loss(logits, targets, eta, options)
    return logits_loss.mixce_loss(logits, targets, eta, options)


def linear_mixce_loss(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [...]
    eta: float | Tensor,
    options: LossOptions,
    linear: LinearOptions,
    sharding: Sharding,
) -> Tensor | tuple[Tensor, MixCEStats]:
    """`fused_linear_mixce_loss` with its options in records: of DTensors, a rank's shard of a weight or a whole one."""
    if has_dtensor(hidden, weight, bias, targets, eta, options.token_weights):
        from mixce_kernels import dtensors

        sharding.check_unused()
        return dtensors.linear_mixce_loss(hidden, weight, bias, targets, eta, options, linear)
    sharding.check_group_is_named()
    if sharding.group is not None:
        return parallel_loss.linear_mixce_loss(hidden, weight, bias, targets, eta, options, linear, sharding)
    return linear_loss.linear_mixce_loss(hidden, weight, bias, targets, eta, options, linear)
