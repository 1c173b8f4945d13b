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


class Signature(NamedTuple):
    """A call, as numbers: the columns, which are the rank's own, and all that must be the same on every rank."""

    columns: Columns
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
    max_chunk_bytes: int = 0

    def digest(self) -> int:
        """31 bits of what must be the same."""
        return zlib.crc32(repr(self._numbers()[2:]).encode()) & 0x7FFFFFFF

    def _numbers(self) -> list[float]:
        return [float(number) for number in (*self.columns, *self[1:])]

    def exchanged(self, group: dist.ProcessGroup, device: torch.device) -> list[Signature]:
        """Those of all ranks, by one small collective, which a GPU's host waits for."""
        own = torch.tensor(self._numbers(), dtype=torch.float64, device=device)
        return [
            Signature(Columns(int(start), int(number)), *rest)  # type: ignore[arg-type]
            for start, number, *rest in all_gather(own, group).tolist()
        ]


class Layout(NamedTuple):
    """What is known once all ranks have told what they hold."""

    vocab_size: int
    most_columns: int  # of a rank


class _Agreement:
    """What a group has agreed on so far."""

    def __init__(self) -> None:
        self.has_met = False
        self.layouts: dict[tuple[Columns, int], Layout] = {}


_agreements: weakref.WeakKeyDictionary[dist.ProcessGroup, _Agreement] = weakref.WeakKeyDictionary()


def meet(signature: Signature, group: dist.ProcessGroup, device: torch.device) -> None:
    """Compares the call with those of the other ranks, at the first call in this group.

    Raises:
        ValueError: on every rank, where the ranks' columns or calls do not fit together.
    """
    if not _agreements.setdefault(group, _Agreement()).has_met:
        compare(signature, group, device)


def compare(signature: Signature, group: dist.ProcessGroup, device: torch.device) -> Layout:
    """Compares the call with those of the other ranks, who must do so at the same time; returns the layout.

    Raises:
        ValueError: on every rank, where the ranks' columns or calls do not fit together.
    """
    signatures = signature.exchanged(group, device)
    names = Signature._fields[1:]
    for rank, other in enumerate(signatures):
        for name, expected, got in zip(names, signatures[0][1:], other[1:], strict=True):
            # NaN is equal to NaN here.
            if repr(expected) != repr(got):
                raise ValueError(
                    f"expected the same {name} on every rank of the group, got {_shown(name, expected)} on rank 0 and "
                    f"{_shown(name, got)} on rank {rank}"
                )
    vocab_size = signature.vocab_size if signature.vocab_size >= 0 else None
    ranges = [other.columns for other in signatures]
    check_partition(ranges, vocab_size)
    agreement = _agreements.setdefault(group, _Agreement())
    agreement.has_met = True
    layout = _layout_of(ranges, vocab_size)
    agreement.layouts[signature.columns, signature.vocab_size] = layout
    return layout


def layout(signature: Signature, group: dist.ProcessGroup, device: torch.device, check: bool) -> Layout:
    """What all ranks hold together; told once for each range of columns.

    Raises:
        ValueError: on every rank, with `check`, where the ranks' columns or calls do not fit together.
    """
    agreement = _agreements.setdefault(group, _Agreement())
    known = agreement.layouts.get((signature.columns, signature.vocab_size))
    if known is not None:
        return known
    if check:
        return compare(signature, group, device)
    ranges = [other.columns for other in signature.exchanged(group, device)]
    known = _layout_of(ranges, signature.vocab_size if signature.vocab_size >= 0 else None)
    agreement.layouts[signature.columns, signature.vocab_size] = known
    return known


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


def _layout_of(ranges: list[Columns], vocab_size: int | None) -> Layout:
    numbers = [columns.number for columns in ranges]
    return Layout(sum(numbers) if vocab_size is None else vocab_size, max(numbers))


def _shown(name: str, value: float) -> str:
    if name == "reduction":
        return REDUCTIONS[int(value)]
    if name == "dtype":
        return str(LOGITS_DTYPES[int(value)])
    if name in ("return_stats", "token_weights"):
        return str(bool(value)) if name == "return_stats" else "some" if value else "none"
    if (name == "softcap" and value == 0) or (name == "vocab_size" and value < 0):
        return "None"
    if name == "eta" and value != value:
        return "a tensor"
    return f"{value:g}" if value != int(value) else str(int(value))
