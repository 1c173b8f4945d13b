"""`MixCESFTTrainer` with models of every kind: paths, checkpoints, adapters, prompts, experts, several processes."""

from __future__ import annotations

import contextlib
import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs the extra 'trl'")

from mixce_kernels.integrations.transformers import with_linear_mixce_loss
from mixce_kernels.integrations.trl import MixCESFTConfig, MixCESFTTrainer
from support.causal_models import VOCAB_SIZE, config_of, model_of, transformers
from support.ranks import run_ranks
from support.trl_runs import (
    CLOSE,
    ENDS,
    ETA,
    RELEASE,
    TRANSFORMERS_RELEASE,
    assert_same_training,
    data,
    lora,
    options,
    recorded,
    tokenizer,
    train,
    trl,
)

pytestmark = pytest.mark.usefixtures("offline")


class Schedule(transformers.TrainerCallback):
    """Another eta for each step, and the losses that come of it."""

    def __init__(self, etas: list[Any]) -> None:
        self.etas = etas

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.mixce_loss.eta = self.etas[state.global_step]


@pytest.mark.parametrize("as_tensors", [False, True])
def test_eta_is_scheduled_by_a_callback(as_tensors: bool, tmp_path: Path) -> None:
    etas = [1.0, 0.5, 0.0]
    schedule = Schedule([torch.tensor(eta) for eta in etas] if as_tensors else etas)
    run = train(tmp_path, eta=0.9, callbacks=[schedule], evaluate=False, learning_rate=0.0)
    expected = [train(tmp_path, eta=eta, evaluate=False, learning_rate=0.0).losses for eta in etas]
    assert run.losses == pytest.approx([expected[number][number] for number in range(3)], **CLOSE)
    assert run.trainer.mixce_loss.eta == 0.0


