"""What is measured of a model and its samples, and of human text in their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune.pretrained import Predictions, features
from sample_quality import ORDERS, held_out_qualities, sample, sample_qualities

# Tokens after a prompt that have n-grams of every order.
SHORTEST = max(ORDERS)
# Sequences at a time.
BATCH = 16
SAMPLED_AT_A_TIME = 64


class Judge:
    """Sets models of one seed beside the human text that follows the same prompts.

    Attributes:
        windows: all held-out text [W, T + 1].
        texts: those windows, without their last tokens [B, T], from which the seed takes its prompts.
        others: as many other windows [B, T].
    """

    def __init__(self, pretrained: Any, windows: Tensor, samples: int, prompt_tokens: int, seed: int) -> None:
        """Chooses windows, of which there are twice as many as samples, and has the pretrained model read them."""
        self.windows = windows
        self.texts, self.others = choose(windows, samples, seed)
        self._pretrained, self._prompt_tokens, self._seed = pretrained, prompt_tokens, seed
        self._features = features(pretrained, self.texts, BATCH)

    def human(self) -> dict[str, float]:
        """Human text in the place of samples; its MAUVE is that of as much other human text."""
        return self._of_texts(self.texts, mauve_of=self.others)

    def model(self, model: Any) -> dict[str, float]:
        """A model's predictions of all held-out text, and its samples: at temperature 1, and nothing is cut off.

        own_perplexity is that of the samples under the model that drew them.
        """
        predictions = Predictions(model)
        generator = torch.Generator().manual_seed(self._seed)
        prompts = self.texts[:, : self._prompt_tokens]
        count = self.texts.shape[1] - self._prompt_tokens
        parts = [sample(predictions, rows, count, generator) for rows in prompts.split(SAMPLED_AT_A_TIME)]
        drawn, scores = (torch.cat(part) for part in zip(*parts, strict=True))
        texts = torch.cat((prompts, drawn), 1)
        return {
            **held_out_qualities(predictions, self.windows, BATCH),
            "own_perplexity": (-scores.double().mean()).exp().item(),
            **self._of_texts(texts, mauve_of=texts),
        }

    def _of_texts(self, texts: Tensor, mauve_of: Tensor) -> dict[str, float]:
        """Counts of what follows the prompts, and MAUVE of whole texts."""
        return {
            **counts(texts[:, self._prompt_tokens :]),
            "mauve": mauve(self._features, features(self._pretrained, mauve_of, BATCH), self._seed),
        }


def choose(windows: Tensor, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two sets [B, T] of a seed's own, from the windows [W, T + 1]; W is at least twice the number of samples."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    texts, others = windows[order[: 2 * samples], :-1].chunk(2)
    return texts, others


def counts(tokens: Tensor) -> dict[str, float]:
    """What is counted in texts [B, L], and diversity: the mean of the shares of unique 1- to 4-grams."""
    counted = sample_qualities(tokens)
    return {**counted, "diversity": sum(counted[f"distinct_{n}"] for n in ORDERS) / len(ORDERS)}


def mauve(human: Tensor, other: Tensor, seed: int) -> float:
    """MAUVE of two sets of texts by their features, each [B, D]: 1 where they are alike, near 0 where they are not.

    Source: Pillutla et al., "MAUVE", NeurIPS 2021 (arXiv 2102.01454), by their package, with its defaults.
    """
    from mauve import compute_mauve

    return float(compute_mauve(p_features=human.numpy(), q_features=other.numpy(), seed=seed).mauve)
