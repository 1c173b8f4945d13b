"""The loss of ms-swift: made as its trainer makes it, and called by `Seq2SeqTrainer.compute_loss` itself."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

pytest.importorskip("swift", reason="test_other_trainers.py runs it with ms-swift")

from swift.loss import loss_map
from swift.loss.base import BaseLoss
from swift.trainers import Seq2SeqTrainer

from mixce_kernels import mixce_loss_reference
from mixce_kernels.integrations.ms_swift import mixce_loss
from mixce_kernels.weightings import Power
from support.causal_models import batch_of, gradients_of, model_of
from support.paths import ROOT

ETA = 0.3


def arguments_of(**changes: Any) -> Any:
    return SimpleNamespace(
        **{
            **{"enable_dft_loss": False, "enable_channel_loss": False, "use_liger_kernel": False, "past_index": -1},
            **{"router_aux_loss_coef": None, "average_tokens_across_devices": False, "tuner_backend": "peft"},
            **{"acc_strategy": "token", "label_smoothing_factor": 0.0, **changes},
        }
    )


def trainer_of(model: Any = None, sequence_parallel_size: int = 1, **arguments: Any) -> Any:
    """What `compute_loss` reads of its trainer."""
    template = MagicMock(sequence_parallel_size=sequence_parallel_size, padding_free=False)
    template.compute_sft_loss = lambda model, inputs, **_kwargs: model(**inputs)
    if model is not None:
        model.model_info = SimpleNamespace(is_moe_model=False)
    return SimpleNamespace(
        args=arguments_of(**arguments), model=model, template=template, label_smoother=None, _compute_acc=MagicMock(),
        custom_metrics=defaultdict(lambda: defaultdict(MagicMock)), model_accepts_loss_kwargs=True,
        accelerator=SimpleNamespace(unwrap_model=lambda one: one, num_processes=1),
    )  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and labels [B, T]. ms-swift trains no first token, and relies on it: it rolls the labels."""
    tokens, labels = batch_of()
    labels[:, 0] = -100
    return tokens, labels


def loss_of(model: Any, num_items: Any, loss_scale: Tensor | None, **options: Any) -> Tensor:
    """The loss as ms-swift's trainer computes it, for its own `loss_type`."""
    loss_map["mixce"] = mixce_loss(**options)
    trainer = trainer_of(model)
    tokens, labels = batch()
    inputs = {"input_ids": tokens, "labels": labels}
    inputs["compute_loss_func"] = loss_map["mixce"](trainer.args, trainer)
    if loss_scale is not None:
        inputs["loss_scale"] = loss_scale
    loss: Tensor = Seq2SeqTrainer.compute_loss(trainer, model, inputs, num_items_in_batch=num_items)
    return loss


@pytest.mark.parametrize("num_items", [None, 31, torch.tensor(31)])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("weighting", [None, "Power(alpha=0.5)"])
def test_loss_and_gradient_are_the_plain_formula_s(num_items: Any, scaled: bool, weighting: str | None) -> None:
    tokens, labels = batch()
    # ms-swift has a factor for each token; that of the token which a position predicts counts.
    scale = torch.rand(labels.shape, dtype=torch.float64) if scaled else None
    options = {} if weighting is None else {"weighting": Power(0.5)}
    expecting, model = (model_of("llama", torch.float64) for _ in range(2))
    logits = expecting(tokens).logits[:, :-1]
    per_token = mixce_loss_reference(logits, labels[:, 1:], ETA, reduction="none", **options)
    summed = (per_token if scale is None else per_token * scale[:, 1:]).sum()
    count = (labels[:, 1:] != -100).sum() if num_items is None else num_items
    expected = summed / count
    expected.backward()

    options = {} if weighting is None else {"weighting": weighting}
    loss = loss_of(model, num_items, scale, eta=ETA, **options)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients_of(model), gradients_of(expecting), rtol=1e-9, atol=1e-12)


def test_eta_1_and_0_are_ms_swift_s_own_losses() -> None:
    """Eta = 1 is its cross-entropy, eta = 0 has the gradient of its `enable_dft_loss` but for the value."""
    gradients = []
    for eta in (1.0, 0.0):
        model = model_of("llama", torch.float64)
        loss = loss_of(model, None, None, eta=eta)
        loss.backward()
        gradients.append((loss.detach(), gradients_of(model)))
    for (loss, gradient), own in zip(gradients, ({}, {"enable_dft_loss": True}), strict=True):
        model = model_of("llama", torch.float64)
        trainer = trainer_of(model, **own)
        tokens, labels = batch()
        inputs = {"input_ids": tokens, "labels": labels, "compute_loss_func": None}
        if not own:
            inputs["compute_loss_func"] = loss_map["cross_entropy"](trainer.args, trainer)
        theirs = Seq2SeqTrainer.compute_loss(trainer, model, inputs)
        theirs.backward()
        # Their logits are float32.
        torch.testing.assert_close(gradients_of(model), gradient, rtol=1e-4, atol=1e-5)
        if not own:
            torch.testing.assert_close(theirs.double(), loss, rtol=1e-5, atol=1e-6)


def test_eta_is_an_attribute() -> None:
    trainer = trainer_of()
    loss = mixce_loss(eta=torch.tensor(1.0))(trainer.args, trainer)
    assert isinstance(loss, BaseLoss)
    logits, labels = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    before = loss(SimpleNamespace(logits=logits), labels)
    loss.mixce_loss.eta.fill_(0.4)
    after = loss(SimpleNamespace(logits=logits), labels)
    for got, eta in ((before, 1.0), (after, 0.4)):
        torch.testing.assert_close(got, mixce_loss_reference(logits[:, :-1], labels[:, 1:], eta))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 1.5}, r"expected eta in \[0, 1\], got 1.5"),
        ({"weighting": "Cube()"}, "expected one of Probability, Power"),
        ({"label_smoothing": 1.5}, "expected label_smoothing"),
        ({"grad_in_forward": True, "inplace_backward": True}, "expected not both grad_in_forward and inplace_backward"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixce_loss(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_parallel_size": 2}, "expected sequence_parallel_size of 1 with the loss of eta, got 2"),
        ({"enable_dft_loss": True}, "expected no enable_dft_loss beside the loss of eta, whose eta = 0 it is"),
        ({"label_smoothing_factor": 0.1}, "expected label_smoothing as an option of mixce_loss"),
    ],
)
def test_trainers_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    trainer = trainer_of(**changes)
    with pytest.raises(ValueError, match=message):
        mixce_loss()(trainer.args, trainer)


def test_megatron_s_trainer_is_refused() -> None:
    class BaseMegatronTrainer(SimpleNamespace):
        pass

    trainer = BaseMegatronTrainer(**vars(trainer_of()))
    with pytest.raises(ValueError, match="expected ms-swift's trainer for Transformers, got that for Megatron"):
        mixce_loss()(trainer.args, trainer)


def test_the_documented_plugin_registers_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ms-swift imports the files of `--external_plugins`."""
    from swift.utils import import_external_file

    page = (ROOT / "docs" / "integrations.md").read_text()
    block = page.partition("## ms-swift")[2]
    assert "--external_plugins mixce_plugin.py" in block
    assert "--loss_type mixce" in block
    plugin = tmp_path / "mixce_plugin.py"
    plugin.write_text(block.partition("<<'EOF'\n")[2].partition("EOF\n")[0])
    loss_map.pop("mixce", None)
    import_external_file(str(plugin))
    trainer = trainer_of()
    assert loss_map["mixce"](trainer.args, trainer).mixce_loss.eta == 0.5
