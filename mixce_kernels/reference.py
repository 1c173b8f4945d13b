"""The loss in plain PyTorch: the oracle that every kernel is held to.

No line here is shared with a kernel and no gradient is written by hand: autograd differentiates the formula of
Zhang et al., "MixCE: Training Autoregressive Language Models by Mixing Forward and Reverse Cross-Entropies",
ACL 2023 (arXiv 2305.16958).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mixce_kernels.autocast import autocast_dtype, without_autocast
from mixce_kernels.checks import check_linear_tensors, check_tensors, check_values, is_batched
from mixce_kernels.mixture import check_weighting, factor_of
from mixce_kernels.options import LinearOptions, LossOptions, TokenOptions, accumulate_dtype, check_eta
from mixce_kernels.stats import MixCEStats
from mixce_kernels.weightings import PROBABILITY, CustomWeighting, Given, Weighting, is_built_in


def mixce_loss_reference(
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
) -> Tensor | tuple[Tensor, MixCEStats]:
    """The MixCE loss by PyTorch's autograd: arguments, results and errors of `fused_mixce_loss`.

    `inplace_backward` and `grad_in_forward` are permissions that this function has no use for: they change no value.
    Half-precision logits are computed in float32, float64 logits in float64. Runs on any device.
    """
    options = LossOptions(
        ignore_index=ignore_index, reduction=reduction, token_weights=token_weights,
        num_items_in_batch=num_items_in_batch, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        logit_scale=logit_scale, weighting=weighting, return_stats=return_stats, validate=validate,
    )  # fmt: skip
    return loss_of_logits(logits, targets, eta, options)


def loss_of_logits(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    eta: float | Tensor,
    options: LossOptions,
) -> Tensor | tuple[Tensor, MixCEStats]:
    """`mixce_loss_reference` with its options in a record."""
    token_options = options.for_tokens()
    check_tensors(logits, targets)
    eta = check_eta(eta, targets)
    weighting = check_weighting(options.weighting, targets)
    options.check_reduction(targets)
    readable = logits.device.type == "cpu" and not torch.compiler.is_compiling() and not is_batched(targets)
    if options.validate or readable:
        check_values(targets, eta, weighting, token_options.ignore_index, logits.shape[-1])

    if not is_built_in(weighting):
        _, stats = token_losses(logits.detach(), targets, eta, PROBABILITY, token_options)
        weighting = Given(factor_of(weighting, stats, validate=options.validate))
    loss, stats = token_losses(logits, targets, eta, weighting, token_options)

    # The reduction is in float64, too: of a sum no more is lost than its tokens have lost.
    valid = targets != token_options.ignore_index
    weights = valid.double() if options.token_weights is None else options.token_weights.detach().double()
    weights = torch.where(valid, weights, 0.0)
    reduced = loss.double() * weights
    if options.reduction != "none":
        reduced = reduced.sum()
    if options.reduction == "mean":
        divisor = weights.sum() if options.num_items_in_batch is None else options.num_items_in_batch
        divisor = torch.as_tensor(divisor, dtype=torch.float64, device=loss.device).reshape(())
        reduced = reduced / torch.where(divisor == 0, 1.0, divisor)
    loss = reduced.to(loss.dtype)
    return (loss, stats) if options.return_stats else loss


def token_losses(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    eta: float | Tensor,
    weighting: Weighting,
    options: TokenOptions,
) -> tuple[Tensor, MixCEStats]:
    """Each token's loss [...], differentiable any number of times, and its detached statistics.

    A target that is neither in [0, V) nor ignore_index gives NaN in its row alone.
    """
    valid, known, index = places(targets, logits.shape[-1], options)
    m, d = exponents(logits, valid, options)
    # From here on a token has a few numbers, in float64.
    e = d.exp()
    sum_exp = e.sum(-1).double()
    s = sum_exp.log()
    lse = m + s
    nll = s - d.gather(-1, index).squeeze(-1)
    with torch.no_grad():
        entropy = s - torch.where(e == 0.0, 0.0, e * d).sum(-1) / sum_exp
        collision = e.square().sum(-1) / sum_exp.square()
        correct = (logits.argmax(-1) == targets) & ~nll.isnan() & valid & known
        stacked = torch.stack((nll, torch.exp(-nll), torch.ones_like(nll), lse, entropy, collision))
        stacked = torch.where(valid, torch.where(known, stacked, torch.nan), 0.0).to(d.dtype)
        stats = MixCEStats.of(stacked, correct)
    uniform_ce = s - d.mean(-1) if options.label_smoothing > 0.0 else nll
    loss, weight = mixture(nll, uniform_ce, lse, eta, weighting, stats, options)
    loss = loss * torch.where(valid & ~known, torch.nan, 1.0)
    weight = torch.where(valid, weight, 0.0)
    return torch.where(valid, loss, 0.0).to(d.dtype), stats._replace(weight=weight.to(d.dtype))


def exponents(
    logits: Tensor,  # [..., V]
    valid: Tensor,  # [...] bool
    options: TokenOptions,
    temperature: Tensor | None = None,  # [...]
    largest: Callable[[Tensor], Tensor] = lambda z: z.detach().amax(-1),
) -> tuple[Tensor, Tensor]:
    """The largest z of each token [...], detached, and every z less it [..., V], in the type of arithmetic."""
    # An ignored row must not reach the graph: 0 * NaN would.
    z = logits.masked_fill(~valid.unsqueeze(-1), 0.0).to(accumulate_dtype(logits.dtype))
    scale: float | Tensor = options.logit_scale
    if options.softcap is not None:
        z, scale = options.softcap * torch.tanh(options.logit_scale * z / options.softcap), 1.0
    if temperature is not None:
        divisor = torch.where(temperature > 0, temperature, torch.nan).to(z.dtype)
        scale = torch.where(valid, scale / divisor, 1.0)
    # The difference comes before the scale: logits near 1e5 keep their digits.
    m = largest(z)
    return scale * m, (scale if isinstance(scale, float) else scale.unsqueeze(-1)) * (z - m.unsqueeze(-1))


def places(targets: Tensor, vocab_size: int, options: TokenOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens are not ignored, which have a target in range, and where to read that: [...], [...], [..., 1]."""
    valid = targets != options.ignore_index
    known = (targets >= 0) & (targets < vocab_size)
    return valid, known, torch.where(valid & known, targets, 0).long().unsqueeze(-1)


