"""Real runs of Transformers' `Trainer`: what it trains on, and that micro-batches add up to one large batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_transformers import oracle
from torch import Tensor

from mixce_kernels.integrations import TokenMetrics
from mixce_kernels.integrations.transformers import MixCEForCausalLMLoss, with_linear_mixce_loss
from support.causal_models import VOCAB_SIZE, model_of, transformers

pytest.importorskip("accelerate", reason="needs the extra 'transformers'")

ETA = 0.3
STEPS = 3
BATCH = 4


def sequences() -> list[dict[str, list[int]]]:
    """Sequences of very different lengths, so that a mean of micro-batches' means is not the mean of all tokens."""
    generator = torch.Generator().manual_seed(3)
    lengths = [2, 9, 3, 17] * STEPS
    return [
        {"input_ids": tokens, "labels": tokens}
        for tokens in (torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths)
    ]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Padded to the longest; the padding is no label."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    batch = {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100)}
    return {**batch, "attention_mask": (batch["labels"] != -100).long()}


class Recorder(transformers.TrainerCallback):
    """What a run logged: the losses of its steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def train(
    model: Any, out: Path, micro: int, *callbacks: Any, loss: Any = None, **options: Any
) -> tuple[dict[str, Tensor], list[float]]:
    """The weights after STEPS of gradient descent on BATCH sequences, `micro` at a time, and the logged losses."""
    options = {"learning_rate": 0.1, "max_steps": STEPS, "max_grad_norm": 0.0, **options}
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=BATCH // micro,
        optim="sgd",
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy=options.pop("save_strategy", "no"),
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        dataloader_pin_memory=False,
        **options,
    )
    recorder = Recorder()
    trainer = transformers.Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=sequences(),
        compute_loss_func=loss,
        callbacks=[recorder, *callbacks],
    )
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}, recorder.losses


def by_function(name: str) -> tuple[Any, Any]:
    return model_of(name, torch.float64), MixCEForCausalLMLoss(ETA)


def by_attribute(name: str) -> tuple[Any, Any]:
    model = model_of(name, torch.float64)
    model.loss_function = MixCEForCausalLMLoss(ETA)
    return model, None


def without_logits(name: str) -> tuple[Any, Any]:
    return with_linear_mixce_loss(model_of(name, torch.float64), ETA), None


WAYS: list[Callable[[str], tuple[Any, Any]]] = [by_function, by_attribute, without_logits]


def expected_run(name: str, counts_first: bool) -> tuple[dict[str, Tensor], list[float]]:
    """The same training by hand: whole batches, the plain formula.

    Older releases count the first token of a sequence among those that have a loss, which it has not.
    """
    model = model_of(name, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows, losses = sequences(), []
    for step in range(STEPS):
        batch = collate(rows[step * BATCH : (step + 1) * BATCH])
        labels = batch.pop("labels")
        count = (labels[:, 0 if counts_first else 1 :] != -100).sum()
        loss = oracle(model(**batch).logits, labels, ETA, num_items_in_batch=count)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {name: weight.detach() for name, weight in model.named_parameters()}, losses


def counts_first(model: Any, tmp_path: Path) -> bool:
    """Whether this release of Trainer counts all labels, or those that have a loss."""
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]), train_dataset=[]
    )
    return not getattr(trainer, "_loss_shifts_labels", False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "gemma2"])
def test_micro_batches_add_up(name: str, way: Callable[[str], tuple[Any, Any]], tmp_path: Path) -> None:
    """Weights and losses of one large batch, of micro-batches and of the same training by hand.

    Models compute in float32 here and there: an epsilon for each of the weights' sums, the losses' and the steps.
    """
    expected, expected_losses = expected_run(name, counts_first(way(name)[0], tmp_path))
    start = dict(model_of(name, torch.float64).named_parameters())
    for micro in (BATCH, 1):
        model, loss = way(name)
        weights, losses = train(model, tmp_path, micro, loss=loss)
        # Logged losses are rounded to four digits by older releases.
        assert losses == pytest.approx(expected_losses, abs=1e-4)
        for key, value in expected.items():
            moved = (value - start[key]).abs().max()
            assert (weights[key] - value).abs().max() <= 1e-5 * moved + 1e-9, key
    # A mean of means is far from that.
    means, _ = train(by_function(name)[0], tmp_path, 1, loss=mean_of_means)
    key = "lm_head.weight" if "lm_head.weight" in expected else next(iter(expected))
    assert (means[key] - expected[key]).abs().max() > 1e-3 * (expected[key] - start[key]).abs().max()


def mean_of_means(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The loss that no divisor reaches."""
    return oracle(outputs.logits, labels, ETA) / BATCH


