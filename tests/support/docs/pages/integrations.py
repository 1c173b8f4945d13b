"""docs/integrations.md."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixce_kernels import mixce_loss_reference
from support.docs.blocks import Namespace, Page, Step
from support.docs.checks import assert_far, assert_near, assert_trained
from support.docs.models import Model, mean_of_all, mean_of_means, new_model, new_targets, new_tokens
from support.docs.trainers import (
    TRAINER,
    causal_lm,
    plain_causal_loss,
    plain_training_options,
    sequences,
    sft_names,
    stacked,
)


def set_up() -> Namespace:
    names: Namespace = {"model": new_model(torch.float32), "tokens": new_tokens(low=3)}
    if importlib.util.find_spec("transformers"):
        names["causal_lm"] = causal_lm()
    return names


def check_loss_function(names: Namespace) -> None:
    tokens = names["tokens"]
    assert_trained(names["causal_lm"], names["loss"], plain_causal_loss(tokens, tokens, 0.5))


@contextmanager
def with_accumulating_trainer(names: Namespace) -> Iterator[None]:
    names["causal_lm"] = causal_lm()
    names["start"] = copy.deepcopy(names["causal_lm"])
    names["training_options"] = plain_training_options(max_steps=1, per_device_train_batch_size=1)
    names["train_dataset"] = sequences(2)
    yield


def check_accumulating_trainer(names: Namespace) -> None:
    """Two micro-batches of other numbers of tokens: the step of one mean over both."""
    start = names["start"].double()
    tokens, labels = stacked(names["train_dataset"])
    plain_causal_loss(tokens, labels, 0.5)(start).backward()
    step = names["causal_lm"].lm_head.weight - start.lm_head.weight
    expected = -0.05 * start.lm_head.weight.grad
    assert (step - expected).abs().max() <= 1e-3 * expected.abs().max()
    check_routers(tokens, labels)


def check_routers(tokens: Tensor, labels: Tensor) -> None:
    """The table: who keeps the router's loss, and whose outputs hold logits."""
    import transformers

    from mixce_kernels.integrations.transformers import MixCEForCausalLMLoss, with_linear_mixce_loss
    from support.causal_models import SIZES, TOKENS

    loss = MixCEForCausalLMLoss(eta=0.5)
    router = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    experts = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **TOKENS, **router))
    plain = loss(experts(input_ids=tokens), labels)
    trainer = transformers.Trainer(
        experts, transformers.TrainingArguments(**plain_training_options(max_steps=1)), compute_loss_func=loss
    )
    assert_near(trainer.compute_loss(experts, {"input_ids": tokens, "labels": labels}), plain)
    experts.loss_function = loss
    outputs = experts(input_ids=tokens, labels=labels)
    assert_near(outputs.loss, plain + 0.5 * outputs.aux_loss)
    assert_far(outputs.loss, plain)
    assert outputs.logits is not None
    with pytest.raises(ValueError, match="output_router_logits"):
        with_linear_mixce_loss(experts, eta=0.5)(input_ids=tokens, labels=labels)


def check_linear_lm(names: Namespace) -> None:
    tokens = names["tokens"]
    model, linear = names["causal_lm"], names["linear_lm"]
    assert_trained(model, names["outputs"].loss, plain_causal_loss(tokens, tokens, 0.5))
    assert linear.lm_head.weight is model.lm_head.weight
    assert torch.equal(linear(input_ids=tokens).logits, model(input_ids=tokens).logits)
    linear.mixce_loss.eta = 1.0
    assert_near(linear(input_ids=tokens, labels=tokens).loss, plain_causal_loss(tokens, tokens, 1.0)(model))


@contextmanager
def with_sft(names: Namespace) -> Iterator[None]:
    names |= sft_names(max_steps=1, per_device_train_batch_size=4)
    names["causal_lm"] = causal_lm()
    names["start"] = copy.deepcopy(names["causal_lm"])
    yield


def check_sft(names: Namespace) -> None:
    """The one step of all sequences: its loss, its metrics, and the weights after it, which the model shares."""
    rows = [torch.tensor(row["input_ids"]) for row in names["train_dataset"]]
    logits = torch.cat([names["start"](input_ids=row[None]).logits[0, :-1] for row in rows])
    targets = torch.cat([row[1:] for row in rows])
    log_p = logits.log_softmax(-1)
    expected = {
        "loss": mixce_loss_reference(logits, targets, 0.5),
        "nll": F.cross_entropy(logits, targets),
        "entropy": -(log_p.exp() * log_p).sum(-1).mean(),
        "mean_token_accuracy": (logits.argmax(-1) == targets).float().mean(),
    }
    logged = names["trainer"].state.log_history[0]
    assert logged["num_tokens"] == sum(map(len, rows))
    for name, value in expected.items():
        assert_near(torch.tensor(logged[name]), value, name)
    expected["loss"].backward()
    moved = names["causal_lm"].lm_head.weight - names["start"].lm_head.weight
    assert_near(moved, -names["start"].lm_head.weight.grad)


