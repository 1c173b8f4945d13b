"""`MixCESFTTrainer` beside TRL's own trainer and the reference in float64: losses, metrics and weights of real runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_transformers import LargeTensors
from torch import Tensor, nn

pytest.importorskip("trl", reason="needs the extra 'trl'")

from mixce_kernels import mixce_loss_reference
from mixce_kernels.integrations.trl import MixCESFTConfig, MixCESFTTrainer
from mixce_kernels.weightings import Entropy, Power
from support.causal_models import VOCAB_SIZE, model_of
from support.trl_runs import (
    CLOSE,
    ENDS,
    EPSILON,
    ETA,
    EXACT,
    RELEASE,
    TRANSFORMERS_RELEASE,
    assert_same_training,
    assert_same_weights,
    data,
    options,
    recorded,
    tokenizer,
    train,
)

pytestmark = pytest.mark.usefixtures("offline")


@ENDS
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("text", {}),
        ("completion", {"gradient_accumulation_steps": 2}),
        ("text", {"padding_free": True, "max_length": None}),
        ("text", {"packing": True, "max_length": 16, "per_device_train_batch_size": 1}),
        ("text", {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2, "max_steps": 4}),
    ],
    ids=["text", "completion", "padding_free", "packing", "evaluated between logs"],
)
def test_the_ends_are_trl_s_own(kind: str, changes: dict[str, Any], eta: float, loss_type: str, tmp_path: Path) -> None:
    ours = train(tmp_path, kind, eta=eta, **changes)
    assert_same_training(ours, train(tmp_path, kind, loss_type=loss_type, **changes))


@pytest.mark.skipif(RELEASE < (1, 16), reason="Transformers divided a smoothed loss by the micro-batch's tokens")
def test_label_smoothing_is_trl_s_own(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    changes = {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}
    ours = train(tmp_path, eta=1.0, **changes)
    assert not [warning for warning in recwarn if "extra forward" in str(warning.message)]
    assert_same_training(ours, train(tmp_path, **changes))


def replayed(batches: list[tuple[dict[str, Tensor], Any]], model: Any, eta: float, lr: float, **loss: Any) -> Any:
    """Plain gradient descent on the micro-batches of each step with the reference of logits; loss and nll of each."""
    results = []
    for step in batches:
        model.zero_grad()
        # Of GPT-2 Transformers counts the first token of a sequence, too.
        count = sum((inputs["labels"] != -100).sum() for inputs, _ in step)
        for inputs, num_items in step:
            assert num_items == count
            arguments = {name: value for name, value in inputs.items() if name != "labels"}
            logits = model(**arguments, use_cache=False).logits[:, :-1]
            targets = inputs["labels"][:, 1:]
            value = mixce_loss_reference(logits, targets, eta, num_items_in_batch=num_items, **loss)
            value.backward()
            valid = targets != -100
            log_p = logits.detach()[valid].log_softmax(-1)
            results.append(
                {
                    "loss": value.item(),
                    "nll": -log_p.gather(1, targets[valid][:, None]).mean().item(),
                    "entropy": -(log_p.exp() * log_p).sum(1).mean().item(),
                    "mean_token_accuracy": (log_p.argmax(1) == targets[valid]).double().mean().item(),
                }
            )
        with torch.no_grad():
            for weight in model.parameters():
                weight -= lr * weight.grad
    return results


@pytest.mark.parametrize(
    ("kind", "changes", "loss"),
    [
        ("text", {}, {}),
        ("completion", {"gradient_accumulation_steps": 2}, {}),
        ("text", {"label_smoothing_factor": 0.1, "z_loss": 1e-3, "max_chunk_bytes": 8 * 2 * VOCAB_SIZE},
         {"label_smoothing": 0.1, "z_loss": 1e-3}),
        ("text", {"weighting": "Power(alpha=0.5)"}, {"weighting": Power(0.5)}),
        ("completion", {"weighting": Entropy(1.0, 3.0), "gradient_accumulation_steps": 2}, {"weighting": Entropy()}),
    ],
    ids=["text", "accumulated", "options", "weighting", "entropy"],
)  # fmt: skip
def test_between_it_is_the_reference(kind: str, changes: dict[str, Any], loss: dict[str, Any], tmp_path: Path) -> None:
    """Losses, metrics and trained weights of a float64 model whose arithmetic is float64 throughout."""
    model = model_of("gpt2", torch.float64)
    own = copy.deepcopy(model)
    trainer = MixCESFTTrainer(
        model,
        MixCESFTConfig(**options(tmp_path, eta=ETA, **changes)),
        train_dataset=data(kind),
        processing_class=tokenizer(),
    )
    flat = []
    compute_loss = trainer.compute_loss

    def recording(model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        flat.append(({name: value.clone() for name, value in inputs.items()}, num_items_in_batch))
        return compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

    trainer.compute_loss = recording
    run = recorded(trainer)
    size = changes.get("gradient_accumulation_steps", 1)
    batches = [flat[begin : begin + size] for begin in range(0, len(flat), size)]
    assert len(batches) == 3
    results = replayed(batches, own, ETA, trainer.args.learning_rate, **loss)
    assert run.losses == pytest.approx([one["loss"] for one in results], **EXACT)
    for number, logged in enumerate(run.steps):
        step = results[number * size : (number + 1) * size]
        for name in ("nll", "entropy", "mean_token_accuracy"):
            # TRL's logs are means over micro-batches, here of float32 statistics.
            expected = sum(one[name] for one in step) / size
            assert logged[name] == pytest.approx(expected, rel=1e-12 if name == "mean_token_accuracy" else EPSILON)
        total = sum(one["loss"] for one in step)
        assert logged["loss"] == pytest.approx(total, rel=0.0, abs=1e-4 if TRANSFORMERS_RELEASE < 5 else 1e-6)
    for one, other in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-12)


def test_accumulation_is_one_large_batch(tmp_path: Path) -> None:
    whole = train(tmp_path, eta=ETA, per_device_train_batch_size=6, evaluate=False)
    parts = train(tmp_path, eta=ETA, per_device_train_batch_size=2, gradient_accumulation_steps=3, evaluate=False)
    sums = [sum(parts.losses[begin : begin + 3]) for begin in range(0, 9, 3)]
    assert sums == pytest.approx(whole.losses, **CLOSE)
    assert_same_weights(parts, whole)
    assert [step["num_tokens"] for step in parts.steps] == [step["num_tokens"] for step in whole.steps]
    # The lengths are ragged enough: a mean of the micro-batches' means would be another.
    assert parts.steps[0]["nll"] != pytest.approx(whole.steps[0]["nll"], rel=1e-3)


def test_one_forward_and_no_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    trainer = train(tmp_path, model=model, eta=ETA, gradient_accumulation_steps=2, max_steps=1).trainer
    # Of each call, whether it is differentiated.
    backbone: list[bool] = []
    head: list[bool] = []
    model.model.register_forward_pre_hook(lambda *_: backbone.append(torch.is_grad_enabled()))
    own = nn.Linear.forward

    # A hook on the head would be refused.
    def forward(layer: nn.Linear, hidden: Tensor) -> Tensor:
        if layer is model.lm_head:
            head.append(torch.is_grad_enabled())
        return own(layer, hidden)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    trainer.train()
    assert (backbone, head) == ([True] * 2, [])
    trainer.evaluate()
    assert (backbone[2:], head) == ([False] * 2, [])
    # Whoever asks for logits gets them, of a forward of their own.
    seen = []
    trainer.compute_metrics = lambda prediction: seen.append(prediction) or {"rows": len(prediction.predictions)}
    assert trainer.evaluate()["eval_rows"] == 8
    assert (backbone[4:], head) == ([False] * 4, [False] * 2)
    assert seen[0].predictions.shape == (8, seen[0].label_ids.shape[1], VOCAB_SIZE)


def test_logits_are_never_in_memory(tmp_path: Path) -> None:
    """No operator of a step returns a tensor as large; within the loss's own, two rows may be in memory at a time."""
    limits = {"max_chunk_bytes": 2 * 4 * VOCAB_SIZE, "backend": "cpu"}
    trainer = train(tmp_path, eta=ETA, max_steps=1, evaluate=False, **limits).trainer
    assert trainer.mixce_loss.linear.max_chunk_bytes == limits["max_chunk_bytes"]
    assert trainer.mixce_loss.options.backend == limits["backend"]
    tokens = torch.randint(3, VOCAB_SIZE, (4, 16))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    # The last positions have no loss, and may be left out.
    numel = tokens[:, 1:].numel() * VOCAB_SIZE
    with LargeTensors(numel) as large:
        trainer.compute_loss(trainer.model.train(), inputs).backward()
    assert not large.found
    with LargeTensors(numel) as large:
        trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    assert large.found


