"""What the ranks of a group must agree on before they meet in a collective, and the sentence where they do not."""

from __future__ import annotations

import math
import weakref
import zlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mixce_kernels.backends.shards import Columns
from mixce_kernels.options import LOGITS_DTYPES, REDUCTIONS
from mixce_kernels.parallel.collectives import all_gather
from mixce_kernels.weightings import KINDS


class Layout(NamedTuple):
    """What is known once all ranks have told what they hold."""

    vocab_size: int
    most_columns: int  # of a rank, with its padding


class Signature(NamedTuple):
    """A rank's call, for comparison with those of the other ranks."""

    columns: Columns
    width: int  # the columns with their padding
    same: dict[str, Any]  # what must be the same on every rank, by name
    contents: float = math.nan  # see `contents_of`; NaN: nothing that could be compared

    @property
    def vocab_size(self) -> int | None:
        """The size of the vocabulary where the caller named it."""
        return self.same["vocab_size"]

    def digest(self) -> int:
        """31 bits of what must be the same."""
        return zlib.crc32(repr([_number(value) for value in self.same.values()]).encode()) & 0x7FFFFFFF

    def exchanged(self, group: dist.ProcessGroup, device: torch.device) -> list[_Told]:
        """Those of all ranks in numbers, by one small collective, which a GPU's host waits for."""
        numbers = (*self.columns, self.width, self.contents, *map(_number, self.same.values()))
        own = torch.tensor(numbers, dtype=torch.float64, device=device)
        return [
            _Told(Columns(int(start), int(number)), int(width), contents, same)
            for start, number, width, contents, *same in all_gather(own, group).tolist()
        ]


class _Told(NamedTuple):
    """A signature as another rank tells it."""

    columns: Columns
    width: int
    contents: float
    same: list[float]


# None in numbers: no option is as small.
_NONE = -math.inf


def _number(value: Any) -> float:
    """A fact of a call as a number; NaN for a tensor, whose values are not compared."""
    if value is None:
        return _NONE
    if isinstance(value, Tensor):
        return math.nan
    if isinstance(value, torch.dtype):
        return float(LOGITS_DTYPES.index(value))
    return float(REDUCTIONS.index(value) if isinstance(value, str) else value)


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
    ranks = signature.exchanged(group, values.device)
    if check:
        _check_same(signature, ranks)
        check_partition([rank.columns for rank in ranks], signature.vocab_size)
        _check_not_gathered(signature, ranks)
        _met.add(group)
    vocab_size = signature.vocab_size
    if vocab_size is None:
        vocab_size = sum(rank.columns.number for rank in ranks)
    return Layout(vocab_size, max(rank.width for rank in ranks))


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


def _check_same(signature: Signature, ranks: list[_Told]) -> None:
    """Raises ValueError where a rank's call is another than that of rank 0."""
    for rank, other in enumerate(ranks):
        for (name, own), expected, got in zip(signature.same.items(), ranks[0].same, other.same, strict=True):
            # NaN is equal to NaN here.
            if repr(expected) != repr(got):
                raise ValueError(
                    f"expected the same {_NAMES.get(name, name)} on every rank of the group, got "
                    f"{_shown(name, own, expected)} on rank 0 and {_shown(name, own, got)} on rank {rank}"
                )


def _check_not_gathered(signature: Signature, ranks: list[_Told]) -> None:
    """Raises ValueError where every rank has the whole vocabulary, and says that it has columns of its own.

    Where nobody says how large the vocabulary is, all that shows it is that the ranks have the same values.
    """
    own, n_ranks, vocab_size = ranks[0], len(ranks), signature.vocab_size
    if n_ranks == 1 or any((rank.width, rank.contents) != (own.width, own.contents) for rank in ranks):
        return
    what, whole = ("weight", "fused_linear_mixce_loss without a group")
    if signature.same["hidden_size"] == 0:
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
    "return_stats": "answer to return_stats or return_entropy",
    "logit_scale": "logit_scale (of a temperature that is a number, divided by it)",
    "first": "first parameter of the weighting",
    "second": "second parameter of the weighting",
    "hidden_size": "hidden size",
    "hidden_grad": "answer to whether the hidden states require a gradient",
    "reference": "answer to backend='reference'",
    "validate": "answer to validate",
}


def _shown(name: str, own: Any, number: float) -> str:
    """What a rank's number says, of a fact that is `own` here."""
    if number == _NONE:
        return "None"
    if name == "weighting":
        return KINDS[int(number)].__name__
    if name == "token_weights":
        return "some" if number else "none"
    if isinstance(own, bool):
        return str(bool(number))
    if isinstance(own, torch.dtype):
        return str(LOGITS_DTYPES[int(number)])
    if isinstance(own, str):
        return REDUCTIONS[int(number)]
    if math.isnan(number):
        return "a tensor"
    return f"{number:g}" if number != int(number) else str(int(number))
