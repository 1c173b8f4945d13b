"""One call of the backend `triton`, loss and gradient, held to the accuracy rule."""

from __future__ import annotations

import torch
from torch import Tensor

from mixce_kernels import fused_mixce_loss, mixce_loss_reference
from support.numerics import assert_accurate, plain_loss_and_grad
from support.oracle import Options


def confident_inputs(n_rows: int, vocab_size: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and targets [N]: every other row is sure of its target, row 2 is ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n_rows, vocab_size, generator=generator)
    targets = torch.randint(0, vocab_size, (n_rows,), generator=generator)
    logits[torch.arange(0, n_rows, 2), targets[::2]] += 12
    targets[2:3] = -100
    return logits.to(dtype), targets


def upstream_of(targets: Tensor) -> Tensor:
    """An upstream gradient [...] of both signs."""
    return torch.linspace(-2.0, 3.0, targets.numel()).reshape(targets.shape)


def check(
    logits: Tensor, targets: Tensor, eta: float | Tensor = 0.3, *, extra_ulps: int = 0, **keywords: object
) -> None:
    """Holds the loss and the gradient of logits [..., V], read where they lie, to the rule."""
    options = {name: keywords[name] for name in Options._fields if name in keywords}
    upstream = upstream_of(targets)
    vocab_size = logits.shape[-1]
    flat_logits, flat_targets = logits.detach().clone().reshape(-1, vocab_size), targets.reshape(-1)

    exact = flat_logits.double().requires_grad_()
    expected, stats = mixce_loss_reference(exact, flat_targets, eta, reduction="none", return_stats=True, **options)
    (expected_grad,) = torch.autograd.grad(expected, exact, upstream.reshape(-1).double())
    # With grad_in_forward the upstream gradient is a second factor of a rounded gradient.
    spent = torch.ones(flat_targets.shape) if keywords.get("grad_in_forward") else None
    plain, plain_grad = plain_loss_and_grad(
        flat_logits, flat_targets, eta, Options(**options), upstream.reshape(-1), spent
    )
    scale = stats.weight + 2 * options.get("z_loss", 0.0) * stats.lse.abs()

    leaf = torch.zeros((), dtype=logits.dtype, requires_grad=True)
    view = logits.detach()
    if keywords.get("inplace_backward"):
        base = view + 0 * leaf  # a tensor of the graph, whose memory backward may take
        base.retain_grad()
    else:
        base = view.requires_grad_()
    loss = fused_mixce_loss(base, targets, eta, reduction="none", backend="triton", **keywords)
    loss.backward(upstream.to(loss.dtype))
    assert base.grad is not None
    token_scale = float((scale * upstream.reshape(-1).abs()).max())
    grad = base.grad.reshape(-1, vocab_size)
    assert_accurate("loss", loss.detach().reshape(-1), expected.detach().numpy(), plain, float(scale.max()))
    assert_accurate("gradient", grad, expected_grad.numpy(), plain_grad, token_scale, extra_ulps=extra_ulps)
