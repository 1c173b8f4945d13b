"""A contender in a mode as a program to be called again and again, and the bytes that it has to move.

Speeds are over the least traffic that a mode needs, whatever a contender really moves, per logit of b bytes:
forward b (read once), backward 2 b (read, gradient written), both and inplace 3 b (the sum), grad_in_forward 2 b
(read once, gradient written once), copy 2 b, read b. Write-allocate reads of a CPU's caches are not counted, nor for
the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.check import Errors, results_of
from harness.contenders import ETA
from vocab.check import Inputs
from vocab.contenders import COPY, READ, Contender, LossFunction

# Bytes moved per byte of logits.
TRAFFIC = {
    "forward": 1,
    "backward": 2,
    "both": 3,
    "inplace": 3,
    "grad_in_forward": 2,
    "grad_in_forward_inplace": 2,
    COPY: 2,
    READ: 1,
}


def _read(inputs: Inputs) -> Tensor:
    """The largest of the logits' bits as integers: what a thread computes of them takes less time than their way."""
    words = inputs.pristine.flatten()
    return words[: words.numel() // 2 * 2].view(torch.int32).amax()


YARDSTICKS: dict[str, Callable[[Inputs], Tensor]] = {
    COPY: lambda inputs: inputs.scratch.copy_(inputs.pristine),
    READ: _read,
}


@dataclass(frozen=True)
class Program:
    """One contender in one mode, to be called again and again."""

    contender: Contender
    mode: str
    loss: LossFunction | None  # None: a yardstick

    def steps(self, inputs: Inputs, targets: Tensor, results: list[Tensor]) -> list[Callable[[], None]]:
        """The parts to time, one after the other; they leave loss and gradient in `results`."""
        loss = self.loss
        if loss is None:
            return [lambda: results.append(YARDSTICKS[self.mode](inputs))]

        def forward() -> None:
            results.append(loss(inputs.logits, targets))

        def forward_alone() -> None:
            # Detached, as in evaluation: Liger computes the gradient of logits that require it, graph or no graph.
            with torch.no_grad():
                results.append(loss(inputs.logits.detach(), targets))

        def backward() -> None:
            results.extend(torch.autograd.grad(results[0], inputs.logits))

        return [forward_alone] if self.mode == "forward" else [forward, backward]


def check(program: Program, inputs: Inputs) -> Errors:
    """Runs the program once at full size, with some tokens ignored, and compares its results with the oracle's."""
    return inputs.expected(program.contender.eta, program.contender.weighting).compare(*results_of(program, inputs))


def yardsticks() -> list[Program]:
    """What every time is compared with: `copy_` of the logits into memory touched before, and reading them alone."""
    computes = {COPY: "a copy of the logits into memory touched before", READ: "the logits are read, and nothing else"}
    return [Program(Contender(name, computes[name], {}, ETA), name, None) for name in YARDSTICKS]
