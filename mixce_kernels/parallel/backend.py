"""A shard of the vocabulary: another backend's kernels on the columns of a rank, and one collective a forward.

    a rank's columns -> m, s, z_y - m of each token      the other backend's forward
    all ranks'       -> one all-gather of these
                     -> m, s of the whole row, loss, a, c, t      `token_terms`, the same on every rank
    a rank's columns -> their gradient                   the other backend's logits_grad

A rank sends 3 numbers a token, one more with label smoothing, and one with statistics (two with a softcap); and 3
integers a call, which tell the ranks that they are making the same call.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from mixce_kernels import backends
from mixce_kernels.backends.base import Backend
from mixce_kernels.backends.results import Results
from mixce_kernels.backends.vocabulary import CallFacts, Vocabulary
from mixce_kernels.checks import raise_bad_target
from mixce_kernels.options import TokenOptions
from mixce_kernels.parallel import agreement
from mixce_kernels.parallel.agreement import Columns, Signature
from mixce_kernels.parallel.collectives import all_gather, copy_to
from mixce_kernels.parallel.merge import MergedStats, local_targets, merged, narrowed, numbers_per_token, write_part
from mixce_kernels.parallel.reference import sharded_token_losses
from mixce_kernels.parallel.shard import Shard
from mixce_kernels.reduction import Reduction
from mixce_kernels.stats import MixCEStats
from mixce_kernels.token_terms import TokenTerms, token_terms

_HEADER = 3  # digest of the call, first column, number of columns


class ShardVocabulary(Vocabulary):
    """The vocabulary of a group's ranks, served by another backend's kernels on the columns of this one."""

    def __init__(self, backend: Backend, shard: Shard) -> None:
        super().__init__(ShardBackend(backend, shard))
        self.shard = shard

    def token_losses(
        self, logits: Tensor, targets: Tensor, eta: float | Tensor, options: TokenOptions
    ) -> tuple[Tensor, MixCEStats]:
        return sharded_token_losses(self.shard, logits, targets, eta, options)

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

    def unavailable(self, logits: Tensor) -> str | None:
        return self.backend.unavailable(logits)

    def forward(
        self,
        logits: Tensor,  # [..., columns]
        targets: Tensor,  # [...], of the whole vocabulary
        eta: Tensor | None,  # [...]
        eta_value: float,
        options: TokenOptions,
        reduction: Reduction,
        results: Results,
        token_scale: Tensor | None,  # [] or [...]
        grad_logits: Tensor | None,  # [..., columns]
    ) -> None:
        """Loss, state and statistics of the whole rows, and the shard's gradient where `grad_logits` is given.

        Raises:
            ValueError: on every rank, where their calls do not fit together; from `cpu` at any call, else at the first.
            IndexError: on every rank, from `cpu`: no rank holds a target.
        """
        shard, group = self.shard, self.shard.group
        results, with_stats = results.with_losses(targets), results.stats is not None
        losses = results.losses
        assert losses is not None
        mixing = eta_value if eta is None else eta
        facts = CallFacts(targets.numel(), logits.dtype, mixing, options, with_stats)
        signature = shard.signature(logits.shape[-1], facts)
        if shard.check_group:
            agreement.meet(signature, group, logits)
        # Each rank's message: the header, and its numbers of each token one after another.
        shape = (numbers_per_token(options, with_stats), *targets.shape)
        message = losses.new_empty(_HEADER + math.prod(shape))
        header = message[:_HEADER].view(_integers(message.dtype))
        for i, value in enumerate((signature.digest(), *signature.columns)):
            header[i].fill_(value)
        part = message[_HEADER:].view(shape)
        ignored = targets == options.ignore_index
        write_part(part, self.backend, logits, targets, ignored, options, signature.columns, with_stats)
        messages = all_gather(message, group)
        headers = messages[:, :_HEADER].view(_integers(message.dtype))
        parts = messages[:, _HEADER:].unflatten(1, shape)
        if shard.check_group and self.checks_targets:
            _check_headers(headers, signature, group)

        whole = merged(parts, headers[:, 1:], options, with_stats)
        not_held = whole.holders != 1
        if self.checks_targets and (not_held & ~ignored).any():
            _raise_not_held(whole.holders, targets, ignored, options.ignore_index, int(headers[:, 2].sum()))
        whole = whole._replace(s=whole.s.masked_fill_(not_held, torch.nan))
        vocab_size = headers[:, 2].sum() if options.label_smoothing > 0 else 0
        terms = token_terms(
            whole.scaled_m, whole.s, whole.d_target, whole.mean_shifted, eta_value if eta is None else eta.double(),
            vocab_size, options,
        )  # fmt: skip
        _write(results, terms, whole, ignored)
        if not reduction.is_identity:
            self.reduce(targets, options.ignore_index, reduction, losses, results.loss, results.token_scale)
        if grad_logits is not None:
            assert results.state is not None
            self.logits_grad(logits, targets, results.state, None, token_scale, options, grad_logits)

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
    ) -> None:
        """The shard's gradient, 0 in padding; communicates nothing."""
        columns = self.shard.columns(logits.shape[-1])
        real = narrowed(logits, columns.number)
        grad = real if grad_logits is logits else narrowed(grad_logits, columns.number)
        if columns.number > 0:
            local = local_targets(targets, columns)
            local_options = options._replace(ignore_index=_int64(options.ignore_index - columns.start))
            self.backend.logits_grad(real, local, state, grad_loss, token_scale, local_options, grad)
        if columns.number < logits.shape[-1]:
            grad_logits[..., columns.number :] = 0.0

    def scale_rows_(self, grad_logits: Tensor, grad_loss: Tensor, targets: Tensor | None, ignore_index: int) -> None:
        columns = self.shard.columns(grad_logits.shape[-1])
        if columns.number > 0:
            self.backend.scale_rows_(narrowed(grad_logits, columns.number), grad_loss, targets, ignore_index)


