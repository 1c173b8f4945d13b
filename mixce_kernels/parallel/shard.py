"""`Shard`: the columns of the vocabulary that a rank of a group holds, in a name that operators can carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from mixce_kernels.backends.shards import Columns
from mixce_kernels.backends.vocabulary import CallFacts
from mixce_kernels.options import LossOptions
from mixce_kernels.parallel import agreement
from mixce_kernels.parallel.agreement import Layout, Signature
from mixce_kernels.parallel.collectives import group_name, group_of
from mixce_kernels.values import check_int64, concrete, describe, is_integer

# What an address has of a vocabulary whose size the caller did not name.
_UNKNOWN = -1


class Sharding(NamedTuple):
    """How a caller describes its shard: see `vocab_parallel_mixce_loss`."""

    group: dist.ProcessGroup | None = None
    vocab_start: int | None = None
    vocab_size: int | None = None
    check_group: bool = True

    def check_unused(self) -> None:
        """Raises ValueError where DTensors come with a description of their own."""
        for name in ("group", "vocab_start", "vocab_size"):
            value = getattr(self, name)
            if value is not None:
                raise ValueError(f"expected {name}=None with DTensors, whose placements say it, got {value!r}")

    def check_group_is_named(self) -> None:
        """Raises ValueError where what describes a shard of the weight comes without its group, or the reverse."""
        if self.group is None:
            for name in ("vocab_start", "vocab_size"):
                value = getattr(self, name)
                if value is not None:
                    raise ValueError(f"expected group with {name}={value!r}, got None (a whole weight has no {name})")
        elif self.vocab_start is None:
            raise ValueError("expected vocab_start, the first of the rank's columns, with group, got None")

    def check_range(self) -> None:
        """Raises TypeError unless the range is of ints, ValueError unless a vocabulary has a column."""
        for name in ("vocab_start", "vocab_size"):
            value = getattr(self, name)
            if value is None and name == "vocab_size":
                continue
            if not is_integer(value):
                raise TypeError(f"expected {name} to be an int, got {describe(value)}")
            check_int64(name, value)
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"expected vocab_size to be positive, got {self.vocab_size}")

    def shard(self, digest_only: DigestOnly) -> Shard:
        """The shard, after a check of its range; raises as `check_range` and `collectives.group_name` do."""
        self.check_range()
        assert self.vocab_start is not None
        return Shard(group_name(self.group), self.vocab_start, self.vocab_size, self.check_group, digest_only)


class DigestOnly(NamedTuple):
    """Facts of a call that no kernel is told: the ranks compare them, and nobody else reads them."""

    reduction: str = "none"
    token_weights: bool = False
    hidden_grad: bool = False  # whether the ranks meet in backward, too

    @classmethod
    def of_loss(cls, options: LossOptions, *, hidden_grad: bool = False) -> DigestOnly:
        """Those of a loss."""
        return cls(options.reduction, options.token_weights is not None, hidden_grad)


class Shard(NamedTuple):
    """A rank's columns, and what its call has in common with the others'."""

    group_name: str
    vocab_start: int
    vocab_size: int | None = None  # columns from there on are padding
    check_group: bool = True
    digest_only: DigestOnly = DigestOnly()

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group."""
        return group_of(self.group_name)

    def columns(self, width: int) -> Columns:
        """Those of `width` logits a row that are not padding."""
        if self.vocab_size is None:
            return Columns(self.vocab_start, width)
        return Columns(self.vocab_start, min(max(self.vocab_size - self.vocab_start, 0), width))

    def fields(self) -> str:
        """The shard as a string, which `of` reads; a group's name, which may have commas, comes last."""
        start = concrete(self.vocab_start)
        vocab_size = _UNKNOWN if self.vocab_size is None else concrete(self.vocab_size)
        reduction, weights, hidden_grad = self.digest_only
        flags = f"{int(self.check_group)},{int(weights)},{int(hidden_grad)}"
        return f"{start},{vocab_size},{reduction},{flags},{self.group_name}"

    @classmethod
    def of(cls, fields: str) -> Shard:
        """The shard that `fields` describes."""
        start, vocab_size, reduction, *flags, name = fields.split(",", 6)
        check_group, weights, hidden_grad = (flag == "1" for flag in flags)
        known_size = None if int(vocab_size) == _UNKNOWN else int(vocab_size)
        return cls(name, int(start), known_size, check_group, DigestOnly(reduction, weights, hidden_grad))

    def signature(self, width: int, facts: CallFacts, *, reference: bool = False, validate: bool = False) -> Signature:
        """The call on this shard, whose logits have `width` columns, for comparison with the other ranks'."""
        same = {"vocab_size": self.vocab_size, **facts._asdict(), **self.digest_only._asdict()}
        same |= {**same.pop("options")._asdict(), "reference": reference, "validate": validate}
        same |= same.pop("mixture").facts()
        return Signature(self.columns(width), width, same)

    def check_call(self, signature: Signature, values: Tensor, check: Callable[[int], None]) -> None:
        """What no kernel checks: whether the ranks' calls fit together, and with `validate` what tensors hold.

        `values` are the rank's logits, or its rows of the weight; `check` takes the size of the vocabulary.

        Raises:
            ValueError, IndexError: on every rank, see `agreement.layout` and `check`.
        """
        if signature.same["validate"]:
            check(self.layout(signature, values).vocab_size)
        elif self.check_group:
            agreement.meet(signature, self.group, values)

    def layout(self, signature: Signature, values: Tensor) -> Layout:
        """What the ranks hold, see `agreement.layout`."""
        return agreement.layout(signature, self.group, values, check=self.check_group)
