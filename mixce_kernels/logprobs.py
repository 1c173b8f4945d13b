"""The public functions of tokens' log-probabilities: their arguments in records, and on to the bodies."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from mixce_kernels.checks import has_dtensor
from mixce_kernels.linear import logprobs as linear_logprobs
from mixce_kernels.logits import logprobs as logits_logprobs
from mixce_kernels.options import LinearOptions, LogprobOptions
from mixce_kernels.parallel import logprobs as parallel_logprobs
from mixce_kernels.parallel.shard import Sharding


def fused_token_logprobs(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each token's log-probability and, where asked for, the entropy of the model's distribution, both differentiable.

    With l_j = log softmax(z)_j a token has

        log-probability  l_y                    derivative by z_j:  [j = y] - p_j
        entropy          -sum_j p_j l_j         derivative by z_j:  -p_j (l_j + entropy)

    where p = exp(l) and z = softcap * tanh(logit_scale * logits / softcap) / temperature, or logit_scale * logits /
    temperature without a softcap. The forward reads the logits once; backward reads them once more and writes the
    gradient of both, rounded once. A token's numbers do not depend on which other tokens are in the call, bit for bit
    (docs/logprobs.md says where this holds). Source: the log-likelihood and the entropy of the softmax policy of
    reinforcement learning (Williams, 1992); the sums are those of the online softmax (Milakov and Gimelshein, arXiv
    1805.02867).

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64, unnormalised. Leading dimensions may be strided, as in
            `logits[:, :-1]`. Arithmetic is float32 (float64 for float64 logits), also under autocast.
        targets: [...], int64 or int32, class indices in [0, V) or `ignore_index`: the tokens that were sampled.
        temperature: what z is divided by, positive: a number, or a floating tensor that broadcasts to targets' shape
            and is read on the device, where an entry that is not positive makes its own row NaN. Must not require a
            gradient; the forward's values count, also where the tensor is overwritten before backward.
        ignore_index: tokens with this target have log-probability, entropy and gradient 0; their logits are not read.
        softcap: bound of the capped logits, or None.
        logit_scale: factor of the logits, positive.
        return_entropy: also return the entropies, from the same pass.
        inplace_backward: the gradient overwrites the logits' memory in backward: as in `fused_mixce_loss`.
        validate: check the values of targets and of a tensor of temperatures, synchronising with a GPU. On the CPU
            targets are always checked.
        backend: "cpu", "cuda", "triton" or "reference"; None picks the best that can serve, or `MIXCE_BACKEND` of the
            environment.

    Returns:
        The log-probabilities [...] in nats, float32 (float64 for float64 logits); with `return_entropy`, a pair of them
        and the entropies [...] in nats. Of a `DTensor` they are DTensors, placed as the tokens are. A log-probability
        is -inf where the target's logit is; a row of -inf, or with a NaN, is NaN.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, range, placement or combination is wrong.
        IndexError: a target is out of range, on the CPU or with `validate`. On a GPU, without `validate`, that row's
            results and gradient are NaN.
        RuntimeError: the backend asked for cannot serve these logits.
    """
    options = LogprobOptions(
        temperature=temperature, ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale,
        return_entropy=return_entropy, inplace_backward=inplace_backward, validate=validate, backend=backend,
    )  # fmt: skip
    if has_dtensor(logits, targets, temperature):
        # Imported where it is needed: PyTorch's DTensors take longer to import than all the rest.
        from mixce_kernels import dtensors

        return dtensors.token_logprobs(logits, targets, options)
    return logits_logprobs.token_logprobs(logits, targets, options)


