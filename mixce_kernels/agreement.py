"""What the ranks of a group must agree on before they meet in a collective, and the sentence where they do not."""

from __future__ import annotations

import weakref
import zlib
from typing import NamedTuple

import torch
import torch.distributed as dist

from mixce_kernels.collectives import all_gather
from mixce_kernels.options import LOGITS_DTYPES, REDUCTIONS


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
    max_chunk_bytes: int = 0  # 0: none
    reference: bool = False  # the backend of that name, which meets the others otherwise
    validate: bool = False

    @property
    def known_vocab_size(self) -> int | None:
        """The size of the vocabulary where the caller named it."""
        return int(self.vocab_size) if self.vocab_size >= 0 else None

    def digest(self) -> int:
        """31 bits of what must be the same."""
        return zlib.crc32(repr(self._numbers()[3:]).encode()) & 0x7FFFFFFF

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


def meet(signature: Signature, group: dist.ProcessGroup, device: torch.device) -> None:
    """At the first call in this group, compares it with those of the other ranks.

    Not at the first call of its kind: ranks might differ in whether it is.

    Raises:
        ValueError: on every rank, where the ranks' columns or calls do not fit together.
    """
    if group not in _met:
        layout(signature, group, device, check=True)


def layout(signature: Signature, group: dist.ProcessGroup, device: torch.device, *, check: bool) -> Layout:
    """What the ranks hold, which they all tell each other now.

    Raises:
        ValueError: on every rank, with `check`, where the ranks' columns or calls do not fit together.
    """
    signatures = signature.exchanged(group, device)
    known_size = signature.known_vocab_size
    if check:
        _check_same(signatures)
        check_partition([other.columns for other in signatures], known_size)
        _met.add(group)
    vocab_size = sum(other.columns.number for other in signatures) if known_size is None else known_size
    return Layout(vocab_size, max(other.width for other in signatures))


def _check_same(signatures: list[Signature]) -> None:
    """Raises ValueError where a rank's call is another than that of rank 0."""
    names = Signature._fields[2:]
    for rank, other in enumerate(signatures):
        for name, expected, got in zip(names, signatures[0][2:], other[2:], strict=True):
            # NaN is equal to NaN here.
            if repr(expected) != repr(got):
                raise ValueError(
                    f"expected the same {_NAMES.get(name, name)} on every rank of the group, got "
                    f"{_shown(name, expected)} on rank 0 and {_shown(name, got)} on rank {rank}"
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
    "reference": "answer to backend='reference'",
    "validate": "answer to validate",
}


def _shown(name: str, value: float) -> str:
    if name == "reduction":
        return REDUCTIONS[int(value)]
    if name == "dtype":
        return str(LOGITS_DTYPES[int(value)])
    if name in ("return_stats", "reference", "validate"):
        return str(bool(value))
    if name == "token_weights":
        return "some" if value else "none"
    if (name in ("softcap", "max_chunk_bytes") and value == 0) or (name == "vocab_size" and value < 0):
        return "None"
    if name == "eta" and value != value:
        return "a tensor"
    return f"{value:g}" if value != int(value) else str(int(value))