def test_logits_for_metrics_are_the_model_s(tmp_path: Path) -> None:
    seen = []
    run = train(tmp_path, eta=ETA, per_device_eval_batch_size=8, compute_metrics=lambda one: seen.append(one) or {})
    trainer = run.trainer
    (inputs,) = trainer.get_eval_dataloader()
    with torch.no_grad():
        logits = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(torch.from_numpy(seen[-1].predictions), logits)
    assert torch.equal(torch.from_numpy(seen[-1].label_ids), inputs["labels"])
    valid = inputs["labels"][:, 1:] != -100
    accuracy = (logits[:, :-1].argmax(-1) == inputs["labels"][:, 1:])[valid].double().mean()
    assert run.evaluated["eval_mean_token_accuracy"] == pytest.approx(accuracy.item(), **EXACT)


def test_tokens_without_a_label(tmp_path: Path) -> None:
    """A batch of none: loss and metrics are 0, and backward works."""
    trainer = train(tmp_path, eta=ETA, max_steps=1, evaluate=False).trainer
    tokens = torch.randint(3, VOCAB_SIZE, (2, 5))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.full_like(tokens, -100)}
    for count in (None, torch.tensor(0)):
        trainer.model.train()
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=count)
        loss.backward()
        assert loss.item() == 0
        assert all(not weight.grad.any() for weight in trainer.model.parameters() if weight.grad is not None)
        trainer.log({})
        logged = trainer.state.log_history[-1]
        assert (logged["entropy"], logged["mean_token_accuracy"], logged["nll"]) == (0, 0, 0)
