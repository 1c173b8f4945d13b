"""docs/weightings.md."""

from __future__ import annotations

import importlib.util
import re

import torch
from torch import Tensor

from mixce_kernels import mixce_loss_reference
from mixce_kernels.weightings import Entropy, Power, Variance
from support.docs.blocks import Namespace, Page, Step, text_of
from support.docs.checks import assert_far, assert_near
from support.docs.models import new_model, new_targets, new_tokens
from support.docs.trainers import plain_training_options


def set_up() -> Namespace:
    model, tokens = new_model(torch.float32, bias=False), new_tokens()
    names: Namespace = {"hidden": model.backbone(tokens), "lm_head": model.lm_head}
    names |= {"logits": model(tokens).detach().requires_grad_(), "targets": new_targets(tokens)}
    if importlib.util.find_spec("transformers"):
        names["training_options"] = plain_training_options()
    return names


def plain_loss(names: Namespace, factor: Tensor, eta: float) -> Tensor:
    """The mean of w * nll over the valid tokens, in float64, for a given f."""
    logits, targets = names["logits"].detach().double(), names["targets"]
    valid = targets != -100
    nll = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return ((eta + (1 - eta) * factor) * nll)[valid].mean()


def statistics(names: Namespace) -> tuple[Tensor, Tensor]:
    """Nll and entropy in float64."""
    log_p = names["logits"].detach().double().log_softmax(-1)
    nll = -log_p.gather(-1, names["targets"].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return nll, -(log_p.exp() * log_p).sum(-1)


def check_power(names: Namespace) -> None:
    nll, _ = statistics(names)
    expected = plain_loss(names, (-0.5 * nll).exp(), 0.0)
    assert_near(names["loss"], expected)
    assert_far(plain_loss(names, (-nll).exp(), 0.0), expected)


def check_schedule(names: Namespace) -> None:
    """The last step's alpha counts."""
    nll, _ = statistics(names)
    assert names["alpha"] == 1.0
    assert_near(names["loss"], plain_loss(names, (-nll).exp(), 0.0))


def check_statistics(names: Namespace) -> None:
    _, entropy = statistics(names)
    assert_near(names["loss"], plain_loss(names, entropy / 3, 0.1))
    p = names["logits"].detach().double().softmax(-1)
    valid = names["stats"].valid
    assert_near(names["stats"].collision[valid], p.square().sum(-1)[valid])


def check_function(names: Namespace) -> None:
    nll, entropy = statistics(names)
    assert_near(names["loss"], plain_loss(names, torch.sigmoid(nll - entropy), 0.0))


def check_linear(names: Namespace) -> None:
    logits = names["hidden"].double() @ names["lm_head"].weight.double().T
    expected = mixce_loss_reference(logits, names["targets"], 0.0, weighting=Variance())
    assert_near(names["loss"], expected)


def check_configuration(names: Namespace) -> None:
    config = names["config"]
    assert config.to_dict()["weighting"] == repr(Entropy(1.0, 3.0))
    changed = type(config)(weighting=Power(0.5), **names["training_options"])
    assert changed.weighting == "Power(alpha=0.5)"
    # Every weighting of the module has a row.
    rows = re.findall(r"^\| `(\w+)\(", text_of("weightings.md"), re.MULTILINE)
    assert sorted(set(rows) - {"Power", "Entropy"}) == sorted(
        ["Probability", "TaiLr", "Band", "Focal", "Variance", "CollisionPower"]
    )


PAGE = Page(
    "weightings.md",
    set_up,
    (
        Step(check_power),
        Step(check_schedule),
        Step(check_statistics),
        Step(check_function),
        Step(check_linear),
        Step(check_configuration, needs=("trl", "datasets", "transformers")),
    ),
)
