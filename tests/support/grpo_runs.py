"""Small runs of TRL's `GRPOTrainer`, offline: prompts, a reward, options, a batch to be scored, and its oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from mixce_kernels.integrations.trl_grpo import FusedLogprobsGRPOTrainer
from support.causal_models import HEADS, VOCAB_SIZE, gradients_of, model_of
from support.trl_runs import options, texts, tokenizer, trl

TEMPERATURE = 0.7


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A number of a completion's tokens that two completions seldom share."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def grpo_options(folder: Path, **changes: Any) -> dict[str, Any]:
    """As those of the other runs: two completions of each of two prompts a step."""
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    return options(folder, **{**sizes, "num_generations": 2, "max_completion_length": 8, **changes})


def grpo_trainer(ours: bool, folder: Path, model: Any = None, evaluate: bool = False, **changes: Any) -> Any:
    """Our trainer or TRL's; `changes` are of its configuration, or arguments of the trainer by their names."""
    names = ("peft_config", "max_chunk_bytes", "backend")
    arguments = {name: changes.pop(name) for name in names if name in changes}
    prompts = Dataset.from_dict({"prompt": texts()})
    return (FusedLogprobsGRPOTrainer if ours else trl.GRPOTrainer)(
        model_of("llama") if model is None else model,
        reward_funcs=reward,
        args=trl.GRPOConfig(**grpo_options(folder, **changes)),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(4)) if evaluate else None,
        processing_class=tokenizer(),
        **arguments,
    )


class Batch(NamedTuple):
    """Prompts, padded on the left, and completions, padded on the right."""

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T]
    logits_to_keep: int  # K, the columns of completions

    @property
    def valid(self) -> Tensor:
        """Whether a completion has a token in a column, [B, K]."""
        return self.attention_mask[:, -self.logits_to_keep :].bool()


def batch_of(prompts: tuple[int, ...] = (5, 2, 4), completions: tuple[int, ...] = (7, 3, 1)) -> Batch:
    """Random tokens of these lengths."""
    generator = torch.Generator().manual_seed(5)
    longest = max(prompts)
    columns = torch.arange(longest + max(completions))
    rows = zip(prompts, completions, strict=True)
    mask = torch.stack([(columns >= longest - prompt) & (columns < longest + length) for prompt, length in rows])
    tokens = torch.randint(3, VOCAB_SIZE, mask.shape, generator=generator)
    return Batch(tokens.where(mask, 0), mask.long(), max(completions))


def loss_of(batch: Batch, log_probs: Tensor, entropy: Tensor | None) -> Tensor:
    """A sum over tokens, with weights of both signs, of log-probabilities and, where there are some, entropies."""
    generator = torch.Generator().manual_seed(6)
    weights = torch.randn(2, *batch.valid.shape, generator=generator)
    loss = (log_probs * weights[0]).sum()
    return loss if entropy is None else loss + (entropy * weights[1]).sum()


class Scores(NamedTuple):
    """Of a batch, and the gradients of `loss_of` it."""

    log_probs: Tensor  # [B, K]
    entropy: Tensor | None  # [B, K]
    hidden: Tensor  # [B, T, D], the last hidden states of all positions
    grad_hidden: Tensor  # [B, T, D]
    gradients: dict[str, Tensor]  # of the model's parameters, by name


def backbone_of(model: Any) -> Any:
    """The module whose output the head is given."""
    return getattr(model.base_model, "decoder", model.base_model)


def scored(
    trainer: Any, batch: Batch, entropy: bool = True, batch_size: int | None = None, model: Any = None
) -> Scores:
    """What the trainer computes of a batch."""
    model = trainer.model if model is None else model
    hidden: list[Tensor] = []

    def keep(module: Any, arguments: Any, outputs: Any) -> None:
        outputs.last_hidden_state.retain_grad()
        hidden.append(outputs.last_hidden_state)

    hook = backbone_of(trainer.model).register_forward_hook(keep)
    log_probs, entropies, _ = trainer._get_per_token_logps_and_entropies(
        model, *batch, batch_size=batch_size, compute_entropy=entropy
    )
    hook.remove()
    loss_of(batch, log_probs, entropies).backward()
    return Scores(
        log_probs.detach(),
        None if entropies is None else entropies.detach(),
        torch.cat(hidden).detach(),
        torch.cat([states.grad for states in hidden]),
        gradients_of(trainer.model),
    )


class Expected(NamedTuple):
    """Of a batch, in float64, and the gradients of `loss_of` it by what the head multiplies and adds."""

    log_probs: Tensor  # [B, K]
    entropy: Tensor  # [B, K]
    grad_hidden: Tensor  # [B, T, D]
    grad_weight: Tensor  # [V, D]
    grad_bias: Tensor | None  # [V]


def expected(name: str, model: Any, batch: Batch, hidden: Tensor, entropy: bool = True) -> Expected:
    """What plain formulas make of a model's hidden states in float64; 0 where there is no token."""
    head = model.get_output_embeddings()
    logit_scale, softcap = HEADS.get(name, (1.0, None))
    leaves = [
        None if leaf is None else leaf.detach().double().requires_grad_() for leaf in (hidden, head.weight, head.bias)
    ]
    z = logit_scale * torch.nn.functional.linear(*leaves)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = (z[:, -batch.logits_to_keep - 1 : -1] / TEMPERATURE).log_softmax(-1)
    tokens = batch.input_ids[:, -batch.logits_to_keep :]
    log_probs = log_p.gather(-1, tokens[..., None]).squeeze(-1) * batch.valid
    entropies = -(log_p.exp() * log_p).sum(-1) * batch.valid
    loss_of(batch, log_probs, entropies if entropy else None).backward()
    gradients = (None if leaf is None else leaf.grad for leaf in leaves)
    return Expected(log_probs.detach(), entropies.detach(), *gradients)