def test_the_model_keeps_its_own_loss(tmp_path: Path) -> None:
    model = model_of("llama")
    weight = model.lm_head.weight.detach().clone()
    run = train(tmp_path, model=model, eta=0.0, evaluate=False)
    assert run.trainer.model.lm_head.weight is model.lm_head.weight
    assert not {"forward", "mixce_loss"} & vars(model).keys()
    assert "forward" not in vars(run.trainer.model)
    assert not torch.equal(model.lm_head.weight, weight)
    tokens = torch.randint(3, VOCAB_SIZE, (2, 5))
    outputs = model(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert outputs.loss.item() == pytest.approx(expected.item(), **CLOSE)


def test_a_path_and_a_checkpoint(tmp_path: Path) -> None:
    """From a folder to a checkpoint, from where training goes on and Transformers loads a model of its own."""
    model_of("qwen2").save_pretrained(tmp_path / "model")

    def trainer(folder: str, **changes: Any) -> Any:
        arguments = MixCESFTConfig(**options(tmp_path / folder, eta=ETA, **changes))
        folder = str(tmp_path / "model")
        return MixCESFTTrainer(folder, arguments, train_dataset=data(), processing_class=tokenizer())

    run = recorded(trainer("out", save_strategy="steps", save_steps=2))
    fresh = train(tmp_path, model=model_of("qwen2"), eta=ETA, evaluate=False)
    assert run.losses == pytest.approx(fresh.losses, **CLOSE)

    tokens = torch.randint(3, VOCAB_SIZE, (2, 5))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-3")
    assert type(loaded) is transformers.Qwen2ForCausalLM
    assert torch.equal(loaded(tokens).logits, run.trainer.model.eval()(tokens).logits)
    assert "2305.16958" in (tmp_path / "out" / "README.md").read_text()

    resumed = trainer("out")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.state.global_step == 3
    for one, other in zip(resumed.model.parameters(), run.trainer.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_gradient_checkpointing(tmp_path: Path) -> None:
    name = "activation_checkpointing" if TRANSFORMERS_RELEASE >= 5 else "gradient_checkpointing"
    run = train(tmp_path, eta=ETA, evaluate=False, **{name: True})
    plain = train(tmp_path, eta=ETA, evaluate=False)
    assert run.losses == plain.losses
    assert [step["nll"] for step in run.steps] == [step["nll"] for step in plain.steps]


def test_autocast(tmp_path: Path) -> None:
    """Products in bfloat16: the losses are those of float32 but for the rounding of the model's own layers."""
    plain = train(tmp_path, eta=ETA, evaluate=False)
    run = train(tmp_path, eta=ETA, evaluate=False, bf16=True)
    assert run.losses != plain.losses
    assert run.losses == pytest.approx(plain.losses, rel=8 * torch.finfo(torch.bfloat16).eps)
    assert all(weight.dtype == torch.float32 for weight in run.weights)


@ENDS
def test_lora(eta: float, loss_type: str, tmp_path: Path) -> None:
    changes = {"learning_rate": 0.3}
    model = model_of("llama")
    before = copy.deepcopy(model.state_dict())
    ours = train(tmp_path, model=model, eta=eta, peft_config=lora(), **changes)
    own = train(tmp_path, loss_type=loss_type, peft_config=lora(), **changes)
    assert_same_training(ours, own)
    assert ours.trainer.model.mixce_loss is ours.trainer.mixce_loss
    # Adapters alone are trained and saved.
    ours.trainer.save_model(str(tmp_path / "adapter"))
    peft = pytest.importorskip("peft")
    loaded = peft.PeftModel.from_pretrained(model_of("llama"), str(tmp_path / "adapter")).eval()
    tokens = torch.randint(3, VOCAB_SIZE, (2, 5))
    trained = ours.trainer.model.eval()(tokens).logits
    assert torch.equal(loaded(tokens).logits, trained)
    with loaded.disable_adapter():
        base = loaded(tokens).logits
    assert not torch.equal(base, trained)
    assert all(torch.equal(value, before[name]) for name, value in model_of("llama").state_dict().items())


def test_a_peft_model_is_taken_as_it_is(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers.set_seed(42)
    wrapped = peft.get_peft_model(model_of("llama"), lora())
    run = train(tmp_path, model=wrapped, eta=ETA, learning_rate=10.0, evaluate=False)
    assert run.trainer.model is wrapped
    assert isinstance(wrapped.get_base_model(), transformers.LlamaForCausalLM)
    torch.manual_seed(0)
    plain = train(tmp_path, model=model_of("llama"), eta=ETA, peft_config=lora(), learning_rate=10.0, evaluate=False)
    assert run.losses[0] == pytest.approx(plain.losses[0], **CLOSE)
    assert run.losses[-1] != pytest.approx(run.losses[0], rel=1e-3)


@ENDS
@pytest.mark.parametrize("passed", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_trained_copy_of_the_head(name: str, passed: bool, eta: float, loss_type: str, tmp_path: Path) -> None:
    """The trainer makes it, or has it in the `PeftModel` that is passed; qwen2's head is tied, its copy is not."""
    peft = pytest.importorskip("peft")
    config = lora(modules_to_save=["lm_head", "embed_tokens"])
    model, changes = model_of(name), {"peft_config": config}
    if passed:
        model, changes = peft.get_peft_model(model, config), {}
    # Older releases do not seed before they make adapters.
    torch.manual_seed(0)
    own = train(tmp_path, model=copy.deepcopy(model), loss_type=loss_type, **copy.deepcopy(changes))
    torch.manual_seed(0)
    ours = train(tmp_path, model=model, eta=eta, **changes)
    assert_same_training(ours, own)
    head = ours.trainer.model.get_output_embeddings()
    assert torch.equal(head.original_module.weight, model_of(name).lm_head.weight)
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)


def test_activation_offloading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL puts hooks on the head, which turn the offloading off there; the offloading itself needs a GPU."""

    class Offloading(contextlib.nullcontext):
        def __init__(self, **options: Any) -> None:
            super().__init__()

        def update_model_params(self, model: Any) -> None:
            pass

    monkeypatch.setattr("trl.models.activation_offloading.OffloadActivations", Offloading)
    run = train(tmp_path, eta=ETA, evaluate=False, activation_offloading=True)
    assert run.trainer.model.lm_head._forward_hooks
    assert run.losses == train(tmp_path, eta=ETA, evaluate=False).losses


@pytest.mark.skipif(
    RELEASE < (1, 16), reason="TRL left the first token, which the last virtual one predicts, out of a divisor"
)
def test_prompt_tuning(tmp_path: Path) -> None:
    """Virtual tokens stand before the labels' and have no loss."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    changes = {"peft_config": config, "learning_rate": 1.0}
    ours = train(tmp_path, eta=1.0, **changes)
    assert_same_training(ours, train(tmp_path, **changes))


def ranks_train(folder: str, port: int) -> tuple[list[float], list[dict[str, float]]]:
    """The losses of this rank's batches, and what is logged."""
    rank, world_size = (getattr(torch.distributed, name)() for name in ("get_rank", "get_world_size"))
    os.environ.update(
        {
            "CI": "true", "HF_HUB_DISABLE_TELEMETRY": "1", "ACCELERATE_USE_CPU": "true", "RANK": str(rank),
            "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }
    )  # fmt: skip
    run = train(Path(folder), eta=ETA, per_device_train_batch_size=2, per_device_eval_batch_size=4)
    assert run.trainer.accelerator.num_processes == world_size
    return run.losses, run.logs


@pytest.mark.slow
def test_two_processes_are_one_with_the_larger_batch(tmp_path: Path) -> None:
    ranks = run_ranks(ranks_train, 2, str(tmp_path), 29541, timeout=120.0)
    own = train(tmp_path, eta=ETA, per_device_train_batch_size=4, per_device_eval_batch_size=8)
    # Each rank's loss is its part of the sum, times the number of ranks, over which gradients are averaged.
    means = [(one + other) / 2 for one, other in zip(ranks[0][0], ranks[1][0], strict=True)]
    assert means == pytest.approx(own.losses, **CLOSE)
    for _, logs in ranks:
        for one, other in zip(logs, own.logs, strict=True):
            for name in ("entropy", "mean_token_accuracy", "nll", "num_tokens", "grad_norm"):
                name = f"eval_{name}" if "eval_loss" in one else name
                if name in other:
                    assert one[name] == pytest.approx(other[name], **CLOSE), name


def test_experts_without_a_router_s_loss(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1}
    config = transformers.MixtralConfig(**config_of("llama").to_diff_dict() | {"model_type": "mixtral"} | sizes)
    changes = {"router_aux_loss_coef": 0.0} if hasattr(trl.SFTConfig, "router_aux_loss_coef") else {}
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    assert_same_training(
        train(tmp_path, model=copy.deepcopy(model), eta=1.0, **changes), train(tmp_path, model=model, **changes)
    )


def test_a_linear_model_may_be_passed(tmp_path: Path) -> None:
    """One that has a loss without logits already gets that of the configuration."""
    model = with_linear_mixce_loss(model_of("llama"), 0.9)
    run = train(tmp_path, model=model, eta=ETA, evaluate=False)
    assert run.losses == pytest.approx(train(tmp_path, eta=ETA, evaluate=False).losses, **CLOSE)
    assert model.mixce_loss.eta == 0.9