def mixture(
    nll: Tensor,  # [...]
    uniform_ce: Tensor,  # [...], the mean of -log p over the vocabulary; not read without label smoothing
    lse: Tensor,  # [...]
    eta: float | Tensor,
    weighting: Weighting,
    stats: MixCEStats,  # detached, without the weight
    options: TokenOptions,
) -> tuple[Tensor, Tensor]:
    """Each token's loss and weight, [...]."""
    label_smoothing, z_loss = options.label_smoothing, options.z_loss
    ce = nll
    if label_smoothing == 1.0:
        ce = uniform_ce
    elif label_smoothing > 0.0:
        # The same as nll + label_smoothing * (z_y - mean z), but without inf - inf where z_y and mean z are -inf.
        ce = (1.0 - label_smoothing) * nll + label_smoothing * uniform_ce
    if isinstance(eta, Tensor):
        eta = eta.to(nll.dtype)
    with torch.no_grad():
        w = eta + (1.0 - eta) * weighting(stats)
    # At a weight of 0 the loss is its limit, 0, even where ce is infinite.
    loss = torch.where(w == 0.0, 0.0, torch.where(w == 0.0, 0.0, ce) * w)
    if z_loss > 0.0:
        loss = loss + z_loss * lse.square()
    return loss, w


def linear_mixce_loss_reference(
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
) -> Tensor | tuple[Tensor, MixCEStats]:
    """`mixce_loss_reference` of the logits hidden @ weight.T + bias.

    Arguments, results and errors are those of `fused_linear_mixce_loss`. All logits are materialised, in float32
    (float64 for float64 tensors); under autocast the operands are rounded to its type first. `max_chunk_bytes` and
    `path` change no value. Differentiable any number of times.
    """
    options = LossOptions(
        ignore_index=ignore_index, reduction=reduction, token_weights=token_weights,
        num_items_in_batch=num_items_in_batch, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        logit_scale=logit_scale, weighting=weighting, return_stats=return_stats, validate=validate,
    )  # fmt: skip
    LinearOptions(max_chunk_bytes, path).check(backend=None)
    return loss_of_hidden(hidden, weight, bias, targets, eta, options)


def loss_of_hidden(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [...]
    eta: float | Tensor,
    options: LossOptions,
) -> Tensor | tuple[Tensor, MixCEStats]:
    """`linear_mixce_loss_reference` with its options in a record."""
    token_options = options.for_tokens()
    compute_dtype = check_linear_tensors(hidden, weight, bias, targets, autocast_dtype(hidden))
    logits = linear_logits(hidden, weight, bias, targets != token_options.ignore_index, compute_dtype)
    return loss_of_logits(logits, targets, eta, options)


def linear_logits(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    valid: Tensor,  # [...] bool
    compute_dtype: torch.dtype,
) -> Tensor:
    """The logits [..., V] of operands in `compute_dtype`, in float32 or float64; those of invalid rows are of zeros."""
    dtype = accumulate_dtype(compute_dtype)
    # Whatever stands in an invalid row must not reach the graph: 0 * NaN would.
    hidden = _rounded(hidden.masked_fill(~valid.unsqueeze(-1), 0.0), compute_dtype)
    with without_autocast(hidden):
        return F.linear(hidden, _rounded(weight, compute_dtype), None if bias is None else bias.to(dtype))


def _rounded(operand: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """The operand rounded to `compute_dtype`, in float32 or float64; its gradient is not rounded on the way back."""
    wide = operand.to(accumulate_dtype(compute_dtype))
    if operand.dtype == compute_dtype:
        return wide
    with torch.no_grad():
        step = torch.where(wide.isfinite(), wide.to(compute_dtype).to(wide.dtype) - wide, 0.0)
    return wide + step
