"""docs/logprobs.md."""

from __future__ import annotations

import torch
from torch import Tensor

from support.docs import logprobs_adapters
from support.docs.blocks import Namespace, Page, Step
from support.docs.checks import assert_near
from support.docs.models import new_model, new_targets, new_tokens


def set_up() -> Namespace:
    model, tokens = new_model(torch.float32, bias=False), new_tokens()
    targets = new_targets(tokens)
    names: Namespace = {"hidden": model.backbone(tokens).detach().requires_grad_(), "lm_head": model.lm_head}
    names |= {"logits": model(tokens).detach().requires_grad_(), "targets": targets}
    return names | {"advantages": torch.randn(targets.shape, generator=torch.Generator().manual_seed(0))}


def plain(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies at a temperature of 0.7."""
    log_p = (logits / 0.7).log_softmax(-1)
    logprobs = log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    valid = targets != -100
    return torch.where(valid, logprobs, 0.0), torch.where(valid, -(log_p.exp() * log_p).sum(-1), 0.0)


def check_logits(names: Namespace) -> None:
    logits = names["logits"].detach().double().requires_grad_()
    logprobs, entropy = plain(logits, names["targets"])
    assert_near(names["logprobs"], logprobs)
    assert_near(names["entropy"], entropy)
    valid = (names["targets"] != -100).sum()
    (-(names["advantages"] * logprobs + 0.01 * entropy).sum() / valid).backward()
    assert_near(names["logits"].grad, logits.grad)


def check_hidden(names: Namespace) -> None:
    logits = names["hidden"].detach().double() @ names["lm_head"].weight.detach().double().T
    for one, other in zip((names["logprobs"], names["entropy"]), plain(logits, names["targets"]), strict=True):
        assert_near(one, other)


PAGE = Page("logprobs.md", set_up, (Step(check_logits), Step(check_hidden), *logprobs_adapters.STEPS))
