"""A shard of the vocabulary: another backend's kernels on the columns of a rank, and one collective a forward.

    a rank's columns -> m, s, z_y - m of each token      the other backend's forward, and `write_message`
    all ranks'       -> one all-gather of these
                     -> m, s of the whole row, loss, a, c, t      `merge_messages`, the same on every rank
    a rank's columns -> their gradient                   the other backend's logits_grad

A rank sends 3 numbers a token, one more with label smoothing, and two with statistics (three with a softcap); and 3
integers a call, which tell the ranks that they are making the same call.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mixce_kernels import backends
from mixce_kernels.backends.base import Backend
from mixce_kernels.backends.results import EntropyGrad, Results, empty_results
from mixce_kernels.backends.shards import HEADER, IGNORED, Columns, ShardKernels, ShardRows, integers, numbers_per_token
from mixce_kernels.backends.vocabulary import CallFacts, Vocabulary
from mixce_kernels.checks import raise_bad_target
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions
from mixce_kernels.parallel import agreement
from mixce_kernels.parallel.agreement import Signature
from mixce_kernels.parallel.collectives import all_gather, copy_to
from mixce_kernels.parallel.reference import sharded_token_logprobs, sharded_token_losses
from mixce_kernels.parallel.shard import Shard
from mixce_kernels.reduction import NO_REDUCTION, Reduction
from mixce_kernels.stats import MixCEStats


class ShardVocabulary(Vocabulary):
    """The vocabulary of a group's ranks, served by another backend's kernels on the columns of this one."""

    def __init__(self, backend: Backend, shard: Shard) -> None:
        super().__init__(ShardBackend(backend, shard))
        self.shard = shard

    def token_losses(
        self, logits: Tensor, targets: Tensor, mixture: Mixture, options: TokenOptions
    ) -> tuple[Tensor, MixCEStats]:
        return sharded_token_losses(self.shard, logits, targets, mixture.eta_of_tokens(), mixture.function(), options)

    def token_logprobs(
        self, logits: Tensor, targets: Tensor, temperature: Tensor | None, options: TokenOptions
    ) -> tuple[Tensor, Tensor]:
        return sharded_token_logprobs(self.shard, logits, targets, temperature, options)

    def sizes(self, facts: CallFacts, weight: Tensor, *, again: bool = False) -> tuple[int, int]:
        """The size of the vocabulary, and of the widest shard: nominally, if the size is known without asking.

        Raises:
            ValueError: on every rank, where the ranks' calls do not fit together.
        """
        # Whether the calls fit together is known by the time of a backward.
        shard = self.shard._replace(check_group=False) if again else self.shard
        signature = shard.signature(weight.shape[0], facts)
        if shard.vocab_size is None:
            layout = shard.layout(signature, weight)
            return layout.vocab_size, max(layout.most_columns, 1)
        if shard.check_group:
            agreement.meet(signature, shard.group, weight)
        return shard.vocab_size, -(-shard.vocab_size // shard.group.size())

    def shared(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        return copy_to(self.shard.group, hidden.to(dtype))

    def add_up(self, grad_hidden: Tensor) -> None:
        dist.all_reduce(grad_hidden, group=self.shard.group)


backends.register_part("shard", lambda backend, fields: ShardVocabulary(backend, Shard.of(fields)))


def address_of(backend: str, shard: Shard) -> str:
    """What operators call a backend on a shard."""
    return f"{backend}@shard:{shard.fields()}"


class ShardBackend:
    """A `Backend` for logits [..., columns of the shard], every rank of the group calling it with the same targets."""

    def __init__(self, backend: Backend, shard: Shard) -> None:
        self.backend = backend
        self.shard = shard

    @property
    def checks_targets(self) -> bool:
        return self.backend.checks_targets

    @property
    def shards(self) -> ShardKernels:
        return self.backend.shards

    def unavailable(self, logits: Tensor) -> str | None:
        return self.backend.unavailable(logits)

    def forward(
        self,
        logits: Tensor,  # [..., columns]
        targets: Tensor,  # [...], of the whole vocabulary
        mixture: Mixture,
        options: TokenOptions,
        reduction: Reduction,
        results: Results,
        token_scale: Tensor | None,  # [] or [...]
        grad_logits: Tensor | None,  # [..., columns]
        temperature: Tensor | None = None,  # [...]
        *,
        may_split: bool = True,
    ) -> None:
        """Loss, state and statistics of the whole rows, and the shard's gradient where `grad_logits` is given.

        Raises:
            ValueError: on every rank, where their calls do not fit together; from `cpu` at any call, else at the first.
            IndexError: on every rank, from `cpu`: no rank holds a target.
        """
        shard, group = self.shard, self.shard.group
        results, with_stats = results.with_losses(targets), results.stats is not None
        facts = CallFacts(targets.numel(), logits.dtype, mixture, options, with_stats, temperature=temperature)
        signature = shard.signature(logits.shape[-1], facts)
        if shard.check_group:
            agreement.meet(signature, group, logits)
        messages = all_gather(
            self._message(logits, targets, options, signature, results, temperature, may_split), group
        )
        if shard.check_group and self.checks_targets:
            _check_headers(_headers(messages), signature, group)
        not_held = self.shards.merge_messages(messages, targets, mixture, options, results, temperature)
        if not_held is not None:
            _raise_not_held(not_held, messages, targets, options.ignore_index)
        if not reduction.is_identity:
            self.reduce(targets, options.ignore_index, reduction, results.losses, results.loss, results.token_scale)
        if grad_logits is not None:
            assert results.state is not None
            self.logits_grad(logits, targets, results.state, None, token_scale, options, grad_logits, temperature)

    def reduce(
        self,
        targets: Tensor,  # [...]
        ignore_index: int,
        reduction: Reduction,
        losses: Tensor | None,  # [...]
        loss: Tensor | None,  # [] or [...]
        token_scale: Tensor | None,  # [] or [...]
    ) -> None:
        self.backend.reduce(targets, ignore_index, reduction, losses, loss, token_scale)

    def logits_grad(
        self,
        logits: Tensor,  # [..., columns]
        targets: Tensor,  # [...], of the whole vocabulary
        state: Tensor,  # [STATE_WIDTH, ...], of the whole rows
        grad_loss: Tensor | None,  # [] or [...], the same on every rank
        token_scale: Tensor | None,  # [] or [...]
        options: TokenOptions,
        grad_logits: Tensor,  # [..., columns]
        temperature: Tensor | None = None,  # [...]
        entropy: EntropyGrad | None = None,  # of the whole rows
    ) -> None:
        """The shard's gradient, 0 in padding; communicates nothing."""
        columns = self.shard.columns(logits.shape[-1])
        real = narrowed(logits, columns.number)
        grad = real if grad_logits is logits else narrowed(grad_logits, columns.number)
        if columns.number > 0:
            # No column's: the target has its own gradient on the rank that holds it.
            local = self.shards.localize_targets(targets, columns, options.ignore_index, elsewhere=-1)
            local_options = options._replace(ignore_index=IGNORED)
            self.backend.logits_grad(
                real, local, state, grad_loss, token_scale, local_options, grad, temperature, entropy
            )
        if columns.number < logits.shape[-1]:
            grad_logits[..., columns.number :] = 0.0

    def scale_rows_(self, grad_logits: Tensor, grad_loss: Tensor, targets: Tensor | None, ignore_index: int) -> None:
        columns = self.shard.columns(grad_logits.shape[-1])
        if columns.number > 0:
            self.backend.scale_rows_(narrowed(grad_logits, columns.number), grad_loss, targets, ignore_index)

    def _message(
        self,
        logits: Tensor,
        targets: Tensor,
        options: TokenOptions,
        signature: Signature,
        results: Results,
        temperature: Tensor | None,
        may_split: bool,
    ) -> Tensor:
        """What this rank tells the others: the header, and its numbers of each token one after another."""
        columns, with_stats = signature.columns, results.stats is not None
        numbers = numbers_per_token(options, with_stats)
        message = results.loss.new_empty(HEADER + numbers * targets.numel())
        rows = None
        if columns.number > 0:
            rows = self._rows(logits, targets, options, columns, with_stats, temperature, may_split)
        self.shards.write_message(message, signature.digest(), columns, targets, rows, options, with_stats)
        return message

    def _rows(
        self,
        logits: Tensor,
        targets: Tensor,
        options: TokenOptions,
        columns: Columns,
        with_stats: bool,
        temperature: Tensor | None,
        may_split: bool,
    ) -> ShardRows:
        """What the row kernels find in this rank's columns."""
        logits = narrowed(logits, columns.number)
        # The kernels of a forward want a target: any column will do where it is elsewhere.
        local = self.shards.localize_targets(targets, columns, options.ignore_index, elsewhere=0)
        smooth = options.label_smoothing > 0
        # With eta = 1 the loss is the cross-entropy: nll, or with a smoothing of 1 what the mean is made from.
        alone = TokenOptions(IGNORED, float(smooth), 0.0, options.softcap, options.logit_scale)
        results = empty_results(logits, targets, NO_REDUCTION, with_state=True, with_stats=smooth or with_stats)
        self.backend.forward(
            logits, local, Mixture(), alone, NO_REDUCTION, results, None, None, temperature, may_split=may_split
        )
        if not with_stats or options.softcap is None:
            return ShardRows(results, None)
        # A softcap may make different logits equal: the largest before it is that of a forward without one.
        uncapped = empty_results(logits, targets, NO_REDUCTION, with_state=True, with_stats=False)
        uncapped_options = TokenOptions(IGNORED)
        self.backend.forward(logits, local, Mixture(), uncapped_options, NO_REDUCTION, uncapped, None, None)
        return ShardRows(results, uncapped.state)


