"""The inputs of a shape, and what the oracle says of them."""

from __future__ import annotations

from functools import cached_property, partial

import torch

from harness.check import Expected, FewRows, oracle_losses, plain_losses
from mixce_kernels.weightings import Weighting


class Inputs(FewRows):
    """Logits and targets of one shape, their untouched copy, and what the oracle says of them."""

    def __init__(self, dtype: torch.dtype, rows: int, vocab: int, device: torch.device) -> None:
        super().__init__(dtype, rows, vocab)
        self.device = device
        # Repeated where they will lie: a GPU has more memory and more speed for it.
        index = self.index.to(device)
        self.pristine = self.few.to(device)[index]  # [N, V]
        self.targets = self.few_targets.to(device)[index]  # [N]
        self.masked_targets = self.few_masked.to(device)[index]  # [N], some ignored: for the check alone
        # No leaf, which a gradient may not overwrite, but computed, as a model's logits are.
        self.logits = self.pristine + torch.zeros((), dtype=dtype, device=device, requires_grad=True)  # [N, V]
        self.scratch = torch.empty_like(self.pristine)  # [N, V]
        self._expected: dict[tuple[float, Weighting], Expected] = {}

    def expected(self, eta: float, weighting: Weighting) -> Expected:
        """The oracle's results with this eta and weighting."""
        if (eta, weighting) not in self._expected:
            oracle, plain = (partial(losses, weighting=weighting) for losses in (oracle_losses, plain_losses))
            self._expected[eta, weighting] = Expected(self, eta, oracle, plain)
        return self._expected[eta, weighting]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the logits."""
        return self.pristine.numel() * self.pristine.element_size()

    def restore(self) -> None:
        """Puts back the logits, also for contenders that leave them: all find the caches in the same state."""
        with torch.no_grad():
            self.logits.copy_(self.pristine)
