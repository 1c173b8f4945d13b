"""The inputs of a shape, and what the oracle says of them."""

from __future__ import annotations

from functools import cached_property

import torch

from harness.check import Expected, FewRows


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
        self._expected: dict[float, Expected] = {}

    def expected(self, eta: float) -> Expected:
        """The oracle's results with this eta."""
        if eta not in self._expected:
            self._expected[eta] = Expected(self, eta)
        return self._expected[eta]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the logits."""
        return self.pristine.numel() * self.pristine.element_size()

    def restore(self) -> None:
        """Puts back the logits, also for contenders that leave them: all find the caches in the same state."""
        with torch.no_grad():
            self.logits.copy_(self.pristine)
