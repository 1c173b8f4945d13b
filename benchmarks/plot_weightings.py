"""Draws f against q for each weighting: benchmarks/results/weightings.png, or the file named.

    python benchmarks/plot_weightings.py [FILE]

The entropy and the collision probability are those of a row of 50,257 whose other tokens are equally likely.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from harness.plot import panels, save
from mixce_kernels import MixCEStats
from mixce_kernels.weightings import (
    Band,
    CollisionPower,
    Entropy,
    Focal,
    Power,
    Probability,
    TaiLr,
    Variance,
    Weighting,
)

OTHERS = 50256
PANELS: tuple[tuple[Weighting, ...], ...] = (
    (Probability(), Power(0.5), Power(2.0), Variance()),
    (TaiLr(0.1), TaiLr(0.5, 0.3), Band(0.2, 0.8), Focal(2.0)),
    (Entropy(1.0, 3.0), Entropy(0.5, 3.0), CollisionPower()),
)


def statistics(q: Tensor) -> MixCEStats:
    """Of rows whose target has probability q [N], and whose other tokens share the rest."""
    other = (1 - q) / OTHERS
    entropy = -torch.xlogy(q, q) - OTHERS * torch.xlogy(other, other)
    nothing = torch.full_like(q, math.nan)
    return MixCEStats(-q.log(), q, nothing, nothing, entropy, q.square() + OTHERS * other.square(), q > other)


def main(path: Path) -> Path:
    """Draws the plot."""
    q = torch.linspace(0, 1, 2001, dtype=torch.float64)
    stats = statistics(q)
    figure, axes = panels(len(PANELS), 3, 3.6, 3.0)
    for axis, weightings in zip(axes, PANELS, strict=True):
        for weighting in weightings:
            axis.plot(q, weighting(stats), label=repr(weighting).replace("()", ""), linewidth=1.4)
        axis.set_xlabel("q, the probability of the target", fontsize=8)
        axis.set_ylabel("f", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=6)
    return save(figure, path)


if __name__ == "__main__":
    default = Path(__file__).parent / "results" / "weightings.png"
    print(f"written: {main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)}")