def narrowed(logits: Tensor, n_columns: int) -> Tensor:
    """The logits without their padding, where they lie."""
    return logits if n_columns == logits.shape[-1] else logits[..., :n_columns]


def _headers(messages: Tensor) -> Tensor:
    """The integers [k, HEADER] at the beginning of messages."""
    return messages[:, :HEADER].view(integers(messages.dtype))


def _check_headers(headers: Tensor, signature: Signature, group: dist.ProcessGroup) -> None:
    """Raises ValueError, on every rank, where the headers [k, 3] are not of one call on one vocabulary."""
    digests, starts, numbers = headers.t().tolist()
    if len(set(digests)) > 1:
        # All ranks know it, and meet once more to tell what differs.
        agreement.layout(signature, group, headers, check=True)
    agreement.check_partition(list(map(Columns, starts, numbers)), signature.vocab_size)


def _raise_not_held(row: int, messages: Tensor, targets: Tensor, ignore_index: int) -> None:
    """Raises for a token whose target no rank holds, or several."""
    z_target = messages[:, HEADER:].unflatten(1, (-1, targets.numel()))[:, 2, row]
    if (z_target == torch.inf).all():
        raise_bad_target(row, targets, ignore_index, int(_headers(messages)[:, 2].sum()))
    raise ValueError(
        f"expected every rank to have the same targets and columns of its own, got several that hold row {row}'s target"
    )
