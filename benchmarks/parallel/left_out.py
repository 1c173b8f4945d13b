"""`NoKernels`: a backend of a GPU whose kernels are left out, and counted."""

from __future__ import annotations

from torch import Tensor

from mixce_kernels.backends.results import EntropyGrad, Results
from mixce_kernels.backends.shards import Columns, ShardRows
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions
from mixce_kernels.reduction import Reduction
from parallel.counting import count_launch


class NoKernels:
    """A backend of a GPU whose kernels are left out: each is counted, with the tensors that it reads or writes."""

    checks_targets = False

    @property
    def shards(self) -> NoKernels:
        return self

    def unavailable(self, logits: Tensor) -> str | None:
        return None

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        mixture: Mixture,
        options: TokenOptions,
        reduction: Reduction,
        results: Results,
        token_scale: Tensor | None,
        grad_logits: Tensor | None,
        temperature: Tensor | None = None,
        *,
        may_split: bool = True,
    ) -> None:
        written = (results.losses, results.state, results.stats, results.correct, results.entropy_state)
        count_launch(logits, targets, *mixture.tensors(), *written, token_scale, grad_logits, temperature)
        if not reduction.is_identity:
            self.reduce(targets, options.ignore_index, reduction, results.losses, results.loss, results.token_scale)

    def reduce(
        self,
        targets: Tensor,
        ignore_index: int,
        reduction: Reduction,
        losses: Tensor | None,
        loss: Tensor | None,
        token_scale: Tensor | None,
    ) -> None:
        count_launch(targets, reduction.weights, reduction.num_items, losses, loss, token_scale)

    def logits_grad(
        self,
        logits: Tensor,
        targets: Tensor,
        state: Tensor,
        grad_loss: Tensor | None,
        token_scale: Tensor | None,
        options: TokenOptions,
        grad_logits: Tensor,
        temperature: Tensor | None = None,
        entropy: EntropyGrad | None = None,
    ) -> None:
        count_launch(logits, targets, state, grad_loss, token_scale, grad_logits, temperature, *(entropy or ()))

    def scale_rows_(self, grad_logits: Tensor, grad_loss: Tensor, targets: Tensor | None, ignore_index: int) -> None:
        count_launch(grad_logits, grad_logits, grad_loss, targets)

    def localize_targets(self, targets: Tensor, columns: Columns, ignore_index: int, elsewhere: int) -> Tensor:
        local = targets.new_empty(targets.shape)
        count_launch(targets, local)
        return local

    def write_message(
        self,
        message: Tensor,
        digest: int,
        columns: Columns,
        targets: Tensor,
        rows: ShardRows | None,
        options: TokenOptions,
        with_stats: bool,
    ) -> None:
        assert rows is not None
        results = rows.results
        assert results.state is not None
        largest = None if rows.largest_state is None else rows.largest_state[:2]
        stats = () if results.stats is None else (results.stats[:1], results.stats[4:])
        count_launch(targets, results.losses, results.state[:2], *stats, results.correct, largest, message)

    def merge_messages(
        self,
        messages: Tensor,
        targets: Tensor,
        mixture: Mixture,
        options: TokenOptions,
        results: Results,
        temperature: Tensor | None,
    ) -> None:
        written = (results.losses, results.state, results.stats, results.correct, results.entropy_state)
        count_launch(messages, targets, *mixture.tensors(), *written, temperature)
