"""The plugin, by Axolotl's own plugin manager and schema, and Trainers that it gives the loss to."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl", reason="test_other_trainers.py runs it with Axolotl")

import axolotl
import yaml
from axolotl.integrations.base import PluginManager
from axolotl.integrations.config import merge_input_args
from axolotl.utils.dict import DictDefault
from test_transformers import oracle
from test_transformers_trainer import BATCH, STEPS, collate, sequences

from mixce_kernels.integrations.transformers import MixCEForCausalLMLoss
from mixce_kernels.weightings import parse
from support.causal_models import model_of, transformers
from support.paths import ROOT

PLUGIN = "mixce_kernels.integrations.axolotl.MixCEPlugin"
# What Axolotl's schema asks for besides.
REQUIRED = {
    "base_model": "some/model",
    "datasets": [{"path": "some.jsonl", "type": "completion"}],
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.1,
    "plugins": [PLUGIN],
}


@pytest.fixture(scope="module")
def manager() -> Any:
    manager = PluginManager.get_instance()
    manager.register(PLUGIN)
    assert PLUGIN in manager.plugins
    return manager


def config_of(manager: Any, **keys: Any) -> Any:
    """A configuration as Axolotl validates it, with the plugin's keys."""
    _, schema = merge_input_args()
    return DictDefault(schema(**{**REQUIRED, **keys}).model_dump(exclude_none=True))


def trainer_of(model: Any, out: Path, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=2, gradient_accumulation_steps=BATCH // 2, learning_rate=0.1,
        max_steps=STEPS, max_grad_norm=0.0, optim="sgd", lr_scheduler_type="constant", logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, data_collator=collate, train_dataset=sequences())
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer


def losses_by_hand(model: Any, eta: float, weighting: str) -> list[float]:
    """The same training: whole batches, the plain formula."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    rows, losses = sequences(), []
    for step in range(STEPS):
        batch = collate(rows[step * BATCH : (step + 1) * BATCH])
        labels = batch.pop("labels")
        loss = oracle(model(**batch).logits, labels, eta, weighting=parse(weighting))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def with_lora(model: Any) -> Any:
    import peft

    torch.manual_seed(4)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).double()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_trainer_of_the_plugin_trains_with_the_loss(manager: Any, linear: bool, lora: bool, tmp_path: Path) -> None:
    """Three steps of two micro-batches of unequal lengths are those of the whole batches, by the plain formula."""
    config = config_of(manager, mixce_eta=0.3, mixce_weighting="Power(alpha=0.5)", mixce_linear=linear)
    models = [with_lora(model) if lora else model for model in (model_of("llama", torch.float64) for _ in range(2))]
    trainer = trainer_of(models[0], tmp_path)
    manager.post_trainer_create(config, trainer)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    expected = losses_by_hand(models[1], 0.3, "Power(alpha=0.5)")
    # Some releases log losses to 4 digits after the point.
    assert logged == pytest.approx(expected, abs=1e-4)
    for (name, got), (_, wanted) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_only_the_loss_without_logits_has_none(manager: Any, tmp_path: Path) -> None:
    tokens = torch.randint(3, 20, (2, 7))
    for linear in (True, False):
        trainer = trainer_of(model_of("llama"), tmp_path)
        manager.post_trainer_create(config_of(manager, mixce_linear=linear), trainer)
        assert (trainer.model(tokens, labels=tokens).logits is None) == linear
        assert isinstance(trainer.mixce_loss, MixCEForCausalLMLoss) != linear


def test_eta_is_scheduled_by_an_attribute_of_the_trainer(manager: Any, tmp_path: Path) -> None:
    losses = {}
    for linear in (True, False):
        trainer = trainer_of(model_of("llama", torch.float64), tmp_path)
        manager.post_trainer_create(config_of(manager, mixce_eta=1.0, mixce_linear=linear), trainer)
        trainer.mixce_loss.eta = 0.2
        batch = collate(sequences()[:2])
        losses[linear] = trainer.compute_loss(trainer.model, dict(batch)).item()
    labels = batch.pop("labels")
    expected = oracle(model_of("llama", torch.float64)(**batch).logits, labels, 0.2).item()
    assert losses == pytest.approx({True: expected, False: expected})


def test_defaults_are_eta_a_half_and_no_logits(manager: Any) -> None:
    config = config_of(manager)
    assert (config.mixce_eta, config.mixce_weighting, config.mixce_linear) == (0.5, "Probability()", True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mixce_eta": 1.5}, r"expected eta in \[0, 1\], got 1.5"),
        ({"mixce_eta": float("nan")}, r"expected eta in \[0, 1\], got nan"),
        ({"mixce_weighting": "Cube()"}, "expected one of Probability, Power"),
        ({"mixce_weighting": "Power(alpha='a')"}, "expected"),
        ({"mixce_weighting": "Power(alpha=-1)"}, "expected alpha"),
        ({"use_eaft": True}, "expected no other loss beside MixCEPlugin, got use_eaft"),
        ({"chunked_cross_entropy": True}, "expected no other loss beside MixCEPlugin, got chunked_cross_entropy"),
        ({"rl": "dpo"}, "expected no other loss beside MixCEPlugin, got rl"),
        ({"context_parallel_size": 2}, "expected context_parallel_size of 1 with MixCEPlugin"),
    ],
)
def test_configurations_that_do_not_fit_are_answered_with_a_sentence(
    manager: Any, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(manager, **keys)


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {}])
def test_a_trainer_with_a_loss_of_its_own_is_refused(manager: Any, options: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(model_of("llama"), tmp_path, **options)
    if not options:
        trainer.compute_loss_func = lambda *_: None
    with pytest.raises(ValueError, match="expected a trainer without a loss function or label smoothing of its own"):
        manager.post_trainer_create(config_of(manager), trainer)


def test_the_documented_block_is_valid(manager: Any) -> None:
    page = (ROOT / "docs" / "integrations.md").read_text()
    block = page.partition("## Axolotl")[2].partition("<<'EOF'\n")[2].partition("EOF\n")[0]
    keys = yaml.safe_load(block)
    assert keys["plugins"] == [PLUGIN]
    assert config_of(manager, **keys).mixce_eta == keys["mixce_eta"]


def test_axolotl_s_trainer_leaves_the_loss_to_transformers_and_calls_the_plugin() -> None:
    """Their sources, since the trainer itself needs more of what Axolotl requires than fits here."""
    package = Path(inspect.getfile(axolotl)).parent
    trainer = ast.parse((package / "core" / "trainers" / "base.py").read_text())
    (compute_loss,) = (
        node for node in ast.walk(trainer) if isinstance(node, ast.FunctionDef) and node.name == "compute_loss"
    )
    last = compute_loss.body[-1]
    assert isinstance(last, ast.Return)
    assert last.value is not None
    assert ast.unparse(last.value).startswith("super().compute_loss(model, inputs")
    assert "PLUGIN_MANAGER.post_trainer_create(cfg, trainer)" in (package / "train.py").read_text()
    builder = (package / "core" / "builders" / "causal.py").read_text()
    # What the plugin refuses to meet is set before it.
    assert 'trainer_kwargs["compute_loss_func"]' in builder
