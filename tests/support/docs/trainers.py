"""For the pages that train a model of Transformers: the model, its data, a trainer's options, and the plain loss.

Transformers is imported where it is used: pages are read without it, and steps say what they need.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixce_kernels import mixce_loss_reference
from support.docs.models import VOCAB_SIZE, new_targets, new_tokens

# What `Trainer` needs.
TRAINER = ("transformers", "accelerate")


def causal_lm() -> Any:
    """A small model of the tokens that the pages' other models know, with the same weights every time."""
    from support.causal_models import model_of

    return model_of("llama", vocab_size=VOCAB_SIZE)


def sequences(rows: int) -> list[dict[str, Tensor]]:
    """A data set of token sequences, some of whose labels are ignored."""
    # The first tokens are special.
    tokens = new_tokens(rows, low=3)
    return [{"input_ids": row, "labels": labels} for row, labels in zip(tokens, new_targets(tokens), strict=True)]


def stacked(rows: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Tokens and labels [B, T] of such a data set."""
    return torch.stack([row["input_ids"] for row in rows]), torch.stack([row["labels"] for row in rows])


def plain_training_options(**more: Any) -> dict[str, Any]:
    """Steps of SGD on a CPU that leave nothing behind."""
    return {
        "output_dir": tempfile.gettempdir(),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        **more,
    }


def sft_names(**options: Any) -> dict[str, Any]:
    """What TRL's trainers are given: a tokenizer, sequences of four lengths and options."""
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{token}": token for token in range(3, VOCAB_SIZE)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    rows = zip(new_tokens(low=3).tolist(), (9, 4, 7, 5), strict=True)
    return {
        "tokenizer": transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        ),
        "train_dataset": Dataset.from_list([{"input_ids": row[:length]} for row, length in rows]),
        "training_options": plain_training_options(
            learning_rate=1.0, bf16=False, gradient_checkpointing=False, **options
        ),
    }


def plain_causal_loss(tokens: Tensor, labels: Tensor, eta: float) -> Callable[[Any], Tensor]:
    """The plain loss of the next tokens by a model of Transformers."""

    def loss_of(model: Any) -> Tensor:
        return mixce_loss_reference(model(input_ids=tokens).logits[:, :-1], labels[:, 1:], eta)

    return loss_of
