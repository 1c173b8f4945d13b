"""Small runs of TRL's trainers, offline: data, options, what a run logged, and how near two runs are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

trl = pytest.importorskip("trl", reason="needs the extra 'trl'")

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

from mixce_kernels.integrations.trl import MixCESFTConfig, MixCESFTTrainer
from support.causal_models import VOCAB_SIZE, model_of, transformers

ETA = 0.3
EPSILON = torch.finfo(torch.float32).eps
# Two float32 trainings of a few steps: sums of at most some 40 tokens' terms, rounded in another order.
CLOSE = {"rel": 32 * EPSILON, "abs": 0.0}
# Both sides are float64.
EXACT = {"rel": 1e-12, "abs": 0.0}
WORDS = [f"w{number}" for number in range(VOCAB_SIZE - 4)]
RELEASE = tuple(int(number) for number in trl.__version__.split(".")[:2])
TRANSFORMERS_RELEASE = int(transformers.__version__.split(".")[0])
# Where the mixture is a loss of TRL's own.
ENDS = pytest.mark.parametrize(("eta", "loss_type"), [(1.0, "nll"), (0.0, "dft")])


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


def lora(**changes: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes})