# The micro-batches of each step of the Lightning trainer.
MICRO_BATCHES = ((0, 2), (2, 4), (4, 5))


@contextmanager
def with_lightning(names: Namespace) -> Iterator[None]:
    tokens = new_tokens(10)
    targets = new_targets(tokens[:, 1:])
    targets[2:4, 2:] = -100
    counts = [(targets[2 * first : 2 * last] != -100).sum() for first, last in MICRO_BATCHES]
    batches = [
        {"tokens": tokens[2 * i : 2 * i + 2, :-1], "targets": targets[2 * i : 2 * i + 2], "num_items": count}
        for (first, last), count in zip(MICRO_BATCHES, counts, strict=True)
        for i in range(first, last)
    ]
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    names["trainer_options"] = {"accelerator": "cpu", "logger": False, **silent}
    names["batches"] = torch.utils.data.DataLoader(batches, batch_size=None)
    names["model"] = new_model(torch.float64)
    with warnings.catch_warnings():
        # Of how few batches and workers there are.
        warnings.simplefilter("ignore")
        yield


def check_lightning(names: Namespace) -> None:
    """Three steps of one mean over the tokens of all micro-batches each, by the scheduled eta."""
    batches = list(names["batches"])
    start = new_model(torch.float64)

    def train(loss_of: Callable[..., Callable[[nn.Module], Tensor]], steps: int = 3) -> Model:
        model = copy.deepcopy(start)
        for (first, last), eta in list(zip(MICRO_BATCHES, (1.0, 0.75, 0.5), strict=True))[:steps]:
            model.zero_grad()
            tokens, targets = ([batch[name] for batch in batches[first:last]] for name in ("tokens", "targets"))
            loss_of(tokens, targets, eta)(model).backward()
            with torch.no_grad():
                for weight in model.parameters():
                    weight -= 0.1 * weight.grad
        return model

    trained = names["language_model"]
    assert trained.global_step == 3
    assert trained.eta == 0.5
    assert "eta" in trained.state_dict()
    step, exact, means = (
        model.lm_head.weight - start.lm_head.weight
        for model in (trained.model, train(mean_of_all), train(mean_of_means))
    )
    assert_near(step, exact)
    assert_far(means, exact)
    # Logged of the last batch, before the last step.
    before_last = train(mean_of_all, steps=2)(batches[-1]["tokens"]).flatten(0, 1)
    assert_near(names["trainer"].logged_metrics["nll"], F.cross_entropy(before_last, batches[-1]["targets"].flatten()))


def check_torchtitan_loss(names: Namespace) -> None:
    """As torchtitan's trainer calls it: logits, labels, the number of tokens of the whole step."""
    model, tokens = names["model"], names["tokens"]
    labels = new_targets(tokens)
    loss, metrics = (
        names["MixCELoss"].Config(eta=0.3).build(compile_config=None)(model(tokens), labels, torch.tensor(50.0))
    )
    loss.backward()
    assert metrics == {}
    assert_trained(model, loss, lambda twin: mixce_loss_reference(twin(tokens), labels, 0.3, reduction="sum") / 50)


@contextmanager
def with_titan_config(names: Namespace) -> Iterator[None]:
    class Config:
        loss: Any = None

    names["config"] = Config()
    names["model"] = new_model(torch.float32)
    yield


def check_torchtitan_config(names: Namespace) -> None:
    """The wrapper's gradients of head and hidden states are those of the logits as a whole."""
    model, tokens = names["model"], new_tokens(3, 16)
    labels = new_targets(tokens)
    wrapper = names["config"].loss.build(compile_config=None)
    wrapper.set_lm_head(model.lm_head)
    loss, _ = wrapper(model.backbone(tokens), labels, torch.tensor(20.0))
    loss.backward()
    assert_trained(model, loss, lambda twin: mixce_loss_reference(twin(tokens), labels, 0.5, reduction="sum") / 20)


TRANSFORMERS = ("transformers",)
TORCHTITAN = ("torchtitan", "spmd_types", "tyro")

PAGE = Page(
    "integrations.md",
    set_up,
    (
        Step(check_loss_function, needs=TRANSFORMERS),
        Step(check_accumulating_trainer, with_accumulating_trainer, needs=TRAINER),
        Step(check_linear_lm, needs=TRANSFORMERS),
        Step(check_sft, with_sft, needs=("trl", "datasets", *TRAINER)),
        Step(check_lightning, with_lightning, needs=("lightning",)),
        Step(check_torchtitan_loss, needs=TORCHTITAN),
        Step(check_torchtitan_config, with_titan_config, needs=TORCHTITAN),
    ),
)
