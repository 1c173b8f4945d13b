"""`MixCESFTTrainer` beside TRL's own trainer, the reference in float64, and what it refuses."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

trl = pytest.importorskip("trl", reason="needs the extra 'trl'")

from causal_models import VOCAB_SIZE, config_of, model_of, transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from ranks import run_ranks  # noqa: E402
from test_transformers import LargeTensors  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from mixce_kernels import mixce_loss_reference  # noqa: E402
from mixce_kernels.integrations.transformers import with_linear_mixce_loss  # noqa: E402
from mixce_kernels.integrations.trl import MixCESFTConfig, MixCESFTTrainer  # noqa: E402

ETA = 0.3
EPSILON = torch.finfo(torch.float32).eps
# Two float32 trainings of a few steps: sums of at most some 40 tokens' terms, rounded in another order.
CLOSE = {"rel": 32 * EPSILON, "abs": 0.0}
# Both sides are float64.
EXACT = {"rel": 1e-12, "abs": 0.0}
WORDS = [f"w{number}" for number in range(VOCAB_SIZE - 4)]
RELEASE = tuple(int(number) for number in trl.__version__.split(".")[:2])
TRANSFORMERS_RELEASE = int(transformers.__version__.split(".")[0])


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL reports no usage where it takes this for continuous integration; and a bfloat16 run leaves no trace."""
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def tokenizer() -> Any:
    """One token a word."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def texts(rows: int = 12) -> list[str]:
    """Of ragged lengths, 1 to 12 words."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 13, (rows,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in lengths]


def data(kind: str = "text", rows: int = 12) -> Any:
    """Texts, or prompts with completions, of which alone there is a loss."""
    if kind == "completion":
        return Dataset.from_dict({"prompt": texts(rows), "completion": texts(2 * rows)[rows:]})
    return Dataset.from_dict({"text": texts(rows)})


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """Three steps of plain gradient descent, so that a gradient's rounding stays as small in the weights."""
    checkpoints = "activation_checkpointing" if TRANSFORMERS_RELEASE >= 5 else "gradient_checkpointing"
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True,
        "logging_steps": 1, "max_steps": 3, "per_device_train_batch_size": 3, "per_device_eval_batch_size": 5,
        "save_strategy": "no", "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9, checkpoints: False,
    }  # fmt: skip
    return {**defaults, **changes}


class Run(NamedTuple):
    """A training: its trainer, the loss of each micro-batch, what is logged, and the weights before and behind."""

    trainer: Any
    losses: list[float]
    logs: list[dict[str, float]]
    initial: list[Tensor]
    weights: list[Tensor]

    @property
    def steps(self) -> list[dict[str, float]]:
        """The logs of training."""
        return [entry for entry in self.logs if "loss" in entry]

    @property
    def evaluated(self) -> dict[str, float]:
        """The last log, of the evaluation behind."""
        assert "eval_loss" in self.logs[-1]
        return self.logs[-1]


def recorded(trainer: Any) -> Run:
    """Trains and, where there are data for it, evaluates."""
    losses = []
    step = trainer.training_step
    trained = [weight.detach() for weight in trainer.model.parameters() if weight.requires_grad]
    initial = [weight.clone() for weight in trained]

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        loss = step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.training_step = training_step
    trainer.train()
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    return Run(trainer, losses, logs, initial, trained)


def train(folder: Path, kind: str = "text", model: Any = None, evaluate: bool = True, **changes: Any) -> Run:
    """With our trainer where `eta` is among the options, else with TRL's."""
    ours = "eta" in changes
    own = {name: changes.pop(name) for name in ("peft_config", "callbacks", "compute_metrics") if name in changes}
    arguments = (MixCESFTConfig if ours else trl.SFTConfig)(**options(folder, **changes))
    return recorded(
        (MixCESFTTrainer if ours else trl.SFTTrainer)(
            model_of("llama") if model is None else model,
            arguments,
            train_dataset=data(kind),
            eval_dataset=data(kind, 8) if evaluate else None,
            processing_class=tokenizer(),
            **own,
        )
    )


