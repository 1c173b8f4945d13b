"""Unbiased samples of a language model, and counts that compare them with human text.

Human text and samples are counted in tokens, over sequences of the same number and length. The share of unique n-grams
falls as the number of tokens grows, so texts of different sizes cannot be compared.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from mixce_kernels import fused_mixce_loss

ORDERS = (1, 2, 3, 4)  # of the n-grams
# For each layer its keys and values so far, each [B, heads, T, D / heads]; empty before the first call.
Cache = list[list[Tensor]]


class LanguageModel(Protocol):
    """The model that is sampled from and evaluated."""

    def __call__(self, tokens: Tensor, cache: Cache | None = None) -> Any:
        """Tokens [B, T] to logits [B, T, V]; with a cache, which grows, they follow the tokens of earlier calls."""


@torch.no_grad()
def sample(model: LanguageModel, prompts: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Continues each of the prompts [B, P] by `count` tokens: ancestral sampling at temperature 1, nothing cut off.

    The samples come from the distribution that was trained; the MixCE paper calls this unbiased (Zhang et al. 2023,
    arXiv 2305.16958). Each token costs one position, because the model keeps keys and values.

    Returns:
        The drawn tokens [B, count], and the log-probability [B, count] with which the model drew each.
    """
    cache: Cache = []
    step = prompts
    drawn: list[Tensor] = []
    scores: list[Tensor] = []
    for _ in tqdm(range(count), desc=f"sampling {len(prompts)} sequences", unit="token", leave=False):
        log_probs = model(step, cache)[:, -1].float().log_softmax(-1)  # [B, V]
        step = torch.multinomial(log_probs.exp(), 1, generator=generator)
        drawn.append(step)
        scores.append(log_probs.gather(-1, step))
    return torch.cat(drawn, 1), torch.cat(scores, 1)


def sample_qualities(tokens: Tensor) -> dict[str, float]:
    """The diversity and repetition of sequences [B, L], by name.

    distinct_n: the share of unique ones among all n-grams of all sequences (Li et al. 2016, "A Diversity-Promoting
        Objective Function for Neural Conversation Models", arXiv 1510.03055).
    repetition_n: the share of n-grams that occurred before in the same sequence, seq-rep-n of Welleck et al. 2020
        ("Neural Text Generation with Unlikelihood Training", arXiv 1908.04319).
    entropy: of the tokens' frequencies, in bits.
    """
    measured: dict[str, float] = {}
    for n in ORDERS:
        grams = tokens.unfold(1, n, 1)  # [B, L - n + 1, n]
        measured[f"distinct_{n}"] = _unique_share(grams)
    sequence = torch.arange(len(tokens), device=tokens.device).view(-1, 1, 1)
    for n in ORDERS:
        grams = tokens.unfold(1, n, 1)
        # With the sequence's number in front, only n-grams of the same sequence are equal.
        numbered = torch.cat((sequence.expand(-1, grams.shape[1], 1), grams), 2)
        measured[f"repetition_{n}"] = 1.0 - _unique_share(numbered)
    shares = tokens.flatten().bincount().double() / tokens.numel()
    measured["entropy"] = -torch.special.xlogy(shares, shares).sum().item() / math.log(2.0)
    return measured


def _unique_share(grams: Tensor) -> float:
    flat = grams.flatten(0, 1)
    return len(flat.unique(dim=0)) / len(flat)


@torch.no_grad()
def held_out_qualities(model: LanguageModel, windows: Tensor, batch_size: int) -> dict[str, float]:
    """How well the model predicts windows [W, T + 1], each token but a window's first.

    perplexity: exp of the mean forward cross-entropy, for any training loss.
    accuracy: the share of tokens that are the model's first choice.
    mean_q: the mean probability that the model gives to the token.
    """
    nll = correct = q = 0.0
    for rows in tqdm(windows.split(batch_size), desc="held-out text", unit="batch", leave=False):
        _, stats = fused_mixce_loss(model(rows[:, :-1]), rows[:, 1:], eta=1.0, return_stats=True)
        nll += stats.nll.sum(dtype=torch.float64).item()
        correct += stats.correct.sum().item()
        q += stats.q.sum(dtype=torch.float64).item()
    count = windows[:, 1:].numel()
    return {"perplexity": math.exp(nll / count), "accuracy": correct / count, "mean_q": q / count}
