"""Fine-tunes a pretrained model with one loss; for one seed every loss sees the same batches."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.plan import Run
from mixce_kernels.integrations.transformers import with_linear_mixce_loss
from mixce_kernels.weightings import parse

BETAS = (0.9, 0.95)
WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class Recipe:
    """What all runs have in common."""

    steps: int
    batch_size: int
    block_size: int
    lr: float
    dtype: torch.dtype


def fine_tune(pretrained: Any, train_tokens: Tensor, run: Run, recipe: Recipe, stepped: Callable[[], object]) -> Any:
    """Trains a copy of the model on random blocks of train_tokens [M], through the loss from hidden states.

    AdamW in float32 without weight decay, with warm-up and a linear decay to 0. In bfloat16 the model that is called is
    a copy whose weights are rounded anew after each step.

    Args:
        pretrained: a causal language model of Transformers, in float32; it stays as it is.
        train_tokens: the text.
        run: the loss and the seed.
        recipe: steps, sizes, learning rate and the dtype of activations.
        stepped: called after each step.

    Returns:
        The trained model, of the recipe's dtype.
    """
    master = copy.deepcopy(pretrained)
    model = master if recipe.dtype == torch.float32 else copy.deepcopy(master).to(recipe.dtype)
    optimizer = torch.optim.AdamW(master.parameters(), lr=recipe.lr, betas=BETAS, weight_decay=0.0, fused=True)
    warmup = max(1, round(WARMUP_SHARE * recipe.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (recipe.steps - step) / recipe.steps)
    )
    trained = with_linear_mixce_loss(model.train(), eta=run.eta, weighting=parse(run.weighting))
    for tokens in batches(train_tokens, run.seed, recipe):
        trained(input_ids=tokens, labels=tokens).loss.backward()
        if model is not master:
            for wide, narrow in zip(master.parameters(), model.parameters(), strict=True):
                wide.grad, narrow.grad = narrow.grad.float(), None
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if model is not master:
            model.load_state_dict(master.state_dict())
        stepped()
    return model.eval()


def batches(train_tokens: Tensor, seed: int, recipe: Recipe) -> list[Tensor]:
    """The blocks of each step, [B, T + 1] each: the same ones for every loss."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(
        len(train_tokens) - recipe.block_size, (recipe.steps, recipe.batch_size, 1), generator=generator
    )
    return list(train_tokens[starts + torch.arange(recipe.block_size + 1)])


def faster_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies matrices of it in less time than those of float32."""
    seconds = {dtype: _product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return min(seconds, key=seconds.__getitem__)


def _product_seconds(dtype: torch.dtype) -> float:
    # The sizes of a perceptron of the model, and of a batch.
    left, right = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return best