def assert_same_training(ours: Run, own: Run) -> None:
    """Losses, gradient norms and metrics of each step, and those of the evaluation."""
    assert ours.losses == pytest.approx(own.losses, **CLOSE)
    names = ["mean_token_accuracy", "num_tokens"]
    if RELEASE >= (1, 4):  # before, of all tokens, and not of those with a label
        names.append("entropy")
    for one, other in zip(ours.logs, own.logs, strict=True):
        prefix = "eval_" if "eval_loss" in one else ""
        for name in [*names, "loss", *([] if prefix else ["grad_norm"])]:
            # Transformers 4 rounds the loss that it logs.
            tolerance = {"rel": 0.0, "abs": 1e-4} if name == "loss" and TRANSFORMERS_RELEASE < 5 else CLOSE
            assert one[prefix + name] == pytest.approx(other[prefix + name], **tolerance), name
    assert_same_weights(ours, own)


def assert_same_weights(ours: Run, own: Run) -> None:
    """Each to the rounding of its largest entry, from which training has moved some much further."""
    moved = 0.0
    for one, other, initial in zip(ours.weights, own.weights, own.initial, strict=True):
        largest = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0.0, atol=32 * EPSILON * largest)
        moved = max(moved, (other - initial).abs().max().item() / largest)
    assert moved > 1e-3


ENDS = pytest.mark.parametrize(("eta", "loss_type"), [(1.0, "nll"), (0.0, "dft")])


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
    ],
    ids=["text", "accumulated", "options"],
)  # fmt: skip
def test_between_it_is_the_reference(
    kind: str, changes: dict[str, Any], loss: dict[str, float], tmp_path: Path
) -> None:
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


def test_one_forward_and_no_logits(tmp_path: Path) -> None:
    model = model_of("llama")
    trainer = train(tmp_path, model=model, eta=ETA, gradient_accumulation_steps=2, max_steps=1).trainer
    # Of each call, whether it is differentiated.
    backbone: list[bool] = []
    head: list[bool] = []
    model.model.register_forward_pre_hook(lambda *_: backbone.append(torch.is_grad_enabled()))
    model.lm_head.register_forward_pre_hook(lambda *_: head.append(torch.is_grad_enabled()))
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
    assert limits.items() <= trainer.mixce_loss.options.items()
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


def lora(**changes: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes})


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


def test_the_command_line(tmp_path: Path) -> None:
    parser = transformers.HfArgumentParser(MixCESFTConfig)
    line = ["--output_dir", str(tmp_path), "--use_cpu", "True", "--bf16", "False", "--eta", "0.25", "--z_loss", "1e-4"]
    (config,) = parser.parse_args_into_dataclasses([*line, "--max_chunk_bytes", "4096", "--backend", "cpu"])
    assert (config.eta, config.z_loss, config.max_chunk_bytes, config.backend) == (0.25, 1e-4, 4096, "cpu")
    assert config.loss_type == "nll"
    (config,) = parser.parse_args_into_dataclasses(line[:-4])
    assert (config.eta, config.z_loss, config.max_chunk_bytes, config.backend) == (0.5, 0.0, None, None)
    assert config.to_dict()["eta"] == 0.5


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"eta": 1.5}, ValueError, r"expected eta in \[0, 1\], got 1.5"),
        ({"eta": float("nan")}, ValueError, r"expected eta in \[0, 1\], got nan"),
        ({"eta": "half"}, TypeError, "expected eta to be a number, got str"),
        ({"eta": torch.tensor(0.5)}, TypeError, "expected eta to be a number, got a tensor of torch.float32"),
        ({"z_loss": -1.0}, ValueError, "expected z_loss to be finite and not negative, got -1.0"),
        ({"label_smoothing_factor": 2.0}, ValueError, r"expected label_smoothing in \[0, 1\], got 2.0"),
        ({"max_chunk_bytes": 0}, ValueError, "expected max_chunk_bytes to be positive, got 0"),
        ({"loss_type": "dft"}, ValueError, "expected loss_type='nll' with eta, got 'dft': this is the loss of eta=0"),
        ({"loss_type": "mle"}, ValueError, "expected loss_type='nll' with eta, got 'mle'"),
        ({"use_liger_kernel": True}, ValueError, "expected use_liger_kernel=False, or liger_kernel_config="),
    ],
)
def test_options_that_are_refused(
    changes: dict[str, Any], error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=f"^{sentence}"):
        MixCESFTConfig(**options(tmp_path, **changes))