def _write(results: Results, terms: TokenTerms, rows: MergedStats, ignored: Tensor) -> None:
    """The results of the tokens, 0 where ignored."""
    _, _, state, stats, correct, losses = results
    assert losses is not None
    numbers = torch.stack((terms.loss, rows.m, rows.s, terms.a, terms.c, terms.t))
    numbers.masked_fill_(ignored, 0.0)
    losses.copy_(numbers[0])
    if state is not None:
        state.copy_(numbers[1:])
    if stats is not None and correct is not None and rows.entropy is not None and rows.correct is not None:
        numbers = torch.stack((terms.nll, terms.q, terms.weight, terms.lse, rows.entropy))
        stats.copy_(numbers.masked_fill_(ignored, 0.0))
        correct.copy_(rows.correct & ~ignored & ~terms.nll.isnan())


def _int64(number: int) -> int:
    """What an int64 tensor makes of a number beyond its range."""
    return (number + 2**63) % 2**64 - 2**63


def _integers(dtype: torch.dtype) -> torch.dtype:
    """The integers of the same size."""
    return torch.int64 if dtype == torch.float64 else torch.int32


def _check_headers(headers: Tensor, signature: Signature, group: dist.ProcessGroup) -> None:
    """Raises ValueError, on every rank, where the headers [k, 3] are not of one call on one vocabulary."""
    digests, starts, numbers = headers.t().tolist()
    if len(set(digests)) > 1:
        # All ranks know it, and meet once more to tell what differs.
        agreement.layout(signature, group, headers, check=True)
    agreement.check_partition(list(map(Columns, starts, numbers)), signature.vocab_size)


def _raise_not_held(holders: Tensor, targets: Tensor, ignored: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Raises for the first token that is not held by one rank."""
    row = int(((holders != 1) & ~ignored).flatten().nonzero()[0])
    if holders.flatten()[row] == 0:
        raise_bad_target(row, targets, ignore_index, vocab_size)
    raise ValueError(
        f"expected every rank to have the same targets and columns of its own, got several that hold row {row}'s target"
    )
