"""The accuracy rule: how far a result may be from the oracle, and the plain PyTorch formula that sets the measure."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from support.oracle import Options, np

# The rule speaks of float32. Kernel and plain formula both round float64 where the oracle does not, either may be
# lucky, and a single float32 step would cost 2^29 ulps.
FLOAT64_ULPS = 8


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of loss and statistics for logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ulp(magnitude: float, dtype: torch.dtype) -> float:
    """The distance between neighbours of `dtype` at `magnitude`."""
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps
    return smallest if magnitude < info.tiny else max(2.0 ** math.floor(math.log2(magnitude)) * info.eps, smallest)


def plain_losses(
    logits: Tensor,  # [N, V], float32 or float64
    targets: Tensor,  # [N]
    eta: float | Tensor,
    options: Options,
    weighting: Any = None,  # f of nll, q, entropy and collision, each [N]; None: q
) -> Tensor:
    """What one would write in PyTorch without kernels: each token's loss [N], differentiable, 0 where ignored."""
    valid = targets != options.ignore_index
    index = torch.where(valid, targets, 0).long().unsqueeze(-1)
    if options.softcap is None:
        shift = logits.detach().amax(-1, keepdim=True)
        z = options.logit_scale * (logits - shift)
        shift = options.logit_scale * shift
    else:
        z = options.softcap * torch.tanh(options.logit_scale * logits / options.softcap)
        shift = torch.zeros_like(z[:, :1])
    log_p = torch.log_softmax(z, -1)
    nll = -log_p.gather(-1, index).squeeze(-1)
    ce = nll
    if options.label_smoothing > 0:
        ce = (1 - options.label_smoothing) * nll - options.label_smoothing * log_p.mean(-1)
    with torch.no_grad():
        factor = q = torch.exp(-nll)
        if weighting is not None:
            p = log_p.exp()
            entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)
            factor = weighting(nll, q, entropy, p.square().sum(-1))
    loss = (eta + (1 - eta) * factor) * ce
    if options.z_loss > 0:
        loss = loss + options.z_loss * (torch.logsumexp(z, -1) + shift.squeeze(-1)).square()
    return torch.where(valid, loss, 0.0)


def plain_loss_and_grad(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    eta: float | Tensor,
    options: Options,
    upstream: Tensor,  # [N]
    spent_in_forward: Tensor | None = None,  # [N]
    weighting: Any = None,
) -> tuple[Tensor, Tensor]:
    """The plain formula in float32 or float64: losses [N], and their gradient [N, V] rounded to the logits' type.

    With `spent_in_forward` the gradient is rounded with these factors first, and then with `upstream`: what
    `grad_in_forward` is allowed to do.
    """
    dtype = accumulate_dtype(logits.dtype)
    leaf = logits.detach().to(dtype).requires_grad_()
    losses = plain_losses(leaf, targets, eta, options, weighting)
    first = upstream if spent_in_forward is None else spent_in_forward
    (grad,) = torch.autograd.grad(losses, leaf, first.to(dtype))
    grad = grad.to(logits.dtype)
    if spent_in_forward is not None:
        grad = (grad.to(dtype) * upstream.to(dtype).unsqueeze(-1)).to(logits.dtype)
    return losses.detach(), grad


def assert_accurate(
    name: str,
    actual: Tensor,
    expected: np.ndarray,
    plain: Tensor,
    token_scale: float,
    *,
    least_plain_error: float = 0.0,
    extra_ulps: int = 0,
) -> None:
    """Holds `actual` to the rule.

    Infinities and NaNs stand in the same places as in `expected`, and the largest error is at most twice that of
    `plain`, plus one ulp of the result's type at the largest magnitude, plus two epsilons (float32's, or float64's) of
    `token_scale`: the largest |upstream gradient * (w + 2 * z_loss * |lse|)| of a token.

    Args:
        name: what is compared, for the message.
        actual: the result, of any floating type.
        expected: the oracle's, of higher precision; the same shape.
        plain: the plain formula's, of the type of `actual`.
        token_scale: see above.
        least_plain_error: what the plain formula's error counts as where it happens to be smaller: of one number, a sum
            over tokens, it may be 0 by luck.
        extra_ulps: more ulps at the largest magnitude, for an interpreter that truncates.
    """
    assert actual.dtype == plain.dtype, f"{name}: expected {plain.dtype}, got {actual.dtype}"
    assert tuple(actual.shape) == expected.shape, f"{name}: expected shape {expected.shape}, got {tuple(actual.shape)}"
    result = to_numpy(actual, expected.dtype)
    for what, is_so in (("NaN", np.isnan), ("inf", np.isposinf), ("-inf", np.isneginf)):
        differs = is_so(result) != is_so(expected)
        assert not differs.any(), (
            f"{name}: {what} in other places than the oracle's, first at {first_index(differs)}: "
            f"got {result[differs][0]}, expected {expected[differs][0]} ({differs.sum()} of {differs.size})"
        )
    finite = np.isfinite(expected)
    if not finite.any():
        return
    # The plain formula may be NaN where the oracle is not: it measures rounding there where it has a value.
    measure = to_numpy(plain, expected.dtype)
    measured = finite & np.isfinite(measure)
    plain_error = float(np.abs(measure[measured] - expected[measured]).max(initial=0.0))
    error = np.where(finite, np.abs(np.where(finite, result, 0) - np.where(finite, expected, 0)), 0)
    largest = float(np.abs(expected[finite]).max())
    plain_error = max(plain_error, least_plain_error)
    epsilon = torch.finfo(accumulate_dtype(actual.dtype)).eps
    if actual.dtype == torch.float64:
        extra_ulps += FLOAT64_ULPS
    bound = 2 * plain_error + (1 + extra_ulps) * ulp(largest, actual.dtype) + 2 * epsilon * token_scale
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error[worst] <= bound, (
        f"{name}: error {error[worst]:.3e} at {tuple(map(int, worst))} exceeds {bound:.3e} (the plain formula's: "
        f"{plain_error:.3e}): got {result[worst]}, expected {expected[worst]}; largest magnitude {largest:.3e}"
    )


def to_numpy(tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    """The tensor's values, exactly, as float64 or longer."""
    return tensor.detach().cpu().double().numpy().astype(dtype)


def first_index(mask: np.ndarray) -> tuple[int, ...]:
    """Where the first True stands."""
    return tuple(int(i) for i in np.argwhere(mask)[0])