def fused_linear_token_logprobs(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    validate: bool = False,
    max_chunk_bytes: int | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    check_group: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fused_token_logprobs` of the logits hidden @ weight.T + bias, which never exist as a whole.

    The logits of some rows at a time are computed by the device's BLAS, in float32 whatever the type of the operands
    (float64 for float64). Backward computes them once more, in the same chunks, since what comes from above comes
    later. Gradients are summed in float32 and rounded once, to their tensor's type; only those are computed whose
    tensor requires one. Gradients with a graph of their own are computed through the plain formula, with all logits in
    memory. With `group` the weight is a shard, as in `fused_linear_mixce_loss`, or it is a DTensor that is sharded by
    the vocabulary.

    Args:
        hidden: [..., D], float32, bfloat16, float16 or float64: the last hidden states.
        weight: [V, D] of the same type, the language model head's own layout. Under autocast the types may differ: the
            products' operands are of autocast's type.
        targets: [...], int64 or int32, class indices in [0, V) or `ignore_index`.
        bias: [V] of the same type, or None.
        ignore_index: tokens with this target have log-probability, entropy and gradient 0, whatever their hidden states
            hold. On the CPU, and on a GPU with `validate`, they are left out of the products.
        temperature, softcap, logit_scale, return_entropy, validate: as in `fused_token_logprobs`.
        inplace_backward: a permission that this function has no use for: there are no logits to overwrite.
        max_chunk_bytes: memory for the logits of a chunk, as in `fused_linear_mixce_loss`.
        group, vocab_start, vocab_size, check_group: of a weight that is a shard, as in `fused_linear_mixce_loss`.
        backend: "cpu", "cuda", "triton" or "reference", whose kernels turn logits into log-probabilities; None picks
            the best that can serve, or `MIXCE_BACKEND` of the environment.

    Returns:
        The log-probabilities [...] in nats, float32 (float64 for float64 tensors); with `return_entropy`, a pair of
        them and the entropies [...] in nats.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, range, placement or combination is wrong; or, on every rank, the ranks' calls do
            not fit together.
        IndexError: a target is out of range, on the CPU or with `validate`. On a GPU, without `validate`, that row's
            results are NaN, and so are the gradients that it is part of.
        RuntimeError: the backend asked for cannot serve these tensors, or there is no process group.
    """
    options = LogprobOptions(
        temperature=temperature, ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale,
        return_entropy=return_entropy, inplace_backward=inplace_backward, validate=validate, backend=backend,
    )  # fmt: skip
    linear = LinearOptions(max_chunk_bytes=max_chunk_bytes)
    sharding = Sharding(group=group, vocab_start=vocab_start, vocab_size=vocab_size, check_group=check_group)
    if has_dtensor(hidden, weight, bias, targets, temperature):
        from mixce_kernels import dtensors

        sharding.check_unused()
        return dtensors.linear_token_logprobs(hidden, weight, bias, targets, options, linear)
    sharding.check_group_is_named()
    if group is not None:
        return parallel_logprobs.linear_token_logprobs(hidden, weight, bias, targets, options, linear, sharding)
    return linear_logprobs.linear_token_logprobs(hidden, weight, bias, targets, options, linear)


def vocab_parallel_token_logprobs(
    logits_shard: Tensor,  # [..., columns of this rank]
    targets: Tensor,  # [...], of the whole vocabulary
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int | None = None,
    check_group: bool = True,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fused_token_logprobs` of logits [..., V] of which each rank of a group holds some columns.

    Every rank calls it with its columns and with the same targets and options, and gets the same results; its gradient
    is that of its own columns. The ranks meet in one all-gather a forward, to which each sends 12 bytes a token, 8 more
    with entropies (12 with a softcap), and 12 bytes a call; twice as many for float64 logits. A backward communicates
    nothing.

    Args:
        logits_shard: [..., columns], the columns of the logits that this rank holds, none included.
        targets: [...], int64 or int32, class indices in [0, V), not those of a shard, or `ignore_index`.
        group, vocab_start, vocab_size, check_group: as in `vocab_parallel_mixce_loss`.
        temperature, ignore_index, softcap, logit_scale, return_entropy, inplace_backward: as in `fused_token_logprobs`,
            the same on every rank. Entropies with a softcap read the logits once more.
        validate: as in `fused_token_logprobs`.
        backend: as in `vocab_parallel_mixce_loss`.

    Returns:
        The log-probabilities [...] in nats, float32 (float64 for float64 logits); with `return_entropy`, a pair of them
        and the entropies [...] in nats. They are the same on every rank.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, range or combination is wrong; or, on every rank, the ranks' calls do not fit
            together.
        IndexError: a target is out of range, on the CPU or with `validate`, on every rank. On a GPU, without
            `validate`, that row's results and gradient are NaN.
        RuntimeError: the backend asked for cannot serve these logits, or there is no process group.
    """
    options = LogprobOptions(
        temperature=temperature, ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale,
        return_entropy=return_entropy, inplace_backward=inplace_backward, validate=validate, backend=backend,
    )  # fmt: skip
    sharding = Sharding(group=group, vocab_start=vocab_start, vocab_size=vocab_size, check_group=check_group)
    return parallel_logprobs.token_logprobs(logits_shard, targets, options, sharding)
