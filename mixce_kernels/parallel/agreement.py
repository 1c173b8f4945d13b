"""What the ranks of a group must agree on before they meet in a collective, and the sentence where they do not."""

from __future__ import annotations

import math
import weakref
import zlib
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mixce_kernels.options import LOGITS_DTYPES, REDUCTIONS
from mixce_kernels.parallel.collectives import all_gather


class Columns(NamedTuple):
    """The range of the vocabulary that a rank holds."""

    start: int
    number: int


class Layout(NamedTuple):
    """What is known once all ranks have told what they hold."""

    vocab_size: int
    most_columns: int  # of a rank, with its padding


class Signature(NamedTuple):
    """A call, as numbers: first the rank's own, then all that must be the same on every rank."""

    columns: Columns
    width: int  # the columns with their padding
    contents: float  # see `contents_of`; NaN: nothing that could be compared
    tokens: int
    vocab_size: int  # -1: as many as the ranks hold together
    dtype: int  # in LOGITS_DTYPES
    eta: float  # NaN where it is a tensor
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float  # 0: none
    logit_scale: float
    return_stats: bool
    reduction: int = 0  # in REDUCTIONS
    token_weights: bool = False
    hidden_size: int = 0  # 0: the call has logits
    hidden_grad: bool = False  # whether the ranks meet in backward, too
    max_chunk_bytes: int = 0  # 0: none
    reference: bool = False  # the backend of that name, which meets the others otherwise
    validate: bool = False

    @property
    def known_vocab_size(self) -> int | None:
        """The size of the vocabulary where the caller named it."""
        return int(self.vocab_size) if self.vocab_size >= 0 else None

    def digest(self) -> int:
        """31 bits of what must be the same."""
        return zlib.crc32(repr(list(map(float, self[3:]))).encode()) & 0x7FFFFFFF

    def exchanged(self, group: dist.ProcessGroup, device: torch.device) -> list[Signature]:
        """Those of all ranks, by one small collective, which a GPU's host waits for."""
        own = torch.tensor(self._numbers(), dtype=torch.float64, device=device)
        return [
            Signature(Columns(int(start), int(number)), int(width), *rest)
            for start, number, width, *rest in all_gather(own, group).tolist()
        ]

    def _numbers(self) -> list[float]:
        return [float(number) for number in (*self.columns, *self[1:])]


# The groups whose ranks have made the same call once.
_met: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


def meet(signature: Signature, group: dist.ProcessGroup, values: Tensor) -> None:
    """At the first call in this group, compares it with those of the other ranks; see `layout`.

    Not at the first call of its kind: ranks might differ in whether it is.

    Raises:
        ValueError: on every rank, where the ranks' columns or calls do not fit together.
    """
    if group not in _met:
        layout(signature, group, values, check=True)


def layout(signature: Signature, group: dist.ProcessGroup, values: Tensor, *, check: bool) -> Layout:
    """What the ranks hold, which they all tell each other now.

    `values` are the rank's logits [..., columns] or rows of the weight [columns, D]; at the first call in a group the
    ranks compare some of them, too.

    Raises:
        ValueError: on every rank, with `check`, where the ranks' columns or calls do not fit together.
    """
    if check and group not in _met and group.size() > 1:
        signature = signature._replace(contents=contents_of(values))
    signatures = signature.exchanged(group, values.device)
    known_size = signature.known_vocab_size
    if check:
        _check_same(signatures)
        check_partition([other.columns for other in signatures], known_size)
        _check_not_gathered(signatures)
        _met.add(group)
    vocab_size = sum(other.columns.number for other in signatures) if known_size is None else known_size
    return Layout(vocab_size, max(other.width for other in signatures))


def contents_of(values: Tensor) -> float:
    """A number that tells one rank's values [..., n] from another's, by their first rows.

    NaN where all of these are alike, as those of a head that starts at zero, or none is finite.
    """
    values = values.detach()
    while values.dim() > 2:
        values = values[0] if len(values) else values.flatten(0, 1)
    some = values[:16].double().flatten()
    some = some[some.isfinite()]
    if len(some) == 0 or (some == some[0]).all():
        return math.nan
    return float((some * torch.arange(1, len(some) + 1, device=some.device)).sum())


def _check_same(signatures: list[Signature]) -> None:
    """Raises ValueError where a rank's call is another than that of rank 0."""
    names = Signature._fields[3:]
    for rank, other in enumerate(signatures):
        for name, expected, got in zip(names, signatures[0][3:], other[3:], strict=True):
            # NaN is equal to NaN here.
            if repr(expected) != repr(got):
                raise ValueError(
                    f"expected the same {_NAMES.get(name, name)} on every rank of the group, got "
                    f"{_shown(name, expected)} on rank 0 and {_shown(name, got)} on rank {rank}"
                )


def _check_not_gathered(signatures: list[Signature]) -> None:
    """Raises ValueError where every rank has the whole vocabulary, and says that it has columns of its own.

    Where nobody says how large the vocabulary is, all that shows it is that the ranks have the same values.
    """
    own, n_ranks = signatures[0], len(signatures)
    if n_ranks == 1 or any((other.width, other.contents) != (own.width, own.contents) for other in signatures):
        return
    vocab_size = own.known_vocab_size
    what, whole = ("weight", "fused_linear_mixce_loss without a group")
    if own.hidden_size == 0:
        what, whole = "logits", "fused_mixce_loss"
    if vocab_size is None:
        raise ValueError(
            f"expected each rank's own columns, got the same {what} on all {n_ranks} ranks (gathered ones are for "
            f"{whole}; vocab_size={n_ranks * own.width} says that these are {n_ranks} parts of a vocabulary)"
        )
    if own.width >= vocab_size:
        raise ValueError(
            f"expected each rank's own columns of vocab_size={vocab_size}, got the same {what} of {own.width} columns "
            f"on all {n_ranks} ranks (gathered ones are for {whole})"
        )


def check_partition(ranges: list[Columns], vocab_size: int | None) -> None:
    """Raises ValueError unless the ranks' columns are the vocabulary's, each held once."""
    end = 0
    for columns in sorted(columns for columns in ranges if columns.number > 0):
        if columns.start != end:
            break
        end += columns.number
    else:
        if end > 0 and end == (end if vocab_size is None else vocab_size):
            return
    held = ", ".join(f"[{start}, {start + number}) on rank {rank}" for rank, (start, number) in enumerate(ranges))
    whole = "the vocabulary" if vocab_size is None else f"the vocabulary [0, {vocab_size})"
    raise ValueError(f"expected shards that hold each column of {whole} once, got columns {held}")


_NAMES = {
    "tokens": "number of tokens",
    "return_stats": "answer to return_stats",
    "hidden_size": "hidden size",
    "hidden_grad": "answer to whether the hidden states require a gradient",
    "reference": "answer to backend='reference'",
    "validate": "answer to validate",
}


def _shown(name: str, value: float) -> str:
    if name == "reduction":
        return REDUCTIONS[int(value)]
    if name == "dtype":
        return str(LOGITS_DTYPES[int(value)])
    if name in ("return_stats", "hidden_grad", "reference", "validate"):
        return str(bool(value))
    if name == "token_weights":
        return "some" if value else "none"
    if (name in ("softcap", "max_chunk_bytes") and value == 0) or (name == "vocab_size" and value < 0):
        return "None"
    if name == "eta" and value != value:
        return "a tensor"
    return f"{value:g}" if value != int(value) else str(int(value))