@pytest.mark.parametrize("option", ["label_smoothing_factor", "compute_loss_func"])
def test_what_would_take_the_labels_away(option: str, tmp_path: Path) -> None:
    """Trainer's other losses make logits of a model that has a loss without."""
    linear, loss = without_logits("llama")[0], None
    options = {"label_smoothing_factor": 0.1} if option == "label_smoothing_factor" else {}
    if not options:
        loss = MixCEForCausalLMLoss(ETA)
    with pytest.raises(ValueError, match=f"Trainer takes them away for .*{option}"):
        train(linear, tmp_path, 1, loss=loss, **options)


@pytest.mark.parametrize("way", WAYS)
def test_evaluation(way: Callable[[str], tuple[Any, Any]], tmp_path: Path) -> None:
    model, loss = way("llama")
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=BATCH, disable_tqdm=True
    )
    trainer = transformers.Trainer(
        model, arguments, data_collator=collate, eval_dataset=sequences()[:BATCH], compute_loss_func=loss
    )
    batch = collate(sequences()[:BATCH])
    labels = batch.pop("labels")
    with torch.no_grad():
        expected = oracle(model.eval()(**batch).logits, labels).item()
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(expected, rel=1e-6)


def test_saved_and_resumed(tmp_path: Path) -> None:
    """A checkpoint is the model's own; a run that goes on from it ends where one without a break does."""
    whole, _ = train(without_logits("gpt2")[0], tmp_path / "whole", 1)
    train(without_logits("gpt2")[0], tmp_path / "part", 1, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "part" / "checkpoint-2"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(loaded) is transformers.GPT2LMHeadModel

    model, _ = without_logits("gpt2")
    arguments = transformers.TrainingArguments(
        str(tmp_path / "part"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=BATCH,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_steps=STEPS,
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, data_collator=collate, train_dataset=sequences())
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), whole[name], rtol=1e-6, atol=1e-8)


class Schedule(transformers.TrainerCallback):
    """Lowers eta from 1 to 0 over the run, in place, and logs what it was."""

    def __init__(self, eta: Tensor) -> None:
        self.eta = eta

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.eta.fill_(1 - state.global_step / max(state.max_steps - 1, 1))


@pytest.mark.parametrize("compiled", [False, True])
def test_scheduled_eta(compiled: bool, tmp_path: Path) -> None:
    eta = torch.tensor(1.0)
    metrics = TokenMetrics()
    linear = with_linear_mixce_loss(model_of("llama"), eta, metrics=metrics)
    options = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
    _, losses = train(linear, tmp_path, BATCH, Schedule(eta), learning_rate=1e-9, **options)
    model = model_of("llama")
    for step, loss in enumerate(losses):
        batch = collate(sequences()[step * BATCH : (step + 1) * BATCH])
        labels = batch.pop("labels")
        count = (labels[:, 0 if counts_first(linear, tmp_path) else 1 :] != -100).sum()
        value = oracle(model(**batch).logits, labels, 1 - step / (STEPS - 1), num_items_in_batch=count)
        assert loss == pytest.approx(value.item(), abs=1e-4)
    assert metrics.compute()["tokens"] == sum(len(row["labels"]) - 1 for row in sequences())


@pytest.mark.parametrize("way", WAYS)
def test_checkpointed_and_in_bfloat16(way: Callable[[str], tuple[Any, Any]], tmp_path: Path) -> None:
    """Autocast and activation checkpointing as Trainer turns them on: the losses of a plain run, to bfloat16's eps."""
    model, loss = way("gpt2")
    _, expected = train(model.float(), tmp_path, 1, loss=loss)
    model, loss = way("gpt2")
    _, losses = train(model.float(), tmp_path, 1, loss=loss, bf16=True, gradient_checkpointing=True)
    assert losses == pytest.approx(expected, rel=2**-6)
    assert losses[-1] < losses[0]