def test_layer_kernels_of_liger_are_allowed(tmp_path: Path) -> None:
    layers = {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": False}}
    assert MixCESFTConfig(**options(tmp_path, **layers)).use_liger_kernel


def refused(error: type[Exception], sentence: str, folder: Path, model: Any = None, **more: Any) -> None:
    args = more.pop("args", None) or MixCESFTConfig(**options(folder))
    with pytest.raises(error, match=sentence):
        MixCESFTTrainer(
            model_of("llama") if model is None else model,
            args,
            train_dataset=data(),
            processing_class=tokenizer(),
            **more,
        )


def test_arguments_that_are_refused(tmp_path: Path) -> None:
    config = trl.SFTConfig(**options(tmp_path))
    refused(TypeError, "^expected args to be a MixCESFTConfig, got SFTConfig$", tmp_path, args=config)
    sentence = "^expected compute_loss_func=None, since the loss is that of eta$"
    refused(ValueError, sentence, tmp_path, compute_loss_func=lambda *_: None)

    config = MixCESFTConfig(**options(tmp_path))
    config.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    refused(ValueError, "^expected a ZeRO stage below 3, .* got 3$", tmp_path, args=config)
    config = MixCESFTConfig(**options(tmp_path))
    assert config.n_gpu <= 1
    config._n_gpu = 2
    refused(ValueError, "nn.DataParallel", tmp_path, args=config)


def test_sequence_parallelism_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = trl.SFTTrainer.__init__

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        self.accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(sp_enabled=True))

    monkeypatch.setattr(trl.SFTTrainer, "__init__", initialise)
    refused(ValueError, "^expected sp_size=1, since the loss is not added up", tmp_path)


def test_models_that_are_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    model.forward = model.forward
    refused(ValueError, "^expected a model with the forward of its class, got LlamaForCausalLM", tmp_path, model=model)
    model = model_of("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    refused(ValueError, "^expected output embeddings that are a torch.nn.Linear", tmp_path, model=model)
    sentence = "^expected output embeddings that are a torch.nn.Linear, got peft"
    refused(ValueError, sentence, tmp_path, peft_config=lora(modules_to_save=["lm_head"]))
    if RELEASE >= (1, 16):
        sentence = "^Applying a PEFT adapter to `lm_head` is not supported"
    refused(ValueError, sentence, tmp_path, peft_config=lora(target_modules=["q_proj", "lm_head"]))
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "router_aux_loss_coef": 0.01}
    experts = transformers.MixtralConfig(**config_of("llama").to_diff_dict() | {"model_type": "mixtral"} | sizes)
    experts.output_router_logits = True
    model = transformers.MixtralForCausalLM(experts)
    refused(ValueError, "^expected a model without a router's loss", tmp_path, model=model)


def test_experts_without_a_router_s_loss(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1}
    config = transformers.MixtralConfig(**config_of("llama").to_diff_dict() | {"model_type": "mixtral"} | sizes)
    changes = {"router_aux_loss_coef": 0.0} if hasattr(trl.SFTConfig, "router_aux_loss_coef") else {}
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    assert_same_training(
        train(tmp_path, model=copy.deepcopy(model), eta=1.0, **changes), train(tmp_path, model=model, **changes)
    )


def test_batches_that_are_refused(tmp_path: Path) -> None:
    trainer = train(tmp_path, eta=ETA, max_steps=1, evaluate=False).trainer
    tokens = torch.randint(3, VOCAB_SIZE, (2, 5))
    with pytest.raises(ValueError, match=r"^expected a batch with labels, got one with input_ids$"):
        trainer.compute_loss(trainer.model, {"input_ids": tokens})


def test_a_linear_model_may_be_passed(tmp_path: Path) -> None:
    """One that has a loss without logits already gets that of the configuration."""
    model = with_linear_mixce_loss(model_of("llama"), 0.9)
    run = train(tmp_path, model=model, eta=ETA, evaluate=False)
    assert run.losses == pytest.approx(train(tmp_path, eta=ETA, evaluate=False).losses, **CLOSE)
    assert model.mixce_loss.eta == 0.9
