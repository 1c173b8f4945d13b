"""A second opinion beside `mixce_loss_reference`: the loss and its gradient in NumPy, in float64 or longer.

Written from the formulas of the paper with the gradient derived by hand; shares nothing with the package.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest


class _NumPy:
    """NumPy, whose longest floating type is longer than float64; a test that needs it where it is missing skips."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pytest looks for fixtures in what a module imports
            raise AttributeError(name)
        return getattr(pytest.importorskip("numpy", reason="the oracle computes in NumPy"), name)


np: Any = _NumPy()


class Options(NamedTuple):
    """The options that change a token's own numbers."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0


class TokenResults(NamedTuple):
    """Of each token [N], with its gradient [N, V] for an upstream gradient of 1."""

    loss: np.ndarray
    grad: np.ndarray
    nll: np.ndarray
    q: np.ndarray
    weight: np.ndarray
    lse: np.ndarray
    entropy: np.ndarray
    collision: np.ndarray
    correct: np.ndarray


def token_results(
    logits: np.ndarray,  # [N, V], float64 or longdouble: the type of all arithmetic
    targets: np.ndarray,  # [N]
    eta: np.ndarray,  # [N]
    options: Options,
    weighting: Any = None,  # f of nll, q, entropy and collision, each [N]; None: q
) -> TokenResults:
    """Loss, gradient and statistics of valid and ignored tokens; every target is ignore_index or in [0, V)."""
    with np.errstate(all="ignore"):
        return _token_results(logits, targets, eta.astype(logits.dtype), options, weighting)


def _token_results(
    logits: np.ndarray, targets: np.ndarray, eta: np.ndarray, options: Options, weighting: Any
) -> TokenResults:
    count, vocab_size = logits.shape
    rows = np.arange(count)
    valid = targets != options.ignore_index
    y = np.where(valid, targets, 0).astype(np.int64)
    x = np.where(valid[:, None], logits, 0)
    one = x.dtype.type(1)
    smoothing, z_loss, scale = (
        x.dtype.type(value) for value in (options.label_smoothing, options.z_loss, options.logit_scale)
    )

    if options.softcap is None:
        m = x.max(-1, keepdims=True)
        d = scale * (x - m)
        m = scale * m
        slope = np.broadcast_to(scale, x.shape)
    else:
        cap = x.dtype.type(options.softcap)
        tanh = np.tanh(scale * x / cap)
        m = (cap * tanh).max(-1, keepdims=True)
        d = cap * tanh - m
        slope = scale * (one - tanh) * (one + tanh)

    s = np.log(np.exp(d).sum(-1))
    lse = m[:, 0] + s
    d_y = d[rows, y]
    nll = s - d_y
    q = np.exp(-nll)
    log_p = d - s[:, None]
    p = np.exp(log_p)
    entropy = -np.where(p == 0, 0, p * log_p).sum(-1)
    entropy = np.where(np.isnan(nll), nll, entropy)
    collision = (p**2).sum(-1)
    f = q if weighting is None else np.where(np.isnan(q), q, weighting(nll, q, entropy, collision))
    w = eta + (1 - eta) * f
    ce = nll
    if smoothing > 0:
        # A target without probability costs infinitely much however it is smoothed: not inf - inf.
        ce = np.where(np.isposinf(nll), nll, nll + smoothing * (d_y - d.mean(-1)))
    # q log q is 0 in the limit.
    loss = np.where(w == 0, 0, w * ce)
    a = w
    c = w * smoothing / vocab_size if smoothing > 0 else np.where(np.isnan(w), w, 0)
    t = w * (np.expm1(-nll) + smoothing) - c
    if z_loss > 0:
        loss = loss + z_loss * lse**2
        a = a + 2 * z_loss * lse
        t = t + 2 * z_loss * lse * q

    grad = a[:, None] * p - c[:, None]
    grad[rows, y] = t
    grad = grad * slope
    correct = (x.argmax(-1) == y) & ~np.isnan(nll) & valid

    per_token = (np.where(valid, value, 0) for value in (nll, q, w, lse, entropy, collision))
    return TokenResults(np.where(valid, loss, 0), np.where(valid[:, None], grad, 0), *per_token, correct)
