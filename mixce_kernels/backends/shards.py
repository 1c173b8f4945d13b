"""A shard of the vocabulary: another backend's kernels on the columns of a rank, and one collective a forward.

    a rank's columns -> m, s, z_y - m of each token      the other backend's forward
    all ranks'       -> one all-gather of these
                     -> m, s of the whole row, loss, a, c, t      `token_terms`, the same on every rank
    a rank's columns -> their gradient                   the other backend's logits_grad

A rank sends 3 numbers a token, one more with label smoothing, and one with statistics (two with a softcap); and 3
integers a call, which tell the ranks that they are making the same call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mixce_kernels import agreement
from mixce_kernels.agreement import Columns, Signature
from mixce_kernels.backends.results import empty_results
from mixce_kernels.collectives import all_gather, group_of
from mixce_kernels.options import (
    LOGITS_DTYPES,
    REDUCTIONS,
    TokenOptions,
    accumulate_dtype,
    check_values,
    raise_bad_target,
)
from mixce_kernels.token_terms import TokenTerms, token_terms

if TYPE_CHECKING:
    from mixce_kernels.backends import Backend

# What the kernels are told instead of a target: that its row is ignored, or that it is none of the shard's columns.
_IGNORED = -100
_ELSEWHERE = -1
_HEADER = 3  # digest of the call, first column, number of columns


class Shard(NamedTuple):
    """Which columns of the vocabulary a rank of a group holds, and what its call has in common with the others'."""

    group_name: str
    vocab_start: int
    vocab_size: int | None = None  # columns from there on are padding
    check_group: bool = True
    reduction: str = "none"
    token_weights: bool = False

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group."""
        return group_of(self.group_name)

    def columns(self, width: int) -> Columns:
        """Those of `width` logits a row that are not padding."""
        if self.vocab_size is None:
            return Columns(self.vocab_start, width)
        return Columns(self.vocab_start, min(max(self.vocab_size - self.vocab_start, 0), width))

    def address(self, backend: str) -> str:
        """The name by which operators know a backend that works on this shard."""
        vocab_size = -1 if self.vocab_size is None else self.vocab_size
        numbers = (self.vocab_start, vocab_size, int(self.check_group), REDUCTIONS.index(self.reduction))
        fields = ",".join(map(str, (*numbers, int(self.token_weights))))
        return f"{backend}@{fields},{self.group_name}"

    @classmethod
    def of(cls, address: str) -> tuple[str, Shard | None]:
        """The backend and the shard that an address names; None for a whole vocabulary."""
        backend, _, fields = address.partition("@")
        if not fields:
            return backend, None
        *numbers, group_name = fields.split(",", 5)
        start, vocab_size, check, reduction, weights = map(int, numbers)
        known_size = None if vocab_size < 0 else vocab_size
        return backend, cls(group_name, start, known_size, bool(check), REDUCTIONS[reduction], bool(weights))

    def signature(
        self,
        width: int,
        tokens: int,
        dtype: torch.dtype,
        eta: float | Tensor,
        options: TokenOptions,
        with_stats: bool,
        *,
        hidden_size: int = 0,
    ) -> Signature:
        """The call on this shard, for comparison with the other ranks'."""
        return Signature(
            self.columns(width),
            width,
            tokens,
            -1 if self.vocab_size is None else self.vocab_size,
            LOGITS_DTYPES.index(dtype),
            float("nan") if isinstance(eta, Tensor) else eta,
            options.ignore_index,
            options.label_smoothing,
            options.z_loss,
            options.softcap or 0.0,
            options.logit_scale,
            with_stats,
            REDUCTIONS.index(self.reduction),
            self.token_weights,
            hidden_size,
        )

    def whole(self, signature: Signature, device: torch.device) -> tuple[int, int]:
        """The size of the vocabulary, and of the widest shard: nominally, if the size is known without asking.

        Raises:
            ValueError: on every rank, where the ranks' calls do not fit together.
        """
        if self.vocab_size is None:
            layout = agreement.layout(signature, self.group, device, check=self.check_group)
            return layout.vocab_size, max(layout.most_columns, 1)
        if self.check_group:
            agreement.meet(signature, self.group, device)
        return self.vocab_size, -(-self.vocab_size // self.group.size())

    def check_values(
        self, signature: Signature, targets: Tensor, eta: float | Tensor, ignore_index: int, device: torch.device
    ) -> None:
        """Reads targets and eta: see `options.check_values`; the ranks tell each other what they hold."""
        layout = agreement.layout(signature, self.group, device, check=self.check_group)
        check_values(targets, eta, ignore_index, layout.vocab_size)


class ShardBackend:
    """A `Backend` for logits [..., columns of the shard], every rank of the group calling it with the same targets."""

    def __init__(self, name: str, backend: Backend, shard: Shard) -> None:
        self.name = name
        self.backend = backend
        self.shard = shard

    def unavailable(self, logits: Tensor) -> str | None:
        return self.backend.unavailable(logits)

    def forward(
        self,
        logits: Tensor,  # [..., columns]
        targets: Tensor,  # [...], of the whole vocabulary
        eta: Tensor | None,  # [...]
        eta_value: float,
        options: TokenOptions,
        results: tuple[Tensor, ...],
        grad_loss: Tensor | None,  # [...]
        grad_logits: Tensor | None,  # [..., columns]
    ) -> None:
        """Loss, state and statistics of the whole rows, and the shard's gradient where `grad_logits` is given.

        Raises:
            ValueError: on every rank, where their calls do not fit together; from `cpu` at any call, else at the first.
            IndexError: on every rank, from `cpu`: no rank holds a target.
        """
        shard, group = self.shard, self.shard.group
        _, state, stats, _ = results
        with_stats = stats.shape[0] > 0
        mixing = eta_value if eta is None else eta
        signature = shard.signature(logits.shape[-1], targets.numel(), logits.dtype, mixing, options, with_stats)
        if shard.check_group:
            agreement.meet(signature, group, logits.device)
        # Each rank's message: the header, and its numbers of each token one after another.
        numbers = _part_of(self.backend, logits, targets, options, signature.columns, with_stats)
        message = numbers.new_empty(_HEADER + numbers.numel())
        header = message[:_HEADER].view(_integers(message.dtype))
        for i, value in enumerate((signature.digest(), *signature.columns)):
            header[i].fill_(value)
        message[_HEADER:] = numbers.flatten()
        messages = all_gather(message, group)
        headers = messages[:, :_HEADER].view(_integers(message.dtype))
        parts = messages[:, _HEADER:].unflatten(1, numbers.shape)
        if shard.check_group and self.name == "cpu":
            _check_headers(headers, signature, group)

        whole = _merged(parts, headers[:, 1:], options, with_stats)
        vocab_size = headers[:, 2].sum() if shard.vocab_size is None else shard.vocab_size
        valid = targets != options.ignore_index
        if self.name == "cpu" and (valid & (whole.holders != 1)).any():
            _raise_not_held(whole.holders, targets, options.ignore_index, int(vocab_size))
        terms = token_terms(
            whole.scaled_m, torch.where(whole.holders == 1, whole.s, torch.nan), whole.d_target, whole.mean_shifted,
            eta_value if eta is None else eta.double(), vocab_size, options,
        )  # fmt: skip
        _write(results, terms, whole, valid)
        if grad_logits is not None and grad_loss is not None:
            self.logits_grad(logits, targets, state, grad_loss, options, grad_logits)

    def logits_grad(
        self,
        logits: Tensor,  # [..., columns]
        targets: Tensor,  # [...], of the whole vocabulary
        state: Tensor,  # [5, ...], of the whole rows
        grad_loss: Tensor,  # [...], the same on every rank
        options: TokenOptions,
        grad_logits: Tensor,  # [..., columns]
    ) -> None:
        """The shard's gradient, 0 in padding; communicates nothing."""
        columns = self.shard.columns(logits.shape[-1])
        real = _narrowed(logits, columns.number)
        grad = real if grad_logits is logits else _narrowed(grad_logits, columns.number)
        if columns.number > 0:
            held = _local_targets(targets, columns, options.ignore_index)
            self.backend.logits_grad(real, held, state, grad_loss, options._replace(ignore_index=_IGNORED), grad)
        if columns.number < logits.shape[-1]:
            grad_logits[..., columns.number :] = 0.0

    def scale_rows_(self, grad_logits: Tensor, grad_loss: Tensor) -> None:
        columns = self.shard.columns(grad_logits.shape[-1])
        if columns.number > 0:
            self.backend.scale_rows_(_narrowed(grad_logits, columns.number), grad_loss)


class _Rows(NamedTuple):
    """What the ranks' numbers make together, each [...] float64."""

    m: Tensor  # as the kernels have it: of capped logits, or of logits before their scale
    scaled_m: Tensor
    s: Tensor
    d_target: Tensor
    mean_shifted: Tensor | float
    entropy: Tensor | None
    correct: Tensor | None
    holders: Tensor  # the number of ranks that hold the target


def _part_of(
    backend: Backend, logits: Tensor, targets: Tensor, options: TokenOptions, columns: Columns, with_stats: bool
) -> Tensor:
    """A rank's numbers of each token, [3 to 6, ...].

    m, the largest logit; s = log sum exp(z - m); z_y - m, infinite where the rank does not hold the target; with label
    smoothing the mean of z - m; with statistics the entropy, whose sign is minus where the target is not the first of
    the rank's largest logits, and with a softcap, which may make different logits equal, the largest before it.
    """
    dtype = accumulate_dtype(logits.dtype)
    smooth = options.label_smoothing > 0
    raw = with_stats and options.softcap is not None
    part = logits.new_empty((3 + smooth + with_stats + raw, *targets.shape), dtype=dtype)
    if columns.number == 0:
        nothing = (-torch.inf, -torch.inf, torch.inf, *(0.0,) * (smooth + with_stats), *(-torch.inf,) * raw)
        for out, value in zip(part, nothing, strict=True):
            out.fill_(value)
        return part
    held = _local_targets(targets, columns, options.ignore_index)
    here = held != _ELSEWHERE
    # The kernels of a forward want a target: any will do where the row's is elsewhere.
    asked = torch.where(here, held, 0)
    loss, state, stats, correct = results = empty_results(logits, targets, smooth or with_stats)
    # With eta = 1 the loss is the cross-entropy: nll, or with a smoothing of 1 what the mean is made from.
    alone = TokenOptions(_IGNORED, float(smooth), 0.0, options.softcap, options.logit_scale)
    backend.forward(_narrowed(logits, columns.number), asked, None, 1.0, alone, results, None, None)
    m, s = state[0], state[1].double()
    nll = stats[0] if smooth or with_stats else loss
    masked = m == -torch.inf
    part[0], part[1] = m, s
    part[2] = torch.where(here, torch.where(masked, 0.0, s - nll), torch.inf)
    if smooth:
        part[3] = torch.where(masked, 0.0, s - loss)
    if with_stats:
        part[3 + smooth] = torch.copysign(stats[4], torch.where(correct, 1.0, -1.0))
    if raw:
        part[-1] = _narrowed(logits, columns.number).amax(-1)
    return part


def _merged(parts: Tensor, ranges: Tensor, options: TokenOptions, with_stats: bool) -> _Rows:
    """The rows of all ranks' numbers [k, 3 to 6, ...], whose columns start at ranges[:, 0] and number ranges[:, 1]."""
    scale = options.logit_scale if options.softcap is None else 1.0
    starts, counts = (one.double().reshape(-1, *(1,) * (parts.dim() - 2)) for one in ranges.unbind(1))
    m_of, s_of, d_of, *others = parts.double().unbind(1)
    m = m_of.amax(0)
    shift = scale * (m_of - m)  # -inf for a rank without a finite logit
    log_sums = s_of + shift
    s = log_sums.exp().sum(0).log()
    held = d_of != torch.inf
    d_target = torch.where(held, d_of + shift, 0.0).sum(0)
    mean_shifted: Tensor | float = 0.0
    if options.label_smoothing > 0:
        mean_shifted = torch.where(counts == 0, 0.0, counts * (others[0] + shift)).sum(0) / counts.sum()
    entropy = correct = None
    if with_stats:
        log_shares = log_sums - s
        shares = log_shares.exp()
        entropies = others[1 if options.label_smoothing > 0 else 0]
        entropy = torch.where(shares == 0, 0.0, shares * (entropies.abs() - log_shares)).sum(0)
        # A rank's largest logit beats the target's where it is larger, or as large and comes before it.
        largest_of = m_of if options.softcap is None else others[-1]
        largest = torch.where(held, largest_of, -torch.inf).amax(0)
        start = torch.where(held, starts, 0.0).sum(0)
        beaten = (largest_of > largest) | ((largest_of == largest) & (starts < start) & (counts > 0))
        correct = (held & ~entropies.signbit()).any(0) & ~beaten.any(0)
    return _Rows(m, scale * m, s, d_target, mean_shifted, entropy, correct, held.sum(0))


def _write(results: tuple[Tensor, ...], terms: TokenTerms, rows: _Rows, valid: Tensor) -> None:
    """The results of the tokens, 0 where not valid."""
    loss, state, stats, correct = results
    _write_valid(loss.unsqueeze(0), (terms.loss,), valid)
    _write_valid(state, (rows.m, rows.s, terms.a, terms.c, terms.t), valid)
    if rows.entropy is not None and rows.correct is not None:
        _write_valid(stats, (terms.nll, terms.q, terms.weight, terms.lse, rows.entropy), valid)
        correct.copy_(rows.correct & valid & ~terms.nll.isnan())


def _write_valid(out: Tensor, values: tuple[Tensor, ...], valid: Tensor) -> None:
    for one, value in zip(out, values, strict=True):
        one.copy_(torch.where(valid, value, 0.0))


def _local_targets(targets: Tensor, columns: Columns, ignore_index: int) -> Tensor:
    """The targets as columns of the shard, or `_ELSEWHERE`, or `_IGNORED`."""
    local = targets.long() - columns.start
    local = torch.where((local >= 0) & (local < columns.number), local, _ELSEWHERE)
    return torch.where(targets == ignore_index, _IGNORED, local)


def _narrowed(logits: Tensor, n_columns: int) -> Tensor:
    """The logits without their padding, where they lie."""
    return logits if n_columns == logits.shape[-1] else logits[..., :n_columns]


def _integers(dtype: torch.dtype) -> torch.dtype:
    """The integers of the same size."""
    return torch.int64 if dtype == torch.float64 else torch.int32


def _check_headers(headers: Tensor, signature: Signature, group: dist.ProcessGroup) -> None:
    """Raises ValueError, on every rank, where the headers [k, 3] are not of one call on one vocabulary."""
    digests, starts, numbers = headers.t().tolist()
    if len(set(digests)) > 1:
        # All ranks know it, and meet once more to tell what differs.
        agreement.layout(signature, group, headers.device, check=True)
    agreement.check_partition(list(map(Columns, starts, numbers)), signature.known_vocab_size)


def _raise_not_held(holders: Tensor, targets: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Raises for the first token that is not held by one rank."""
    row = int(((targets != ignore_index) & (holders != 1)).flatten().nonzero()[0])
    if holders.flatten()[row] == 0:
        raise_bad_target(row, targets, ignore_index, vocab_size)
    raise ValueError(
        f"expected every rank to have the same targets and columns of its own, got several that hold row {row}'s target"
    )
