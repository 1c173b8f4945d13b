"""docs/migration.md: losses and gradients before and after; tests/docs/test_migration.py looks at its tables."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from support.docs.blocks import Namespace, Page, Step
from support.docs.checks import assert_far, assert_near, gradients, tolerance_of
from support.docs.models import VOCAB_SIZE, new_model, new_targets, new_tokens
from support.docs.trainers import causal_lm, sft_names

# What may come with a loss.
RESULTS = ("z_loss", "accuracy", "z_losses")


def set_up() -> Namespace:
    tokens = new_tokens(low=3)
    tokens[1, 2:5] = 0
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    model = new_model(torch.float32 if interpreted else torch.float64)
    return {
        "model": model,
        "tokens": tokens,
        "targets": new_targets(tokens.roll(-1, 1)),
        "class_weight": torch.rand(VOCAB_SIZE, dtype=torch.float64) + 0.5,
        "hidden": lambda: model.backbone(tokens),
        "lm_head": model.lm_head,
        "results": [],
    }


def result_of(names: Namespace) -> dict[str, Tensor]:
    """The loss, what came with it, and the model's gradients."""
    losses = names.pop("losses", None)
    loss = names.pop("loss", None) if losses is None else losses.flatten()
    assert isinstance(loss, Tensor)
    # An upstream gradient other than 1, and one for each token.
    loss.backward(torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype) if loss.dim() else loss.new_tensor(0.7))
    more = {name: names.pop(name).flatten() for name in RESULTS if name in names}
    return {"loss": loss.detach(), **more, **gradients(names["model"])}


def keep_before(names: Namespace) -> None:
    names["results"].append(result_of(names))


def compare_with_before(names: Namespace) -> None:
    """The block "after" has the loss and the gradients of the block "before"."""
    before, after = names["results"].pop(), result_of(names)
    assert before.keys() == after.keys()
    # Gradients of float64 parameters went through float32 where the loss is float32.
    tolerance = tolerance_of(before["loss"])
    for name, value in after.items():
        wanted = before[name].reshape(value.shape)
        assert wanted.abs().max() > 0, name
        assert_near(value, wanted, name, tolerance)


def compare_with_plain_tokens(names: Namespace) -> None:
    """What flash-attention's loss is by its source: each token's loss with its z-loss, and the z-loss."""
    after = result_of(names)
    model = copy.deepcopy(names["model"])
    model.zero_grad()
    logits, targets = 0.5 * model(names["tokens"]).flatten(0, 1), names["targets"].flatten()
    z_losses = torch.where(targets == -100, 0.0, 1e-3 * logits.logsumexp(-1).square())
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1) + z_losses
    before = result_of({"model": model, "losses": losses, "z_losses": z_losses})
    for name, value in after.items():
        assert_near(value, before[name], name)


@contextmanager
def with_sft(names: Namespace) -> Iterator[None]:
    names |= sft_names(max_steps=2, per_device_train_batch_size=2)
    names["causal_lm"] = causal_lm
    yield


def keep_sft(names: Namespace) -> None:
    trainer = names.pop("trainer")
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    names["results"].append({"loss": losses, **copy.deepcopy(dict(trainer.model.state_dict()))})


def compare_sft(names: Namespace) -> None:
    """Equal losses and, after training, equal weights, which are others than at the start."""
    keep_sft(names)
    after, before = names["results"].pop(), names["results"].pop()
    assert before["loss"].shape == (2,)
    assert before.keys() == after.keys()
    start = causal_lm().state_dict()
    for name, value in after.items():
        assert_near(value, before[name], name)
    assert_far(after["lm_head.weight"], start["lm_head.weight"])


def check_reweighted(names: Namespace) -> None:
    """The trainer's loss of a batch is that of the plain formula, on the model as it is after training."""
    trainer = names["trainer"]
    model = copy.deepcopy(trainer.model).double().eval()
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    labels = batch["labels"][:, 1:]
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), dict(batch))
        log_p = model(**inputs).logits[:, :-1].log_softmax(-1)
    nll = -log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    assert trainer.args.weighting == "Entropy(alpha=1.0, scale=3.0)"
    assert_near(loss, (entropy / 3 * nll)[labels != -100].mean())


LIGER: dict[str, Any] = {"needs": ("liger_kernel", "triton"), "interpreted": True}
CUT_CROSS_ENTROPY: dict[str, Any] = {"needs": ("cut_cross_entropy",)}
SFT: dict[str, Any] = {"prepare": with_sft, "needs": ("trl", "datasets", "transformers")}

PAGE = Page(
    "migration.md",
    set_up,
    (
        Step(keep_before),
        Step(compare_with_before),
        Step(keep_before),
        Step(compare_with_before),
        Step(keep_before, **LIGER),
        Step(compare_with_before, **LIGER),
        Step(keep_before, **LIGER),
        Step(compare_with_before, **LIGER),
        Step(keep_before, **CUT_CROSS_ENTROPY),
        Step(compare_with_before, **CUT_CROSS_ENTROPY),
        Step(keep_before, skipped="flash-attention runs on GPUs alone"),
        Step(compare_with_plain_tokens),
        Step(keep_sft, **SFT),
        Step(compare_sft, **SFT),
        Step(check_reweighted, **SFT),
    ),
)
