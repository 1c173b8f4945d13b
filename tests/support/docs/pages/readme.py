"""README.md."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from mixce_kernels import fused_mixce_loss, mixce_loss_reference
from support.docs.blocks import Namespace, Page, Step
from support.docs.checks import (
    assert_far,
    assert_near,
    assert_trained,
    check_call,
    check_in_place,
    check_training_step,
    gradients,
)
from support.docs.models import VOCAB_SIZE, mean_of_all, mean_of_means, new_model, new_targets, new_tokens
from support.docs.trainers import TRAINER, causal_lm, plain_causal_loss, plain_training_options, sequences, stacked


def set_up() -> Namespace:
    tokens = new_tokens()
    batches = [tokens[:1, :3], tokens[1:, 3:]]
    return {
        "torch": torch,
        "model": new_model(torch.float64, bias=False),
        "tokens": tokens,
        "batch_tokens": [batch[:, :-1] for batch in batches],
        "batch_targets": [batch[:, 1:] for batch in batches],
        "eta": 0.3,
    }


@contextmanager
def with_logits(names: Namespace) -> Iterator[None]:
    targets = new_targets(new_tokens())
    logits = 3 * torch.randn(*targets.shape, VOCAB_SIZE, dtype=torch.float64)
    names.update(logits=logits.requires_grad_(), targets=targets)
    yield


def check_accumulation(names: Namespace) -> None:
    batches = names["batch_tokens"], names["batch_targets"], names["eta"]
    assert_trained(names["model"], None, mean_of_all(*batches))
    twin = copy.deepcopy(names["model"])
    twin.zero_grad()
    mean_of_means(*batches)(twin).backward()
    assert_far(gradients(names["model"])["lm_head.weight"], gradients(twin)["lm_head.weight"])


def check_metrics(names: Namespace) -> None:
    logits, targets, means = names["logits"].detach(), names["targets"], names["means"]
    valid = targets != -100
    assert not valid.all()
    assert_near(names["loss"], mixce_loss_reference(logits, targets, 1.0))
    log_p = logits.log_softmax(-1)
    assert_near(means.perplexity, F.cross_entropy(logits.flatten(0, 1), targets.flatten()).exp())
    assert_near(means.accuracy, (logits.argmax(-1) == targets)[valid].double().mean())
    assert_near(means.entropy, -(log_p.exp() * log_p).sum(-1)[valid].mean())
    # "A schedule never recompiles": see the guide. Here, that the tensor is read at each call.
    names["eta"].fill_(0.25)
    assert_near(fused_mixce_loss(logits, targets, names["eta"]), mixce_loss_reference(logits, targets, 0.25))


@contextmanager
def with_causal_lm(names: Namespace) -> Iterator[None]:
    import transformers

    dataset = sequences(3)
    input_ids, labels = stacked(dataset)
    names.update(Trainer=transformers.Trainer, dataset=dataset, input_ids=input_ids, labels=labels)
    names["arguments"] = transformers.TrainingArguments(**plain_training_options(max_steps=1))
    names["model"] = names["given"] = causal_lm()
    yield


def check_trainers(names: Namespace) -> None:
    """The loss in three places: with logits by the model and by its trainer, and without."""
    loss_of = plain_causal_loss(names["input_ids"], names["labels"], 0.5)
    batch = {"input_ids": names["input_ids"], "labels": names["labels"]}
    names["loss"].backward()
    assert names["model"] is not names["given"]
    assert names["model"](**batch).logits is None
    assert_trained(names["given"], names["loss"], loss_of)
    assert_near(names["given"](**batch).loss, names["loss"])
    assert_near(names["trainer"].compute_loss(names["given"], dict(batch)), names["loss"])


PAGE = Page(
    "README.md",
    set_up,
    (
        Step(check_call, with_logits),
        Step(check_in_place),
        Step(check_accumulation),
        Step(check_metrics, with_logits),
        Step(check_training_step),
        Step(check_trainers, with_causal_lm, needs=TRAINER),
    ),
)
