"""The runs of the comparison: which losses, from which seeds, and the lines of the CSV that they become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# What a line is of.
HUMAN, PRETRAINED, FINE_TUNED = ("human", "pretrained", "fine-tuned")
PROBABILITY = "Probability()"
LOSSES = (
    *((eta, PROBABILITY) for eta in (1.0, 0.9, 0.5, 0.1, 0.01, 0.0)),
    (0.0, "Power(alpha=0.5)"),
    (0.0, "Entropy(alpha=1.0, scale=3.0)"),
)

SIZES = {"steps": 20, "batch_size": 4, "block_size": 128, "lr": 1e-4, "prompt_tokens": 32, "samples": 64}
FULL_SIZES = {**SIZES, "steps": 150, "batch_size": 8, "samples": 256}
SEEDS = (0, 1)
FULL_SEEDS = (0, 1, 2)


class Run(NamedTuple):
    """One line: a seed's human text, or its samples of the pretrained model, or of one fine-tuned with a loss."""

    source: str
    seed: int
    eta: float = 1.0
    weighting: str = PROBABILITY

    @property
    def fields(self) -> dict[str, Any]:
        """Its columns of the CSV."""
        loss = {"eta": self.eta, "weighting": self.weighting} if self.source == FINE_TUNED else {}
        return {"source": self.source, "seed": self.seed, "eta": "", "weighting": "", **loss}


def runs(seed: int) -> list[Run]:
    """Those of a seed, in their order."""
    return [Run(HUMAN, seed), Run(PRETRAINED, seed), *(Run(FINE_TUNED, seed, *loss) for loss in LOSSES)]


def key(fields: Mapping[str, Any]) -> tuple[int, int]:
    """Which run a line of the CSV is of: lines stand in the order of the runs."""
    seed = int(fields["seed"])
    return seed, runs(seed).index(
        Run(fields["source"], seed, float(fields["eta"]), fields["weighting"])
        if fields["source"] == FINE_TUNED
        else Run(fields["source"], seed)
    )


def label(fields: Mapping[str, Any]) -> str:
    """How tables name a line's text: "" for that of humans, else the model."""
    if fields["source"] == HUMAN:
        return ""
    if fields["source"] == PRETRAINED:
        return "not fine-tuned"
    loss = f"{float(fields['eta']):g}"
    return loss if fields["weighting"] == PROBABILITY else f"{loss}, {fields['weighting'].partition('(')[0]}"
